"""Adapters on the disk, in PEFT's layout: `peft`, `transformers` and `vllm` load them without this project."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError

from configs.schema import LoraConfig, Recipe
from rlhf.checksum import checksum
from rlhf.disk import MANIFEST, damage, read_tensors, to_json, write_folder
from rlhf.errors import ModelError, StoreError
from rlhf.records import Adapter

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
# What PEFT adds to plain LoRA. Engine and trainer here know none of it, and a few of them change the base as well.
EXTRAS = (
    *("use_rslora", "use_dora", "use_qalora", "use_bdlora", "lora_bias", "rank_pattern", "alpha_pattern"),
    *("modules_to_save", "trainable_token_indices", "alora_invocation_tokens", "target_parameters"),
    *("layer_replication", "arrow_config", "kasa_config", "monteclora_config"),
)
STARTS_THAT_LEAVE_THE_BASE = (True, False, None, "gaussian", "orthogonal", "eva")  # values of init_lora_weights


def write_adapter(folder: Path, adapter: Adapter) -> None:
    """Replaces a folder with an adapter: adapter_config.json, adapter_model.safetensors, and our manifest.json."""
    files = {CONFIG: to_json(dict(adapter.config)), WEIGHTS: adapter.tensors}
    write_folder(folder, files, version=adapter.version, checksum=adapter.checksum)


def read_adapter(folder: Path) -> Adapter:
    """The adapter that `write_adapter` put there. Raises StoreError for one that was altered."""
    if problem := damage(folder):
        raise StoreError(f"The adapter {folder} is damaged: {problem}.", remedy="Run the stage again, or restore it.")
    about = json.loads((folder / MANIFEST).read_bytes())
    tensors = read_tensors(folder / WEIGHTS)
    if checksum(tensors) != about["checksum"]:
        raise StoreError(
            f"The tensors of the adapter {folder} are not those of its checksum {about['checksum'][:12]}.",
            remedy="Run the stage that wrote it again.",
        )
    return Adapter(about["version"], tensors, json.loads((folder / CONFIG).read_bytes()), about["checksum"])


def starting_adapter(recipe: Recipe) -> Adapter | None:
    """The adapter that training continues, as version 0; None where it starts from the base.

    Raises ModelError for one that cannot be read, or that the recipe's lora section does not describe.
    """
    if recipe.adapter_from is None:
        return None
    start = read_start(Path(recipe.adapter_from))
    check_settings(start, recipe.lora, f"adapter_from={recipe.adapter_from}")
    return start


def read_start(folder: Path, named: str = "") -> Adapter:
    """The adapter of a folder that this project or plain `peft` wrote, to start from: version 0, tensors in float32.

    `named` is what errors call it; without it, the recipe's key.

    Raises ModelError: no such folder, no adapter in it, pickled weights (which are not read), damaged, not LoRA.
    """
    named = named or f"adapter_from={folder}"
    _check_files(folder, named)
    try:
        config = json.loads((folder / CONFIG).read_bytes())
        kind = config.get("peft_type")
        problem = damage(folder) if (folder / MANIFEST).exists() else None
        tensors = read_tensors(folder / WEIGHTS)
    except (OSError, ValueError, AttributeError, SafetensorError, StoreError) as error:
        cause = error.__cause__ if isinstance(error, StoreError) else error
        raise _damaged(named, str(cause or error)) from error
    if problem:
        raise _damaged(named, problem)
    if kind != "LORA":
        raise ModelError(
            f"{named} holds an adapter of the kind {kind}.",
            limit="Only LoRA can be used.",
            remedy="Name the folder of a LoRA adapter.",
        )
    start = {name: tensor.float() for name, tensor in tensors.items()}
    if wrong := next((name for name, tensor in sorted(start.items()) if not bool(tensor.isfinite().all())), None):
        raise _damaged(named, f"{wrong} holds numbers that are not finite")
    return Adapter(0, start, config, checksum(start))


def check_settings(adapter: Adapter, lora: LoraConfig, named: str = "The adapter to start from") -> None:
    """Raises ModelError unless the adapter has the rank and scale of the recipe, and is plain LoRA."""
    config = adapter.config
    for theirs, ours, wanted in (("r", "rank", lora.rank), ("lora_alpha", "alpha", lora.alpha)):
        if config.get(theirs) != wanted:
            raise ModelError(
                f"{named}: its {ours} is {config.get(theirs)}.",
                limit=f"The recipe says lora.{ours}={wanted:g}.",
                remedy=f"Set lora.{ours}={config.get(theirs)}: an adapter keeps what it was trained with.",
            )
    extras = {name: config[name] for name in EXTRAS if config.get(name)}
    if config.get("bias", "none") != "none":
        extras["bias"] = config["bias"]
    if (begun := config.get("init_lora_weights")) not in STARTS_THAT_LEAVE_THE_BASE:
        extras["init_lora_weights"] = begun
    if extras:
        raise ModelError(
            f"{named}: its {CONFIG} says {', '.join(f'{name}={value}' for name, value in extras.items())}.",
            limit="A recipe describes plain LoRA: one rank and scale (alpha / rank) for all layers, nothing beside it.",
            remedy="Train an adapter without these, or merge it into the base and start from that.",
        )


def _check_files(folder: Path, named: str) -> None:
    if not folder.is_dir():
        raise ModelError(f"{named}: there is no such folder.", remedy="Name the folder of a PEFT adapter.")
    if not (folder / CONFIG).is_file():
        raise ModelError(
            f"{named}: there is no {CONFIG} in it.",
            limit=f"An adapter is a folder in PEFT's layout: {CONFIG} and {WEIGHTS}.",
            remedy="Set model.path to it if it is a whole model, else name the folder of an adapter.",
        )
    if not (folder / WEIGHTS).is_file():
        pickled = (folder / PICKLE).is_file()
        raise ModelError(
            f"{named}: {f'its weights are a pickle ({PICKLE})' if pickled else f'there is no {WEIGHTS} in it'}.",
            limit="Weights are read from safetensors only: reading a pickle can run code."
            if pickled
            else f"An adapter is a folder in PEFT's layout: {CONFIG} and {WEIGHTS}.",
            remedy="Load it with peft where you trust it, and save it again: peft then writes safetensors."
            if pickled
            else "Copy the whole folder.",
        )


def _damaged(named: str, problem: str) -> ModelError:
    return ModelError(
        f"{named} is damaged: {problem.rstrip('.')}.", remedy="Restore it from a copy, or train it again."
    )
