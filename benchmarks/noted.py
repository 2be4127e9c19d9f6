"""The roles with one addition: their processes note what they take after their imports, and their peak from then on."""

from __future__ import annotations

import importlib
import json
import os
import threading
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.full_length import FULL_LENGTH
from cluster.placement import Role
from cluster.worker import Site
from configs.schema import Recipe

NOTES = "TENFOLD_PLAN_MEMORY"  # the variable that names the folder of the notes
LOOK_S = 0.1
TRAINER_IMPORTS = ("actors.policy", "actors.reference", "actors.reward", "actors.critic")


def _noted(role: Role, site: Site, recipe: Recipe) -> Any:
    """The role, built after its process has noted what its imports take."""
    site.once("notes", partial(_begin_notes, role, site, recipe))
    module, _, name = FULL_LENGTH[role].partition(":")
    return getattr(importlib.import_module(module), name)(site, recipe)


make_policy = partial(_noted, "policy")
make_reference = partial(_noted, "reference")
make_reward = partial(_noted, "reward")
make_critic = partial(_noted, "critic")
make_generator = partial(_noted, "generator")

NOTED: Mapping[Role, str] = {role: f"{__name__}:make_{role}" for role in FULL_LENGTH}


def _begin_notes(role: Role, site: Site, recipe: Recipe) -> threading.Thread:
    """The thread that writes this process's peak from now on."""
    _import_all(role, site)
    baseline = _status()["VmRSS"]
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    group = "trainer" if recipe.cluster.placement == "shared" and role != "generator" else role
    file = Path(os.environ[NOTES]) / f"{group}-{site.rank}-{os.getpid()}.json"
    over = threading.Event()

    def note() -> None:
        peak = 0
        while not over.wait(LOOK_S):
            if (now := _status()["VmHWM"]) > peak:
                peak = now
                temporary = file.with_suffix(".tmp")
                temporary.write_text(json.dumps({"rank": site.rank, "baseline": baseline, "peak": peak}))
                temporary.replace(file)

    thread = threading.Thread(target=note, daemon=True)
    thread.start()
    return thread


def _import_all(role: Role, site: Site) -> None:
    """Nothing; all that the roles of the group import is in the process now."""
    if role != "generator":
        for module in TRAINER_IMPORTS:
            importlib.import_module(module)
        return
    from actors.generator import _vllm_environment

    with _vllm_environment(site.threads, on_gpu=False):  # vLLM reads it when it is imported
        from vllm import LLM

        assert LLM is not None


def _status() -> dict[str, int]:
    """Bytes that the kernel counts for this process."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0][:-1]: int(words[1]) * 1024 for words in lines if len(words) == 3 and words[2] == "kB"}
