"""One worker of `pretrain` or `sft`: it builds the model and its learner, trains, and rank 0 writes what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GenerationConfig

from actors.base import Base
from actors.engine import SPREAD_WEIGHTS
from actors.learner import Learner
from rlhf.adapters import read_start, write_adapter
from rlhf.base_model import write_trained_model
from rlhf.checksum import checksum
from rlhf.records import Adapter
from rlhf.seeds import shuffle_seed
from rlhf.training import Job, Opening, Place, Report, Samples, Tell, train

TEMPERATURE = 0.8  # of what is written for people to look at


def work(job: Job, place: Place, device: str, tell: Tell) -> None:
    """Trains as far as the job and the controller say. Collective, on a process group that exists already."""
    recipe = job.recipe
    # A whole model is trained in float32, so that its weights are not rounded on the way in.
    dtype = recipe.model.dtype if job.adapter else "float32"
    model = recipe.model.model_copy(update={"path": str(job.start), "dtype": dtype})
    spread = recipe.learner.zero_stage == SPREAD_WEIGHTS
    base = Base(model, recipe.lora, seed=recipe.seed, device=device, spread=spread)
    base.pass_in(recipe.model.dtype)
    if job.num_embeddings is not None:
        base.grow(job.num_embeddings)
    if job.adapter is not None:
        base.attach(job.adapter, read_start(job.adapter_from) if job.adapter_from else None)
    optimizer = recipe.pretrain.optimizer if job.stage == "pretrain" else recipe.sft.optimizer
    learner = Learner(
        base, job.adapter, None, optimizer, recipe.learner, place.rank, place.world_size, num_updates=job.num_steps
    )
    writer = Writer(base, job, place)
    if train(job, learner, base.model, place, tell, writer.sample):
        write(job, base, learner, place)
        if place.leads:
            tell(Report("written", job.num_steps))


class Writer:
    """Lets the model under training go on with texts, for people to see how it comes along."""

    def __init__(self, base: Base, job: Job, place: Place) -> None:
        self._base, self._job, self._place = base, job, place
        self._tokenizer: Any = AutoTokenizer.from_pretrained(str(job.tokenizer)) if place.leads else None
        ends = GenerationConfig.from_pretrained(str(job.tokenizer)) if _has_ends(job.tokenizer) else GenerationConfig()
        self._ends = ends.eos_token_id

    def sample(self, openings: Sequence[Opening], num_tokens: int) -> Samples:
        """What the model writes after each, drawn with seeds of their own; empty on ranks that are not asked."""
        if not (self._place.leads or self._base.spread):
            return []
        written: Samples = []
        with torch.no_grad(), self._base.use(self._job.adapter) as model:
            for number, opening in enumerate(openings):
                text = self._continue(model, opening, num_tokens, number)
                written.append((opening.text, text))
        return written

    def _continue(self, model: Any, opening: Opening, num_tokens: int, number: int) -> str:
        ids = torch.tensor([opening.token_ids], device=self._base.device)
        seed = shuffle_seed(self._job.recipe.seed, "continue", number)
        with torch.random.fork_rng(devices=[self._base.device] if self._base.device.type == "cuda" else []):
            torch.manual_seed(seed)
            made = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=num_tokens,
                do_sample=True,
                temperature=TEMPERATURE,
                top_k=0,
                eos_token_id=self._ends,
                pad_token_id=0,
                synced_gpus=self._base.spread,  # ranks gather weights together: all go on until the last has ended
            )
        if self._tokenizer is None:
            return ""
        return self._tokenizer.decode(made[0, len(opening.token_ids) :], skip_special_tokens=True)


def write(job: Job, base: Base, learner: Learner, place: Place) -> None:
    """Writes the trained model, or the adapter, as `job.result`. Collective: weights may lie on all ranks."""
    dtype = getattr(torch, job.recipe.model.dtype)
    if job.adapter is None or job.recipe.adapter is None:
        keep = place.leads
        tensors = learner.tensors(keep=keep) if job.adapter is None else base.merged(job.adapter, keep=keep)
        if place.leads:
            write_trained_model(base.model, tensors, job.tokenizer, job.result, dtype)
    else:
        tensors = learner.tensors(keep=place.leads)
        if place.leads:
            settings = base.adapter_config(job.adapter)
            write_adapter(job.result, Adapter(job.num_steps, tensors, settings, checksum(tensors)))
    learner.combine({})  # nobody leaves before rank 0 has written


def _has_ends(folder: Path) -> bool:
    return (folder / "generation_config.json").is_file()
