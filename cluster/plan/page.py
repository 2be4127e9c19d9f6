"""A plan as a page for people, and as plain values that JSON can hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from cluster.plan.budget import Budget
from cluster.plan.fit import Load, room
from cluster.plan.memory import Parts, gib
from cluster.plan.remedies import explained
from cluster.plan.search import Plan, Refusal, settings
from cluster.plan.work import Work, fixed
from rlhf.wording import duration

NAMES = tuple(part.name for part in fields(Parts))


def to_json(found: Plan | Refusal) -> dict[str, object]:
    """Everything of a plan or a refusal; memory in bytes, time in seconds."""
    work, budget = found.work, found.budget
    about: dict[str, object] = {
        "fits": isinstance(found, Plan),
        "model": {"name": work.shape.name, "parameters": work.shape.num_parameters},
        "budget": {
            "gpus": budget.num_gpus,
            "gpus_per_node": budget.gpus_per_node,
            "device": budget.device.name,
            "label_gb": budget.device.label_gb,
            "usable_bytes": budget.device.usable,
        },
    }
    if isinstance(found, Refusal):
        error = explained(found)
        return about | {"refusal": {"role": found.role, "problem": error.problem, "limit": error.limit,
                                    "remedy": error.remedy}}  # fmt: skip
    return about | {
        "gpus_used": found.num_gpus,
        "settings": settings(found.recipe),
        "chosen": sorted(found.chosen),
        "groups": [
            {
                "group": load.group,
                "roles": list(load.roles),
                "workers": load.num_workers,
                "gpus_each": load.gpus_each,
                "bytes": {name: getattr(load.parts, name) for name in NAMES} | {"total": load.parts.total},
            }
            for load in found.fit.loads
        ],
        "free_bytes": found.fit.free,
        "estimated_seconds": {**found.times.by_phase(), "step": found.times.step},
    }


def page(found: Plan | Refusal) -> RenderableType:
    """The plan, or why there is none, for rich to print."""
    head = _head(found.work, found.budget)
    if isinstance(found, Refusal):
        error = explained(found)
        lines = [Text(f"It does not fit. {error.problem}", style="bold"), Text(error.limit), Text(error.remedy)]
        return Group(head, Text(), *lines)
    parts: list[RenderableType] = [head, Padding(_settings(found), (1, 0, 0, 0))]
    if found.fit.loads:
        parts += [Padding(_memory(found), (1, 0, 0, 0)), Text(_below(found))]
    parts.append(Padding(_times(found), (1, 0, 0, 0)))
    return Group(*parts)


def comparison(found: Sequence[Plan | Refusal]) -> RenderableType:
    """A line for each budget: what it becomes, how long a step takes, and what it costs."""
    table = _table("GPUs", "used", "placement", "workers", "ZeRO", "tokens a pass", "step", "GPU-seconds", "")
    for one in found:
        if isinstance(one, Refusal):
            table.add_row(str(one.budget.num_gpus), *[""] * 7, Text(one.problem))
            continue
        layout = one.fit.layout
        checkpointing = ", checkpointing" if layout.gradient_checkpointing else ""
        wide = f", each on {layout.tensor_parallel} GPUs" if layout.tensor_parallel > 1 else ""
        workers = ", ".join(f"{load.group} {load.num_workers}" for load in one.fit.loads) + wide
        table.add_row(
            str(one.budget.num_gpus), str(one.num_gpus), layout.placement, workers, str(layout.zero_stage),
            f"{layout.micro_batch_tokens:,}{checkpointing}", duration(one.times.step),
            f"{one.times.step * one.num_gpus:,.0f}", "",
        )  # fmt: skip
    note = Text("Steps are estimates from the device's peaks, with answers of full length; none was measured on a GPU.")
    return Group(table, note)


def line(found: Plan) -> str:
    """What a run says of its plan before it starts."""
    if found.budget.device.is_cpu:
        needs = sum(load.num_workers * load.parts.total for load in found.fit.loads)
        return f"plan: no GPU; about {gib(needs)} of this machine's {gib(found.budget.device.usable)} of memory"
    layout = found.fit.layout
    groups = ", ".join(f"{load.group} {load.num_workers}" for load in found.fit.loads)
    settled = [
        f"{layout.placement} on {found.num_gpus} of {found.budget.num_gpus} GPUs ({groups})",
        f"ZeRO {layout.zero_stage}",
        f"{layout.micro_batch_tokens:,} tokens a pass" + (", checkpointing" if layout.gradient_checkpointing else ""),
    ]
    if layout.tensor_parallel > 1:
        settled.append(f"tensor parallel {layout.tensor_parallel}")
    if layout.gpu_memory_share is not None and found.work.generates:
        settled.append(f"{layout.gpu_memory_share:.0%} of a GPU for the engine")
    return (
        f"plan: {'; '.join(settled)}; {gib(found.fit.free)} free, a step about {duration(found.times.step)} (estimate)"
    )


def _head(work: Work, budget: Budget) -> RenderableType:
    shape, device = work.shape, budget.device
    grid = Table.grid(padding=(0, 2))
    dtype = work.recipe.model.dtype
    grid.add_row("model", Text(f"{shape.name}: {shape.num_parameters:,} parameters, {dtype}"))
    if device.is_cpu:
        grid.add_row("machine", Text(f"no GPU, {gib(device.usable)} of memory"))
        return grid
    grid.add_row(
        "GPUs",
        Text(f"{budget.num_gpus} x {device.name}, {budget.gpus_per_node} on a node; of {device.label_gb:g} GB on the "
             f"label {gib(device.usable)} are usable: {device.basis}"),
    )  # fmt: skip
    grid.add_row("adapter", Text(f"{shape.adapter_parameters(work.recipe.lora):,} parameters each"))
    return grid


def _settings(found: Plan) -> Table:
    table = _table("setting", "value", "by")
    kept = fixed(found.work.recipe)
    for key, value in settings(found.recipe).items():
        if found.budget.device.is_cpu and key.startswith(("cluster.gpus", "generator.gpu")):
            continue
        if key == "generator.gpu_memory_share" and found.fit.layout.gpu_memory_share is None:
            continue
        shown = ", ".join(f"{name} {number}" for name, number in value.items()) if isinstance(value, Mapping) else value
        by = "recipe" if key in kept else ("default" if found.budget.device.is_cpu else "plan")
        table.add_row(key, Text(str(shown)), by)
    return table


def _memory(found: Plan) -> Table:
    """Rows are parts, columns groups: what a worker of each takes on one GPU."""
    loads = found.fit.loads
    on = "process" if found.budget.device.is_cpu else "GPU"
    table = _table(f"on each {on}", *(_column(load) for load in loads))
    for name in NAMES:
        row = [getattr(load.parts, name) for load in loads]
        if any(row):
            table.add_row(
                name.replace("_", " ").replace("kv", "KV"), *(gib(amount) if amount else "-" for amount in row)
            )
    table.add_row("sum", *(gib(load.parts.total) for load in loads), style="bold")
    return table


def _column(load: Load) -> str:
    times = f" x {load.num_workers}" if load.num_workers > 1 else ""
    wide = f", {load.gpus_each} GPUs each" if load.gpus_each > 1 else ""
    return f"{load.group}{times}{wide}"


def _below(found: Plan) -> str:
    work = found.work
    usable = work.device.usable
    kept = f"head-room {gib(usable - room(work))}, free {gib(found.fit.free)}"
    if found.budget.device.is_cpu:
        return f"All processes share {gib(usable)}: {kept}."
    if len(found.fit.loads) > 1 and found.fit.layout.placement == "shared":
        return f"Both groups are on the same GPU of {gib(usable)} and take turns: {kept}."
    return f"Of {gib(usable)} on the fullest GPU: {kept}."


def _times(found: Plan) -> RenderableType:
    table = _table("phase of a step", "estimate")
    for phase, seconds in found.times.by_phase().items():
        if seconds:
            table.add_row(phase, duration(seconds))
    table.add_row("step", duration(found.times.step), style="bold")
    return table


def _table(*columns: str) -> Table:
    table = Table(*columns, box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for column in table.columns[1:]:
        column.overflow = "fold"
    return table
