"""A hook of MkDocs: pages of the site that are made from files elsewhere in the repository.

`changelog.md` is CHANGELOG.md, `tutorial.md` is the notebook with the outputs it was stored with. Links that leave
docs/ keep their text only: the site has no other files of the repository.
"""

import base64
import json
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

_OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./[^)]+\)")
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made here."""
    docs = Path(config.docs_dir)
    changelog = (docs.parent / "CHANGELOG.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "changelog.md", content=changelog))
    if (notebook := docs / "tutorial.ipynb").is_file():
        page, pictures = notebook_page(json.loads(notebook.read_text(encoding="utf-8")))
        files.append(File.generated(config, "tutorial.md", content=page))
        for name, content in pictures.items():
            files.append(File.generated(config, f"images/{name}", content=content))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Keep the text only of links to files of the repository outside docs/."""
    return _OUTSIDE.sub(r"\1", markdown)


def notebook_page(notebook: dict[str, Any]) -> tuple[str, dict[str, bytes]]:
    """Return a notebook as Markdown, and the pictures in its outputs by file name."""
    parts, pictures = list[str](), dict[str, bytes]()
    for cell in notebook["cells"]:
        source = "".join(cell["source"]).strip()
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(_fenced(source, "python"))
        for output in cell["outputs"]:
            if picture := output.get("data", {}).get("image/png"):
                name = f"tutorial_{len(pictures) + 1}.png"
                pictures[name] = base64.b64decode("".join(picture))
                parts.append(f"![What the code above draws](images/{name})")
            elif text := _text(output):
                parts.append(_fenced(text, "text"))
    return "\n\n".join(parts) + "\n", pictures


def _text(output: dict[str, Any]) -> str:
    """Return what a cell printed, without colours; "" for what is not text."""
    raw = output.get("text") or output.get("data", {}).get("text/plain") or ""
    return _ESCAPES.sub("", "".join(raw)).strip("\n")


def _fenced(text: str, language: str) -> str:
    return f"````{language}\n{text}\n````"
