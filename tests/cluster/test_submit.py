"""A recipe as a job: its package, its paths, its secrets; and what is refused before anything is uploaded."""

from __future__ import annotations

import io
import json
import subprocess
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

import cluster.ray_jobs
from cluster.cli import app
from cluster.jobs import JobError, JobInfo
from cluster.package import Packed, files_of, is_left_out, pack
from cluster.recipe_paths import places_of, stage
from cluster.submit import Asked, prepare, prepare_resume, send
from configs.load import make_recipe
from configs.schema import Recipe
from rlhf.errors import StoreError
from tests.cluster.fake_jobs import FakeJobs
from tests.fakes import SilentConsole
from tests.recipes import merged

KEY = "0123456789abcdef0123456789abcdef01234567"


def recipe(**changes: object) -> Recipe:
    base = {
        "name": "mine",
        "runs": "/shared/runs",
        "model": {"path": "model"},
        "data": {"prompts": "data/*.jsonl"},
        "rules": [{"name": "complete"}],
    }
    return make_recipe(merged(base, dict(changes)), "test")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A working directory: a recipe's files, code of the user's, and junk."""
    folder = tmp_path / "home"
    for name in (
        "data/a.jsonl", "data/b.jsonl", "model/config.json", "my_rules.py", "runs/old/manifest.json",
        "models/big.safetensors", ".venv/lib/x.py", "pkg/__pycache__/x.pyc", "pkg/models/fine.py", ".env", "key.pem",
    ):  # fmt: skip
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"this is {name}")
    return folder


def names(files: list[Packed]) -> list[str]:
    return [file.name for file in files]


def packed_names(package: bytes) -> list[str]:
    return zipfile.ZipFile(io.BytesIO(package)).namelist()


def test_junk_runs_models_and_files_of_secrets_stay_here(home: Path) -> None:
    assert names(files_of(home)) == [
        "data/a.jsonl",
        "data/b.jsonl",
        "model/config.json",
        "my_rules.py",
        "pkg/models/fine.py",
    ]
    assert is_left_out("a/.env.local") and is_left_out("wandb/x") and not is_left_out("a/wandb/x")


def test_in_a_checkout_what_git_ignores_stays_here_unless_it_is_named(home: Path) -> None:
    subprocess.run(["git", "init", "-q", home], check=True)
    (home / ".gitignore").write_text("/data/\n*.log\n")
    (home / "pkg" / "a.log").write_text("long")
    (home / "new.py").write_text("not added yet")
    assert names(files_of(home)) == [".gitignore", "model/config.json", "my_rules.py", "new.py", "pkg/models/fine.py"]
    assert "data/a.jsonl" in names(files_of(home, ["data"]))
    assert "pkg/a.log" in names(files_of(home, ["pkg"])) and "pkg/__pycache__/x.pyc" not in names(
        files_of(home, ["pkg"])
    )
    assert "models/big.safetensors" in names(files_of(home, ["models/big.safetensors"]))


def test_the_same_files_make_the_same_package_and_scripts_stay_executable(home: Path, tmp_path: Path) -> None:
    (home / "my_rules.py").chmod(0o755)
    packages: list[bytes] = []
    for name in ("one.zip", "two.zip"):
        pack(home, files_of(home), {"job.yaml": b"made"}, tmp_path / name, 1 << 20, SilentConsole())
        packages.append((tmp_path / name).read_bytes())
        for file in home.rglob("*"):
            file.touch()
    assert packages[0] == packages[1]
    archive = zipfile.ZipFile(tmp_path / "one.zip")
    assert archive.read("job.yaml") == b"made" and archive.read("data/a.jsonl") == b"this is data/a.jsonl"
    assert archive.getinfo("my_rules.py").external_attr >> 16 & 0o777 == 0o755


def test_a_package_that_is_too_big_is_refused_with_its_biggest_files(home: Path, tmp_path: Path) -> None:
    import random

    (home / "data" / "noise.bin").write_bytes(random.Random(0).randbytes(3 << 20))
    with pytest.raises(
        JobError, match=r"8?[0-9]+ files, 3\.0 MiB\. The biggest: data/noise\.bin \(3\.0 MiB\)"
    ) as caught:
        pack(home, files_of(home), {}, tmp_path / "p.zip", 1 << 20, SilentConsole())
    assert "less than 1.0 MiB" in str(caught.value) and "absolute paths" in str(caught.value)


def test_relative_paths_travel_and_absolute_ones_are_the_clusters(home: Path) -> None:
    places = places_of(recipe(evaluate={"text": "/shared/text.txt"}, sft={"sources": [{"path": "hub:a/b@c/d"}]}), home)
    assert {(place.key, place.kind, place.files) for place in places} == {
        ("data.prompts", "packed", ("data/a.jsonl", "data/b.jsonl")),
        ("model.path", "packed", ("model/config.json",)),
        ("evaluate.text", "cluster", ()),
        ("sft.sources", "elsewhere", ()),
        ("runs", "cluster", ()),
    }


def test_all_that_a_job_would_not_find_or_lose_is_told_at_once(home: Path) -> None:
    lost = recipe(
        runs="runs",
        model={"path": "models/none"},
        data={"prompts": "../other/*.jsonl"},
        checkpoints={"mirror": "mirror"},
    )
    with pytest.raises(JobError) as caught:
        places_of(lost, home)
    for part in (
        "model.path=models/none matches no file in",
        "data.prompts=../other/*.jsonl is outside of the working directory",
        "checkpoints.mirror=mirror is written by the run",
        "runs=runs would be deleted with the job's package",
    ):
        assert part in str(caught.value)


def test_packed_files_are_copied_to_where_they_last_and_the_recipe_names_them_there(home: Path, tmp_path: Path) -> None:
    asked = recipe(runs=str(tmp_path / "runs"), evaluate={"text": "/shared/text.txt"})
    staged = stage(asked, home)
    inputs = tmp_path / "runs" / "inputs" / "mine"
    assert staged.model.path == f"{inputs}/model" and staged.data.prompts == f"{inputs}/data/*.jsonl"
    assert staged.evaluate.text == "/shared/text.txt"
    assert (inputs / "data" / "b.jsonl").read_text() == "this is data/b.jsonl"
    assert stage(asked, home) == staged  # as a second submission does
    (home / "data" / "b.jsonl").write_text("other prompts")
    with pytest.raises(StoreError, match=r"b\.jsonl is of an earlier submission .* Submit it under another name"):
        stage(asked, home)


def test_a_submitted_job_runs_the_resolved_recipe_on_the_clusters_own_ray(home: Path) -> None:
    jobs = FakeJobs()
    submission = prepare(recipe(), Asked(home, accept=("seed",)), {"WANDB_API_KEY": KEY, "HOME": "/home/me"})
    send(jobs, submission, SilentConsole())
    (job,) = jobs.submitted
    assert job.entrypoint == "exec python -m cluster.job_start tenfold-job.yaml --accept seed"
    assert job.metadata == {"tenfold.run": "mine", "tenfold.folder": "/shared/runs/mine", "tenfold.python": "python"}
    assert job.job_id.startswith("tenfold-mine-")
    assert job.runtime_env["env_vars"] == {
        "WANDB_API_KEY": KEY,
        "RAY_JOB_STOP_WAIT_TIME_S": "120",
        "TENFOLD_PLAIN": "1",
    }
    archive = zipfile.ZipFile(io.BytesIO(jobs.packages[0]))
    assert set(archive.namelist()) == {"tenfold-job.yaml", *names(files_of(home))}
    tree = yaml.safe_load(archive.read("tenfold-job.yaml"))
    assert tree["cluster"]["address"] == "auto" and tree["model"]["path"] == "model"


def test_a_secret_is_in_the_jobs_environment_and_nowhere_else(home: Path) -> None:
    jobs = FakeJobs()
    submission = prepare(recipe(), Asked(home, secrets=("MY_KEY",)), {"WANDB_API_KEY": KEY, "MY_KEY": "hush-hush-hush"})
    send(jobs, submission, SilentConsole())
    (job,) = jobs.submitted
    told = json.dumps(submission.to_json()) + submission.told() + job.entrypoint + json.dumps(dict(job.metadata))
    for value in (KEY, "hush-hush-hush"):
        assert value not in told
        assert not any(
            value.encode() in zipfile.ZipFile(io.BytesIO(jobs.packages[0])).read(n)
            for n in packed_names(jobs.packages[0])
        )
    assert submission.secret_names == ("WANDB_API_KEY", "MY_KEY")


def test_secrets_go_along_only_where_the_run_has_a_use_for_them(home: Path) -> None:
    environ = {
        "WANDB_API_KEY": KEY,
        "HF_TOKEN": "t" * 20,
        "AWS_SECRET_ACCESS_KEY": "s" * 20,
        "WANDB_BASE_URL": "https://w",
    }

    def sent(asked: Asked, **changes: object) -> set[str]:
        variables = prepare(recipe(**changes), asked, environ).job.runtime_env["env_vars"]
        assert isinstance(variables, dict)
        return set(variables) - {"RAY_JOB_STOP_WAIT_TIME_S", "TENFOLD_PLAIN"}

    assert sent(Asked(home)) == {"WANDB_API_KEY", "WANDB_BASE_URL"}
    assert sent(Asked(home), tracker={"mode": "offline"}) == {"WANDB_BASE_URL"}
    assert sent(Asked(home, no_secrets=True)) == {"WANDB_BASE_URL"}
    assert sent(Asked(home), data={"prompts": "hub:a/b@c/d.jsonl"}) == {"WANDB_API_KEY", "HF_TOKEN", "WANDB_BASE_URL"}
    mirrored = {"checkpoints": {"mirror": "s3://bucket/runs"}}
    assert sent(Asked(home), **mirrored) == {"WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "WANDB_BASE_URL"}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"secrets": ("NONE",)}, "--secret NONE: there is no such variable"),
        ({"env": ("MY_TOKEN=abc",)}, "--env MY_TOKEN=… looks like a secret"),
        ({"env": ("novalue",)}, "not of the form NAME=VALUE"),
        ({"include": ("../x",)}, "--include ../x: there is nothing of that name"),
    ],
)
def test_what_cannot_go_along_is_refused(home: Path, asked: dict[str, tuple[str, ...]], message: str) -> None:
    with pytest.raises(JobError, match=message):
        prepare(recipe(), Asked(home, **asked), {})  # pyright: ignore[reportArgumentType]


def test_a_resume_is_a_new_job_in_the_runs_folder_with_the_python_of_the_one_before(home: Path) -> None:
    about = {"tenfold.run": "mine", "tenfold.folder": "/shared/runs/mine", "tenfold.python": "/opt/python"}
    jobs = FakeJobs(JobInfo("a", "STOPPED", about))
    submission = prepare_resume(jobs, "mine", ["ppo.num_steps=9"], Asked(home, accept=("ppo.num_steps",)), {})
    assert submission.job.entrypoint == (
        "exec /opt/python -m cluster.cli resume /shared/runs/mine ppo.num_steps=9 --accept ppo.num_steps"
    )
    assert submission.job.metadata == about
    by_folder = prepare_resume(FakeJobs(), "/elsewhere/runs/yours", [], Asked(home), {})
    assert by_folder.job.metadata["tenfold.run"] == "yours"
    with pytest.raises(JobError, match="no job of a run 'yours'"):
        prepare_resume(jobs, "yours", [], Asked(home), {})


def tenfold(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(word) for word in words])
    return result.exit_code, result.output


def test_a_dry_run_of_submit_shows_what_would_go_along_and_asks_nobody(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.chdir(home)
    (home / "recipe.yaml").write_text(yaml.safe_dump(recipe().model_dump(mode="json")))
    words = ("submit", "recipe.yaml", "--address", "http://nobody.invalid:8265", "--dry-run")
    code, page = tenfold(*words)
    assert code == 0 and "nothing was" in page and "WANDB_API_KEY" in page and KEY not in page
    code, said = tenfold(*words, "--json")
    assert code == 0
    plan = json.loads(said)
    assert plan["secrets"] == ["WANDB_API_KEY"] and plan["num_files"] == 7
    code, page = tenfold(*words, "--working-dir", "nowhere")
    assert code == 2 and "--working-dir nowhere: there is no such folder." in page


@pytest.mark.parametrize(
    "address",
    [
        *(
            "head:8265",
            "ray://head:10001",
            "http://",
            "http://me:secret@head:8265",
            "",
            "http://[::1",
            "http://head:one",
        ),
        *("http://head:99999", "http://me:secret@[::1"),
    ],
)
def test_what_is_no_address_of_a_job_server_is_refused(address: str, home: Path) -> None:
    code, page = tenfold("status", "mine", "--address", address)
    assert code == 2 and "is no address of a job server" in page and "secret@" not in page


@pytest.mark.parametrize("command", [("resume", "mine"), ("doctor",)])
def test_an_empty_address_is_not_taken_for_this_machine(command: tuple[str, ...], home: Path) -> None:
    code, page = tenfold(*command, "--address", "")  # as of a variable that is not set
    assert code == 2 and "is no address of a job server" in page


def test_an_address_where_nobody_is_is_one_message() -> None:
    code, page = tenfold("status", "mine", "--address", "http://127.0.0.1:9")
    assert code == 2 and "nobody answers there" in page and "Traceback" not in page


@pytest.mark.parametrize(("status", "found"), [(200, "open"), (401, "token"), (403, "token"), (500, "unknown")])
def test_whether_a_job_server_asks_for_a_token_is_found_by_showing_none(status: int, found: str) -> None:
    class Server(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if "Authorization" not in self.headers else 500)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Server) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        assert cluster.ray_jobs.access(f"http://127.0.0.1:{server.server_port}") == found
        thread.join()
    assert cluster.ray_jobs.access(f"http://127.0.0.1:{server.server_port}") == "unknown"  # nobody is there now


def test_an_open_dashboard_is_said_loudly_unless_only_this_machine_reaches_it() -> None:
    warnings_of = cluster.ray_jobs.warnings_of
    assert warnings_of("http://127.0.0.1:8265", "open") == []
    assert warnings_of("https://head:8265", "token") == []
    (loud,) = warnings_of("https://head:8265", "open")
    assert "ASKS FOR NO TOKEN" in loud
    assert len(warnings_of("http://head:8265", "open")) == 2
    (plain,) = warnings_of("http://head:8265", "token")
    assert "not encrypted" in plain
