"""On a disk that is full or read-only nothing is lost, and the message says what to do."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rlhf.errors import StoreError
from rlhf.records import RoleState
from rlhf.store import RunStore
from tests.rlhf.runs import group, recipe, role, same

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
SIZE = 2 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", folder], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def weights(mebibytes: float) -> dict[str, RoleState]:
    return {"policy": RoleState({"w": torch.rand(int(mebibytes * 2**18))})}


def test_a_checkpoint_without_room_is_refused_before_it_is_begun_and_the_old_one_is_whole(disk: Path):
    with RunStore.open(disk, recipe()) as store:
        store.save_checkpoint("ppo", 1, {"policy": role(1)}, {})
        store.settle()
        with pytest.raises(StoreError, match=r"takes 2\.5 MiB\. The disk has 2\.0 MiB left\. Free some disk space"):
            store.save_checkpoint("ppo", 2, weights(1.5), {})
        step, states, _ = store.load_checkpoint("ppo") or pytest.fail("no checkpoint")
        assert step == 1 and same(states["policy"], role(1))


def test_a_disk_that_fills_up_in_the_middle_of_a_save_leaves_the_old_checkpoint_and_no_rest(
    disk: Path, monkeypatch: pytest.MonkeyPatch
):
    with RunStore.open(disk, recipe()) as store:
        store.save_checkpoint("ppo", 1, {"policy": role(1)}, {})
        store.settle()
        monkeypatch.setattr("rlhf.checkpoints.check_room", lambda path, num_bytes: None)  # others took it meanwhile
        store.save_checkpoint("ppo", 2, weights(3), {})
        with pytest.raises(StoreError, match=r"step-2 cannot be written.*Free some disk space"):
            store.settle()
        store.save_checkpoint("ppo", 3, {"policy": role(3)}, {})  # there is room for it: nothing half is left
        store.settle()
    with RunStore.open(disk, recipe()) as again:
        step, states, _ = again.load_checkpoint("ppo") or pytest.fail("no checkpoint")
        assert step == 3 and same(states["policy"], role(3))


def test_a_run_on_a_full_disk_stops_with_a_message_and_goes_on_when_there_is_room(disk: Path):
    num = 0
    with pytest.raises(StoreError, match="Free some disk space"), RunStore.open(disk, recipe()) as store:
        while True:
            store.append_groups("sample", 0, [group(f"p{num}")])
            store.steps("ppo").add(num, "generate", {"text": "x" * 5000})
            store.log("ppo", num, {"x": 1.0})
            num += 1
    subprocess.run(["mount", "-o", f"remount,size={2 * SIZE}", disk], check=True)
    with RunStore.open(disk, recipe()) as again:
        assert len(again.groups("sample", 0)) in (num, num + 1)
        assert again.steps("ppo").find(num - 1, "generate") is not None
        assert [row["step"] for row in again.metrics("ppo")][:num] == list(range(num))
        again.append_groups("sample", 0, [group("last")])
        assert again.groups("sample", 0)[-1].prompt.id == "last"


def test_a_read_only_disk_is_told_and_nothing_changes(disk: Path):
    with RunStore.open(disk, recipe()) as store:
        store.save_checkpoint("ppo", 1, {"policy": role(1)}, {})
    before = {path: path.read_bytes() for path in disk.rglob("*") if path.is_file()}
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    with pytest.raises(StoreError, match=r"Read-only file system.*may write to"):
        RunStore.open(disk, recipe())
    assert {path: path.read_bytes() for path in disk.rglob("*") if path.is_file()} == before
