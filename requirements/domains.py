"""Makes the data of the two domain adapters, once: `data/domains/`.

Run as `.venv/bin/python -m requirements.domains`. Sums come from reasoning-gym, notes about made-up places from
requirements/notes.py; of each there are pairs for SFT, prompts for PPO, and test prompts, which share no sum and no
place. All of it hangs on seeds alone. A second run that finds everything in place ends at once; one after a change
of what the data is made of makes the files again.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from requirements.install import ROOT
from requirements.poems import write
from requirements.steps import StepFailed, exit_code, say

DATA = ROOT / "data" / "domains"
STAMP = DATA / "made.stamp"
STYLE_RECIPE = ROOT / "configs" / "recipes" / "domain_style.yaml"
MADE_OF = ("requirements/domains.py", "requirements/notes.py", "rlhf/notes.py", "configs/recipes/domain_style.yaml")
SEED = 0
TASK: Mapping[str, Any] = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}  # of chain_sum
NUM_SUMS = 10_000  # that are drawn; some 4,500 of them differ
SUMS = {"test": 100, "prompts": 320, "pairs": 3_200}
NOTES = {"test": 100, "prompts": 160, "pairs": 800}

Item = TypeVar("Item")
Entry = dict[str, Any]  # of reasoning-gym: question, answer, metadata


def main() -> int:
    """The exit code: 0, or 1 with the failed step printed."""
    if STAMP.exists() and STAMP.read_text() == stamp():
        return 0
    return exit_code(make, DATA)


def make() -> None:
    """Writes all files, none before all rows are made. Raises StepFailed and OSError."""
    step = "Making the data of the domain adapters"
    say(f"{step} ...")
    try:
        rows = {DATA / f"arithmetic_{use}.jsonl": found for use, found in arithmetic_rows(sums()).items()}
        rows |= {DATA / f"style_{use}.jsonl": found for use, found in style_rows().items()}
    except ImportError as error:
        raise StepFailed(step, str(error), "Run `make setup`, then the same command again.") from error
    DATA.mkdir(parents=True, exist_ok=True)
    write(rows)
    STAMP.write_text(stamp())
    for path, made in rows.items():
        say(f"  {path.relative_to(ROOT)}: {len(made)} rows")


def sums() -> list[Entry]:
    """Sums and differences of two small numbers, some of them several times, with their answers."""
    import reasoning_gym

    return list(reasoning_gym.create_dataset("chain_sum", **TASK, seed=SEED, size=NUM_SUMS))


def arithmetic_rows(entries: Iterable[Entry], nums: Mapping[str, int] = SUMS) -> dict[str, list[dict[str, Any]]]:
    """The rows of each file; a prompt's row carries the whole entry, which its score is asked for."""
    shared = shared_out(entries, lambda entry: entry["question"], nums)
    return {
        use: [
            {"prompt": entry["question"], "completion": entry["answer"]}
            if use == "pairs"
            else {"prompt": entry["question"], "entry": entry}
            for entry in those
        ]
        for use, those in shared.items()
    }


def style_rows(nums: Mapping[str, int] = NOTES) -> dict[str, list[dict[str, Any]]]:
    """The rows of each file; of the cases only those whose answers the recipe's own rules find faultless."""
    from configs.load import load_recipe  # torch comes with the rules, and a run that finds everything needs none
    from requirements.notes import make_cases, pair_row, prompt_row
    from rlhf.records import Answer, AnswerGroup, Message, Prompt
    from rlhf.rules import RuleScorer

    cases = list(make_cases(SEED))
    groups: list[AnswerGroup] = []
    for case in cases:
        asked = (Message("system", case.passage), Message("user", case.question))
        answer = Answer((), (), "eos", 0, case.answer)
        groups.append(AnswerGroup(Prompt("", asked, (), {"fact": case.fact}), (answer,)))
    scores = RuleScorer(load_recipe(STYLE_RECIPE).rules).scores(groups).tolist()
    faultless = [case for case, score in zip(cases, scores, strict=True) if score == 1]
    shared = shared_out(faultless, lambda case: case.place, nums)
    return {use: [pair_row(c) if use == "pairs" else prompt_row(c) for c in those] for use, those in shared.items()}


def shared_out(items: Iterable[Item], key: Callable[[Item], str], nums: Mapping[str, int]) -> dict[str, Sequence[Item]]:
    """So many items for each use, no key twice, chosen by a hash of the key: the same whatever their order."""
    different: dict[str, Item] = {}
    for item in items:
        different.setdefault(key(item), item)
    ordered = sorted(different, key=lambda name: hashlib.sha256(name.encode()).digest())
    assert len(ordered) >= sum(nums.values()), f"{len(ordered)} different ones, {sum(nums.values())} are asked for"
    shared: dict[str, Sequence[Item]] = {}
    first = 0
    for use, num in nums.items():
        shared[use] = [different[name] for name in ordered[first : first + num]]
        first += num
    return shared


def stamp() -> str:
    """What names all that the files are made of."""
    return hashlib.sha256(b"".join((ROOT / name).read_bytes() for name in MADE_OF)).hexdigest() + "\n"


if __name__ == "__main__":
    sys.exit(main())
