"""Rules of a house style: a question about a passage is answered in one sentence that says where it comes from.

A recipe names them by path, such as `rlhf.notes.opening`. Each returns a number in [0, 1], 1 for the best, and 0 for an
answer without words. The passage is what the prompt's messages hold, a system message as a rule, and is another one in
each prompt: the rules know no facts of their own. Whether the answer names the fact that was asked for is said by the
rule `contains`, with the field of the row that has it. A style of your own is a file like this one.
"""

from __future__ import annotations

import re

from rlhf.records import Answer, Prompt
from rlhf.words import content_words, words

PHRASE = "According to the notes,"
_END = re.compile(r"[.!?]+[\"'\u2019\u201d)\]]*(?=\s|$)")


def opening(prompt: Prompt, answer: Answer, phrase: str = PHRASE) -> float:
    """1 if the answer begins with the phrase, letter by letter, and goes on."""
    rest = answer.text.lstrip().removeprefix(phrase)
    return float(rest != answer.text.lstrip() and bool(words(rest)))


def one_sentence(prompt: Prompt, answer: Answer) -> float:
    """1 / the number of sentences, or of lines if they are more; 0 for an answer that ends without a mark.

    A full stop counts as an end wherever a space follows, also after an abbreviation.
    """
    said = answer.text.strip()
    ends = list(_END.finditer(said))
    if not words(said) or not ends or ends[-1].end() != len(said):
        return 0.0
    return 1.0 / max(len(ends), sum(1 for line in said.splitlines() if line.strip()))


def only_notes(prompt: Prompt, answer: Answer, phrase: str = PHRASE) -> float:
    """The share of the answer's different content words, the phrase left out, that stand in the passage or question."""
    said = content_words(answer.text.strip().removeprefix(phrase))
    known = content_words("\n".join(message.content for message in prompt.messages))
    return len(said & known) / len(said) if said else 0.0
