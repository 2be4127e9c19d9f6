"""Checkpoints and roles: bit for bit what was saved, or the one before, and it is said."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rlhf.checksum import checksum
from rlhf.disk import write_file
from rlhf.errors import StoreError
from rlhf.records import RoleState
from rlhf.store import RunStore
from tests.rlhf.runs import disk_of, flip_a_byte, opened_again, recipe, role, same


def save(store: RunStore, step: int, states: dict[str, RoleState], values: dict[str, object]) -> None:
    """Commits a checkpoint."""
    store.save_checkpoint("ppo", step, states, values)
    store.settle()


@pytest.fixture
def warnings() -> list[str]:
    return []


@pytest.fixture
def store(tmp_path: Path, warnings: list[str]) -> Iterator[RunStore]:
    with RunStore.open(tmp_path, recipe(), warnings.append) as opened:
        yield opened


def test_a_checkpoint_comes_back_equal_in_every_bit(store: RunStore):
    assert store.load_checkpoint("ppo") is None
    values = {"prompts": {"offset": 3}, "kl": {"beta": 0.1 + 0.2}, "none": None}
    save(store, 2, {"policy": role(1), "critic": role(2)}, values)
    with opened_again(store) as again:
        step, states, plain = again.load_checkpoint("ppo") or pytest.fail("no checkpoint")
        assert (step, plain) == (2, values)
        assert same(states["policy"], role(1)) and same(states["critic"], role(2))


def test_tensors_of_every_kind_are_kept(store: RunStore):
    whole = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "view": whole[:, 1],
        "shared": whole,
        "again": whole,
        "bfloat16": torch.randn(3).to(torch.bfloat16),
        "bool": torch.tensor([True, False]),
        "int64": torch.tensor([2**60]),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(1.5, dtype=torch.float64),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    save(store, 1, {"policy": RoleState(tensors)}, {})
    _, states, _ = store.load_checkpoint("ppo") or pytest.fail("no checkpoint")
    assert checksum(states["policy"].tensors) == checksum(tensors)


def test_a_role_without_tensors_is_kept(store: RunStore):
    save(store, 1, {"policy": RoleState({}, {"a": 1})}, {})
    _, states, _ = store.load_checkpoint("ppo") or pytest.fail("no checkpoint")
    assert states["policy"] == RoleState({}, {"a": 1})


def test_only_the_newest_checkpoints_stay(store: RunStore):
    for step in (1, 2, 3, 10):
        save(store, step, {"policy": role(step)}, {})
    assert sorted(path.name for path in (store.folder / "checkpoints" / "ppo").iterdir()) == ["step-10", "step-3"]


def test_every_nth_checkpoint_stays_for_good(tmp_path: Path):
    with RunStore.open(tmp_path, recipe(checkpoints={"keep": 1, "keep_every": 4})) as store:
        for step in range(1, 11):
            save(store, step, {"policy": role(step)}, {})
        names = {path.name for path in (store.folder / "checkpoints" / "ppo").iterdir()}
        assert names == {"step-4", "step-8", "step-10"}


def test_stages_have_checkpoints_of_their_own(store: RunStore):
    store.save_checkpoint("reward", 5, {"reward": role(1)}, {})
    store.save_checkpoint("ppo", 2, {"policy": role(2)}, {})
    assert (store.load_checkpoint("reward") or pytest.fail("no checkpoint"))[0] == 5
    assert (store.load_checkpoint("ppo") or pytest.fail("no checkpoint"))[0] == 2


def test_a_checkpoint_is_written_beside_the_work_and_committed_when_it_is_settled(store: RunStore):
    store.save_checkpoint("ppo", 1, {"policy": role(1)}, {})
    manifest = store.folder / "manifest.json"
    assert json.loads(manifest.read_bytes())["checkpoints"] == {}
    assert store.settle() > 0
    assert store.settle() == 0  # what was told once is not told again
    assert json.loads(manifest.read_bytes())["checkpoints"] == {"ppo": 1}


def test_a_disk_without_room_is_told_before_anything_is_written(store: RunStore, monkeypatch: pytest.MonkeyPatch):
    save(store, 1, {"policy": role(1)}, {})
    usage = shutil.disk_usage(store.folder)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=2**20))
    with pytest.raises(StoreError, match=r"takes 1\.0 MiB\. The disk has 1\.0 MiB left\. Free some disk space"):
        store.save_checkpoint("ppo", 2, {"policy": role(2)}, {})
    assert [path.name for path in (store.folder / "checkpoints" / "ppo").iterdir()] == ["step-1"]


def test_a_step_that_is_saved_again_replaces_its_checkpoint(store: RunStore):
    save(store, 1, {"policy": role(1)}, {})
    save(store, 1, {"policy": role(2)}, {})
    _, states, _ = store.load_checkpoint("ppo") or pytest.fail("no checkpoint")
    assert same(states["policy"], role(2))


def damage_by_flip(folder: Path) -> None:
    flip_a_byte(folder / "policy.safetensors")


def damage_by_flip_of_values(folder: Path) -> None:
    (folder / "values.json").write_bytes((folder / "values.json").read_bytes().replace(b"1", b"2"))


def damage_by_truncation(folder: Path) -> None:
    path = folder / "policy.safetensors"
    os.truncate(path, path.stat().st_size - 8)


def damage_by_loss(folder: Path) -> None:
    (folder / "policy.safetensors").unlink()


def damage_to_the_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"format": 1')


def loss_of_the_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (damage_by_flip, "policy.safetensors was altered"),
        (damage_by_flip_of_values, "values.json was altered"),
        (damage_by_truncation, "policy.safetensors has"),
        (damage_by_loss, "policy.safetensors is missing"),
        (damage_to_the_manifest, "manifest.json is not readable"),
        (loss_of_the_manifest, "manifest.json is missing"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_and_it_is_said(
    store: RunStore, warnings: list[str], damage, told: str
):
    save(store, 1, {"policy": role(1)}, {"step": 1})
    save(store, 2, {"policy": role(2)}, {"step": 1})
    damage(store.folder / "checkpoints" / "ppo" / "step-2")
    step, states, _ = store.load_checkpoint("ppo") or pytest.fail("no checkpoint")
    assert step == 1 and same(states["policy"], role(1))
    assert "step-2" in warnings[0] and told in warnings[0]
    assert "goes on from step 1" in warnings[1]
    assert (store.folder / "checkpoints" / "ppo" / "step-2.damaged").is_dir()
    save(store, 2, {"policy": role(3)}, {})
    step, states, _ = store.load_checkpoint("ppo") or pytest.fail("no checkpoint")
    assert step == 2 and same(states["policy"], role(3))


def test_with_every_checkpoint_damaged_the_run_starts_again_and_it_is_said(store: RunStore, warnings: list[str]):
    save(store, 1, {"policy": role(1)}, {})
    flip_a_byte(store.folder / "checkpoints" / "ppo" / "step-1" / "policy.safetensors")
    assert store.load_checkpoint("ppo") is None
    assert "starts again" in warnings[-1]


def test_a_checkpoint_of_a_newer_version_is_refused_not_passed_over(store: RunStore):
    save(store, 1, {"policy": role(1)}, {})
    path = store.folder / "checkpoints" / "ppo" / "step-1" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}))
    with pytest.raises(StoreError, match=r"has format 2"):
        store.load_checkpoint("ppo")
    assert path.exists()


def test_a_checkpoint_that_does_not_fit_leaves_the_old_one_whole(store: RunStore, warnings: list[str]):
    save(store, 1, {"policy": role(1)}, {})
    with disk_of(1000), pytest.raises(StoreError, match=r"step-2 cannot be written.*Free some disk space"):
        save(store, 2, {"policy": RoleState({"w": torch.zeros(10_000)})}, {})
    assert [path.name for path in (store.folder / "checkpoints" / "ppo").iterdir()] == ["step-1"]
    with opened_again(store, warnings) as again:
        step, states, _ = again.load_checkpoint("ppo") or pytest.fail("no checkpoint")
        assert step == 1 and same(states["policy"], role(1))
    assert warnings == []


def test_values_that_json_cannot_hold_are_refused_before_anything_is_written(store: RunStore):
    with pytest.raises(TypeError, match="cannot be kept in JSON"):
        save(store, 1, {"policy": role(1)}, {"generator": object()})
    assert store.load_checkpoint("ppo") is None


def test_what_a_dead_process_left_half_written_goes(store: RunStore):
    save(store, 1, {"policy": role(1)}, {})
    half = store.folder / "checkpoints" / "ppo" / ".tmp-step-2"
    half.mkdir()
    (half / "policy.safetensors").write_bytes(b"half")
    (store.folder / ".tmp-manifest.json").write_bytes(b"{")
    with opened_again(store) as again:
        assert (again.load_checkpoint("ppo") or pytest.fail("no checkpoint"))[0] == 1
    assert not half.exists() and not (store.folder / ".tmp-manifest.json").exists()


def test_a_checkpoint_that_was_renamed_but_not_recorded_counts(store: RunStore):
    save(store, 1, {"policy": role(1)}, {})
    manifest = (store.folder / "manifest.json").read_bytes()
    save(store, 2, {"policy": role(2)}, {})
    write_file(store.folder / "manifest.json", manifest)
    with opened_again(store) as again:
        assert (again.load_checkpoint("ppo") or pytest.fail("no checkpoint"))[0] == 2


def test_a_role_comes_back_equal_and_can_be_replaced(store: RunStore):
    assert store.load_role("reward") is None
    store.save_role("reward", role(1))
    store.save_role("reward", role(2))
    with opened_again(store) as again:
        assert same(again.load_role("reward") or pytest.fail("no role"), role(2))


def test_a_role_that_was_altered_is_refused(store: RunStore):
    store.save_role("reward", role(1))
    flip_a_byte(store.folder / "roles" / "reward" / "role.safetensors")
    with pytest.raises(StoreError, match=r"role\.safetensors was altered.*goes on from its checkpoint"):
        store.load_role("reward")
