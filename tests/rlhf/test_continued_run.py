"""A run that continues an adapter knows the adapter by its content, as it knows its base."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from configs.load import absolute, load_recipe
from configs.schema import Recipe
from rlhf.errors import StoreError
from rlhf.fingerprint import adapter_fingerprint, fingerprint
from rlhf.store import RunStore
from tests.rlhf.runs import group, recipe


def make_adapter(folder: Path, value: float = 1.0) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 16}))
    save_file({"lora_B": torch.tensor([value])}, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture
def law(tmp_path: Path) -> Path:
    return make_adapter(tmp_path / "law")


def begin(tmp_path: Path, adapter_from: Path | None) -> Path:
    """A run that holds answers already."""
    with RunStore.open(tmp_path, recipe(adapter_from=adapter_from and str(adapter_from))) as store:
        store.append_groups("sample", 0, [group()])
        return store.folder


def open_again(tmp_path: Path, adapter_from: Path | None, accept: tuple[str, ...] = ()) -> None:
    changed = recipe(adapter_from=adapter_from and str(adapter_from))
    with RunStore.open(tmp_path, changed, accept=accept) as store:
        store.take_change()


def test_the_fingerprint_of_an_adapter_is_of_settings_and_weights_alone(law: Path, tmp_path: Path):
    before = adapter_fingerprint(law)
    (law / "README.md").write_text("notes")
    (law / "manifest.json").write_text("{}")
    assert adapter_fingerprint(shutil.copytree(law, tmp_path / "copy")) == before
    assert adapter_fingerprint(make_adapter(tmp_path / "other", 2.0)) != before
    (law / "adapter_config.json").write_text("{}")
    assert adapter_fingerprint(law) != before
    assert adapter_fingerprint(None) is adapter_fingerprint(tmp_path / "absent") is None
    assert fingerprint("") is None


def test_an_adapter_that_was_moved_is_the_same_start(law: Path, tmp_path: Path):
    folder = begin(tmp_path, law)
    moved = law.rename(tmp_path / "moved")
    open_again(tmp_path, moved)
    assert load_recipe(folder / "recipe.yaml").adapter_from == str(moved)


def test_an_adapter_that_is_away_does_not_keep_the_run_from_being_opened(law: Path, tmp_path: Path):
    begin(tmp_path, law)
    law.rename(tmp_path / "away")
    open_again(tmp_path, law)


@pytest.mark.parametrize("accept", [(), ("adapter_from",)])
def test_another_adapter_under_the_old_path_or_a_new_one_is_refused(law: Path, tmp_path: Path, accept: tuple[str, ...]):
    begin(tmp_path, law)
    with pytest.raises(StoreError, match=r"adapter_from: \w{12} -> \w{12} .*other holds another adapter"):
        open_again(tmp_path, make_adapter(tmp_path / "other", 2.0), accept)
    shutil.rmtree(law)
    make_adapter(law, 3.0)
    with pytest.raises(StoreError, match=r"(?s)law holds another adapter.*cannot change within a run"):
        open_again(tmp_path, law, accept)


def test_a_run_cannot_take_up_or_give_up_a_start(law: Path, tmp_path: Path):
    begin(tmp_path, law)
    with pytest.raises(StoreError, match=r"adapter_from: .*law -> None"):
        open_again(tmp_path, None)
    second = tmp_path / "second"
    begin(second, None)
    with pytest.raises(StoreError, match=r"adapter_from: None -> .*law"):
        open_again(second, law)


def test_a_run_that_holds_nothing_yet_takes_any_start(law: Path, tmp_path: Path):
    with RunStore.open(tmp_path, recipe()) as store:
        pass
    open_again(tmp_path, law)
    assert json.loads((store.folder / "manifest.json").read_text())["adapter"] == adapter_fingerprint(law)
    open_again(tmp_path, None)
    assert json.loads((store.folder / "manifest.json").read_text())["adapter"] is None


def test_a_run_of_before_there_were_starts_opens_as_it_did(tmp_path: Path):
    folder = begin(tmp_path, None)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["adapter"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    open_again(tmp_path, None)


def test_the_start_is_kept_by_its_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert absolute(recipe(adapter_from="law")).adapter_from == str(tmp_path / "law")
    assert absolute(recipe()).adapter_from is None


def of_sft(**keys: object) -> Recipe:
    return recipe(sft={"sources": [{"path": "pairs.jsonl"}]} | keys)


def test_what_sft_is_to_do_can_be_accepted_until_it_begins(tmp_path: Path):
    with RunStore.open(tmp_path, of_sft()) as store:
        store.finish("pretrain", {"num_steps": 1})
        words = store.folder / "start" / "sft" / "tokenizer.json"
        words.parent.mkdir(parents=True)
        words.write_text("{}")
    with pytest.raises(StoreError, match=r"(?s)sft.template: None -> roles.*--accept sft.template"):
        RunStore.open(tmp_path, of_sft(template="roles"))
    with RunStore.open(tmp_path, of_sft(template="roles"), accept=("sft",)) as store:
        store.take_change()
        assert store.done("pretrain") and not words.exists()
        store.finish("sft", {"num_steps": 1})
    with pytest.raises(StoreError, match=r"sft.template cannot change within a run"):
        RunStore.open(tmp_path, of_sft(template="plain"), accept=("sft",))


def test_what_sft_was_to_do_cannot_change_under_answers(tmp_path: Path):
    begin(tmp_path, None)
    with pytest.raises(StoreError, match=r"sft\.template cannot change within a run"):
        RunStore.open(tmp_path, of_sft(template="roles"), accept=("sft", "stages"))
