"""Whether two run folders hold the same run, bit for bit."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from sqlalchemy import URL

from rlhf.disk import MANIFEST
from rlhf.rankings_db import RankingsDB

# What tells how long something took or how much it used, and so differs between two runs that are the same.
MEASURED_PREFIXES = ("time/", "memory/")
MEASURED_SUFFIX = "_s"  # seconds, and anything per second
MEASURED = frozenset({"times", "sync_share", "save_share", "peak_memory_gib"})
ABSENT = object()


def differences(one: Path, other: Path) -> list[str]:
    """What differs between two run folders, a line each with file, key and largest difference; empty if nothing does.

    Compared are roles, models, checkpoints (those of steps that both kept, and which steps are the newest), rankings,
    answers, metrics and the stages' results. How long something took, when it was, and how much memory it used are not.
    """
    return [
        *_folders(one, other, "roles/*"),
        *_folders(one, other, "models/*", skip=("adapter_config.json",)),
        *_checkpoints(one, other),
        *_rankings(one, other),
        *_samples(one, other),
        *_metrics(one, other),
        *_results(one, other),
    ]


def tensor_difference(one: torch.Tensor, other: torch.Tensor) -> str | None:
    """How two tensors differ; None if dtype, shape and every bit are the same, a NaN being like another."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return f"{_kind(one)} and {_kind(other)}"
    left, right = _bits(one), _bits(other)
    if torch.equal(left, right):
        return None
    changed = int((left != right).any(1).sum())
    left, right = one.double().flatten(), other.double().flatten()
    gaps = torch.where((left == right) | (left.isnan() & right.isnan()), 0.0, (left - right).abs())
    return f"{changed} of {one.numel()} numbers differ, by up to {float(gaps.max()):.3g}"


def value_differences(one: object, other: object, key: str = "") -> Iterator[str]:
    """`key: how` for all that differs in two values as JSON holds them; numbers exactly, NaN like NaN, types too.

    Lists of numbers are told in one line, with the largest difference.
    """
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for name in _in_both_orders(one, other):
            inner = f"{key}.{name}" if key else str(name)
            yield from value_differences(one.get(name, ABSENT), other.get(name, ABSENT), inner)
    elif isinstance(one, list) and isinstance(other, list):
        yield from _list_differences(cast(list[Any], one), cast(list[Any], other), key)
    elif not _same(one, other):
        yield _at(key, f"{_shown(one)} and {_shown(other)}{_by(one, other)}")


def _list_differences(one: list[Any], other: list[Any], key: str) -> Iterator[str]:
    if len(one) != len(other):
        yield _at(key, f"{len(one)} and {len(other)} entries")
    elif one and all(_is_number(value) for value in (*one, *other)):
        wrong = [(a, b) for a, b in zip(one, other, strict=True) if not _same(a, b)]
        if wrong:
            gaps = [abs(a - b) for a, b in wrong]
            largest = math.nan if any(math.isnan(gap) for gap in gaps) else max(gaps)
            yield _at(key, f"{len(wrong)} of {len(one)} numbers differ, by up to {largest:.3g}")
    else:
        for number, (a, b) in enumerate(zip(one, other, strict=True)):
            yield from value_differences(a, b, f"{key}[{number}]")


def _at(key: str, text: str) -> str:
    return f"{key}: {text}" if key else text


def _folders(one: Path, other: Path, pattern: str, skip: Sequence[str] = ()) -> Iterator[str]:
    """Differences of the tensors and JSON files of all folders that match; manifests hold only checksums of them."""
    names = sorted({str(path.relative_to(root)) for root in (one, other) for path in root.glob(pattern)})
    for name in (name for name in names if not Path(name).name.startswith(".")):
        yield from _folder(one, other, name, skip)


def _folder(one: Path, other: Path, name: str, skip: Sequence[str] = ()) -> Iterator[str]:
    files = {
        path.name
        for root in (one, other)
        for path in (root / name).glob("*")
        if path.suffix in (".safetensors", ".json") and path.name not in (MANIFEST, *skip)
    }
    for file in sorted(files):
        left, right = one / name / file, other / name / file
        if not (left.exists() and right.exists()):
            yield f"{name}/{file}: only in {one if left.exists() else other}"
        elif left.suffix == ".safetensors":
            yield from (f"{name}/{file}: {line}" for line in _tensors(load_file(left), load_file(right)))
        else:
            both = (json.loads(path.read_bytes()) for path in (left, right))
            yield from (f"{name}/{file}: {line}" for line in value_differences(*both))


def _tensors(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> Iterator[str]:
    for name in _in_both_orders(one, other):
        if name not in one or name not in other:
            yield f"{name}: only in the {'first' if name in one else 'second'}"
        elif how := tensor_difference(one[name], other[name]):
            yield f"{name}: {how}"


def _checkpoints(one: Path, other: Path) -> Iterator[str]:
    left, right = _steps(one / "checkpoints"), _steps(other / "checkpoints")
    for stage in _in_both_orders(left, right):
        here, there = left.get(stage, set()), right.get(stage, set())
        place = f"checkpoints/{stage}"
        if max(here, default=None) != max(there, default=None):
            newest = " and ".join(str(max(steps, default="none")) for steps in (here, there))
            yield f"{place}: the newest steps are {newest}"
        for step in sorted(here & there):
            yield from _folder(one, other, f"{place}/step-{step}")


def _steps(folder: Path) -> dict[str, set[int]]:
    """Stage -> the steps that have a checkpoint."""
    steps: dict[str, set[int]] = {}
    for path in sorted(folder.glob("*/step-*")):
        if match := re.fullmatch(r"step-(\d+)", path.name):
            steps.setdefault(path.parent.name, set()).add(int(match[1]))
    return steps


def _rankings(one: Path, other: Path) -> Iterator[str]:
    left, right = _tiers(one), _tiers(other)
    for key in _in_both_orders(left, right):
        here, there = left.get(key, ABSENT), right.get(key, ABSENT)
        if here != there:
            prompt, by, round = key
            yield f"rankings.db: prompt {prompt}, by {by}, round {round}: {_shown(here)} and {_shown(there)}"


def _tiers(folder: Path) -> dict[tuple[str, str, int], list[list[int]]]:
    path = folder / "rankings.db"
    if not path.exists():
        return {}
    database = RankingsDB(URL.create("sqlite", database=str(path)))
    try:
        return {(r.prompt_id, r.by, r.round): [list(tier) for tier in r.tiers] for r in database.rankings()}
    finally:
        database.close()


def _samples(one: Path, other: Path) -> Iterator[str]:
    for name in sorted({path.name for root in (one, other) for path in (root / "samples").glob("*.jsonl")}):
        file = f"samples/{name}"
        left, right = _rows(one / file), _rows(other / file)
        yield from _row_differences(file, left, right, [[_prompt(row) for row in rows] for rows in (left, right)])


def _prompt(row: Any) -> str:
    return f"prompt {row['prompt']['id']}" if isinstance(row, dict) else "a torn line"


def _metrics(one: Path, other: Path) -> Iterator[str]:
    left, right = (_measured_out(_rows(root / "metrics.jsonl")) for root in (one, other))
    yield from _row_differences("metrics.jsonl", left, right, [[_step(row) for row in rows] for rows in (left, right)])


def _step(row: Any) -> str:
    return f"{row['stage']} step {row['step']}" if isinstance(row, dict) else "a torn line"


def _row_differences(file: str, one: list[Any], other: list[Any], names: list[list[str]]) -> Iterator[str]:
    """Differences of the rows that have the same name; first of all, whether the names are the same and in order."""
    left, right = names
    if left != right:
        at = next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
        first = " and ".join(names[at] if at < len(names) else "nothing" for names in (left, right))
        yield f"{file}: {len(left)} and {len(right)} rows, the first that are not the same: {first} in line {at + 1}"
    rows = dict(zip(right, other, strict=True))
    for name, row in dict(zip(left, one, strict=True)).items():
        if name in rows:
            yield from (f"{file}: {name}: {line}" for line in value_differences(row, rows[name]))


def _rows(path: Path) -> list[Any]:
    """The rows of a journal as it lies there, a torn line as its bytes; nothing is mended."""
    rows: list[Any] = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            rows.append(repr(line))
    return rows


def _results(one: Path, other: Path) -> Iterator[str]:
    left, right = (_measured_out(_stage_results(root)) for root in (one, other))
    yield from (f"{MANIFEST}: {line}" for line in value_differences(left, right))


def _stage_results(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    stages = json.loads(path.read_bytes())["stages"] if path.exists() else {}
    return {stage: entry["results"] for stage, entry in stages.items()}


def _measured_out(value: Any) -> Any:
    """The value without what is measured anew in each run, all the way down."""
    if isinstance(value, dict):
        return {
            key: _measured_out(inner)
            for key, inner in cast(dict[str, Any], value).items()
            if not (key.startswith(MEASURED_PREFIXES) or key.endswith(MEASURED_SUFFIX) or key in MEASURED)
        }
    if isinstance(value, list):
        return [_measured_out(inner) for inner in cast(list[Any], value)]
    return value


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """[numbers, bytes of each], every NaN written in the same way."""
    flat = tensor.detach().flatten()
    if flat.is_floating_point():
        flat = torch.where(flat.isnan(), torch.full_like(flat, math.nan), flat)
    return flat.contiguous().view(torch.uint8).view(flat.numel(), flat.element_size())


def _kind(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _same(one: object, other: object) -> bool:
    if type(one) is not type(other):
        return False
    return repr(one) == repr(other) if isinstance(one, float) else one == other  # repr: NaN is NaN, -0 is not 0


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _by(one: object, other: object) -> str:
    if isinstance(one, int | float) and isinstance(other, int | float) and _is_number(one) and _is_number(other):
        return f", a difference of {abs(one - other):.3g}"
    return ""


def _shown(value: object) -> str:
    if value is ABSENT:
        return "nothing"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _in_both_orders(one: Mapping[Any, Any], other: Mapping[Any, Any]) -> list[Any]:
    """The keys of the first, then those that only the second has."""
    return [*one, *(key for key in other if key not in one)]
