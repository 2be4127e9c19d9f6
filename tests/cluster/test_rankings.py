"""`tenfold rankings`: out of a run's desk into a file, and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from cluster.cli import app
from rlhf.data import Prompts
from rlhf.desk.desk import open_desk
from rlhf.kept_prompts import write_prompts
from rlhf.store import RunStore
from tests.rlhf.desk.groups import groups, person, rank_all
from tests.rlhf.runs import recipe


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run with two groups that a person ranked."""
    RunStore.open(tmp_path, recipe(rank={"judge": "people"})).close()
    with open_desk(tmp_path / "run") as desk:
        desk.add_groups(groups(2))
        rank_all(desk, person(desk, "ann"))
    return tmp_path / "run"


def tenfold(*words: object) -> Result:
    return CliRunner().invoke(app, ["rankings", *(str(word) for word in words)])


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rankings_go_out_and_into_another_run(run: Path, tmp_path: Path):
    assert "2 rows are in" in tenfold(run, "--to", tmp_path / "out.jsonl").output
    assert [row["prompt_id"] for row in rows_of(tmp_path / "out.jsonl")] == ["p000", "p001"]
    done = tenfold(run, "--from", tmp_path / "out.jsonl", "--round", 2, "--json")
    assert json.loads(done.stdout)["num_rankings"] == 2
    with open_desk(run) as desk:
        assert [one.people for one in desk.consensus(1)] == [("ann",), ("ann",)]


def test_pairs_are_rows_of_trl(run: Path, tmp_path: Path):
    tenfold(run, "--to", tmp_path / "pairs.jsonl", "--pairs", "--round", 1)
    rows = rows_of(tmp_path / "pairs.jsonl")
    assert len(rows) == 6 and rows[0].keys() == {"prompt", "chosen", "rejected"}


def test_prompts_whose_answers_the_run_has_yet_to_write_are_refused_until_it_has(run: Path, tmp_path: Path):
    tenfold(run, "--to", tmp_path / "out.jsonl")
    again = tmp_path / "again"
    with RunStore.open(again.parent, recipe(name="again", rank={"judge": "people"})) as store:
        write_prompts(again, Prompts(tuple(group.prompt for group in groups(2)), ()))
        refused = tenfold(again, "--from", tmp_path / "out.jsonl")
        assert refused.exit_code == 2 and "p000 is one of the run's own" in " ".join(refused.output.split())
        assert tenfold(again, "--from", tmp_path / "out.jsonl", "--round", 2).exit_code == 0  # has no such round
        store.finish("sample", {})
    done = tenfold(again, "--from", tmp_path / "out.jsonl", "--json")
    assert json.loads(done.stdout)["num_rankings"] == 2


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ([], "Give one of --to FILE and --from FILE"),
        (["--to", "a", "--from", "b"], "Give one of"),
        (["--to", "there.jsonl"], "is there already"),
        (["--to", "no/folder.jsonl"], "there is no folder no"),
        (["--from", "there.jsonl", "--pairs"], "of no use with --from"),
        (["--to", "none.jsonl", "--round", 7], "has no groups to write"),
        (["--from", "missing.jsonl"], "missing.jsonl"),
        (["--from", "there.jsonl"], "line 1 is no object"),
    ],
)
def test_what_cannot_be_done_is_told(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[object], why: str
):
    monkeypatch.chdir(tmp_path)
    Path("there.jsonl").write_text("[1]\n")
    done = tenfold(run, *words)
    assert done.exit_code == 2 and why in " ".join(done.output.split())
