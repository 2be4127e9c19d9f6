"""Rankings as rows for other programs, and out of them.

Ours, one row per group:

    {"prompt_id": "...", "round": 0, "prompt": [{"role": "user", "content": "..."}], "answers": ["...", ...],
     "rankings": [{"by": "ann", "tiers": [[2], [0, 1]], "grades": {"2": "good"}, "flags": {"0": ["untrue"]},
                   "all_wrong": false, "time_ms": 61000, "repeat": false, "withdrawn": false, "created": "..."},
                  {"by": "ben", "skipped": "I do not know the subject", ...}],
     "consensus": {"tiers": [[2], [0, 1]], "agreement": 0.8, "accepted": true}}

Also taken in: rows with `tiers` in the place of `rankings`; rows with `ranked_answers`, best first, and `ranks` where
some are equal; TRL's `prompt`, `chosen`, `rejected`, as texts or as messages, of which rows of one prompt make a group.
Rows with the same prompt and answers make one group, too: one row for each person, say, with `by` in it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError

from configs.desk import MOST_RANKED
from rlhf.desk.people import check_name
from rlhf.desk.records import Consensus, Item, Submission, Verdict
from rlhf.desk.row_shapes import Best, Group, Opinion, Pair, Turn, problem_of
from rlhf.desk.rows import verdict_to_plain
from rlhf.desk.taking import check_verdict
from rlhf.errors import DataError, TenfoldError
from rlhf.files import jsonl_rows
from rlhf.records import Message

Row = Mapping[str, Any]
IMPORTED = "import"  # whose rankings are of which a row does not say by whom


@dataclass(frozen=True, slots=True)
class Taken:
    """A group that came from elsewhere, and what was said of it."""

    prompt_id: str
    messages: tuple[Message, ...]
    answers: tuple[str, ...]
    verdicts: tuple[tuple[str, Verdict, int], ...]  # by whom, what, in how many milliseconds


def row_of(
    item: Item, said: Sequence[Submission], withdrawn: Iterable[str], consensus: Consensus | None
) -> dict[str, Any]:
    """A group as a row of ours. Skips, repeats and what was withdrawn stand there as what they are."""
    return {
        "prompt_id": item.prompt_id,
        "round": item.round,
        "prompt": _plain(item.messages),
        "answers": list(item.answers),
        "rankings": [_said(one, one.person in withdrawn) for one in said],
        "consensus": None
        if consensus is None
        else {
            "tiers": [list(tier) for tier in consensus.tiers],
            "agreement": consensus.agreement,
            "accepted": consensus.accepted,
        },
    }


def pairs_of(item: Item, consensus: Consensus) -> Iterator[dict[str, Any]]:
    """Rows of TRL's conversational preference format: all pairs that the ranking orders, equals apart."""
    for better, worse in itertools.combinations(consensus.tiers, 2):
        for chosen, rejected in itertools.product(better, worse):
            yield {
                "prompt": _plain(item.messages),
                "chosen": [{"role": "assistant", "content": item.answers[chosen]}],
                "rejected": [{"role": "assistant", "content": item.answers[rejected]}],
            }


def rows_of_file(source: Path) -> Iterator[Row]:
    """The rows of a JSONL file. Raises DataError: no such file, a line that is no object."""
    for where, row in jsonl_rows(source):
        if not isinstance(row, dict):
            raise DataError(
                f"{source}, {where} is no object.", remedy='A row is {"prompt": ..., "answers": [...], ...}.'
            )
        yield cast(Row, row)


def read_rows(rows: Iterable[Row], by: str) -> list[Taken]:
    """Groups with what was said of them, by `by` where a row does not say by whom; rows of one group become one.

    Raises DataError, with the row: a field of another kind, an index that is no answer's, a group that rows give other
    answers, somebody who ranks a group twice and not alike.
    """
    taken: dict[str, Taken] = {}
    pairs: dict[tuple[Message, ...], list[tuple[str, str]]] = {}
    for number, row in enumerate(rows, 1):
        with _told(number):
            if "chosen" in row:
                messages, chosen, rejected = _pair(Pair.model_validate(row))
                pairs.setdefault(messages, []).append((chosen, rejected))
            else:
                found = _best(row, by) if "ranked_answers" in row else _group(row, by)
                taken[found.prompt_id] = _together(taken.get(found.prompt_id), found)
    for messages, compared in pairs.items():
        with _told(None):
            found = _of_pairs(messages, compared, by)
            taken[found.prompt_id] = _together(taken.get(found.prompt_id), found)
    return list(taken.values())


def check_answers(taken: Taken) -> None:
    """Nothing, if each answer says something: others cannot be learned. Raises DataError."""
    for index, text in enumerate(taken.answers):
        if not text.strip():
            raise DataError(f"prompt {taken.prompt_id}, answer {index} is empty.", remedy="Mend or remove the row.")


@contextmanager
def _told(number: int | None) -> Iterator[None]:
    """A block in which what is wrong with a row becomes a DataError that names it."""
    try:
        yield
    except (ValidationError, ValueError, TenfoldError) as error:
        reason = problem_of(error) if isinstance(error, ValidationError) else str(error).rstrip(".")
        raise DataError(
            f"{'A pair' if number is None else f'Row {number}'} of the rankings cannot be taken in: {reason}.",
            remedy="A row has prompt and answers with rankings or tiers, or prompt, chosen and rejected.",
        ) from error


def _group(row: Row, by: str) -> Taken:
    said = Group.model_validate(row)
    rankings = [said] if said.rankings is None else [one for one in said.rankings if one.counts]
    return _taken(said, said.answers, [(one.by or by, _verdict(one), one.time_ms) for one in rankings])


def _best(row: Row, by: str) -> Taken:
    said = Best.model_validate(row)
    places = said.ranks or list(range(len(said.ranked_answers)))
    tiers = [[i for i, p in enumerate(places) if p == place] for place in sorted(set(places))]
    return _taken(said, said.ranked_answers, [(said.by or by, _verdict(Opinion(tiers=tiers)), 0)])


def _taken(row: Group | Best, answers: Sequence[str], said: Sequence[tuple[str, Verdict, int]]) -> Taken:
    """The group, once all of it fits together."""
    prompt = row.messages if row.prompt is None else row.prompt
    if prompt is None:
        raise ValueError("'prompt' is missing")
    messages = _messages(prompt)
    if not 2 <= len(answers) <= MOST_RANKED:
        raise ValueError(f"the group has {len(answers)} answers; people rank 2 to {MOST_RANKED}")
    for name, verdict, _ in said:
        check_name(name)
        check_verdict(verdict, len(answers))
    return _together(None, Taken(row.prompt_id or _id(messages), messages, tuple(answers), tuple(said)))


def _together(known: Taken | None, more: Taken) -> Taken:
    """One group out of two rows of it. Raises ValueError where they do not agree."""
    if known is None:
        known = replace(more, verdicts=())
    if known.answers != more.answers or known.messages != more.messages:
        raise ValueError(
            f"another row has the prompt {known.prompt_id} with other answers, or in another order; give it a "
            "prompt_id of its own, or write them alike"
        )
    said = {name: verdict for name, verdict, _ in known.verdicts}
    verdicts = list(known.verdicts)
    for name, verdict, time_ms in more.verdicts:
        if name not in said:
            said[name] = verdict
            verdicts.append((name, verdict, time_ms))
        elif verdict_to_plain(said[name]) != verdict_to_plain(verdict):
            raise ValueError(f"{name} ranks the prompt {known.prompt_id} twice; say by whom each ranking is (by)")
    return replace(known, verdicts=tuple(verdicts))


def _of_pairs(messages: tuple[Message, ...], pairs: Sequence[tuple[str, str]], by: str) -> Taken:
    """One group of all answers to a prompt, ordered by wins less losses: all pairs of a ranking give it back."""
    answers = list(dict.fromkeys(text for pair in pairs for text in pair))
    if len(answers) > MOST_RANKED:
        raise DataError(
            f"The prompt {messages[-1].content[:60]!r} has pairs of {len(answers)} answers.",
            limit=f"People rank at most {MOST_RANKED}.",
        )
    wins = dict.fromkeys(answers, 0)
    for chosen, rejected in pairs:
        wins[chosen] += 1
        wins[rejected] -= 1
    tiers = [[i for i, a in enumerate(answers) if wins[a] == num] for num in sorted(set(wins.values()), reverse=True)]
    check_name(by)
    return Taken(_id(messages), messages, tuple(answers), ((by, _verdict(Opinion(tiers=tiers)), 0),))


def _verdict(said: Opinion) -> Verdict:
    return Verdict(
        tiers=tuple(tuple(tier) for tier in said.tiers or ()),
        grades=said.grades,
        flags={index: frozenset(flags) for index, flags in said.flags.items()},
        all_wrong=said.all_wrong,
    )


def _pair(row: Pair) -> tuple[tuple[Message, ...], str, str]:
    """(the prompt, the better answer, the other)."""
    before, chosen = _side(row.chosen)
    before_too, rejected = _side(row.rejected)
    # Without `prompt` the conversation stands in both (TRL's implicit prompt): all but the last turn is the prompt.
    if row.prompt is None and before != before_too:
        raise ValueError("chosen and rejected begin with other messages")
    messages = _messages(before if row.prompt is None else row.prompt)
    if chosen == rejected:
        raise ValueError("chosen and rejected are the same")
    return messages, chosen, rejected


def _side(said: str | list[Turn]) -> tuple[list[Turn], str]:
    """(the turns before the answer, the answer)."""
    return ([], said) if isinstance(said, str) else (said[:-1], said[-1].content)


def _messages(prompt: str | list[Turn]) -> tuple[Message, ...]:
    turns = [Message("user", prompt)] if isinstance(prompt, str) else [Message(t.role, t.content) for t in prompt]
    if not turns or not turns[-1].content.strip():
        raise ValueError("the prompt is empty")
    return tuple(turns)


def _id(messages: Sequence[Message]) -> str:
    from rlhf.chat import prompt_id  # here, since transformers take seconds

    return prompt_id(messages)


def _plain(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def _said(one: Submission, withdrawn: bool) -> dict[str, Any]:
    what = {"skipped": one.reason} if one.verdict is None else verdict_to_plain(one.verdict)
    about = {"time_ms": one.time_ms, "repeat": one.repeat, "withdrawn": withdrawn, "created": one.created}
    return {"by": one.person} | what | about
