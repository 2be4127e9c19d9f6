"""What the benchmark of people's rankings reads from a file, and what it concludes from scores."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.people import LONGER, LOSSES, UNTRAINED, Outcomes, load, main
from benchmarks.people_figures import List, accuracy, folds_of, gain, mean_of_lists, right_by_tree, summary
from requirements.install import ROOT
from rlhf.chat import ChatTokenizer
from rlhf.errors import DataError

# Tree a: 3 + 1 pairs, tree b: 1 pair, tree c: 2 pairs (one tie).
LISTS = [
    List("a1", "a", ((0,), (1,), (2,))),
    List("a2", "a", ((0,), (1,))),
    List("b1", "b", ((1,), (0,))),
    List("c1", "c", ((0,), (1, 2))),
]
SCORES = {"a1": [3.0, 1.0, 2.0], "a2": [1.0, 1.0], "b1": [5.0, 1.0], "c1": [2.0, 1.0, 0.0]}
OPPOSITE = {name: [-number for number in numbers] for name, numbers in SCORES.items()}


def test_no_tree_is_in_two_folds_and_folds_are_of_one_size() -> None:
    trees = [f"t{number % 23}" for number in range(60)]
    fold = folds_of(trees, 5, seed=1)
    assert set(fold) == set(trees)
    assert sorted(list(fold.values()).count(number) for number in range(5)) == [4, 4, 5, 5, 5]
    assert folds_of(trees[::-1], 5, seed=1) == fold
    assert folds_of(trees, 5, seed=2) != fold


def test_pairs_are_counted_by_tree_and_equal_scores_are_half_right() -> None:
    right, total = right_by_tree(LISTS, SCORES)
    # a1: 0>1 and 0>2 right, 1>2 wrong; a2: a tie of the scores; b1: wrong; c1: both right, and 1 and 2 are no pair.
    assert right.tolist() == [2.5, 0.0, 2.0]
    assert total.tolist() == [4.0, 1.0, 2.0]
    assert accuracy(LISTS, SCORES).mean == pytest.approx(4.5 / 7)
    assert mean_of_lists(LISTS, SCORES) == pytest.approx((2 / 3 + 1 / 2 + 0 + 1) / 4)


def test_the_interval_draws_whole_trees() -> None:
    # One tree has it all right and one all wrong: a draw of the two has 0, a half or all, whatever the lists in them.
    lists = [List(f"{tree}{i}", tree, ((0,), (1,))) for tree in "ab" for i in range(50)]
    scores = {one.prompt_id: [1.0, 0.0] if one.tree == "a" else [0.0, 1.0] for one in lists}
    found = accuracy(lists, scores)
    assert (found.mean, found.low, found.high) == (0.5, 0.0, 1.0)


def test_a_difference_is_paired() -> None:
    found = gain(LISTS, SCORES, OPPOSITE)
    assert found.mean == pytest.approx((4.5 - 2.5) / 7)
    same = gain(LISTS, SCORES, SCORES)
    assert (same.mean, same.low, same.high) == (0, 0, 0)


def test_a_summary_counts_and_compares_all_judges() -> None:
    found = summary(LISTS, {"one": SCORES, "other": OPPOSITE, "third": SCORES})
    assert (found["num_trees"], found["num_lists"], found["num_pairs"]) == (3, 4, 7)
    assert list(found["gain"]) == ["one less other", "one less third", "other less third"]


def row(question: str, answers: list[str], **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}], "ranked_answers": answers} | more


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return path


def test_lists_are_read_through_a_desk_and_end_as_a_generator_ends_them(tiny_model: Path, tmp_path: Path) -> None:
    rows = [
        row("sun", ["moon stone", "river"], tree_id="t1"),
        row("moon", ["sun", "river", "stone"], ranks=[0, 1, 1], tree_id="t1"),
        row("river", ["sun", "stone"], ranks=[0, 0]),
        row("stone", ["moon", "sun"]),
    ]
    chat = ChatTokenizer(tiny_model)
    data = load(write(tmp_path / "lists.jsonl", rows), chat, 0, None)
    assert [one.tiers for one in data.lists] == [((0,), (1,)), ((0,), (1, 2)), ((0,), (1,))]
    assert [one.tree for one in data.lists][:2] == ["t1", "t1"]
    assert data.lists[2].tree == data.lists[2].prompt_id  # a row that names no tree is one
    for group, _ in data.ranked.values():
        for answer in group.answers:
            assert answer.token_ids[-1] in chat.eos_ids
            assert chat.decode(answer.token_ids).strip() == answer.text
    cut = load(tmp_path / "lists.jsonl", chat, 0, 1)
    assert all(len(answer.token_ids) == 1 for group, _ in cut.ranked.values() for answer in group.answers)


def test_what_was_measured_is_gone_on_from_and_not_mixed_with_another(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    Outcomes(path, {"folds": 2}).keep("0/all_pairs", {"scores": {}})
    assert "0/all_pairs" in Outcomes(path, {"folds": 2})
    with pytest.raises(DataError, match="other settings"):
        Outcomes(path, {"folds": 3})


def measured(*asked: object) -> str:
    """What a measurement in a process of its own tells."""
    command = [sys.executable, "-m", "benchmarks.people", *map(str, asked)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.engine
@pytest.mark.timeout(240)
def test_a_measurement_that_was_cut_off_goes_on_and_gives_the_same_figures(tiny_model: Path, tmp_path: Path) -> None:
    words = ["sun", "moon", "river", "stone"]
    rows = [row(f"{a} {b}", [a, b], tree_id=f"t{i}") for i, a in enumerate(words) for b in words if a != b]
    out = tmp_path / "out.json"
    asked = ["--rankings", write(tmp_path / "lists.jsonl", rows), "--model", tiny_model, "--folds", 2, "--json", out]
    assert "fold 1 of 2, plackett_luce" in measured(*asked)
    whole = json.loads(out.read_text())
    assert list(whole["figures"]["accuracy"]) == [*LOSSES, LONGER, UNTRAINED]
    assert whole["figures"]["num_pairs"] == 12
    left = {name: one for name, one in whole["outcomes"].items() if name not in ("1/all_pairs", UNTRAINED)}
    out.write_text(json.dumps(whole | {"outcomes": left}))
    assert "fold 1 of 2" not in measured(*asked)
    assert json.loads(out.read_text())["figures"] == whole["figures"]


def test_more_folds_than_trees_are_refused(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "lists.jsonl", [row("sun", ["a", "b"]), row("moon", ["a", "b"])])
    assert main(["--rankings", str(source), "--model", str(tiny_model), "--folds", "3"]) == 2
    assert "there are 2 trees" in capsys.readouterr().out
