"""The demo's tables: accuracy by language family, the weakest languages, and the languages most often confused."""

from collections import defaultdict
from collections.abc import Mapping

from rich.table import Table

from lola_ft.evaluation import ExactMatch
from lola_ft.nano.declaration import Declaration
from lola_ft.routing.language_families import find_language

FAMILIES_SHOWN = 10
WEAKEST_SHOWN = 5
CONFUSED_SHOWN = 10
NO_FAMILY = "constructed"
OTHERS = "other families"


def family_of(tag: str) -> str:
    """Return the language family of a tag."""
    language = find_language(tag)
    return (language.family if language else "") or NO_FAMILY


def families_of(tags: Mapping[str, object]) -> dict[str, list[str]]:
    """Group tags by language family, the largest first; constructed languages form one group."""
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for tag in tags:
        groups[family_of(tag)].append(tag)
    return dict(sorted(groups.items(), key=lambda item: (-len(item[1]), item[0])))


def accuracy_table(results: Mapping[str, ExactMatch], declarations: Mapping[str, Declaration]) -> Table:
    """Make a table of accuracy for all texts, for the largest families, and for the weakest texts.

    Args:
        results: Results by model, including `before` and `after`.
    """
    asked, after = results["before"].asked, results["after"]
    table = Table(title=_title(results["before"], declarations), title_justify="left")
    for heading in ("", "texts", "questions", *results):
        table.add_column(heading, justify="right" if heading else "left")

    def add(name: str, tags: list[str]) -> None:
        questions = sum(asked[tag] for tag in tags)
        shares = (result.accuracy_of(*tags) for result in results.values())
        table.add_row(name, str(len(tags)), f"{questions:,}", *(f"{share:.1%}" for share in shares))

    add("all", list(asked))
    table.add_section()
    groups = families_of(asked)
    for family in list(groups)[:FAMILIES_SHOWN]:
        add(family, groups[family])
    if others := [tag for family in list(groups)[FAMILIES_SHOWN:] for tag in groups[family]]:
        add(OTHERS, others)
    table.add_section()
    weakest = sorted(asked, key=lambda tag: (after.accuracy_of(tag), tag))
    for tag in weakest[:WEAKEST_SHOWN]:
        add(f"{declarations[tag].name} ({tag})", [tag])
    return table


def confusion_table(result: ExactMatch) -> Table:
    """Make a table of the most frequent wrong answers: the right language, the answer, and how often."""
    table = Table(title="Most confused", title_justify="left")
    for heading in ("language", "taken for", "times"):
        table.add_column(heading, justify="right" if heading == "times" else "left")
    for right, given, times in result.most_confused(CONFUSED_SHOWN):
        table.add_row(right, given, str(times))
    return table


def _title(result: ExactMatch, declarations: Mapping[str, Declaration]) -> str:
    languages = {declarations[tag].language for tag in result.asked}
    return f"Accuracy of naming an unseen sentence's language: {len(languages)} languages, {len(result.asked)} texts"
