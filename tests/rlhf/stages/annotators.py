"""People at a desk who follow a rule, for stages that wait for them."""

from __future__ import annotations

from collections.abc import Callable

from rlhf.desk.desk import Desk, open_desk
from rlhf.desk.records import Task, Tiers, Verdict
from rlhf.rankings import tiers_from_scores
from rlhf.stages.context import Context

Opinion = Callable[[Task], Tiers]


def threes(task: Task) -> Tiers:
    """The more often `w3` stands in an answer, the better."""
    by_index = {card.index: card.text.split().count("w3") for card in task.cards}
    return tiers_from_scores([float(by_index[index]) for index in sorted(by_index)])


def the_other_way_round(task: Task) -> Tiers:
    """The opposite of `threes`."""
    return threes(task)[::-1]


class Annotators:
    """Each time that the stage sleeps, each of them ranks one group; stands in the place of `time.sleep`."""

    def __init__(self, context: Context, **opinions: Opinion) -> None:
        self._context = context
        self.num_sleeps = 0
        with self._desk() as desk:
            known = {person.name: person.id for person in desk.people()}
            for name in opinions.keys() - known.keys():
                found = desk.sign_in(desk.invite(name))
                assert found is not None
                known[name] = found.id
        self._people = {known[name]: opinion for name, opinion in opinions.items()}

    def __call__(self, seconds: float) -> None:
        self.num_sleeps += 1
        assert self.num_sleeps < 500, "nobody has anything to rank, and the stage still waits"
        with self._desk() as desk:
            for person, opinion in self._people.items():
                if (task := desk.next_task(person)) is not None:
                    desk.submit(person, task.id, Verdict(opinion(task)), 1000)

    def _desk(self) -> Desk:
        return open_desk(self._context.store.folder, self._context.recipe)
