"""The shape of a decoder: exact counts of its parameters, from transformers on the meta device. Nothing is loaded."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from configs.schema import LoraConfig, Recipe
from rlhf.errors import ModelError

KNOWN = Path(__file__).with_name("models")  # configurations of common models, by name
DEFAULT_CONTEXT = 4096  # tokens, where a configuration does not say


@dataclass(frozen=True, slots=True)
class Linear:
    """Linear layers of one name and shape, over the whole decoder."""

    name: str  # the last part: "q_proj"
    inputs: int
    outputs: int
    count: int

    @property
    def num_parameters(self) -> int:
        """Of the weights, without biases."""
        return self.inputs * self.outputs * self.count


@dataclass(frozen=True, slots=True)
class Shape:
    """What memory and time hang on. Counts are of the whole decoder unless a name says otherwise."""

    name: str
    num_parameters: int  # what two layers share is counted once
    num_layers: int
    hidden: int
    heads: int
    key_heads: int
    head_size: int
    vocab: int
    context: int  # tokens
    norms_per_layer: int  # numbers that a layer's norms read for a token
    largest_module: int  # parameters of the largest module that ZeRO 3 gathers as a whole
    linears: tuple[Linear, ...]  # all but the output layer

    @property
    def queries(self) -> int:
        """Numbers of a token's query, over all heads."""
        return self.heads * self.head_size

    @property
    def keys(self) -> int:
        """Numbers of a token's key (and of its value), over all key heads of a layer."""
        return self.key_heads * self.head_size

    @property
    def widest(self) -> int:
        """The width inside the feed-forward layers."""
        return max(max(linear.inputs, linear.outputs) for linear in self.linears)

    @property
    def matmul_parameters(self) -> int:
        """Parameters that a token is multiplied with, without the output layer."""
        return sum(linear.num_parameters for linear in self.linears)

    def adapted(self, lora: LoraConfig) -> tuple[Linear, ...]:
        """The layers that get LoRA, by the rule of actors/base.py. Raises ModelError for a target that is missing."""
        if lora.targets == "all-linear":
            return self.linears
        have = {linear.name for linear in self.linears}
        for target in lora.targets:
            if target not in have:
                raise ModelError(
                    f"lora.targets: the model has no linear layer {target!r}.",
                    limit=f"It has {', '.join(sorted(have))}.",
                    remedy="Choose among these, or all-linear.",
                )
        return tuple(linear for linear in self.linears if linear.name in lora.targets)

    def adapter_parameters(self, lora: LoraConfig, rank: int | None = None) -> int:
        """Of one adapter: rank · (inputs + outputs) for each adapted layer (Hu et al. 2021, arXiv:2106.09685)."""
        return sum((rank or lora.rank) * (layer.inputs + layer.outputs) * layer.count for layer in self.adapted(lora))

    def key_value_bytes(self, dtype_bytes: int) -> int:
        """Of one token in the KV cache: a key and a value in every layer."""
        return 2 * self.num_layers * self.keys * dtype_bytes


def shape_of(recipe: Recipe, model: str | None = None) -> Shape:
    """The shape of the recipe's base, or of `model`: a folder, a config.json, or a name that is known here.

    A folder that is not here may bear the name of a known model (models/qwen2.5-7b-instruct): its shape is taken.
    A base that the stage `pretrain` makes has the shape of `pretrain.sizes`.

    Raises ModelError for a model that is neither here nor known, or is no decoder.
    """
    if model is None and not recipe.model.path:
        from rlhf.base_model import llama_config

        sizes = recipe.pretrain.sizes
        assert sizes is not None, "a recipe without model.path makes its model"
        config = llama_config(sizes, recipe.pretrain.vocab_size).to_dict()
        return _measured("made by pretrain", json.dumps(config, sort_keys=True, default=str))
    source = model or recipe.model.path
    path = Path(source).expanduser()
    file = path / "config.json" if path.is_dir() else path
    name, config = source, _read(file) if file.is_file() else None
    if config is None:
        known = known_model(path.name)
        if known is None:
            raise ModelError(
                f"{'--model' if model else 'model.path'}={source}: there is no such model here, and none of that name "
                "is known.",
                limit=f"Known by name are {', '.join(sorted(known_models()))}.",
                remedy="Bring it (`tenfold import-model SOURCE DEST`), name its config.json, or one of these: --model.",
            )
        name, config = known, _read(known_models()[known])
    return _measured(name, json.dumps(config, sort_keys=True))


def known_models() -> Mapping[str, Path]:
    """The configurations that come along, by name."""
    return {file.stem: file for file in sorted(KNOWN.glob("*.json"))}


def known_model(name: str) -> str | None:
    """The known model of that name, whatever its case, and however it was tuned ("Qwen2.5-7B-Instruct")."""
    plain = re.sub(r"-(instruct|it|chat|base|hf|v\d+(\.\d+)*)\b", "", name.lower())
    return plain if plain in known_models() else None


def _read(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read: {error}.", remedy="Name a model's config.json.") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise ModelError(
            f"{file} does not say which model it is of.", limit="It needs the key model_type.",
            remedy="Name the config.json of a model in Hugging Face layout.",
        )  # fmt: skip
    return config


@lru_cache(maxsize=32)
def _measured(name: str, text: str) -> Shape:
    """The shape of the model that a configuration, as JSON, describes."""
    import torch
    from torch import nn
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config: Any = AutoConfig.for_model(**json.loads(text))
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{name}: transformers builds no decoder from its configuration ({error}).",
            limit="A base is a decoder-only model that transformers can load.",
            remedy="Take another base.",
        ) from error
    output = model.get_output_embeddings()
    found: Counter[tuple[str, int, int]] = Counter()
    sizes: list[int] = []
    norms = 0
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    for path, module in model.named_modules():
        own = sum(parameter.numel() for parameter in module.parameters(recurse=False))
        sizes.append(own)
        last = path.rpartition(".")[2]
        if isinstance(module, nn.Linear) and module is not output:
            found[last, module.in_features, module.out_features] += 1
        elif "norm" in last and own and ".0." in path:
            # Norms of queries and keys run over each head.
            norms += own * {"q_norm": heads, "k_norm": key_heads}.get(last, 1)
    return Shape(
        name=name,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        num_layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=heads,
        key_heads=key_heads,
        head_size=head_size,
        vocab=config.vocab_size,
        context=getattr(config, "max_position_embeddings", None) or DEFAULT_CONTEXT,
        norms_per_layer=norms,
        largest_module=max(sizes),
        linears=tuple(Linear(*key, count) for key, count in found.items()),
    )
