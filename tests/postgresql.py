"""A PostgreSQL server for tests: Debian's, in a temporary folder, on a Unix socket, of a user who is not root."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

NOBODY = "nobody"  # PostgreSQL refuses to run as root
INSTALL = "apt-get install -y --no-install-recommends postgresql"
# No crash of the machine is tested: nothing need reach the disk.
OPTIONS = "-c listen_addresses= -c fsync=off -c max_connections=200 -c shared_buffers=32MB"


@contextmanager
def server() -> Iterator[str]:
    """The URL of a database of a server that ends with the block. Skips the test where PostgreSQL is not installed."""
    initdb, ctl = _program("initdb"), _program("pg_ctl")
    home = Path(tempfile.mkdtemp(prefix="pg-"))  # a short path: a socket's may have 107 bytes
    if os.geteuid() == 0:
        shutil.chown(home, NOBODY)
    try:
        _run([initdb, "-D", home / "data", "-U", "tenfold", "-A", "trust", "-E", "UTF8", "--no-sync"])
        options = f"{OPTIONS} -k {home}"
        _run([ctl, "-D", home / "data", "-l", home / "log", "-w", "-t", "60", "-o", options, "start"])
        try:
            yield f"postgresql://tenfold@/postgres?unix_sock={home}/.s.PGSQL.5432"
        finally:
            _run([ctl, "-D", home / "data", "-m", "immediate", "-w", "stop"])
    finally:
        shutil.rmtree(home, ignore_errors=True)


def _program(name: str) -> Path:
    found = [Path(path) for path in [shutil.which(name)] if path]
    found += sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), reverse=True)
    if not found:
        pytest.skip(f"PostgreSQL is not installed ({name} was not found): {INSTALL}")
    return found[0]


def _run(command: Sequence[object]) -> None:
    words = [str(word) for word in command]
    if os.geteuid() == 0:
        words = ["runuser", "-u", NOBODY, "--", *words]
    # Its log is in a file: a pipe that the server inherited would never end.
    done = subprocess.run(words, cwd="/", stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert done.returncode == 0, done.stderr.decode()
