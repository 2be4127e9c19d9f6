"""What the benchmark of the plan's memory makes of the workers' notes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.plan_memory import MIB, Row, measured_mib, table


def note(folder: Path, name: str, rank: int, baseline: int, peak: int) -> None:
    (folder / name).write_text(json.dumps({"rank": rank, "baseline": baseline * MIB, "peak": peak * MIB}))


def test_imports_are_taken_off_each_rank_and_ranks_are_added_up(tmp_path: Path) -> None:
    note(tmp_path, "policy-0-11.json", 0, 500, 560)
    note(tmp_path, "policy-1-12.json", 1, 510, 540)
    note(tmp_path, "reward-0-13.json", 0, 500, 900)
    assert measured_mib(tmp_path, "policy") == (90, 1010)


def test_a_rank_that_was_started_twice_counts_once(tmp_path: Path) -> None:
    note(tmp_path, "reward-0-11.json", 0, 500, 520)
    note(tmp_path, "reward-0-12.json", 0, 500, 600)
    assert measured_mib(tmp_path, "reward") == (100, 500)


def test_a_line_says_the_ratio() -> None:
    row = Row("tiny", "shared", "sum", 120.0, 100.0, 500.0)
    assert row.ratio == pytest.approx(1.2)
    assert "1.20" in table([row]).splitlines()[1]
