"""The one Ray of the tests that run a recipe in their own process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cluster.ray_session import RaySession
from configs.schema import ClusterConfig


@pytest.fixture(scope="session")
def session() -> Iterator[RaySession]:
    """Ray, for all tests: what comes late from one that was shut down can abort the process (see `Workplace`)."""
    with RaySession(ClusterConfig(wait_s=120, call_s=120)) as opened:
        yield opened
