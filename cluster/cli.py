"""The command `tenfold`. Heavy imports are inside the commands, so that `--help` is quick."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cluster import cli_serve
from cluster.cli_annotate import annotate
from cluster.cli_jobs import Detach, NoSecrets, OnCluster, add_jobs, resume_there
from cluster.cli_rankings import rankings
from cluster.cli_scale import add_scale
from cluster.command import Accept, DryRun, Json, Overrides, RecipePath, RunName
from cluster.command import leave as _exit
from cluster.command import print_json as _print_json
from cluster.console import StreamConsole, make_console
from cluster.planning import register as register_plan

if TYPE_CHECKING:
    from configs.schema import Recipe, Stage

app = typer.Typer(
    name="tenfold",
    help="Aligns a language model by reinforcement learning: ten answers per prompt, ranked, then PPO with LoRA.",
    epilog="A recipe is a YAML file (see configs/recipes). Its keys can be set on the command line: ppo.num_steps=3",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,  # a local variable may hold a secret
)

STAGE_COMMANDS = {
    "run": "Run all stages of a recipe, in order. What is done is skipped.",
    "pretrain": "Train a model on raw text, from nothing or on from one that is there.",
    "sft": "Align a model on conversations: whole, by LoRA, or as a named domain adapter.",
    "sample": "Sample ten answers per prompt from the starting model.",
    "rank": "Rank the ten answers of each prompt.",
    "reward": "Train the reward model on the rankings.",
    "ppo": "Train the policy with PPO, against the reward model or rules.",
    "evaluate": "Compare before and after on held-out prompts.",
}


def _add_stages(command: str, about: str) -> None:
    def stages(
        recipe: RecipePath,
        overrides: Overrides = None,
        dry_run: DryRun = False,
        accept: Accept = None,
        as_json: Json = False,
    ) -> None:
        _stages(command, recipe, overrides, dry_run, accept, as_json)

    app.command(command, help=about)(stages)


for _command, _about in STAGE_COMMANDS.items():
    _add_stages(_command, _about)


@app.command()
def resume(
    run: RunName,
    overrides: Overrides = None,
    accept: Accept = None,
    into: Annotated[
        Path, typer.Option(help="The folder of run folders, for a run that is fetched from its mirror.")
    ] = Path("runs"),
    as_json: Json = False,
    address: OnCluster = None,
    detach: Detach = False,
    no_secrets: NoSecrets = False,
) -> None:
    """Go on with a run that was stopped or killed, from its folder alone; or from its mirror (s3://...)."""
    if address is not None:
        resume_there(run, overrides or [], accept or [], address, detach=detach, no_secrets=no_secrets, as_json=as_json)
        return
    console = make_console(sys.stderr if as_json else sys.stdout)
    again = " ".join(["tenfold", "resume", run, *(overrides or [])])

    def work() -> None:
        from cluster.runs import find_run, load_run

        recipe, stages = load_run(find_run(run, into, console), overrides or ())
        _run(console, recipe, stages, accept or (), as_json)

    with console:
        _exit(console, again, work)


@app.command()
def runs(
    folder: Annotated[Path, typer.Argument(metavar="[FOLDER]", help="The folder of run folders.")] = Path("runs"),
    as_json: Json = False,
) -> None:
    """List the runs: stage, step, newest checkpoint, state."""
    console = make_console(sys.stderr if as_json else sys.stdout)

    def work() -> None:
        from cluster.runs import list_runs, table

        found = list_runs(folder)
        if as_json:
            _print_json(found)
        else:
            console.show(table(found))

    _exit(console, f"tenfold runs {folder}", work)


app.command()(annotate)


@app.command()
def chaos(
    recipe: RecipePath,
    overrides: Overrides = None,
    kills: Annotated[int, typer.Option(min=1, help="How often the run is killed.")] = 5,
    seed: Annotated[int, typer.Option(help="Chooses the moments.")] = 0,
    folder: Annotated[Path, typer.Option(help="Where both runs go.")] = Path("runs/chaos"),
    as_json: Json = False,
) -> None:
    """Kill a run of a small recipe again and again, resume it, and compare it with the undisturbed run, bit for bit."""
    console = make_console(sys.stderr if as_json else sys.stdout)
    same = True

    def work() -> None:
        nonlocal same
        from cluster.chaos import chaos as disturb
        from cluster.chaos import page

        report = disturb(recipe, overrides or (), kills=kills, seed=seed, folder=folder, console=console)
        same = not report.exit_code
        if as_json:
            _print_json(report.to_json())
        else:
            console.show(page(report))

    with console:
        _exit(console, " ".join(["tenfold", "chaos", recipe, *(overrides or [])]), work)
    if not same:
        raise typer.Exit(1)


@app.command()
def show(
    run: RunName,
    as_json: Json = False,
) -> None:
    """Print the summary page of a run again."""
    console = make_console(sys.stderr if as_json else sys.stdout)
    _exit(console, f"tenfold show {run}", lambda: _show(console, run, as_json))


@app.command()
def export(
    run: RunName,
    to: Annotated[Path, typer.Option(metavar="DIR", help="The folder to write; it must not hold anything yet.")],
    merge: Annotated[bool, typer.Option("--merge", help="Write one model: the base with the adapter merged.")] = False,
    as_json: Json = False,
) -> None:
    """Write what a run trained last as a PEFT folder or a whole model, and check it by its logprobs."""
    console = make_console(sys.stderr if as_json else sys.stdout)

    def work() -> None:
        from cluster.export import export_run, page

        done = export_run(run, to, merge=merge, console=console)
        if as_json:
            _print_json(done)
        else:
            console.show(page(done))

    with console:
        _exit(console, f"tenfold export {run} --to {to}", work)


app.command()(rankings)


@app.command("import-model")
def import_model(
    source: Annotated[str, typer.Argument(help="A GGUF file, a Hugging Face folder, or a hub name.")],
    dest: Annotated[Path, typer.Argument(help="The folder to write, in Hugging Face layout.")],
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None,
        typer.Option(help="Of the weights. Default: as they are stored; float32 from a GGUF file."),
    ] = None,
) -> None:
    """Bring a model into the layout that every stage loads."""
    console = make_console()

    def work() -> None:
        from rlhf.import_model import import_model as bring

        bring(source, dest, console=console, dtype=dtype)
        console.say(f"Set model.path={dest} in a recipe.")

    with console:
        _exit(console, f"tenfold import-model {source} {dest}", work)


add_jobs(app)
cli_serve.register(app)
register_plan(app)
add_scale(app)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            typer.echo(f"tenfold {version('tenfold')}")
        except PackageNotFoundError:
            typer.echo("tenfold, not installed")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None: ...


def _stages(
    command: str, path: str, overrides: list[str] | None, dry_run: bool, accept: list[str] | None, as_json: bool
) -> None:
    console = make_console(sys.stderr if as_json else sys.stdout)
    only: tuple[Stage, ...] | None = None if command == "run" else (command,)  # type: ignore[assignment]
    again = " ".join(["tenfold", command, path, *(overrides or [])])

    def work() -> None:
        from configs.load import load_recipe

        recipe = load_recipe(path, overrides or ())
        if dry_run:
            _preview(console, recipe, only, as_json)
        else:
            _run(console, recipe, only, accept or (), as_json)

    with console:
        _exit(console, again, work)


def _preview(console: StreamConsole, recipe: Recipe, only: tuple[Stage, ...] | None, as_json: bool) -> None:
    from cluster.preview import page, preview

    plan = preview(recipe, only)
    if as_json:
        _print_json(plan)
    else:
        console.show(page(plan))


def _run(
    console: StreamConsole, recipe: Recipe, only: Sequence[Stage] | None, accept: Sequence[str], as_json: bool
) -> None:
    from cluster.run import run as run_stages
    from rlhf.summary import page

    # A rule of the user's may print; what a program reads is the result alone.
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        outcome = run_stages(recipe, console, only=only, accept=accept)
    if as_json:
        _print_json(outcome.results)
    else:
        console.show(page(recipe.name, outcome.results, outcome.places, _next_steps(recipe, outcome.places.run)))


def _show(console: StreamConsole, run: str, as_json: bool) -> None:
    from cluster.preview import finished_stages
    from cluster.run import places
    from cluster.runs import find_run
    from configs.load import load_recipe
    from rlhf.summary import page

    folder = find_run(run)
    results = finished_stages(folder)
    if as_json:
        _print_json(results)
    else:
        console.show(
            page(folder.name, results, places(folder), _next_steps(load_recipe(folder / "recipe.yaml"), str(folder)))
        )


def _next_steps(recipe: Recipe, folder: str) -> list[str]:
    from rlhf.lineage import base_of

    again = [f"tenfold show {folder}", "    prints this page again"]
    if "ppo" not in recipe.stages:
        return [
            *again,
            f"tenfold export {folder} --to DIR",
            "    writes what was trained last, for others to load",
        ]
    rank = max(8, 1 << (recipe.lora.rank - 1).bit_length())  # vLLM has room for powers of two
    return [
        *again,
        f"tenfold chat {folder}",
        "    talks to the policy, and with /model base to its start; `tenfold serve` gives programs both",
        f"vllm serve {base_of(Path(folder), recipe)} --enable-lora --max-lora-rank {rank} --lora-modules "
        f"aligned={folder}/models/policy",
        "    serves the policy without Tenfold; plain transformers with peft loads the same folder",
        "tenfold run RECIPE name=mine data.prompts=my_prompts.jsonl",
        "    the same on prompts of your own",
    ]


def main() -> None:
    """The entry point of the command."""
    app()


if __name__ == "__main__":
    main()
