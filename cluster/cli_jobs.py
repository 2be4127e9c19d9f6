"""Commands that reach a cluster by the address of its job server: submit, status, logs, stop, resume; and doctor."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from cluster.command import Accept, DryRun, Json, Overrides, RecipePath, leave, print_json
from cluster.console import make_console
from cluster.job_console import follow_to_end, send_and_follow, show_plan

_ADDRESS = typer.Option(
    metavar="URL", envvar="TENFOLD_ADDRESS", help="The head node's dashboard: http://HEAD:8265. TENFOLD_ADDRESS too."
)
Address = Annotated[str, _ADDRESS]
OnCluster = Annotated[str | None, typer.Option("--address", metavar="URL", help="Of a cluster: go on there, as a job.")]
JobName = Annotated[str, typer.Argument(metavar="RUN", help="The name of a run that was submitted, or its job's id.")]
WorkingDir = Annotated[Path, typer.Option(metavar="DIR", help="What travels to the cluster, without junk.")]
Include = Annotated[
    list[str] | None,
    typer.Option(metavar="PATH", help="A file or folder in it that git ignores, to pack all the same; repeatable."),
]
Secret = Annotated[
    list[str] | None,
    typer.Option("--secret", metavar="NAME", help="One more variable of this environment to pass on; repeatable."),
]
NoSecrets = Annotated[
    bool, typer.Option("--no-secrets", help="Pass no secret on, not even WANDB_API_KEY: the cluster's nodes have them.")
]
Env = Annotated[
    list[str] | None, typer.Option(metavar="NAME=VALUE", help="A variable for the job, no secret; repeatable.")
]
Detach = Annotated[bool, typer.Option("--detach/--follow", help="Return once it is submitted, or print what it says.")]
Python = Annotated[str, typer.Option(metavar="PATH", help="The cluster's Python that has Tenfold's packages.")]


def add_jobs(app: typer.Typer) -> None:
    """Gives `tenfold` these commands."""
    for command in (submit, status, logs, stop, doctor):
        app.command()(command)


def submit(
    recipe: RecipePath,
    address: Address,
    overrides: Overrides = None,
    detach: Detach = False,
    dry_run: DryRun = False,
    accept: Accept = None,
    working_dir: WorkingDir = Path("."),
    include: Include = None,
    secret: Secret = None,
    no_secrets: NoSecrets = False,
    env: Env = None,
    python: Python = "python",
    as_json: Json = False,
) -> None:
    """Run a recipe as a job of a cluster, and follow it to its end; Ctrl-C leaves it running."""
    from cluster.submit import Asked, prepare

    console = make_console(sys.stderr if as_json else sys.stdout)
    asked = Asked(
        working_dir,
        tuple(include or ()),
        tuple(secret or ()),
        no_secrets,
        tuple(env or ()),
        tuple(accept or ()),
        python,
    )
    ended: list[int] = []

    def work() -> None:
        from cluster.ray_jobs import RayJobs, checked
        from configs.load import load_recipe

        at = checked(address)
        submission = prepare(load_recipe(recipe, overrides or ()), asked)
        if dry_run:
            show_plan(console, submission, at, as_json)
        else:
            ended.append(send_and_follow(console, RayJobs(at), submission, detach, as_json))

    leave(console, " ".join(["tenfold", "submit", recipe, *(overrides or []), "--address", address]), work)
    _leave_with(ended)


def status(run: JobName, address: Address, as_json: Json = False) -> None:
    """Say what a submitted run is at: state, run folder, W&B link, what it said last."""
    console = make_console(sys.stderr if as_json else sys.stdout)

    def work() -> None:
        from cluster.job_watch import describe, told
        from cluster.jobs import find_job
        from cluster.ray_jobs import RayJobs

        jobs = RayJobs(address)
        info = find_job(jobs, run)
        about = describe(info, jobs.address, jobs.logs(info.job_id))
        if as_json:
            print_json(about)
        else:
            console.say(told(about))

    leave(console, f"tenfold status {run} --address {address}", work)


def logs(
    run: JobName,
    address: Address,
    follow: Annotated[bool, typer.Option("--follow", help="Go on printing until the job is over.")] = False,
) -> None:
    """Print what a submitted run has said."""
    console = make_console()
    ended: list[int] = []

    def work() -> None:
        from cluster.jobs import find_job
        from cluster.ray_jobs import RayJobs

        jobs = RayJobs(address)
        info = find_job(jobs, run)
        if follow:
            ended.append(follow_to_end(console, jobs, info.job_id, run))
        else:
            console.say(jobs.logs(info.job_id).rstrip("\n"))

    leave(console, f"tenfold logs {run} --address {address}", work)
    _leave_with(ended)


def stop(
    run: JobName,
    address: Address,
    wait_s: Annotated[float, typer.Option(min=1, help="How long to wait for the job's end.")] = 200.0,
    as_json: Json = False,
) -> None:
    """Stop a submitted run cleanly, and check that it left no process, actor or placement group."""
    console = make_console(sys.stderr if as_json else sys.stdout)
    left = False

    def work() -> None:
        nonlocal left
        from cluster.job_watch import stop_job
        from cluster.jobs import find_job
        from cluster.ray_jobs import RayJobs

        jobs = RayJobs(address)
        done = stop_job(jobs, find_job(jobs, run), console, wait_s=wait_s)
        left = bool(done.left)
        state = done.info.state.lower()
        if as_json:
            print_json(
                {
                    "run": done.info.run,
                    "job": done.info.job_id,
                    "state": state,
                    "was_over": done.was_over,
                    "left": str(done.left) or None,
                }
            )
        if left:
            console.error(
                f"{done.info.job_id} is {state}, but there is left of it: {done.left}. Ray takes it away when it "
                "notices; if it does not, see the head node's gcs_server.out."
            )
        else:
            how = f"was {state} before" if done.was_over else f"is {state}"
            console.say(f"{done.info.job_id} {how}; no process, actor or placement group of it is left")
            console.say(f"go on with `tenfold resume {done.info.run} --address {jobs.address}`")

    with console:
        leave(console, f"tenfold stop {run} --address {address}", work)
    _leave_with([1] if left else [])


def doctor(
    address: Annotated[
        str | None, typer.Option(metavar="URL", help="A cluster to look at, by a job there. Default: this machine.")
    ] = None,
    generator: Annotated[bool, typer.Option(help="Start vLLM with a tiny model, which takes half a minute.")] = True,
    working_dir: WorkingDir = Path("."),
    no_secrets: NoSecrets = False,
    python: Python = "python",
    as_json: Json = False,
) -> None:
    """Look at this machine or at a cluster: each line is ok, or says what to do. Exit code 1 if something is."""
    console = make_console(sys.stderr if as_json else sys.stdout)
    bad: list[int] = []

    def work() -> None:
        from cluster.checks import exit_code
        from cluster.doctor import doctor_here, doctor_there, table
        from cluster.ray_jobs import RayJobs, access
        from cluster.submit import Asked

        if address is not None:
            jobs = RayJobs(address)
            asked = Asked(working_dir, no_secrets=no_secrets, python=python)
            checks = doctor_there(jobs, access(jobs.address), asked, console, generates=generator)
        else:
            checks = doctor_here(console, generates=generator)
        if as_json:
            print_json([check.to_json() for check in checks])
        else:
            console.say(table(checks))
        bad.append(exit_code(checks))

    with console:
        leave(console, "tenfold doctor", work)
    _leave_with(bad)


def resume_there(
    run: str,
    overrides: Sequence[str],
    accept: Sequence[str],
    address: str,
    *,
    detach: bool,
    no_secrets: bool,
    as_json: bool,
) -> None:
    """`tenfold resume RUN --address URL`: the run goes on as a new job, which is followed."""
    from cluster.submit import Asked, prepare_resume

    console = make_console(sys.stderr if as_json else sys.stdout)
    ended: list[int] = []

    def work() -> None:
        from cluster.ray_jobs import RayJobs

        jobs = RayJobs(address)
        asked = Asked(Path("."), accept=tuple(accept), no_secrets=no_secrets)
        ended.append(send_and_follow(console, jobs, prepare_resume(jobs, run, overrides, asked), detach, as_json))

    leave(console, f"tenfold resume {run} --address {address}", work)
    _leave_with(ended)


def _leave_with(codes: Sequence[int]) -> None:
    if code := next(iter(codes), 0):
        raise typer.Exit(code)
