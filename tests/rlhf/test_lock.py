"""The lock of a run: one process at a time, and looking does not take it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.errors import StoreError
from rlhf.lock import is_locked, take_lock

HOLD = """
import sys
from pathlib import Path
from rlhf.lock import take_lock
handle = take_lock(Path(sys.argv[1]))
print('held', flush=True)
sys.stdin.read()
"""


def test_looking_neither_takes_the_lock_nor_makes_a_file(tmp_path: Path):
    assert not is_locked(tmp_path) and list(tmp_path.iterdir()) == []
    handle = take_lock(tmp_path)
    assert is_locked(tmp_path)
    os.close(handle)
    assert not is_locked(tmp_path)


def test_a_second_process_is_refused_until_the_first_is_gone_however_it_dies(tmp_path: Path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(StoreError, match=rf"in use by another process \(pid {holder.pid}\)"):
        take_lock(tmp_path)
    holder.kill()
    holder.wait()
    os.close(take_lock(tmp_path))
    holder.stdout.close()
