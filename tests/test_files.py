"""Nothing is ever half-written: a crash leaves what was there, and leftovers of an earlier crash do no harm."""

import errno
import os
import re
from pathlib import Path

import pytest

from lola_ft.errors import WriteError
from lola_ft.files import replace_folder, write_text


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fill_and_crash(target: Path, error: type[BaseException]) -> None:
    with replace_folder(target) as folder:
        (folder / "new").write_text("new")
        raise error


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A folder with something in it."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "old").write_text("old")
    return folder


def test_a_new_folder_appears_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with replace_folder(target) as folder:
        (folder / "new").write_text("new")
        assert not target.exists()
        assert folder.parent == target.parent  # the same file system, so that a rename puts it in place
    assert names(target) == ["new"]
    assert names(target.parent) == ["out"]


def test_an_old_folder_is_replaced_whole(old: Path) -> None:
    with replace_folder(old) as folder:
        (folder / "new").write_text("new")
        assert names(old) == ["old"]
    assert names(old) == ["new"]
    assert names(old.parent) == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_crash_keeps_the_old_folder(old: Path, error: type[BaseException]) -> None:
    with pytest.raises(error):
        fill_and_crash(old, error)
    assert names(old) == ["old"]
    assert (old / "old").read_text() == "old"
    assert names(old.parent) == ["out"]


def test_a_crash_leaves_no_new_folder(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        fill_and_crash(tmp_path / "out", RuntimeError)
    assert names(tmp_path) == []


def test_leftovers_of_a_killed_process_are_cleaned_and_not_taken_over(old: Path) -> None:
    for leftover in (".out.partial", ".out.old"):
        (old.parent / leftover / "deep").mkdir(parents=True)
        (old.parent / leftover / "half").write_text("half")
    with replace_folder(old) as folder:
        assert names(folder) == []
        (folder / "new").write_text("new")
    assert names(old) == ["new"]
    assert names(old.parent) == ["out"]


def test_an_empty_block_gives_an_empty_folder(old: Path) -> None:
    with replace_folder(str(old)):
        pass
    assert names(old) == []


def test_text_is_written_in_utf_8(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "Kiswahili, 日本語\n")
    assert (tmp_path / "file").read_bytes() == "Kiswahili, 日本語\n".encode()
    write_text(str(tmp_path / "file"), "shorter")
    assert (tmp_path / "file").read_text() == "shorter"
    assert names(tmp_path) == ["file"]


def test_a_crash_keeps_the_old_text(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "file", "new, and half of a pair: \ud800")
    assert (tmp_path / "file").read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_a_leftover_of_a_killed_process_is_not_taken_over(tmp_path: Path) -> None:
    (tmp_path / ".file.partial").write_text("a long half-written text")
    write_text(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "new"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EFBIG, errno.EROFS])
def test_a_folder_that_the_disk_does_not_take_is_named(old: Path, reason: int) -> None:
    with pytest.raises(WriteError, match=f"{re.escape(str(old))}: cannot be written"), replace_folder(old):
        raise OSError(reason, "it is full")
    assert names(old) == ["old"]
    assert names(old.parent) == ["out"]


def test_an_error_about_another_file_passes_unchanged(old: Path) -> None:
    with pytest.raises(PermissionError), replace_folder(old):
        raise PermissionError(errno.EACCES, "not yours", "/elsewhere/base.safetensors")
    with pytest.raises(FileNotFoundError), replace_folder(old):
        (old / "missing").read_text()


def test_a_full_disk_is_named_and_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "a").write_text("old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WriteError, match=r"a: cannot be written \(No space left on device\)"):
        write_text(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old"
    assert names(tmp_path) == ["a"]
