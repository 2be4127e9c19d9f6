"""Lines where there is no terminal, bars where there is one, and never ten silent seconds."""

from __future__ import annotations

import threading
from io import StringIO
from itertools import pairwise

import pytest

from cluster import console as module
from cluster.console import BarConsole, LineConsole, make_console
from cluster.redact import redact


class Clock:
    """Time that passes only when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


class Log(LineConsole):
    """Plain lines with the second at which each was printed."""

    def __init__(self) -> None:
        self.clock_ = Clock()
        self.lines: list[tuple[float, str]] = []
        super().__init__(StringIO(), clock=self.clock_)

    def _put(self, text: str) -> None:
        self.lines.append((self.clock_.now - 100.0, text))

    def wait(self, seconds: int) -> None:
        for _ in range(seconds):
            self.clock_.now += 1.0
            self.beat()

    @property
    def texts(self) -> list[str]:
        return [text for _, text in self.lines]


def test_a_task_says_when_it_starts_and_ends_with_its_duration_and_rate() -> None:
    log = Log()
    with log.task("sample", total=8, unit="prompts") as task:
        log.clock_.now += 2.0
        task.advance(8)
    assert log.texts == ["sample: started, 8 prompts", "sample: done, 8/8 prompts in 2.0 s (4 prompts/s)"]


def test_progress_is_told_at_most_every_five_seconds_with_rate_and_time_left() -> None:
    log = Log()
    with log.task("ppo", total=20, unit="steps") as task:
        for _ in range(12):
            log.clock_.now += 1.0
            task.advance(1, "update")
    assert log.lines[1:-1] == [
        (5.0, "ppo: 5/20 steps, update, 1 steps/s, 15 s left"),
        (10.0, "ppo: 10/20 steps, update, 1 steps/s, 10 s left"),
    ]


def test_slow_work_is_told_in_seconds_each() -> None:
    log = Log()
    with log.task("ppo", total=3, unit="steps") as task:
        log.clock_.now += 30.0
        task.advance()
    assert log.texts[1] == "ppo: 1/3 steps, 30 s each, 1 min 00 s left"


def test_work_that_does_not_advance_is_never_silent_for_ten_seconds() -> None:
    log = Log()
    with log.task("ppo", total=10, unit="steps") as task:
        log.clock_.now += 1.0
        task.advance(3)
        task.advance(0, "generate")
        log.wait(60)
    times = [time for time, _ in log.lines]
    assert max(later - earlier for earlier, later in pairwise(times)) < 10
    assert "ppo: still at 3/10 steps, generate, 12 s" in log.texts


def test_between_tasks_it_is_not_silent_either() -> None:
    log = Log()
    log.say("hello")
    log.wait(9)
    assert log.texts == ["hello", "still at work, 8.0 s"]


def test_progress_that_came_between_two_lines_is_told_by_the_beat() -> None:
    log = Log()
    with log.task("reward", total=9, unit="groups") as task:
        log.clock_.now += 1.0
        task.advance(4)
        log.wait(4)
        assert log.texts[-1] == "reward: 4/9 groups, 0.8 groups/s, 6.2 s left"


def test_a_short_inner_task_stays_silent_and_a_long_one_bears_its_parents_name() -> None:
    log = Log()
    with log.task("ppo", total=2, unit="steps"):
        with log.task("update", total=4):
            log.clock_.now += 1.0
        log._last_output = log.clock_.now
        with log.task("generate", total=4, unit="prompts") as inner:
            log.clock_.now += 6.0
            inner.advance(2)
            log.clock_.now += 6.0
            inner.advance(2)
    told = [text for text in log.texts if "/" in text]
    assert not any("update" in text for text in told)
    assert told[0] == "ppo / generate: 2/4 prompts, 0.333 prompts/s, 6.0 s left"
    assert told[-1] == "ppo / generate: done, 4/4 prompts in 12 s (0.333 prompts/s)"


def test_a_task_in_another_thread_belongs_to_the_open_stage() -> None:
    log = Log()
    names: list[str] = []

    def work() -> None:
        with log.task("score") as task:
            names.append(task.name)

    with log.task("ppo"), log.task("experience"):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert names == ["ppo / score"]


def test_a_task_that_fails_says_how_far_it_came() -> None:
    log = Log()
    with pytest.raises(ZeroDivisionError), log.task("sample", total=4, unit="prompts") as task:
        task.advance(3)
        log.clock_.now += 2.0
        raise ZeroDivisionError
    assert log.texts[-1].startswith("sample: stopped at 3/4 prompts after 2.0 s")
    with log.task("next"):
        pass
    assert log.texts[-1] == "next: done in 0.0 s"  # and no child of the one that failed


def test_advances_from_many_threads_are_all_counted() -> None:
    log = Log()
    with log.task("score", total=800) as task:
        threads = [threading.Thread(target=lambda: [task.advance() for _ in range(100)]) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert task.done == 800


def test_the_beat_runs_by_itself_inside_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BEAT_S", 0.001)
    beaten = threading.Event()

    class Beating(LineConsole):
        def beat(self) -> None:
            beaten.set()

    with Beating(StringIO()) as console:
        assert beaten.wait(timeout=10)
    assert console._beat_thread is not None
    assert not console._beat_thread.is_alive()


def test_text_in_brackets_is_printed_as_it_is() -> None:
    out = StringIO()
    console = LineConsole(out)
    console.say("key [bold]x[/bold] [1, 2] :smile: " + "long " * 60)
    assert out.getvalue() == "key [bold]x[/bold] [1, 2] :smile: " + ("long " * 60).rstrip() + "\n"


def test_on_a_terminal_messages_stand_above_the_bar_and_the_end_stays() -> None:
    out = Terminal()
    with BarConsole(out) as console:
        console.rich.width = 100
        with console.task("ppo", total=2, unit="steps") as task:
            task.advance(1, "generate")
            console.warn("[odd] text")
            console.beat()
            assert console._progress.tasks[0].completed == 1
            assert console._progress.tasks[0].fields["note"] == "generate"
        assert console._progress.tasks == []
    assert "warning: [odd] text" in out.getvalue()
    assert "ppo: done, 1/2 steps" in out.getvalue()


@pytest.mark.parametrize("environ", [{"CI": "true"}, {"TENFOLD_PLAIN": "1"}, {"TERM": "dumb"}])
def test_ci_and_the_users_wish_turn_bars_off(environ: dict[str, str]) -> None:
    assert isinstance(make_console(Terminal(), environ), LineConsole)


def test_bars_are_for_terminals_only() -> None:
    assert isinstance(make_console(Terminal(), {"TENFOLD_PLAIN": "0"}), BarConsole)
    assert isinstance(make_console(StringIO(), {}), LineConsole)


def test_secrets_of_the_environment_are_not_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123456789abcdef01234567")
    out = StringIO()
    LineConsole(out).warn("login with 0123456789abcdef0123456789abcdef01234567 failed")
    assert out.getvalue() == "warning: login with *** failed\n"


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("hf_abcdefghijklmnopqrstuv is bad", "*** is bad"),
        ("postgresql://ann:pass@host/db", "postgresql://***@host/db"),
        ("tokens: 512", "tokens: 512"),
    ],
)
def test_what_looks_like_a_secret_is_redacted_and_what_does_not_is_kept(text: str, clean: str) -> None:
    assert redact(text, {"SOME_TOKEN": "true", "HOME": "512"}) == clean


def test_what_was_done_before_a_task_began_counts_for_how_far_it_is_and_not_for_its_rate() -> None:
    log = Log()
    with log.task("rank: wait for people", total=160, unit="rankings", patient=True, before=100) as task:
        task.advance(0, "50 of 80 groups done")
        log.wait(10)
        task.advance(20, "60 of 80 groups done")
        log.wait(5)
    assert log.texts[-2] == "rank: wait for people: 120/160 rankings, 60 of 80 groups done, 2 rankings/s, 20 s left"
    assert log.texts[-1].endswith("done, 120/160 rankings in 15 s (1.33 rankings/s)")


def test_what_went_before_the_work_itself_began_does_not_count_for_its_rate() -> None:
    log = Log()
    with log.task("pretrain", total=100, unit="steps") as task:
        log.wait(20)  # its workers start
        task.begin(40)  # at a checkpoint
        log.wait(10)
        task.advance(20)
        assert task.count() == "60/100 steps" and task.speed(log.clock_.now) == "2 steps/s, 20 s left"
        log.wait(10)
        task.begin(50)  # a worker was lost, and the work goes on from the newest checkpoint
        log.wait(5)
        task.advance(5)
        assert task.count() == "55/100 steps" and task.speed(log.clock_.now) == "1 steps/s, 45 s left"
    assert log.texts[-1].endswith("done, 55/100 steps in 45 s (1 steps/s)")


def test_waiting_for_people_is_told_every_ten_minutes_only_and_at_once_when_they_move() -> None:
    log = Log()
    with log.task("rank: wait for people", total=30, unit="rankings", patient=True) as task:
        log.wait(1500)
        task.advance(3, "1 of 10 groups done")
        log.wait(5)
    assert [time for time, _ in log.lines] == [0.0, 600.0, 1200.0, 1500.0, 1505.0]
    assert log.texts[3].startswith("rank: wait for people: 3/30 rankings, 1 of 10 groups done")
