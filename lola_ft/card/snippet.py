"""Code that loads the model of a card: Python that runs without changes."""

from lola_ft.card.facts import CardFacts


def snippets(facts: CardFacts) -> list[tuple[str, str]]:
    """Return pairs of a heading and code. Each runs by itself, but the last one uses the model of the first."""
    merged_with = "With lola_ft" if facts.family is None or facts.family.native else "With transformers"
    found = [(merged_with, _merged(facts)) if facts.kind == "merged" else ("With lola_ft", _adapter(facts))]
    if facts.stock_peft:
        found.append(("With stock PEFT", _stock_peft(facts)))
    if any(name.startswith("tokenizer") for name in facts.files):
        found.append(("Generate", _generate(facts)))
    return found


def _adapter(facts: CardFacts) -> str:
    folder = f'snapshot_download("{facts.location}")' if facts.published else f'"{facts.location}"'
    download = "from huggingface_hub import snapshot_download\n\n" if facts.published else ""
    quantization = '"nf4"' if facts.quantization == "nf4" else "None"
    return f"""import lola_ft
{download}model = lola_ft.load_base({_base(facts)}, quantization={quantization})
model = lola_ft.load_adapter(model, {folder})
"""


def _stock_peft(facts: CardFacts) -> str:
    return f"""{_registration(facts)}from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({_base(facts)}, dtype="auto")
model = PeftModel.from_pretrained(model, "{facts.location}")
"""


def _merged(facts: CardFacts) -> str:
    return f"""{_registration(facts)}from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{facts.location}", dtype="auto")
"""


def _registration(facts: CardFacts) -> str:
    """Return the import that makes transformers load a class of lola_ft; "" where transformers brings the class."""
    if facts.family is None:
        return "import lola_ft  # tells transformers about families that it does not bring\n"
    return f"import lola_ft  # tells transformers what {facts.family.title} is\n" if facts.family.native else ""


def _generate(facts: CardFacts) -> str:
    return f"""from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{facts.location}")
inputs = tokenizer("Jina langu ni", return_tensors="pt").to(model.device)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))
"""


def _base(facts: CardFacts) -> str:
    revision = facts.base_revision
    pinned = f', revision="{revision}"' if revision and revision != "main" and facts.published else ""
    return f'"{facts.base}"{pinned}'
