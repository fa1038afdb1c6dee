"""Training: a recipe becomes a run folder. Begin reading at `run.py`, which has all steps in order.

setup.py           all decisions before the first step, the same for `train`, `preview` and `plan`
base_model.py      the base and its adapter; dataset.py and packing.py: the rows
trainers/          the losses and the training loop; build.py makes the trainer that a recipe needs
callbacks/         guards, the trial of the longest batch, the stop request, progress, memory and energy
checkpointing/     contents of a checkpoint, writing and checking it, resuming a run
reports/           tables, metrics.jsonl, the manifest, plots
run_folder.py      the lock of a run's folder; run_state.py: state shared by trainer and callbacks

`train` is imported when it is first used, because it needs PEFT, TRL and bitsandbytes, which take seconds. Previews and
plans do not need them.
"""

from typing import TYPE_CHECKING

from lola_ft.lazy_attributes import lazy_attributes

if TYPE_CHECKING:
    from lola_ft.training.run import train

__all__ = ["train"]


__getattr__ = lazy_attributes(__name__, run="train")
