"""Groups and people for a desk."""

from __future__ import annotations

from rlhf.desk.desk import Desk
from rlhf.desk.records import PersonRole, Tiers, Verdict
from rlhf.records import Answer, AnswerGroup, Message, Prompt


def group(name: str, num_answers: int = 3) -> AnswerGroup:
    answers = tuple(Answer((i,), (-1.0,), "eos", 0, f"{name} answer {i}") for i in range(num_answers))
    return AnswerGroup(Prompt(name, (Message("user", f"question {name}"),), (1,)), answers)


def groups(num: int, num_answers: int = 3) -> list[AnswerGroup]:
    return [group(f"p{i:03}", num_answers) for i in range(num)]


def person(desk: Desk, name: str, role: PersonRole = "annotator") -> int:
    """The id of somebody new."""
    found = desk.sign_in(desk.invite(name, role))
    assert found is not None
    return found.id


def verdict(*tiers: tuple[int, ...]) -> Verdict:
    return Verdict(tiers)


BEST_FIRST: Tiers = ((0,), (1,), (2,))


def rank_all(desk: Desk, person_id: int, tiers: Tiers = BEST_FIRST) -> list[str]:
    """The prompts of the tasks that this person was given until there were none, each ranked in the same way."""
    done: list[str] = []
    while (task := desk.next_task(person_id)) is not None:
        desk.submit(person_id, task.id, Verdict(tiers), 1000)
        done.append(task.prompt_id)
    return done
