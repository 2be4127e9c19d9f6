"""A trained model leaves the run: written in the layout that others load, and checked by loading it as they do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig

from actors.base import Base
from configs.schema import LoraConfig, ModelConfig
from rlhf.adapters import CONFIG, WEIGHTS, read_adapter
from rlhf.disk import MANIFEST, damage, to_json
from rlhf.errors import ModelError, StoreError
from rlhf.import_model import quiet_transformers, writing
from rlhf.lineage import Trained
from rlhf.records import Adapter

NAME = "trained"
CLEAR = 3.0  # the base must be so many times as far from the export as what was trained
# Nats between what was trained and what was written, both computed in float32: what is left is the rounding of merged
# weights to the dtype that they are stored in. On SmolLM2-135M that is up to 3e-5 in float32 and 0.04 in bfloat16.
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 0.2, torch.float16: 0.03}
TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("merges.txt", "vocab.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json"),
)
GENERATION = "generation_config.json"


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written, and how far its logprobs are from others on the same tokens, at most, in nats."""

    kind: str  # "adapter", "merged model" or "model"
    dtype: str  # of the weights
    num_tokens: int
    to_trained: float
    to_base: float | None  # None where there is no base
    limit: float  # of `to_trained`


def export(
    trained: Trained, dest: Path, lora: LoraConfig, texts: Sequence[Sequence[int]], *, merge: bool, with_tokenizer: bool
) -> Exported:
    """Writes a trained model to `dest`, whole or not at all, and says how it was checked on `texts` (token ids).

    An adapter is written in PEFT's layout or, with `merge`, added to the base's weights in the base's dtype; a whole
    model is copied. What was written is loaded by plain transformers and peft, and all passes are made in float32 on
    the CPU.

    Args:
        lora: what the adapter was trained with.
        with_tokenizer: put the base's tokenizer beside an adapter, too.

    Raises ModelError: `dest` is in use or cannot be written, the model equals its base, what was written answers
    otherwise than what was trained. Raises StoreError for a model that was altered.
    """
    check_dest(dest)
    with quiet_transformers():
        if not trained.is_adapter:
            return _export_model(trained, dest, texts)
        return _export_adapter(trained, dest, lora, texts, merge, with_tokenizer)


def check_dest(dest: Path) -> None:
    """Raises ModelError for a folder that holds something."""
    if dest.exists() and (not dest.is_dir() or any(dest.iterdir())):
        raise ModelError(
            f"{dest} {'is not empty' if dest.is_dir() else 'is a file'}.",
            limit="An export never overwrites anything.",
            remedy="Name a folder that does not exist yet, or delete what is there.",
        )


def _export_adapter(
    trained: Trained, dest: Path, lora: LoraConfig, texts: Sequence[Sequence[int]], merge: bool, with_tokenizer: bool
) -> Exported:
    assert trained.base is not None, "an adapter stands on a base"
    adapter = read_adapter(trained.folder)
    of_trained, of_base = _of_run(trained.base, adapter, lora, texts)
    if torch.equal(of_trained, of_base):
        raise _equals_base(trained, len(of_base))
    with writing(dest) as folder:
        if merge:
            dtype = _write_merged(trained, folder)
            _copy(trained.base, folder, (*TOKENIZER, GENERATION))
            written: Any = _load(folder)
        else:
            dtype = torch.float32
            _write_adapter(adapter, trained.base, folder)
            _copy(trained.base, folder, TOKENIZER if with_tokenizer else ())
            written = _with_adapter(_load(trained.base), folder).eval()
        kind = "merged model" if merge else "adapter"
        exported = _compare(kind, dtype, _logprobs(written, texts), of_trained, of_base)
        _check(exported, dest, trained)
    return exported


def _export_model(trained: Trained, dest: Path, texts: Sequence[Sequence[int]]) -> Exported:
    if (trained.folder / MANIFEST).exists() and (problem := damage(trained.folder)):
        raise StoreError(f"{trained.folder} is damaged: {problem}.", remedy="Run the stage again, or restore it.")
    model = _load(trained.folder)
    of_trained = _logprobs(model, texts)
    of_base = None if trained.base is None else _logprobs(_load(trained.base), texts)
    if of_base is not None and torch.equal(of_trained, of_base):
        raise _equals_base(trained, len(of_base))
    with writing(dest) as folder:
        _copy(trained.folder, folder, [path.name for path in trained.folder.iterdir() if path.name != MANIFEST])
        exported = _compare("model", _stored_dtype(folder), _logprobs(_load(folder), texts), of_trained, of_base)
        _check(exported, dest, trained)
    return exported


def _of_run(
    base: Path, adapter: Adapter, lora: LoraConfig, texts: Sequence[Sequence[int]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(logprobs of the trained model, of its base), as the run's own roles compute them, in float32."""
    frozen = Base(ModelConfig(path=str(base), dtype="float32"), lora, seed=0, device="cpu")
    frozen.attach(NAME, adapter, frozen=True)
    with frozen.use(NAME) as model:
        of_trained = _logprobs(model, texts)
    with frozen.use(None) as model:
        return of_trained, _logprobs(model, texts)


def _write_adapter(adapter: Adapter, base: Path, folder: Path) -> None:
    config = {**adapter.config, "base_model_name_or_path": str(base), "inference_mode": True}
    (folder / CONFIG).write_bytes(to_json(config))
    save_file(dict(adapter.tensors), folder / WEIGHTS, metadata={"format": "pt"})


def _write_merged(trained: Trained, folder: Path) -> torch.dtype:
    """The dtype of the base, in which base and adapter are written as one model."""
    base: Any = AutoModelForCausalLM.from_pretrained(str(trained.base), dtype="auto")
    merged = _with_adapter(base, trained.folder).merge_and_unload(safe_merge=True)
    # The base's own file is copied; saving would refuse one with settings that contradict each other.
    merged.generation_config = GenerationConfig.from_model_config(merged.config)
    merged.save_pretrained(folder)
    return merged.dtype


def _with_adapter(model: Any, folder: Path) -> Any:
    from peft import PeftModel  # after actors.base, which keeps its import quiet

    return PeftModel.from_pretrained(model, str(folder))


def _copy(source: Path, folder: Path, names: Sequence[str]) -> None:
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _load(folder: Path) -> Any:
    try:
        return AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(
            f"{folder} does not load: {(str(error).strip() or type(error).__name__).splitlines()[0]}.",
            remedy="Bring the base back to where the run's recipe names it (model.path), or restore it from a copy.",
        ) from error


def _stored_dtype(folder: Path) -> torch.dtype:
    config = json.loads((folder / "config.json").read_bytes())
    return getattr(torch, str(config.get("dtype") or config.get("torch_dtype") or "float32"))


@torch.no_grad()
def _logprobs(model: Any, texts: Sequence[Sequence[int]]) -> torch.Tensor:
    """[T] nats of each token after the first of every text."""
    lengths = torch.tensor([len(text) for text in texts])
    ids = nn.utils.rnn.pad_sequence([torch.tensor(list(text)) for text in texts], batch_first=True)
    # Padding is on the right, where no token of a text sees it.
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, :-1]
    logprobs = logits.float().log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    return logprobs[torch.arange(1, ids.shape[1]) < lengths[:, None]]


def _compare(
    kind: str, dtype: torch.dtype, written: torch.Tensor, trained: torch.Tensor, base: torch.Tensor | None
) -> Exported:
    limit = LIMITS.get(dtype, LIMITS[torch.bfloat16]) if kind == "merged model" else LIMITS[torch.float32]
    return Exported(
        kind,
        str(dtype).removeprefix("torch."),
        len(written),
        float((written - trained).abs().max()),
        None if base is None else float((written - base).abs().max()),
        limit,
    )


def _check(exported: Exported, dest: Path, trained: Trained) -> None:
    if not exported.to_trained <= exported.limit:
        raise ModelError(
            f"What was written answers otherwise than what was trained: logprobs differ by up to "
            f"{exported.to_trained:.3g} nats on {exported.num_tokens} tokens; {dest} was not made.",
            limit=f"The limit is {exported.limit:g} for a {exported.kind} in {exported.dtype}.",
            remedy="Leave --merge out and load the adapter beside its base."
            if exported.kind == "merged model"
            else f"Check that {trained.base or trained.folder} is what the run was trained on.",
        )
    if exported.to_base is not None and not exported.to_base > CLEAR * exported.to_trained:
        raise ModelError(
            f"In {exported.dtype} the merged weights hardly hold the adapter: logprobs are up to "
            f"{exported.to_base:.3g} nats from the base's and {exported.to_trained:.3g} from what was trained; {dest} "
            "was not made.",
            limit=f"It must be {CLEAR:g} times as far from the base.",
            remedy="Leave --merge out and load the adapter beside its base, or train on a base in float32.",
        )


def _equals_base(trained: Trained, num_tokens: int) -> ModelError:
    what = "The adapter changes nothing" if trained.is_adapter else "Training changed nothing"
    return ModelError(
        f"{what}: {trained.folder} and its base {trained.base} give the same logprobs on {num_tokens} tokens.",
        limit="An export must differ from its base.",
        remedy=f"Train it (stage {trained.stage}): more steps, or a higher learning rate.",
    )
