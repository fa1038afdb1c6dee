"""A merge needs the same small memory for every model size, and few imports."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lola_ft.adapters.on_disk import write_adapter
from lola_ft.adapters.weights import AdapterWeights, LoraPair
from lola_ft.families import architecture_of
from lola_ft.model import LolaConfig, LolaForCausalLM

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's own count of memory")

MEASURE = """
import json, sys, threading
from pathlib import Path
import lola_ft
from lola_ft.merging import merge

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) // 1024

def peak_of(call):
    most, done = [anonymous()], threading.Event()
    def sample():
        while not done.wait(0.002):
            most[0] = max(most[0], anonymous())
    thread = threading.Thread(target=sample)
    thread.start()
    call()
    done.set()
    thread.join()
    return most[0]

heavy = [name for name in ("peft", "bitsandbytes", "transformers.modeling_utils") if name in sys.modules]
result = {"heavy": heavy, "imported": anonymous()}
for name in ("small", "large"):
    folder = Path(sys.argv[1]) / name
    result[name] = peak_of(lambda: merge(folder / "base", folder / "adapter", folder / "merged", check="weights"))
heavy = [name for name in ("peft", "bitsandbytes", "transformers.modeling_utils") if name in sys.modules]
print(json.dumps(result | {"heavy_after": heavy}))
"""


def make_model(folder: Path, make_config: Callable[..., LolaConfig], layers: int) -> int:
    """Write a float32 base and an adapter on every expert; return the size of both in MB."""
    config = make_config(n_layer=layers, n_embd=256, n_inner=2048, num_experts=8)
    LolaForCausalLM(config).save_pretrained(folder / "base")
    weights = AdapterWeights(architecture_of(config))
    for name, place in weights.architecture.places.items():
        shape = place.shape
        if ".experts." in name and name.endswith(".weight"):
            pair = LoraPair(torch.randn(16, shape[0]) * 0.02, torch.randn(shape[1], 16) * 0.02, alpha=32.0)
            weights.pairs[name.removesuffix(".weight")] = pair
    write_adapter(weights, folder / "adapter", "peft")
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors")) // 2**20


@pytest.mark.slow
def test_the_peak_does_not_grow_with_the_model(make_config: Callable[..., LolaConfig], tmp_path: Path) -> None:
    sizes = [make_model(tmp_path / name, make_config, layers) for name, layers in (("small", 2), ("large", 10))]
    assert sizes[1] - sizes[0] > 150
    command = [sys.executable, "-c", MEASURE, str(tmp_path)]
    result = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert result["heavy"] == result["heavy_after"] == []
    assert result["large"] - result["small"] < 16
    assert result["large"] - result["imported"] < 80
