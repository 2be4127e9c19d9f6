"""Trainer and generator on one GPU: one at a time."""

from __future__ import annotations

import threading

from cluster.turns import Turns


def test_the_switch_is_thrown_only_when_the_turn_passes() -> None:
    switched: list[bool] = []
    turns = Turns(switched.append)
    for generates in (True, True, False, False, True):
        with turns.take(generates):
            pass
    assert switched == [False, True]


def test_calls_of_one_side_overlap() -> None:
    turns = Turns(lambda generates: None)
    with turns.take(True), turns.take(True):
        pass


def test_the_other_side_waits_until_all_calls_have_ended() -> None:
    order: list[str] = []
    turns = Turns(lambda generates: order.append("switch"))
    asking = threading.Event()

    def train() -> None:
        asking.set()
        with turns.take(False):
            order.append("train")

    thread = threading.Thread(target=train)
    with turns.take(True):
        thread.start()
        assert asking.wait(10)
        thread.join(0.05)  # time enough to get in, if nothing held it
        order.append("generate")
    thread.join(10)
    assert order == ["generate", "switch", "train"]
