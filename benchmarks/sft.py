"""Training tokens per second of SFT, ours beside TRL's SFTTrainer, on the same work; peak memory too.

    python -m benchmarks.sft --model FOLDER [--method lora|full|both] [--json FILE]      (in the repository's root)

Both sides align SmolLM2-135M or another small model on the same question-answer pairs, with LoRA on all linear layers
and as a whole: the same token ids in the same order of batches, loss on the answers alone, the same texts in each
optimizer step and each forward pass, AdamW with the same settings, float32, no gradient checkpointing, no evaluation,
no saving. Ours is the loop of the stage `sft` with its learner (DeepSpeed), in one process without Ray; TRL's is
SFTTrainer, in the virtual environment that benchmarks/step.py uses too. Each run is a process of its own: ours, TRL,
ours, TRL. It runs on the CPU, also where there is a GPU.

Three layouts. `unpacked`: TRL pads a batch to its longest text; ours lays the same texts behind one another, as it
always does. `even`: the same over texts of nearly one length, where TRL has next to nothing to pad. `packed`: passes
filled to `--packed-tokens`, in ours by more texts in a step, in TRL by `packing=True`, which chooses a row's texts
itself.

The first pair of runs is the check (and each pair after it): trained parameters, tokens and learned tokens of every
step must be equal, and the loss of the first step, which is printed, within a thousandth. If not, there is no
comparison and the script ends. In `packed` our first loss is held against TRL's for the same texts one by one, and
TRL's first row against its own texts one by one: where those differ, its attention mixes texts, which is said.

Printed is, for each method and layout, the median over runs of tokens/s (padding counts for neither side, the first
`--warm-up` steps are left out), the highest memory of the process, the ratio of medians, and the ratio of each pair.
With the defaults it takes about two hours on two cores; `--layouts even --repeats 1 --steps 4` for a quick look.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.sft_work import DTYPE, Work, make_work
from benchmarks.trl_venv import Failed, make_venv, python_of, started, wait_for
from cluster.run import termination_interrupts

SIDES = ("ours", "TRL")
METHODS = ("lora", "full")
LAYOUTS = ("unpacked", "even", "packed")
DATA = "chatterbot:ai,coding,computers,conversations,emotion,humor,literature,money,psychology,science,sports,trivia"
TOLERANCE = 1e-3  # of losses, relative
QUIET = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
Run = dict[str, Any]  # what a process measured: seconds, losses and tokens of each step, its peak memory
Runs = dict[str, list[Run]]  # by side


def main(argv: Sequence[str] | None = None) -> None:
    """Prints a table per method; writes all of it as JSON too where `--json` says."""
    options = _parse(argv)
    os.environ |= QUIET
    make_venv(options.venv)
    report: list[dict[str, Any]] = []
    for method in METHODS if options.method == "both" else (options.method,):
        with tempfile.TemporaryDirectory(prefix="tenfold-sft-") as folder:
            parts = [measure(options, method, layout, Path(folder)) for layout in options.layouts]
        print(table(options, method, parts), flush=True)
        report += parts
    if options.json:
        shown = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
        options.json.write_text(json.dumps({"options": shown, "measured": report}, indent=2) + "\n")


def measure(options: argparse.Namespace, method: str, layout: str, folder: Path) -> dict[str, Any]:
    """The runs of one method in one layout, and what follows from them."""
    work = make_work(options, method, layout, folder)
    runs: Runs = {side: [] for side in SIDES}
    for repeat in range(options.repeats):
        for side in tuple(runs):
            print(f"{method}, {layout}, repeat {repeat + 1}: {side}", flush=True)
            try:
                runs[side].append(run_side(options, work, side, folder))
            except Failed:
                if side == "ours" or not work.is_packed:
                    raise
                print("TRL's packing does not run here (what it said is above), so ours is measured alone.")
                del runs[side]
        if len(runs) == len(SIDES):
            check(work, runs["ours"][-1], runs["TRL"][-1])
    return {
        "method": method,
        "layout": layout,
        "texts_per_step": work.recipe.sft.batch_texts,
        "tokens_per_step": statistics.mean(work.num_tokens),
        "runs": runs,
        **summary(runs, options.warm_up),
    }


def run_side(options: argparse.Namespace, work: Work, side: str, folder: Path) -> Run:
    """What one side measured in a process of its own. Raises Failed."""
    file, result = folder / "work.json", folder / "result.json"
    result.unlink(missing_ok=True)
    if side == "ours":
        given, command = work.for_ours(), [sys.executable, "-m", "benchmarks.our_sft"]
    else:
        script = Path(__file__).with_name("trl_sft.py")
        given, command = work.for_trl(), [str(python_of(options.venv)), str(script)]
    file.write_text(json.dumps(given | {"result": str(result)}))
    with started([*command, file], options.threads) as process:
        wait_for(process, side)
    return json.loads(result.read_text())


def check(work: Work, ours: Run, trl: Run) -> None:
    """Prints the loss of the first step on both sides; ends the script where they did not do the same work."""
    wrong: list[str] = []
    if ours["num_trained"] != trl["num_trained"]:
        wrong.append(f"ours trains {ours['num_trained']:,} parameters, TRL {trl['num_trained']:,}")
    if ours["tokens"] != work.num_tokens:
        wrong.append(f"ours had {ours['tokens']} tokens in its steps where {work.num_tokens} were given")
    if not work.is_packed and (trl["tokens"], trl["targets"]) != (work.num_tokens, work.num_targets):
        wrong.append(
            f"TRL had {trl['tokens']} tokens in its steps, {trl['targets']} of them learned, where {work.num_tokens} "
            f"and {work.num_targets} were given"
        )
    mine, theirs = ours["losses"][0], trl["first_loss"] if work.is_packed else trl["losses"][0]
    what = "loss of our first step, and TRL's of the same texts one by one" if work.is_packed else "first loss"
    print(f"  {what}: ours {mine:.6f}, TRL {theirs:.6f}, {_apart(mine, theirs):.1e} apart", flush=True)
    if not _apart(mine, theirs) <= TOLERANCE:
        wrong.append(f"the losses are more than {TOLERANCE:g} apart")
    if work.is_packed:
        print(f"  {crosstalk(trl)}", flush=True)
    else:
        mine, theirs = ours["losses"][-1], trl["losses"][-1]
        print(f"  last loss: ours {mine:.6f}, TRL {theirs:.6f} (LoRA starts from other random matrices)", flush=True)
    if wrong:
        sys.exit(f"No comparison, the work is not the same: {'; '.join(wrong)}.")


def crosstalk(trl: Run) -> str:
    """Whether TRL's packed rows keep their texts apart, in words."""
    packed, alone = trl["row_loss"], trl["row_loss_apart"]
    found = f"its first row costs {packed:.6f} nats a token, the same texts one by one {alone:.6f}"
    if _apart(packed, alone) <= TOLERANCE:
        return f"TRL's packed rows keep texts apart ({found}; attention: {trl['attention']})."
    return (
        f"TRL's packed rows mix texts here ({found}): with the attention {trl['attention']} a text sees those before "
        "it. It needs flash attention, which wants a GPU; its packed speed is that of other work."
    )


def speed(run: Run, warm_up: int) -> float:
    """Tokens per second after the first steps; padding does not count."""
    return sum(run["tokens"][warm_up:]) / sum(run["seconds"][warm_up:])


def summary(runs: Runs, warm_up: int) -> dict[str, Any]:
    """Speeds, medians and the highest memory by side; how many times TRL's speed ours is, by pair and in the middle."""
    speeds = {side: [speed(run, warm_up) for run in of_side] for side, of_side in runs.items()}
    middle = {side: statistics.median(of_side) for side, of_side in speeds.items()}
    found: dict[str, Any] = {
        "tokens_per_s": speeds,
        "median_tokens_per_s": middle,
        "peak_gib": {side: max(run["peak_gib"] for run in of_side) for side, of_side in runs.items()},
    }
    if "TRL" in runs:
        found["ratio"] = middle["ours"] / middle["TRL"]
        found["pairs"] = [ours / trl for ours, trl in zip(speeds["ours"], speeds["TRL"], strict=True)]
        found["padding"] = 1 - sum(runs["TRL"][0]["tokens"]) / sum(runs["TRL"][0]["padded_tokens"])
    return found


def table(options: argparse.Namespace, method: str, parts: Sequence[dict[str, Any]]) -> str:
    """Speed and memory of one method in each layout, ours beside TRL's."""
    lines = [
        "",
        f"{method}: {DTYPE}, {options.threads} threads, {options.steps} steps of which the first "
        f"{options.warm_up} do not count, median of {options.repeats} runs",
        f"{'':26}" + "".join(f"{side:>12}" for side in SIDES) + f"{'ours / TRL':>12}   of each pair",
    ]
    notes: list[str] = []
    for part in parts:
        layout, middle, peaks = part["layout"], part["median_tokens_per_s"], part["peak_gib"]
        pairs = "   " + " ".join(f"{ratio:.2f}" for ratio in part["pairs"]) if "pairs" in part else ""
        lines.append(_row(f"{layout}, tokens/s", middle, ".1f") + pairs)
        lines.append(_row(f"{layout}, peak GiB", peaks, ".2f"))
        note = f"{layout}: {part['texts_per_step']} texts and {part['tokens_per_step']:.0f} tokens in a step of ours"
        if "TRL" in middle:
            trl = part["runs"]["TRL"][0]
            note += (
                f"; TRL: {statistics.mean(trl['tokens']):.0f} tokens, {part['padding']:.0%} of its positions are "
                f"padding; {trl['optimizer']}, loss {trl['loss_type']}, attention {trl['attention']}"
            )
            if "row_loss" in trl:
                note += f". {crosstalk(trl)}"
        notes.append(note)
    by_layout = {part["layout"]: part["median_tokens_per_s"] for part in parts}
    if {"packed", "unpacked"} <= set(by_layout):
        gains = [
            f"{side} {by_layout['packed'][side] / by_layout['unpacked'][side]:.2f}"
            for side in SIDES
            if side in by_layout["packed"]
        ]
        notes.append(f"packed / unpacked: {', '.join(gains)}")
    return "\n".join([*lines, *notes]) + "\n"


def _row(name: str, values: dict[str, float], form: str) -> str:
    cells = "".join(f"{format(values[side], form) if side in values else '—':>12}" for side in SIDES)
    ratio = f"{values['ours'] / values['TRL']:.2f}" if "TRL" in values else "—"
    return f"{name:26}{cells}{ratio:>12}"


def _apart(a: float, b: float) -> float:
    return abs(a - b) / max(abs(a), abs(b))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path, help="folder of a chat model in Hugging Face layout")
    parser.add_argument("--venv", type=Path, default=Path(".venv-trl"), help="TRL's; made if it is not there")
    parser.add_argument("--method", default="both", choices=[*METHODS, "both"])
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=LAYOUTS)
    parser.add_argument(
        "--data",
        default=DATA,
        help="a file of conversations as the stage sft takes, or parts of the package chatterbot-corpus",
    )
    parser.add_argument("--texts", type=int, default=16, help="in a step and its forward pass, unless packed")
    parser.add_argument("--packed-tokens", type=int, default=2048, help="that a forward pass is filled to, packed")
    parser.add_argument("--max-text-tokens", type=int, default=128, help="longer texts are left out")
    parser.add_argument("--steps", type=int, default=10, help="of each run, the warm-up among them")
    parser.add_argument("--warm-up", type=int, default=2, help="first steps that do not count")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each side")
    parser.add_argument("--rank", type=int, default=16, help="of LoRA; alpha is twice as much")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="a file for all numbers")
    options = parser.parse_args(argv)
    if not 0 <= options.warm_up < options.steps:
        parser.error(f"--warm-up {options.warm_up} leaves no step of --steps {options.steps} to measure")
    return options


if __name__ == "__main__":
    with termination_interrupts():  # so that the process of a run ends with this one
        main()
