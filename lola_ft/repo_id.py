"""What a repository of the Hugging Face Hub is called: `owner/name`."""

import re

_FORM = re.compile(r"[A-Za-z0-9_](?:[\w.-]*\w)?/[A-Za-z0-9_](?:[\w.-]*\w)?", re.ASCII)
_LONGEST_NAME = 96


def is_repo_id(text: str) -> bool:
    """Whether the text has the form of a repository's id; a folder may have it, too."""
    name = text.rpartition("/")[2]
    if not _FORM.fullmatch(text) or len(name) > _LONGEST_NAME:
        return False
    return "--" not in text and ".." not in text and not text.endswith(".git")
