"""Two run folders are compared bit for bit, and what differs is named."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from sqlalchemy import URL

from rlhf.compare import differences, tensor_difference, value_differences
from rlhf.journal import Journal, group_to_row
from rlhf.rankings_db import RankingsDB
from rlhf.records import Ranking
from tests.rlhf.made import make_answer, make_group

Change = Callable[[Path], object]


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def change_json(path: Path, change: Callable[[Any], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    write_json(path, value)


def write_tensors(path: Path, **tensors: torch.Tensor) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def rank(folder: Path, *tiers: tuple[int, ...]) -> None:
    database = RankingsDB(URL.create("sqlite", database=str(folder / "rankings.db")))
    database.add([Ranking("p0", tiers, by="rules", round=0)])
    database.close()


METRICS = [
    {"stage": "reward", "step": 1, "reward/loss": 0.5, "time/fit": 1.25},
    {"stage": "ppo", "step": 1, "objective/kl": None, "sync/load_s": 0.5, "memory/driver": 2.0},
    {"stage": "ppo", "step": 2, "objective/kl": 0.25, "loss/policy_avg": -1.5},
]
RESULTS = {
    "time_s": 3.0,
    "peak_memory_gib": 1.5,
    "sync_share": 0.25,
    "times": {"sync": 1.0},
    "num_steps": 2,
    "last": {"objective/kl": 0.25, "time/sync": 0.5, "memory/driver": 2.0},
}


@pytest.fixture
def one(tmp_path: Path) -> Path:
    folder = tmp_path / "one"
    write_tensors(folder / "roles/policy/role.safetensors", weight=torch.tensor([1.0, 2.0]), step=torch.tensor(3))
    write_json(folder / "roles/policy/role.json", {"updates": 2, "lr": 0.1})
    write_json(folder / "roles/policy/manifest.json", {"files": {}})
    write_tensors(folder / "models/policy/adapter_model.safetensors", lora_A=torch.ones(2, 2))
    for step in (1, 2):
        write_tensors(folder / f"checkpoints/ppo/step-{step}/policy.safetensors", weight=torch.full((2,), float(step)))
        write_json(folder / f"checkpoints/ppo/step-{step}/values.json", {"values": {"prompts": {"position": 4}}})
    rank(folder, (0, 1), (2,))
    groups = [make_group([make_answer(2), make_answer(3)], name=name) for name in ("p0", "p1")]
    Journal(folder / "samples/sample-0.jsonl", durable=False).append(group_to_row(group) for group in groups)
    write_rows(folder / "metrics.jsonl", METRICS)
    write_json(
        folder / "manifest.json", {"created": "today", "stages": {"ppo": {"finished": "now", "results": RESULTS}}}
    )
    return folder


@pytest.fixture
def other(one: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(one, tmp_path / "other"))


def test_a_run_is_the_same_as_its_copy(one: Path, other: Path) -> None:
    assert differences(one, other) == []


def test_time_memory_ids_and_dates_may_differ(one: Path, other: Path) -> None:
    rank(other, (0, 1), (2,))  # again: another row, another time

    def change(manifest: Any) -> None:
        ppo = manifest["stages"]["ppo"]
        ppo["finished"] = "later"
        ppo["results"] |= {"time_s": 9.0, "peak_memory_gib": 9.0, "sync_share": 0.9, "times": {}, "tokens_per_s": 7.0}
        ppo["results"]["last"] |= {"time/sync": 9.0, "memory/driver": 9.0}

    change_json(other / "manifest.json", change)
    rows = [row | {"time/fit": 9.0, "sync/load_s": 9.0, "memory/more": 9.0} for row in METRICS]
    write_rows(other / "metrics.jsonl", rows)
    assert differences(one, other) == []


def altered_last_metric(folder: Path) -> None:
    write_rows(folder / "metrics.jsonl", [*METRICS[:2], METRICS[2] | {"objective/kl": 0.75}])


def altered_result(folder: Path) -> None:
    def change(manifest: Any) -> None:
        manifest["stages"]["ppo"]["results"]["last"]["objective/kl"] = 0.5

    change_json(folder / "manifest.json", change)


def lost_stage(folder: Path) -> None:
    change_json(folder / "manifest.json", lambda manifest: manifest["stages"].clear())


def altered_logprobs(folder: Path) -> None:
    path = folder / "samples/sample-0.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[1]["answers"][0]["logprobs"] = [-1.5, -1.0]
    write_rows(path, rows)


def swapped_groups(folder: Path) -> None:
    path = folder / "samples/sample-0.jsonl"
    path.write_text("".join(f"{line}\n" for line in reversed(path.read_text().splitlines())))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda folder: write_tensors(
                folder / "roles/policy/role.safetensors", weight=torch.tensor([1.0, 2.5]), step=torch.tensor(3)
            ),
            "roles/policy/role.safetensors: weight: 1 of 2 numbers differ, by up to 0.5",
        ),
        (
            lambda folder: change_json(folder / "roles/policy/role.json", lambda values: values.update(updates=3)),
            "roles/policy/role.json: updates: 2 and 3, a difference of 1",
        ),
        (
            lambda folder: (folder / "roles/policy/role.json").unlink(),
            "roles/policy/role.json: only in {one}",
        ),
        (
            lambda folder: write_tensors(
                folder / "models/policy/adapter_model.safetensors", lora_A=torch.ones(2, 2), lora_B=torch.ones(1)
            ),
            "models/policy/adapter_model.safetensors: lora_B: only in the second",
        ),
        (
            lambda folder: write_tensors(
                folder / "checkpoints/ppo/step-2/policy.safetensors", weight=torch.full((2,), 2.0).half()
            ),
            "checkpoints/ppo/step-2/policy.safetensors: weight: float32[2] and float16[2]",
        ),
        (
            lambda folder: write_json(
                folder / "checkpoints/ppo/step-1/values.json", {"values": {"prompts": {"position": 6}}}
            ),
            "checkpoints/ppo/step-1/values.json: values.prompts.position: 4 and 6, a difference of 2",
        ),
        (
            lambda folder: shutil.rmtree(folder / "checkpoints/ppo/step-2"),
            "checkpoints/ppo: the newest steps are 2 and 1",
        ),
        (
            lambda folder: shutil.rmtree(folder / "checkpoints"),
            "checkpoints/ppo: the newest steps are 2 and none",
        ),
        (
            lambda folder: rank(folder, (0,), (1, 2)),
            "rankings.db: prompt p0, by rules, round 0: [[0, 1], [2]] and [[0], [1, 2]]",
        ),
        (
            altered_logprobs,
            "samples/sample-0.jsonl: prompt p1: answers[0].logprobs: 1 of 2 numbers differ, by up to 0.5",
        ),
        (
            swapped_groups,
            "samples/sample-0.jsonl: 2 and 2 rows, the first that are not the same: prompt p0 and prompt p1 in line 1",
        ),
        (altered_last_metric, "metrics.jsonl: ppo step 2: objective/kl: 0.25 and 0.75, a difference of 0.5"),
        (
            lambda folder: write_rows(folder / "metrics.jsonl", [*METRICS, METRICS[2]]),
            "metrics.jsonl: 3 and 4 rows, the first that are not the same: nothing and ppo step 2 in line 4",
        ),
        (altered_result, "manifest.json: ppo.last.objective/kl: 0.25 and 0.5, a difference of 0.25"),
        (lost_stage, 'manifest.json: ppo: {{"num_steps": 2, "last": {{"objective/kl": 0.25}}}} and nothing'),
    ],
)
def test_what_differs_is_named_with_file_key_and_how_much(one: Path, other: Path, change: Change, said: str) -> None:
    change(other)
    found = differences(one, other)
    assert found[0] == said.format(one=one)


def test_a_checkpoint_that_only_one_run_kept_is_no_difference_unless_it_is_the_newest(one: Path, other: Path) -> None:
    shutil.rmtree(other / "checkpoints/ppo/step-1")
    assert differences(one, other) == []


def test_a_torn_row_is_a_difference_and_is_not_mended(one: Path, other: Path) -> None:
    path = other / "metrics.jsonl"
    torn = path.read_bytes()[:-5]
    path.write_bytes(torn)
    assert "ppo step 2 and a torn line in line 3" in differences(one, other)[0]
    assert path.read_bytes() == torn


def test_comparing_with_an_empty_folder_names_every_part_and_writes_nothing(one: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    found = differences(one, empty)
    parts = ("roles/", "models/", "checkpoints/", "rankings.db", "samples/", "metrics.jsonl", "manifest.json")
    assert all(any(line.startswith(part) for line in found) for part in parts)
    assert list(empty.iterdir()) == []


NAN = math.nan


@pytest.mark.parametrize(
    ("left", "right", "how"),
    [
        (torch.tensor([NAN, 1.0]), torch.tensor([-NAN, 1.0]), None),
        (torch.tensor([math.inf]), torch.tensor([math.inf]), None),
        (torch.tensor(2), torch.tensor(2), None),
        (torch.zeros(0), torch.zeros(0), None),
        (torch.tensor([NAN, 1.0]), torch.tensor([0.0, 1.0]), "1 of 2 numbers differ, by up to nan"),
        (torch.tensor([0.0]), torch.tensor([-0.0]), "1 of 1 numbers differ, by up to 0"),
        (torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.5, 2.0, 2.0]), "2 of 3 numbers differ, by up to 2"),
        (torch.tensor([2**60]), torch.tensor([2**60 + 1]), "1 of 1 numbers differ, by up to 0"),
        (
            torch.tensor([1.0]).bfloat16(),
            torch.tensor([1.0078125]).bfloat16(),
            "1 of 1 numbers differ, by up to 0.00781",
        ),
        (torch.tensor([True]), torch.tensor([False]), "1 of 1 numbers differ, by up to 1"),
        (torch.zeros(2, 1), torch.zeros(1, 2), "float32[2, 1] and float32[1, 2]"),
    ],
)
def test_tensors_are_the_same_only_in_every_bit(left: torch.Tensor, right: torch.Tensor, how: str | None) -> None:
    assert tensor_difference(left, right) == how


@pytest.mark.parametrize(
    ("left", "right", "said"),
    [
        ({"a": NAN}, {"a": NAN}, []),
        ({"a": 1}, {"a": 1.0}, ["a: 1 and 1.0, a difference of 0"]),
        ({"a": True}, {"a": 1}, ["a: true and 1"]),
        ({"a": None}, {}, ["a: null and nothing"]),
        ({"a": [1.0, 2.0]}, {"a": [1.0, NAN]}, ["a: 1 of 2 numbers differ, by up to nan"]),
        ({"a": [{"b": "x"}]}, {"a": [{"b": "y"}]}, ['a[0].b: "x" and "y"']),
        ({"a": {}}, {"a": {"c": 1}, "b": []}, ["a.c: nothing and 1", "b: nothing and []"]),
        ({"a": 0.1}, {"a": 0.1 + 2**-56}, ["a: 0.1 and 0.10000000000000002, a difference of 1.39e-17"]),
    ],
)
def test_values_are_the_same_only_exactly(left: object, right: object, said: list[str]) -> None:
    assert list(value_differences(left, right)) == said
