"""Bases that cannot be used, and recipes with features that a base lacks: one message each, with the fix."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lola_ft.errors import CheckpointError
from lola_ft.quantization import load_base
from tests.conftest import Outcome, assert_says
from tests.families.conftest import write_recipe


def with_config(**changes: Any) -> Callable[[Path], None]:
    """Change keys of a base's config."""

    def change(base: Path) -> None:
        file = base / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def pickled(base: Path) -> None:
    """Replace a base's weights by a pickle, which holds them but must not be opened."""
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()


def without_weights(base: Path) -> None:
    (base / "model.safetensors").unlink()


REMOTE_CODE = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
BASES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    # By mistake: the family, the change to its checkpoint, the message.
    "pickles only": (
        "olmoe",
        pickled,
        "{base}: holds neither model.safetensors nor … but pytorch_model.bin … never loaded … Use … safetensors … "
        "save_pretrained",
    ),
    "no weights": (
        "olmoe",
        without_weights,
        "{base}: holds neither model.safetensors nor model.safetensors.index.json. … Use a revision with safetensors",
    ),
    "remote code only": (
        "olmoe",
        with_config(model_type="own", auto_map=REMOTE_CODE),
        "config.json: model_type is 'own' … not supported … code of its own (auto_map) … never run … LOLA (lola_v1) … "
        "Choose … lola-ft families",
    ),
    "no model type": ("olmoe", with_config(model_type=None), "config.json: model_type is 'None' … LOLA (lola_v1)"),
    "nearly OLMoE": (
        "olmoe",
        with_config(model_type="olmo"),
        "config.json: model_type is 'olmo' … not supported … OLMoE (olmoe). Choose such a base; `lola-ft families`",
    ),
    "nearly Qwen3 MoE": (
        "qwen3_moe",
        with_config(model_type="qwen3_moe_vl"),
        "model_type is 'qwen3_moe_vl' … similar names: Qwen3 MoE (qwen3_moe), Qwen2 MoE (qwen2_moe) … lola-ft families",
    ),
    "nearly Mixtral": (
        "mixtral",
        with_config(model_type="mixtral2"),
        "model_type is 'mixtral2' … similar names: Mixtral (mixtral) … lola-ft families",
    ),
    "more experts per token than there are": (
        "olmoe",
        with_config(num_experts_per_tok=9),
        "config.json: num_experts_per_tok is 9 … 1 to 8 experts (num_experts). Use the config",
    ),
    "no expert per token": (
        "mixtral",
        with_config(num_experts_per_tok=0),
        "config.json: num_experts_per_tok is 0 … 1 to 4 experts (num_local_experts)",
    ),
    "experts per token left open": (
        "deepseek_v2",
        with_config(num_experts_per_tok=None),
        "config.json: num_experts_per_tok is None … 1 to 8 experts (n_routed_experts)",
    ),
    "ERNIE with biases": (
        "ernie4_5_moe",
        with_config(use_bias=True),
        "config.json: use_bias is true … not supported. Choose a base without",
    ),
    "Hunyuan with experts by layer": (
        "hunyuan_v1_moe",
        with_config(num_experts=[8, 4]),
        "config.json: not a config of Hunyuan MoE ( … 'num_experts' … [8, 4] … Use the config that belongs",
    ),
    "a size that is a text": (
        "granitemoe",
        with_config(hidden_size="64"),
        "config.json: not a config of Granite MoE ( … 'hidden_size' … Use the config that belongs to the weights",
    ),
    "Hunyuan with choices by layer": (
        "hunyuan_v1_moe",
        with_config(moe_topk=[3, 2]),
        "config.json: moe_topk differs between layers (2, 3) … Choose a base with one number for all layers",
    ),
}


@pytest.mark.parametrize("case", BASES)
def test_a_base_that_cannot_be_used_is_refused(
    case: str, moe_bases: dict[str, Path], verb: Callable[..., Outcome], tmp_path: Path
) -> None:
    kind, break_it, says = BASES[case]
    base = tmp_path / "base"
    shutil.copytree(moe_bases[kind], base)
    load_base(base, None, "float32", "cpu", quiet=True)  # without the change, the base loads
    break_it(base)
    check_refused(verb("quantize", base), says.format(base=base))
    with pytest.raises(CheckpointError) as caught:
        load_base(base, quiet=True)
    assert_says(str(caught.value), says.format(base=base))


def test_an_unknown_type_lists_only_similar_names(moe_bases: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(moe_bases["olmoe"], tmp_path / "base")
    with_config(model_type="olmo")(tmp_path / "base")
    with pytest.raises(CheckpointError) as caught:
        load_base(tmp_path / "base", quiet=True)
    assert "gpt2" not in str(caught.value)


def test_a_number_per_layer_is_accepted_if_all_are_equal(moe_bases: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(moe_bases["hunyuan_v1_moe"], tmp_path / "base")
    with_config(moe_topk=[3, 3])(tmp_path / "base")
    ids = torch.tensor([[20, 30, 40]])
    one, each = (
        load_base(base, None, "float32", "cpu", quiet=True) for base in (moe_bases["hunyuan_v1_moe"], tmp_path / "base")
    )
    assert torch.equal(each(ids).logits, one(ids).logits)


SELECT = "adapter.experts.select: "
RECIPES: dict[str, tuple[str, dict[str, Any], str]] = {
    # By mistake: the family, the adapter of the recipe, the message.
    "no dense layers in OLMoE": (
        "olmoe",
        {"mlp": {"rank": 4}},
        "adapter.mlp: the base is of the family OLMoE (olmoe), which has no mlp. It has attention, experts … Leave it",
    ),
    "no dense layers in Mixtral": (
        "mixtral",
        {"mlp": {"rank": 4}},
        "adapter.mlp: the base is of the family Mixtral (mixtral), which has no mlp. It has attention … Leave it out",
    ),
    "no shared experts": (
        "olmoe",
        {"mlp": None, "shared_experts": {"rank": 4}},
        "adapter.shared_experts: … which has no shared_experts. It has attention, experts … Leave it out",
    ),
    "neither dense layers nor shared experts": (
        "mixtral",
        {"mlp": {"rank": 4}, "shared_experts": {"rank": 4}},
        "adapter.mlp, adapter.shared_experts: … no mlp and no shared_experts. It has … Leave them out",
    ),
    "an expert that does not exist": (
        "olmoe",
        {"mlp": None, "experts": {"rank": 4, "select": [[0], [8]]}},
        f"{SELECT}list 1: there is no expert 8; experts are 0 to 7",
    ),
    "more experts than exist": (
        "olmoe",
        {"mlp": None, "experts": {"rank": 4, "select": [list(range(9)), [0]]}},
        f"{SELECT}list 0: there is no expert 8; experts are 0 to 7",
    ),
    "more lists than layers with experts": (
        "qwen2_moe",
        {"experts": {"rank": 4, "select": [[0], [0]]}},
        f"{SELECT}2 lists, but the base has 1 MoE layers; give one list per MoE layer",
    ),
}


@pytest.mark.parametrize("case", RECIPES)
def test_a_recipe_with_a_missing_feature_is_refused_before_the_weights_are_loaded(
    case: str, moe_bases: dict[str, Path], rows_file: Path, verb: Callable[..., Outcome], tmp_path: Path
) -> None:
    kind, adapter, says = RECIPES[case]
    base = tmp_path / "base"
    shutil.copytree(moe_bases[kind], base)
    weights = base / "model.safetensors"
    recipe = write_recipe(tmp_path / "recipe.yaml", base, rows_file, adapter=adapter)
    outcome = verb("train", recipe)
    check_refused(outcome, says)
    assert not (tmp_path / "run").exists()
    assert "float32" not in outcome.out, "the audit of a loaded base"
    weights.unlink()
    check_refused(verb("plan", recipe), says)


def check_refused(outcome: Outcome, says: str) -> None:
    """Assert exit code 2 and one message without a traceback."""
    assert outcome.code == 2, outcome.err
    assert_says(outcome.err, says)
    assert outcome.err[outcome.err.index("error: ") :].count("\n") == 1
    assert "Traceback" not in outcome.err
