"""A recipe for the tiny model: every stage in seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from configs.schema import Recipe

WORDS = ("sun", "moon", "tree", "stone", "river", "cloud", "bird", "fish")


def write_prompts(path: Path, num: int = 20) -> Path:
    """`num` different one-turn prompts as JSONL."""
    rows = [{"prompt": f"Say {WORDS[i % len(WORDS)]} {i}"} for i in range(num)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes` laid over it, section by section."""
    both = dict(base)
    for key, value in changes.items():
        old = both.get(key)
        both[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return both


def tiny_recipe(model: str | Path, folder: Path, **changes: Any) -> Recipe:
    """A recipe over 20 prompts, two PPO steps, float32, its runs under `folder`."""
    prompts = folder / "prompts.jsonl"
    if not prompts.exists():
        write_prompts(prompts)
    base: dict[str, Any] = {
        "name": "tiny",
        "runs": str(folder / "runs"),
        "model": {"path": str(model), "dtype": "float32"},
        "data": {"prompts": str(prompts), "held_out": 0.3, "max_prompt_tokens": 64},
        "sampling": {"n": 10, "max_answer_tokens": 8},
        "lora": {"rank": 4, "alpha": 8},
        "learner": {"micro_batch_tokens": 256},
        "generator": {"kv_cache_gib": 0.03125, "enforce_eager": True},
        "rules": [{"name": "complete"}, {"name": "short", "params": {"target": 2}}],
        "sample": {"num_prompts": 8, "prompts_per_request": 4},
        "reward": {"groups_per_batch": 4, "optimizer": {"lr": 1e-3}},
        "ppo": {
            "num_steps": 2,
            "num_prompts": 2,
            "optimizer": {"lr": 1e-3},
            "critic_optimizer": {"lr": 1e-3},
            "save_every": 1,
        },
        "evaluate": {"num_prompts": 4, "bootstrap": 100},
        "cluster": {"threads": 1, "wait_s": 120, "call_s": 120},
    }
    return Recipe.model_validate(merged(base, changes))
