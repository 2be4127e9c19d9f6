"""A run that is killed again and again, held against the same run undisturbed."""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cluster.leftovers import MARKER, Leftovers, kill_family, left_behind, snapshot
from cluster.moments import Event, Moment, choose, key_of, named, spans, strikes
from configs.errors import ConfigError
from configs.load import absolute, difference, load_recipe
from configs.schema import Recipe
from rlhf.compare import differences
from rlhf.errors import TenfoldError
from rlhf.events import EVENTS
from rlhf.ports import Console
from rlhf.wording import duration

TENFOLD = (sys.executable, "-m", "cluster.cli")
POLL_S = 0.003
PATIENCE, PATIENCE_S = 10.0, 600.0  # a process may take so many times as long as the undisturbed run, and so much more
GRACE_S = 10.0  # for processes that see by themselves that the run is over


@dataclass(frozen=True, slots=True)
class Kill:
    """One kill as it came about."""

    stage: str
    step: int
    phase: str
    where: str  # "inside": the phase had not ended; "between": it had
    planned: str  # step and place that the seed chose: a resume may be beyond it, and a phase be shorter than before
    after_s: float  # since the killed process started
    processes: int  # that were killed


@dataclass(frozen=True, slots=True)
class Report:
    """What the kills did to the run: nothing, if `differences` and `leftovers` are empty."""

    seed: int
    kills: list[Kill]
    missed: list[Moment]  # the run had ended before they came about
    differences: list[str]
    leftovers: list[str]
    undisturbed_s: float
    disturbed_s: float  # all processes together
    undisturbed: str  # run folders
    disturbed: str

    @property
    def exit_code(self) -> int:
        """0, or 1 where something differs or was left behind, or nothing was killed at all."""
        return int(bool(self.differences or self.leftovers) or not self.kills)

    def to_json(self) -> dict[str, object]:
        """The report as plain values."""
        return asdict(self)


@dataclass(slots=True)
class Follower:
    """The events of a run from `offset` on, as they are written."""

    path: Path
    offset: int = 0  # bytes
    seen: list[Event] = field(default_factory=list[Event])

    def read(self) -> list[Event]:
        """Those that came since the last call; a line under way waits for the next."""
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(self.offset)
            whole, end, _ = file.read().rpartition(b"\n")
        self.offset += len(whole + end)
        new: list[Event] = []
        for line in whole.splitlines():
            with suppress(ValueError):  # torn by a kill
                new.append(json.loads(line))
        self.seen += new
        return new


def chaos(
    recipe_path: str | Path,
    overrides: Sequence[str] = (),
    *,
    kills: int,
    seed: int,
    folder: Path,
    console: Console,
    command: Sequence[str] = TENFOLD,
) -> Report:
    """What `kills` kills, at moments that the seed chooses, change in a run of the recipe: nothing, it is hoped.

    Runs are in `folder`: undisturbed/NAME, which is used again where it is whole, and disturbed/NAME, which is made
    anew. `command` starts Tenfold. Raises TenfoldError where a run ends by itself with an error, or hangs.
    """
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    recipe = load_recipe(recipe_path, overrides)
    calm, wild = folder / "undisturbed" / recipe.name, folder / "disturbed" / recipe.name
    run = [*command, "run", str(recipe_path), *overrides]
    if is_complete(calm, recipe):
        console.say(f"chaos: {calm} is used again")
    else:
        shutil.rmtree(calm, ignore_errors=True)
        undisturbed = _Processes(calm, folder / "undisturbed.log", math.inf)
        with console.task("undisturbed run"):
            undisturbed.start([*run, f"runs={calm.parent}"], [])
            kill_family(undisturbed.token)  # what it left is not to be taken for the other's
    events = Follower(calm / EVENTS).read()
    moments = choose(spans(events), kills, seed)
    shutil.rmtree(wild, ignore_errors=True)
    disturbed = _Processes(wild, folder / "disturbed.log", PATIENCE * _length(events) + PATIENCE_S)
    before, words, done = snapshot([wild.parent]), [*run, f"runs={wild.parent}"], list[Kill]()
    with console.task("disturbed run", total=kills, unit="kills") as task:
        while kill := disturbed.start(words, moments):
            done.append(kill)
            words = [*command, "resume", str(wild)]
            task.advance(1, f"killed {kill.where} {kill.stage} {kill.phase}")
    for moment in moments:
        console.warn(f"chaos: the run ended before {named(moment)} came about")
    with console.task("compare"):
        leftovers = _left_in_the_end(before, disturbed.token, wild.parent)
        kill_family(disturbed.token)
        found = differences(calm, wild)
    times = (_length(events), _length(Follower(wild / EVENTS).read()))
    return Report(seed, done, moments, found, leftovers, *times, str(calm), str(wild))


def is_complete(run: Path, recipe: Recipe) -> bool:
    """Whether a run folder holds the recipe's run, from beginning to end without a resume."""
    try:
        stages = json.loads((run / "manifest.json").read_bytes())["stages"]
        before = load_recipe(run / "recipe.yaml")
    except (OSError, ValueError, KeyError, ConfigError):
        return False
    other = [line for line in difference(before, absolute(recipe)) if not line.startswith("runs:")]
    starts = sum(event["what"] == "start" for event in Follower(run / EVENTS).read())
    return not other and starts == 1 and set(recipe.stages) <= set(stages)


def page(report: Report) -> RenderableType:
    """The report for rich to print."""
    kills = Table("killed", "stage", "step", "phase", "planned", "after", "processes", box=SIMPLE_HEAD, show_edge=False)
    for kill in report.kills:
        where = (kill.where, kill.stage, str(kill.step), kill.phase, kill.planned)
        kills.add_row(*map(Text, where), duration(kill.after_s), str(kill.processes))
    times = f"undisturbed {duration(report.undisturbed_s)}, disturbed {duration(report.disturbed_s)}"
    parts: list[RenderableType] = [
        Text(f"{len(report.kills)} kills, seed {report.seed}: {times}", style="bold"),
        kills,
        *_list("Not killed, since the run had ended before", [named(moment) for moment in report.missed]),
        *_list("Left behind", report.leftovers),
        *_list(f"Differences between {report.undisturbed} and {report.disturbed}", report.differences),
    ]
    if not report.differences and report.kills:
        parts.append(Text("The run that was killed is the run that was not, bit for bit.", style="bold"))
    return Group(*parts)


class _Processes:
    """The processes of a run, one after the other, each the leader of a session of its own that bears the token."""

    def __init__(self, run: Path, log: Path, limit_s: float) -> None:
        self.token = secrets.token_hex(8)
        self._events, self._log, self._limit_s = run / EVENTS, log, limit_s
        log.unlink(missing_ok=True)

    def start(self, command: Sequence[str], moments: list[Moment]) -> Kill | None:
        """How the process was killed, at one of the moments, which then is off the list; None where it ended well."""
        offset = self._events.stat().st_size if self._events.exists() else 0
        events, began = Follower(self._events, offset), time.monotonic()
        with self._log.open("ab") as out:
            environ = os.environ | {MARKER: self.token, "TENFOLD_PLAIN": "1"}
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environ, start_new_session=True
            )
        try:
            for event in self._following(events, process, began + self._limit_s):
                moment = next((moment for moment in moments if strikes(moment, event)), None)
                if moment is not None and (kill := self._kill(moment, event, events, process, began)):
                    moments.remove(moment)
                    return kill
        finally:
            if process.poll() is None:
                kill_family(self.token, process.pid)
            code = process.wait()
        if code:
            last = "\n".join(self._log.read_text(errors="replace").splitlines()[-20:])
            raise TenfoldError(f"A process of the run ended with code {code}:\n{last}\n", remedy=f"See {self._log}.")
        return None

    def _following(self, events: Follower, process: subprocess.Popen[bytes], deadline: float) -> Iterator[Event]:
        while True:
            ended = process.poll() is not None  # asked first, so that all that it wrote is seen
            yield from events.read()
            if ended:
                return
            if time.monotonic() > deadline:
                raise TenfoldError(
                    f"The run hangs; its last event is {events.seen[-1] if events.seen else 'not there'}.",
                    limit=f"A process of it may take {duration(self._limit_s)}.",
                    remedy=f"See {self._log}.",
                )
            time.sleep(POLL_S)

    def _kill(
        self, moment: Moment, event: Event, events: Follower, process: subprocess.Popen[bytes], began: float
    ) -> Kill | None:
        """The kill, at the moment or where its phase ended before that; None where the process ended by itself."""

        def ended() -> bool:
            events.read()
            return any(later["what"] == "end" and key_of(later) == key_of(event) for later in events.seen)

        while time.time() < event["time"] + moment.wait_s and not ended() and process.poll() is None:
            time.sleep(POLL_S)
        after_s = time.monotonic() - began
        num = kill_family(self.token, process.pid)
        if process.wait() != -signal.SIGKILL:
            return None
        where = "between" if ended() else "inside"
        return Kill(*key_of(event), where, f"step {moment.step}, {moment.where}", after_s, num)


def _left_in_the_end(before: Leftovers, token: str, folder: Path) -> list[str]:
    deadline = time.monotonic() + GRACE_S
    while (lines := left_behind(before, token, [folder])) and time.monotonic() < deadline:
        time.sleep(GRACE_S / 10)
    return lines


def _length(events: Sequence[Event]) -> float:
    return events[-1]["time"] - events[0]["time"] if events else 0.0


def _list(title: str, lines: Sequence[str]) -> list[RenderableType]:
    return [Text(f"\n{title}", style="bold"), *(Text(f"  - {line}") for line in lines)] if lines else []
