"""What the controller's benchmark makes of its measurements."""

from __future__ import annotations

from benchmarks.controller import Measured, over_limits, per_step, table
from benchmarks.stand_ins import StandInSeconds


def measured(workers: int, overhead_s: float, ahead_ratio: float = 1.05) -> Measured:
    nodes = [8] * (workers // 8)
    return Measured(workers, 9.0, 19.0 + overhead_s, overhead_s, 0.1, 10.0 * ahead_ratio, ahead_ratio, nodes)


def test_a_step_is_from_row_to_row_without_the_first_two() -> None:
    # 30 and 10 are the warm-up; the others take 3, 4 and 20.
    assert per_step([30.0, 40.0, 43.0, 47.0, 67.0]) == 4.0


def test_inside_the_limits_nothing_is_told() -> None:
    assert over_limits([measured(8, 0.1), measured(64, 0.8)]) == []


def test_each_limit_is_told() -> None:
    assert over_limits([measured(8, 0.5), measured(64, 1.25)]) == [
        "64 workers: the controller's own 1.25 s a step are over 1 s"
    ]
    assert over_limits([measured(8, 0.1), measured(64, 0.9)]) == [
        "from 8 to 64 workers the overhead grows from 0.100 s to 0.900 s: more than they do"
    ]
    assert over_limits([measured(8, 0.1, ahead_ratio=1.9)]) == [
        "8 workers: with answers ahead a step takes 1.90 of the longer part, over 1.1"
    ]


def test_the_table_has_a_row_for_each_number_of_workers() -> None:
    rows = table([measured(8, 0.1), measured(64, 0.8)], StandInSeconds(10, 2, 7, 20)).strip().splitlines()
    assert rows[0].endswith("in turns 19 s, side by side 10 s")
    assert rows[3].split() == [
        "64",
        "8",
        "9.0",
        "s",
        "19.80",
        "s",
        "0.800",
        "s",
        "12.5",
        "ms",
        "0.10",
        "s",
        "10.50",
        "s",
        "1.05",
    ]
