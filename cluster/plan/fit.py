"""Whether a layout fits: what each group of workers takes of a GPU, and what there is."""

from __future__ import annotations

from dataclasses import dataclass, replace

from cluster.placement import TRAINER, Role
from cluster.plan.engine_memory import asleep, engine_fixed, engine_parts, smallest_cache
from cluster.plan.memory import HEAD_ROOM, Parts, trainer_parts
from cluster.plan.model_memory import model_parts
from cluster.plan.work import Layout, Work

LARGEST_SHARE = 0.9  # of a GPU that an engine is given


@dataclass(frozen=True, slots=True)
class Load:
    """What the workers of one group take on a GPU each."""

    group: str
    roles: tuple[Role, ...]
    num_workers: int
    gpus_each: int
    parts: Parts


@dataclass(frozen=True, slots=True)
class Shortage:
    """What keeps a layout from fitting: the worst of its groups. Bytes on one GPU."""

    role: str
    needs: int
    has: int
    parts: Parts
    why: str  # in words, where the sum alone does not say it

    @property
    def missing(self) -> int:
        return self.needs - self.has


@dataclass(frozen=True, slots=True)
class Fit:
    """A layout that fits, with its share of the GPU for the engine chosen if it was open, and what is free."""

    layout: Layout
    loads: tuple[Load, ...]
    free: int  # bytes on the fullest GPU, over the head-room


def fit(work: Work, layout: Layout) -> Fit | Shortage:
    """The layout with its loads, or the group that lacks the most. Pure arithmetic; the same for the same arguments."""
    made = _made(work, layout)
    if isinstance(made, Shortage):
        return made
    if work.device.is_cpu:
        found = _on_cpu(work, layout)
    else:
        found = (_shared if layout.placement == "shared" else _separate)(work, layout)
    return replace(found, loads=(*made, *found.loads)) if isinstance(found, Fit) else found


def _made(work: Work, layout: Layout) -> tuple[Load, ...] | Shortage:
    """The workers of `pretrain` and `sft`, which have the GPUs to themselves, or the first that does not fit."""
    loads: list[Load] = []
    world = layout.workers.get(TRAINER) or max(layout.num_gpus(work.roles), 1)
    for stage in work.makes:
        parts = model_parts(work, layout, stage, world)
        has = room(work) // (world if work.device.is_cpu else 1)
        if parts.total > has:
            return Shortage(stage, parts.total, has, parts, "")
        loads.append(Load(stage, (), world, 0 if work.device.is_cpu else 1, parts))
    return tuple(loads)


def role_parts(work: Work, layout: Layout, role: Role) -> tuple[Parts, int, int, str]:
    """(parts on each GPU, bytes that they need, bytes that there are, why) of a role in a group of its own."""
    if role != "generator":
        parts = trainer_parts(work, layout, (role,), layout.world(role))
        return parts, parts.total, room(work), ""
    chosen = _with_share(work, layout, LARGEST_SHARE)
    parts = engine_parts(work, chosen)
    has = room(work)
    if work.recipe.generator.kv_cache_gib is None:
        has = int((chosen.gpu_memory_share or 0) * work.device.usable)
    needs = max(engine_fixed(work, chosen).total + smallest_cache(work, chosen), parts.total)
    return parts, needs, has, f"with a KV cache for one prompt and its {work.recipe.sampling.n} answers"


def room(work: Work) -> int:
    """Bytes of a GPU that parts may take: the usable memory without head-room."""
    return int(work.device.usable * (1 - HEAD_ROOM))


def _separate(work: Work, layout: Layout) -> Fit | Shortage:
    """Each worker has a GPU of its own."""
    loads: list[Load] = []
    shortages: list[Shortage] = []
    for role in work.roles:
        parts, needs, has, why = role_parts(work, layout, role)
        if needs > has:
            shortages.append(Shortage(role, needs, has, parts, why))
        width = layout.tensor_parallel if role == "generator" else 1
        loads.append(Load(role, (role,), layout.world(role), width, parts))
    if shortages:
        return max(shortages, key=lambda shortage: shortage.missing)
    free = min((room(work) - load.parts.total for load in loads), default=room(work))
    return Fit(_with_share(work, layout, LARGEST_SHARE), tuple(loads), free)


def _on_cpu(work: Work, layout: Layout) -> Fit | Shortage:
    """All processes share the machine's memory, and a generator does not sleep."""
    loads: list[Load] = []
    groups: dict[str, tuple[Role, ...]] = {role: (role,) for role in work.roles}
    if layout.placement == "shared":
        groups = {TRAINER: work.hosted} if work.hosted else {}
        groups |= {"generator": ("generator",)} if work.generates else {}
    for name, roles in groups.items():
        world = layout.world(roles[0])
        parts = engine_parts(work, layout) if name == "generator" else trainer_parts(work, layout, roles, world)
        loads.append(Load(name, roles, world, 0, parts))
    has, needs = room(work), sum(load.num_workers * load.parts.total for load in loads)
    if needs > has:
        largest = max(loads, key=lambda load: load.num_workers * load.parts.total)
        return Shortage(largest.group, needs, has, largest.parts, "with all other processes of the run")
    return Fit(layout, tuple(loads), has - needs)


def _shared(work: Work, layout: Layout) -> Fit | Shortage:
    """A GPU holds a trainer and an engine that take turns.

    When the turn passes, torch gives back what it keeps for the trainer's next pass (cluster/team.py), and the engine
    sleeps.
    """
    has = room(work)
    loads: list[Load] = []
    trainer = Parts()
    if work.hosted:
        world = layout.world("policy")
        trainer = trainer_parts(work, layout, work.hosted, world)
        if trainer.total > has:
            return Shortage("trainer", trainer.total, has, trainer, "")
        loads.append(Load("trainer", work.hosted, world, 1, trainer))
    if not work.generates:
        return Fit(layout, tuple(loads), has - trainer.total)
    beside = trainer.resting
    left = has - beside
    chosen = _with_share(work, layout, min(left / work.device.usable, LARGEST_SHARE)) if left > 0 else layout
    engine = engine_fixed(work, chosen)
    needs = engine.total + smallest_cache(work, chosen)
    why = f"beside a resting trainer of {beside / 2**30:.1f} GiB, with a KV cache for one prompt and its answers"
    if left <= 0 or needs > left:
        return Shortage("generator", needs, max(left, 0), engine, why)
    parts = engine_parts(work, chosen)
    if parts.kv_cache < smallest_cache(work, chosen) or parts.total > left:
        # The recipe fixes the share or the cache.
        needs = max(needs, parts.total)
        given = left if parts.total > left else int((chosen.gpu_memory_share or 0) * work.device.usable)
        return Shortage("generator", needs, given, parts, why)
    asleep_beside = trainer.total + asleep(parts)
    if asleep_beside > has:
        return Shortage("trainer", trainer.total, has - asleep(parts), trainer, "beside a sleeping generator")
    loads.append(Load("generator", ("generator",), layout.world("generator"), layout.tensor_parallel, parts))
    return Fit(chosen, tuple(loads), has - max(beside + parts.total, asleep_beside))


def _with_share(work: Work, layout: Layout, share: float) -> Layout:
    """The layout with this share of the GPU for the engine, in whole percent, if neither it nor the cache is fixed."""
    if layout.gpu_memory_share is not None or work.recipe.generator.kv_cache_gib is not None or work.device.is_cpu:
        return layout
    return replace(layout, gpu_memory_share=int(100 * share) / 100)
