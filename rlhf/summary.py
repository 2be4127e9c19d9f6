"""The page that ends a run: what was done, whether it helped, and where everything is.

It is made from the results that the stages left in the run store. Any of these keys may be missing:

    pretrain  num_steps, num_tokens (that were read), num_documents, num_corpus_tokens, first_bits_per_byte,
              bits_per_byte, samples ([[given, written]])
    sft       num_steps, num_texts, num_dropped, first_held_out_loss, held_out_loss, samples, result (name of the model)
    sample    num_prompts, num_answers, num_tokens, tokens_per_s, mean_length, ended_ratio, round (0 the first)
    rank      judge, num_groups, num_tied_groups; of people: num_people, num_rankings, num_disagreed, num_closed,
              agreement_tau, agreement_alpha
    reward    accuracy, accuracy_low, accuracy_high, tau, num_train, num_held_out, gain, bias
    ppo       num_steps, first, last (metrics of that step), gap_mean, gap_max (nats), sync_share, times (phase -> s),
              staleness (updates, where answers were written ahead)
    evaluate  judge, judge_trained_on, before, after (judge_score, greedy_judge_score, reward_score, kl, mean_length,
              ended_ratio, bits_per_byte), win_rate, win_rate_low, win_rate_high, num_prompts,
              examples ([{prompt, before, after}])
    any       time_s, peak_memory_gib
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from rlhf.rounds import label as stage_label
from rlhf.rounds import of_key
from rlhf.wording import duration, share

Results = Mapping[str, object]
ABSENT = "-"
EXAMPLE_CHARACTERS = 400


@dataclass(frozen=True, slots=True)
class Places:
    """Where things are, and what can be typed next. Empty: not said."""

    run: str
    adapter: str = ""  # folder of the policy's adapter
    tracker: str = ""  # folder or address of the W&B run
    sync: str = ""  # the command that uploads it
    models: tuple[tuple[str, str], ...] = ()  # (what it is, folder) of what pretrain and sft made


def page(name: str, results: Mapping[str, Results], places: Places, next_steps: Sequence[str] = ()) -> RenderableType:
    """The whole page, for rich to print. `results`: stage name -> what it left in the store."""
    parts = [
        Text(f"Run {name}", style="bold"),
        _stages(results),
        *_before_after(results.get("evaluate", {})),
        *_examples(results.get("evaluate", {})),
        *_written(results),
        *_underneath(results),
        _places(places),
    ]
    if next_steps:
        parts += [_title("What to do next"), *(Text(f"  {step}") for step in next_steps)]
    return Group(Text(""), *parts, Text(""))


def _stages(results: Mapping[str, Results]) -> RenderableType:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("stage", no_wrap=True)
    table.add_column("what it did")
    table.add_column("time", justify="right", no_wrap=True)
    sentences = {
        "pretrain": _pretrain,
        "sft": _sft,
        "sample": _sample,
        "rank": _rank,
        "reward": _reward,
        "ppo": _ppo,
        "evaluate": _evaluate,
    }
    for name, found in results.items():
        stage, round = of_key(name)
        sentence = sentences[stage](found) if stage in sentences and found else "It left no figures."
        table.add_row(Text(stage_label(stage, round), style="bold"), Text(sentence), _value(found, "time_s", duration))
    return Padding(table, (1, 0, 0, 0))


def _pretrain(found: Results) -> str:
    return (
        f"A model learned to continue text: {_value(found, 'num_tokens', _count)} tokens in "
        f"{_value(found, 'num_steps', _count)} steps, of a corpus of {_value(found, 'num_documents', _count)} "
        f"documents and {_value(found, 'num_corpus_tokens', _count)} tokens. Held-out "
        f"bits per byte: {_value(found, 'first_bits_per_byte', _fine)} at the first look, "
        f"{_value(found, 'bits_per_byte', _fine)} at the end."
    )


def _sft(found: Results) -> str:
    return (
        f"The model learned to answer from {_value(found, 'num_texts', _count)} conversations in "
        f"{_value(found, 'num_steps', _count)} steps. Held-out loss, nats a token: "
        f"{_value(found, 'first_held_out_loss', _fine)} at the first look, "
        f"{_value(found, 'held_out_loss', _fine)} at the end."
    )


def _sample(found: Results) -> str:
    writer = "newest policy" if found.get("round") else "starting model"
    return (
        f"The {writer} answered {_value(found, 'num_prompts', _count)} prompts: "
        f"{_value(found, 'num_answers', _count)} answers, {_value(found, 'num_tokens', _count)} tokens, "
        f"{_value(found, 'tokens_per_s', _rounded)} tokens/s. "
        f"{_value(found, 'ended_ratio', share)} of the answers ended by themselves; the others were cut."
    )


def _rank(found: Results) -> str:
    if found.get("judge") == "people":
        return (
            f"{_value(found, 'num_people', _count)} people gave {_value(found, 'num_rankings', _count)} rankings, "
            f"which became one for each of {_value(found, 'num_groups', _count)} prompts. Left out: "
            f"{_value(found, 'num_disagreed', _count)} on which they agreed too little, "
            f"{_value(found, 'num_closed', _count)} that too many skipped. Kendall's tau between two people "
            f"{_value(found, 'agreement_tau', _signed)}, Krippendorff's alpha "
            f"{_value(found, 'agreement_alpha', _signed)}."
        )
    return (
        f"The judge ({_value(found, 'judge', str)}) ranked the answers of {_value(found, 'num_groups', _count)} "
        f"prompts. One big tie, which teaches nothing: {_value(found, 'num_tied_groups', _count)} of them."
    )


def _reward(found: Results) -> str:
    interval = f"95% interval {_interval(found, 'accuracy')}; guessing gives 50%"
    return (
        f"A reward model learned the rankings of {_value(found, 'num_train', _count)} prompts. Of two answers it finds "
        f"the better one in {_value(found, 'accuracy', share)} of the pairs of {_value(found, 'num_held_out', _count)} "
        f"prompts that it did not see ({interval}). Kendall's tau {_value(found, 'tau', _signed)} "
        "(1: the judge's order, 0: unrelated)."
    )


def _ppo(found: Results) -> str:
    def from_to(key: str, form: str) -> str:
        first, last = (
            _value(_inner(found, side), key, lambda number: format(number, form)) for side in ("first", "last")
        )
        return f"{first} -> {last}"

    return (
        f"{_value(found, 'num_steps', _count)} steps, first -> last: score {from_to('objective/scores', '+.2f')} "
        f"(what PPO was told to raise), KL {from_to('objective/kl', '.2f')} nats an answer (how far the policy is from "
        f"its start), length {from_to('completions/mean_length', '.0f')} tokens."
    )


def _evaluate(found: Results) -> str:
    return (
        f"Before and after answered {_value(found, 'num_prompts', _count)} held-out prompts, on which no stage "
        f"trained; the judge ({_value(found, 'judge', str)}) compared them."
    )


_ROWS = (
    ("judge_score", "judge's score, sampled", "+.3f", "mean over the ten answers; higher is better"),
    ("greedy_judge_score", "judge's score, greedy", "+.3f", "of the one most likely answer; higher is better"),
    (
        "reward_score",
        "reward model's score",
        "+.3f",
        "learned of rankings; 0 and spread 1 on the first answers",
    ),
    ("kl", "KL to the start", ".2f", "nats an answer: how far the policy moved away"),
    ("mean_length", "mean length", ".1f", "tokens an answer"),
    ("ended_ratio", "ended by itself", ".1%", "share of answers that were not cut at the limit"),
    ("bits_per_byte", "bits per byte", ".4f", "on general text: higher means that something was forgotten"),
)


def _before_after(found: Results) -> Iterator[RenderableType]:
    before, after = _inner(found, "before"), _inner(found, "after")
    if not before and not after:
        return
    yield _title(f"Before and after PPO, on {_value(found, 'num_prompts', _count)} held-out prompts")
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("figure", no_wrap=True)
    table.add_column("before", justify="right", no_wrap=True)
    table.add_column("after", justify="right", no_wrap=True)
    table.add_column("what it means", style="dim")
    for key, label, form, meaning in _ROWS:
        if key in before or key in after:
            cells = [_value(side, key, lambda number, form=form: format(number, form)) for side in (before, after)]
            table.add_row(label, *cells, meaning)
    yield Padding(table, (0, 0, 0, 2))
    yield from _verdict(found)


def _verdict(found: Results) -> Iterator[RenderableType]:
    if "win_rate" in found:
        low, high = _number(found, "win_rate_low"), _number(found, "win_rate_high")
        clearly = "no clear difference"
        if low is not None and low > 0.5:
            clearly = "clearly better"
        elif high is not None and high < 0.5:
            clearly = "clearly worse"
        yield Text(
            f"\n  Win rate of after against before: {_value(found, 'win_rate', share)}, 95% interval "
            f"{_interval(found, 'win_rate')}: {clearly}.",
            style="bold",
        )
        yield Text("  50% is no difference; a tie counts half; the interval is a bootstrap over prompts.", style="dim")
    if "judge_trained_on" in found:
        judge = _value(found, "judge", str)
        yield Text(
            f"  PPO was trained on this judge ({judge}), so its verdict is no independent proof."
            if found["judge_trained_on"]
            else f"  PPO never saw this judge ({judge})."
            + (" Its rankings trained the reward model that PPO followed." if found.get("judge_ranked") else "")
        )


def _examples(found: Results) -> Iterator[RenderableType]:
    examples = cast(Sequence[Results], found.get("examples") or ())
    if not examples:
        return
    yield _title("Answers to held-out prompts, greedy")
    for example in examples:
        yield Text(f"\n  prompt  {_clipped(example, 'prompt')}", style="bold")
        for side in ("before", "after"):
            yield Padding(
                Text(f"{side:<7} {_clipped(example, side)}", style="dim" if side == "before" else ""), (0, 0, 0, 2)
            )


def _written(results: Mapping[str, Results]) -> Iterator[RenderableType]:
    """What the models wrote at the end of the stages that made them, where nothing later is shown."""
    if "evaluate" in results:
        return
    for stage in ("pretrain", "sft"):
        samples = cast(Sequence[Sequence[str]], results.get(stage, {}).get("samples") or ())
        if samples:
            yield _title(f"Written at the end of {stage}")
        for given, written in samples:
            example = {"given": given, "written": written}
            yield Text(f"\n  given   {_clipped(example, 'given')}", style="bold")
            yield Padding(Text(f"written {_clipped(example, 'written')}"), (0, 0, 0, 2))


def _underneath(results: Mapping[str, Results]) -> Iterator[RenderableType]:
    ppo = results.get("ppo", {})
    lines: list[str] = []
    if "gap_mean" in ppo:
        lines.append(
            f"trainer and engine differ by {_value(ppo, 'gap_mean', _small)} nats a token on average, "
            f"{_value(ppo, 'gap_max', _small)} at most (0 would be the same model, bit for bit)"
        )
    if "staleness" in ppo:
        lines.append(
            f"the policy was {_value(ppo, 'staleness', _small)} updates ahead of its answers on average, since they "
            "were written while it trained; that is in the difference, too"
        )
    if "sync_share" in ppo:
        lines.append(f"bringing the adapter to the engine took {_value(ppo, 'sync_share', share)} of a step")
    if "save_share" in ppo:
        lines.append(f"saving checkpoints took {_value(ppo, 'save_share', share)} of a step")
    times = {name: value for name in _inner(ppo, "times") if (value := _number(_inner(ppo, "times"), name)) is not None}
    whole = times.pop("step", 0.0) or sum(times.values())
    if whole:
        spent = sorted(times.items(), key=lambda item: -item[1])
        lines.append("time of a step: " + ", ".join(f"{name} {share(value / whole)}" for name, value in spent))
    peaks = [peak for found in results.values() if (peak := _number(found, "peak_memory_gib")) is not None]
    if peaks:
        lines.append(f"peak memory of all processes together: {max(peaks):.1f} GiB (summed PSS)")
    if lines:
        yield _title("Underneath")
        yield from (Padding(Text(line), (0, 0, 0, 2)) for line in lines)


def _places(places: Places) -> RenderableType:
    grid = Table.grid(padding=(0, 2))
    named = {
        "run folder": places.run,
        **dict(places.models),
        "policy adapter": places.adapter,
        "W&B run": places.tracker,
        "upload it": places.sync,
    }
    for label, where in named.items():
        if where:
            grid.add_row(f"  {label}", Text(where, overflow="fold"))
    return Group(_title("Where things are"), grid)


def _title(text: str) -> Text:
    return Text(f"\n{text}", style="bold")


def _inner(found: Results, key: str) -> Results:
    inner = found.get(key)
    return cast(Results, inner) if isinstance(inner, Mapping) else {}


def _number(found: Results, key: str) -> float | None:
    value = found.get(key)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _value(found: Results, key: str, say: object) -> str:
    """The value in words, or a dash where the stage left none."""
    if say is str:
        return str(found.get(key, ABSENT))
    number = _number(found, key)
    return ABSENT if number is None else say(number)  # type: ignore[operator]


def _interval(found: Results, key: str) -> str:
    return f"{_value(found, f'{key}_low', share)} to {_value(found, f'{key}_high', share)}"


def _clipped(example: Results, key: str) -> str:
    words = " ".join(str(example.get(key, ABSENT)).split())
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in words)  # a terminal obeys the others
    return text if len(text) <= EXAMPLE_CHARACTERS else f"{text[:EXAMPLE_CHARACTERS]} …"


def _count(number: float) -> str:
    return f"{number:,.0f}"


def _rounded(number: float) -> str:
    return f"{number:,.0f}"


def _signed(number: float) -> str:
    return f"{number:+.2f}"


def _fine(number: float) -> str:
    return f"{number:.4f}"


def _small(number: float) -> str:
    return f"{number:.2g}"
