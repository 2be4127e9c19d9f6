"""What tests of `tenfold submit` share: a working directory that travels, and what a cluster still holds afterwards."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from configs.load import dump_recipe
from tests.recipes import tiny_recipe

ROOT = Path(__file__).parents[2]
ALIVE = """
import sys
from ray.util.state import list_actors, list_placement_groups
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
actors = [a for a in list_actors(sys.argv[1]) if a.state != "DEAD"]
groups = [g for g in list_placement_groups(sys.argv[1]) if g.state != "REMOVED"]
print(*actors, *groups)
"""


def working_directory(folder: Path, model: Path, **changes: Any) -> Path:
    """The folder with Tenfold's own code, a recipe, its prompts and its model; all of it travels. Runs lie in it."""
    for part in ("rlhf", "actors", "configs", "cluster"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(model, folder / "model")
    base: dict[str, Any] = {"data": {"prompts": "prompts.jsonl"}, "cluster": {"wait_s": 600, "call_s": 600}}
    recipe = tiny_recipe("model", folder, runs=str(folder / "there"), **{**base, **changes})
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    return folder


def actors_and_groups(inside: Sequence[str], address: str, environ: Mapping[str, str]) -> str:
    """The actors and placement groups that are not dead, as the cluster's own API lists them.

    `inside`: a command that the question is put behind.
    """
    command = [*inside, sys.executable, "-c", ALIVE, address]
    done = subprocess.run(command, env=dict(environ), capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.strip()


def wait_until(what: str, true: Callable[[], bool], limit_s: float = 600) -> None:
    deadline = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.5)


def last_json(text: str) -> dict[str, object]:
    return json.loads(text[text.index("{") :])
