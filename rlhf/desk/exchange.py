"""Rankings as rows for other programs, and out of them.

Ours, one row per group:

    {"prompt_id": "...", "round": 0, "prompt": [{"role": "user", "content": "..."}], "answers": ["...", ...],
     "rankings": [{"by": "ann", "tiers": [[2], [0, 1]], "grades": {"2": "good"}, "flags": {"0": ["untrue"]},
                   "all_wrong": false, "time_ms": 61000, "repeat": false, "withdrawn": false, "created": "..."},
                  {"by": "ben", "skipped": "I do not know the subject", ...}],
     "consensus": {"tiers": [[2], [0, 1]], "agreement": 0.8, "accepted": true}}

Also taken in: rows with `tiers` in the place of `rankings`; rows with `ranked_answers`, best first, and `ranks` where
some are equal; TRL's `prompt`, `chosen`, `rejected`, as texts or as messages, of which rows of one prompt make a group.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from configs.desk import MOST_RANKED
from rlhf.desk.records import Consensus, Item, Submission, Verdict
from rlhf.desk.rows import verdict_from_plain, verdict_to_plain
from rlhf.errors import DataError
from rlhf.files import jsonl_rows
from rlhf.records import Message

Row = Mapping[str, Any]


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
    """Groups with what was said of them, by `by` where a row does not say by whom. Raises DataError, with the row."""
    taken: list[Taken] = []
    pairs: dict[tuple[Message, ...], list[tuple[str, str]]] = {}
    for number, row in enumerate(rows, 1):
        try:
            if "chosen" in row:
                messages, chosen, rejected = _pair(row)
                pairs.setdefault(messages, []).append((chosen, rejected))
            else:
                taken.append(_group(row, by))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise DataError(
                f"Row {number} of the rankings cannot be taken in: {reason}.",
                remedy="A row has prompt and answers with rankings or tiers, or prompt, chosen and rejected.",
            ) from error
    taken += [_of_pairs(messages, found, by) for messages, found in pairs.items()]
    return taken


def _group(row: Row, by: str) -> Taken:
    messages = _messages(row["prompt"] if "prompt" in row else row["messages"])
    said: list[tuple[str, Verdict, int]] = []
    if "ranked_answers" in row:
        answers = [str(answer) for answer in row["ranked_answers"]]
        places = row.get("ranks") or range(len(answers))
        tiers = [[i for i, p in enumerate(places) if p == place] for place in sorted(set(places))]
        said.append((by, _verdict({"tiers": tiers}), 0))
    else:
        answers = [str(answer) for answer in row["answers"]]
        for one in row.get("rankings") or [{"tiers": row["tiers"], "by": row.get("by", by)}]:
            if "skipped" not in one and not one.get("repeat") and not one.get("withdrawn"):
                said.append((str(one.get("by", by)), _verdict(one), int(one.get("time_ms", 0))))
    return Taken(str(row.get("prompt_id") or _id(messages)), messages, tuple(answers), tuple(said))


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
    return Taken(_id(messages), messages, tuple(answers), ((by, _verdict({"tiers": tiers}), 0),))


def _verdict(said: Mapping[str, Any]) -> Verdict:
    return verdict_from_plain({"grades": {}, "flags": {}, "all_wrong": False} | dict(said))


def _pair(row: Row) -> tuple[tuple[Message, ...], str, str]:
    chosen, rejected = row["chosen"], row["rejected"]
    if isinstance(chosen, str):
        return _messages(row["prompt"]), chosen, str(rejected)
    # Without `prompt` the conversation stands in both (TRL's implicit prompt): all but the last turn is the prompt.
    before = row["prompt"] if "prompt" in row else chosen[:-1]
    return _messages(before), str(chosen[-1]["content"]), str(rejected[-1]["content"])


def _messages(prompt: object) -> tuple[Message, ...]:
    if isinstance(prompt, str):
        return (Message("user", prompt),)
    turns = cast(Sequence[Mapping[str, str]], prompt)
    if not turns:
        raise ValueError("the prompt is empty")
    return tuple(Message(str(turn["role"]), str(turn["content"])) for turn in turns)


def _id(messages: Sequence[Message]) -> str:
    from rlhf.chat import prompt_id  # here, since transformers take seconds

    return prompt_id(messages)


def _plain(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def _said(one: Submission, withdrawn: bool) -> dict[str, Any]:
    what = {"skipped": one.reason} if one.verdict is None else verdict_to_plain(one.verdict)
    about = {"time_ms": one.time_ms, "repeat": one.repeat, "withdrawn": withdrawn, "created": one.created}
    return {"by": one.person} | what | about
