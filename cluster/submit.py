"""A recipe as a job of a cluster: what goes along, what is checked before, and what is asked of the cluster."""

from __future__ import annotations

import os
import re
import secrets
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cluster.jobs import FOLDER, PYTHON, RUN, Job, JobError, Jobs, find_job, refuse_second
from cluster.package import Packed, files_of, mib, pack
from cluster.recipe_paths import Place, places_of
from cluster.redact import is_secret
from configs.load import dump_recipe
from configs.schema import Recipe
from rlhf.ports import Console

RECIPE = "tenfold-job.yaml"  # in the package: the resolved recipe
STOP_S = 120  # between SIGTERM and SIGKILL, for the run to be closed: Ray alone would wait for 3 s
WANDB_SECRET, HUB_SECRETS = "WANDB_API_KEY", ("HF_TOKEN",)
STORE_SECRETS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
OPEN = (  # settings that are no secrets, and mean the same there
    "WANDB_MODE", "WANDB_BASE_URL", "WANDB_ENTITY", "WANDB_PROJECT", "HF_HUB_OFFLINE", "HF_ENDPOINT",
    "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION", "AWS_REGION",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Asked:
    """What a user asks for besides the recipe."""

    folder: Path  # the working directory
    include: tuple[str, ...] = ()  # files and folders in it that would be left out
    secrets: tuple[str, ...] = ()  # more variables of this environment to pass on
    no_secrets: bool = False  # pass none on: the cluster has them
    env: tuple[str, ...] = ()  # NAME=VALUE
    accept: tuple[str, ...] = ()  # keys of the recipe that may differ from what the run was begun with
    python: str = "python"  # on the cluster


@dataclass(frozen=True, slots=True)
class Submission:
    """A job that is checked and could be submitted."""

    job: Job  # still without the package
    places: tuple[Place, ...]
    files: tuple[Packed, ...]
    written: Mapping[str, bytes]  # files of the package that are made for it
    secret_names: tuple[str, ...]
    folder: Path

    @property
    def run(self) -> str:
        return self.job.metadata[RUN]

    def to_json(self) -> dict[str, object]:
        """What goes along, in plain values; of secrets the names alone."""
        return {
            "run": self.run,
            "job": self.job.job_id,
            "folder": self.job.metadata[FOLDER],
            "entrypoint": self.job.entrypoint,
            "working_dir": str(self.folder.resolve()),
            "num_files": len(self.files) + len(self.written),
            "num_bytes": sum(file.num_bytes for file in self.files) + sum(map(len, self.written.values())),
            "paths": [{"key": p.key, "path": p.path, "where": p.kind, "num_files": len(p.files)} for p in self.places],
            "secrets": list(self.secret_names),
        }

    def told(self) -> str:
        """The same for people."""
        num_bytes = sum(file.num_bytes for file in self.files)
        return "\n".join(
            [
                f"run        {self.run}",
                f"folder     {self.job.metadata[FOLDER]} (on the cluster)",
                f"package    {len(self.files)} files of {self.folder.resolve()}, {mib(num_bytes)} before packing",
                f"secrets    {', '.join(self.secret_names) or 'none'}",
                *(f"path       {place}" for place in self.places),
            ]
        )


def prepare(recipe: Recipe, asked: Asked, environ: Mapping[str, str] = os.environ) -> Submission:
    """A recipe as a job. Raises JobError for what could not work there; nothing is uploaded yet."""
    _check_folder(asked)
    places = places_of(recipe, asked.folder)
    packed = [file for place in places for file in place.files]
    there = recipe.model_copy(update={"cluster": recipe.cluster.model_copy(update={"address": "auto"})})
    command = [asked.python, "-m", "cluster.job_start", RECIPE]
    metadata = {RUN: recipe.name, FOLDER: f"{recipe.runs.rstrip('/')}/{recipe.name}"}
    secret_values = {} if asked.no_secrets else secrets_of(recipe, places, asked.secrets, environ)
    written = {RECIPE: dump_recipe(there).encode()}
    return _submission(command, metadata, asked, places, packed, written, secret_values, environ)


def prepare_resume(
    jobs: Jobs, run: str, overrides: Sequence[str], asked: Asked, environ: Mapping[str, str] = os.environ
) -> Submission:
    """A run that goes on as a new job, in its folder on the cluster; `run` is its name there, or that folder.

    Raises JobError where no job of that name is known and it is no absolute path.
    """
    before = None if os.path.isabs(run) else find_job(jobs, run)
    folder = before.folder if before else run
    python = before.metadata.get(PYTHON, asked.python) if before else asked.python
    command = [python, "-m", "cluster.cli", "resume", folder, *overrides]
    return bare_submission(command, {RUN: os.path.basename(folder.rstrip("/")), FOLDER: folder}, asked, environ)


def bare_submission(
    command: Sequence[str], metadata: Mapping[str, str], asked: Asked, environ: Mapping[str, str] = os.environ
) -> Submission:
    """A command of Tenfold's as a job without a recipe."""
    secret_values = {} if asked.no_secrets else _chosen((WANDB_SECRET, *asked.secrets), asked.secrets, environ)
    return _submission(command, metadata, asked, [], [], {}, secret_values, environ)


def send(jobs: Jobs, submission: Submission, console: Console) -> None:
    """Packs the working directory, uploads it and submits the job.

    Raises JobError: a job of that run is not over yet, a package that is too big, a cluster that refuses.
    """
    refuse_second(jobs, submission.run)
    with tempfile.TemporaryDirectory(prefix="tenfold-job-") as scratch:
        package = Path(scratch) / "package.zip"
        size = pack(
            submission.folder, submission.files, submission.written, package, jobs.limit_bytes, console
        )  # fmt: skip
        job = submission.job
        with console.task(f"upload {mib(size)} to {jobs.address}"):
            jobs.submit(replace(job, runtime_env={**job.runtime_env, "working_dir": str(package)}))


def secrets_of(
    recipe: Recipe, places: Sequence[Place], more: Sequence[str], environ: Mapping[str, str]
) -> dict[str, str]:
    """The secrets of this environment that the run has a use for, and `more` that are asked for by name.

    Raises JobError for one that is asked for and not set.
    """
    schemes = {place.path.partition(":")[0] for place in places if place.kind == "elsewhere"}
    names = [WANDB_SECRET] if recipe.tracker.mode in ("auto", "online") else []
    names += HUB_SECRETS if "hub" in schemes else ()
    names += STORE_SECRETS if "s3" in schemes else ()
    return _chosen((*names, *more), more, environ)


def _chosen(names: Sequence[str], must: Sequence[str], environ: Mapping[str, str]) -> dict[str, str]:
    for name in must:
        if not environ.get(name):
            raise JobError(
                f"--secret {name}: there is no such variable in this environment.",
                remedy="Set it (not on a command line, where others see it), or leave the option out.",
            )
    return {name: environ[name] for name in names if environ.get(name)}


def _submission(
    command: Sequence[str],
    metadata: Mapping[str, str],
    asked: Asked,
    places: Sequence[Place],
    packed: Sequence[str],
    written: Mapping[str, bytes],
    secret_values: Mapping[str, str],
    environ: Mapping[str, str],
) -> Submission:
    _check_folder(asked)
    for wanted in asked.include:
        if os.path.isabs(wanted) or os.path.normpath(wanted).startswith("..") or not (asked.folder / wanted).exists():
            raise JobError(f"--include {wanted}: there is nothing of that name in {asked.folder.resolve()}.")
    accept = [word for key in asked.accept for word in ("--accept", key)]
    variables = {
        **{known: environ[known] for known in OPEN if environ.get(known)},
        **_open_variables(asked.env),
        **secret_values,
        "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_S),
        "TENFOLD_PLAIN": "1",
    }
    job = Job(
        job_id=f"tenfold-{metadata[RUN]}-{secrets.token_hex(4)}",
        entrypoint=f"exec {shlex.join([*command, *accept])}",  # exec: SIGTERM reaches the run, and no shell stays
        runtime_env={"env_vars": variables},
        metadata={**metadata, PYTHON: command[0]},
    )
    files = tuple(files_of(asked.folder, [*packed, *asked.include]))
    return Submission(job, tuple(places), files, written, tuple(secret_values), asked.folder)


def _check_folder(asked: Asked) -> None:
    if not asked.folder.is_dir():
        raise JobError(f"--working-dir {asked.folder}: there is no such folder.")


def _open_variables(pairs: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise JobError(f"--env {pair!r} is not of the form NAME=VALUE.")
        if is_secret(name):
            raise JobError(
                f"--env {name}=… looks like a secret.",
                limit="What stands on a command line is seen by others and kept in histories.",
                remedy=f"Set {name} in this environment and give --secret {name}.",
            )
        found[name] = value
    return found
