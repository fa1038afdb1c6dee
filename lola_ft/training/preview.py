"""`lola-ft preview`: what a recipe's data becomes, before anything is trained."""

import unicodedata
from collections import Counter
from itertools import groupby, islice
from statistics import median
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerFast

from lola_ft.data.encoding import MASKED
from lola_ft.recipe import Recipe
from lola_ft.training.reports.tables import print_report
from lola_ft.training.setup import fit_to_base, read_data

if TYPE_CHECKING:
    from lola_ft.data import Encoded

LEARNED, READ, END = "black on green", "dim", "bold white on red"
_BINS = 10
_BAR = 40
_RUN_SHOWN = 1200
"""Characters of a stretch of text that are shown; a longer one loses its middle."""


def preview(recipe: Recipe, examples: int, languages: int, console: Console | None = None) -> None:
    """Print what is dropped, how long sequences are, and some of them, learned and read tokens told apart.

    Args:
        examples: Sequences shown of each language.
        languages: Languages shown, the largest first.

    Raises:
        UserError: As a run would, for anything wrong with the recipe's data or the base's tokenizer.
    """
    console = console or Console()
    recipe, tokenizer, data = read_data(*fit_to_base(recipe, console))
    print_report(data, console)
    for line in length_lines(data.train, recipe.data.max_length):
        console.print(line, markup=False, highlight=False)
    for language, count in Counter(data.train.languages).most_common(languages):
        places = (place for place, code in enumerate(data.train.languages) if code == language)
        for place in islice(places, min(examples, count)):
            row = data.train.dataset[place]
            learned = sum(label != MASKED for label in row["labels"])
            console.rule(Text(f"{language}: {len(row['input_ids'])} tokens, {learned} learned"), align="left")
            console.print(shown(row["input_ids"], row["labels"], tokenizer, plain=console.color_system is None))
    console.print(_legend(tokenizer, plain=console.color_system is None))


def length_lines(encoded: "Encoded", max_length: int) -> list[str]:
    """A histogram of the sequences' lengths in tokens, as lines of text."""
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
    """Show a sequence: learned tokens in colour (`plain`: in ⟦ ⟧), read ones dim, the learned EOS by its name."""
    text = Text()
    for learned, tokens in groupby(zip(ids, labels, strict=True), key=lambda pair: pair[1] != MASKED):
        run = [token for token, _ in tokens]
        start, end = ("⟦", "⟧") if learned and plain else ("", "")
        text.append(start)
        for is_end, part in groupby(run, key=lambda token: token == tokenizer.eos_token_id):
            pieces = list(part)
            words = tokenizer.eos_token * len(pieces) if is_end else _printable(tokenizer.decode(pieces))
            text.append(words, style=(END if is_end else LEARNED) if learned else READ)
        text.append(end)
    return text


def _legend(tokenizer: PreTrainedTokenizerFast, plain: bool) -> Text:
    marks = [("⟦learned⟧" if plain else "learned", LEARNED), ("read only", READ), (tokenizer.eos_token, END)]
    return Text("  ").join([Text(words, style=style) for words, style in marks])


def _printable(text: str) -> str:
    """Text that cannot steer the terminal, line breaks made visible, a long stretch without its middle."""
    if len(text) > _RUN_SHOWN:
        text = f"{text[: _RUN_SHOWN // 2]} […] {text[-_RUN_SHOWN // 2 :]}"
    safe = (
        char if char in "\n\t" or unicodedata.category(char) != "Cc" else char.encode("unicode_escape").decode()
        for char in text
    )
    return "".join(safe).replace("\n", "↵\n")
