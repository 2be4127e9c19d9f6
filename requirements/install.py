"""Makes `.venv` from the lock, once: `make setup`.

Run as `python3.11 -m requirements.install` in the repository's root. A second run that finds everything in place says
so and ends at once. Only the standard library, since it runs before anything is installed.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from requirements.steps import StepFailed, run, say

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
LOG = VENV / "setup.log"
UNFINISHED = VENV / "unfinished.stamp"
LOCK_STAMP = VENV / "lock.stamp"
PROJECT_STAMP = VENV / "project.stamp"
PYTORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"  # has the +cpu builds that the usual index lacks
FREE_GIB = {"cpu": 6, "gpu": 20}


def main() -> int:
    """The exit code: 0, or 1 with the failed step printed."""
    try:
        install("gpu" if has_gpu() else "cpu")
    except StepFailed as error:
        say(str(error))
        return 1
    except KeyboardInterrupt:
        say("Stopped. Run the same command again to go on.")
        return 130
    return 0


def install(device: str) -> None:
    """Brings `.venv` to what requirements/DEVICE.lock and pyproject.toml say. Raises StepFailed."""
    lock = ROOT / "requirements" / f"{device}.lock"
    locked = _stamp(lock)
    if _read(LOCK_STAMP) != locked:
        check_machine(device)
        if _read(UNFINISHED) != locked:
            make_venv()
            UNFINISHED.write_text(locked)
        install_lock(lock)
        UNFINISHED.replace(LOCK_STAMP)
    project = _stamp(ROOT / "pyproject.toml")
    if _read(PROJECT_STAMP) != project:
        pip = [PYTHON, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--editable", ROOT]
        run("Installing tenfold itself (editable)", pip, log=LOG)
        PROJECT_STAMP.write_text(project)
        say(f"Set up: {VENV} from requirements/{lock.name}.")


def has_gpu() -> bool:
    """Whether there is an NVIDIA GPU with a driver that answers."""
    if not shutil.which("nvidia-smi"):
        return False
    return subprocess.run(["nvidia-smi", "-L"], capture_output=True, check=False).returncode == 0


def check_machine(device: str) -> None:
    """Raises StepFailed where this machine lacks what the installation or the first run needs."""
    step = "Checking the machine"
    if sys.version_info[:2] != (3, 11):
        found = ".".join(map(str, sys.version_info[:3]))
        raise StepFailed(step, f"Python {found} ({sys.executable})", "Python 3.11 is needed: install it.")
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError as error:
        raise StepFailed(step, str(error), "Install python3.11-venv: `apt-get install python3.11-venv`.") from error
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.exists():
        raise StepFailed(step, f"{header} is missing", "Install the headers: `apt-get install python3.11-dev`.")
    if not shutil.which("g++"):
        raise StepFailed(step, "g++ is not on the PATH", "Install a compiler: `apt-get install g++`.")
    free = shutil.disk_usage(ROOT).free / 2**30
    if free < FREE_GIB[device]:
        why = f"{free:.1f} GiB are free in {ROOT}; {FREE_GIB[device]} GiB are needed"
        raise StepFailed(step, why, "Free disk space, then run the same command again.")


def make_venv() -> None:
    """Makes an empty virtual environment in place of whatever is there: leftovers would not be in the lock."""
    # Its log cannot lie in a folder that this step clears.
    log = ROOT / ".venv.log"
    run("Making the virtual environment in .venv", [sys.executable, "-m", "venv", "--clear", VENV], log=log)
    log.replace(LOG)


def install_lock(lock: Path) -> None:
    """Installs exactly what the lock lists. Raises StepFailed."""
    num = sum(1 for line in lock.read_text().splitlines() if "==" in line)
    pip = [PYTHON, "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off"]
    command = [*pip, "--no-deps", "-r", lock]
    step = f"Installing {num} packages from requirements/{lock.name} (some minutes)"
    try:
        run(step, command, log=LOG)
    except StepFailed as error:
        if "No matching distribution found for torch==" not in error.why:
            raise
        say("  pip's own index lacks the CPU build of PyTorch.")
        run(step + ", with PyTorch's CPU index", [*command, "--extra-index-url", PYTORCH_CPU_INDEX], log=LOG)


def _stamp(file: Path) -> str:
    # With the folder: a virtual environment that was moved does not work.
    return f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()} {ROOT}\n"


def _read(stamp: Path) -> str | None:
    return stamp.read_text() if stamp.exists() and PYTHON.exists() else None


if __name__ == "__main__":
    sys.exit(main())
