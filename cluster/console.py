"""What the user sees: progress bars on a terminal, plain lines elsewhere, and never ten silent seconds."""

from __future__ import annotations

import os
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from io import StringIO
from typing import IO, Self

from rich.console import Console as RichConsole
from rich.console import RenderableType
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from cluster.redact import redact
from cluster.work import Work
from rlhf.wording import duration

PROGRESS_S = 5.0  # a task's progress is told at most so often
QUIET_S = 8.0  # and something is told at least so often: below ten seconds, with a beat's delay to spare
PATIENT_S = 600.0  # or so often, while people are waited for
BEAT_S = 1.0


_current: ContextVar[Work | None] = ContextVar("tenfold_task", default=None)  # of this thread: threads do not nest


class StreamConsole(ABC):
    """Base of both consoles: tasks, their clock, and the beat that keeps them talking.

    Used as a context manager; the beat runs inside it, in a thread of its own. Safe to call from any thread.
    """

    def __init__(self, rich: RichConsole, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.rich = rich
        self.clock = clock
        self._lock = threading.RLock()
        self._work: list[Work] = []  # open tasks, oldest first
        self._last_output = clock()
        self._idle_since = clock()
        self._over = threading.Event()
        self._beat_thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self._last_output = self._idle_since = self.clock()
        self._over.clear()
        self._beat_thread = threading.Thread(target=self._keep_beating, name="tenfold-beat", daemon=True)
        self._beat_thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._beat_thread is not None:
            self._beat_thread.join(timeout=5)

    def say(self, text: str) -> None:
        """Prints one message."""
        self._print(text)

    def warn(self, text: str) -> None:
        """Prints one message that asks for attention."""
        self._print(f"warning: {text}", style="yellow")

    def error(self, text: str) -> None:
        """Prints why it cannot go on."""
        self._print(f"error: {text}", style="bold red")

    def show(self, page: RenderableType) -> None:
        """Prints something of rich's: a table, a panel, a page."""
        self._write(redact(self._rendered(page, soft_wrap=False)))

    @contextmanager
    def task(
        self, name: str, total: int | None = None, unit: str = "", patient: bool = False, before: int = 0
    ) -> Iterator[Work]:
        """A task under way; ends with the block and says so (an inner one only where it was long enough to be told)."""
        parent = _current.get() or (self._work[0] if self._work else None)  # in a thread of its own: of the stage
        full = f"{parent.name} / {name}" if parent else name
        now = self.clock()
        work = Work(self, full, total, unit, parent.depth + 1 if parent else 0, now, since=now, changed=now, told=now)
        work.patient, work.done, work.before = patient, before, before
        token = _current.set(work)
        with self._lock:
            self._work.append(work)
            self._started(work)
        try:
            yield work
        except BaseException:
            self._end(work, f"stopped at {work.count()} after")
            raise
        else:
            self._end(work, f"done, {work.count()} in" if work.done else "done in")
        finally:
            _current.reset(token)

    def advance(self, work: Work, num: int, note: str) -> None:
        """Notes the progress of a task and tells it where it is time to."""
        with self._lock:
            now = self.clock()
            if num or note != work.note:
                work.changed, work.untold = now, True
            work.done += num
            work.note = note or work.note
            self._moved(work, now)

    def begin(self, work: Work, done: int) -> None:
        """Notes that the work itself begins, with so much done."""
        with self._lock:
            now = self.clock()
            work.done = work.before = done
            work.since = work.changed = now
            work.untold = True
            self._moved(work, now)

    def beat(self) -> None:
        """Tells what has not been told for long. Called every second by the console's own thread."""
        with self._lock:
            now = self.clock()
            for work in self._work:
                self._moved(work, now)
            quiet_s = PATIENT_S if self._work and self._work[-1].patient else QUIET_S
            if now - self._last_output >= quiet_s:
                self._break_silence(now)

    def _keep_beating(self) -> None:
        while not self._over.wait(BEAT_S):
            self.beat()

    def _break_silence(self, now: float) -> None:
        if not self._work:
            self._print(f"still at work, {duration(now - self._idle_since)}", style="dim")
            return
        work = self._work[-1]
        where = ", ".join(
            part for part in (f"still at {work.count()}" if work.done or work.total else "still", work.note) if part
        )
        self._tell(work, f"{where}, {duration(now - work.changed)}", now)

    def _tell(self, work: Work, text: str, now: float, style: str = "") -> None:
        work.told, work.untold, work.visible = now, False, True
        self._print(f"{work.name}: {text}", style=style)

    def _end(self, work: Work, text: str) -> None:
        with self._lock:
            self._work.remove(work)
            self._removed(work)
            now = self.clock()
            if work.depth == 0 or work.visible:
                pace = f" ({work.pace(now)})" if work.done > 1 else ""
                self._tell(work, f"{text} {duration(now - work.started)}{pace}", now)
            self._idle_since = now

    def _print(self, text: str, style: str = "") -> None:
        self._write(self._rendered(Text(redact(text), style=style), soft_wrap=True))

    def _rendered(self, page: RenderableType, soft_wrap: bool) -> str:
        # In a console of its own: one with bars mixes their codes into what it renders.
        out = StringIO()
        color = "truecolor" if self.rich.color_system else None
        width = self.rich.width
        RichConsole(file=out, force_terminal=bool(color), color_system=color, width=width, highlight=False).print(
            page, soft_wrap=soft_wrap
        )
        return "\n".join(line.rstrip() for line in out.getvalue().rstrip("\n").split("\n"))

    def _write(self, text: str) -> None:
        with self._lock:
            self._last_output = self.clock()
            self._put(text)

    @abstractmethod
    def _put(self, text: str) -> None:
        """Writes rendered text, above the bars where there are any."""

    @abstractmethod
    def _started(self, work: Work) -> None:
        """A task was opened."""

    @abstractmethod
    def _moved(self, work: Work, now: float) -> None:
        """A task moved, or a second went by."""

    @abstractmethod
    def _removed(self, work: Work) -> None:
        """A task is over."""


class LineConsole(StreamConsole):
    """Plain lines, for a log file, a pipe or CI."""

    def __init__(self, stream: IO[str] | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        # A terminal that asks for plain lines gets no colours either.
        super().__init__(
            RichConsole(file=stream or sys.stdout, force_terminal=False, no_color=True, width=110), clock=clock
        )

    def _put(self, text: str) -> None:
        self.rich.file.write(text + "\n")
        self.rich.file.flush()

    def _started(self, work: Work) -> None:
        if work.depth == 0:
            of = f" {work.total} {work.unit}".rstrip() if work.total is not None else ""
            self._tell(work, f"started{of and ','}{of}", self.clock())

    def _moved(self, work: Work, now: float) -> None:
        if work.untold and now - work.told >= PROGRESS_S:
            parts = (work.count() if work.done or work.total else "", work.note, work.speed(now))
            self._tell(work, ", ".join(part for part in parts if part), now)

    def _removed(self, work: Work) -> None:
        pass  # its last line says it


class BarConsole(StreamConsole):
    """Progress bars at the foot of a terminal; messages scroll above them."""

    def __init__(self, stream: IO[str] | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(RichConsole(file=stream, highlight=False), clock=clock)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[count]}", markup=False),
            TextColumn("{task.fields[speed]}", style="cyan", markup=False),
            TextColumn("{task.fields[note]}", style="dim", markup=False),
            TimeElapsedColumn(),
            console=self.rich,
            transient=True,
        )
        self._bars: dict[int, TaskID] = {}  # by id() of the task

    def _put(self, text: str) -> None:
        # Through rich, which lifts the bars, writes, and sets them down again.
        self.rich.print(Text.from_ansi(text), soft_wrap=True)

    def _started(self, work: Work) -> None:
        if not self._bars:
            self._progress.start()
        name = "  " * work.depth + work.name.rsplit(" / ", 1)[-1]
        self._bars[id(work)] = self._progress.add_task(name, total=work.total, count=work.count(), speed="", note="")

    def _moved(self, work: Work, now: float) -> None:
        bar = self._bars[id(work)]
        self._progress.update(
            bar, completed=work.done, count=work.count(), speed=work.speed(now), note=redact(work.note)
        )

    def _removed(self, work: Work) -> None:
        self._progress.remove_task(self._bars.pop(id(work)))
        if not self._bars:
            self._progress.stop()

    def _break_silence(self, now: float) -> None:
        if not self._work:  # a bar turns by itself
            super()._break_silence(now)


def make_console(stream: IO[str] | None = None, environ: Mapping[str, str] = os.environ) -> StreamConsole:
    """Bars where `stream` (default: standard output) is a terminal; lines elsewhere, in CI, or with TENFOLD_PLAIN=1."""
    out = stream or sys.stdout
    plain = environ.get("TENFOLD_PLAIN", "") not in ("", "0") or environ.get("CI", "") not in ("", "0", "false")
    if plain or environ.get("TERM") == "dumb" or not out.isatty():
        return LineConsole(out)
    return BarConsole(stream)
