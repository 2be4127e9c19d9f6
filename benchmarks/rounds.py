"""Whether a loop that learns from people's rankings alone gets better, and better again in its second round.

    python -m benchmarks.rounds [--seeds 0 1 2] [--folder runs/rounds] [--json FILE]      (in the repository's root)

Makes a small model by `tenfold run benchmarks/tales_sft.yaml` (pretraining and alignment). Then, for each seed, it runs
benchmarks/tales_rounds.yaml, two rounds of sample, rank, reward and ppo, and beside it `tenfold annotate`, where
scripted people rank by the rule of benchmarks/tales.py, with noise: they see what the page shows, and hand in what its
script would. The reward is the reward model alone. Nothing is chosen by seed.

Plain transformers and peft then load the aligned model and the policy of each round, which answer held-out prompts at
the recipe's temperature; the rule judges, without noise. Differences are paired by prompt, intervals of 95 % by
bootstrap over prompts.

Exits with 1 if for any seed the interval of round 2 less round 1 is not above 0, or if the page refused anybody
anything. Once more, it trains nothing again that is done, and measures anew; remove the folder to begin from nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.at_the_page import TENFOLD, two_rounds
from benchmarks.estimates import Estimate, estimate
from benchmarks.tales import rule, write_data
from benchmarks.writer import Writer
from cluster.run import termination_interrupts
from configs.load import load_recipe
from configs.schema import SamplingConfig
from requirements.steps import StepFailed, run, say
from rlhf.disk import write_file
from rlhf.kept_prompts import read_prompts
from rlhf.manifest import RECIPE, read_manifest
from rlhf.records import Prompt
from rlhf.seeds import shuffle_seed

HERE = Path(__file__).parent
WRITERS = ("aligned", "round 1", "round 2")
DIFFERENCES = (("round 1", "aligned"), ("round 2", "round 1"))
ANSWERS_EACH = 8  # to a held-out prompt
NUM_DOCUMENTS, PAIRS_EACH = 4000, 4
SOURCES = {"pretrain": "corpus", "sft": "pairs"}  # stage -> the file of tales that it reads
Scores = Mapping[str, torch.Tensor]  # writer -> [P], means over a prompt's answers


def main(argv: Sequence[str] | None = None) -> int:
    """0 if for each seed the second round is surely better than the first."""
    options = _parse(argv)
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)  # for a model of this size more wait for one another
    found: list[dict[str, Any]] = []
    try:
        aligned = make_aligned(options.folder)
        for seed in options.seeds:
            found.append(one_seed(seed, aligned, options))
            print(table(found), flush=True)
            if options.json:
                write_file(options.json, (json.dumps(found, ensure_ascii=False, indent=2) + "\n").encode())
    except StepFailed as error:
        say(str(error))
        return 1
    return int(not all(is_shown(row) for row in found))


def make_aligned(folder: Path) -> Path:
    """The folder of the model that all seeds begin with."""
    made, data = folder.resolve() / "aligned" / "models" / "sft", folder.resolve() / "data"
    if made.is_dir():
        say(f"{made}: done before")
        return made
    write_data(data, NUM_DOCUMENTS, PAIRS_EACH)
    sources = [f"{stage}.sources=[{{path: {data / name}.jsonl}}]" for stage, name in SOURCES.items()]
    command = [*TENFOLD, "run", HERE / "tales_sft.yaml", f"runs={folder}", *sources]
    run("Making the aligned model", command, log=folder / "aligned.log")
    return made


def one_seed(seed: int, aligned: Path, options: argparse.Namespace) -> dict[str, Any]:
    """All figures of a seed's run."""
    changes = [
        f"seed={seed}",
        f"model.path={aligned}",
        f"data.prompts={options.folder.resolve() / 'data'}/prompts.jsonl",
    ]
    folder = options.folder / f"seed-{seed}"
    trained = two_rounds(HERE / "tales_rounds.yaml", folder, changes, seed)
    began = time.perf_counter()
    recipe, prompts = load_recipe(folder / RECIPE), read_prompts(folder)
    assert prompts is not None
    asked = prompts.held_out[: options.prompts]
    adapters = {"aligned": None} | {f"round {n}": folder / "models" / f"policy-round-{n}" for n in (1, 2)}
    texts = {name: written(aligned, recipe.sampling, adapters[name], asked, seed) for name in WRITERS}
    scores = {name: torch.tensor([[s for _, s in of] for of in texts[name]]).mean(1) for name in WRITERS}
    stages = read_manifest(folder)["stages"]
    return {
        "seed": seed,
        "num_prompts": len(asked),
        "answers_each": ANSWERS_EACH,
        "scores": {name: asdict(estimate(scores[name], seed)) for name in WRITERS},
        "differences": {f"{a} - {b}": asdict(estimate(scores[a] - scores[b], seed)) for a, b in DIFFERENCES},
        "handed_in": trained["handed_in"],
        "people": {name: stages[name]["results"] for name in ("rank", "rank-1")},
        "reward": {name: stages[name]["results"] for name in ("reward", "reward-1")},
        "seconds": {"rounds": trained["seconds"], "judging": time.perf_counter() - began},
        "examples": {name: [asked[0].text, texts[name][0][0][0]] for name in WRITERS},
    }


def written(
    model: Path, sampling: SamplingConfig, adapter: Path | None, asked: Sequence[Prompt], seed: int
) -> list[list[tuple[str, float]]]:
    """The answers to each prompt, each with the rule's score. All writers draw from the same seed."""
    words = [prompt.messages[-1].content for prompt in asked]
    writer = Writer(model, sampling, adapter)
    ids = [prompt.token_ids for prompt in asked]
    texts = writer.write(words, ids, ANSWERS_EACH, shuffle_seed(seed, "rounds"))
    pairs = [(one.text, rule(one.prompt, one.text)) for one in texts]
    return [pairs[first : first + ANSWERS_EACH] for first in range(0, len(pairs), ANSWERS_EACH)]


def is_shown(row: Mapping[str, Any]) -> bool:
    """Whether the second round is surely better than the first."""
    return row["differences"]["round 2 - round 1"]["low"] > 0


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """What is printed: a line for each seed."""
    names = [f"{a} - {b}" for a, b in DIFFERENCES]
    lines = [
        f"\n{rows[0]['num_prompts']} held-out prompts, {rows[0]['answers_each']} answers each; the rule gives 0 to 1",
        f"seed {'':2}" + "".join(f"{name:>9}" for name in WRITERS) + "".join(f"{name:>27}" for name in names),
    ]
    for row in rows:
        means = "".join(f"{row['scores'][name]['mean']:9.3f}" for name in WRITERS)
        gains = "".join(f"{Estimate(**row['differences'][name])!s:>27}" for name in names)
        lines.append(f"{row['seed']:4} {'':2}{means}{gains}  {'shown' if is_shown(row) else 'NOT SHOWN'}")
    lines.append("seed  rankings, agreement (tau) and the reward model's held-out accuracy of rounds 1 and 2, time")
    for row in rows:
        of_people = ", ".join(f"{one['num_rankings']} ({one['agreement_tau']:.2f})" for one in row["people"].values())
        accuracy = ", ".join(f"{one['accuracy']:.2f}" for one in row["reward"].values())
        lines.append(f"{row['seed']:4}  {of_people}; {accuracy}; {row['seconds']['rounds']:.0f} s")
    return "\n".join(lines)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the runs")
    parser.add_argument("--folder", type=Path, default=Path("runs/rounds"), help="for data, runs and logs")
    parser.add_argument("--prompts", type=int, default=120, help="held-out prompts, at most some 120")
    parser.add_argument("--json", type=Path, help="a file for all numbers, written after each seed")
    return parser.parse_args(argv)


if __name__ == "__main__":
    with termination_interrupts():
        raise SystemExit(main())
