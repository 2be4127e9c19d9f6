"""The run store: what was committed is there, what was torn is found out, nothing good is lost."""

import dataclasses
import json
import math
import os
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from configs.load import absolute, load_recipe
from rlhf.errors import StoreError
from rlhf.records import Ranking
from rlhf.store import RunStore
from tests.rlhf.runs import disk_of, group, opened_again, recipe, role

NOBODY = 65534  # the user id that owns nothing


@pytest.fixture
def warnings() -> list[str]:
    return []


@pytest.fixture
def store(tmp_path: Path, warnings: list[str]) -> Iterator[RunStore]:
    with RunStore.open(tmp_path, recipe(), warnings.append) as opened:
        yield opened


# Opening


def test_a_new_run_has_its_resolved_recipe_and_a_manifest(store: RunStore):
    assert load_recipe(store.folder / "recipe.yaml") == absolute(recipe())
    manifest = json.loads((store.folder / "manifest.json").read_text())
    assert (manifest["format"], manifest["stages"], manifest["checkpoints"]) == (2, {}, {})


def test_stages_and_their_results_last(store: RunStore):
    assert not store.done("sample") and store.results("sample") == {}
    store.finish("sample", {"num": 3, "share": 0.1, "lost": math.nan, "low": torch.tensor(1.0).item(), "of": (1, 2)})
    with opened_again(store) as again:
        assert again.done("sample") and not again.done("rank")
        assert again.results("sample") == {"num": 3, "share": 0.1, "lost": None, "low": 1.0, "of": [1, 2]}


def test_the_wandb_run_id_lasts(store: RunStore):
    assert store.wandb_run_id is None
    store.wandb_run_id = "abc123"
    with opened_again(store) as again:
        assert again.wandb_run_id == "abc123"


def test_another_recipe_is_refused_and_the_difference_shown(store: RunStore):
    store.append_groups("sample", 0, [group()])
    with (
        pytest.raises(StoreError, match=r"ppo\.num_steps: 100 -> 7") as caught,
        opened_again(store, ppo={"num_steps": 7}),
    ):
        pass
    assert "name=" in caught.value.remedy


def test_where_a_run_is_and_how_it_is_watched_may_differ(store: RunStore):
    with opened_again(store, runs="elsewhere", tracker={"mode": "disabled"}, cluster={"address": "auto", "wait_s": 5}):
        pass


def test_a_run_belongs_to_one_process_at_a_time(store: RunStore):
    with pytest.raises(StoreError, match=rf"in use by another process \(pid {os.getpid()}\)"):
        RunStore.open(store.folder.parent, recipe())
    with opened_again(store):
        pass


def test_a_run_that_holds_nothing_yet_takes_any_recipe(store: RunStore):
    with opened_again(store, seed=9) as again:
        again.take_change()
    assert load_recipe(store.folder / "recipe.yaml").seed == 9


def test_what_was_made_of_a_recipe_that_is_replaced_goes_with_it(store: RunStore):
    made = [store.folder / "tokenizer" / "tokenizer.json", store.folder / "start" / "pretrain" / "config.json"]
    for path in made:
        path.parent.mkdir(parents=True)
        path.write_text("{}")
    with opened_again(store) as again:
        again.take_change()
    assert all(path.exists() for path in made)  # the recipe is the same
    with opened_again(store, seed=9) as again:
        again.take_change()
    assert not any(path.exists() for path in made)


def test_a_refused_opening_leaves_the_lock_free(store: RunStore):
    store.append_groups("sample", 0, [group()])
    with pytest.raises(StoreError), opened_again(store, seed=9):
        pass
    with opened_again(store):
        pass


def test_an_unwritable_run_folder_is_told_with_path_and_remedy(tmp_path: Path):
    (tmp_path / "runs").write_text("a file where a folder should be")
    with pytest.raises(StoreError, match=r"runs/run cannot be made.*Set `runs`"):
        RunStore.open(tmp_path / "runs", recipe())


def test_a_read_only_folder_is_told():
    folder = Path(tempfile.mkdtemp())  # not under tmp_path, whose parents only its owner may enter
    folder.chmod(0o555)
    is_root = os.geteuid() == 0
    try:
        if is_root:  # who may write anywhere
            os.seteuid(NOBODY)
        with pytest.raises(StoreError, match="may write to"):
            RunStore.open(folder, recipe())
    finally:
        if is_root:
            os.seteuid(0)
        folder.rmdir()


def test_a_manifest_of_a_newer_version_is_refused(store: RunStore):
    store.close()
    path = store.folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 3}))
    with pytest.raises(StoreError, match=r"has format 3.*up to 2.*Update"), opened_again(store):
        pass


def test_a_manifest_from_before_the_first_release_is_refused(store: RunStore):
    store.close()
    path = store.folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 1}))
    with pytest.raises(StoreError, match=r"has format 1.*another name"), opened_again(store):
        pass


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_a_manifest_that_cannot_be_read_is_refused(store: RunStore, content: str):
    store.close()
    (store.folder / "manifest.json").write_text(content)
    with pytest.raises(StoreError, match=r"manifest\.json cannot be read"), opened_again(store):
        pass


def test_a_lost_manifest_is_not_taken_for_a_new_run(store: RunStore):
    store.log("ppo", 1, {"a": 1})
    store.close()
    (store.folder / "manifest.json").unlink()
    with pytest.raises(StoreError, match=r"has metrics\.jsonl but no manifest\.json"), opened_again(store):
        pass


# Metrics


def test_metrics_are_kept_by_stage_in_order(store: RunStore):
    store.log("reward", 1, {"reward/loss": 0.5})
    store.log("ppo", 1, {"objective/kl": 0.25, "bad": math.inf})
    store.log("ppo", 2, {"objective/kl": 0.1})
    with opened_again(store) as again:
        assert again.metrics("reward") == [{"step": 1, "reward/loss": 0.5}]
        first, second = again.metrics("ppo")
        assert first["objective/kl"] == 0.25 and math.isnan(first["bad"])
        assert second == {"step": 2, "objective/kl": 0.1}


def test_cut_metrics_drops_later_steps_of_the_stage_only(store: RunStore):
    for step in (1, 2, 3):
        store.log("reward", step, {"x": step})
        store.log("ppo", step, {"x": step})
    store.cut_metrics("ppo", 1)
    store.log("ppo", 2, {"x": 20})
    assert [row["x"] for row in store.metrics("ppo")] == [1, 20]
    assert [row["x"] for row in store.metrics("reward")] == [1, 2, 3]


@pytest.mark.parametrize("torn", [b'{"stage": "ppo", "st', b'{"stage": "ppo"\n', b"\0\0\0\0"])
def test_a_torn_last_line_is_dropped_and_the_file_goes_on(store: RunStore, torn: bytes):
    store.log("ppo", 1, {"x": 1})
    with (store.folder / "metrics.jsonl").open("ab") as file:
        file.write(torn)
    with opened_again(store) as again:
        again.log("ppo", 2, {"x": 2})
        assert [row["step"] for row in again.metrics("ppo")] == [1, 2]
    assert len((store.folder / "metrics.jsonl").read_text().splitlines()) == 2


def test_damage_in_the_middle_is_told_with_its_line(store: RunStore):
    store.log("ppo", 1, {"x": 1})
    store.log("ppo", 2, {"x": 2})
    path = store.folder / "metrics.jsonl"
    path.write_text("{broken\n" + path.read_text())
    with pytest.raises(StoreError, match=r"metrics\.jsonl, line 1 is damaged"):
        store.metrics("ppo")


# Answers


def test_groups_come_back_equal_in_every_bit_by_stage_and_round(store: RunStore):
    store.append_groups("sample", 0, [group("a"), group("b")])
    store.append_groups("sample", 0, [group("c")])
    store.append_groups("sample", 1, [group("d")])
    with opened_again(store) as again:
        assert again.groups("sample", 0) == [group("a"), group("b"), group("c")]
        assert again.groups("sample", 1) == [group("d")]
        assert again.groups("evaluate", 0) == []


def test_a_torn_group_is_dropped_and_those_before_stay(store: RunStore):
    store.append_groups("sample", 0, [group("a"), group("b")])
    path = store.folder / "samples" / "sample-0.jsonl"
    path.write_bytes(path.read_bytes()[:-10])
    with opened_again(store) as again:
        assert again.groups("sample", 0) == [group("a")]
        again.append_groups("sample", 0, [group("c")])
        assert again.groups("sample", 0) == [group("a"), group("c")]


# Rankings


def test_rankings_last_by_round_and_the_newest_of_a_judge_counts(store: RunStore):
    first = Ranking("p1", ((1,), (0, 2)), "rules")
    partial = Ranking("p2", ((0,),), "rules")
    by_ann = dataclasses.replace(first, by="ann")
    later = dataclasses.replace(first, round=1)
    corrected = dataclasses.replace(first, tiers=((2,), (1,), (0,)))
    store.add_rankings([first, partial, by_ann])
    store.add_rankings([later])
    store.add_rankings([])
    store.add_rankings([corrected])
    with opened_again(store) as again:
        assert again.rankings(0) == [corrected, partial, by_ann]
        assert again.rankings(1) == [later]
        assert again.rankings() == [corrected, partial, by_ann, later]


def test_a_correction_is_a_new_row(store: RunStore):
    ranking = Ranking("p1", ((1,), (0,)), "rules")
    store.add_rankings([ranking])
    store.add_rankings([ranking])
    database = sqlite3.connect(store.folder / "rankings.db")
    assert database.execute("select count(*) from rankings").fetchone() == (2,)
    database.close()


def test_a_rankings_schema_of_a_newer_version_is_refused(store: RunStore):
    store.add_rankings([Ranking("p1", ((1,), (0,)), "rules")])
    store.close()
    database = sqlite3.connect(store.folder / "rankings.db")
    database.execute("update schema_version set version = 4")
    database.commit()
    database.close()
    with RunStore.open(store.folder.parent, recipe()) as again, pytest.raises(StoreError, match="schema version 4"):
        again.rankings()


def test_a_damaged_database_is_told_with_its_path(store: RunStore):
    (store.folder / "rankings.db").write_bytes(b"not a database, but long enough to be looked at" * 100)
    with pytest.raises(StoreError, match=r"rankings\.db cannot be read"):
        store.rankings()


def test_answers_that_do_not_fit_leave_those_before_whole(store: RunStore):
    store.append_groups("sample", 0, [group("a")])
    size = (store.folder / "samples" / "sample-0.jsonl").stat().st_size
    with disk_of(size + 100), pytest.raises(StoreError, match=r"sample-0\.jsonl cannot be written"):
        store.append_groups("sample", 0, [group("b")])
    store.append_groups("sample", 0, [group("c")])
    assert store.groups("sample", 0) == [group("a"), group("c")]


def test_no_pickle_is_among_the_files_of_a_run(store: RunStore):
    store.save_checkpoint("ppo", 1, {"policy": role(1)}, {})
    store.settle()
    store.save_role("reward", role(1))
    store.append_groups("sample", 0, [group()])
    store.add_rankings([Ranking("p1", ((1,), (0,)), "rules")])
    kinds = {path.suffix for path in store.folder.rglob("*") if path.is_file() and path.name != "lock"}
    assert kinds == {".json", ".jsonl", ".yaml", ".db", ".safetensors"}
