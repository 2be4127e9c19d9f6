"""TRL's virtual environment, and the processes that a comparison with TRL runs one after the other."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from requirements.install import PYTORCH_CPU_INDEX
from requirements.steps import StepFailed
from requirements.steps import run as run_step

HEARTBEAT_S = 8.0


class Failed(SystemExit):
    """A process of the comparison ended with an error, which it has printed itself."""


def make_venv(venv: Path) -> None:
    """TRL's virtual environment, once: with the torch, transformers and peft of this one, and without torchvision."""
    packages = ["trl==1.16.*", *(f"{name}=={version(name)}" for name in ("torch", "transformers", "peft"))]
    stamp = venv / "packages.stamp"
    if stamp.exists() and stamp.read_text().splitlines() == packages:
        return
    log = venv.with_name(f"{venv.name}.log")
    pip = [python_of(venv), "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off", *packages]
    step = f"Installing TRL into {venv} (some minutes)"
    try:
        run_step(f"Making the virtual environment {venv}", [sys.executable, "-m", "venv", "--clear", venv], log=log)
        try:
            run_step(step, pip, log=log)
        except StepFailed as error:
            if "No matching distribution found for torch==" not in error.why:
                raise
            run_step(step + ", with PyTorch's CPU index", [*pip, "--extra-index-url", PYTORCH_CPU_INDEX], log=log)
    except StepFailed as error:
        sys.exit(str(error))
    stamp.write_text("\n".join(packages) + "\n")


def python_of(venv: Path) -> Path:
    """The interpreter of a virtual environment."""
    return venv / "bin" / "python"


@contextmanager
def started(command: Sequence[str | Path], threads: int) -> Iterator[subprocess.Popen[bytes]]:
    """The process, with so many threads; it ends with the block at the latest."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, env=environment)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_for(process: subprocess.Popen[bytes], what: str) -> None:
    """Returns once the process is done, never silent for long. Raises Failed."""
    began = time.monotonic()
    while process.poll() is None:
        try:
            process.wait(HEARTBEAT_S)
        except subprocess.TimeoutExpired:
            print(f"  {what}: at work for {time.monotonic() - began:.0f} s", flush=True)
    if process.returncode:
        raise Failed(f"{what} failed with exit code {process.returncode}; what it said is above.")
