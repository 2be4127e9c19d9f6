"""Jobs on a cluster that is a fake: found by the run's name, followed over broken connections, stopped to the last."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.job_watch import Lines, describe, follow, stop_job, told, wandb_link
from cluster.jobs import JobError, JobInfo, Parts, State, find_job, refuse_second
from tests.cluster.fake_jobs import FakeJobs
from tests.fakes import SilentConsole


def job(
    job_id: str, run: str = "mine", state: State = "RUNNING", started: int = 0, folder: str = "/runs/mine"
) -> JobInfo:
    return JobInfo(job_id, state, {"tenfold.run": run, "tenfold.folder": folder}, started_ms=started)


class Clock:
    """Time that passes only where somebody sleeps."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_a_job_is_found_by_the_name_of_its_run_or_by_its_id() -> None:
    jobs = FakeJobs(job("a"), job("b", run="yours"), JobInfo("c", "RUNNING"))
    assert find_job(jobs, "yours").job_id == "b"
    assert find_job(jobs, "a").run == "mine"


def test_of_a_run_that_was_resumed_the_job_that_is_not_over_is_meant_and_else_the_newest() -> None:
    first, second = job("a", state="STOPPED", started=1), job("b", state="FAILED", started=3)
    assert find_job(FakeJobs(second, first), "mine").job_id == "b"
    assert find_job(FakeJobs(second, first, job("c", started=2)), "mine").job_id == "c"


def test_a_run_without_a_job_is_an_error_that_names_those_there_are() -> None:
    with pytest.raises(JobError, match=r"no job of a run 'mein' at http://head:8265. There are jobs of mine, yours"):
        find_job(FakeJobs(job("a"), job("b", run="yours")), "mein")
    with pytest.raises(JobError, match="No job of Tenfold's was submitted there"):
        find_job(FakeJobs(JobInfo("c", "RUNNING")), "mine")


def test_several_runs_of_one_name_are_an_error_that_names_their_jobs() -> None:
    two = job("a", state="FAILED"), job("b", state="FAILED", folder="/other/mine")
    with pytest.raises(JobError, match=r"several jobs .* a \(failed, /runs/mine\); b \(failed, /other/mine\)"):
        find_job(FakeJobs(*two), "mine")
    with pytest.raises(JobError, match="Name one of them by its id"):
        find_job(FakeJobs(job("a"), job("b")), "mine")


def test_a_second_job_of_a_run_is_refused_while_the_first_goes_on() -> None:
    refuse_second(FakeJobs(job("a", state="SUCCEEDED"), job("b", run="yours")), "mine")
    with pytest.raises(JobError, match="has a job at http://head:8265 already: a, pending"):
        refuse_second(FakeJobs(job("a", state="PENDING")), "mine")


def test_what_a_job_says_is_written_once_though_the_connection_breaks_and_begins_anew() -> None:
    jobs, clock, said = FakeJobs(job("a")), Clock(), []
    jobs.connections = [["one\ntw"], ["one\n", "two\nthr"], [], ["one\ntwo\nthree\n", "four\n"]]
    jobs.said["a"] = "one\ntwo\nthree\nfour\nlast\n"  # came after the fourth connection had ended
    info = follow(jobs, "a", said.append, sleep=clock.sleep)
    assert info.state == "SUCCEEDED"
    assert said == ["one\ntw", "o\nthr", "ee\n", "four\n", "last\n"]
    assert clock.now == 3


def test_lines_are_given_on_whole() -> None:
    said: list[str] = []
    lines = Lines(said.append)
    for part in ("a\nb", "c", "\n\n", "d"):
        lines.write(part)
    assert said == ["a", "bc\n"]
    lines.close()
    assert said[-1] == "d"


def test_a_stop_waits_for_the_end_and_for_all_that_the_job_had() -> None:
    jobs, clock = FakeJobs(job("a")), Clock()
    had = Parts(frozenset({"Worker 1"}), frozenset({"pg"}), frozenset({("node", 7)}))
    jobs.has["a"] = [had, Parts(frozenset({"Worker 1"})), Parts()]
    jobs.workers = frozenset({("node", 8)})
    done = stop_job(jobs, jobs.infos["a"], SilentConsole(), wait_s=10, clock=clock, sleep=clock.sleep)
    assert (done.info.state, done.was_over, bool(done.left)) == ("STOPPED", False, False)
    assert jobs.stops == ["a"] and clock.now == 3  # two looks at its state, one at what it had


def test_the_entry_point_alone_is_asked_first_and_all_of_the_job_only_if_it_does_not_heed() -> None:
    jobs, clock = FakeJobs(replace(job("a"), pid=7)), Clock()
    done = stop_job(jobs, jobs.infos["a"], SilentConsole(), wait_s=100, clock=clock, sleep=clock.sleep)
    assert (done.info.state, jobs.terminated, jobs.stops) == ("STOPPED", ["a"], [])
    deaf, clock = FakeJobs(replace(job("a"), pid=7)), Clock()
    deaf.heeds_sigterm = False
    done = stop_job(deaf, deaf.infos["a"], SilentConsole(), wait_s=100, clock=clock, sleep=clock.sleep)
    assert (done.info.state, deaf.terminated, deaf.stops) == ("STOPPED", ["a"], ["a"])
    assert clock.now == 63  # a minute, and two looks that said "running"


def test_what_a_stop_leaves_is_told() -> None:
    jobs, clock = FakeJobs(job("a")), Clock()
    jobs.has["a"] = [Parts(processes=frozenset({("node1234x", 7), ("node1234x", 8)})), Parts()]
    jobs.workers = frozenset({("node1234x", 7)})
    done = stop_job(jobs, jobs.infos["a"], SilentConsole(), wait_s=10, clock=clock, sleep=clock.sleep)
    assert str(done.left) == "processes: 7 on node1234"


def test_a_job_that_does_not_end_is_an_error_and_one_that_is_over_is_not_asked() -> None:
    jobs, clock = FakeJobs(job("a")), Clock()
    jobs.looks_until_over = 99
    with pytest.raises(JobError, match=r"still running. The limit is --wait-s 10"):
        stop_job(jobs, jobs.infos["a"], SilentConsole(), wait_s=10, clock=clock, sleep=clock.sleep)
    over = FakeJobs(job("a", state="SUCCEEDED"))
    assert stop_job(over, over.infos["a"], SilentConsole(), wait_s=10).was_over
    assert over.stops == []


def test_the_link_to_wandb_is_the_last_that_the_log_names() -> None:
    assert wandb_link("W&B: https://wandb.ai/a\nstep 1\n  W&B: https://wandb.ai/b\nend") == "https://wandb.ai/b"
    assert wandb_link("nothing of it") == ""


def test_a_job_is_told_in_plain_values_and_in_lines() -> None:
    info = JobInfo("a", "FAILED", {"tenfold.run": "mine", "tenfold.folder": "/runs/mine"}, 1000, 66_000, exit_code=2)
    about = describe(info, "http://head:8265", "W&B: there\nerror: no such model\n\n")
    assert about | {"started": ""} == {
        "address": "http://head:8265",
        "job": "a",
        "run": "mine",
        "folder": "/runs/mine",
        "state": "failed",
        "started": "",
        "time_s": 65.0,
        "exit_code": 2,
        "wandb": "there",
        "last_line": "error: no such model",
    }
    assert "failed for 1 min 05 s, exit code 2" in told(about)
    pending = describe(JobInfo("a", "PENDING", {"tenfold.run": "mine"}), "http://head:8265", "")
    assert (pending["time_s"], pending["last_line"]) == (None, None) and "pending" in told(pending)
