"""What is to be planned: a model, a recipe's work with it, and the settings that a plan chooses."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from cluster.placement import TRAINER, Role, needed_roles
from cluster.plan.devices import Device
from cluster.plan.shape import Shape
from configs.schema import MODEL_STAGES, Recipe, Stage
from configs.section import Dtype

# The keys of a recipe that a plan chooses, where the recipe leaves them open.
KEYS = (
    "cluster.placement",
    "cluster.gpus",
    "cluster.workers",
    "learner.zero_stage",
    "learner.micro_batch_tokens",
    "learner.gradient_checkpointing",
    "generator.tensor_parallel",
    "generator.gpu_memory_share",
)
TRAINED: frozenset[Role] = frozenset({"policy", "critic", "reward"})
BYTES: Mapping[Dtype, int] = {"float32": 4, "bfloat16": 2}


def fixed(recipe: Recipe) -> frozenset[str]:
    """The keys among KEYS that the recipe's file or the command line set. `gpus: auto` leaves it open."""
    keys = {
        f"{name}.{key}"
        for name in ("cluster", "learner", "generator")
        for key in getattr(recipe, name).model_fields_set
        if f"{name}.{key}" in KEYS
    }
    if recipe.cluster.gpus == "auto":
        keys.discard("cluster.gpus")
    if not recipe.cluster.workers:
        keys.discard("cluster.workers")
    if recipe.generator.kv_cache_gib is not None:
        keys.add("generator.gpu_memory_share")  # the cache is fixed the other way
    return frozenset(keys)


def opened(recipe: Recipe, keys: Iterable[str]) -> Recipe:
    """The recipe with these keys as if its file had not set them, for a plan to choose."""
    sections: dict[str, Any] = {}
    for key in keys:
        name, _, last = key.partition(".")
        section = sections.get(name, getattr(recipe, name))
        kind = type(section)
        values = {field: getattr(section, field) for field in kind.model_fields}
        values[last] = kind.model_fields[last].get_default(call_default_factory=True)
        sections[name] = kind.model_construct(section.model_fields_set - {last}, **values)
    return recipe.model_copy(update=sections)


@dataclass(frozen=True, slots=True)
class Work:
    """A recipe's work on one kind of device. Shape legend as in the recipe: P prompts a step, N answers each."""

    recipe: Recipe
    shape: Shape
    device: Device
    roles: tuple[Role, ...] = ()
    makes: tuple[Stage, ...] = ()  # stages that make a model, before the roles start

    @staticmethod
    def of(recipe: Recipe, shape: Shape, device: Device) -> Work:
        """The work of the roles that the recipe's stages need."""
        makes: tuple[Stage, ...] = tuple(stage for stage in MODEL_STAGES if stage in recipe.stages)
        return Work(recipe, shape, device, needed_roles(recipe), makes)

    @property
    def hosted(self) -> tuple[Role, ...]:
        """All roles but the generator."""
        return tuple(role for role in self.roles if role != "generator")

    @property
    def trains(self) -> bool:
        """Whether it has a group `trainer` where placement is shared."""
        return bool(self.hosted or self.makes)

    @property
    def generates(self) -> bool:
        return "generator" in self.roles

    @property
    def overlaps(self) -> bool:
        """Whether answers are written while others are learnt from: the generator then has GPUs of its own."""
        return "ppo" in self.recipe.stages and self.recipe.ppo.max_staleness > 0

    @property
    def prompt_tokens(self) -> int:
        """The longest prompt: what memory must hold."""
        return self.recipe.data.max_prompt_tokens

    @property
    def answer_tokens(self) -> int:
        """The longest answer."""
        return self.recipe.sampling.max_answer_tokens

    @property
    def context(self) -> int:
        """Tokens of the longest prompt with the longest answer."""
        return self.prompt_tokens + self.answer_tokens

    @property
    def dtype_bytes(self) -> int:
        """Of a number of the trainer's base."""
        return BYTES[self.recipe.model.dtype]

    @property
    def engine_dtype(self) -> Dtype:
        """Of the generator's base."""
        return self.recipe.generator.dtype or self.recipe.model.dtype

    @property
    def num_answers(self) -> int:
        """P · N of a step."""
        return self.recipe.ppo.num_prompts * self.recipe.sampling.n

    def group_tokens(self, micro_batch_tokens: int) -> int:
        """Tokens of a prompt with all its answers, as rows of at most so many tokens (rlhf/rows.py)."""
        n, prompt, answer = self.recipe.sampling.n, self.prompt_tokens, self.answer_tokens
        if self.recipe.learner.rows == "separate":
            return n * (prompt + answer)
        in_a_row = max((micro_batch_tokens - prompt) // answer, 1)
        return math.ceil(n / in_a_row) * prompt + n * answer

    def pass_tokens(self, micro_batch_tokens: int, world: int) -> int:
        """Tokens of the largest forward pass: the limit, unless a single answer is longer or all work is less."""
        groups = max(
            self.recipe.ppo.num_prompts if "policy" in self.roles else 1,
            self.recipe.reward.groups_per_batch if "reward" in self.roles else 1,
        )
        most = math.ceil(groups * self.group_tokens(micro_batch_tokens) / world)
        return max(min(micro_batch_tokens, most), self.context)


@dataclass(frozen=True, slots=True)
class Layout:
    """What a plan chooses. `workers` are those of the placement's groups."""

    placement: Literal["shared", "separate"]
    zero_stage: int
    micro_batch_tokens: int
    gradient_checkpointing: bool
    tensor_parallel: int
    workers: Mapping[str, int] = field(default_factory=dict[str, int])
    gpu_memory_share: float | None = None  # None: the recipe sets the cache in GiB

    def world(self, role: Role) -> int:
        """Workers of the group that plays the role."""
        name = TRAINER if self.placement == "shared" and role != "generator" else role
        return self.workers.get(name, 1)

    def num_gpus(self, roles: Iterable[Role]) -> int:
        """GPUs that the groups of these roles take."""
        if self.placement == "shared":
            engines = self.workers.get("generator", 0) * self.tensor_parallel
            return max(self.workers.get(TRAINER, 0), engines)
        return sum(self.world(role) * (self.tensor_parallel if role == "generator" else 1) for role in roles)
