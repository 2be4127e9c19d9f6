"""The import contracts can fail: each is broken once, in a copy, and must be reported."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = ("rlhf", "actors", "configs", "cluster")


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """Four empty floors under the project's contracts."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for floor in FLOORS:
        (tmp_path / floor).mkdir()
        (tmp_path / floor / "__init__.py").touch()
    # Without any import of it a tool has nothing to protect.
    (tmp_path / "cluster" / "tracker.py").write_text("import wandb\n")
    return tmp_path


def broken_contracts(house: Path) -> list[str]:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    output = subprocess.run(
        [*command, "--no-cache"],
        cwd=house,
        env={"PYTHONPATH": str(house), "COLUMNS": "200"},
        capture_output=True,
        text=True,
    ).stdout
    assert "Contracts:" in output, output
    return [line.removesuffix("BROKEN").strip() for line in output.splitlines() if line.strip().endswith("BROKEN")]


def test_the_floors_as_they_should_be_break_no_contract(house: Path) -> None:
    (house / "cluster" / "group.py").write_text("import ray\nimport actors, rlhf, configs\n")
    (house / "actors" / "policy.py").write_text("import vllm, deepspeed, peft, torch\nimport rlhf, configs\n")
    (house / "rlhf" / "losses.py").write_text("import torch\nimport configs\n")
    assert broken_contracts(house) == []


@pytest.mark.parametrize(
    ("module", "text", "contract"),
    [
        ("actors/a.py", "import cluster", "Imports go down only"),
        ("rlhf/a.py", "import actors", "Imports go down only"),
        ("configs/a.py", "import rlhf", "Imports go down only"),
        ("actors/a.py", "import ray", "Ray is imported in cluster only"),
        ("rlhf/a.py", "import ray", "Ray is imported in cluster only"),
        ("cluster/a.py", "import vllm", "vLLM, DeepSpeed and PEFT are imported in actors only"),
        ("rlhf/a.py", "import peft", "vLLM, DeepSpeed and PEFT are imported in actors only"),
        ("cluster/a.py", "import wandb", "W&B is imported in cluster.tracker only"),
        ("rlhf/a.py", "import wandb", "W&B is imported in cluster.tracker only"),
        ("rlhf/a.py", "import fastapi", "The web is in cluster only"),
        ("configs/a.py", "import torch", "Recipes need no torch"),
    ],
)
def test_an_import_that_a_floor_may_not_have_is_reported(house: Path, module: str, text: str, contract: str) -> None:
    (house / module).write_text(text + "\n")
    assert any(line.startswith(contract) for line in broken_contracts(house))
