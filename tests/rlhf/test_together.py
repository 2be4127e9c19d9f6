"""Calls at the same time: results in order, errors once all have ended."""

from __future__ import annotations

import threading

import pytest

from rlhf.together import together


def test_results_come_in_the_order_of_the_calls() -> None:
    second_ended = threading.Event()

    def first() -> str:
        assert second_ended.wait(10)
        return "first"

    def second() -> str:
        second_ended.set()
        return "second"

    assert together(first, second) == ("first", "second")
    assert together() == ()


def test_calls_run_at_the_same_time() -> None:
    all_there = threading.Barrier(3, timeout=10)  # breaks unless three wait at once

    together(all_there.wait, all_there.wait, all_there.wait)


def test_the_first_error_is_raised_after_all_have_ended_and_the_others_are_noted() -> None:
    failed = threading.Event()
    ended: list[str] = []

    def fails_first() -> None:
        failed.set()
        raise ValueError("first")

    def fails_later() -> None:
        assert failed.wait(10)
        threads[0].join(10)
        ended.append("later")
        raise KeyError("later")

    threads: list[threading.Thread] = []

    def remembered() -> None:
        threads.append(threading.current_thread())
        fails_first()

    with pytest.raises(ValueError, match="first") as caught:
        together(fails_later, remembered)
    assert ended == ["later"]
    assert caught.value.__notes__ == ["At the same time: KeyError: 'later'"]


def test_an_error_leaves_no_thread_behind() -> None:
    before = threading.active_count()
    with pytest.raises(ZeroDivisionError):
        together(lambda: 1 / 0, lambda: 1)
    assert threading.active_count() == before
