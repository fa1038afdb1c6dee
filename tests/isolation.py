"""An environment of the tests' own: what the caller has exported changes no test, and no test reads or writes home."""

import atexit
import os
import re
import shutil
import tempfile
from pathlib import Path

# What lola_ft, its libraries, launchers of several processes, trackers, terminals and proxies listen to.
_HEARD = re.compile(
    r"(?:ACCELERATE|BITSANDBYTES|BNB|CODECARBON|DATASETS|FSDP|GIT|HF|HUGGING_?FACE|LOLA|MLFLOW|MPL|OMPI|PEFT|PMI|PYTORCH"
    r"|SLURM|TENSORBOARD|TORCH\w*|TRACKIO|TRANSFORMERS|TRITON|TRL|WANDB|XDG)_\w+"
    r"|(?:GROUP_|LOCAL_|NODE_|ROLE_)?(?:RANK|WORLD_SIZE)|MASTER_(?:ADDR|PORT)|CI|COLUMNS|LINES|FORCE_COLOR|NO_COLOR"
    r"|MPLBACKEND|NVIDIA_TF32_OVERRIDE|TOKENIZERS_PARALLELISM|USE_(?:TF|TORCH|FLAX)|(?:ALL|HTTPS?|NO)_PROXY",
    re.IGNORECASE,
)


def isolate() -> None:
    """Make the environment the tests' own; call it before anything is imported that reads it.

    CUDA_VISIBLE_DEVICES stays: which GPU to use, or none, is the caller's choice.
    """
    for name in [name for name in os.environ if _HEARD.fullmatch(name)]:
        del os.environ[name]
    home = tempfile.mkdtemp(prefix="lola-ft-home-")
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    os.environ["HOME"] = home
    # What these keep is slow to make and the same for everybody: matplotlib's list of fonts, compiled kernels.
    kept = Path(tempfile.gettempdir(), f"lola-ft-tests-{os.getuid()}")
    os.environ |= {"MPLCONFIGDIR": str(kept / "matplotlib"), "TRITON_CACHE_DIR": str(kept / "triton")}
    if not Path("/dev/nvidia0").exists() or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported, which torch may do
