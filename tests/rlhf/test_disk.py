"""Files and folders that are there whole or not at all."""

import contextlib
from pathlib import Path

import pytest

from rlhf.disk import damage, disk_errors, replacing, tidy, write_folder
from rlhf.errors import StoreError


def test_a_full_disk_is_told_with_a_remedy():
    with (
        pytest.raises(StoreError, match=r"/dev/full cannot be written.*No space left.*Free some disk space"),
        disk_errors(Path("/dev/full"), "written"),
        open("/dev/full", "wb") as file,
    ):
        file.write(b"x")
        file.flush()


def test_a_folder_that_was_moved_aside_and_not_replaced_comes_back(tmp_path: Path):
    write_folder(tmp_path / "model", {"a": b"old"})
    (tmp_path / "model").rename(tmp_path / ".old-model")
    tidy(tmp_path)
    assert (tmp_path / "model" / "a").read_bytes() == b"old"


def test_a_folder_that_was_replaced_leaves_no_old_one(tmp_path: Path):
    write_folder(tmp_path / "model", {"a": b"old"})
    (tmp_path / "model").rename(tmp_path / ".old-model")
    write_folder(tmp_path / "model", {"a": b"new"})
    (tmp_path / ".old-model").mkdir(exist_ok=True)
    tidy(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "a").read_bytes() == b"new"


@pytest.mark.parametrize(("fatal", "content"), [(1, b"old"), (2, b"old"), (3, b"new")])
def test_a_folder_is_the_old_or_the_new_one_wherever_the_process_dies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fatal: int, content: bytes
):
    class Died(BaseException):
        pass

    write_folder(tmp_path / "model", {"a": b"old"})
    rename, calls = Path.rename, []

    def rename_or_die(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == fatal:
            raise Died
        return rename(self, target)

    with monkeypatch.context() as patched, contextlib.suppress(Died):
        patched.setattr(Path, "rename", rename_or_die)
        write_folder(tmp_path / "model", {"a": b"new"})
    assert len(calls) == min(fatal, 2)
    tidy(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "a").read_bytes() == content


def test_a_folder_that_others_fill_has_the_checksum_of_each_file(tmp_path: Path):
    with replacing(tmp_path / "model", step=3) as folder:
        (folder / "config.json").write_text("{}")
    assert damage(tmp_path / "model") is None
    (tmp_path / "model" / "config.json").write_text("[]")
    assert "config.json" in str(damage(tmp_path / "model"))


def test_a_folder_that_could_not_be_filled_leaves_the_old_one(tmp_path: Path):
    with replacing(tmp_path / "model") as folder:
        (folder / "a").write_text("old")
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "model") as folder:
        (folder / "a").write_text("new")
        raise ZeroDivisionError
    assert (tmp_path / "model" / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
