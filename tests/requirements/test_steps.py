from __future__ import annotations

import sys
from pathlib import Path

import pytest

from requirements.steps import StepFailed, run


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_step_returns_what_it_printed_and_keeps_it_in_the_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "new" / "setup.log"
    assert run("Counting", python("print('one'); print('two')"), log=log) == "one\ntwo"
    assert log.read_text() == "one\ntwo\n"
    assert capsys.readouterr().out.startswith("Counting ...\n")


def test_a_long_step_says_what_it_does_while_it_works(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # The step ends only when it is told to, and it is told when its sign of life was seen.
    gate = tmp_path / "gate"
    wait = f"while not os.path.exists({str(gate)!r}): time.sleep(0.01)"
    code = f"import os, time\nprint('Downloading torch', flush=True)\n{wait}"
    said: list[str] = []

    def hear(text: str) -> None:
        said.append(text)
        if "Downloading torch" in text:
            gate.touch()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("requirements.steps.say", hear)
        run("Installing", python(code), log=tmp_path / "log", quiet_s=0.05)
    assert said[0] == "Installing ..."
    assert any(line.endswith("s  Downloading torch") for line in said)


@pytest.mark.parametrize(
    ("output", "remedy"),
    [
        ("OSError: [Errno 28] No space left on device", "Free disk space"),
        ("ERROR: No matching distribution found for torch==2.13.0+cpu", "pip's index lacks this version"),
        ("Temporary failure in name resolution", "Check the network"),
        ("something odd", "run the same command again"),
    ],
)
def test_a_failed_step_says_which_why_and_what_to_do(output: str, remedy: str, tmp_path: Path) -> None:
    with pytest.raises(StepFailed) as caught:
        run("Installing", python(f"print({output!r}); raise SystemExit(3)"), log=tmp_path / "log")
    message = str(caught.value)
    assert message.startswith("FAILED: Installing\n")
    assert output in message
    assert remedy in message
    assert str(tmp_path / "log") in message


def test_a_command_that_is_not_there_is_a_failed_step(tmp_path: Path) -> None:
    with pytest.raises(StepFailed, match="no-such-command"):
        run("Starting", ["no-such-command"], log=tmp_path / "log")
