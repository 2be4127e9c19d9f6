"""The files for real clusters: KubeRay's fields, the image's parts, what the Slurm script does in which order."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
MANIFESTS = sorted((ROOT / "cluster" / "kuberay").glob("*.yaml"))
FIELDS: dict[str, dict[str, str]] = yaml.safe_load((Path(__file__).parent / "kuberay_fields.yaml").read_text())
PLAIN = {"string": str, "integer": int, "float": float, "boolean": bool}


def problems(value: Any, kind: str, path: str) -> Iterator[str]:
    """What in a manifest is not as its kind is documented."""
    if kind.endswith("[]"):
        if not isinstance(value, list):
            yield f"{path} is no list"
            return
        for index, item in enumerate(value):
            yield from problems(item, kind[:-2], f"{path}[{index}]")
    elif kind in PLAIN:
        if type(value) is not PLAIN[kind]:
            yield f"{path}={value!r} is no {kind}"
    elif not isinstance(value, dict):
        yield f"{path} has no fields"
    elif kind in ("map", "quantities"):
        yield from (f"{path}.{key}={held!r} is no string" for key, held in value.items() if not isinstance(held, str))
    else:
        for key, held in value.items():
            if key in FIELDS[kind]:
                yield from problems(held, FIELDS[kind][key], f"{path}.{key}")
            else:
                yield f"{path}.{key} is not documented"


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_a_manifest_has_documented_fields_of_the_right_types_only(path: Path) -> None:
    manifest = yaml.safe_load(path.read_text())
    assert manifest["apiVersion"] == "ray.io/v1"
    assert list(problems(manifest, manifest["kind"], path.stem)) == []


def test_a_field_that_is_misspelt_or_of_another_type_is_found() -> None:
    manifest = yaml.safe_load(MANIFESTS[0].read_text())
    manifest["spec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0
    manifest["spec"]["workerGroupSpec"] = []
    manifest["spec"]["workerGroupSpecs"][0]["replicas"] = "2"
    assert [line.partition(".")[2] for line in problems(manifest, "RayCluster", "m")] == [
        "spec.headGroupSpec.rayStartParams.num-cpus=0 is no string",
        "spec.workerGroupSpecs[0].replicas='2' is no integer",
        "spec.workerGroupSpec is not documented",
    ]


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_every_pod_has_the_token_and_nodes_have_shared_memory_and_the_shared_disk(path: Path) -> None:
    manifest = yaml.safe_load(path.read_text())
    spec = manifest["spec"]
    cluster = spec.get("rayClusterSpec", spec)
    nodes = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    pods = [node["template"]["spec"] for node in nodes]
    submitter = [spec["submitterPodTemplate"]["spec"]] if manifest["kind"] == "RayJob" else []
    for pod in (*pods, *submitter):
        variables = {each["name"]: each for each in pod["containers"][0]["env"]}
        assert variables["RAY_AUTH_MODE"]["value"] == "token"
        assert "secretKeyRef" in variables["RAY_AUTH_TOKEN"]["valueFrom"]
    for pod in pods:
        mounts = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
        assert mounts == {"shared": "/shared", "shm": "/dev/shm"}
        assert {volume["name"] for volume in pod["volumes"]} == set(mounts)
    gpus = [pod["containers"][0]["resources"]["limits"].get("nvidia.com/gpu") for pod in pods]
    assert gpus == ([None, "8"] if path.stem.endswith("gpu") else [None, None])


def test_manifests_name_the_ray_of_the_locks_and_recipes_that_exist() -> None:
    locked = re.search(r"^ray==(.*)$", (ROOT / "requirements" / "gpu.lock").read_text(), re.MULTILINE)
    assert locked is not None
    for path in MANIFESTS:
        spec = yaml.safe_load(path.read_text())["spec"]
        assert spec.get("rayClusterSpec", spec)["rayVersion"] == locked[1]
        if "entrypoint" in spec:
            recipe = re.search(r"/shared/recipes/(\S+)", spec["entrypoint"])
            assert recipe is not None and (ROOT / "configs" / "recipes" / recipe[1]).exists()
            assert yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"] == "120"


def test_the_image_is_made_of_what_is_there() -> None:
    text = (ROOT / "cluster" / "Dockerfile").read_text()
    for line in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE):
        for source in line.replace("${DEVICE}", "gpu").split():
            assert (ROOT / source).exists(), source
    assert (ROOT / "requirements" / "cpu.lock").exists() and "--no-deps -r requirements/${DEVICE}.lock" in text
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests", "requirements", "benchmarks"}
    assert packages <= set(re.findall(r"^COPY (\w+) \1$", text, re.MULTILINE))


FAKES = {
    "scontrol": 'printf "n1\\nn2\\n"',
    "hostname": "echo 10.0.0.1",
    # On which node, and what: then it is done, as Slurm would.
    "srun": """
for word; do case $word in --nodelist=*) node=${word#*=} ;; --*) ;; *) break ;; esac; shift; done
export NODE=$node
exec "$@" """,
    "ray": """
echo "$NODE ray $* mode=$RAY_AUTH_MODE token=$(wc -c <"$RAY_AUTH_TOKEN_PATH")" >>"$LOG"
[ "$1" = start ] || exit 0
trap 'echo "$NODE ray ended" >>"$LOG"; exit 0' TERM
while :; do sleep 0.05; done""",
    "tenfold": """
until [ "$(grep -c 'ray start' "$LOG")" = 2 ]; do sleep 0.05; done
echo "$NODE tenfold $*" >>"$LOG"
[ "$2" != long.yaml ] || { trap 'echo "tenfold closed" >>"$LOG"; exit 143' TERM; while :; do sleep 0.05; done; }
exit 3""",
}


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a job of two nodes, whose commands write down what they are asked."""
    for name, script in FAKES.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/usr/bin/env bash\n{script.strip()}\n")
        path.chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    return os.environ | {
        "PATH": path, "LOG": str(tmp_path / "log"), "SLURM_JOB_ID": "12345", "SLURM_JOB_NODELIST": "n[1-2]",
    }  # fmt: skip


def said(slurm: dict[str, str]) -> list[str]:
    return Path(slurm["LOG"]).read_text().splitlines()


SCRIPT = ROOT / "cluster" / "slurm.sbatch"


@pytest.mark.timeout(60)
def test_the_slurm_script_starts_head_and_workers_runs_and_ends_them_with_the_runs_exit_code(
    slurm: dict[str, str], tmp_path: Path
) -> None:
    done = subprocess.run(["bash", SCRIPT, "r.yaml", "seed=1"], env=slurm, cwd=tmp_path, timeout=50, check=False)
    assert done.returncode == 3
    lines = said(slurm)
    start = "--disable-usage-stats"
    head = f"n1 ray start --block {start} --head --node-ip-address=10.0.0.1 --port=22345 mode=token token=64"
    assert head in lines
    assert f"n2 ray start --block {start} --address=10.0.0.1:22345 mode=token token=64" in lines
    assert "n1 tenfold run r.yaml seed=1 cluster.address=10.0.0.1:22345" in lines
    assert sorted(lines[-2:]) == ["n1 ray ended", "n2 ray ended"]
    assert list(tmp_path.glob(".ray-token*")) == []


@pytest.mark.timeout(60)
def test_the_slurm_script_lets_the_run_close_when_time_is_up(slurm: dict[str, str], tmp_path: Path) -> None:
    with subprocess.Popen(["bash", SCRIPT, "long.yaml"], env=slurm, cwd=tmp_path) as job:
        while not Path(slurm["LOG"]).exists() or not any("tenfold run" in line for line in said(slurm)):
            assert job.poll() is None
            time.sleep(0.05)
        job.terminate()
        assert job.wait(timeout=40) == 143
    lines = said(slurm)
    assert "tenfold closed" in lines
    assert lines.index("tenfold closed") < min(index for index, line in enumerate(lines) if "ray ended" in line)


def test_the_slurm_script_needs_a_recipe(slurm: dict[str, str], tmp_path: Path) -> None:
    done = subprocess.run(["bash", SCRIPT], env=slurm, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "usage: sbatch" in done.stderr
