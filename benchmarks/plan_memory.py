"""What a plan says that a run's workers take, against what they take: peak memory on the CPU, process by process.

    python -m benchmarks.plan_memory [--models tiny FOLDER ...]              (in the repository's root)

Runs the stages sample, rank, reward and ppo (real Ray, vLLM and DeepSpeed, critic and reward model) with prompts and
answers of full length, in passes that one prompt with its answers fills, once for each model and placement. Every
worker notes what it takes after its imports, and then its peak (VmHWM of /proc). Printed is each group's peak without
the imports beside the plan's figure without them, and the sum. It exits with 1 if a sum is off by more than 25 %.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.noted import NOTED, NOTES
from benchmarks.step import make_prompts
from cluster.console import LineConsole
from cluster.plan.budget import Budget
from cluster.plan.devices import this_cpu
from cluster.plan.engine_memory import CPU_ENGINE_IMPORTS
from cluster.plan.memory import CPU_IMPORTS
from cluster.plan.search import Plan, plan
from cluster.plan.shape import shape_of
from cluster.ray_session import RaySession
from cluster.run import run, termination_interrupts
from cluster.team import RayTeam
from configs.schema import Recipe
from rlhf.chat import ChatTokenizer
from rlhf.ports import Console, Team
from tests.tiny import make_tiny_model

MIB = 1024**2
TARGET = 0.25  # off by at most this share
PLENTY_GIB = 1024.0  # of memory, so that nothing is refused
TINY = "tiny"


@dataclass
class Row:
    """One group of one run, or all of a run's; MiB without imports."""

    model: str
    placement: str
    group: str
    predicted: float
    measured: float
    imports: float  # that were taken off what was measured

    @property
    def ratio(self) -> float:
        return self.predicted / self.measured


def main(argv: Sequence[str] | None = None) -> int:
    """0 if every sum is within the target."""
    options = _parse(argv)
    os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    rows: list[Row] = []
    for model in options.models:
        for placement in options.placements:
            with tempfile.TemporaryDirectory(prefix="tenfold-plan-") as folder:
                rows += (made := measure(model, placement, Path(folder), options))
            print(table(made), file=sys.stderr, flush=True)
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps([asdict(row) | {"ratio": row.ratio} for row in rows], indent=2) + "\n")
    return int(any(row.group == "sum" and abs(row.ratio - 1) > TARGET for row in rows))


def measure(model: str, placement: str, folder: Path, options: argparse.Namespace) -> list[Row]:
    """A row for each group of this run, and their sum."""
    path = make_tiny_model(folder / "model") if model == TINY else Path(model)
    recipe = make_recipe(path, placement, folder, options)
    notes = folder / "notes"
    notes.mkdir()
    os.environ[NOTES] = str(notes)
    run(recipe, LineConsole(sys.stderr), make_team=noted_team)
    budget = Budget(0, 1, this_cpu(PLENTY_GIB, options.threads))
    found = plan(recipe, shape_of(recipe), budget)
    assert isinstance(found, Plan)
    rows: list[Row] = []
    for load in found.fit.loads:
        imports = CPU_ENGINE_IMPORTS if load.group == "generator" else CPU_IMPORTS
        predicted = load.num_workers * (load.parts.total - imports) / MIB
        rows.append(Row(path.name, placement, load.group, predicted, *measured_mib(notes, load.group)))
    columns = ([row.predicted for row in rows], [row.measured for row in rows], [row.imports for row in rows])
    return [*rows, Row(path.name, placement, "sum", *map(sum, columns))]


def measured_mib(notes: Path, group: str) -> tuple[float, float]:
    """(peak less imports, imports) of a group, summed over its ranks; of a rank that was started twice, the larger."""
    by_rank: dict[str, tuple[float, float]] = {}
    for file in notes.glob(f"{group}-*.json"):
        noted = json.loads(file.read_text())
        found = ((noted["peak"] - noted["baseline"]) / MIB, noted["baseline"] / MIB)
        by_rank[noted["rank"]] = max(by_rank.get(noted["rank"], (0.0, 0.0)), found)
    return sum(peak for peak, _ in by_rank.values()), sum(imports for _, imports in by_rank.values())


def make_recipe(model: Path, placement: str, folder: Path, options: argparse.Namespace) -> Recipe:
    """The work: every prompt and every answer of full length."""
    chat = ChatTokenizer(str(model))
    prompts = make_prompts(chat, options.prompt_tokens, options.prompts)
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt.messages[0].content}) + "\n" for prompt in prompts))
    return Recipe.model_validate(
        {
            "name": "plan",
            "runs": str(folder / "runs"),
            "stages": ["sample", "rank", "reward", "ppo"],
            "model": {"path": str(model), "dtype": "float32"},
            "data": {"prompts": str(file), "held_out": 0.0, "max_prompt_tokens": options.prompt_tokens},
            "sampling": {"max_answer_tokens": options.answer_tokens},
            "learner": {"micro_batch_tokens": options.micro_batch_tokens},
            "generator": {"kv_cache_gib": options.kv_cache_gib},
            "rules": [{"name": "short"}, {"name": "not_repetitive"}],
            "reward": {"groups_per_batch": 2, "held_out": 0.0},
            "ppo": {"num_steps": 2, "num_prompts": options.prompts},
            "cluster": {"placement": placement, "threads": options.threads, "plan": False},
            "tracker": {"mode": "disabled"},
        }
    )


@contextmanager
def noted_team(recipe: Recipe, console: Console) -> Iterator[Team]:
    """The usual team, whose workers note their memory and write answers of full length."""
    with (
        RaySession(recipe.cluster) as session,
        RayTeam(recipe, console, session.resources, factories=NOTED) as team,
    ):
        yield team


def table(rows: Sequence[Row]) -> str:
    """One line a row."""
    lines = [f"{'model':26}{'placement':11}{'group':12}{'predicted':>12}{'measured':>12}{'ratio':>8}{'imports':>12}"]
    for row in rows:
        lines.append(
            f"{row.model:26}{row.placement:11}{row.group:12}{row.predicted:8.0f} MiB{row.measured:8.0f} MiB"
            f"{row.ratio:8.2f}{row.imports:8.0f} MiB"
        )
    return "\n".join(lines)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[TINY], help="folders of models, or `tiny`")
    parser.add_argument("--placements", nargs="+", default=["shared", "separate"], choices=["shared", "separate"])
    parser.add_argument("--prompts", type=int, default=2, help="of a step, ten answers each")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--answer-tokens", type=int, default=64)
    parser.add_argument("--micro-batch-tokens", type=int, default=768)
    parser.add_argument("--kv-cache-gib", type=float, default=0.25)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="a file for all numbers")
    return parser.parse_args(argv)


if __name__ == "__main__":
    with termination_interrupts():
        raise SystemExit(main())
