"""`lola-ft preview`: show a recipe's data as the model will read it, before training."""

import unicodedata
from collections import Counter
from itertools import groupby, islice
from statistics import median
from typing import TYPE_CHECKING, Any

from rich.text import Text
from transformers import PreTrainedTokenizerFast

from lola_ft.console import Console
from lola_ft.data.encoding import MASKED
from lola_ft.recipe import Recipe
from lola_ft.training.reports.tables import print_report
from lola_ft.training.setup import fit_to_base, read_data

if TYPE_CHECKING:
    from lola_ft.data import Encoded

LEARNED, READ, END, WORSE = "black on green", "dim", "bold white on red", "black on yellow"
_BINS = 10
_BAR = 40
_RUN_SHOWN = 1200
"""Most characters shown of a stretch of text; a longer stretch is shown without its middle."""


def preview(recipe: Recipe, examples: int, languages: int, console: Console | None = None) -> None:
    """Print the rows dropped, the lengths of sequences, and some sequences with their learned tokens marked.

    Args:
        examples: Number of sequences to show per language.
        languages: Number of languages to show, the largest first.

    Raises:
        UserError: The recipe's data or the base's tokenizer cannot be used, as in `train`.
    """
    console = console or Console()
    plain = console.color_system is None
    recipe, tokenizer, data = read_data(*fit_to_base(recipe, console))
    print_report(data, console)
    for line in length_lines(data.train, recipe.data.max_length):
        console.print(line)
    for language, count in Counter(data.train.languages).most_common(languages):
        places = (place for place, code in enumerate(data.train.languages) if code == language)
        for place in islice(places, min(examples, count)):
            row = data.train.dataset[place]
            if recipe.objective == "sft":
                learned = sum(label != MASKED for label in row["labels"])
                console.rule(Text(f"{language}: {len(row['input_ids'])} tokens, {learned} learned"), align="left")
                console.print(shown(row["input_ids"], row["labels"], tokenizer, plain))
            else:
                console.rule(Text(f"{language}: {len(row['prompt_ids'])} tokens of prompt"), align="left")
                console.print(judged(row, tokenizer, plain))
    console.print(_legend(tokenizer, recipe.objective, plain))


def length_lines(encoded: "Encoded", max_length: int) -> list[str]:
    """Return a histogram of the sequences' lengths in tokens, as lines of text."""
    lengths = [len(ids) for ids in encoded.dataset["input_ids"]]
    width = max(1, -(-max(lengths) // _BINS))
    bins = Counter((length - 1) // width for length in lengths)
    scale = _BAR / max(bins.values())
    lines = [f"Lengths: median {median(lengths):.0f}, longest {max(lengths)}, data.max_length {max_length}"]
    for place in range(max(bins) + 1):
        bar = "█" * max(round(bins[place] * scale), bins[place] > 0)
        lines.append(f"{place * width + 1:>6} to {(place + 1) * width:<6}{bins[place]:>9,}  {bar}".rstrip())
    return lines


def shown(ids: list[int], labels: list[int], tokenizer: PreTrainedTokenizerFast, plain: bool = False) -> Text:
    """Return a sequence to print: learned tokens in colour (`plain`: in ⟦ ⟧), read tokens dim, EOS by its name."""
    text = Text()
    for learned, tokens in groupby(zip(ids, labels, strict=True), key=lambda pair: pair[1] != MASKED):
        run = [token for token, _ in tokens]
        text.append(_run(run, tokenizer, LEARNED if learned else READ, plain and learned))
    return text


def judged(row: dict[str, Any], tokenizer: PreTrainedTokenizerFast, plain: bool = False) -> Text:
    """Return a prompt and its answers to print, each answer after its judgement; only good answers are green."""
    if "chosen_ids" in row:
        answers = [("chosen", row["chosen_ids"], LEARNED), ("rejected", row["rejected_ids"], WORSE)]
    else:
        good = bool(row["label"][0])
        answers = [("good" if good else "bad", row["completion_ids"], LEARNED if good else WORSE)]
    text = _run(row["prompt_ids"], tokenizer, READ)
    for name, ids, style in answers:
        text.append(f"\n{name}, {len(ids)} tokens: ", style="bold")
        text.append(_run(ids, tokenizer, style, brackets=plain and style == LEARNED))
    return text


def _run(ids: list[int], tokenizer: PreTrainedTokenizerFast, style: str, brackets: bool = False) -> Text:
    """Return tokens to print in one style. EOS is shown by its name, in its own style if it is learned."""
    text = Text("⟦" if brackets else "")
    for is_end, part in groupby(ids, key=lambda token: token == tokenizer.eos_token_id):
        pieces = list(part)
        words = tokenizer.eos_token * len(pieces) if is_end else _printable(tokenizer.decode(pieces))
        text.append(words, style=END if is_end and style != READ else style)
    return text.append("⟧" if brackets else "")


def _legend(tokenizer: PreTrainedTokenizerFast, objective: str, plain: bool) -> Text:
    names = {"sft": ("learned",), "dpo": ("chosen", "rejected"), "kto": ("good", "bad")}[objective]
    kinds = zip(names, (LEARNED, WORSE), strict=False)
    marks = [(f"⟦{name}⟧" if plain and style == LEARNED else name, style) for name, style in kinds]
    marks += [("read only", READ), (tokenizer.eos_token, END)]
    return Text("  ").join([Text(words, style=style) for words, style in marks])


def _printable(text: str) -> str:
    """Return text that is safe to print: control characters escaped, line breaks visible, long text shortened."""
    if len(text) > _RUN_SHOWN:
        text = f"{text[: _RUN_SHOWN // 2]} […] {text[-_RUN_SHOWN // 2 :]}"
    safe = (
        char if char in "\n\t" or unicodedata.category(char) != "Cc" else char.encode("unicode_escape").decode()
        for char in text
    )
    return "".join(safe).replace("\n", "↵\n")
