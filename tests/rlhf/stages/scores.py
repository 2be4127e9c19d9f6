"""A rule for the stage tests."""

from rlhf.records import Answer, Prompt


def threes(prompt: Prompt, answer: Answer) -> float:
    """The share of token 3."""
    return answer.token_ids.count(3) / len(answer.token_ids)


def zeros(prompt: Prompt, answer: Answer) -> float:
    """The share of token 0: what no one trains on."""
    return answer.token_ids.count(0) / len(answer.token_ids)


def breaks_on_p1(prompt: Prompt, answer: Answer) -> float:
    """Raises on one prompt."""
    if prompt.id == "p1":
        raise ValueError("cannot read this")
    return threes(prompt, answer)
