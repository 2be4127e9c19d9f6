"""One PPO step of ours against one GRPO step of TRL, on the same work: seconds by phase and peak memory.

    python -m benchmarks.step --model FOLDER                   (in the repository's root)

Both sides train SmolLM2-135M or another small model with LoRA on all linear layers: 4 prompts, 10 answers each, every
answer forced to its full length, group-normalised scores by a rule, KL to the reference in the loss (k3, β = 0.05),
one optimizer step. Ours is the stage `ppo` itself on Ray, with vLLM and DeepSpeed; TRL's is GRPOTrainer with
generation by transformers, in a virtual environment of its own that is made first. Dtype, threads and prompts are the
same. It runs on the CPU, also where there is a GPU. benchmarks/README.md explains the numbers.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.full_length import FULL_LENGTH
from benchmarks.trl_venv import make_venv, python_of, started, wait_for
from cluster.console import LineConsole
from cluster.memory import PeakMemory
from cluster.ray_session import RaySession
from cluster.run import run, termination_interrupts
from cluster.team import RayTeam
from configs.schema import Recipe
from rlhf.chat import ChatTokenizer
from rlhf.ports import Console, Team
from rlhf.records import Message, Prompt

SIDES = ("ours", "TRL")
PHASES = ("generation", "reference and score", "forward, backward, optimizer", "sync", "total")
MEMORY = "peak memory"
BETA, LR, SEED = 0.05, 1e-5, 0
QUESTIONS = ("What is a compiler?", "Who wrote Hamlet?", "How do planes fly?", "What is RAM?", "Why is the sea salty?")
FILLER = (
    "Please answer for a reader who has never heard of it, in plain words and in whole sentences. Begin with what it "
    "is, go on with where it came from and who first thought of it, and end with one example from daily life that a "
    "child would know. Leave out lists, numbers and names that are not needed, and say so where people disagree."
)
Measured = dict[str, float]  # seconds of each phase, GiB of MEMORY; of ours also what the step says of sync and workers


def main(argv: Sequence[str] | None = None) -> None:
    """Prints a table per prompt length; writes all of it as JSON too where `--json` says."""
    options = _parse(argv)
    os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    if "TRL" in options.sides:
        make_venv(options.venv)
    chat = ChatTokenizer(str(options.model))
    report: list[dict[str, Any]] = []
    for prompt_tokens in options.prompt_tokens:
        prompts = make_prompts(chat, prompt_tokens, options.prompts)
        runs = measure(options, prompts)
        lengths = [len(prompt.token_ids) for prompt in prompts]
        report.append({"prompt_tokens": lengths, "runs": runs, "medians": medians(runs)})
        print(table(options, report[-1]), flush=True)
    if options.json:
        shown = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
        options.json.write_text(json.dumps({"options": shown, "measured": report}, indent=2) + "\n")


def measure(options: argparse.Namespace, prompts: list[Prompt]) -> dict[str, list[Measured]]:
    """One measured step per repeat and side, each from fresh processes; the order alternates."""
    runs: dict[str, list[Measured]] = {side: [] for side in SIDES if side in options.sides}
    sides = {"ours": measure_ours, "TRL": measure_trl}
    for repeat in range(options.repeats):
        for side in list(runs)[:: 1 if repeat % 2 == 0 else -1]:
            print(f"repeat {repeat + 1}: {side}", flush=True)
            with tempfile.TemporaryDirectory(prefix="tenfold-step-") as folder:
                measured = sides[side](options, prompts, Path(folder))
            runs[side].append(measured)
            print("  " + ", ".join(f"{phase} {measured[phase]:.2f} s" for phase in PHASES if phase in measured))
    return runs


def measure_ours(options: argparse.Namespace, prompts: list[Prompt], folder: Path) -> Measured:
    """The second step of the stage `ppo`. The first warms up, and has no adapter yet that generation must apply."""
    outcome = run(make_recipe(options, prompts, folder), LineConsole(), make_team=full_length_team)
    lines = (Path(outcome.places.run) / "metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    mean = last["completions/mean_length"]
    assert mean == options.answer_tokens, f"answers of {mean} tokens on average"
    names = ("generate", "score", "update", "sync", "step")
    seconds = {phase: last[f"time/{name}"] for phase, name in zip(PHASES, names, strict=True)}
    peak = outcome.results["ppo"]["peak_memory_gib"]
    assert isinstance(peak, float)
    details = {name: value for name, value in last.items() if name.startswith(("sync/", "memory/"))}
    return details | seconds | {MEMORY: peak}


@contextmanager
def full_length_team(recipe: Recipe, console: Console) -> Iterator[Team]:
    """The usual team, whose generator writes answers of full length."""
    with (
        RaySession(recipe.cluster) as session,
        RayTeam(recipe, console, session.resources, factories=FULL_LENGTH) as team,
    ):
        yield team


def make_recipe(options: argparse.Namespace, prompts: list[Prompt], folder: Path) -> Recipe:
    """The work as a recipe of two steps over these prompts, its run in `folder`."""
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt.messages[0].content}) + "\n" for prompt in prompts))
    return Recipe.model_validate(
        {
            "name": "step",
            "seed": SEED,
            "runs": str(folder / "runs"),
            "stages": ["ppo"],
            "model": {"path": str(options.model), "dtype": options.dtype},
            "data": {
                "prompts": str(file),
                "held_out": 0.0,
                "max_prompt_tokens": max(len(prompt.token_ids) for prompt in prompts),
            },
            "sampling": {"n": options.answers, "max_answer_tokens": options.answer_tokens},
            "lora": {"rank": options.rank, "alpha": 2 * options.rank},
            "learner": {"micro_batch_tokens": options.micro_batch_tokens},
            "generator": {"kv_cache_gib": options.kv_cache_gib},
            "rules": [{"name": "short"}],
            "ppo": {
                "num_steps": 2,
                "num_prompts": len(prompts),
                "score": "rules",
                "advantage": "group",
                "kl": {"beta": BETA, "where": "loss", "estimator": "k3"},
                "optimizer": {"lr": LR},
            },
            "cluster": {"placement": "shared", "threads": options.threads},
            "tracker": {"mode": "disabled"},
        }
    )


def measure_trl(options: argparse.Namespace, prompts: list[Prompt], folder: Path) -> Measured:
    """The last step of GRPOTrainer in a process of its own, watched from here."""
    result = folder / "result.json"
    work = {
        "model": str(options.model),
        "dtype": options.dtype,
        "threads": options.threads,
        "prompts": [
            {
                "messages": [{"role": message.role, "content": message.content} for message in prompt.messages],
                "token_ids": list(prompt.token_ids),
            }
            for prompt in prompts
        ],
        "answers": options.answers,
        "answer_tokens": options.answer_tokens,
        "rank": options.rank,
        "beta": BETA,
        "lr": LR,
        "seed": SEED,
        "steps": 2 if options.full_warm_up else 1,
        "result": str(result),
    }
    (folder / "work.json").write_text(json.dumps(work))
    script = Path(__file__).with_name("trl_step.py")
    command = [python_of(options.venv), script, folder / "work.json"]
    with started(command, options.threads) as process, PeakMemory(process.pid) as memory:
        wait_for(process, "TRL")
    return json.loads(result.read_text()) | {MEMORY: memory.peak_gib}


def make_prompts(chat: ChatTokenizer, num_tokens: int, num: int) -> list[Prompt]:
    """`num` different prompts of exactly `num_tokens` tokens with the chat template: none needs padding."""
    return [_prompt(chat, QUESTIONS[index % len(QUESTIONS)], 7 * index, num_tokens) for index in range(num)]


def _prompt(chat: ChatTokenizer, text: str, start: int, num_tokens: int) -> Prompt:
    """The question, then filler from its word number `start` on; where the next word is too long, another one."""
    filler = FILLER.split()
    prompt = chat.prompt((Message("user", text),))
    for number in itertools.count(start):
        if len(prompt.token_ids) >= num_tokens:
            break
        turned = [filler[(number + offset) % len(filler)] for offset in range(len(filler))]
        texts = [*(f"{prompt.text} {word}" for word in turned), f"{prompt.text}!"]
        longer = (chat.prompt((Message("user", one),)) for one in texts)
        fits = (one for one in longer if len(prompt.token_ids) < len(one.token_ids) <= num_tokens)
        prompt = next(fits, None) or sys.exit(f"--prompt-tokens {num_tokens}: no words were found that make so many.")
    if len(prompt.token_ids) > num_tokens:
        sys.exit(
            f"--prompt-tokens {num_tokens}: with the chat template a question alone takes {len(prompt.token_ids)}."
        )
    return prompt


def medians(runs: dict[str, list[Measured]]) -> dict[str, Measured]:
    """Of each phase and of the memory, by side."""
    return {
        side: {name: statistics.median(one[name] for one in measured) for name in measured[0]}
        for side, measured in runs.items()
    }


def table(options: argparse.Namespace, part: dict[str, Any]) -> str:
    """The medians of one prompt length, ours beside TRL's, and how many times ours TRL's is."""
    lengths, middle = part["prompt_tokens"], part["medians"]
    num = len(lengths) * options.answers * options.answer_tokens
    lines = [
        "",
        f"{len(lengths)} prompts of {lengths[0]} tokens, {options.answers} answers each of {options.answer_tokens} "
        f"tokens, {num} answer tokens in all; {options.dtype}, "
        f"{options.threads} threads, median of {options.repeats}",
        f"{'':30}" + "".join(f"{side:>12}" for side in middle) + f"{'TRL / ours':>12}",
    ]
    for name in (*PHASES, MEMORY):
        unit = "GiB" if name == MEMORY else "s"
        values = [of_side.get(name) for of_side in middle.values()]
        cells = "".join(f"{'—':>12}" if value is None else f"{f'{value:.2f} {unit}':>12}" for value in values)
        known = [value for value in values if value is not None]
        ratio = f"{known[1] / known[0]:12.2f}" if len(known) == 2 else f"{'—':>12}"
        lines.append(f"{name:30}{cells}{ratio}")
    return "\n".join(lines) + "\n"


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path, help="folder of a causal LM in Hugging Face layout")
    parser.add_argument("--venv", type=Path, default=Path(".venv-trl"), help="TRL's; made if it is not there")
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument("--prompt-tokens", nargs="+", type=int, default=[44, 253], help="with the chat template")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--answers", type=int, default=10, help="per prompt; also TRL's micro-batch")
    parser.add_argument("--answer-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=1, help="of both sides, from fresh processes")
    parser.add_argument("--full-warm-up", action="store_true", help="a whole step for TRL too before the measured one")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--micro-batch-tokens", type=int, default=1024, help="ours")
    parser.add_argument("--kv-cache-gib", type=float, default=0.5, help="ours")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="a file for all numbers")
    return parser.parse_args(argv)


if __name__ == "__main__":
    with termination_interrupts():  # so that TRL's process and Ray's end with this one
        main()
