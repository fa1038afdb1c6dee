"""The GPUs that four bases fit, by the plan of their recipes: `python benchmarks/gpu_table.py`.

Only configs are read (their sizes are below, as on the Hub), so it runs anywhere, in a minute of CPU time. It prints
the table of the README, and one JSON line with the bytes. Nothing is measured here: `benchmarks/gpu.py` does that.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from transformers import MixtralConfig, OlmoeConfig, PretrainedConfig, Qwen3MoeConfig

from lola_ft.console import Console
from lola_ft.model import LolaConfig
from lola_ft.planning import Job, first_fit, parse_size, predict, show_size
from lola_ft.recipe import load_recipe
from lola_ft.training.plan import job_of
from lola_ft.training.setup import fit_to_base

SIZES = ("8GB", "12GB", "16GB", "24GB", "48GB")
BASES: dict[str, tuple[str, PretrainedConfig]] = {
    "LOLA, 7.5 B": ("instruct", LolaConfig()),
    "OLMoE, 6.9 B": ("instruct_olmoe", OlmoeConfig(intermediate_size=1024, max_position_embeddings=4096)),
    "Qwen3-30B-A3B": (
        "instruct_qwen3_moe",
        Qwen3MoeConfig(num_hidden_layers=48, head_dim=128, norm_topk_prob=True, max_position_embeddings=40960),
    ),
    "Mixtral 8x7B": ("instruct_mixtral", MixtralConfig(max_position_embeddings=32768)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default=",".join(SIZES), help="memory of GPUs, separated by commas")
    sizes = parser.parse_args().sizes.split(",")
    rows, found = list[list[str]](), dict[str, Any]()
    for title, (recipe, config) in BASES.items():
        job = planned_job(recipe, config)
        fits = {size: fit_of(job, parse_size(size)) for size in sizes}
        rows.append([title, f"`{recipe}`", show_size(predict(job).total), *(fits[size][0] for size in sizes)])
        found[recipe] = {"as_in_recipe": predict(job).total, **{size: fits[size][1] for size in sizes}}
    print(markdown(["base", "recipe", "as in the recipe", *(size.replace("GB", " GB") for size in sizes)], rows))
    print(json.dumps(found))


def planned_job(recipe: str, config: PretrainedConfig) -> Job:
    """Return the job of a recipe on a GPU, from a base's config alone."""
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        loaded = load_recipe(Path("recipes") / f"{recipe}.yaml", [f"base.model={folder}"])
        loaded, base = fit_to_base(loaded, Console(quiet=True))
        return job_of(loaded, base.trained_architecture(loaded), "cuda")


def fit_of(job: Job, limit: int) -> tuple[str, int | None]:
    """Say how a job fits into so many bytes, and how many it then takes; None where nothing makes it fit."""
    if (total := predict(job).total) <= limit:
        return "fits", total
    change = first_fit(job, limit)
    if change is None:
        return "no", None
    after = change.prediction.job
    changed = (after.micro_batch_size, after.length) != (job.micro_batch_size, job.length)
    said = f"{after.micro_batch_size} x {after.length} tokens" if changed else "fits"
    if after.offload != job.offload:
        said += ", offloaded"
    if after.settings.expert_rank != job.settings.expert_rank:
        said += f", rank {after.settings.expert_rank} on experts"
    return said, change.prediction.total


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *rows])


if __name__ == "__main__":
    main()
