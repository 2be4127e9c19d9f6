"""The layouts that come into question for a budget, each with its time: what the recipe fixes is kept."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from cluster.placement import ROLES, TRAINER, Role
from cluster.plan.budget import Budget
from cluster.plan.fit import Fit, Shortage, fit, role_parts
from cluster.plan.times import ByRole, Times, combine, estimate, generate_time, role_times
from cluster.plan.work import Layout, Work, fixed

MICRO_BATCHES = (16384, 8192, 4096, 2048, 1024, 512)
WIDTHS = (1, 2, 4, 8, 16)  # tensor parallel
SMALLEST_GROUPS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
WORTH = 0.002  # a larger group that saves less of a step is not worth its GPUs


@dataclass(frozen=True, slots=True)
class Candidate:
    """A layout that fits, and how long a step takes."""

    fit: Fit
    times: Times
    num_gpus: int


@dataclass(frozen=True, slots=True)
class Open:
    """What is tried for each key: one value where the recipe fixes it."""

    placements: tuple[str, ...]
    zero_stages: tuple[int, ...]
    micro_batches: tuple[int, ...]
    checkpointing: tuple[bool, ...]
    widths: tuple[int, ...]
    workers: Mapping[str, int]
    share: float | None
    limit: int  # GPUs


def open_keys(work: Work, budget: Budget) -> Open:
    """What the recipe leaves open."""
    recipe, keys = work.recipe, fixed(work.recipe)
    learner, generator, cluster = recipe.learner, recipe.generator, recipe.cluster
    widths = tuple(w for w in WIDTHS if not work.shape.heads % w and w <= budget.gpus_per_node)
    limit = budget.num_gpus if cluster.gpus == "auto" else min(cluster.gpus, budget.num_gpus)
    share = "generator.gpu_memory_share" in keys and generator.kv_cache_gib is None
    return Open(
        _placements(work),
        (0, 2, 3) if "learner.zero_stage" not in keys else (learner.zero_stage,),
        MICRO_BATCHES if "learner.micro_batch_tokens" not in keys else (learner.micro_batch_tokens,),
        (False, True) if "learner.gradient_checkpointing" not in keys else (learner.gradient_checkpointing,),
        widths if "generator.tensor_parallel" not in keys else (generator.tensor_parallel,),
        {str(name): number for name, number in cluster.workers.items()},
        generator.gpu_memory_share if share else None,
        limit,
    )


def _placements(work: Work) -> tuple[str, ...]:
    """Those that have the groups whose workers the recipe sets, and that do what it asks for."""
    cluster = work.recipe.cluster
    asked = set(cluster.workers) - ({TRAINER} if work.makes else set())
    groups = {"shared": {TRAINER, "generator"}, "separate": set(ROLES)}
    found = tuple(name for name, has in groups.items() if asked <= has) or ("shared",)
    if "cluster.placement" in fixed(work.recipe):
        found = (cluster.placement,)
    return tuple(name for name in found if name == "separate" or not work.overlaps)


def candidates(work: Work, budget: Budget, *, grows: bool = True) -> Iterator[Candidate]:
    """Yields layouts that fit; if not `grows`, separate groups with the fewest workers.

    If there is one for n GPUs, there is one for n + 1: the fewest workers of separate groups do not hang on n, and a
    trainer's worker takes no more memory beside more others, once it has any.
    """
    choice = open_keys(work, budget)
    if "shared" in choice.placements:
        yield from _shared(work, budget, choice)
    if "separate" in choice.placements and work.roles:
        yield from _separate(work, budget, choice, grows)


def shortages(work: Work, budget: Budget) -> Iterator[Shortage]:
    """Yields what each layout lacks that takes the least memory, with as many GPUs as there are."""
    choice = open_keys(work, budget)
    for placement in choice.placements:
        width = 1 if placement == "shared" and work.hosted else max(choice.widths)
        group = max(choice.limit, 1)
        names = (TRAINER, "generator") if placement == "shared" else work.roles
        workers = {name: choice.workers.get(name, group) for name in names}
        for stage in _stages(work, choice, placement):
            layout = Layout(
                placement, stage, min(choice.micro_batches), max(choice.checkpointing), width, workers,  # type: ignore[arg-type]
                choice.share,
            )  # fmt: skip
            found = fit(work, layout)
            if isinstance(found, Shortage):
                yield found


def smallest_groups(work: Work, budget: Budget) -> Mapping[str, int]:
    """GPUs that each role takes at least in a group of its own, of the layout that takes the fewest; empty if none."""
    choice = open_keys(work, budget)
    found = [
        {role: choice_of[role] * (layout.tensor_parallel if role == "generator" else 1) for role in work.roles}
        for layout in _settings(choice)
        if (choice_of := _smallest(work, layout, choice, max(SMALLEST_GROUPS)))
    ]
    return min(found, key=lambda groups: sum(groups.values()), default={})


def _shared(work: Work, budget: Budget, choice: Open) -> Iterator[Candidate]:
    for width in choice.widths if not (work.hosted and work.generates) else {1} & set(choice.widths):
        trainers = choice.workers.get(TRAINER) if work.trains else None
        engines = choice.workers.get("generator") if work.generates else None
        known = [number for number in (trainers, engines) if number is not None]
        most = choice.limit // (1 if work.hosted else width)
        sizes = {number for number in SMALLEST_GROUPS if number <= most} | ({most} if most else set[int]())
        for number in [max(known)] if known else sorted(sizes):
            workers: dict[str, int] = {}
            if work.trains:
                workers[TRAINER] = trainers or number * (1 if work.hosted else width)
            if work.generates:
                workers["generator"] = engines or number
            layout = Layout("shared", 0, 0, False, width, workers, choice.share)
            gpus = layout.num_gpus(work.roles)
            wide = 0 if work.hosted else workers.get("generator", 0)
            if gpus <= choice.limit and budget.holds(gpus - wide * width, wide, width):
                yield from _variants(work, budget, choice, layout)


def _variants(work: Work, budget: Budget, choice: Open, layout: Layout) -> Iterator[Candidate]:
    """Yields the learner's settings that fit with these workers, each with the longest passes."""
    one = layout.workers.get(TRAINER, 1) == 1
    stages = _stages(work, choice, "shared")
    for stage in stages[:1] if one else stages:
        for checkpointing in choice.checkpointing:
            for tokens in choice.micro_batches:
                set_so = replace(
                    layout, zero_stage=stage, micro_batch_tokens=tokens, gradient_checkpointing=checkpointing
                )
                found = fit(work, set_so)
                if isinstance(found, Fit):
                    yield _candidate(work, budget, found)
                    break


def _stages(work: Work, choice: Open, placement: str) -> list[int]:
    """ZeRO stages that the placement allows: roles that share a base take 0 to 2."""
    return [stage for stage in choice.zero_stages if stage < 3 or placement == "separate" or not work.hosted]


def _settings(choice: Open) -> Iterator[Layout]:
    """Yields the settings of separate groups, without workers; longest passes first."""
    for stage in choice.zero_stages:
        for checkpointing in choice.checkpointing:
            for width in choice.widths:
                for tokens in choice.micro_batches:
                    yield Layout("separate", stage, tokens, checkpointing, width, {}, choice.share)


def _separate(work: Work, budget: Budget, choice: Open, grows: bool) -> Iterator[Candidate]:
    done: set[tuple[int, bool, int]] = set()
    for settings in _settings(choice):
        kind = (settings.zero_stage, settings.gradient_checkpointing, settings.tensor_parallel)
        if kind in done:
            continue
        smallest = _smallest(work, settings, choice, choice.limit)
        if smallest and _places(work, budget, choice, replace(settings, workers=smallest)):
            layout = replace(settings, workers=smallest)
            found = fit(work, layout)
            if isinstance(found, Fit):  # `pretrain` and `sft` too
                done.add(kind)
                yield _grown(work, budget, choice, layout) if grows else _candidate(work, budget, found)


def _places(work: Work, budget: Budget, choice: Open, layout: Layout) -> bool:
    """Whether all its workers find GPUs, tensor-parallel ranks on one node."""
    engines = layout.world("generator") if work.generates else 0
    singles = sum(layout.world(role) for role in work.hosted)
    width = layout.tensor_parallel
    return singles + engines * width <= choice.limit and budget.holds(singles, engines, width)


def _smallest(work: Work, settings: Layout, choice: Open, most: int) -> dict[str, int]:
    """The fewest workers of each role with which it fits; empty where one never does."""
    found: dict[str, int] = {}
    for role in work.roles:
        given = choice.workers.get(role)
        tries = (given,) if given is not None else _group_sizes(settings, role, most)
        for number in tries:
            _, needs, has, _ = role_parts(work, replace(settings, workers={role: number}), role)
            if needs <= has:
                found[role] = number
                break
        else:
            return {}
    return found


def _group_sizes(settings: Layout, role: Role, most: int) -> Iterable[int]:
    if role == "generator" or settings.zero_stage == 0:
        return (1,)  # more of them do not make one smaller
    return (number for number in SMALLEST_GROUPS if number <= most)


def _grown(work: Work, budget: Budget, choice: Open, layout: Layout) -> Candidate:
    """The layout with more workers where that saves most of a step for each GPU, until nothing fits or helps."""
    growing = Growing(work, budget, layout)
    moves = [move for move in _moves(work) if not any(role in choice.workers for role in move)]
    most = max(work.num_answers // work.recipe.ppo.num_minibatches, 1)
    while True:
        now = growing.step(growing.layout)
        options: list[tuple[float, Layout]] = []
        for move in moves:
            larger = dict(growing.layout.workers)
            for role in move:
                larger[role] += 1
            wider = replace(growing.layout, workers=larger)
            if max(larger.values()) > most or not _places(work, budget, choice, wider):
                continue
            gpus = wider.num_gpus(work.roles) - growing.layout.num_gpus(work.roles)
            saved = now - growing.step(wider)
            if saved > WORTH * now * gpus:
                options.append((saved / gpus, wider))
        if not options:
            break
        growing.layout = max(options, key=lambda option: option[0])[1]
    found = fit(work, growing.layout)
    if not isinstance(found, Fit):  # several workers lay their gradients together: one may need the room for it
        growing.layout = layout
        found = fit(work, layout)
        assert isinstance(found, Fit)
    return _candidate(work, budget, found)


class Growing:
    """A layout that grows; what a role takes with so many workers is computed once."""

    def __init__(self, work: Work, budget: Budget, layout: Layout) -> None:
        self.layout = layout
        self._work, self._per_node = work, budget.gpus_per_node
        found = fit(work, layout)
        assert isinstance(found, Fit)
        self._cache = _cache_of(found)
        self._known: dict[tuple[str, int], tuple[float, float]] = {}

    def step(self, layout: Layout) -> float:
        """Seconds of a step of PPO; of answers alone where there is no PPO."""
        by_role = ByRole((role, self._times(layout, role)) for role in self._work.hosted)
        generate = self._times(layout, "generator")[0] if self._work.generates else 0.0
        return combine(self._work, layout, by_role, generate).step

    def _times(self, layout: Layout, role: Role) -> tuple[float, float]:
        key = (role, layout.world(role))
        if key not in self._known:
            self._known[key] = (
                (generate_time(self._work, layout, self._cache), 0.0)
                if role == "generator"
                else role_times(self._work, layout, role, self._per_node)
            )
        return self._known[key]


def _moves(work: Work) -> Sequence[tuple[Role, ...]]:
    """Groups that may grow by one worker each at the same time: those that wait for one another."""
    trainers: tuple[Role, ...] = tuple(role for role in ("policy", "critic", "reference") if role in work.roles)
    together = [trainers[:number] for number in range(1, len(trainers) + 1)]
    alone: list[tuple[Role, ...]] = [(role,) for role in work.roles if role != "policy"]
    return [move for move in [*together, *alone] if move]


def _candidate(work: Work, budget: Budget, found: Fit) -> Candidate:
    times = estimate(work, found.layout, _cache_of(found), budget.gpus_per_node)
    return Candidate(found, times, found.layout.num_gpus(work.roles))


def _cache_of(found: Fit) -> int:
    return next((load.parts.kv_cache for load in found.loads if load.group == "generator"), 0)
