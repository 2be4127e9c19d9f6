"""Tokens per second of generation in the loop, against vLLM alone with the same adapter on the same requests.

    python benchmarks/generation.py --model FOLDER

`loop` is what a step of PPO does: sync of the adapter with all its checks, then `Generator.answer`. `engine` is a plain
`generate` on the generator's own vLLM, hence the difference to `loop` is what the project adds. `alone` is a second
vLLM with the same settings and nothing of ours in it: the adapter comes from the disk, LoRA runs vLLM's own code. All
three start each run with a cold prefix cache, and they alternate, so that a drifting machine is fair to all.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from actors.adapters import expected_shapes, target_names
from actors.generator import Generator, engine_settings
from configs.schema import GeneratorConfig, LoraConfig
from rlhf.adapters import write_adapter
from rlhf.chat import ChatTokenizer
from rlhf.checksum import checksum
from rlhf.records import Adapter, Message, Prompt, Sampling

QUESTIONS = (
    "What is RAM?",
    "Who wrote Hamlet?",
    "What is a compiler?",
    "What is the speed of light?",
    "What is a neural network?",
    "Who was the first person on the moon?",
    "What is a linked list?",
    "How do planes fly?",
)
MODES = ("loop", "engine", "alone")
CONTEXT = 1024
Measured = tuple[int, float]  # tokens, seconds
Run = Callable[[Sampling, int], Measured]  # of a sampling and a seed


def main(argv: Sequence[str] | None = None) -> None:
    """Prints a line per mode and the ratio; writes them as JSON too where `--json` says."""
    options = _parse(argv)
    lora = LoraConfig(rank=options.rank, alpha=2 * options.rank, targets=_targets(options.targets))
    config = GeneratorConfig(kv_cache_gib=options.kv_cache_gib, max_running=options.max_running)
    generator = Generator(
        options.model, config, lora, dtype=options.dtype, max_model_tokens=CONTEXT, threads=options.threads
    )
    adapter = _adapter(options.model, lora)
    chat = ChatTokenizer(options.model)
    questions = [QUESTIONS[index % len(QUESTIONS)] for index in range(options.prompts)]
    prompts = [chat.prompt((Message("user", question),)) for question in questions]
    sampling = Sampling(n=options.answers, max_answer_tokens=options.tokens)
    with tempfile.TemporaryDirectory() as folder:
        write_adapter(Path(folder) / "adapter", adapter)
        runs = {
            "loop": partial(_loop, generator, adapter, prompts),
            "engine": partial(_engine, generator, prompts),
            "alone": _alone(options, config, lora, Path(folder) / "adapter", generator, prompts),
        }
        report = _measure(runs, sampling, options.repeats)
    report |= {"threads": torch.get_num_threads(), "targets": options.targets, "dtype": options.dtype}
    _print(report)
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=2) + "\n")


def _measure(runs: dict[str, Run], sampling: Sampling, repeats: int) -> dict[str, Any]:
    for run in runs.values():
        run(replace(sampling, max_answer_tokens=4), 0)  # kernels are chosen and memory is taken at first use
    rates: dict[str, list[float]] = {mode: [] for mode in MODES}
    for repeat in range(1, repeats + 1):
        for mode in MODES:
            tokens, seconds = runs[mode](sampling, 1_000_000 * repeat)
            rates[mode].append(tokens / seconds)
            print(
                f"run {repeat} {mode:7} {tokens:6} tokens {seconds:7.2f} s {tokens / seconds:7.1f} tokens/s", flush=True
            )
    medians = {mode: statistics.median(values) for mode, values in rates.items()}
    return {
        "tokens_per_s": medians,
        "spread": {mode: [min(values), max(values)] for mode, values in rates.items()},
        "loop_to_alone": medians["loop"] / medians["alone"],
        "loop_to_engine": medians["loop"] / medians["engine"],
    }


def _loop(generator: Generator, adapter: Adapter, prompts: list[Prompt], sampling: Sampling, seed: int) -> Measured:
    started = time.perf_counter()
    generator.load_adapter(adapter)
    groups = generator.answer(prompts, sampling, _seeds(prompts, seed))
    seconds = time.perf_counter() - started
    return sum(len(answer.token_ids) for group in groups for answer in group.answers), seconds


def _engine(generator: Generator, prompts: list[Prompt], sampling: Sampling, seed: int) -> Measured:
    generator.reset_prefix_cache()
    params = [generator._sampling_params(sampling, each) for each in _seeds(prompts, seed)]
    return _generate(generator._llm, prompts, params, generator._request)


def _alone(
    options: argparse.Namespace,
    config: GeneratorConfig,
    lora: LoraConfig,
    adapter: Path,
    generator: Generator,
    prompts: list[Prompt],
) -> Run:
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    targets = target_names(expected_shapes(options.model, lora))
    settings = engine_settings(config, lora, targets, on_gpu=torch.cuda.is_available())
    del settings["worker_extension_cls"]
    llm = LLM(model=options.model, dtype=options.dtype, max_model_len=CONTEXT, **settings)
    request = LoRARequest("adapter", 1, str(adapter))

    def run(sampling: Sampling, seed: int) -> Measured:
        llm.reset_prefix_cache()
        params = [generator._sampling_params(sampling, each) for each in _seeds(prompts, seed)]
        return _generate(llm, prompts, params, request)

    return run


def _generate(llm: Any, prompts: list[Prompt], params: list[Any], request: Any) -> Measured:
    tokens = [{"prompt_token_ids": list(prompt.token_ids)} for prompt in prompts]
    started = time.perf_counter()
    outputs = llm.generate(tokens, params, use_tqdm=False, lora_request=request)
    seconds = time.perf_counter() - started
    return sum(len(each.token_ids) for output in outputs for each in output.outputs), seconds


def _adapter(model: str, lora: LoraConfig) -> Adapter:
    """An adapter that changes every layer a little, so that answers stay sensible."""
    random = torch.Generator().manual_seed(0)
    shapes = expected_shapes(model, lora)
    tensors = {name: torch.randn(shape, generator=random) * 0.01 for name, shape in shapes.items()}
    config = {"peft_type": "LORA", "r": lora.rank, "lora_alpha": lora.alpha, "target_modules": target_names(shapes)}
    return Adapter(1, tensors, config, checksum(tensors))


def _seeds(prompts: list[Prompt], seed: int) -> list[int]:
    return [seed + 1_000 * index for index in range(len(prompts))]


def _targets(names: str) -> Any:
    return "all-linear" if names == "all-linear" else tuple(names.split(","))


def _print(report: dict[str, Any]) -> None:
    print(f"\nmedians, {report['dtype']}, LoRA on {report['targets']}, {report['threads']} threads")
    for mode, rate in report["tokens_per_s"].items():
        low, high = report["spread"][mode]
        print(f"  {mode:7} {rate:7.1f} tokens/s  ({low:.1f} to {high:.1f})")
    print(f"  loop / alone  {report['loop_to_alone']:.2f}\n  loop / engine {report['loop_to_engine']:.2f}")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a base in Hugging Face layout")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--targets", default="all-linear", help="all-linear, or names with commas: q_proj,v_proj")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--answers", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=48, help="the longest answer")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--max-running", type=int, default=256)
    parser.add_argument("--kv-cache-gib", type=float, default=1.0)
    parser.add_argument("--json", help="a file for the numbers")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
