"""The verb `lola-ft doctor`: facts about the machine, and all checks in order, with their table."""

import json
import platform
from dataclasses import asdict
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from rich.markup import escape
from rich.table import Table

from lola_ft.console import Console
from lola_ft.doctor import probes
from lola_ft.doctor.check import Check, MissingError, examine
from lola_ft.environment import PACKAGES, cpu_name, library_versions, usable_cores, version_of

EXTRAS = {
    "evaluate": ("sacrebleu", "chrF and BLEU of `lola-ft evaluate --task generate`"),
    "harness": ("lm_eval", "the benchmarks of `lola-ft evaluate --suite`"),
    "dev": ("pytest", "the tests"),
}
"""The optional extras: a module that each one installs, and its purpose."""
_SHOWN = {"ok": "green", "missing": "yellow", "failed": "red"}


def doctor(online: bool = False, as_json: bool = False, console: Console | None = None) -> bool:
    """Run all checks (with `online` the Hub's too) and print them; returns True if all core checks are ok."""
    facts, checks = machine(), [*_packages(), *_core(), *_room(), *_extras()]
    if online:
        advice = "Check the network and HF_ENDPOINT; without the Hub, use folders in place of Hub ids."
        checks.append(examine("Hub", probes.hub_answers, advice, core=False))
    works = all(check.status == "ok" for check in checks if check.core)
    if as_json:
        report = {"versions": library_versions(), "machine": facts, "checks": [asdict(check) for check in checks]}
        print(json.dumps(report | {"works": works}, indent=2, ensure_ascii=False))
    else:
        _show(facts, checks, works, console or Console())
    return works


def _packages() -> list[Check]:
    def installed(package: str) -> str:
        if version_of(package) is None:
            raise MissingError("not installed")
        import_module(package)
        return str(version_of(package))

    advice = "Install lola_ft again: pip install -c constraints.txt -e ."
    return [examine(name, lambda name=name: installed(name), advice, core=True) for name in PACKAGES]  # type: ignore[misc]


def _core() -> list[Check]:
    weights = "Install the bitsandbytes version of constraints.txt for this machine's CUDA, or use quantization: none."
    step = "Install the versions of constraints.txt. If that does not help, report the line above."
    cache = "Set LOLA_FT_CACHE to a folder that you may write to."
    return [
        examine("4-bit weights", probes.nf4_round_trip, weights, core=True),
        examine("training step", probes.tiny_training_step, step, core=True),
        examine("cache folder", probes.cache_is_writable, cache, core=True),
    ]


def _room() -> list[Check]:
    """Check the room for LOLA at full size. A smaller base needs less, so these checks are not core."""
    disk = "Free some space, or set LOLA_FT_CACHE and HF_HOME to folders on a larger disk."
    memory = "Close other programs, or use a machine with more memory. The nano base (`lola-ft nano`) needs little."
    return [
        examine("disk", probes.disk_space, disk, core=False),
        examine("memory", probes.free_memory, memory, core=False),
        examine("GPU", _gpu, "Training LOLA at full size needs a GPU. A CPU is enough for the nano base.", core=False),
    ]


def _gpu() -> str:
    import torch

    if not torch.cuda.is_available():
        raise MissingError("no CUDA device that torch can use")
    return str(torch.cuda.get_device_name(0))


def _extras() -> list[Check]:
    def there(module: str, purpose: str) -> str:
        if find_spec(module) is None:
            raise MissingError(f"not installed: {purpose}")
        return purpose

    return [
        examine(
            f"extra {extra}",
            lambda module=module, purpose=purpose: there(module, purpose),  # type: ignore[misc]
            f"pip install 'lola-ft[{extra}]' (in a checkout: pip install -c constraints.txt -e '.[{extra}]')",
            core=False,
        )
        for extra, (module, purpose) in EXTRAS.items()
    ]


def _show(facts: dict[str, Any], checks: list[Check], works: bool, console: Console) -> None:
    versions = library_versions()
    console.print(f"lola_ft {versions['lola-ft']}, Python {versions['python']}, {facts['system']}")
    units = "with" if facts["cpu_bfloat16"] else "without"
    console.print(
        f"{facts['cpu']}, {facts['cores']} cores, {facts['memory_gb']} GB, {units} bfloat16 units"
        + ("" if facts["cpu_bfloat16"] else " (computes in float32)"),
    )
    if gpu := facts["gpu"]:
        bfloat16 = "with" if gpu["bfloat16"] else "without"
        console.print(f"{gpu['name']}, {gpu['memory_gb']} GB, CUDA {gpu['cuda']}, {bfloat16} bfloat16")
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("", "", "finding"):
        table.add_column(heading, overflow="fold")
    for check in checks:
        detail = check.detail if check.status == "ok" else f"{check.detail}\n→ {check.advice}"
        table.add_row(check.name, f"[{_SHOWN[check.status]}]{check.status}[/]", escape(detail))
    console.print(table)
    failing = [check.name for check in checks if check.core and check.status != "ok"]
    console.print("Fine-tuning works here." if works else f"Fine-tuning does not work here: {', '.join(failing)}.")


def machine() -> dict[str, Any]:
    """Return facts about CPU, memory and GPU as plain values; None for unknown facts."""
    facts: dict[str, Any] = {"system": platform.platform(), "cpu": cpu_name(), "cores": usable_cores()}
    try:
        import psutil

        facts["memory_gb"] = round(psutil.virtual_memory().total / 1e9, 1)
    except ImportError:
        facts["memory_gb"] = None
    try:
        import torch
    except ImportError:
        return facts | {"cpu_bfloat16": None, "gpu": None}
    from lola_ft.kernels.precision import has_bfloat16

    facts["cpu_bfloat16"] = bool(has_bfloat16(torch.device("cpu")))
    facts["gpu"] = None
    if torch.cuda.is_available():
        facts["gpu"] = {
            "name": torch.cuda.get_device_name(0),
            "count": torch.cuda.device_count(),
            "memory_gb": round(torch.cuda.get_device_properties(0).total_memory / 1e9, 1),
            "cuda": torch.version.cuda,
            "bfloat16": bool(has_bfloat16(torch.device("cuda"))),
        }
    return facts
