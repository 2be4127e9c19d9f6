"""A model of a run writes, as anybody would load it: plain transformers and peft."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from configs.schema import SamplingConfig
from rlhf.import_model import quiet_transformers

AT_ONCE = 256  # texts that are written side by side


@dataclass(frozen=True, slots=True)
class Written:
    """What was written for a prompt."""

    prompt: str
    text: str
    ended: bool  # by itself


class Writer:
    """A model, with an adapter if one is given, and its tokenizer."""

    def __init__(self, folder: Path, sampling: SamplingConfig, adapter: Path | None = None) -> None:
        with quiet_transformers():
            self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        if adapter is not None:
            self._model = PeftModel.from_pretrained(self._model, str(adapter))
        self._model.eval()
        ends = self._model.generation_config.eos_token_id
        self._ends = set(ends if isinstance(ends, list) else [ends])
        self._sampling = sampling

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text, with what stands before each text."""
        return self._tokenizer(text)["input_ids"]

    def write(self, words: Sequence[str], asked: Sequence[Sequence[int]], num: int, seed: int) -> list[Written]:
        """`num` texts for each of the token ids `asked`, side by side; `words` are the prompts for people."""
        written: list[Written] = []
        jobs = [(text, list(ids)) for text, ids in zip(words, asked, strict=True) for _ in range(num)]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for first in range(0, len(jobs), AT_ONCE):
                written += self._some(jobs[first : first + AT_ONCE])
                print(f"\r{len(written)}/{len(jobs)} written", end="", flush=True)
        print("\r", end="")
        return written

    def _some(self, jobs: Sequence[tuple[str, list[int]]]) -> list[Written]:
        longest = max(len(ids) for _, ids in jobs)
        pad = self._tokenizer.pad_token_id or 0
        padded = torch.tensor([[pad] * (longest - len(ids)) + ids for _, ids in jobs])
        seen = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for _, ids in jobs])
        with torch.no_grad():
            made = self._model.generate(
                input_ids=padded,
                attention_mask=seen,
                do_sample=True,
                temperature=self._sampling.temperature,
                top_k=0,
                max_new_tokens=self._sampling.max_answer_tokens,
                pad_token_id=pad,
            )
        return [self._text(text, row[longest:].tolist()) for (text, _), row in zip(jobs, made, strict=True)]

    def _text(self, text: str, ids: list[int]) -> Written:
        end = next((place for place, token in enumerate(ids) if token in self._ends), None)
        return Written(text, self._tokenizer.decode(ids[:end], skip_special_tokens=True), end is not None)
