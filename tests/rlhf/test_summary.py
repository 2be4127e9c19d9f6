"""The summary page says what the stages left, in words, and survives what they did not leave."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from rlhf.summary import Places, page
from rlhf.wording import duration

EVALUATE = {
    "judge": "rules",
    "judge_trained_on": False,
    "before": {"judge_score": 0.1, "ended_ratio": 0.5, "bits_per_byte": 1.05},
    "after": {"judge_score": 0.4, "ended_ratio": 0.9, "bits_per_byte": 1.0625},
    "win_rate": 0.7,
    "win_rate_low": 0.62,
    "win_rate_high": 0.78,
    "num_prompts": 100,
    "examples": [{"prompt": "What is a [red]loop[/red]?", "before": "a\nb", "after": "Code that repeats."}],
}
PPO = {
    "num_steps": 10,
    "first": {"objective/scores": -0.25, "objective/kl": 0.0, "completions/mean_length": 40.0},
    "last": {"objective/scores": 0.5, "objective/kl": 2.0, "completions/mean_length": 28.4},
    "gap_mean": 1.5e-5,
    "gap_max": 2e-4,
    "sync_share": 0.004,
    "times": {"generate": 25.0, "update": 74.0, "sync": 1.0, "step": 100.0},
    "time_s": 100.0,
}


def printed(results: dict[str, dict[str, object]], places: Places | None = None, width: int = 100) -> str:
    out = StringIO()
    console = Console(file=out, width=width, force_terminal=False)
    console.print(page("demo", results, places or Places("runs/demo"), ["tenfold show runs/demo"]))
    return out.getvalue()


def row(text: str, start: str) -> list[str]:
    return (
        next(line for line in text.splitlines() if line.strip().startswith(start)).strip().removeprefix(start).split()
    )


def test_before_and_after_stand_side_by_side() -> None:
    text = printed({"evaluate": EVALUATE})
    assert row(text, "judge's score, sampled")[:2] == ["+0.100", "+0.400"]
    assert row(text, "ended by itself")[:2] == ["50.0%", "90.0%"]
    assert row(text, "bits per byte")[:2] == ["1.0500", "1.0625"]
    assert "KL to the start" not in text


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.51, 0.7, "clearly better"), (0.4, 0.49, "clearly worse"), (0.45, 0.55, "no clear difference")],
)
def test_the_verdict_goes_by_the_interval_and_not_by_the_rate(low: float, high: float, verdict: str) -> None:
    text = printed({"evaluate": {**EVALUATE, "win_rate_low": low, "win_rate_high": high}})
    others = {"clearly better", "clearly worse", "no clear difference"} - {verdict}
    assert verdict in text
    assert not any(other in text for other in others)


def test_a_judge_that_ppo_was_trained_on_is_said_to_be_one() -> None:
    assert "PPO never saw this judge (rules)" in printed({"evaluate": EVALUATE})
    assert "PPO was trained on this judge (rules)" in printed({"evaluate": {**EVALUATE, "judge_trained_on": True}})


def test_ppo_is_told_from_its_first_step_to_its_last() -> None:
    text = " ".join(printed({"ppo": PPO}, width=400).split())
    assert "score -0.25 -> +0.50" in text
    assert "KL 0.00 -> 2.00 nats" in text
    assert "length 40 -> 28 tokens" in text
    assert "1.5e-05 nats a token on average, 0.0002 at most" in text
    assert "0.4% of a step" in text
    assert "update 74.0%, generate 25.0%, sync 1.0%" in text


def test_the_largest_peak_of_any_stage_is_shown() -> None:
    text = printed({"sample": {"peak_memory_gib": 3.21}, "ppo": {**PPO, "peak_memory_gib": 9.44}})
    assert "9.4 GiB" in text
    assert "3.2 GiB" not in text


def test_an_example_is_shown_as_it_is_and_on_one_line() -> None:
    text = printed({"evaluate": EVALUATE})
    assert "What is a [red]loop[/red]?" in text
    assert "before  a b" in text


def test_an_answer_cannot_command_the_terminal() -> None:
    example = {"prompt": "q", "before": "\x1b[2Jgone", "after": "\x07\x08"}
    text = printed({"evaluate": {**EVALUATE, "examples": [example]}})
    assert "\x1b" not in text
    assert "\N{REPLACEMENT CHARACTER}[2Jgone" in text


def test_a_long_answer_is_clipped_where_it_is_said() -> None:
    example = {"prompt": "q", "before": "x" * 1000, "after": "y"}
    text = printed({"evaluate": {**EVALUATE, "examples": [example]}})
    assert text.count("x") < 1000
    assert "…" in text


def test_stages_that_left_nothing_do_not_crash_the_page() -> None:
    text = printed({stage: {} for stage in ("sample", "rank", "reward", "ppo", "evaluate", "distil")})
    assert text.count("left no figures") == 6


@pytest.mark.parametrize("missing", [*EVALUATE, *PPO])
def test_any_missing_key_leaves_a_page(missing: str) -> None:
    results = {"evaluate": EVALUATE, "ppo": PPO}
    thinner = {stage: {k: v for k, v in found.items() if k != missing} for stage, found in results.items()}
    assert "Where things are" in printed(thinner)


def test_null_in_the_place_of_a_number_is_a_dash() -> None:
    assert row(printed({"evaluate": {**EVALUATE, "after": {"judge_score": None}}}), "judge's score, sampled")[1] == "-"


def test_places_that_are_known_are_shown_and_others_left_out() -> None:
    places = Places("runs/demo", adapter="runs/demo/models/policy", models=(("aligned model", "runs/demo/models/sft"),))
    text = printed({}, places)
    assert "policy adapter" in text and "aligned model" in text and "runs/demo/models/sft" in text
    assert "W&B run" not in text
    assert "tenfold show runs/demo" in text


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.44, "0.4 s"), (9.96, "10 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (7620, "2 h 07 min")],
)
def test_a_duration_is_said_as_a_person_says_it(seconds: float, words: str) -> None:
    assert duration(seconds) == words
