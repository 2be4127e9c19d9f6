"""Seeds: every random choice of a run hangs on the run's seed and on what is chosen, and on nothing else."""

from __future__ import annotations

import hashlib
import json


def request_seed(run_seed: int, stage: str, round: int, step: int, prompt_id: str) -> int:
    """A seed in [0, 2**62) for one engine request.

    The engine gives answer i of a request the seed s + i, so a request owns the range s .. s + n - 1, which stays
    inside int64. Ranges of different requests lie apart except with a chance of about n / 2**61 for each pair.
    (Torch's generator on CPUs looks at the low 32 bits only: there the chance is n / 2**31 for each pair.)
    """
    return _hash("request", run_seed, stage, round, step, prompt_id)


def shuffle_seed(run_seed: int, what: str, *where: int) -> int:
    """A seed in [0, 2**62) for one order of data: `what` names the data, `where` the step, epoch or round."""
    return _hash("shuffle", run_seed, what, *where)


def _hash(*parts: str | int) -> int:
    # JSON keeps the parts apart, so that ("a", "bc") and ("ab", "c") differ; Python's own hash changes per process.
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 2
