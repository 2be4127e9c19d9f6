"""The command `tenfold export`: what it writes, what it says, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from actors.base import Base
from cluster.export import check_texts
from rlhf.checksum import checksum
from rlhf.data import Prompts
from rlhf.kept_prompts import write_prompts
from rlhf.records import Adapter, Message, Prompt
from rlhf.store import RunStore
from tests.cluster.test_cli import tenfold
from tests.recipes import tiny_recipe

PROMPTS = Prompts(tuple(Prompt(f"p{i}", (Message("user", "?"),), tuple(range(1, 90))) for i in range(9)), ())


def make_run(model: Path, folder: Path, scale: float) -> Path:
    """A run whose PPO is done; with scale 0 its policy never moved."""
    recipe = tiny_recipe(model, folder)
    base = Base(recipe.model, recipe.lora, seed=0)
    base.attach("policy")
    tensors = {
        name: parameter.detach().clone() if "lora_A" in name else torch.full(parameter.shape, scale)
        for name, parameter in base.parameters("policy").items()
    }
    with RunStore.open(recipe.runs, recipe) as store:
        store.save_adapter("policy", Adapter(2, tensors, base.adapter_config("policy"), checksum(tensors)))
        write_prompts(store.folder, PROMPTS)
        store.finish("ppo", {})
        return store.folder


def in_one_line(text: str) -> str:
    return " ".join(text.split())


def test_the_policy_is_exported_and_the_check_is_told(tiny_model: Path, tmp_path: Path) -> None:
    run = make_run(tiny_model, tmp_path, 0.05)
    done = tenfold("export", run, "--to", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "the adapter of the stage ppo, float32" in in_one_line(done.output)
    assert "from the base's by up to" in in_one_line(done.output)
    assert (tmp_path / "out" / "adapter_config.json").exists()
    merged = tenfold("export", run, "--to", tmp_path / "merged", "--merge", "--json")
    assert merged.exit_code == 0, merged.output
    report = json.loads(merged.stdout)
    assert (report["stage"], report["kind"], report["base"]) == ("ppo", "merged model", str(tiny_model))
    assert report["num_tokens"] == 8 * 63
    assert report["to_trained"] <= report["limit"] < report["to_base"]
    assert (tmp_path / "merged" / "tokenizer.json").exists()


def test_a_run_that_trained_nothing_is_one_message(tiny_model: Path, tmp_path: Path) -> None:
    with RunStore.open(tmp_path / "runs", tiny_recipe(tiny_model, tmp_path)) as store:
        store.finish("sample", {})
    done = tenfold("export", store.folder, "--to", tmp_path / "out")
    assert done.exit_code == 2
    assert "has trained no model yet. Done are: sample." in in_one_line(done.output)
    assert not (tmp_path / "out").exists()


def test_a_folder_in_use_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    run = make_run(tiny_model, tmp_path, 0.05)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    done = tenfold("export", run, "--to", tmp_path / "out")
    assert done.exit_code == 2
    assert "is not empty" in in_one_line(done.output) and "Traceback" not in done.output


@pytest.mark.parametrize("words", [(), ("--merge",), ("--json",)])
def test_a_policy_that_never_moved_is_an_error(tiny_model: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
    done = tenfold("export", make_run(tiny_model, tmp_path, 0.0), "--to", tmp_path / "out", *words)
    assert done.exit_code == 2
    assert "The adapter changes nothing" in in_one_line(done.output)
    assert not (tmp_path / "out").exists()


def test_without_prompts_fixed_texts_are_checked(tiny_model: Path, tmp_path: Path) -> None:
    texts = check_texts(tmp_path, tiny_model)
    assert len(texts) == 3
    assert all(1 < len(text) <= 64 for text in texts)
    write_prompts(tmp_path, PROMPTS)
    assert check_texts(tmp_path, tiny_model) == [tuple(range(1, 65))] * 8
