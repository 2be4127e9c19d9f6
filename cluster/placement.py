"""Who lives where: a pure function from a recipe and a cluster's resources to a placement, or a refusal."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Self, get_args

from configs.schema import MODEL_STAGES, ClusterConfig, Recipe
from rlhf.errors import PlacementError

Role = Literal["policy", "reference", "reward", "critic", "generator"]
ROLES: tuple[Role, ...] = get_args(Role)
AT_ONCE: frozenset[Role] = frozenset({"policy", "critic", "reference"})
TRAINER = "trainer"  # the group that hosts every role but the generator where placement is shared


Bundle = Mapping[str, float]  # amounts by kind: CPU, GPU, and what else nodes have


@dataclass(frozen=True, slots=True)
class Node:
    """A node of the cluster that is there."""

    name: str
    address: str
    has: Bundle  # what Ray counts there, in use or not


@dataclass(frozen=True, slots=True)
class Resources:
    """What Ray counts in a cluster, all nodes together."""

    cpus: float
    gpus: float = 0.0
    nodes: tuple[Node, ...] = ()  # none: it is not known how they are distributed

    @classmethod
    def of(cls, nodes: Sequence[Node]) -> Self:
        """What these nodes have."""
        cpus, gpus = (sum(node.has.get(kind, 0.0) for node in nodes) for kind in ("CPU", "GPU"))
        return cls(cpus, gpus, tuple(nodes))


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """A group of workers of one kind: which roles they play and what each of them takes."""

    name: str
    roles: tuple[Role, ...]
    bundles: tuple[int, ...]  # [num_workers] the bundle of the placement group that a worker lives in
    cpus: float  # per worker
    gpus: float  # per worker; a fraction where two groups share a GPU
    extra: Bundle = field(default_factory=dict[str, float])  # per worker, of what only some nodes have

    @property
    def num_workers(self) -> int:
        return len(self.bundles)

    @property
    def collective(self) -> bool:
        """Whether its workers form a process group: all but generators, which never talk to each other."""
        return self.roles != ("generator",)


@dataclass(frozen=True, slots=True)
class Placement:
    """All groups of a run; their bundles are those of one Ray placement group."""

    groups: tuple[GroupPlan, ...]
    overlaps: bool = False  # the generator writes while the others train (`ppo.max_staleness`)

    @property
    def bundles(self) -> list[dict[str, float]]:
        """What each bundle takes: the sum over the workers that live in it."""
        totals: dict[int, dict[str, float]] = {}
        for group in self.groups:
            for index in group.bundles:
                total = totals.setdefault(index, {"CPU": 0.0, "GPU": 0.0})
                total["CPU"] += group.cpus
                total["GPU"] += group.gpus
                for kind, amount in group.extra.items():
                    total[kind] = total.get(kind, 0.0) + amount
        return [{name: amount for name, amount in totals[index].items() if amount > 0} for index in sorted(totals)]

    @property
    def shares_gpus(self) -> bool:
        """Whether two groups live on the same GPU, so that only one of them can be at work."""
        homes = [index for group in self.groups if group.gpus > 0 for index in group.bundles]
        return len(homes) > len(set(homes))

    def beside(self, group: GroupPlan) -> int:
        """Workers of other groups that compute at the same time: policy, critic and reference do; others take turns.

        Where generation overlaps with training, the generator's do as well.
        """
        at_once = AT_ONCE | {"generator"} if self.overlaps else AT_ONCE
        if not at_once.intersection(group.roles):
            return 0
        return sum(other.num_workers for other in self.groups if other != group and at_once.intersection(other.roles))

    def group_of(self, role: Role) -> GroupPlan:
        """The group that plays this role. Raises PlacementError if the recipe needs no such role."""
        for group in self.groups:
            if role in group.roles:
                return group
        placed = ", ".join(role for group in self.groups for role in group.roles)
        raise PlacementError(
            f"The role {role!r} was asked for, but the recipe does not need it, so it has no place.",
            limit=f"Placed are {placed}.",
            remedy=f"Add a stage that needs the {role} to `stages`, or start the run with this role placed.",
        )


def workers_of(placement: Placement) -> str:
    """The groups in words: `2 policy and 1 generator workers`."""
    if not placement.groups:
        return "no workers"
    *others, last = [f"{group.num_workers} {group.name}" for group in placement.groups]
    return f"{', '.join(others)} and {last} workers" if others else f"{last} workers"


def needed_roles(recipe: Recipe) -> tuple[Role, ...]:
    """The roles that the recipe's stages ask for, in the order of ROLES."""
    stages = set(recipe.stages)
    trains, judges = "ppo" in stages, "evaluate" in stages
    measures_kl = judges or (trains and recipe.ppo.evaluate_every is not None)
    needed = {
        "policy": trains or judges,
        "reference": measures_kl or (trains and recipe.ppo.kl.beta > 0),
        "reward": recipe.uses_reward(stages),
        "critic": trains and recipe.ppo.advantage == "gae",
        "generator": "sample" in stages or trains or judges,
    }
    return tuple(role for role in ROLES if needed[role])


def place(recipe: Recipe, resources: Resources, roles: Collection[Role] | None = None) -> Placement:
    """The groups of a run, each worker with its share of CPUs and GPUs.

    `roles` are those to place (None: `needed_roles(recipe)`). On GPUs a worker has one (a generator
    `generator.tensor_parallel` of them); where placement is shared, trainer and generator have half of the same one.

    Raises PlacementError, saying what is missing, where the cluster has less, for worker counts of groups that this
    kind of placement does not have, and where generation is to overlap with training on the same GPUs.
    """
    config = recipe.cluster
    asked_for = needed_roles(recipe) if roles is None else roles
    wanted: tuple[Role, ...] = tuple(role for role in ROLES if role in asked_for)
    resources = _counted(config, resources)
    gpus = _num_gpus(config, resources)
    _check_names(config, makes_model=any(stage in recipe.stages for stage in MODEL_STAGES))
    groups = (_shared if config.placement == "shared" else _separate)(recipe, wanted, gpus)
    placement = Placement(groups, overlaps="ppo" in recipe.stages and recipe.ppo.max_staleness > 0)
    if placement.overlaps and placement.shares_gpus:
        raise PlacementError(
            f"ppo.max_staleness={recipe.ppo.max_staleness} with cluster.placement={config.placement}: the next answers "
            "cannot be written while a step trains, since generator and trainer live on the same GPUs and take turns.",
            limit=f"{recipe.generator.tensor_parallel} of the GPUs at least must be the generator's alone.",
            remedy="Set cluster.placement=separate, or ppo.max_staleness=0.",
        )
    _check_fit(config, placement, resources, gpus)
    return placement


def place_crew(recipe: Recipe, resources: Resources) -> GroupPlan:
    """The workers of `pretrain` and `sft`, each with a GPU where there are any; they work before all other groups.

    Raises PlacementError for more GPUs than the cluster has, for more workers than GPUs, and where they do not fit.
    """
    config = recipe.cluster
    _check_names(config, makes_model=True)
    resources = _counted(config, resources)
    gpus = _num_gpus(config, resources)
    num_workers = config.workers.get(TRAINER, gpus or 1)
    if gpus and num_workers > gpus:
        raise PlacementError(
            f"cluster.workers.trainer={num_workers}: the workers of pretrain and sft take a GPU each.",
            limit=f"There are {gpus}.",
            remedy="Set fewer workers in cluster.workers.trainer, or add nodes.",
        )
    extra = config.resources.get(TRAINER, {})
    crew = GroupPlan(TRAINER, (), tuple(range(num_workers)), config.cpus_per_worker, float(gpus > 0), extra)
    _check_fit(config, Placement((crew,)), resources, gpus)
    return crew


def _counted(config: ClusterConfig, resources: Resources) -> Resources:
    """What may be placed upon: of a cluster that grows, what is there now says nothing."""
    if not config.autoscale:
        return resources
    assert config.gpus != "auto", "refused by the schema"
    return Resources(math.inf, float(config.gpus))


def _num_gpus(config: ClusterConfig, resources: Resources) -> int:
    if config.gpus == "auto":
        return int(resources.gpus)
    if config.gpus > resources.gpus:
        raise PlacementError(
            f"cluster.gpus={config.gpus}: {config.gpus - resources.gpus:g} GPUs are missing.",
            limit=f"Ray counts {resources.gpus:g} in this cluster.",
            remedy=f"Set cluster.gpus to {int(resources.gpus)} or auto, or add nodes.",
        )
    return config.gpus


def _check_names(config: ClusterConfig, *, makes_model: bool) -> None:
    have = {TRAINER, "generator"} if config.placement == "shared" else set(ROLES)
    have |= {TRAINER} if makes_model else set()
    settings = {f"workers.{name}": (name, number) for name, number in config.workers.items()}
    settings |= {f"resources.{name}": (name, extra) for name, extra in config.resources.items()}
    for key, (name, value) in settings.items():
        if name not in have:
            key, shared = key.partition(".")[0], config.placement == "shared"
            raise PlacementError(
                f"cluster.{key}.{name}={value} with cluster.placement={config.placement}: there is no such group.",
                limit=f"The groups are {', '.join(sorted(have))}.",
                remedy=f"Set cluster.{key}.trainer, which hosts policy, critic, reward and reference."
                if shared
                else f"Set the {key} of each role, or cluster.placement=shared.",
            )


def _separate(recipe: Recipe, roles: tuple[Role, ...], gpus: int) -> tuple[GroupPlan, ...]:
    """Each role a group of its own, each worker a bundle of its own."""
    groups: list[GroupPlan] = []
    first = 0
    for role in roles:
        number = recipe.cluster.workers.get(role, 1)
        width = recipe.generator.tensor_parallel if role == "generator" else 1
        bundles = tuple(range(first, first + number))
        cpus, share = recipe.cluster.cpus_per_worker * width, float(width if gpus else 0)
        groups.append(GroupPlan(role, (role,), bundles, cpus, share, recipe.cluster.resources.get(role, {})))
        first += number
    return tuple(groups)


def _shared(recipe: Recipe, roles: tuple[Role, ...], gpus: int) -> tuple[GroupPlan, ...]:
    """One trainer group on one frozen base, and the generator beside it: on GPUs in the same bundles."""
    config, width = recipe.cluster, recipe.generator.tensor_parallel
    hosted: tuple[Role, ...] = tuple(role for role in roles if role != "generator")
    both = bool(hosted) and "generator" in roles
    if both and gpus and width > 1:
        raise PlacementError(
            f"generator.tensor_parallel={width} with cluster.placement=shared: a generator that shares the trainer's "
            "GPU has that one only.",
            limit="At most 1.",
            remedy="Set generator.tensor_parallel=1, or cluster.placement=separate.",
        )
    groups: list[GroupPlan] = []
    trainers = config.workers.get(TRAINER, max(gpus, 1)) if hosted else 0
    if hosted:
        share = (0.5 if both else 1.0) if gpus else 0.0
        extra = config.resources.get(TRAINER, {})
        groups.append(GroupPlan(TRAINER, hosted, tuple(range(trainers)), config.cpus_per_worker, share, extra))
    if "generator" in roles:
        generators = config.workers.get("generator", max(gpus // width, 1))
        share = (0.5 if both else float(width)) if gpus else 0.0
        first = 0 if gpus else trainers  # without a GPU to share they need not be on one node
        bundles = tuple(range(first, first + generators))
        cpus, extra = config.cpus_per_worker * width, config.resources.get("generator", {})
        groups.append(GroupPlan("generator", ("generator",), bundles, cpus, share, extra))
    return tuple(groups)


def _check_fit(config: ClusterConfig, placement: Placement, resources: Resources, gpus: int) -> None:
    described = workers_of(placement)
    needs = {kind: sum(bundle.get(kind, 0.0) for bundle in placement.bundles) for kind in ("CPU", "GPU")}
    if needs["GPU"] > gpus:
        raise PlacementError(
            f"cluster.placement={config.placement} ({described}) takes {needs['GPU']:g} GPUs: "
            f"{needs['GPU'] - gpus:g} are missing.",
            limit=f"There are {gpus}"
            + (
                f", of {resources.gpus:g} in this cluster (cluster.gpus={config.gpus})."
                if gpus < resources.gpus
                else "."
            ),
            remedy="Set fewer workers in cluster.workers"
            + ("." if config.placement == "shared" else ", or cluster.placement=shared."),
        )
    if needs["CPU"] > resources.cpus:
        raise PlacementError(
            f"cluster.placement={config.placement} ({described}) takes {needs['CPU']:g} logical CPUs, "
            f"cluster.cpus_per_worker={config.cpus_per_worker:g} each: {needs['CPU'] - resources.cpus:g} are missing.",
            limit=f"Ray counts {resources.cpus:g} in this cluster.",
            remedy="Lower cluster.cpus_per_worker (what Ray counts; cluster.threads is what torch uses), "
            "or set fewer workers.",
        )
    for group in placement.groups:
        need = placement.bundles[group.bundles[0]]
        if resources.nodes and not any(_holds(node.has, need) for node in resources.nodes):
            has = "; ".join(f"{node.name} {_told(node.has, need)}" for node in resources.nodes)
            raise PlacementError(
                f"A worker of the group {group.name!r} takes {_told(need, need)} of one node: no node has that.",
                limit=f"There are {has}.",
                remedy="Lower cluster.cpus_per_worker or generator.tensor_parallel, or name in cluster.resources what "
                "nodes have.",
            )


def all_fit(bundles: Sequence[Bundle], nodes: Sequence[Node]) -> bool:
    """Whether the bundles go onto the nodes, each whole on one of them: the largest first, onto the fullest that can.

    A yes is certain. A no may be wrong where only another order would do.
    """
    free = [dict(node.has) for node in nodes]
    for need in sorted(bundles, key=lambda one: (one.get("GPU", 0.0), len(one), one.get("CPU", 0.0)), reverse=True):
        able = [one for one in free if _holds(one, need)]
        if not able:
            return False
        # What is scarce is kept for those that need it.
        home = min(able, key=lambda one: (one.get("GPU", 0.0), len(one), one.get("CPU", 0.0)))
        for kind, amount in need.items():
            home[kind] -= amount
    return True


def _holds(has: Bundle, need: Bundle) -> bool:
    return all(has.get(kind, 0.0) >= amount - 1e-9 for kind, amount in need.items())


def _told(amounts: Bundle, kinds: Bundle) -> str:
    return ", ".join(f"{amounts.get(kind, 0.0):g} {kind}" for kind in kinds)
