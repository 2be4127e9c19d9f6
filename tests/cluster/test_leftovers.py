"""What a killed run leaves is found, ended and deleted; what belongs to others stays."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from cluster.leftovers import (
    MARKER,
    OWNER,
    clean_up_after_the_dead,
    disown,
    family,
    is_owned,
    kill_family,
    left_behind,
    own,
    snapshot,
)

# A leader with a child, a child in another session without the marker, an orphan in another session with the marker,
# and an orphan in the leader's session without it.
TREE = """
import os, subprocess, sys
wait = [sys.executable, "-c", "import time; time.sleep(300)"]
subprocess.Popen(wait)
subprocess.Popen(wait, start_new_session=True, env={})
subprocess.run(["sh", "-c", "setsid sleep 300 & exit 0"])
subprocess.run(["sh", "-c", "env -i $(command -v sleep) 300 & exit 0"])
print("ready", flush=True)
input()
"""
# Holds the mark of a folder that its command line does not name.
OWNER_OF = """
import os
from pathlib import Path
from cluster.leftovers import own
handle = own(Path(os.environ["FOLDER"]))
print("ready", flush=True)
input()
"""
DAY_AND_A_BIT_S = 25 * 3600


@pytest.fixture
def token() -> Iterator[str]:
    token = secrets.token_hex(8)
    yield token
    for process in family(token):
        process.kill()


@pytest.fixture
def parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder where Ray's folders are."""
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    return tmp_path


def start(code: str, *words: str, token: str = "", folder: Path = Path()) -> subprocess.Popen[str]:
    """The leader of a session of its own that has said it is ready."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words],
        env=os.environ | {MARKER: token, "FOLDER": str(folder)},
        start_new_session=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    with process:
        process.wait(timeout=10)


def session(parent: Path, name: str, age_s: float = 0.0) -> Path:
    """A folder as Ray's are, last changed so long ago."""
    folder = parent / f"tenfold-ray-{name}"
    logs = folder / "session" / "logs"
    logs.mkdir(parents=True)
    (logs / "raylet.out").write_text("a line")
    changed = time.time() - age_s
    for path in (logs / "raylet.out", logs, folder / "session", folder):
        os.utime(path, (changed, changed))
    return folder


def test_a_whole_tree_is_killed_also_what_left_the_session_the_parent_or_the_environment(token: str) -> None:
    leader = start(TREE, token=token)
    members = family(token, leader.pid)
    assert len(members) == 5
    other = start("print('ready', flush=True); input()", token="another")
    assert kill_family(token, leader.pid) == 5
    assert leader.wait(timeout=10) == -signal.SIGKILL
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in members)
    assert family(token, leader.pid) == []
    assert other.poll() is None
    end(other)
    end(leader)


def test_a_tree_that_is_gone_is_killed_without_complaint(token: str) -> None:
    leader = start("print('ready', flush=True)", token=token)
    leader.wait(timeout=10)
    assert kill_family(token, leader.pid) == 0
    end(leader)


def test_a_process_that_was_left_is_told_with_the_port_it_listens_on(token: str) -> None:
    before = snapshot()
    code = "import socket; s = socket.create_server(('127.0.0.1', 0)); print('ready', flush=True); input()"
    process = start(code, token=token)
    port = psutil.Process(process.pid).net_connections()[0].laddr.port
    (line,) = left_behind(before, token)
    assert line.startswith(f"process {process.pid} (python") and line.endswith(f"still there, which listens on {port}")
    end(process)
    assert left_behind(before, token) == []


def test_a_folder_is_left_when_its_owner_is_dead_and_not_while_it_lives(parent: Path, token: str) -> None:
    before = snapshot()
    folder = session(parent, "abc")
    owner = start(OWNER_OF, folder=folder)
    assert is_owned(folder)
    (line,) = left_behind(before, token)  # the owner is told, as a child of this process; its folder is not
    assert line.startswith(f"process {owner.pid} ")
    end(owner)
    assert not is_owned(folder)
    assert left_behind(before, token) == [f"{folder}: the folder of a Ray or of W&B whose owner is gone"]


def test_shared_memory_is_left_when_no_process_maps_it(token: str) -> None:
    before = snapshot()
    name = f"tenfold-test-{token}"
    path = Path("/dev/shm") / name
    code = (
        f"import mmap; file = open({str(path)!r}, 'w+b'); file.truncate(4096);"
        "view = mmap.mmap(file.fileno(), 4096); print('ready', flush=True); input()"
    )
    process = start(code)
    try:
        assert not any(name in line for line in left_behind(before, token))
        end(process)
        assert [line for line in left_behind(before, token) if name in line] == [
            f"{path}: shared memory that no process uses"
        ]
    finally:
        with suppress(FileNotFoundError):
            path.unlink()


def test_a_socket_is_left_when_nobody_listens_on_it(
    token: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    before = snapshot([tmp_path])
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        server.listen()
        assert left_behind(before, token, [tmp_path]) == []
    assert left_behind(before, token, [tmp_path]) == [f"{tmp_path / 's'}: a socket that nobody listens on"]


def test_folders_of_the_dead_are_deleted_and_those_of_the_living_stay(parent: Path) -> None:
    living, dead, young, old = (session(parent, name) for name in ("living", "dead", "young", "old"))
    aged = session(parent, "aged", DAY_AND_A_BIT_S)
    owners = [start(OWNER_OF, folder=folder) for folder in (living, dead)]
    end(owners[1])
    handle = own(old)
    disown(old, handle, keep=True)  # a session that failed: its logs are to be read
    elsewhere = parent / "ray-of-another"
    elsewhere.mkdir()
    assert clean_up_after_the_dead() == [aged, dead]
    assert sorted(path.name for path in parent.iterdir()) == sorted(
        path.name for path in (living, young, old, elsewhere)
    )
    end(owners[0])
    assert clean_up_after_the_dead() == [living]


def test_an_old_folder_without_a_mark_stays_while_a_process_bears_its_name_or_writes_to_it(parent: Path) -> None:
    folder = session(parent, "aged", DAY_AND_A_BIT_S)
    server = start("print('ready', flush=True); input()", f"--temp-dir={folder}")
    assert clean_up_after_the_dead() == []
    end(server)
    log = folder / "session" / "logs" / "raylet.out"
    os.utime(log)
    assert clean_up_after_the_dead() == []
    os.utime(log, (0, 0))
    assert clean_up_after_the_dead() == [folder]


def test_the_mark_says_who_owns_and_a_folder_of_one_who_ended_well_bears_none(parent: Path) -> None:
    folder = session(parent, "mine")
    handle = own(folder)
    assert (folder / OWNER).read_text().split()[0] == str(os.getpid())
    assert is_owned(folder) and clean_up_after_the_dead() == []
    disown(folder, handle, keep=True)
    assert not (folder / OWNER).exists() and not is_owned(folder)


def test_a_link_is_not_followed(parent: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    target = tmp_path_factory.mktemp("target")
    (target / OWNER).touch()
    (parent / "tenfold-ray-link").symlink_to(target)
    assert clean_up_after_the_dead() == []
    assert target.is_dir()
