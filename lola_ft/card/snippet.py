"""Python code for a card that loads its model and runs without changes."""

from lola_ft.card.facts import CardFacts


def snippets(facts: CardFacts) -> list[tuple[str, str]]:
    """Return pairs of a heading and code. Each runs by itself, except the last one, which uses the first's model."""
    found = _of_merged(facts) if facts.kind == "merged" else _of_adapter(facts)
    if any(name.startswith("tokenizer") for name in facts.files):
        found.append(("Generate", _generate(facts)))
    return found


def _of_merged(facts: CardFacts) -> list[tuple[str, str]]:
    with_lola_ft = ("With lola_ft", _merged(facts))
    if carries_code(facts):
        return [("With transformers 4.41 or later", _with_code(facts.location)), _pipeline(facts), with_lola_ft]
    return [with_lola_ft if facts.family is None or facts.family.native else ("With transformers", _merged(facts))]


def _of_adapter(facts: CardFacts) -> list[tuple[str, str]]:
    found = [("With lola_ft", _adapter(facts))]
    if facts.stock_peft:
        found.append(("With stock PEFT", _stock_peft(facts)))
    if facts.layout == "per_expert" and facts.family is not None and facts.family.auto_map and facts.published:
        copy = facts.base.rpartition("/")[2]
        revision = f" --revision {facts.base_revision}" if _pinned(facts) else ""
        export = f"# Once, with lola_ft: lola-ft export {facts.base}{revision} --out {copy}\n"
        found.append(("With stock PEFT, without lola_ft", export + _peft_on_code(facts, f'"{copy}"')))
        found.append(("With the authors' code (transformers 4.41 to 4.51)", _peft_on_code(facts, _base(facts))))
    return found


def carries_code(facts: CardFacts) -> bool:
    """Tell whether the files include the code that loads the model."""
    return facts.kind == "merged" and any(name.startswith("modeling_") for name in facts.files)


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
{_rows(facts)}model = PeftModel.from_pretrained(model, "{facts.location}")
"""


def _merged(facts: CardFacts) -> str:
    return f"""{_registration(facts)}from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{facts.location}", dtype="auto")
"""


def _with_code(location: str) -> str:
    return f"""from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{location}", torch_dtype="auto", trust_remote_code=True)
"""


def _pipeline(facts: CardFacts) -> tuple[str, str]:
    return (
        "As a pipeline",
        f"""from transformers import pipeline

write = pipeline("text-generation", model="{facts.location}", torch_dtype="auto", trust_remote_code=True)
print(write("Jina langu ni", max_new_tokens=20)[0]["generated_text"])
""",
    )


def _peft_on_code(facts: CardFacts, base: str) -> str:
    return f"""from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({base}, torch_dtype="auto", trust_remote_code=True)
{_rows(facts)}model = PeftModel.from_pretrained(model, "{facts.location}")
"""


def _rows(facts: CardFacts) -> str:
    """Return the line that adds embedding rows for the adapter's special tokens; "" without such tokens."""
    return f"model.resize_token_embeddings(max({facts.rows}, model.config.vocab_size))\n" if facts.rows else ""


def _registration(facts: CardFacts) -> str:
    """Return the import that registers lola_ft's model class; "" if transformers has the class itself."""
    if facts.family is None:
        return "import lola_ft  # registers model classes that transformers does not have\n"
    return f"import lola_ft  # registers {facts.family.title} with transformers\n" if facts.family.native else ""


def _generate(facts: CardFacts) -> str:
    return f"""from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{facts.location}")
inputs = tokenizer("Jina langu ni", return_tensors="pt").to(model.device)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))
"""


def _base(facts: CardFacts) -> str:
    return f'"{facts.base}", revision="{facts.base_revision}"' if _pinned(facts) else f'"{facts.base}"'


def _pinned(facts: CardFacts) -> bool:
    return facts.published and facts.base_revision not in (None, "", "main")
