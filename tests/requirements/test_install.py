from __future__ import annotations

import collections
from pathlib import Path

import pytest

from requirements import install
from requirements.steps import StepFailed

ROOT = Path(__file__).parents[2]
Usage = collections.namedtuple("Usage", "total used free")


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of two locks, with its set-up's steps written down instead of carried out."""
    (tmp_path / "requirements").mkdir()
    (tmp_path / "requirements" / "cpu.lock").write_text("torch==2.13.0+cpu\n")
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    venv = tmp_path / ".venv"
    for name, path in {
        "ROOT": tmp_path,
        "VENV": venv,
        "PYTHON": venv / "bin" / "python",
        "LOG": venv / "setup.log",
        "UNFINISHED": venv / "unfinished.stamp",
        "LOCK_STAMP": venv / "lock.stamp",
        "PROJECT_STAMP": venv / "project.stamp",
    }.items():
        monkeypatch.setattr(install, name, path)
    monkeypatch.setattr(install, "check_machine", lambda device: None)
    return tmp_path


class Steps:
    """Stands in for `run`: keeps the commands, makes the files that they would make, fails where told."""

    def __init__(self, house: Path, failures: dict[str, str] | None = None) -> None:
        self.house, self.failures = house, failures or {}
        self.commands: list[str] = []

    def __call__(self, step: str, command: list[object], *, log: Path) -> str:
        text = " ".join(map(str, command))
        self.commands.append(text)
        if " venv " in text:
            (self.house / ".venv" / "bin").mkdir(parents=True, exist_ok=True)
            (self.house / ".venv" / "bin" / "python").touch()
            log.touch()
        for sign, why in self.failures.items():
            if sign in text and "--extra-index-url" not in text:
                raise StepFailed(step, why, "")
        return ""


def test_a_second_set_up_does_nothing(house: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(house)
    monkeypatch.setattr(install, "run", steps)
    install.install("cpu")
    assert len(steps.commands) == 3
    install.install("cpu")
    assert len(steps.commands) == 3


def test_another_lock_makes_the_environment_anew(house: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(house)
    monkeypatch.setattr(install, "run", steps)
    install.install("cpu")
    (house / "requirements" / "cpu.lock").write_text("torch==2.14.0+cpu\n")
    install.install("cpu")
    assert sum(" venv --clear " in command for command in steps.commands) == 2


def test_an_installation_that_failed_is_gone_on_with(house: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "run", Steps(house, {"cpu.lock": "the network went away"}))
    with pytest.raises(StepFailed):
        install.install("cpu")
    steps = Steps(house)
    monkeypatch.setattr(install, "run", steps)
    install.install("cpu")
    assert not any(" venv " in command for command in steps.commands)
    assert any("cpu.lock" in command for command in steps.commands)


def test_pytorchs_own_index_is_asked_only_after_the_plain_installation_failed(
    house: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Steps(house, {"cpu.lock": "ERROR: No matching distribution found for torch==2.13.0+cpu"})
    monkeypatch.setattr(install, "run", steps)
    install.install("cpu")
    tries = [command for command in steps.commands if "cpu.lock" in command]
    assert [install.PYTORCH_CPU_INDEX in command for command in tries] == [False, True]


def test_too_little_disk_is_told_before_anything_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install.shutil, "disk_usage", lambda path: Usage(2**40, 2**40 - 2**30, 2**30))
    with pytest.raises(StepFailed, match=r"1\.0 GiB are free .*; 6 GiB are needed"):
        install.check_machine("cpu")


def test_a_missing_compiler_is_told_with_the_package_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install.shutil, "which", lambda name: None)
    with pytest.raises(StepFailed, match=r"apt-get install g\+\+"):
        install.check_machine("cpu")


def test_another_python_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install.sys, "version_info", (3, 9, 18))
    with pytest.raises(StepFailed, match=r"Python 3\.9\.18"):
        install.check_machine("cpu")


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_a_lock_names_exact_versions_and_no_index(device: str) -> None:
    lines = (ROOT / "requirements" / f"{device}.lock").read_text().splitlines()
    packages = [line for line in lines if not line.startswith("#")]
    names = [line.partition("==")[0] for line in packages]
    assert names == sorted(set(names))
    assert all(line.count("==") == 1 and "/" not in line for line in packages)


def test_the_cpu_lock_leaves_out_what_breaks_beside_a_cpu_torch() -> None:
    lock = (ROOT / "requirements" / "cpu.lock").read_text()
    assert "\ntorch==2.13.0+cpu\n" in lock
    assert not any(f"\n{name}==" in lock for name in ("torchvision", "torchaudio", "torchcodec", "vllm"))
