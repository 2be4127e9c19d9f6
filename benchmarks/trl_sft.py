"""TRL's side of `benchmarks/sft.py`: steps of SFTTrainer, timed. Runs in TRL's own virtual environment.

    .venv-trl/bin/python benchmarks/trl_sft.py WORK.json

Nothing of the project is imported here. WORK.json is what `benchmarks/sft.py` writes; what was measured goes to the
file that it names as `result`.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from transformers.utils.logging import disable_progress_bar
from trl import SFTConfig, SFTTrainer

IGNORED = -100
Text = dict[str, list[int]]


class CountingTrainer(SFTTrainer):
    """SFTTrainer that notes loss and tokens of each step; nothing else of it is changed."""

    noted: dict[str, list[float]]

    def training_step(self, *values: Any, **keywords: Any) -> Any:
        inputs = values[1]
        mask, num = inputs.get("attention_mask"), inputs["input_ids"].numel()
        self.noted["tokens"].append(num if mask is None else int(mask.sum()))
        self.noted["padded_tokens"].append(num)
        self.noted["targets"].append(int((inputs["labels"][..., 1:] != IGNORED).sum()))
        loss = super().training_step(*values, **keywords)
        self.noted["losses"].append(float(loss))
        return loss


class StepClock(TrainerCallback):
    """What each step took from the end of the one before, its batch and its padding included."""

    def __init__(self, noted: dict[str, list[float]]) -> None:
        self._noted = noted
        self._last = 0.0

    def on_train_begin(self, *values: Any, **keywords: Any) -> None:
        self._last = time.perf_counter()

    def on_step_end(self, *values: Any, **keywords: Any) -> None:
        now, noted = time.perf_counter(), self._noted
        noted["seconds"].append(now - self._last)
        speed = noted["tokens"][-1] / noted["seconds"][-1]
        step, loss = len(noted["seconds"]), noted["losses"][-1]
        print(f"  TRL: step {step}, loss {loss:.4f}, {speed:.0f} tokens/s", flush=True)
        self._last = now


def main(work: dict[str, Any]) -> None:
    """Writes seconds, losses and tokens of each step, and the peak memory, to `work["result"]`."""
    torch.set_num_threads(work["threads"])
    disable_progress_bar()
    noted: dict[str, list[float]] = {name: [] for name in ("seconds", "losses", "tokens", "padded_tokens", "targets")}
    model = AutoModelForCausalLM.from_pretrained(work["model"], dtype=getattr(torch, work["dtype"]))
    lora = None
    if work["rank"] is not None:
        lora = LoraConfig(r=work["rank"], lora_alpha=work["alpha"], target_modules="all-linear", task_type="CAUSAL_LM")
    with tempfile.TemporaryDirectory() as folder:
        trainer = CountingTrainer(
            model=model,
            args=config(work, folder),
            train_dataset=Dataset.from_list(work["texts"]),
            processing_class=AutoTokenizer.from_pretrained(work["model"]),
            peft_config=lora,
            callbacks=[StepClock(noted)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.noted = noted
        checks = {} if work["packed_tokens"] is None else check_rows(trainer, work["texts"][: work["num_first"]])
        num_trained = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
        trainer.train()
    measured = {
        **noted,
        **checks,
        "num_trained": num_trained,
        "peak_gib": peak_gib(),
        "optimizer": str(getattr(trainer.args.optim, "value", trainer.args.optim)),
        "loss_type": str(getattr(trainer.args, "loss_type", None)),
        "attention": str(model.config._attn_implementation),
    }
    Path(work["result"]).write_text(json.dumps(measured))


def config(work: dict[str, Any], folder: str) -> SFTConfig:
    """The work as TRL's settings: one batch and one optimizer step per step, in the order of the texts."""
    packed_tokens = work["packed_tokens"]
    return SFTConfig(
        output_dir=folder,
        max_steps=work["num_steps"],
        per_device_train_batch_size=1 if packed_tokens else work["batch_texts"],
        gradient_accumulation_steps=1,
        packing=packed_tokens is not None,
        max_length=packed_tokens,  # None: nothing is cut
        train_sampling_strategy="sequential",
        lr_scheduler_type="constant",
        bf16=False,  # no autocast: the weights are in the dtype that is asked for
        gradient_checkpointing=False,  # faster without, and the other side has it off as well
        dataloader_pin_memory=False,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        seed=work["seed"],
        **work["optimizer"],
    )


def check_rows(trainer: CountingTrainer, first: Sequence[Text]) -> dict[str, float]:
    """Nats per learned token: of the texts of our first step, and of TRL's first row, packed and its texts apart.

    A row's texts cost the same packed and apart if, and only if, attention keeps them apart.
    """
    row = trainer.train_dataset[0]
    texts: list[Text] = []
    start = 0
    for length in row["seq_lengths"]:
        texts.append({name: row[name][start : start + length] for name in ("input_ids", "labels")})
        start += length
    with torch.no_grad():
        packed = float(trainer.model(**trainer.data_collator([row]), use_cache=False).loss)
    return {
        "first_loss": loss_apart(trainer, first),
        "row_loss": packed,
        "row_loss_apart": loss_apart(trainer, texts),
    }


def loss_apart(trainer: CountingTrainer, texts: Sequence[Text]) -> float:
    """Nats per learned token, each text in a pass of its own."""
    nats, num_targets = 0.0, 0
    with torch.no_grad():
        for text in texts:
            num = sum(label != IGNORED for label in text["labels"][1:])
            inputs = {name: torch.tensor([ids]) for name, ids in text.items()}
            nats += num * float(trainer.model(**inputs, use_cache=False).loss)
            num_targets += num
    return nats / num_targets


def peak_gib() -> float:
    """The most memory that this process ever had resident."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(one.split()[1]) for one in lines if one.startswith("VmHWM:")) / 2**20


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
