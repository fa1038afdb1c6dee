"""The energy that training takes, by codecarbon without the network, and what it emits by the grid's mean intensity."""

import importlib.util
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from lola_ft.errors import UserError
from lola_ft.training import processes

_HOW = {
    "intel_rapl": "CPU: measured (RAPL)",
    "windows_emi": "CPU: measured (energy meter interface)",
    "intel_power_gadget": "CPU: measured (Power Gadget)",
    "cpu_load": "CPU: estimated from the load and a nominal power of {tdp} W, as no RAPL counter can be read",
    "constant": "CPU: estimated from a nominal power of {tdp} W, as no RAPL counter can be read",
}

_WHOSE = {False: "CPU and memory of this process alone", True: "everything on the main process's machine"}


class EnergyMeter(TrainerCallback):
    """Runs while training does; what was used before a resume is added."""

    def __init__(self, country: str, tokens: Callable[[], int]) -> None:
        """Prepare to measure.

        Args:
            country: ISO 3166 code of three letters.
            tokens: How many tokens were trained on so far.
        """
        self.country, self._tokens = country, tokens
        self._before = {"kwh": 0.0, "g_co2": 0.0}
        self._tracker: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
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

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        self._tracker.stop()

    def state(self) -> dict[str, Any]:
        """What training has used until now."""
        if self._tracker is None:
            return dict(self._before)
        if (now := getattr(self._tracker, "final_emissions_data", None)) is None:  # it is still measuring
            self._tracker.flush()
            now = self._tracker._prepare_emissions_data()
        return {
            "kwh": self._before["kwh"] + now.energy_consumed,
            "g_co2": self._before["g_co2"] + now.emissions * 1000,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self._before = dict(state)

    def as_dict(self) -> dict[str, Any]:
        """For the manifest."""
        used = self.state()
        hardware = self._tracker._hardware
        return {
            "kwh": round(used["kwh"], 9),
            "g_co2": round(used["g_co2"], 6),
            "kwh_per_million_tokens": round(used["kwh"] / max(self._tokens(), 1) * 1e6, 9),
            "country": self.country,
            "grid_g_co2_per_kwh": round(used["g_co2"] / max(used["kwh"], 1e-30), 1),
            "measured": "; ".join([*map(_how, hardware), _WHOSE[processes.count() > 1], "codecarbon, offline"]),
        }


def refuse_without_codecarbon(country: str) -> None:
    """Refuse to promise a figure that there would be none of.

    Raises:
        UserError: The package is missing, or knows no such country.
    """
    if importlib.util.find_spec("codecarbon") is None:
        raise UserError("train.energy: codecarbon is not installed. Install the extra `energy`, or remove the section.")
    from codecarbon.input import DataSource

    if country not in DataSource().get_global_energy_mix_data():
        raise UserError(f"train.energy.country: codecarbon knows no country '{country}'. Write it as DEU or KEN.")


def _how(part: Any) -> str:
    """How a part's energy is found."""
    name = type(part).__name__
    if name == "CPU":
        return _HOW.get(part._mode, f"CPU: {part._mode}").format(tdp=part._tdp)
    return {"RAM": "memory: estimated from its size", "GPU": "GPU: measured (NVML)"}.get(name, name)
