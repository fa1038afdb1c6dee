"""Routing by language: profiles of the experts that each language uses, their comparison, and the choice of experts.

Modules that need PEFT or matplotlib are imported when they are first used, because training needs only the measures.
"""

from typing import TYPE_CHECKING

from lola_ft.lazy_attributes import lazy_attributes
from lola_ft.routing.measures import dead_experts, flip_rate, jensen_shannon, largest_share, load_entropy, shares

if TYPE_CHECKING:
    from lola_ft.routing.descent import follow_descent
    from lola_ft.routing.drift import compare
    from lola_ft.routing.profile import Profile, read_profile, save_profile
    from lola_ft.routing.profiling import profile_routing
    from lola_ft.routing.relevance import save_choice, select_experts
    from lola_ft.routing.report_page import write_report

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

__getattr__ = lazy_attributes(
    __name__,
    descent="follow_descent",
    drift="compare",
    profile="Profile read_profile save_profile",
    profiling="profile_routing",
    relevance="save_choice select_experts",
    report_page="write_report",
)
