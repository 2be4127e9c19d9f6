"""The formats that conversations come in, and what a row of each becomes."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from rlhf.chat import prompt_id
from rlhf.errors import DataError
from rlhf.records import Message

# Fields that a row must have; Alpaca's `input` may be missing or empty.
FORMATS: Mapping[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt+completion": ("prompt", "completion"),
    "instruction/input/output": ("instruction", "output"),
}
ROLES = ("system", "user", "assistant")
_OPTIONAL = {"instruction/input/output": ("input",)}
_OTHER_FIELDS = {
    "conversation": "messages",
    "conversations": "messages",
    "dialogue": "messages",
    "turns": "messages",
    "query": "prompt",
    "question": "prompt",
    "answer": "completion",
    "chosen": "completion",
    "reply": "completion",
    "response": "completion",
    "target": "completion",
}
_OTHER_ROLES = {"human": "user", "bot": "assistant", "gpt": "assistant", "model": "assistant", "developer": "system"}
_NEAR = 0.7  # spelling errors lie above, other words below


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages that end with an assistant's; an optional system message, then user and assistant in turns."""

    messages: tuple[Message, ...]
    where: str  # file and line, for errors
    extra: Mapping[str, str] = field(default_factory=dict[str, str])  # other fields; those that are no texts as JSON
    num_given: int = 0  # so many messages are a given prompt: the assistant's among them are not learned

    @property
    def prompt(self) -> tuple[Message, ...]:
        """The messages before the first answer that is learned."""
        first = next(i for i, m in enumerate(self.messages) if m.role == "assistant" and i >= self.num_given)
        return self.messages[:first]

    @property
    def id(self) -> str:
        """16 hex digits that name these messages, and where learning starts, in every run."""
        return prompt_id([*self.messages, Message("given", str(self.num_given))])


def read_row(where: str, row: object) -> tuple[str, Conversation]:
    """(name of the format, conversation) of one row.

    Raises DataError: no format or several fit, wrong roles or order, no or an empty answer, content that is no text,
    tools.
    """
    name = _recognise(where, row)
    assert isinstance(row, dict)
    given: list[Message] = []
    if name == "messages":
        messages = _messages(where, "messages", row["messages"])
    elif name == "prompt+completion":
        given = _side(where, "prompt", row["prompt"], "user")
        messages = given + _side(where, "completion", row["completion"], "assistant")
    else:
        messages = _alpaca(where, row)
    if system := _system(where, row):
        messages, given = [system, *messages], [system, *given] if given else given
    if row.get("history"):
        raise _bad(where, "`history` is a format that is not known", "Write the whole conversation as `messages`.")
    if row.get("tools"):
        raise _bad(where, "`tools` would not be shown to the model", "Write them into the system message.")
    if not any(message.role == "assistant" for message in messages[len(given) :]):
        raise _bad(where, "there is no assistant turn, so nothing can be learned")
    _check_order(where, messages)
    learned_apart = any(message.role == "assistant" for message in given)
    used = (*FORMATS[name], *_OPTIONAL.get(name, ()), "system")
    extra = {
        str(key): value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        for key, value in row.items()
        if key not in used and value is not None
    }
    return name, Conversation(tuple(messages), where, extra, len(given) if learned_apart else 0)


def _recognise(where: str, row: object) -> str:
    if not isinstance(row, dict):
        raise _unknown(where, f"a {type(row).__name__}, not fields", "Write each row as an object with named fields.")
    present = [str(key) for key, value in row.items() if value is not None]
    fitting = [name for name, needed in FORMATS.items() if set(needed) <= set(present)]
    if len(fitting) > 1:
        raise DataError(
            f"{where}: the row fits {' and '.join(fitting)} (found: {', '.join(present)}).",
            limit="A row has one format.",
            remedy="Remove the fields of the others.",
        )
    if not fitting:
        raise _unknown(where, ", ".join(present) or "none", _nearest(present))
    return fitting[0]


def _unknown(where: str, found: str, remedy: str) -> DataError:
    return DataError(
        f"{where}: the format is not known (found: {found}).",
        limit=f"Known are {', '.join(FORMATS)}.",
        remedy=remedy,
    )


def _nearest(present: list[str]) -> str:
    """What to rename and to add, for the format that needs the least of it."""
    best, best_score = "", 0.0
    for name, needed in FORMATS.items():
        changes: list[str] = []
        score = 0.0
        for wanted in needed:
            near = max(present, key=lambda found, wanted=wanted: _likeness(found, wanted), default="")
            likeness = _likeness(near, wanted)
            if likeness < _NEAR:
                changes.append(f"add `{wanted}`")
                continue
            score += likeness / len(needed)
            if near != wanted:
                changes.append(f"rename `{near}` to `{wanted}`")
        if score > best_score:
            best, best_score = f"The nearest is {name}: {' and '.join(changes)}.", score
    return best or "Rename the fields, or convert the file."


def _likeness(found: str, wanted: str) -> float:
    if _OTHER_FIELDS.get(found.lower()) == wanted:
        return 0.9  # below the very name
    return difflib.SequenceMatcher(None, found.lower(), wanted).ratio()


def _side(where: str, name: str, value: object, role: str) -> list[Message]:
    """A prompt or a completion: a text is one message of that side's role."""
    if isinstance(value, str):
        return [_message(where, name, {"role": role, "content": value})]
    return _messages(where, name, value)


def _messages(where: str, name: str, value: object) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise _bad(where, f"`{name}` is {_show(value)}")
    return [_message(where, f"{name}[{index}]", turn) for index, turn in enumerate(value)]


def _alpaca(where: str, row: Mapping[str, object]) -> list[Message]:
    user = _message(where, "instruction", {"role": "user", "content": row["instruction"]})
    context = row.get("input")
    if context is not None and not isinstance(context, str):
        raise _bad(where, f"`input` is no text: {_show(context)}")
    if context and context.strip():
        user = _message(where, "input", {"role": "user", "content": f"{user.content}\n\n{context}"})
    return [user, _message(where, "output", {"role": "assistant", "content": row["output"]})]


def _system(where: str, row: Mapping[str, object]) -> Message | None:
    """The system message of a row that has it in a field of its own."""
    content = row.get("system")
    if content is None or content == "":
        return None
    return _message(where, "system", {"role": "system", "content": content})


def _message(where: str, name: str, turn: object) -> Message:
    if not isinstance(turn, dict):
        raise _bad(where, f"`{name}` is {_show(turn)}")
    role, content = turn.get("role"), turn.get("content")
    if role is None and "from" in turn:
        raise _bad(where, f"`{name}` has no role", "Write `role` for `from`, and `content` for `value`.")
    if role not in ROLES:
        other = _OTHER_ROLES.get(str(role).lower())
        raise _bad(where, f"`{name}` has the role {_show(role)}", f"Write {other!r} for {role!r}." if other else "")
    if turn.get("tool_calls"):
        raise _bad(
            where, f"`{name}` holds tool_calls, which are not learned", "Write the call as text, or remove the row."
        )
    if not isinstance(content, str):
        raise _bad(where, f"the content of `{name}` is no text: {_show(content)}")
    if not content.strip():
        raise _bad(where, f"the {role} turn `{name}` is empty")
    # JSON can spell half of a surrogate pair; no tokenizer takes it.
    if any("\ud800" <= character <= "\udfff" for character in content):
        raise _bad(where, f"`{name}` holds half a character (a lone surrogate)")
    return Message(role, content)


def _check_order(where: str, messages: list[Message]) -> None:
    start = 1 if messages[0].role == "system" else 0
    for index, message in enumerate(messages[start:]):
        expected = ("user", "assistant")[index % 2]
        if message.role != expected:
            raise _bad(where, f"message {start + index + 1} is of the role {message.role} where {expected} is expected")
    if messages[-1].role != "assistant":
        raise _bad(where, f"the last message is of the role {messages[-1].role}, and nothing answers it")


def _bad(where: str, problem: str, remedy: str = "") -> DataError:
    return DataError(
        f"{where}: {problem}.",
        limit="A conversation is a list of {role, content}, content a text: system if there is one, then user and "
        "assistant in turns, the assistant last.",
        remedy=remedy or "Mend or remove the row.",
    )


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
