"""The command line: one function per verb of `lola-ft`. `finetune.py` and `merge.py` call two of these functions.

A verb imports its own package inside its function. So nothing heavy (torch, transformers, …) is imported before a verb
needs it, and help and messages about mistakes appear at once. `tests/test_startup.py` checks this.

Exit codes: 0 done, 2 the user's input is wrong, 130 stopped by Ctrl-C, 1 a bug.
"""

import os
import sys
import time
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option
from typer.core import TyperGroup

from lola_ft.errors import UserError
from lola_ft.start import checked_arguments, prepare_process


class _Verbs(TyperGroup):
    """The group of all verbs. It exits with 130 when Ctrl-C stops a verb; typer's own 1 would mean a bug."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            if type(stop) is KeyboardInterrupt:  # a run that saved a checkpoint has said so already
                print("\nStopped.", file=sys.stderr)
            raise typer.Exit(130) from None


app = typer.Typer(cls=_Verbs, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
recipes_app = typer.Typer(no_args_is_help=True, help="List, show or copy the recipes that come with lola_ft.")
app.add_typer(recipes_app, name="recipes")
routing_app = typer.Typer(no_args_is_help=True, help="Show which experts each language uses; choose experts to train.")
app.add_typer(routing_app, name="routing")


_RecipeFile = Annotated[str, Argument(metavar="RECIPE", help="Path of the recipe, a YAML file.")]
_RecipeName = Annotated[str, Argument(help="Name of the recipe, as `lola-ft recipes list` shows it.")]
_Overrides = Annotated[
    list[str] | None,
    Argument(metavar="KEY=VALUE", help="Recipe keys to change for this run, such as train.max_steps=20."),
]
_Base = Annotated[
    str | None,
    Option(help="Base model of the run or adapter: a folder or a Hub id. Default: the base it was trained on."),
]
_Quantization = Annotated[
    str,
    Option(help="Form of the base's weights: nf4 (4 bit), none, or auto (as in the run's training, else none)."),
]
_Model = Annotated[
    str, Argument(help="A base model, run, adapter or merged model: a folder, or a base model's Hub id.")
]


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"lola-ft {version('lola-ft')}")
        raise typer.Exit


@app.callback()
def about(
    version: Annotated[
        bool, Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Fine-tune LOLA, a multilingual mixture-of-experts model, and other language models, on one GPU."""


@app.command()
def train(
    recipe: _RecipeFile,
    overrides: _Overrides = None,
    dry_run: Annotated[
        bool, Option("--dry-run", help="Check the recipe, the data and the base, but do not train.")
    ] = False,
    resume: Annotated[bool, Option("--resume", help="Continue an interrupted run from its newest checkpoint.")] = False,
    allow_changed: Annotated[
        list[str] | None,
        Option(metavar="KEY", help="With --resume: recipe key that may differ from the run's. Repeat for more."),
    ] = None,
) -> None:
    """Fine-tune a base model with the settings of a recipe."""
    from lola_ft.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    from lola_ft.training.run_folder import refuse_bad_output

    if not resume and not allow_changed and loaded.train.resume == "never" and os.environ.get("RANK", "0") == "0":
        refuse_bad_output(Path(loaded.output))
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
    recipe: _RecipeFile,
    overrides: _Overrides = None,
    examples: Annotated[int, Option(min=1, help="Number of examples to show per language.")] = 2,
    languages: Annotated[int, Option(min=1, help="Number of languages to show, those with most rows first.")] = 8,
) -> None:
    """Show a recipe's data as the model will read it: examples, the tokens learned, lengths, and dropped rows."""
    from lola_ft.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    from lola_ft.training.preview import preview as show

    show(loaded, examples, languages)


@app.command()
def plan(
    recipe: _RecipeFile,
    overrides: _Overrides = None,
    gpu: Annotated[
        str | None,
        Option(metavar="SIZE", help="Memory of the GPU to plan for, such as 8GB. Default: this machine's GPU."),
    ] = None,
    as_json: Annotated[bool, Option("--json", help="Print one JSON object.")] = False,
    no_data: Annotated[
        bool, Option("--no-data", help="Do not read the data; the number of steps stays unknown.")
    ] = False,
) -> None:
    """Predict a run's memory, steps and file sizes, and suggest changes if it does not fit. Reads no weights."""
    from lola_ft.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    from lola_ft.training.plan import plan as show

    show(loaded, gpu, as_json, not no_data)


@app.command()
def schema() -> None:
    """Print the JSON schema of recipes, which lets editors complete keys."""
    from lola_ft.recipe.bundled import schema_text

    print(schema_text(), end="")


@recipes_app.command("list")
def list_recipes() -> None:
    """List the recipes that come with lola_ft, each with its purpose."""
    from lola_ft.recipe.bundled import bundled_recipes

    for name, recipe in bundled_recipes().items():
        print(f"{name:24}{recipe.purpose}")


@recipes_app.command("show")
def show_recipe(name: _RecipeName) -> None:
    """Print a recipe that comes with lola_ft."""
    from lola_ft.recipe.bundled import find_recipe

    print(find_recipe(name).text, end="")


@recipes_app.command("copy")
def copy_recipe(
    name: _RecipeName,
    out: Annotated[str, Option(help="Folder to copy into; the copy is in its subfolder recipes/.")] = ".",
) -> None:
    """Copy a recipe and its sample data, as a starting point for your own."""
    from lola_ft.recipe.bundled import copy_recipe as copy

    for path in copy(name, out):
        print(path)


@app.command()
def merge(
    run_or_adapter: Annotated[str, Argument(help="Folder of a run or of an adapter.")],
    base: _Base = None,
    out: Annotated[str | None, Option(help="Folder to write. Default: the folder merged/ inside the run.")] = None,
    dtype: Annotated[
        str, Option(help="Dtype of the merged weights: auto (the base's), float32, bfloat16 or float16.")
    ] = "auto",
    rounding: Annotated[
        str | None,
        Option(help="Weights to merge into: base (the original ones, default) or nf4 (rounded as 4-bit training saw)."),
    ] = None,
    check: Annotated[
        str,
        Option(help="Checks of the result: full (weights; logits too if the models fit in memory), weights or none."),
    ] = "full",
    allow_other_base: Annotated[
        bool, Option("--allow-other-base", help="Accept a base other than the one the adapter was trained on.")
    ] = False,
) -> None:
    """Merge an adapter into its base model, write an ordinary checkpoint, and check the result."""
    from lola_ft.file_names import MERGED_FOLDER, RECIPE_FILE
    from lola_ft.files import check_new_folder

    given = Path(run_or_adapter)
    if out or (given / RECIPE_FILE).is_file():
        check_new_folder(out or given / MERGED_FOLDER)
    from lola_ft.merging.merge_run import merge_command

    merge_command(run_or_adapter, base, out, dtype, rounding, allow_other_base, check)


@app.command()
def generate(
    model: _Model,
    prompt: Annotated[
        str | None,
        Option(help="Prompt to answer; the answer is printed token by token. Write - to read standard input."),
    ] = None,
    file: Annotated[
        str | None, Option(help="File of prompts, one per line: .txt or .jsonl. Write - to read standard input.")
    ] = None,
    chat: Annotated[bool, Option("--chat", help="Hold a conversation at the terminal.")] = False,
    base: _Base = None,
    adapter: Annotated[
        str | None, Option(help="Run or adapter to load onto the model, which is then a base or a merged model.")
    ] = None,
    template: Annotated[str | None, Option(help="Prompt template in place of the model's own.")] = None,
    max_new_tokens: Annotated[int, Option(help="Most tokens of an answer.")] = 256,
    temperature: Annotated[float, Option(help="Sampling temperature; 0 always takes the likeliest token.")] = 0.0,
    top_p: Annotated[
        float | None, Option(help="Nucleus sampling: only the likeliest tokens up to this total probability.")
    ] = None,
    seed: Annotated[int | None, Option(help="Random seed of sampling.")] = None,
    quantization: _Quantization = "auto",
    batch_size: Annotated[int, Option(min=1, help="Number of prompts of a file answered at once.")] = 32,
    out: Annotated[str | None, Option(help="Write the answers to this .jsonl file, one object per prompt.")] = None,
) -> None:
    """Generate answers to a prompt, to a file of prompts, or in a conversation."""
    if out:
        from lola_ft.files import check_file_target

        check_file_target(out)
    from lola_ft.generation import Sampling
    from lola_ft.generation.generate import generate_command

    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    generate_command(model, base, adapter, prompt, file, chat, template, sampling, quantization, batch_size, out)


@app.command()
def evaluate(
    context: typer.Context,
    models: Annotated[list[str], Argument(metavar="MODEL", help="Base models, runs, adapters or merged models.")],
    data: Annotated[
        list[str] | None, Option(help="Held-out rows to measure on: a file, folder or glob. Repeat for more.")
    ] = None,
    task: Annotated[
        str, Option(help="loss (nats per token, bits per byte), generate (chrF, exact match) or choice.")
    ] = "loss",
    format: Annotated[
        str | None, Option(help="Format of the rows: a recipe's format, or choices. .txt files need none: text.")
    ] = None,
    language: Annotated[
        list[str] | None, Option(help="Language code of all files; or repeat it, once per file.")
    ] = None,
    language_column: Annotated[str | None, Option(help="Field of a row that holds its language code.")] = None,
    field: Annotated[
        list[str] | None,
        Option(metavar="STANDARD=NAME", help="The format's field name = the files' field name. Repeat for more."),
    ] = None,
    label: Annotated[
        list[str] | None,
        Option(metavar="LABEL=WORD", help="Label in the files = the word that answers use. Repeat for more."),
    ] = None,
    instruction: Annotated[
        str | None, Option(help="Instruction given to the model with every row, as in a recipe.")
    ] = None,
    source_language: Annotated[
        str | None, Option(help="Format translation: language code of the source texts.")
    ] = None,
    target_language: Annotated[
        str | None, Option(help="Format translation: language code of the translations.")
    ] = None,
    unit: Annotated[str | None, Option(help="One row of a .txt file: paragraph, line or file.")] = None,
    delimiter: Annotated[str | None, Option(help="Character between the cells of a .csv or .tsv file.")] = None,
    quoting: Annotated[
        bool | None, Option("--quoting/--no-quoting", help="Cells of a .csv or .tsv file may be in quotation marks.")
    ] = None,
    rows_under: Annotated[str | None, Option(help="Key of a .json file that holds the list of rows.")] = None,
    max_rows: Annotated[int | None, Option(min=1, help="Read only the first rows of each language.")] = None,
    batch_size: Annotated[int, Option(min=1, help="Rows computed at once.")] = 8,
    max_new_tokens: Annotated[
        int | None, Option(min=1, help="Task generate: most tokens of an answer. Default: 128.")
    ] = None,
    overlong: Annotated[
        str | None,
        Option(help="Task generate: prompts that are too long: error, skip or truncate. Default: error."),
    ] = None,
    stride: Annotated[
        int | None, Option(help="Task loss: tokens between windows over a long text. Default: half the positions.")
    ] = None,
    resamples: Annotated[int, Option(min=1, help="Number of bootstrap resamples.")] = 1000,
    seed: Annotated[int, Option(min=0, help="Random seed of the bootstrap.")] = 0,
    base: _Base = None,
    quantization: _Quantization = "auto",
    template: Annotated[str | None, Option(help="Prompt template in place of each model's own.")] = None,
    out: Annotated[
        str | None, Option(help="Folder to write: the results as JSON, a plot, and every row's scores.")
    ] = None,
    transfer: Annotated[
        bool, Option("--transfer", help="Compare runs with the base, which is given first, per language trained on.")
    ] = False,
    suite: Annotated[str | None, Option(help="Run a suite of benchmarks (lola-paper) in place of --data.")] = None,
    tasks: Annotated[
        str | None, Option(help="Suite: benchmarks or tasks to run, separated by commas. Default: all.")
    ] = None,
    languages: Annotated[
        str | None, Option(help="Suite: language codes to run, separated by commas. Default: all.")
    ] = None,
    limit: Annotated[int | None, Option(min=1, help="Suite: most questions per task. Default: all.")] = None,
    shots: Annotated[int, Option(min=0, help="Suite: examples before each question (few-shot).")] = 0,
    include_path: Annotated[
        str | None, Option(help="Suite: folder with your own tasks, YAML files of lm-evaluation-harness.")
    ] = None,
) -> None:
    """Measure one model or compare several, per language, with bootstrap intervals."""
    _refuse_other_kind(context, of_suite=suite is not None)
    if suite is not None:
        from lola_ft.evaluation.suite import SuiteOptions, evaluate_suite

        of_suite = SuiteOptions(suite, _listed(tasks), _languages(languages), limit, shots, include_path, batch_size)
        evaluate_suite(models, of_suite, out, base, quantization)
        return
    if out:
        from lola_ft.files import check_folder_target

        check_folder_target(out)
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
        delimiter=delimiter,
        quoting=quoting,
        rows_under=rows_under,
        source_language=source_language,
        target_language=target_language,
    )
    options = TaskOptions(task, batch_size, max_new_tokens, stride, resamples, seed, transfer, overlong)
    evaluate_rows(models, rows, options, base, quantization, template, out)


@app.command()
def convert(
    adapter: Annotated[str, Argument(help="Folder of the adapter, in either layout.")],
    base: Annotated[str, Option(help="Folder or Hub id of the adapter's base model.")],
    layout: Annotated[str, Option(help="Layout to write: peft, or per_expert (which the LOLA authors' code loads).")],
    out: Annotated[str, Option(help="Folder to write.")],
) -> None:
    """Convert an adapter to the other layout on disk without changing its numbers."""
    from lola_ft.files import check_new_folder

    check_new_folder(out)
    from lola_ft.adapters.convert import convert_adapter

    result = convert_adapter(adapter, base, layout, out)
    print(f"{result.tensors} tensors ({result.source_layout}) written to {out} ({layout}).")


@app.command()
def export(
    source: Annotated[str, Argument(metavar="BASE|MERGED", help="A base or merged model: a folder or a Hub id.")],
    out: Annotated[str, Option(help="Folder to write.")],
    revision: Annotated[str | None, Option(help="Branch, tag or commit on the Hub.")] = None,
) -> None:
    """Write a LOLA model with the code that loads it, for transformers 4.41 or later without lola_ft."""
    from lola_ft.files import check_new_folder

    check_new_folder(out)
    from lola_ft.standalone.export import export_command

    export_command(source, out, revision)


@app.command()
def publish(
    source: Annotated[
        str, Argument(metavar="RUN|ADAPTER|MERGED", help="Folder of a run, an adapter or a merged model.")
    ],
    repo: Annotated[str, Option(help="Repository on the Hub, owner/name; created if it does not exist.")],
    private: Annotated[bool, Option("--private", help="Create the repository as private.")] = False,
    layout: Annotated[
        str | None, Option(help="Layout of a published adapter: peft or per_expert. Default: its own.")
    ] = None,
    base: Annotated[
        str | None,
        Option(help="Base model for the check: a folder or a Hub id. Default: the base it was trained on."),
    ] = None,
    base_id: Annotated[str | None, Option(help="Hub id of the base model, if the run used a local folder.")] = None,
    skip_check: Annotated[
        bool, Option("--skip-check", help="Upload without reloading the files and comparing their logits.")
    ] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="Show the files that would be uploaded, and stop.")] = False,
) -> None:
    """Publish an adapter or a merged model on the Hugging Face Hub with a model card, or update it there."""
    from lola_ft.hub.publish import publish as send

    send(source, repo, private, layout, base, base_id, skip_check, dry_run)


@app.command()
def quantize(
    base: Annotated[str, Argument(help="Folder or Hub id of the base model.")],
    dtype: Annotated[
        str, Option(help="Dtype of the weights that are not quantised: bfloat16, float16 or float32.")
    ] = "bfloat16",
    revision: Annotated[str | None, Option(help="Branch, tag or commit on the Hub.")] = None,
) -> None:
    """Quantise a base model once and cache it, so that later runs load it many times faster."""
    from lola_ft.quantization import quantize_base

    print(f"The quantised base is in {quantize_base(base, dtype, revision)}.")


@routing_app.command("texts")
def routing_texts(
    out: Annotated[str, Option(help="Folder to write.")],
    text: Annotated[str, Option(help="Texts to write: names, declaration, or all (both).")] = "all",
    languages: Annotated[str | None, Option(help="Tags separated by commas, such as sw,sr-Latn. Default: all.")] = None,
) -> None:
    """Write one text file per language, as data for `routing profile`.

    The texts are names from Unicode CLDR in 144 languages, and the Universal Declaration of Human Rights in 197
    languages and scripts.
    """
    from lola_ft.files import check_folder_target

    check_folder_target(out)
    from lola_ft.nano.corpus import write_texts

    files = write_texts(Path(out), kind=text, languages=_languages(languages) or None)
    print(f"{len(files)} languages and scripts in {out}.")


@routing_app.command("profile")
def routing_profile(
    model: _Model,
    data: Annotated[list[str], Option(help="Texts to read: a file, folder or glob. Repeat for more.")],
    out: Annotated[str, Option(help="Safetensors file to write the profile to.")],
    base: _Base = None,
    revision: Annotated[str | None, Option(help="Branch, tag or commit of the base on the Hub.")] = None,
    quantization: _Quantization = "auto",
    format: Annotated[str, Option(help="Format of the files, as in a recipe.")] = "text",
    language_column: Annotated[
        str | None, Option(help="Field that holds the language code. Default: the file's name, such as sw.txt.")
    ] = None,
    unit: Annotated[str | None, Option(help="One text of a .txt file: paragraph, line or file.")] = None,
    template: Annotated[str | None, Option(help="Prompt template. Default: the model's own, else alpaca.")] = None,
    max_tokens_per_language: Annotated[
        int | None, Option(min=1, help="Read only the first tokens of each language.")
    ] = None,
    max_length: Annotated[
        int | None, Option(help="Longest sequence in tokens. Default: the model's positions.")
    ] = None,
    sample: Annotated[
        int, Option(min=0, help="Tokens per language to record one by one, to compare two profiles.")
    ] = 1000,
) -> None:
    """Count how many tokens of each language every expert receives, in every MoE layer."""
    from lola_ft.files import check_file_target

    check_file_target(out)
    from lola_ft.routing.profile import save_profile
    from lola_ft.routing.profiling import profile_routing

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
    profile: Annotated[str, Argument(help="A profile that `routing profile` wrote.")],
    second: Annotated[str | None, Argument(help="A second profile of the same texts, to show the changes.")] = None,
    out: Annotated[
        str | None, Option(help="Folder to write. Default: beside the profile, its name with -report.")
    ] = None,
    permutations: Annotated[
        int, Option(min=1, help="Permutations per test of routing against language families.")
    ] = 999,
    seed: Annotated[int, Option(min=0, help="Random seed of the permutations.")] = 0,
) -> None:
    """Write an HTML page with tables and figures, the figures as files, and all numbers as JSON."""
    from lola_ft.routing.profile import read_profile
    from lola_ft.routing.report_page import write_report

    file = Path(profile)
    folder = out or file.with_name(f"{file.stem}-report")
    other = read_profile(second) if second else None
    report = write_report(read_profile(file), folder, other, permutations, seed)
    print(*report.headlines(), f"The report is in {report.page}.", sep="\n")


@routing_app.command("select")
def routing_select(
    profile: Annotated[str, Argument(help="A profile that `routing profile` wrote.")],
    languages: Annotated[str, Option(help="Language codes separated by commas, such as sw,rw.")],
    out: Annotated[str, Option(help="JSON file to write, for adapter.experts.select in a recipe.")],
    coverage: Annotated[
        float, Option(help="Share of the languages' tokens that the chosen experts must receive together.")
    ] = 0.8,
    by: Annotated[
        str, Option(help="Weight of a token: tokens (each counts 1) or gate (the router's probability).")
    ] = "tokens",
    rank: Annotated[int, Option(min=1, help="LoRA rank, to predict the adapter's size.")] = 8,
    random: Annotated[
        bool, Option("--random", help="As a control, choose the same number of experts at random.")
    ] = False,
    seed: Annotated[int | None, Option(help="Random seed of --random. Default: 0.")] = None,
) -> None:
    """Choose the fewest experts per layer that receive most tokens of the given languages."""
    from lola_ft.routing.profile import read_profile
    from lola_ft.routing.relevance import describe_choice, save_choice, select_experts

    if seed is not None and not random:
        raise UserError("--seed does nothing without --random: the choice by coverage is not random. Leave it out.")
    draw = (seed or 0) if random else None
    choice = select_experts(read_profile(profile), _languages(languages), coverage, by, draw, rank)
    save_choice(choice, out)
    print(f"{describe_choice(choice)}\nThe selection is in {out}.")


@app.command()
def nano(
    family: Annotated[
        str | None, Option(help="Model type, one of those `lola-ft families` lists. Default: LOLA.")
    ] = None,
    out: Annotated[
        str | None,
        Option(
            help="Folder to write; reused if up to date. Default: .cache/nano, or .cache/nano-FAMILY with --family."
        ),
    ] = None,
) -> None:
    """Build the nano base: a LOLA of 3.2 M parameters, pre-trained in minutes on text that comes with lola_ft.

    The text is the Universal Declaration of Human Rights in 197 languages and scripts, and names from CLDR in 144
    languages. --family builds another architecture with as many parameters active per token, on the same text.
    """
    from lola_ft.nano import build_nano

    build_nano(out, family=family)


@app.command()
def families(as_json: Annotated[bool, Option("--json", help="Print JSON.")] = False) -> None:
    """List the supported families of base models, the weights that can be trained in each, and their limits."""
    from lola_ft.families.listing import families_as_json, families_as_text

    print(families_as_json() if as_json else families_as_text())


@app.command()
def doctor(
    online: Annotated[bool, Option("--online", help="Also check the connection to the Hub.")] = False,
    as_json: Annotated[bool, Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show versions and hardware, and test what fine-tuning needs. Exit code 1 means that it would fail here."""
    from lola_ft.doctor import doctor as look

    if not look(online, as_json):
        raise typer.Exit(1)


@app.command()
def demo(recipe: Annotated[str, Argument(help="Recipe that the demo runs.")] = "recipes/demo.yaml") -> None:
    """Build the nano base, fine-tune it in 4 bit, merge, and compare the results, all without a download."""
    from lola_ft.demo.run_demo import run_demo

    run_demo(recipe)


_OF_SUITE = ("tasks", "languages", "limit", "shots", "include_path")
_OF_BOTH = ("models", "suite", "batch_size", "base", "quantization", "out")


def _refuse_other_kind(context: typer.Context, of_suite: bool) -> None:
    """Refuse options of `evaluate` that do nothing with --suite, or nothing without it."""
    for name in context.params:
        source = context.get_parameter_source(name)
        given = source is not None and source.name == "COMMANDLINE"
        if given and name not in _OF_BOTH and (name in _OF_SUITE) != of_suite:
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"{option} does nothing {'with' if of_suite else 'without'} --suite. Leave it out.")


def _languages(text: str | None) -> list[str]:
    """Split the value of --languages; [] if the option is not given. An empty language is refused."""
    parts = [] if text is None else [part.strip() for part in text.split(",")]
    if not all(parts):
        raise UserError(f"--languages '{text}': a language is empty. Write codes with commas between, such as sw,rw.")
    return parts


def _listed(text: str | None) -> list[str]:
    """Split text at its commas."""
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def main(arguments: list[str] | None = None) -> None:
    """Run a verb and exit with its code; a user's mistake prints one message on stderr."""
    # transformers 5.23 renames gradient checkpointing to activation checkpointing; PEFT 0.21 knows only the old name.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*")
    prepare_process()
    try:
        app(args=checked_arguments(sys.argv[1:] if arguments is None else arguments), prog_name="lola-ft")
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") in ("0", "-1"):  # only the first of several processes prints it
            print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
