"""The experts that get LoRA: all, lists, or a file written by `lola-ft routing select`."""

import json
from pathlib import Path

from lola_ft.errors import UserError

Selection = tuple[tuple[int, ...], ...]
"""Ids of the experts that get LoRA, one tuple per MoE layer in order."""


def read_selection(select: str | list[list[int]]) -> Selection | None:
    """Return the experts for each MoE layer; None for all.

    Args:
        select: `all`, the lists themselves, or the path of a JSON file with the lists under `experts`.

    Raises:
        UserError: If the file does not have this form.
    """
    if select == "all":
        return None
    lists = _lists_of(Path(select)) if isinstance(select, str) else select
    return tuple(tuple(sorted(ids)) for ids in lists)


def check_selection(selection: Selection, num_layers: int, num_experts: int) -> None:
    """Check that a selection of experts fits a base.

    Raises:
        UserError: If it does not fit. The message names the layer.
    """
    where = "adapter.experts.select"
    if len(selection) != num_layers:
        raise UserError(
            f"{where}: {len(selection)} lists, but the base has {num_layers} MoE layers; give one list per MoE layer."
        )
    for layer, ids in enumerate(selection):
        if wrong := [e for e in ids if not 0 <= e < num_experts]:
            raise UserError(
                f"{where}: list {layer}: there is no expert {wrong[0]}; experts are 0 to {num_experts - 1}."
            )
        if len(set(ids)) != len(ids):
            raise UserError(f"{where}: list {layer} names an expert twice: {list(ids)}.")
    if not any(selection):
        raise UserError(f"{where}: no expert is named. Leave `experts` out to train none.")


def _lists_of(file: Path) -> list[list[int]]:
    wanted = 'a JSON file with "experts": a list of expert numbers for each MoE layer'
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); adapter.experts.select wants {wanted}.") from error
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON ({error}); adapter.experts.select wants {wanted}.") from error
    lists = content.get("experts") if isinstance(content, dict) else None
    if not isinstance(lists, list) or not all(
        isinstance(ids, list) and all(type(e) is int for e in ids) for ids in lists
    ):
        raise UserError(f"{file}: not {wanted}.")
    return lists
