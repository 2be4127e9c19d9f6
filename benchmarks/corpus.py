"""Whether memory stays flat while the corpus grows: `tenfold pretrain` on 200 MB and on 2 GB of text.

    python -m benchmarks.corpus [--megabytes 200 2000] [--folder FOLDER] [--json FILE]      (in the repository's root)

Writes corpora of random words, a quarter each as text cut at blank lines, JSONL, gzipped JSONL and Parquet, documents
of 4,000 bytes on average. On each runs the command as anybody would: the fingerprint, a BPE tokenizer from a sample,
the token cache, and some steps of a tiny model on Ray Train with evaluations and checkpoints. Every process of its tree
is looked at twice a second. Printed is, for each, the highest anonymous memory (what it allocated: files that are
mapped can be dropped by the kernel at any time, and are shown apart), and the ratio of the largest corpus to the
smallest. Exits with 1 if a process took more than 10 % more, and more than 16 MiB, with the largest.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import psutil

from cluster.run import termination_interrupts
from configs.load import dump_recipe
from configs.schema import Recipe

DOCUMENT_BYTES = 4000  # on average
NUM_WORDS = 50_000  # that there are
MAY_GROW, NOISE_MIB = 1.10, 16
LOOK_S = 0.5
BLOCK = 500  # documents that are made at once
Peaks = dict[str, dict[str, float]]  # process -> kind of memory -> MiB


def main(argv: Sequence[str] | None = None) -> int:
    """0 if no process took more memory for more text."""
    options = _parse(argv)
    sizes: list[int] = sorted(options.megabytes)
    measured: dict[int, dict[str, Any]] = {}
    if options.folder:
        options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="tenfold-corpus-", dir=options.folder) as made:
        for megabytes in sizes:
            folder = Path(made) / str(megabytes)
            folder.mkdir()
            print(f"{megabytes:,} MB: writing the corpus", flush=True)
            write_corpus(folder / "text", megabytes * 1_000_000)
            began = time.perf_counter()
            peaks, results = watch(recipe_of(folder, options.steps), folder)
            counts = {"documents": results["num_documents"], "tokens": results["num_corpus_tokens"]}
            measured[megabytes] = {"seconds": time.perf_counter() - began, "peaks": peaks, **counts}
            shutil.rmtree(folder)
    print(table(measured))
    grown = growth(measured[sizes[0]]["peaks"], measured[sizes[-1]]["peaks"])
    print(f"grew with the corpus: {', '.join(grown) or 'nothing'}")
    if options.json:
        options.json.write_text(json.dumps({"grew": grown, "measured": measured}, indent=2) + "\n")
    return int(bool(grown))


def write_corpus(folder: Path, num_bytes: int) -> None:
    """So many bytes of text (UTF-8) in files of four kinds; equal sizes give equal files."""
    import pyarrow
    import pyarrow.parquet

    folder.mkdir()
    quarter = num_bytes // 4
    with (folder / "a.txt").open("w") as file:
        for texts in blocks(quarter, seed=0):
            file.write("".join(f"{text}\n\n" for text in texts))
    with (folder / "b.jsonl").open("w") as file:
        for texts in blocks(quarter, seed=1):
            file.write("".join(json.dumps({"text": text}) + "\n" for text in texts))
    with gzip.open(folder / "c.jsonl.gz", "wt", compresslevel=1) as file:
        for texts in blocks(quarter, seed=2):
            file.write("".join(json.dumps({"text": text}) + "\n" for text in texts))
    schema = pyarrow.schema([("text", pyarrow.string())])
    with pyarrow.parquet.ParquetWriter(folder / "d.parquet", schema) as writer:
        for texts in blocks(quarter, seed=3):
            writer.write_table(pyarrow.table({"text": texts}, schema))


def blocks(num_bytes: int, *, seed: int) -> Iterator[list[str]]:
    """Texts of Zipf-distributed words, some at once, until they have so many bytes."""
    rng = np.random.default_rng(seed)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = np.array(["".join(rng.choice(letters, rng.integers(2, 10))) for _ in range(NUM_WORDS)], dtype=object)
    share = 1 / np.arange(1, NUM_WORDS + 1)
    bounds = np.cumsum(share / share.sum())
    mean = DOCUMENT_BYTES / (sum(map(len, words)) / NUM_WORDS + 1)
    left = num_bytes
    while left > 0:
        lengths = rng.integers(int(mean * 0.5), int(mean * 1.5), BLOCK)
        drawn = words[np.minimum(np.searchsorted(bounds, rng.random(lengths.sum())), NUM_WORDS - 1)]
        ends = np.cumsum(lengths)
        texts = [" ".join(drawn[end - length : end]) for end, length in zip(ends, lengths, strict=True)]
        kept: list[str] = []
        for text in texts:
            if left > 0:
                kept.append(text)
                left -= len(text)
        yield kept


def recipe_of(folder: Path, num_steps: int) -> Path:
    """The file of a recipe that pretrains a tiny model on the folder's text."""
    recipe = Recipe.model_validate(
        {
            "name": "corpus",
            "runs": str(folder / "runs"),
            "stages": ["pretrain"],
            "model": {"dtype": "float32"},
            "learner": {"micro_batch_tokens": 1024},
            "pretrain": {
                "sources": [
                    {"path": str(folder / "text" / "*.txt"), "split": "paragraph"},
                    {"path": str(folder / "text" / "*.jsonl")},
                    {"path": str(folder / "text" / "*.jsonl.gz"), "weight": 0.5},
                    {"path": str(folder / "text" / "*.parquet"), "weight": 2},
                ],
                "sizes": {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "context_tokens": 256},
                "vocab_size": 2000,
                "tokenizer_sample_bytes": 1_000_000,
                "held_out": 0.01,
                "evaluate_tokens": 20_000,
                "row_tokens": 256,
                "batch_rows": 8,
                "num_steps": num_steps,
                "evaluate_every": max(1, num_steps // 2),
                "save_every": max(1, num_steps // 2),
            },
            "cluster": {"threads": 1},
            "tracker": {"mode": "disabled"},
        }
    )
    path = folder / "corpus.yaml"
    path.write_text(dump_recipe(recipe))
    return path


def watch(recipe: Path, folder: Path) -> tuple[Peaks, dict[str, Any]]:
    """The highest memory of each process of a run, by name; the results of its pretraining."""
    peaks: Peaks = {}
    command = [sys.executable, "-m", "cluster.cli", "run", recipe, "--json"]
    with (folder / "log").open("w") as log, (folder / "results.json").open("w") as results:
        run = subprocess.Popen(command, stdout=results, stderr=log)
    try:
        while run.poll() is None:
            look(peaks, run.pid)
            time.sleep(LOOK_S)
    except BaseException:
        run.terminate()
        run.wait()
        raise
    if run.returncode:
        raise SystemExit(f"The run failed:\n{(folder / 'log').read_text()[-3000:]}")
    return peaks, json.loads((folder / "results.json").read_text())["pretrain"]


def look(peaks: Peaks, pid: int) -> None:
    """Notes what the tree below `pid` holds now, where it is more than before."""
    together = {"anonymous": 0.0, "mapped": 0.0}
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        try:
            name = "the command" if process.pid == pid else name_of(process)
            held = memory_of(process.pid)
        except (psutil.Error, OSError):
            continue
        for kind, mib in held.items():
            together[kind] += mib
            most = peaks.setdefault(name, {"anonymous": 0.0, "mapped": 0.0})
            most[kind] = max(most[kind], mib)
    most = peaks.setdefault("together", {"anonymous": 0.0, "mapped": 0.0})
    for kind, mib in together.items():
        most[kind] = max(most[kind], mib)


def name_of(process: psutil.Process) -> str:
    """What kind of process it is: Ray's title for an actor, the program's name for others."""
    title = " ".join(process.cmdline()[:1])
    return re.sub(r"\W*(pid|ip)=.*", "", title) if title.startswith("ray::") else process.name()


def memory_of(pid: int) -> dict[str, float]:
    """MiB: `anonymous`, and `mapped`, the share of files that lies in memory (PSS)."""
    rows = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    kib = {row.split(":")[0]: int(row.split()[1]) for row in rows}
    return {"anonymous": kib["Pss_Anon"] / 1024, "mapped": kib["Pss_File"] / 1024}


def growth(small: Peaks, large: Peaks) -> list[str]:
    """The processes whose anonymous memory grew, by how much."""
    found: list[str] = []
    for name in sorted(small.keys() & large.keys()):
        before, after = small[name]["anonymous"], large[name]["anonymous"]
        if after > before * MAY_GROW and after - before > NOISE_MIB:
            found.append(f"{name} {before:.0f} -> {after:.0f} MiB")
    return found


def table(measured: Mapping[int, Mapping[str, Any]]) -> str:
    """Peaks by process, a column for each size."""
    sizes = list(measured)
    first, last = measured[sizes[0]]["peaks"], measured[sizes[-1]]["peaks"]
    lines = [f"{'peak of anonymous memory, MiB':44}" + "".join(f"{size:>10,} MB" for size in sizes) + f"{'ratio':>8}"]
    for name in sorted(first.keys() & last.keys(), key=lambda name: -last[name]["anonymous"]):
        held = [cast(float, measured[size]["peaks"].get(name, {}).get("anonymous", float("nan"))) for size in sizes]
        if max(held) >= NOISE_MIB:
            lines.append(f"{name[:44]:44}" + "".join(f"{mib:13.1f}" for mib in held) + f"{held[-1] / held[0]:8.2f}")
    for what, form in (("seconds", "13,.0f"), ("documents", "13,"), ("tokens", "13,")):
        lines.append(f"{what:44}" + "".join(format(measured[size][what], form) for size in sizes))
    mapped = "".join(f"{measured[size]['peaks']['together']['mapped']:13.1f}" for size in sizes)
    return "\n".join([*lines, f"{'files mapped, all processes, MiB':44}{mapped}"])


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[200, 2000], help="sizes of the corpora")
    parser.add_argument("--steps", type=int, default=200, help="of training")
    parser.add_argument("--folder", type=Path, help="where corpora and runs lie meanwhile (3 times the largest)")
    parser.add_argument("--json", type=Path, help="a file for all numbers")
    options = parser.parse_args(argv)
    if len(set(options.megabytes)) < 2 or min(options.megabytes) < 1:
        parser.error("--megabytes takes two sizes or more, each 1 at least")
    return options


if __name__ == "__main__":
    with termination_interrupts():  # so that a run ends with this one
        raise SystemExit(main())
