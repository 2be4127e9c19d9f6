"""Groups of real Ray actors that play light roles."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import StringIO
from pathlib import Path

import pytest
import ray
from ray.util.placement_group import PlacementGroup, remove_placement_group

from cluster import group as group_module
from cluster.console import LineConsole
from cluster.failures import CallLate, WorkerLost, WorkerRaised
from cluster.group import Group
from cluster.placement import GroupPlan, Placement
from cluster.ray_session import RaySession
from cluster.reserve import reserve
from cluster.run import exit_code
from cluster.running import stopping_is_said
from configs.schema import ClusterConfig
from rlhf.errors import PlacementError, ScoreError
from tests.fakes import SilentConsole

pytestmark = [pytest.mark.ray, pytest.mark.timeout(120)]

CONFIG = ClusterConfig(wait_s=60, call_s=60, threads=1)
ECHO = "tests.cluster.played:Echo"
PAIR = GroupPlan("pair", ("policy",), (0, 1), cpus=0.25, gpus=0)
ONE = GroupPlan("one", ("generator",), (2,), cpus=0.25, gpus=0)


@pytest.fixture(scope="module")
def home(session: RaySession) -> Iterator[PlacementGroup]:
    home = reserve(Placement((PAIR, ONE)), 30, SilentConsole())
    yield home
    remove_placement_group(home)


@pytest.fixture(scope="module")
def pair(home: PlacementGroup) -> Iterator[Group]:
    """Two workers that form a process group and play an echo."""
    group = Group(PAIR, home, CONFIG)
    group.ensure("echo", ECHO, "rank ")
    yield group
    group.kill()


@pytest.fixture
def meeting(
    home: PlacementGroup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Group, Path, Path]]:
    """A group of one; the pipes by which its call `meet` says that it has begun, and is told to end."""
    monkeypatch.setattr(group_module, "CLOSE_S", 0.1)
    begun, gate = tmp_path / "begun", tmp_path / "gate"
    for pipe in (begun, gate):
        os.mkfifo(pipe)
    group = Group(ONE, home, CONFIG)
    group.ensure("echo", ECHO, "")
    yield group, begun, gate
    group.kill()


def test_every_worker_is_asked_and_answers_in_order_of_rank(pair: Group) -> None:
    assert pair.call_all("echo", "who", "!", loud=True) == ["RANK 0/2!", "RANK 1/2!"]
    assert pair.call_first("echo", "who") == "rank 0/2"
    assert pair.call_each("echo", "who", {1: ("b",), 0: ("a",)}) == ["rank 1/2b", "rank 0/2a"]
    assert pair.call_each("echo", "who", {}) == []
    assert pair.call_one(1, "echo", "who") == "rank 1/2"


def test_two_workers_form_a_process_group(pair: Group) -> None:
    assert pair.call_all("echo", "sum_of_ranks") == [3.0, 3.0]


def test_workers_know_their_rank_and_where_they_meet(pair: Group) -> None:
    first, second = pair.call_all("echo", "environment")
    assert (first["RANK"], second["RANK"]) == ("0", "1")
    assert (first["LOCAL_RANK"], second["LOCAL_RANK"]) == ("0", "1")
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        assert first[name] == second[name]
    assert first["WORLD_SIZE"] == "2"
    assert first["MASTER_ADDR"] == pair.seats[0].host and int(first["MASTER_PORT"]) > 0
    assert first["OMP_NUM_THREADS"] == "1" and first["threads"] == 1


def test_a_role_is_built_once(pair: Group) -> None:
    pair.ensure("echo", ECHO, "another ")
    assert pair.call_first("echo", "who") == "rank 0/2"


def test_our_own_errors_cross_over_with_their_type(pair: Group) -> None:
    with pytest.raises(ScoreError) as caught:
        pair.call_all("echo", "bad_score")
    assert type(caught.value) is ScoreError
    assert str(caught.value) == "The score is nan. It must be finite. Mend the rule."
    assert caught.value.remedy == "Mend the rule."


def test_other_errors_name_group_rank_and_method_and_show_where_they_arose(pair: Group) -> None:
    with pytest.raises(WorkerRaised, match=r"echo\.bug on worker 1 of 2 of the group 'pair'.*KeyError") as caught:
        pair.call_one(1, "echo", "bug")
    assert "played.py" in str(caught.value) and "in bug" in str(caught.value)


def test_memory_is_told_by_worker(pair: Group) -> None:
    stats = pair.stats()
    assert sorted(stats) == ["pair-0", "pair-1"]
    assert all(0.02 < worker["pss_gib"] < 2 for worker in stats.values())


def test_while_a_call_is_under_way_memory_is_told_as_it_was_and_a_kill_ends_the_call(
    meeting: tuple[Group, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    group, begun, gate = meeting
    before = group.stats()
    assert group.stats() is before and not group._stats_asked  # so soon nobody is asked again
    monkeypatch.setattr(group_module, "STATS_S", 0.0)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(group.call_all, "echo", "meet", begun, gate)
        assert begun.read_text() == "begun"
        assert group.stats() is before  # asked for behind the call
        gate.write_text("go")
        assert call.result() == ["go"]
        ray.wait(list(group._stats_asked))
        after = group.stats()
        assert after.keys() == before.keys() and after is not before
        call = pool.submit(group.call_all, "echo", "meet", begun, gate)
        assert begun.read_text() == "begun"
        group.kill()
        assert group._num_calls == 0
        assert isinstance(call.exception(), WorkerLost)


def test_a_termination_in_the_midst_of_rays_waiting_stops_us_as_one_of_our_own(
    meeting: tuple[Group, Path, Path],
) -> None:
    group, begun, gate = meeting
    out = StringIO()
    console = LineConsole(out)

    def terminate() -> None:
        begun.read_text()
        os.kill(os.getpid(), signal.SIGTERM)

    def work() -> None:
        with stopping_is_said(console):
            group.call_all("echo", "meet", begun, gate)

    with ThreadPoolExecutor(1) as pool:
        killer = pool.submit(terminate)
        assert exit_code(console, "tenfold run r.yaml", work) == 143
        killer.result()
    assert "stopping: closing the team" in out.getvalue() and "what was committed is kept" in out.getvalue()


def test_a_worker_that_fails_does_not_leave_us_waiting_for_the_others(
    home: PlacementGroup, pair: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_module, "SETTLE_S", 0.5)
    group = Group(GroupPlan("stuck", ("policy",), (0, 1), cpus=0, gpus=0), home, CONFIG)
    group.ensure("echo", ECHO, "")
    with pytest.raises(WorkerRaised, match=r"worker 1 of 2 of the group 'stuck'.*KeyError: 'of rank 1'"):
        group.call_all("echo", "bug_in_one")
    with pytest.raises(PlacementError, match=r"'stuck' has ended, because a worker failed in echo\.bug_in_one"):
        group.call_all("echo", "who")


def test_a_call_over_its_deadline_says_what_it_waited_for(home: PlacementGroup) -> None:
    group = Group(ONE, home, ClusterConfig(wait_s=60, call_s=1, threads=1))
    group.ensure("echo", ECHO, "")
    with pytest.raises(CallLate, match=r"Waited 1 s for echo\.hang on worker 0 of 1 of the group 'one'") as caught:
        group.call_all("echo", "hang")
    assert caught.value.limit == "The limit is cluster.call_s=1."
    with pytest.raises(PlacementError, match=r"has ended, because echo\.hang was over its deadline"):
        group.call_all("echo", "who")


def test_the_death_of_a_worker_is_told_with_group_and_node(home: PlacementGroup) -> None:
    group = Group(ONE, home, CONFIG)
    group.ensure("echo", ECHO, "")
    seat = group.seats[0]
    with pytest.raises(WorkerLost, match=r"Worker 0 of 1 of the group 'one' is gone") as caught:
        group.call_all("echo", "die")
    told = str(caught.value)
    assert f"process {seat.pid} on node {seat.host}" in told and "echo.die" in told
    assert "memory" in caught.value.remedy


def test_workers_that_do_not_start_in_time_are_told(home: PlacementGroup) -> None:
    # The bundle has room for one: the second waits for ever.
    greedy = GroupPlan("greedy", ("generator",), (2, 2), cpus=0.25, gpus=0)
    with pytest.raises(CallLate, match=r"Waited 5 s for its start on worker 1 of 2 of the group 'greedy'") as caught:
        Group(greedy, home, ClusterConfig(wait_s=5))
    assert "cluster.wait_s" in caught.value.remedy


def test_resources_that_the_cluster_has_not_are_told_within_the_deadline(home: PlacementGroup) -> None:
    huge = Placement((GroupPlan("policy", ("policy",), (0, 1), cpus=100, gpus=1),))
    with pytest.raises(PlacementError) as caught:
        reserve(huge, 1, SilentConsole())
    told = str(caught.value)
    assert "2 policy workers wait for 200 CPU (at most 100 on one node; the cluster has 16" in told
    assert "2 GPU (at most 1 on one node; the cluster has 0" in told
    assert "cluster.wait_s=1" in told
