"""One update of one group of ten answers: shared rows against separate sequences.

    python benchmarks/rows.py --model FOLDER

An update is what PPO does to a policy once: forward, a clipped loss and backward over every micro-batch, then a step of
AdamW, on LoRA adapters of a frozen base. Modes alternate within a shape, so that a drifting machine is fair to both.
`auto` builds the very micro-batches of the mode it chooses, hence its time is that mode's.

On a machine that others use too, `--threads 1 --clock cpu` counts this process's own time instead of the wall's.
Memory is the process's peak above what it held before the update, on a GPU the allocator's peak likewise.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import peft
import torch
from transformers import AutoModelForCausalLM

from rlhf.forward import token_logprobs
from rlhf.records import Answer, AnswerGroup, Prompt
from rlhf.rows import MicroBatch, choose_rows, make_micro_batches

NUM_ANSWERS = 10
MODES = ("shared", "separate")
Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Measured:
    """One shape in one mode."""

    prompt_tokens: int
    answer_tokens: int
    rows: str
    num_tokens: int  # of the forward pass
    num_micro_batches: int
    seconds: float  # median
    spread_s: float  # slowest minus fastest
    peak_gib: float  # the highest of all repeats
    auto: bool  # what `auto` chooses
    to_faster: float  # seconds / the faster mode's


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table; writes it as JSON too where `--json` says."""
    options = _parse(argv)
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype))
    adapters = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, adapters).to(device)
    update(model, make_micro_batches([make_group(8, 8, 100)], rows="shared", max_tokens=options.max_tokens))  # warm up
    rows = list[Measured]()
    print(HEAD, flush=True)
    for prompt_tokens in options.prompts:
        for answer_tokens in options.answers:
            group = make_group(prompt_tokens, answer_tokens, base.config.vocab_size)
            measured = measure(model, group, options.max_tokens, options.repeats, CLOCKS[options.clock])
            rows += measured
            print("\n".join(line(one) for one in measured), flush=True)
    worst = max(one.to_faster for one in rows if one.auto)
    print(f"auto: at most {worst - 1:.1%} slower than the faster mode")
    if options.json:
        options.json.write_text(json.dumps([asdict(one) for one in rows], indent=2) + "\n")


def make_group(prompt_tokens: int, answer_tokens: int, vocab_size: int) -> AnswerGroup:
    """A prompt and ten answers of random tokens, all of the lengths that are given."""
    draw = torch.Generator().manual_seed(prompt_tokens * 1_000 + answer_tokens)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(vocab_size, (count,), generator=draw).tolist())

    answers = (Answer(tokens(answer_tokens), (0.0,) * answer_tokens, "length", 0, "") for _ in range(NUM_ANSWERS))
    return AnswerGroup(Prompt("benchmark", (), tokens(prompt_tokens)), tuple(answers))


def measure(model: torch.nn.Module, group: AnswerGroup, max_tokens: int, repeats: int, clock: Clock) -> list[Measured]:
    """What each mode took, shared first."""
    prompt_tokens, lengths = len(group.prompt.token_ids), [len(answer.token_ids) for answer in group.answers]
    batches = {mode: make_micro_batches([group], rows=mode, max_tokens=max_tokens) for mode in MODES}
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    peaks: dict[str, list[float]] = {mode: [] for mode in MODES}
    for repeat in range(repeats):
        for mode in MODES if repeat % 2 == 0 else MODES[::-1]:
            took, peak = update(model, batches[mode], clock)
            seconds[mode].append(took)
            peaks[mode].append(peak)
    middle = {mode: statistics.median(seconds[mode]) for mode in MODES}
    return [
        Measured(
            prompt_tokens=prompt_tokens,
            answer_tokens=lengths[0],
            rows=mode,
            num_tokens=sum(batch.num_tokens for batch in batches[mode]),
            num_micro_batches=len(batches[mode]),
            seconds=middle[mode],
            spread_s=max(seconds[mode]) - min(seconds[mode]),
            peak_gib=max(peaks[mode]),
            auto=choose_rows(prompt_tokens, lengths) == mode,
            to_faster=middle[mode] / min(middle.values()),
        )
        for mode in MODES
    ]


def update(
    model: torch.nn.Module, batches: Sequence[MicroBatch], clock: Clock = time.perf_counter
) -> tuple[float, float]:
    """Seconds and peak GiB of one update from a fresh optimizer."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-6)
    device = weights[0].device
    num_answer_tokens = sum(len(batch.target_ids) for batch in batches)
    before = _start_peak(device)
    start = clock()
    for batch in batches:
        batch = batch.to(device)
        logprobs, _ = token_logprobs(model, batch, 1.0)
        ratio = (logprobs - logprobs.detach()).exp()
        advantages = torch.where(batch.answer % 2 == 0, 1.0, -1.0)
        loss = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).sum()
        (loss / num_answer_tokens).backward()
    optimizer.step()
    optimizer.zero_grad()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start, (_peak(device) - before) / 2**30


def _start_peak(device: torch.device) -> int:
    """Bytes in use now, from where the peak is counted anew."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)  # else memory that was freed long ago still counts
    Path("/proc/self/clear_refs").write_text("5")
    return _status_bytes("VmRSS")


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else _status_bytes("VmHWM")


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(one.split()[1]) * 1024 for one in lines if one.startswith(name + ":"))


HEAD = (
    f"{'prompt':>6} {'answer':>6}  {'rows':<8} {'tokens':>6} {'micro-batches':>13} {'seconds':>8} {'spread':>7} "
    f"{'peak GiB':>8}  auto"
)


def line(one: Measured) -> str:
    """One row of the table under HEAD; `auto` marks its choice, with its time as a multiple of the faster mode's."""
    return (
        f"{one.prompt_tokens:>6} {one.answer_tokens:>6}  {one.rows:<8} {one.num_tokens:>6} "
        f"{one.num_micro_batches:>13} {one.seconds:>8.2f} {one.spread_s:>7.2f} {one.peak_gib:>8.2f}  "
        f"{f'← {one.to_faster:.2f}' if one.auto else ''}"
    )


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path, help="folder of a causal LM in Hugging Face layout")
    parser.add_argument("--prompts", nargs="+", type=int, default=[32, 256, 512], help="prompt tokens")
    parser.add_argument("--answers", nargs="+", type=int, default=[32, 128, 512], help="tokens of each answer")
    parser.add_argument("--max-tokens", type=int, default=2000, help="of a micro-batch")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", default="wall", choices=list(CLOCKS), help="cpu: of this process, for one thread")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--json", type=Path, help="file for the table")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(sys.argv[1:])
