"""Sending a staged folder in one commit, and checking on the Hub that everything arrived."""

import hashlib
import json
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo

from lola_ft.errors import PublishError
from lola_ft.files import sha256_of
from lola_ft.hub.retry import Wait, with_retries
from lola_ft.hub.stage import LIST_FILE, Staged


@dataclass(frozen=True)
class Published:
    """The publication as it is on the Hub.

    Attributes:
        deleted: Files of an earlier publication that were deleted.
    """

    url: str
    commit: str
    private: bool
    deleted: tuple[str, ...]


def upload(staged: Staged, repo: str, private: bool, message: str, wait: Wait = time.sleep) -> Published:
    """Send the folder in one commit and check that it arrived.

    Args:
        private: A new repository becomes private; an existing repository must be private.
        wait: A function that waits some seconds before another try.

    Raises:
        PublishError: The Hub refuses the upload, or holds other files afterwards.
    """
    api = HfApi(library_name="lola_ft")
    sent = with_retries(partial(_send, api, staged, repo, private, message), repo, wait)
    with_retries(partial(_verify, api, staged, repo, sent), repo, wait)
    return sent


def _send(api: HfApi, staged: Staged, repo: str, private: bool, message: str) -> Published:
    """Try once, from the repository's present state, which may contain an earlier try whose answer was lost."""
    api.create_repo(repo, private=True if private else None, exist_ok=True)
    head = api.model_info(repo)
    if private and head.private is False:
        raise PublishError(
            f"{repo}: exists and is public, but --private was given. Make it private, or choose a new name."
        )
    stale = sorted(_published_before(api, repo, head) - set(staged.files))
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(name, staged.folder / name) for name in staged.files
    ]
    operations += [CommitOperationDelete(name) for name in stale]
    commit = api.create_commit(repo, operations, commit_message=message, parent_commit=head.sha)
    return Published(f"{api.endpoint}/{repo}", commit.oid, bool(head.private), tuple(stale))


def _published_before(api: HfApi, repo: str, head: ModelInfo) -> set[str]:
    """Return the files in the repository that come from an earlier publication."""
    present = {sibling.rfilename for sibling in head.siblings or ()}
    if LIST_FILE not in present:
        return set()
    with tempfile.TemporaryDirectory() as cache:
        file = api.hf_hub_download(repo, LIST_FILE, revision=head.sha, cache_dir=cache)
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    listed = content.get("files") if isinstance(content, dict) else None
    return present & {name for name in listed if isinstance(name, str)} if isinstance(listed, list) else set()


def _verify(api: HfApi, staged: Staged, repo: str, sent: Published) -> None:
    """Compare every file's size and hash with the Hub's list."""
    info = api.model_info(repo, files_metadata=True)
    if info.sha != sent.commit:
        raise PublishError(
            f"{repo}: after the upload its head is {info.sha}, not our commit {sent.commit}, so someone else changed "
            "it. Look at the repository, then run the command again."
        )
    there = {sibling.rfilename: sibling for sibling in info.siblings or ()}
    wrong = [name for name in staged.files if name not in there or not _same(staged.folder / name, there[name])]
    wrong += [name for name in sent.deleted if name in there]
    if wrong:
        raise PublishError(f"{repo}: the Hub does not hold what was sent: {', '.join(wrong)}. Run the command again.")


def _same(file: Path, sibling: object) -> bool:
    """Tell whether the Hub's size and hash equal the file's: SHA-256 of large files, git's blob hash of small files."""
    size, lfs, blob = (getattr(sibling, name, None) for name in ("size", "lfs", "blob_id"))
    if size != file.stat().st_size:
        return False
    if lfs is not None:
        return lfs.sha256 == sha256_of(file)
    return blob == hashlib.sha1(b"blob %d\0" % size + file.read_bytes()).hexdigest()
