"""Every verb of `lola-ft`, one function each; `finetune.py` and `merge.py` call two of them.

Exit codes: 0 done, 2 the user's input is wrong, 130 stopped by Ctrl-C, 1 a bug.
"""

import os
import sys
import time
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from lola_ft.errors import UserError


class _Verbs(TyperGroup):
    """Ends with 130 when Ctrl-C stops a verb, wherever it is; typer's own 1 would be a bug."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise typer.Exit(130) from None


app = typer.Typer(cls=_Verbs, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
recipes_app = typer.Typer(no_args_is_help=True, help="The recipes that come with lola_ft: list, show, copy.")
app.add_typer(recipes_app, name="recipes")
routing_app = typer.Typer(no_args_is_help=True, help="Which experts which languages use: profile, report, select.")
app.add_typer(routing_app, name="routing")


@app.callback()
def about() -> None:
    """Parameter-efficient fine-tuning of LOLA, the multilingual mixture-of-experts language model."""


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="The recipe, a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Recipe keys to change.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Do everything but train.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the output folder.")] = False,
    allow_changed: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY", help="A recipe key that may differ from the run's; can be given again."),
    ] = None,
) -> None:
    """Fine-tune as a recipe says."""
    from lola_ft.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    from lola_ft.training import train as run

    hub = loaded.hub
    if hub:
        from lola_ft.hub.publish import publish_run, require_token

        require_token(hub.repo)
    folder = run(loaded, dry_run, resume, allow_changed or [])
    if hub and not dry_run and os.environ.get("RANK", "0") == "0":
        publish_run(folder, hub.repo, hub.private, hub.layout, hub.base_id)


@app.command()
def preview(
    recipe: Annotated[str, typer.Argument(help="The recipe, a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Recipe keys to change.")
    ] = None,
    examples: Annotated[int, typer.Option(min=1, help="Examples shown of each language.")] = 2,
    languages: Annotated[int, typer.Option(min=1, help="Languages shown, the largest first.")] = 8,
) -> None:
    """Show what a recipe's data becomes: examples with what is learned, lengths, and what is dropped."""
    from lola_ft.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    from lola_ft.training.preview import preview as show

    show(loaded, examples, languages)


@app.command()
def plan(
    recipe: Annotated[str, typer.Argument(help="The recipe, a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Recipe keys to change.")
    ] = None,
    gpu: Annotated[
        str | None, typer.Option(metavar="SIZE", help="A GPU's memory, such as 8GB; this machine's own by default.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    no_data: Annotated[bool, typer.Option("--no-data", help="Do not read the data; steps stay unknown.")] = False,
) -> None:
    """Predict a recipe's memory by part, its steps and files, and what makes it fit; no weights are read."""
    from lola_ft.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    from lola_ft.training.plan import plan as show

    show(loaded, gpu, as_json, not no_data)


@app.command()
def schema() -> None:
    """Print the JSON schema of a recipe, for editors."""
    from lola_ft.recipe.json_schema import schema_text

    print(schema_text(), end="")


@recipes_app.command("list")
def list_recipes() -> None:
    """Name every recipe and what it is for."""
    from lola_ft.recipe.bundled import bundled_recipes

    for name, recipe in bundled_recipes().items():
        print(f"{name:24}{recipe.purpose}")


@recipes_app.command("show")
def show_recipe(name: Annotated[str, typer.Argument(help="The recipe's name.")]) -> None:
    """Print a recipe."""
    from lola_ft.recipe.bundled import find_recipe

    print(find_recipe(name).text, end="")


@recipes_app.command("copy")
def copy_recipe(
    name: Annotated[str, typer.Argument(help="The recipe's name.")],
    out: Annotated[str, typer.Option(help="Folder in which recipes/ is made.")] = ".",
) -> None:
    """Copy a recipe and its sample data, to start from."""
    from lola_ft.recipe.bundled import copy_recipe as copy

    for path in copy(name, out):
        print(path)


@app.command()
def merge(
    run_or_adapter: Annotated[str, typer.Argument(help="A run folder or an adapter's folder.")],
    base: Annotated[str | None, typer.Option(help="The base's folder or Hub id; a run knows its own.")] = None,
    out: Annotated[str | None, typer.Option(help="Where to write; RUN/merged for a run.")] = None,
    dtype: Annotated[str, typer.Option(help="auto (the base's), float32, bfloat16 or float16.")] = "auto",
    rounding: Annotated[
        str | None, typer.Option(help="Add to the original weights (base, the default) or to NF4-rounded ones (nf4).")
    ] = None,
    check: Annotated[
        str, typer.Option(help="full: weights, and logits where the models fit in memory; weights; none.")
    ] = "full",
    allow_other_base: Annotated[bool, typer.Option("--allow-other-base", help="Accept another base.")] = False,
) -> None:
    """Merge an adapter into the weights, in the Hub's layout, and check the result."""
    from lola_ft.merging.command import merge_command

    merge_command(run_or_adapter, base, out, dtype, rounding, allow_other_base, check)


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="A base, a run, an adapter or a merged model.")],
    prompt: Annotated[str | None, typer.Option(help="Answer this, printed as it comes.")] = None,
    file: Annotated[str | None, typer.Option(help="Answer each line of a .txt or .jsonl file.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Hold a conversation at the terminal.")] = False,
    base: Annotated[
        str | None, typer.Option(help="Of a run or an adapter, if it is not where training found it.")
    ] = None,
    adapter: Annotated[str | None, typer.Option(help="A run or an adapter to put on a base.")] = None,
    template: Annotated[str | None, typer.Option(help="A prompt template other than the model's own.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float | None, typer.Option(help="Sample among the likeliest tokens of this probability.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the sampling.")] = None,
    quantization: Annotated[str, typer.Option(help="auto (what a run trained on), nf4 or none.")] = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts of a file answered at a time.")] = 32,
    out: Annotated[str | None, typer.Option(help="A .jsonl file to write, one object a prompt.")] = None,
) -> None:
    """Let a model answer: a prompt, a file of prompts, or a person."""
    from lola_ft.generation import Sampling
    from lola_ft.generation.generate import generate_command

    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    generate_command(model, base, adapter, prompt, file, chat, template, sampling, quantization, batch_size, out)


@app.command()
def evaluate(
    context: typer.Context,
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Bases, runs, adapters or merged models.")],
    data: Annotated[
        list[str] | None, typer.Option(help="Held-out rows: a file, folder or glob; again for more.")
    ] = None,
    task: Annotated[str, typer.Option(help="loss (nats per token, bits per byte), generate or choice.")] = "loss",
    format: Annotated[str | None, typer.Option(help="Of the rows, as in a recipe, or choices; text for .txt.")] = None,
    language: Annotated[list[str] | None, typer.Option(help="Of all files; or again, one for each.")] = None,
    language_column: Annotated[str | None, typer.Option(help="The field that has each row's language.")] = None,
    field: Annotated[list[str] | None, typer.Option(metavar="STANDARD=NAME", help="Map a field of the format.")] = None,
    label: Annotated[list[str] | None, typer.Option(metavar="LABEL=WORD", help="The word for a label.")] = None,
    instruction: Annotated[str | None, typer.Option(help="The request, as in a recipe.")] = None,
    source_language: Annotated[str | None, typer.Option(help="Of format translation.")] = None,
    target_language: Annotated[str | None, typer.Option(help="Of format translation.")] = None,
    unit: Annotated[str | None, typer.Option(help="What a row of a .txt file is: paragraph, line or file.")] = None,
    max_rows: Annotated[int | None, typer.Option(min=1, help="Rows of each language, the first ones.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows at a time.")] = 8,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer of task generate; 128.")] = None,
    stride: Annotated[int | None, typer.Option(help="Of the windows over long texts; half the positions.")] = None,
    resamples: Annotated[int, typer.Option(min=1, help="Of the bootstrap.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Of the bootstrap.")] = 0,
    base: Annotated[
        str | None, typer.Option(help="Of runs and adapters, if it is not where training found it.")
    ] = None,
    quantization: Annotated[str, typer.Option(help="auto (what a run trained on), nf4 or none.")] = "auto",
    template: Annotated[str | None, typer.Option(help="A prompt template other than the models' own.")] = None,
    out: Annotated[str | None, typer.Option(help="Folder for JSON, picture and rows.")] = None,
    transfer: Annotated[
        bool, typer.Option("--transfer", help="After a base, runs: what training on one language did to others.")
    ] = False,
    suite: Annotated[str | None, typer.Option(help="Run benchmarks in place of --data: lola-paper.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Benchmarks or tasks of the suite, with commas between.")] = None,
    languages: Annotated[str | None, typer.Option(help="Languages of the suite, with commas between.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Documents of each task of the suite.")] = None,
    shots: Annotated[int, typer.Option(min=0, help="Examples before each question of the suite.")] = 0,
    include_path: Annotated[str | None, typer.Option(help="Folder with the harness's YAML of your own tasks.")] = None,
) -> None:
    """Compare models side by side, by language, with bootstrap intervals."""
    _refuse_other_kind(context, of_suite=suite is not None)
    if suite is not None:
        from lola_ft.evaluation.suite import SuiteOptions, evaluate_suite

        options_of_suite = SuiteOptions(
            suite, _listed(tasks), _listed(languages), limit, shots, include_path, batch_size
        )
        evaluate_suite(models, options_of_suite, out, base, quantization)
        return
    from lola_ft.evaluation.evaluate import TaskOptions, evaluate_rows
    from lola_ft.evaluation.held_out_rows import RowOptions

    rows = RowOptions(
        files=data or [],
        format=format,
        languages=language or [],
        language_column=language_column,
        fields=field or [],
        labels=label or [],
        instruction=instruction,
        max_rows=max_rows,
        unit=unit,
        source_language=source_language,
        target_language=target_language,
    )
    options = TaskOptions(task, batch_size, max_new_tokens, stride, resamples, seed, transfer)
    evaluate_rows(models, rows, options, base, quantization, template, out)


@app.command()
def convert(
    adapter: Annotated[str, typer.Argument(help="The adapter's folder, either layout.")],
    base: Annotated[str, typer.Option(help="The base's folder or Hub id.")],
    layout: Annotated[str, typer.Option(help="peft or per_expert (the LOLA authors').")],
    out: Annotated[str, typer.Option(help="Folder to write.")],
) -> None:
    """Rewrite an adapter in the other layout; the numbers stay the same."""
    from lola_ft.adapters.convert import convert_adapter

    result = convert_adapter(adapter, base, layout, out)
    print(f"{result.tensors} tensors ({result.source_layout}) written to {out} ({layout}).")


@app.command()
def publish(
    source: Annotated[str, typer.Argument(metavar="RUN|ADAPTER|MERGED", help="What to publish: a folder.")],
    repo: Annotated[str, typer.Option(help="Repository on the Hub, owner/name; made if it is not there.")],
    private: Annotated[
        bool, typer.Option("--private", help="A new repository can be seen by its owner alone.")
    ] = False,
    layout: Annotated[str | None, typer.Option(help="Convert an adapter first: peft or per_expert.")] = None,
    base: Annotated[str | None, typer.Option(help="The base's folder, for the check; a run knows its own.")] = None,
    base_id: Annotated[str | None, typer.Option(help="The base's id on the Hub, if it is a folder here.")] = None,
    skip_check: Annotated[bool, typer.Option("--skip-check", help="Send without reloading and comparing.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be sent.")] = False,
) -> None:
    """Publish an adapter or a merged model on the Hugging Face Hub, with a model card; again to update it."""
    from lola_ft.hub.publish import publish as send

    send(source, repo, private, layout, base, base_id, skip_check, dry_run)


@app.command()
def quantize(
    base: Annotated[str, typer.Argument(help="The base's folder or Hub id.")],
    dtype: Annotated[str, typer.Option(help="Of what stays dense: bfloat16, float16 or float32.")] = "bfloat16",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
) -> None:
    """Quantise a base once; later runs load the result, many times faster."""
    from lola_ft.quantization import quantize_base

    print(f"The quantised base is in {quantize_base(base, dtype, revision)}.")


@routing_app.command("texts")
def routing_texts(out: Annotated[str, typer.Option(help="Folder to write.")]) -> None:
    """Write names from Unicode CLDR in about 150 languages, a text file each: data for `routing profile`."""
    from lola_ft.files import check_folder_target
    from lola_ft.nano.corpus import write_texts

    check_folder_target(out)
    files = write_texts(Path(out))
    print(f"{len(files)} languages in {out}.")


@routing_app.command("profile")
def routing_profile(
    model: Annotated[str, typer.Argument(help="A base, a run, an adapter or a merged model.")],
    data: Annotated[list[str], typer.Option(help="A file, folder or glob; can be given again.")],
    out: Annotated[str, typer.Option(help="The profile to write, a safetensors file.")],
    base: Annotated[str | None, typer.Option(help="The base's folder or Hub id; a run knows its own.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the base on the Hub.")] = None,
    quantization: Annotated[str, typer.Option(help="auto (what a run trained on), nf4 or none.")] = "auto",
    format: Annotated[str, typer.Option(help="The files' format, as in a recipe.")] = "text",
    language_column: Annotated[
        str | None, typer.Option(help="Field that holds the language; else it stands in the file's name, as sw.txt.")
    ] = None,
    unit: Annotated[str | None, typer.Option(help="A text of .txt files: paragraph, line or file.")] = None,
    template: Annotated[str | None, typer.Option(help="Renders prompts; the model's own, else alpaca.")] = None,
    max_tokens_per_language: Annotated[int | None, typer.Option(min=1, help="The first so many of each.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Longest piece in tokens; the model's positions.")] = None,
    sample: Annotated[int, typer.Option(min=0, help="Tokens of a language whose single choices are kept.")] = 1000,
) -> None:
    """Count which experts the tokens of each language go to, in every MoE layer."""
    from lola_ft.files import check_file_target
    from lola_ft.routing.profile import save_profile
    from lola_ft.routing.profiling import profile_routing

    check_file_target(out)
    began = time.perf_counter()
    profile = profile_routing(
        model, data, base, revision, quantization, format, language_column, unit, template,
        max_tokens_per_language, max_length, sample,
    )  # fmt: skip
    save_profile(profile, out)
    tokens, seconds = int(profile.tokens_L.sum()), time.perf_counter() - began
    print(f"{tokens:,} tokens in {len(profile.languages)} languages, {seconds:.0f} s. The profile is in {out}.")


@routing_app.command("report")
def routing_report(
    profile: Annotated[str, typer.Argument(help="A profile that `routing profile` wrote.")],
    second: Annotated[str | None, typer.Argument(help="Another one, to show what changed.")] = None,
    out: Annotated[str | None, typer.Option(help="Folder to write; PROFILE-report.")] = None,
    permutations: Annotated[int, typer.Option(min=1, help="Of the tests whether routing follows descent.")] = 999,
    seed: Annotated[int, typer.Option(min=0, help="Of the permutations.")] = 0,
) -> None:
    """Write a page with tables and pictures, the pictures, and all numbers as JSON."""
    from lola_ft.routing.profile import read_profile
    from lola_ft.routing.report import write_report

    file = Path(profile)
    folder = out or file.with_name(f"{file.stem}-report")
    other = read_profile(second) if second else None
    report = write_report(read_profile(file), folder, other, permutations, seed)
    print(*report.headlines(), f"The report is in {report.page}.", sep="\n")


@routing_app.command("select")
def routing_select(
    profile: Annotated[str, typer.Argument(help="A profile that `routing profile` wrote.")],
    languages: Annotated[str, typer.Option(help="Codes with commas between them, such as sw,rw.")],
    out: Annotated[str, typer.Option(help="The JSON file to write, for a recipe's adapter.experts.select.")],
    coverage: Annotated[float, typer.Option(help="Share of the languages' tokens that the experts must get.")] = 0.8,
    by: Annotated[str, typer.Option(help="tokens, or gate: tokens weighted with the router's probability.")] = "tokens",
    rank: Annotated[int, typer.Option(min=1, help="Of the adapter whose size is predicted.")] = 8,
    random: Annotated[bool, typer.Option("--random", help="As many experts, drawn at random: a control.")] = False,
    seed: Annotated[int | None, typer.Option(help="Of the draw; 0 if left out.")] = None,
) -> None:
    """Choose the fewest experts of each layer that some languages' tokens mostly go to."""
    from lola_ft.routing.profile import read_profile
    from lola_ft.routing.relevance import describe_choice, save_choice, select_experts

    if seed is not None and not random:
        raise UserError("--seed is for --random; the choice by coverage has nothing random.")
    codes = [code.strip() for code in languages.split(",") if code.strip()]
    draw = (seed or 0) if random else None
    choice = select_experts(read_profile(profile), codes, coverage, by, draw, rank)
    save_choice(choice, out)
    print(f"{describe_choice(choice)}\nThe selection is in {out}.")


@app.command()
def nano(
    out: Annotated[str, typer.Option(help="Folder to write; an up-to-date one is reused.")] = ".cache/nano",
) -> None:
    """Build the nano base: LOLA's architecture at 5 M parameters, pre-trained on CLDR names in 150 languages."""
    from lola_ft.nano import build_nano

    build_nano(Path(out))


@app.command()
def doctor(
    online: Annotated[bool, typer.Option("--online", help="Ask the Hub too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show versions and hardware, and try what fine-tuning is made of; exit code 1 if it does not work here."""
    from lola_ft.doctor import doctor as look

    if not look(online, as_json):
        raise typer.Exit(1)


@app.command()
def demo(
    recipe: Annotated[str, typer.Argument(help="The demo's recipe.")] = "recipes/demo.yaml",
) -> None:
    """Run the main job on the embedded default: build a base, fine-tune it in 4 bit, merge, compare."""
    from lola_ft.demo import run_demo

    run_demo(recipe)


_OF_SUITE = ("tasks", "languages", "limit", "shots", "include_path")
_OF_BOTH = ("models", "suite", "batch_size", "base", "quantization", "out")


def _refuse_other_kind(context: typer.Context, of_suite: bool) -> None:
    """Refuse what was given to `evaluate` and belongs to rows with --suite, or to a suite without it."""
    for name in context.params:
        source = context.get_parameter_source(name)
        given = source is not None and source.name == "COMMANDLINE"
        if given and name not in _OF_BOTH and (name in _OF_SUITE) != of_suite:
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"{option} does nothing {'with' if of_suite else 'without'} --suite. Leave it out.")


def _listed(text: str | None) -> list[str]:
    """What stands between commas."""
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def main(arguments: list[str] | None = None) -> None:
    """Run a verb and exit with its code; a user's mistake is one message on stderr."""
    # transformers 5.23 renames gradient to activation checkpointing; PEFT 0.21 and 5.17 know the old name alone.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*")
    try:
        app(args=arguments, prog_name="lola-ft")
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") in ("0", "-1"):  # of several processes the first alone
            print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
