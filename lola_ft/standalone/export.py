"""The `export` verb: write a folder with a checkpoint's weights and the code that loads them without lola_ft."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from lola_ft.checkpoints.base_checkpoint import BaseCheckpoint
from lola_ft.checkpoints.folder import CONFIG_FILE, TEMPLATE_FILE, TERMS_FILES, TOKENIZER_FILES
from lola_ft.console import shown_progress
from lola_ft.errors import UserError
from lola_ft.file_names import CARD_FILE, MERGE_REPORT_FILE, WEIGHTS_INDEX_FILE
from lola_ft.files import check_new_folder, copy_files, replace_folder, write_text
from lola_ft.standalone.own_code import complete_folder, config_for
from lola_ft.subject import find_subject, is_adapted

_OTHER_FILES = ("generation_config.json", "*.py", TEMPLATE_FILE, MERGE_REPORT_FILE, CARD_FILE, *TERMS_FILES)


@dataclass(frozen=True)
class Export:
    """The record of an export.

    Attributes:
        linked: Names of weight files that are hard links, which need no more space on the disk.
        copied: Names of weight files that were copied, because the target is on another disk.
        other_code: Python files of the checkpoint that were kept.
    """

    linked: list[str]
    copied: list[str]
    other_code: list[str]


def export(source: str | Path, out: str | Path, revision: str | None = None) -> Export:
    """Write a base or a merged model as a folder that loads without lola_ft.

    The weights do not change. They are in the Hub's layout, and hard links if the disk allows it.

    Args:
        source: A folder or a Hub id.
        out: Folder to write; must not exist or be empty.
        revision: Branch, tag or commit on the Hub.

    Raises:
        CheckpointError: If the checkpoint is damaged, or its config asks for something that the code does not support.
        UserError: If the model needs no code of lola_ft, is an adapter, or `out` is in use.
    """
    check_new_folder(out)
    if is_adapted(Path(source)):
        raise UserError(
            f"{source}: is a run or an adapter, without a model's weights. Merge it first: merge.py {source}"
        )
    checkpoint = BaseCheckpoint.open(find_subject(source, revision=revision).folder)
    family = checkpoint.family
    if not family.auto_map:
        raise UserError(
            f"{source}: transformers has its own class for {family.title} models ({family.model_type}), so this model "
            "already loads without lola_ft. Use it directly."
        )
    checkpoint.check_tied_head()
    linked, copied = list[str](), list[str]()
    with replace_folder(out) as folder:
        with shown_progress("Copying weights", sum(file.stat().st_size for file in checkpoint.files)) as advance:
            for file in checkpoint.files:
                (linked if _link_or_copy(file, folder / file.name) else copied).append(file.name)
                advance(file.stat().st_size)
        copy_files(checkpoint.folder, folder, (WEIGHTS_INDEX_FILE, *_OTHER_FILES, *TOKENIZER_FILES))
        config = config_for(family, checkpoint.config_json, "" if Path(source).exists() else str(source))
        write_text(folder / CONFIG_FILE, json.dumps(config, indent=2) + "\n")
        return Export(linked, copied, complete_folder(family, folder))


def _link_or_copy(file: Path, target: Path) -> bool:
    """Link the file, or copy it if that fails. Return True if it was linked."""
    try:
        os.link(file.resolve(), target)  # resolved, because the Hub's cache holds symbolic links
    except OSError:
        shutil.copyfile(file, target)
        return False
    return True


def export_command(source: str, out: str, revision: str | None) -> None:
    """Export a model, and print what was done."""
    done = export(source, out, revision)
    how = [f"{len(files)} {what}" for files, what in ((done.linked, "linked"), (done.copied, "copied")) if files]
    print(f"Weight files: {', '.join(how)}.")
    if done.other_code:
        print(f"Kept {', '.join(done.other_code)}; config.json now names lola_ft's code.")
    print(f'{out} loads without lola_ft: AutoModelForCausalLM.from_pretrained("{out}", trust_remote_code=True)')
