"""Make the package's file of declarations from the whole data set. `python benchmarks/select_declaration.py SOURCE`

The source is JSON Lines packed with xz, one object for each of 456 languages and scripts. `lola_ft/nano/declaration.md`
names its origin. The languages of `lola_ft/routing/families.csv` are kept, one text per language and script, under
CLDR's code of the language. Texts are copied without changes, but without paragraphs that are only `&1`, the source's
mark for a lost paragraph. A text is left out if one of its articles has no other paragraph. Running it again writes the
same bytes.
"""

import argparse
import json
import lzma
from pathlib import Path
from typing import Any

from lola_ft.language_codes import short_code
from lola_ft.nano.cldr import english_names
from lola_ft.nano.declaration import DECLARATION_FILE, read_declarations
from lola_ft.routing.language_families import read_languages

TAGS = {
    # The same language under another code: Tosk is the standard of Albanian, Bokmål CLDR's Norwegian, and so on.
    "als": "sq", "lah": "pnb", "bik": "bcl", "nb": "no", "tl": "fil", "zlm-Latn": "ms", "zlm-Arab": "ms-Arab",
    # One variant stands for the language.
    "ak-asante": "ak", "de-1996": "de", "el-monoton": "el", "pt-BR": "pt", "rm-rumgr": "rm",
    # The usual script is not named; an unusual one is.
    "az-Latn": "az", "bs-Latn": "bs", "mn-Cyrl": "mn", "sr-Cyrl": "sr", "tk-Latn": "tk", "ug-Arab": "ug",
    "uz-Latn": "uz", "azb": "azb-Latn",
}  # fmt: skip
"""lola_ft's tags by the source's, if they differ."""
LEFT_OUT = {
    "ak", "ak-akuapem", "de-1901", "el-polyton", "fa-AF", "ha-NE", "ha-NG", "pt-PT", "rm", "rm-puter", "rm-surmiran",
    "rm-sursilv", "rm-sutsilv", "rm-vallader", "ta-LK",  # other variants of a language that is kept
    "sa-Gran",  # the text of `sa` in a script of scholars
    "ckb-Latn",  # the text is the one of `ku`
}  # fmt: skip
LOST = "&1"
"""The source's mark for a paragraph that it could not read."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the whole data set, xz")
    parser.add_argument("--out", type=Path, default=DECLARATION_FILE, help="(the package's file)")
    args = parser.parse_args()
    with lzma.open(args.source, "rt", encoding="utf-8") as file:
        kept = select([json.loads(line) for line in file])
    lines = "".join(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in kept)
    args.out.write_bytes(lzma.compress(lines.encode(), preset=9 | lzma.PRESET_EXTREME))
    found = read_declarations(args.out)
    languages = {declaration.language for declaration in found.values()}
    print(f"{len(found)} texts in {len(languages)} languages: {args.out}, {args.out.stat().st_size:,} bytes")


def select(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the wanted rows under lola_ft's tags, sorted by tag."""
    table, names = read_languages(), english_names()
    kept = []
    for row in rows:
        source_tag = row["language"]
        tag = TAGS.get(source_tag, source_tag)
        code = tag.partition("-")[0]
        if code not in table or source_tag in LEFT_OUT:
            continue
        articles = [article | {"paragraphs": without_lost(article["paragraphs"])} for article in row["articles"]]
        if not all(article["paragraphs"] for article in articles):
            print(f"{source_tag} is left out: an article is lost")
            continue
        name = names.get(short_code(code)) or table[code].name
        copied = {field: row[field] for field in ("latitude", "longitude", "title")}
        texts = {"preamble": without_lost(row["preamble"]), "articles": articles}
        kept.append({"tag": tag, "name": name} | copied | texts)
    return sorted(kept, key=lambda row: row["tag"])


def without_lost(paragraphs: list[str]) -> list[str]:
    return [paragraph for paragraph in paragraphs if paragraph.strip() != LOST]


if __name__ == "__main__":
    main()
