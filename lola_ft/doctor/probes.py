"""Probes: small real runs of the parts of fine-tuning."""

import shutil
import tempfile
from pathlib import Path

from lola_ft.doctor.check import MissingError
from lola_ft.progress_bars import without_progress_bars

BASE_BYTES = 4_200_000_000
"""Bytes of LOLA in 4 bit, in memory and in the cache."""
_DOWNLOAD_BYTES = 29_800_000_000
_HUB_BASE = "dice-research/lola_v1"
# Half the widest gap between NF4's codes is 0.152 of a block's scale; the scale itself is rounded to 8 bits.
_NF4_ERROR = 0.16


def nf4_round_trip() -> str:
    """Quantise and dequantise a weight on the device; each value must come back within half a step of the code."""
    import torch

    from lola_ft.quantization.load import default_device
    from lola_ft.quantization.nf4 import BLOCK, dequantize, dynamic_code, quantize

    device = default_device()
    weight = torch.randn(256, 192, generator=torch.Generator().manual_seed(0)).to(device)
    back = dequantize(quantize(weight), dynamic_code().to(device), (256, 192), torch.float32)
    error = ((back - weight).view(-1, BLOCK).abs() / weight.view(-1, BLOCK).abs().amax(dim=1, keepdim=True)).max()
    if not error <= _NF4_ERROR:
        raise ArithmeticError(f"a value changed by {float(error):.3f} of its block's scale; the limit is 0.152")
    return f"largest error {float(error):.3f} of a block's scale, on {device}"


def tiny_training_step() -> str:
    """Load a tiny LOLA in 4 bit, add LoRA on attention, MLP and experts, and run one forward and backward pass."""
    import torch

    from lola_ft.adapters import AdapterSettings, add_adapter
    from lola_ft.kernels.precision import has_bfloat16
    from lola_ft.model import LolaConfig, LolaForCausalLM
    from lola_ft.quantization import load_base
    from lola_ft.quantization.load import default_device

    device = default_device()
    dtype = torch.bfloat16 if has_bfloat16(device) else torch.float32
    config = LolaConfig(vocab_size=64, n_positions=32, n_embd=64, n_layer=2, n_head=2, n_inner=128, num_experts=4)
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():
        torch.manual_seed(0)
        with without_progress_bars():
            LolaForCausalLM(config).save_pretrained(folder)
        base = load_base(folder, "nf4", dtype, device, quiet=True)
        settings = AdapterSettings(attention_rank=8, mlp_rank=8, expert_rank=8, alpha=8.0, dropout=0.0)
        model = add_adapter(base, settings).train()
        ids = torch.arange(24, device=device).view(1, -1)
        loss = model(input_ids=ids, labels=ids, skip_logits=True).loss
        loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and ".lora_B." in name}
    dead = [name for name, grad in gradients.items() if grad is None or not grad.isfinite().all() or not grad.any()]
    if dead or not gradients or not torch.isfinite(loss):
        raise ArithmeticError(f"{len(dead)} of {len(gradients)} gradients are empty or not finite: {dead[:2]}")
    name = str(dtype).removeprefix("torch.")
    return f"loss {float(loss.detach()):.3f}, {len(gradients)} gradients, {name} on {device}"


def cache_is_writable() -> str:
    """Write a safetensors file to the cache folder of quantised bases, and read it back."""
    import torch
    from safetensors.torch import load_file, save_file

    from lola_ft.quantization.cache import cache_root

    root = cache_root()
    root.mkdir(parents=True, exist_ok=True)
    tensor = torch.arange(1000, dtype=torch.int32)
    with tempfile.TemporaryDirectory(dir=root, prefix=".doctor") as folder:
        save_file({"tensor": tensor}, Path(folder) / "probe.safetensors")
        if not torch.equal(load_file(Path(folder) / "probe.safetensors")["tensor"], tensor):
            raise OSError("the file read differs from the file written")
    return f"safetensors written and read in {root}"


def disk_space() -> str:
    """Check the disk space for LOLA's 4-bit form and for its download."""
    from huggingface_hub.constants import HF_HUB_CACHE

    from lola_ft.quantization.cache import cache_root

    own, hub = _free_disk(cache_root()), _free_disk(Path(HF_HUB_CACHE))
    detail = f"{own / 1e9:.1f} GB free for lola_ft's cache, {hub / 1e9:.1f} GB free for the Hub's cache"
    if own < BASE_BYTES or hub < _DOWNLOAD_BYTES:
        raise MissingError(f"{detail}; LOLA needs {BASE_BYTES / 1e9:.1f} GB in 4 bit, and its download 29.8 GB")
    return detail


def free_memory() -> str:
    """Check the free memory for LOLA's 4-bit base, on the GPU or, without a GPU, in the machine."""
    import psutil
    import torch

    where = "on the GPU" if torch.cuda.is_available() else "in the machine"
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available
    detail = f"{free / 1e9:.1f} GB free {where}"
    if free < BASE_BYTES:
        raise MissingError(f"{detail}; just LOLA's 4-bit base needs {BASE_BYTES / 1e9:.1f} GB")
    return f"{detail}; LOLA's 4-bit base needs {BASE_BYTES / 1e9:.1f} GB"


def hub_answers() -> str:
    """Ask the Hub for LOLA; the result says if a token is set, but never the token."""
    from huggingface_hub import HfApi, get_token

    info = HfApi().model_info(_HUB_BASE, timeout=10)
    return f"{_HUB_BASE} at {str(info.sha)[:8]}; {'a' if get_token() else 'no'} token is set"


def _free_disk(folder: Path) -> int:
    """Return the free bytes on the disk of a folder, which may not exist yet."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free
