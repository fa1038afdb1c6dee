"""Which experts which languages use: profiles, their comparison, and the choice of experts to train.

What needs PEFT or matplotlib is imported when it is first used: training takes the measures alone.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lola_ft.routing.measures import dead_experts, flip_rate, jensen_shannon, largest_share, load_entropy, shares

if TYPE_CHECKING:
    from lola_ft.routing.descent import follow_descent
    from lola_ft.routing.drift import compare
    from lola_ft.routing.profile import Profile, read_profile, save_profile
    from lola_ft.routing.profiling import profile_routing
    from lola_ft.routing.relevance import save_choice, select_experts
    from lola_ft.routing.report import write_report

__all__ = [
    "Profile",
    "compare",
    "dead_experts",
    "flip_rate",
    "follow_descent",
    "jensen_shannon",
    "largest_share",
    "load_entropy",
    "profile_routing",
    "read_profile",
    "save_choice",
    "save_profile",
    "select_experts",
    "shares",
    "write_report",
]

_HOMES = {
    "Profile": "profile",
    "compare": "drift",
    "follow_descent": "descent",
    "profile_routing": "profiling",
    "read_profile": "profile",
    "save_choice": "relevance",
    "save_profile": "profile",
    "select_experts": "relevance",
    "write_report": "report",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lola_ft.routing' has no attribute '{name}'")
    return getattr(import_module(f"lola_ft.routing.{_HOMES[name]}"), name)
