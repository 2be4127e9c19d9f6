"""What a run has to serve: the model that its adapters stand on, and the adapters by name. Nothing is started."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from configs.schema import LoraConfig, Recipe
from rlhf.errors import ModelError
from rlhf.lineage import Trained, trained_last
from rlhf.manifest import read_manifest

BASE, POLICY = "base", "policy"  # names of models, beside those of domain adapters
RANKS = (8, 16, 32, 64, 128, 256, 512)  # that vLLM has kernels for
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, slots=True)
class Served:
    """A base, and adapters on it."""

    base: Path
    adapters: Mapping[str, Path]  # by model name, each a folder in PEFT's layout
    rank: int  # that the engine makes room for; 0 without adapters
    targets: tuple[str, ...]  # the layers that at least one adapter adapts, by the last part of their names
    context_tokens: int | None  # what the base was made for; None where its config does not say
    eos_ids: tuple[int, ...]  # each of them ends an answer, as in training

    @property
    def names(self) -> tuple[str, ...]:
        """The models by name, the base first."""
        return (BASE, *self.adapters)


def served(folder: Path, recipe: Recipe, further: Sequence[str] = ()) -> Served:
    """What there is to serve of the run in `folder`; `further` are adapters as NAME=FOLDER.

    Raises TenfoldError: nothing trained yet, a base without tokenizer or chat template, a name that is taken or cannot
    be one, a folder without an adapter, an adapter that is not plain LoRA or does not fit the base.
    """
    from rlhf.chat import ChatTokenizer

    trained = trained_last(folder, recipe)
    base = trained.base if trained.is_adapter else trained.folder
    assert base is not None, "an adapter stands on a base"
    chat = ChatTokenizer(base)
    adapters = _of_run(folder, recipe, trained)
    for entry in further:
        name, path = _named(entry)
        if name in (BASE, *adapters):
            raise ModelError(
                f"--adapter {entry}: the name {name} is taken.",
                limit=f"Taken are {', '.join((BASE, *adapters))}.",
                remedy="Choose another.",
            )
        adapters[name] = path
    loras = [_checked(base, name, path) for name, path in adapters.items()]
    targets = sorted({target for lora in loras for target in lora.targets})
    rank = max((lora.rank for lora in loras), default=0)
    return Served(
        base.resolve(), adapters, _engine_rank(rank), tuple(targets), chat.context_tokens, tuple(sorted(chat.eos_ids))
    )


def _of_run(folder: Path, recipe: Recipe, trained: Trained) -> dict[str, Path]:
    """The adapters that the run itself made, the newest last."""
    found: dict[str, Path] = {}
    named = folder / "models" / (recipe.adapter or "")
    if recipe.adapter and "sft" in read_manifest(folder)["stages"] and named.is_dir():
        found[recipe.adapter] = named.resolve()
    if trained.stage == "ppo":
        found[POLICY] = trained.folder.resolve()
    return found


def _named(entry: str) -> tuple[str, Path]:
    name, equals, path = entry.partition("=")
    if not equals or not path or not NAME.fullmatch(name):
        raise ModelError(
            f"--adapter {entry} is not of the form NAME=FOLDER.",
            limit="A name has letters, digits, '.', '_' and '-', and begins with a letter or digit.",
            remedy="Write, for instance, --adapter law=runs/law/models/policy.",
        )
    return name, Path(path).resolve()


def _checked(base: Path, name: str, folder: Path) -> LoraConfig:
    """Rank, scale and layers of an adapter that fits the base."""
    from actors.adapters import expected_shapes, target_names
    from rlhf.adapters import check_settings, read_start

    named = f"The adapter {name} ({folder})"
    adapter = read_start(folder, named)
    rank, alpha = adapter.config.get("r"), adapter.config.get("lora_alpha")
    if not (isinstance(rank, int) and isinstance(alpha, int | float) and rank > 0 and alpha > 0):
        raise ModelError(f"{named} has r={rank!r}, lora_alpha={alpha!r}.", limit="Both are numbers above 0.")
    adapted = target_names(tensor for tensor in adapter.tensors if ".lora_" in tensor)
    lora = LoraConfig(rank=rank, alpha=alpha, targets=tuple(adapted))
    check_settings(adapter, lora, named)
    try:
        shapes = expected_shapes(str(base), lora)
    except ModelError as error:
        raise ModelError(f"{named} adapts {', '.join(lora.targets)}.", limit=error.limit, remedy=_OTHER_BASE) from error
    for tensor, values in adapter.tensors.items():
        if shapes.get(tensor) != tuple(values.shape):
            raise ModelError(
                f"{named} does not fit the base {base}: {tensor} has the shape {tuple(values.shape)}.",
                limit=f"The base has {shapes.get(tensor, 'no such layer')}.",
                remedy=_OTHER_BASE,
            )
    return lora


_OTHER_BASE = "Serve it with a run that stands on the base that it was trained on."


def _engine_rank(rank: int) -> int:
    """The smallest rank that the engine has room for and that holds this one; 0 for no adapter."""
    if rank > RANKS[-1]:
        raise ModelError(
            f"An adapter has the rank {rank}.",
            limit=f"vLLM holds ranks up to {RANKS[-1]}.",
            remedy="Merge it: `tenfold export RUN --to DIR --merge`.",
        )
    return min(size for size in RANKS if size >= rank) if rank else 0
