"""The verb `lola-ft publish`: choose the files, check them, send them, and print the result."""

import tempfile
import time
from pathlib import Path

from huggingface_hub import get_token
from rich.table import Table
from rich.text import Text

from lola_ft.adapters.layouts import LAYOUTS
from lola_ft.console import Console
from lola_ft.errors import PublishError, UserError
from lola_ft.file_names import CARD_FILE
from lola_ft.hub.publication import Base, Source, find_base, find_source
from lola_ft.hub.reload_check import check_in_fresh_process
from lola_ft.hub.retry import Wait
from lola_ft.hub.scan import refuse_private
from lola_ft.hub.stage import Staged, stage
from lola_ft.hub.upload import upload
from lola_ft.repo_id import is_repo_id


def publish(
    path: str | Path,
    repo: str,
    private: bool = False,
    layout: str | None = None,
    base: str | None = None,
    base_id: str | None = None,
    skip_check: bool = False,
    dry_run: bool = False,
    wait: Wait = time.sleep,
) -> None:
    """Publish a run's adapter, an adapter's folder or a merged model; publishing again updates the repository.

    Args:
        repo: The repository, `owner/name`; created if it does not exist.
        layout: Layout to convert an adapter to; None keeps its own.
        base: The base's folder or Hub id for the check, if the base that the source names is not on this machine.
        base_id: Hub id of the base, if the source names a local folder.
        skip_check: Do not reload the files and compare them.
        dry_run: Do everything except sending.

    Raises:
        PublishError: The folder must not be sent, cannot be sent, or did not arrive completely.
    """
    if not is_repo_id(repo):
        raise PublishError(f"--repo {repo}: not the id of a repository. Write it as owner/name.")
    if layout is not None and layout not in LAYOUTS:
        raise PublishError(f"--layout {layout}: not known; use one of {', '.join(LAYOUTS)}.")
    if not dry_run:
        require_token(repo)
    console = Console()
    source = find_source(path)
    its_base = find_base(source, base, base_id)
    with tempfile.TemporaryDirectory(prefix="lola_ft-publish-") as temporary:
        staged = stage(source, its_base, repo, layout, Path(temporary) / repo.partition("/")[2])
        own = [source.folder, *([source.run] if source.run else []), *([its_base.folder] if its_base.folder else [])]
        refuse_private(staged.folder, staged.files, own)
        _say_terms(staged, its_base, console)
        console.print(_check(source, staged, its_base, skip_check))
        if dry_run:
            _show(staged, repo, console)
            return
        what = "an adapter" if source.kind == "adapter" else "merged weights"
        done = upload(staged, repo, private, f"Publish {what} with lola_ft", wait)
    deleted = f"; deleted {', '.join(done.deleted)} of an earlier publication" if done.deleted else ""
    visible = "private" if done.private else "public"
    console.print(f"{len(staged.files)} files sent{deleted}.")
    _say_left_out(staged, console)
    console.print(f"Published: {done.url} ({visible}, commit {done.commit}).")


def publish_run(run: Path, repo: str, private: bool, layout: str, base_id: str | None, wait: Wait = time.sleep) -> None:
    """Publish a run that just ended. On failure the run stays complete, and the error says how to publish it later."""
    try:
        publish(run, repo, private, layout, base_id=base_id, wait=wait)
    except UserError as error:
        options = [f"--repo {repo}", *(["--private"] if private else []), f"--layout {layout}"]
        options += [f"--base-id {base_id}"] if base_id else []
        raise PublishError(
            f"{error}\nThe run itself is complete, and its adapter is in {run / 'adapter'}, but it was not published. "
            f"Publish it later with: lola-ft publish {run} {' '.join(options)}"
        ) from error


def require_token(repo: str) -> None:
    """Raise PublishError, before training or a long check, if the user is not logged in to the Hub."""
    if not get_token():
        raise PublishError(
            f"{repo}: publishing needs a Hub token with write access. Log in with `hf auth login`, or set HF_TOKEN."
        )


def _check(source: Source, staged: Staged, base: Base, skip: bool) -> str:
    if skip:
        return "NOT CHECKED: the files were not reloaded and compared before sending (--skip-check)."
    if source.kind == "adapter" and base.folder is None:
        raise PublishError(
            f"{source.folder}: its base {base.id} is not on this machine, so the files to send cannot be checked. Name "
            "the base's folder with --base, or pass --skip-check."
        )
    return check_in_fresh_process(source, staged.folder, base.folder)


def _show(staged: Staged, repo: str, console: Console) -> None:
    """Print the files that would be sent, and the card."""
    table = Table(title=f"Would be sent to {repo}", title_justify="left")
    table.add_column("file")
    table.add_column("bytes", justify="right")
    for name in staged.files:
        table.add_row(Text(name), f"{(staged.folder / name).stat().st_size:,}")
    console.print(table)
    _say_left_out(staged, console)
    card = (staged.folder / CARD_FILE).read_text(encoding="utf-8")
    console.print(card)
    console.print("Dry run: nothing was sent.")


def _say_terms(staged: Staged, base: Base, console: Console) -> None:
    """Print the base's licence, and warn of a gated base, because the new repository will not be gated."""
    terms = staged.terms
    if terms.licence:
        console.print(f"The card of {base.id} names the licence {terms.name or terms.licence}; the new card does too.")
    if terms.gate:
        console.print(
            f"Warning: {base.id} is gated: only people who accept its authors' terms may use its weights. Check that "
            "the terms allow you to share a model made from it. The new card mentions the gate, but the new repository "
            "is not gated unless you set that up."
        )


def _say_left_out(staged: Staged, console: Console) -> None:
    if staged.left_out:
        console.print(f"Left out: {', '.join(staged.left_out)}.")
