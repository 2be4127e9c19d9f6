"""The recipes of the domain adapters are planned on a machine that has neither their model nor their data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import cluster.preview
from configs.load import load_recipe
from tests.cluster.test_cli import RECIPES, tenfold


@pytest.mark.parametrize(
    ("name", "command", "stages"),
    [("arithmetic", "run", ["sft", "ppo"]), ("style", "run", ["sft"]), ("style", "ppo", ["ppo"])],
)
def test_domain_recipes_are_planned(
    name: str, command: str, stages: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cluster.preview, "gpus_here", lambda: 0)
    result = tenfold(command, RECIPES / f"domain_{name}.yaml", "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    assert [stage["stage"] for stage in plan["stages"]] == stages
    lacking = {"the model", "the prompts"} | ({"the conversations"} if "sft" in stages else set())
    assert {line.split(":")[0] for line in plan["missing"]} == lacking
    if "sft" in stages:
        assert f"the adapter '{name}'" in plan["stages"][0]["what"]
    assert list(tmp_path.iterdir()) == []


def test_both_adapters_are_of_one_base_and_one_shape() -> None:
    one, other = (load_recipe(RECIPES / f"domain_{name}.yaml") for name in ("arithmetic", "style"))
    assert (one.model, one.lora) == (other.model, other.lora)
    assert one.adapter != other.adapter
