"""TRL's side of `benchmarks/step.py`: one step of GRPOTrainer, timed. Runs in TRL's own virtual environment.

    .venv-trl/bin/python benchmarks/trl_step.py WORK.json

Nothing of the project is imported here. WORK.json is what `benchmarks/step.py` writes; the phases of the last step go
to the file that it names as `result`.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from transformers.utils.logging import disable_progress_bar
from trl import GRPOConfig, GRPOTrainer

TARGET_WORDS = 40


class TimedTrainer(GRPOTrainer):
    """GRPOTrainer that adds up the seconds of its phases; nothing else of it is changed."""

    seconds: dict[str, float]

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        took = time.perf_counter() - began
        self.seconds[phase] = self.seconds.get(phase, 0.0) + took
        print(f"  TRL: {phase} {took:.1f} s", flush=True)

    def _generate(self, *values: Any, **keywords: Any) -> Any:
        with self.timed("generation"):
            return super()._generate(*values, **keywords)

    def _generate_and_score_completions(self, *values: Any, **keywords: Any) -> Any:
        with self.timed("experience"):  # generation, the reference's logprobs, the score
            return super()._generate_and_score_completions(*values, **keywords)

    def training_step(self, *values: Any, **keywords: Any) -> Any:
        with self.timed("training_step"):
            return super().training_step(*values, **keywords)


class StepClock(TrainerCallback):
    """Keeps the phases of the step that ended last."""

    def __init__(self) -> None:
        self.trainer: TimedTrainer | None = None
        self.phases: dict[str, float] = {}
        self._began = 0.0

    def on_step_begin(self, *values: Any, **keywords: Any) -> None:
        assert self.trainer is not None
        self.trainer.seconds = {}
        self._began = time.perf_counter()

    def on_step_end(self, *values: Any, **keywords: Any) -> None:
        assert self.trainer is not None
        total, seconds = time.perf_counter() - self._began, self.trainer.seconds
        self.phases = {
            "generation": seconds["generation"],
            "reference and score": seconds["experience"] - seconds["generation"],
            "forward, backward, optimizer": total - seconds["experience"],
            "total": total,
        }


def main(work: dict[str, Any]) -> None:
    """Writes the phases of the last step to `work["result"]`."""
    torch.set_num_threads(work["threads"])
    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(work["model"])
    for prompt in work["prompts"]:
        rendered = tokenizer.apply_chat_template(prompt["messages"], add_generation_prompt=True, return_dict=False)
        assert rendered == prompt["token_ids"], "TRL would give the model another prompt"
    clock = StepClock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = TimedTrainer(
            model=AutoModelForCausalLM.from_pretrained(work["model"], dtype=getattr(torch, work["dtype"])),
            reward_funcs=brevity,
            args=config(work, folder),
            train_dataset=Dataset.from_list([{"prompt": prompt["messages"]} for prompt in work["prompts"]]),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=work["rank"], lora_alpha=2 * work["rank"], target_modules="all-linear"),
            callbacks=[clock],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.seconds, clock.trainer = {}, trainer
        warm_up(trainer.model, work["prompts"][0]["token_ids"])
        trainer.train()
    print(f"  TRL: {clock.phases['total']:.1f} s for the step", flush=True)
    mean = next(row["completions/mean_length"] for row in trainer.state.log_history if "loss" in row)
    assert mean == work["answer_tokens"], f"answers of {mean} tokens on average"
    Path(work["result"]).write_text(json.dumps(clock.phases))


def config(work: dict[str, Any], folder: str) -> GRPOConfig:
    """The work as TRL's settings: one generation and one optimizer step per step, over micro-batches of a group."""
    return GRPOConfig(
        output_dir=folder,
        max_steps=work["steps"],
        per_device_train_batch_size=work["answers"],
        gradient_accumulation_steps=len(work["prompts"]),
        num_generations=work["answers"],
        max_completion_length=work["answer_tokens"],
        generation_kwargs={"min_new_tokens": work["answer_tokens"]},
        temperature=1.0,
        beta=work["beta"],
        learning_rate=work["lr"],
        lr_scheduler_type="constant",
        bf16=False,  # no autocast: the weights are in the dtype that is asked for
        gradient_checkpointing=False,  # faster without, and the other side has it off as well
        dataloader_pin_memory=False,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        seed=work["seed"],
    )


def brevity(completions: list[list[dict[str, str]]], **columns: Any) -> list[float]:
    """1 / (1 + (words / 40)²) of each answer, the rule `short`."""
    return [1.0 / (1.0 + (len(answer[0]["content"].split()) / TARGET_WORDS) ** 2) for answer in completions]


def warm_up(model: Any, token_ids: list[int]) -> None:
    """Chooses kernels and starts threads: a few tokens of generation and one small backward pass."""
    inputs = torch.tensor([token_ids], device=model.device)
    model.generate(input_ids=inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=4)
    model(input_ids=inputs).logits.float().mean().backward()
    model.zero_grad()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
