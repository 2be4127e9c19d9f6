"""Writing beside the work: what it did is known at the next look."""

import threading

import pytest

from rlhf.saver import Saver


def test_the_work_goes_on_beside_and_its_end_is_told_to_who_waits():
    saver, gate, done = Saver(), threading.Event(), []
    saver.start(lambda: (gate.wait(), None)[1], lambda: done.append(threading.current_thread()))
    assert not saver.ready and not saver.wait(0.01) and done == []
    gate.set()
    assert saver.wait() and done == [threading.main_thread()]
    assert saver.wait() and len(done) == 1


def test_an_error_comes_up_at_the_next_look_and_nothing_follows_it():
    saver, done = Saver(), []

    def fails() -> None:
        raise OSError("full")

    saver.start(fails, lambda: done.append(1))
    with pytest.raises(OSError, match="full"):
        saver.wait()
    assert done == [] and saver.wait()
