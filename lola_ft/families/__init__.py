"""The base families: a description of the checkpoints of each model type, and the registry of the supported ones.

To add a family, write its file and list it here.
"""

from difflib import get_close_matches
from typing import Any

from lola_ft.errors import CheckpointError
from lola_ft.families.architecture import Architecture
from lola_ft.families.bloom import BLOOM
from lola_ft.families.deepseek_v2 import DEEPSEEK_V2
from lola_ft.families.deepseek_v3 import DEEPSEEK_V3
from lola_ft.families.dots1 import DOTS1
from lola_ft.families.ernie4_5_moe import ERNIE4_5_MOE
from lola_ft.families.expert_layout import ExpertLayout
from lola_ft.families.family import Family, Routing, Sizes
from lola_ft.families.glm4_moe import GLM4_MOE
from lola_ft.families.gpt2 import GPT2
from lola_ft.families.granitemoe import GRANITEMOE
from lola_ft.families.hunyuan_v1_moe import HUNYUAN_V1_MOE
from lola_ft.families.llama import LLAMA
from lola_ft.families.lola import LOLA
from lola_ft.families.minimax_m2 import MINIMAX_M2
from lola_ft.families.mistral import MISTRAL
from lola_ft.families.mixtral import MIXTRAL
from lola_ft.families.olmoe import OLMOE
from lola_ft.families.place import Place
from lola_ft.families.qwen2 import QWEN2
from lola_ft.families.qwen2_moe import QWEN2_MOE
from lola_ft.families.qwen3 import QWEN3
from lola_ft.families.qwen3_moe import QWEN3_MOE

__all__ = [
    "BLOOM",
    "FAMILIES",
    "GPT2",
    "LOLA",
    "Architecture",
    "ExpertLayout",
    "Family",
    "Place",
    "Routing",
    "Sizes",
    "architecture_of",
    "find_family",
    "recorded_family",
]

_MIXTURES = (
    *(LOLA, OLMOE, QWEN3_MOE, QWEN2_MOE, MIXTRAL, GRANITEMOE),
    *(DEEPSEEK_V2, DEEPSEEK_V3, GLM4_MOE, DOTS1, ERNIE4_5_MOE, MINIMAX_M2, HUNYUAN_V1_MOE),
)
_DENSE = (GPT2, BLOOM, LLAMA, MISTRAL, QWEN2, QWEN3)
FAMILIES = {family.model_type: family for family in (*_MIXTURES, *_DENSE)}
"""The supported families by `model_type`."""


def find_family(model_type: object, where: object = "config.json", own_code: bool = False) -> Family:
    """Return the family of a model type.

    Args:
        where: The file that names the type, for the message.
        own_code: True if the checkpoint brings Python code for its model.

    Raises:
        CheckpointError: If the type is not supported. The message lists types with a similar name, or all.
    """
    family = FAMILIES.get(str(model_type))
    if family is None:
        near = get_close_matches(str(model_type), FAMILIES)
        known = ", ".join(f"{FAMILIES[name].title} ({name})" for name in near or FAMILIES)
        code = " The checkpoint brings code of its own (auto_map), which is never run." if own_code else ""
        raise CheckpointError(
            f"{where}: model_type is '{model_type}', which is not supported.{code} lola_ft fine-tunes "
            f"{'models with similar names: ' * bool(near)}{known}. Choose such a base; `lola-ft families` says what "
            "can be trained of each."
        )
    return family


def recorded_family(model_type: str | None) -> Family:
    """Return the family that a run's manifest records. Earlier versions recorded none for LOLA."""
    return find_family(model_type or LOLA.model_type, "manifest.json")


def architecture_of(config: Any) -> Architecture:
    """Return the architecture that transformers' config describes.

    Raises:
        CheckpointError: If the model type is not supported.
    """
    return Architecture(find_family(config.model_type), config)
