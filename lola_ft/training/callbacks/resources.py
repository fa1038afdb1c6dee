"""Memory and energy: the manifest's peak memory and energy of a run, and freed memory that goes back to the system."""

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from lola_ft.memory import give_back_freed_memory
from lola_ft.training import processes
from lola_ft.training.run_state import RunState

_STATUS = Path("/proc/self/status")
_HOW = {
    "intel_rapl": "CPU: measured (RAPL)",
    "windows_emi": "CPU: measured (energy meter interface)",
    "intel_power_gadget": "CPU: measured (Power Gadget)",
    "cpu_load": "CPU: estimated from the load and a nominal power of {tdp} W, as no RAPL counter can be read",
    "constant": "CPU: estimated from a nominal power of {tdp} W, as no RAPL counter can be read",
}

_WHOSE = {False: "CPU and memory of this process only", True: "everything on the main process's machine"}


class PeakMemory(TrainerCallback):
    """Reads the process's memory after every step; torch records the GPU's peak itself."""

    def __init__(self) -> None:
        self._anonymous = 0.0

    def on_step_end(self, *_: object, **__: object) -> None:
        self._anonymous = max(self._anonymous, process_mb().get("RssAnon", 0.0))

    def as_dict(self) -> dict[str, Any]:
        """Return the manifest's section, in MB."""
        found: dict[str, Any] = {}
        if process_mb():
            found["anonymous_mb"] = round(max(self._anonymous, process_mb()["RssAnon"]), 1)
            found["resident_mb"] = round(process_mb()["VmHWM"], 1)
        how = {
            "anonymous_mb": "largest RssAnon of the process after a step, from Linux",
            "resident_mb": "VmHWM of the process, from Linux, including pages of mapped files",
        }
        if torch.cuda.is_available():
            found["gpu_mb"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)
            how["gpu_mb"] = "torch.cuda.max_memory_allocated"
        return found | {"measured": {key: how[key] for key in found}}


class FreedMemory(TrainerCallback):
    """Gives freed memory back to the system when the process has grown; for training on a CPU.

    Batches of changing length leave gaps between the buffers that stay, and few later buffers fit into them: within 500
    steps a process grew to nearly twice its size. To give the gaps back takes about 0.03 s, and the system clears pages
    again that the next step needs.
    """

    FIRST_STEPS, GROWTH = 10, 1.05
    """After this many steps without giving back, it gives back when the memory is this many times their largest."""

    def __init__(self) -> None:
        self._steps, self._needed = 0, 0.0

    def on_step_end(self, *_: object, **__: object) -> None:
        self.after_step()

    def after_step(self) -> None:
        """Look at the memory, and give freed memory back if it has grown."""
        now = process_mb().get("RssAnon", 0.0)
        self._steps += 1
        if self._steps <= self.FIRST_STEPS:
            self._needed = max(self._needed, now)
        elif now > self.GROWTH * self._needed:
            give_back_freed_memory()
            self._steps, self._needed = 0, 0.0


class EnergyMeter(TrainerCallback):
    """Measures energy with codecarbon, offline, during training; energy used before a resume is added."""

    def __init__(self, country: str, run: RunState) -> None:
        """Store the country (ISO 3166 code of three letters) and the run, which counts the tokens."""
        self.country, self._run = country, run
        self._before = {"kwh": 0.0, "g_co2": 0.0}
        self._tracker: Any = None

    def on_train_begin(self, *_: object, **__: object) -> None:
        from codecarbon import OfflineEmissionsTracker

        self._tracker = OfflineEmissionsTracker(
            country_iso_code=self.country,
            save_to_file=False,
            save_to_api=False,
            tracking_mode="process" if processes.count() == 1 else "machine",
            allow_multiple_runs=True,
            log_level="critical",
        )
        self._tracker.start()

    def on_train_end(self, *_: object, **__: object) -> None:
        self._tracker.stop()

    def state_dict(self) -> dict[str, Any]:
        """Return the energy and emissions of training until now."""
        if self._tracker is None:
            return dict(self._before)
        if (now := getattr(self._tracker, "final_emissions_data", None)) is None:  # it is still measuring
            self._tracker.flush()
            now = self._tracker._prepare_emissions_data()
        kwh, grams = now.energy_consumed, now.emissions * 1000
        return {"kwh": self._before["kwh"] + kwh, "g_co2": self._before["g_co2"] + grams}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._before = dict(state)

    def as_dict(self) -> dict[str, Any]:
        """Return the manifest's section."""
        used = self.state_dict()
        hardware = self._tracker._hardware
        return {
            "kwh": round(used["kwh"], 9),
            "g_co2": round(used["g_co2"], 6),
            "kwh_per_million_tokens": round(used["kwh"] / max(self._run.tokens_seen, 1) * 1e6, 9),
            "country": self.country,
            "grid_g_co2_per_kwh": round(used["g_co2"] / max(used["kwh"], 1e-30), 1),
            "measured": "; ".join([*map(_how, hardware), _WHOSE[processes.count() > 1], "codecarbon, offline"]),
        }


def memory_now() -> str:
    """Return the memory in use, for the progress bar; "" if the system does not report it."""
    if torch.cuda.is_available():
        return f"{torch.cuda.memory_allocated() / 2**30:.1f}G"
    return f"{process_mb()['VmRSS'] / 1024:.1f}G" if process_mb() else ""


def process_mb() -> dict[str, float]:
    """Read the sizes in /proc/self/status in MB, by their names there; {} on systems other than Linux."""
    if not _STATUS.exists():
        return {}
    lines = (line.split() for line in _STATUS.read_text(encoding="utf-8").splitlines())
    return {fields[0].rstrip(":"): int(fields[1]) / 1024 for fields in lines if fields[-1] == "kB"}


def _how(part: Any) -> str:
    """Return the method by which the energy of a part is found."""
    name = type(part).__name__
    if name == "CPU":
        return _HOW.get(part._mode, f"CPU: {part._mode}").format(tdp=part._tdp)
    return {"RAM": "memory: estimated from its size", "GPU": "GPU: measured (NVML)"}.get(name, name)
