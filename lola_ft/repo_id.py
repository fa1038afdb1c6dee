"""Names on the Hugging Face Hub: repositories (`owner/name`) and commits."""

import re

_REPO_ID = re.compile(r"[A-Za-z0-9_](?:[\w.-]*\w)?/[A-Za-z0-9_](?:[\w.-]*\w)?", re.ASCII)
_LONGEST_NAME = 96
_COMMIT = re.compile(r"[0-9a-f]{40}")


def is_repo_id(text: str) -> bool:
    """Tell whether a text has the form of a repository's id, which a folder's path may have too."""
    name = text.rpartition("/")[2]
    if not _REPO_ID.fullmatch(text) or len(name) > _LONGEST_NAME:
        return False
    return "--" not in text and ".." not in text and not text.endswith(".git")


def is_commit(revision: str | None) -> bool:
    """Tell whether a revision is a commit, which always means the same files; a branch or tag may move."""
    return revision is not None and _COMMIT.fullmatch(revision) is not None
