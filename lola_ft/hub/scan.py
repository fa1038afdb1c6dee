"""A search for private text that must not be published: paths, the machine's name, tokens, secret variables' values.

Text files are read line by line; of weights the header's metadata and names; of pictures the readable bytes.
"""

import json
import os
import re
import socket
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import get_token
from safetensors import safe_open

from lola_ft.errors import PublishError

# Vocabularies contain pieces such as "/usr/lib", and compressed pictures contain such bytes by chance. In these files
# only this machine's own folders count as paths.
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model")
_TOKENS = re.compile(
    r"\bhf_[A-Za-z0-9]{20,}|\bapi_org_[A-Za-z0-9]{20,}|\bgh[pousr]_[A-Za-z0-9]{30,}|\bgithub_pat_\w{30,}"
    r"|\bsk-[A-Za-z0-9_-]{20,}|\bAKIA[A-Z0-9]{16}\b|\bxox[abprs]-[\w-]{10,}|\bglpat-[\w-]{20,}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
_BEFORE_PATH = r"""(?:^|(?<=[\s"'`=(\[{,:;>|]))"""
_PATHS = re.compile(
    rf"{_BEFORE_PATH}/[\w.@+-]+/[\w.@+-]"  # /home/someone
    rf"""|{_BEFORE_PATH}/[\w.@+-]+(?=["']|\s*$)"""  # "/data"
    rf"|{_BEFORE_PATH}~\w*/\w"
    r"|\bfile://"
    r"|(?<![A-Za-z])[A-Za-z]:(?:\\{1,2}\w[\w .-]*\\|/\w[\w .-]*/)"  # C:\Users\
)
_SECRET_NAMES = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|PRIVATE|API_?KEY|ACCESS_?KEY|AUTH(?!OR)|_KEY$|_PAT$", re.I)
_SHORTEST_SECRET = 8
_IN_BINARY = " (readable bytes)"


@dataclass(frozen=True)
class Finding:
    """The place and kind of private text in a file, without the text itself."""

    place: str
    kind: str

    def __str__(self) -> str:
        return f"{self.place}: {self.kind}"


def refuse_private(folder: Path, names: Iterable[str], own_folders: Iterable[Path] = ()) -> None:
    """Raise PublishError if a file contains private text.

    Args:
        own_folders: Folders of this machine to search for, besides the home, temporary and working folders.

    Raises:
        PublishError: Private text was found. The message names each place and kind, never the text.
    """
    scanner = Scanner(own_folders)
    findings = [finding for name in sorted(names) for finding in scanner.scan(folder / name)]
    if not findings:
        return
    shown = "\n".join(f"  {finding}" for finding in findings[:20])
    more = f"\n  and {len(findings) - 20} more" if len(findings) > 20 else ""
    raise PublishError(
        f"{len(findings)} places contain private text of this machine; nothing was sent:\n{shown}{more}\n"
        "Remove it from these files of the folder that you publish, then run the command again."
    )


class Scanner:
    """A search for this machine's secrets in files."""

    def __init__(self, own_folders: Iterable[Path] = ()) -> None:
        self._secrets = dict(_secrets())
        folders = {Path.home(), Path.cwd(), Path(tempfile.gettempdir()), *(path.absolute() for path in own_folders)}
        self._own = sorted(text for path in folders if (text := str(path)).count("/") > 1 or "\\" in text)
        host = socket.gethostname()
        telling = len(host) >= 6 and re.search(r"[\d.-]", host) and host != "localhost"
        self._host = re.compile(rf"(?<![\w-]){re.escape(host)}(?![\w-])") if telling else None

    def scan(self, file: Path) -> list[Finding]:
        """List the private text in a file."""
        return [
            Finding(f"{file.name}{place}", kind)
            for place, text in _texts(file)
            for kind in self._kinds(text, only_own=file.name in VOCABULARIES or place == _IN_BINARY)
        ]

    def _kinds(self, text: str, only_own: bool) -> Iterator[str]:
        """Yield each kind of private text in a text.

        Args:
            only_own: Only this machine's own folders count as paths, because the text may look like a path by chance.
        """
        plain = text.replace("\\/", "/")
        if _TOKENS.search(plain):
            yield "a token or key"
        yield from (f"the value of {name}" for value, name in self._secrets.items() if value in plain)
        if any(own in plain for own in self._own) or (not only_own and _PATHS.search(plain)):
            yield "an absolute path of a machine"
        if self._host and not only_own and self._host.search(plain):
            yield "this machine's name"


def _secrets() -> Iterator[tuple[str, str]]:
    """Yield the values to search for, plain and in JSON's spelling, each with its name."""
    named = [(name, value) for name, value in os.environ.items() if _SECRET_NAMES.search(name)]
    if token := get_token():
        named.append(("the token of the Hub", token))
    for name, value in named:
        if len(value.strip()) >= _SHORTEST_SECRET:
            yield value.strip(), name
            yield json.dumps(value.strip())[1:-1], name


def _texts(file: Path) -> Iterator[tuple[str, str]]:
    """Yield a file's texts, each with its place in the file."""
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as weights:
            for key, value in (weights.metadata() or {}).items():
                yield f" (metadata {key})", f"{key}={value}"
            yield " (tensor names)", "\n".join(weights.keys())
        return
    content = file.read_bytes()
    try:
        lines = content.decode("utf-8").splitlines()
    except UnicodeDecodeError:
        for run in re.findall(rb"[\x20-\x7e]{12,}", content):
            yield _IN_BINARY, run.decode("ascii")
        return
    for number, line in enumerate(lines, start=1):
        yield f":{number}", line
