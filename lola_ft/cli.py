"""The command line: one function per verb of `lola-ft`; `finetune.py` and `merge.py` call two of them.

Nothing heavy (torch, transformers, …) is imported before a verb needs it, so that help and mistakes come at once: a
verb imports its own package inside its function. `tests/test_startup.py` checks it.

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

from lola_ft import __version__
from lola_ft.errors import UserError
from lola_ft.start import checked_arguments, prepare_process


class _Verbs(TyperGroup):
    """Exits with 130 when Ctrl-C stops a verb; typer would exit with 1, which here means a bug."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            if type(stop) is KeyboardInterrupt:  # a run that saved itself has said so
                print("\nStopped.", file=sys.stderr)
            raise typer.Exit(130) from None


app = typer.Typer(cls=_Verbs, invoke_without_command=True, add_completion=False, pretty_exceptions_enable=False)
recipes_app = typer.Typer(no_args_is_help=True, help="List, show or copy the recipes that come with lola_ft.")
app.add_typer(recipes_app, name="recipes")
routing_app = typer.Typer(no_args_is_help=True, help="Show which experts each language uses; choose experts to train.")
app.add_typer(routing_app, name="routing")


_RecipeFile = Annotated[str, Argument(metavar="RECIPE", help="The recipe, a YAML file.")]
_Overrides = Annotated[list[str] | None, Argument(metavar="KEY=VALUE", help="Recipe keys to change.")]
_Base = Annotated[
    str | None, Option(help="Base of the run or adapter, a folder or Hub id. Default: what it was trained on.")
]
_Quantization = Annotated[str, Option(help="nf4, none, or auto: as the run was trained, else none.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"lola-ft {__version__}")
        raise typer.Exit


GREETING = f"""lola-ft {__version__}: QLoRA for mixture-of-experts models on one GPU, made for LOLA.

  lola-ft doctor          Does everything that fine-tuning needs work here?
  lola-ft recipes list    Recipes to start from, one per task.
  lola-ft train RECIPE    Fine-tune as a recipe says; `preview` and `plan` look first.

All verbs: lola-ft --help. In a checkout, `make demo` shows the whole job without a download."""


@app.callback()
def about(
    context: typer.Context,
    version: Annotated[  # noqa: ARG001 - its callback prints it
        bool, Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Fine-tune LOLA, a multilingual mixture-of-experts model, and other language models, on one GPU."""
    if context.invoked_subcommand is None:
        print(GREETING)


@app.command()
def train(
    recipe: _RecipeFile,
    overrides: _Overrides = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Check and prepare everything, but do not train.")] = False,
    resume: Annotated[bool, Option("--resume", help="Resume the run in the output folder.")] = False,
    allow_changed: Annotated[
        list[str] | None,
        Option(metavar="KEY", help="Recipe key that may differ from the resumed run. Repeat for more."),
    ] = None,
) -> None:
    """Fine-tune a base model as a recipe says."""
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
    examples: Annotated[int, Option(min=1, help="Examples shown per language.")] = 2,
    languages: Annotated[int, Option(min=1, help="Languages shown, those with most rows first.")] = 8,
) -> None:
    """Show what a recipe's data becomes: examples with what is learned, lengths, and dropped rows."""
    from lola_ft.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    from lola_ft.training.preview import preview as show

    show(loaded, examples, languages)


@app.command()
def plan(
    recipe: _RecipeFile,
    overrides: _Overrides = None,
    gpu: Annotated[
        str | None, Option(metavar="SIZE", help="Memory of the GPU, such as 8GB. Default: this machine's GPU.")
    ] = None,
    as_json: Annotated[bool, Option("--json", help="Print one JSON object.")] = False,
    no_data: Annotated[bool, Option("--no-data", help="Do not read the data; steps stay unknown.")] = False,
) -> None:
    """Predict a run's memory, steps and files, and say what would make it fit; no weights are read."""
    from lola_ft.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    from lola_ft.training.plan import plan as show

    show(loaded, gpu, as_json, not no_data)


@app.command()
def schema() -> None:
    """Print the JSON schema of recipes, with which editors complete keys."""
    from lola_ft.recipe.bundled import schema_text

    print(schema_text(), end="")


@recipes_app.command("list")
def list_recipes() -> None:
    """List every recipe with its purpose."""
    from lola_ft.recipe.bundled import bundled_recipes

    for name, recipe in bundled_recipes().items():
        print(f"{name:24}{recipe.purpose}")


@recipes_app.command("show")
def show_recipe(name: Annotated[str, Argument(help="The recipe's name.")]) -> None:
    """Print a recipe."""
    from lola_ft.recipe.bundled import find_recipe

    print(find_recipe(name).text, end="")


@recipes_app.command("copy")
def copy_recipe(
    name: Annotated[str, Argument(help="The recipe's name.")],
    out: Annotated[str, Option(help="Folder in which the folder recipes/ is created.")] = ".",
) -> None:
    """Copy a recipe and its sample data, as a starting point."""
    from lola_ft.recipe.bundled import copy_recipe as copy

    for path in copy(name, out):
        print(path)


@app.command()
def merge(
    run_or_adapter: Annotated[str, Argument(help="A run folder or an adapter's folder.")],
    base: _Base = None,
    out: Annotated[str | None, Option(help="Folder to write. Default: RUN/merged for a run.")] = None,
    dtype: Annotated[str, Option(help="Dtype to write: auto (the base's), float32, bfloat16 or float16.")] = "auto",
    rounding: Annotated[
        str | None, Option(help="Merge into the original weights (base, the default) or NF4-rounded ones (nf4).")
    ] = None,
    check: Annotated[
        str, Option(help="Checks: full (weights, and logits if the models fit in memory), weights or none.")
    ] = "full",
    allow_other_base: Annotated[
        bool, Option("--allow-other-base", help="Accept a base of another fingerprint.")
    ] = False,
) -> None:
    """Merge an adapter into its base, write the Hub's layout, and check the result."""
    from lola_ft.file_names import MERGED_FOLDER, RECIPE_FILE
    from lola_ft.files import check_new_folder

    given = Path(run_or_adapter)
    if out or (given / RECIPE_FILE).is_file():
        check_new_folder(out or given / MERGED_FOLDER)
    from lola_ft.merging.merge_run import merge_command

    merge_command(run_or_adapter, base, out, dtype, rounding, allow_other_base, check)


@app.command()
def generate(
    model: Annotated[str, Argument(help="A base, a run, an adapter or a merged model.")],
    prompt: Annotated[
        str | None, Option(help="Prompt to answer, printed token by token; - reads it from standard input.")
    ] = None,
    file: Annotated[
        str | None, Option(help="File of prompts, one per line: .txt or .jsonl; - reads lines from standard input.")
    ] = None,
    chat: Annotated[bool, Option("--chat", help="Hold a conversation at the terminal.")] = False,
    base: _Base = None,
    adapter: Annotated[str | None, Option(help="Run or adapter to load onto the base.")] = None,
    template: Annotated[str | None, Option(help="Prompt template to use instead of the model's own.")] = None,
    max_new_tokens: Annotated[int, Option(help="Longest answer in tokens.")] = 256,
    temperature: Annotated[float, Option(help="Sampling temperature; 0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float | None, Option(help="Sample among the likeliest tokens of this total probability.")] = None,
    seed: Annotated[int | None, Option(help="Seed of the sampling.")] = None,
    quantization: _Quantization = "auto",
    batch_size: Annotated[int, Option(min=1, help="Prompts of a file that are answered together.")] = 32,
    out: Annotated[str | None, Option(help="A .jsonl file to write, one object per prompt.")] = None,
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
    models: Annotated[list[str], Argument(metavar="MODEL", help="Bases, runs, adapters or merged models.")],
    data: Annotated[list[str] | None, Option(help="Held-out rows: a file, folder or glob. Repeat for more.")] = None,
    task: Annotated[str, Option(help="loss (nats per token, bits per byte), generate or choice.")] = "loss",
    format: Annotated[
        str | None, Option(help="Format of the rows, as in a recipe, or choices. For .txt: text.")
    ] = None,
    language: Annotated[list[str] | None, Option(help="Language of all files, or repeated, one per file.")] = None,
    language_column: Annotated[str | None, Option(help="Field that holds each row's language.")] = None,
    field: Annotated[
        list[str] | None, Option(metavar="STANDARD=NAME", help="Name of a format's field in the files.")
    ] = None,
    label: Annotated[list[str] | None, Option(metavar="LABEL=WORD", help="Word for a label.")] = None,
    instruction: Annotated[str | None, Option(help="Request put to the model, as in a recipe.")] = None,
    source_language: Annotated[str | None, Option(help="Source language of format translation.")] = None,
    target_language: Annotated[str | None, Option(help="Target language of format translation.")] = None,
    unit: Annotated[str | None, Option(help="What one row of a .txt file is: paragraph, line or file.")] = None,
    delimiter: Annotated[str | None, Option(help="Character between the cells of a .csv or .tsv file.")] = None,
    quoting: Annotated[
        bool | None, Option("--quoting/--no-quoting", help="Whether cells may stand in quotation marks.")
    ] = None,
    rows_under: Annotated[str | None, Option(help="Key under which a .json file has its list of rows.")] = None,
    max_rows: Annotated[int | None, Option(min=1, help="Rows per language, the first ones.")] = None,
    batch_size: Annotated[int, Option(min=1, help="Rows per batch.")] = 8,
    max_new_tokens: Annotated[int | None, Option(min=1, help="Longest answer of task generate. Default: 128.")] = None,
    overlong: Annotated[
        str | None,
        Option(help="Prompts of task generate that are too long: error, skip or truncate. Default: error."),
    ] = None,
    stride: Annotated[
        int | None, Option(help="Stride of windows over long texts. Default: half the positions.")
    ] = None,
    resamples: Annotated[int, Option(min=1, help="Resamples of the bootstrap.")] = 1000,
    seed: Annotated[int, Option(min=0, help="Seed of the bootstrap.")] = 0,
    base: _Base = None,
    quantization: _Quantization = "auto",
    template: Annotated[str | None, Option(help="Prompt template to use instead of the models' own.")] = None,
    out: Annotated[str | None, Option(help="Folder to write: results as JSON, a plot, and every row.")] = None,
    transfer: Annotated[
        bool, Option("--transfer", help="Compare runs with the base given first, per language trained on.")
    ] = False,
    suite: Annotated[str | None, Option(help="Run a suite of benchmarks instead of --data: lola-paper.")] = None,
    tasks: Annotated[str | None, Option(help="Benchmarks or tasks of the suite, separated by commas.")] = None,
    languages: Annotated[str | None, Option(help="Languages of the suite, separated by commas.")] = None,
    limit: Annotated[int | None, Option(min=1, help="Documents per task of the suite.")] = None,
    shots: Annotated[int, Option(min=0, help="Examples before each question of the suite (few-shot).")] = 0,
    include_path: Annotated[str | None, Option(help="Folder with your own tasks as YAML files of the harness.")] = None,
) -> None:
    """Compare models per language, with bootstrap intervals."""
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
    adapter: Annotated[str, Argument(help="The adapter's folder, in either layout.")],
    base: Annotated[str, Option(help="The base's folder or Hub id.")],
    layout: Annotated[str, Option(help="Layout to write: peft or per_expert (the LOLA authors' own).")],
    out: Annotated[str, Option(help="Folder to write.")],
) -> None:
    """Rewrite an adapter in the other layout without changing its numbers."""
    from lola_ft.files import check_new_folder

    check_new_folder(out)
    from lola_ft.adapters.convert import convert_adapter

    result = convert_adapter(adapter, base, layout, out)
    print(f"{result.tensors} tensors ({result.source_layout}) written to {out} ({layout}).")


@app.command()
def export(
    source: Annotated[str, Argument(metavar="BASE|MERGED", help="A base or a merged model, a folder or Hub id.")],
    out: Annotated[str, Option(help="Folder to write.")],
    revision: Annotated[str | None, Option(help="Branch, tag or commit on the Hub.")] = None,
) -> None:
    """Write a LOLA with the code that loads it, so that transformers 4.41 or later runs it without lola_ft."""
    from lola_ft.files import check_new_folder

    check_new_folder(out)
    from lola_ft.standalone.export import export_command

    export_command(source, out, revision)


@app.command()
def publish(
    source: Annotated[str, Argument(metavar="RUN|ADAPTER|MERGED", help="Folder to publish.")],
    repo: Annotated[str, Option(help="Repository on the Hub, owner/name; created if it does not exist.")],
    private: Annotated[bool, Option("--private", help="Create the repository as private.")] = False,
    layout: Annotated[str | None, Option(help="Layout to publish an adapter in: peft or per_expert.")] = None,
    base: Annotated[
        str | None, Option(help="Base for the check, a folder or Hub id. Default: what it was trained on.")
    ] = None,
    base_id: Annotated[str | None, Option(help="Id of the base on the Hub, if it is a local folder.")] = None,
    skip_check: Annotated[bool, Option("--skip-check", help="Upload without reloading and comparing.")] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="Show what would be uploaded, and stop.")] = False,
) -> None:
    """Publish an adapter or merged model on the Hugging Face Hub, with a model card, or update it there."""
    from lola_ft.hub.publish import publish as send

    send(source, repo, private, layout, base, base_id, skip_check, dry_run)


@app.command()
def quantize(
    base: Annotated[str, Argument(help="The base's folder or Hub id.")],
    dtype: Annotated[str, Option(help="Dtype of unquantised weights: bfloat16, float16 or float32.")] = "bfloat16",
    revision: Annotated[str | None, Option(help="Branch, tag or commit on the Hub.")] = None,
) -> None:
    """Quantise a base once, so that later runs load it many times faster."""
    from lola_ft.quantization import quantize_base

    print(f"The quantised base is in {quantize_base(base, dtype, revision)}.")


@routing_app.command("texts")
def routing_texts(
    out: Annotated[str, Option(help="Folder to write.")],
    text: Annotated[str, Option(help="names, declaration, or all.")] = "all",
    languages: Annotated[str | None, Option(help="Tags separated by commas, such as sw,sr-Latn. Default: all.")] = None,
) -> None:
    """Write one text file per language, data for `routing profile`.

    The text is names from Unicode CLDR in 144 languages, and the Universal Declaration of Human Rights in 197 languages
    and scripts.
    """
    from lola_ft.files import check_folder_target

    check_folder_target(out)
    from lola_ft.nano.corpus import write_texts

    files = write_texts(Path(out), kind=text, languages=_languages(languages) or None)
    print(f"{len(files)} languages and scripts in {out}.")


@routing_app.command("profile")
def routing_profile(
    model: Annotated[str, Argument(help="A base, a run, an adapter or a merged model.")],
    data: Annotated[list[str], Option(help="Texts: a file, folder or glob. Repeat for more.")],
    out: Annotated[str, Option(help="Profile to write, a safetensors file.")],
    base: _Base = None,
    revision: Annotated[str | None, Option(help="Branch, tag or commit of the base on the Hub.")] = None,
    quantization: _Quantization = "auto",
    format: Annotated[str, Option(help="Format of the files, as in a recipe.")] = "text",
    language_column: Annotated[
        str | None, Option(help="Field that holds the language. Default: the file's name, as sw.txt.")
    ] = None,
    unit: Annotated[str | None, Option(help="What one text of a .txt file is: paragraph, line or file.")] = None,
    template: Annotated[str | None, Option(help="Prompt template. Default: the model's own, else alpaca.")] = None,
    max_tokens_per_language: Annotated[int | None, Option(min=1, help="Tokens per language, the first ones.")] = None,
    max_length: Annotated[int | None, Option(help="Longest sequence. Default: the model's positions.")] = None,
    sample: Annotated[int, Option(min=0, help="Tokens per language whose own expert choices are kept.")] = 1000,
) -> None:
    """Count which experts the tokens of each language are routed to, in every MoE layer."""
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
    second: Annotated[str | None, Argument(help="A second profile, to show what changed.")] = None,
    out: Annotated[str | None, Option(help="Folder to write. Default: PROFILE-report.")] = None,
    permutations: Annotated[int, Option(min=1, help="Permutations per test of whether routing follows descent.")] = 999,
    seed: Annotated[int, Option(min=0, help="Seed of the permutations.")] = 0,
) -> None:
    """Write a page with tables and figures, the figures as files, and all numbers as JSON."""
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
    coverage: Annotated[float, Option(help="Share of the languages' tokens that the experts must receive.")] = 0.8,
    by: Annotated[str, Option(help="tokens, or gate: tokens weighted with the router's probability.")] = "tokens",
    rank: Annotated[int, Option(min=1, help="Rank of the adapter whose size is predicted.")] = 8,
    random: Annotated[bool, Option("--random", help="Choose as many experts at random, as a control.")] = False,
    seed: Annotated[int | None, Option(help="Seed of the random choice. Default: 0.")] = None,
) -> None:
    """Choose the fewest experts per layer that receive most tokens of some languages."""
    from lola_ft.routing.profile import read_profile
    from lola_ft.routing.relevance import describe_choice, save_choice, select_experts

    if seed is not None and not random:
        raise UserError("--seed is for --random; the choice by coverage has nothing random.")
    draw = (seed or 0) if random else None
    choice = select_experts(read_profile(profile), _languages(languages), coverage, by, draw, rank)
    save_choice(choice, out)
    print(f"{describe_choice(choice)}\nThe selection is in {out}.")


@app.command()
def nano(
    family: Annotated[str | None, Option(help="Model type that `lola-ft families` lists. Default: LOLA's.")] = None,
    out: Annotated[
        str | None,
        Option(help="Folder to write; reused if it is up to date. Default: .cache/nano, .cache/nano-FAMILY of others."),
    ] = None,
) -> None:
    """Build the nano base: LOLA's architecture at 3.2 M parameters, pre-trained on the declaration of human rights.

    The text is the declaration in 197 languages and scripts, and CLDR's names in 144 languages. With --family another
    architecture, with as many parameters active per token, on the same text.
    """
    from lola_ft.nano import build_nano

    build_nano(out, family=family)


@app.command()
def families(as_json: Annotated[bool, Option("--json", help="Print JSON.")] = False) -> None:
    """List the base families that are supported: what can be trained of each, and its limits."""
    from lola_ft.families.listing import families_as_json, families_as_text

    print(families_as_json() if as_json else families_as_text())


@app.command()
def doctor(
    online: Annotated[bool, Option("--online", help="Check the connection to the Hub too.")] = False,
    as_json: Annotated[bool, Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show versions and hardware and test what fine-tuning needs; exit code 1 if it would not work here."""
    from lola_ft.doctor import doctor as look

    if not look(online, as_json):
        raise typer.Exit(1)


@app.command()
def demo(recipe: Annotated[str, Argument(help="Recipe of the demo.")] = "recipes/demo.yaml") -> None:
    """Build the nano base, fine-tune it in 4 bit, merge, and compare: the whole job without a download."""
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
    """Split the value of --languages; [] if it is not given. An empty language is refused."""
    parts = [] if text is None else [part.strip() for part in text.split(",")]
    if not all(parts):
        raise UserError(f"--languages '{text}': a language is empty. Write codes with commas between, such as sw,rw.")
    return parts


def _listed(text: str | None) -> list[str]:
    """Split text at its commas."""
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def main(arguments: list[str] | None = None) -> None:
    """Run a verb and exit with its code; a user's mistake is one message on stderr."""
    # transformers 5.23 renames gradient checkpointing to activation checkpointing; PEFT 0.21 knows only the old name.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*")
    prepare_process()
    try:
        app(args=checked_arguments(sys.argv[1:] if arguments is None else arguments), prog_name="lola-ft")
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") in ("0", "-1"):  # of several processes only the first
            print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
