"""Training: a recipe in, a run folder out. `run.py` tells the story.

setup.py           everything decided before the first step, for `train`, `preview` and `plan` alike
base_model.py      the base and its adapter; dataset.py and packing.py, the rows
trainers/          the losses, and the loop around them; build.py makes the one that a recipe asks for
callbacks/         guards, the trial of the longest batch, the stop request, progress, memory and energy
checkpointing/     what a checkpoint holds, how it is written and checked, how a run goes on
reports/           tables, metrics.jsonl, the manifest, pictures
run_folder.py      who may write where; run_state.py, what trainer and callbacks share

What trains is imported when it is first used: previews and plans do without PEFT, TRL and bitsandbytes, which take
seconds.
"""

from typing import TYPE_CHECKING

from lola_ft.lazy_attributes import lazy_attributes

if TYPE_CHECKING:
    from lola_ft.training.run import train

__all__ = ["train"]


__getattr__ = lazy_attributes(__name__, run="train")
