"""benchmarks/corpus: the corpora that it writes, and what it calls growth."""

from __future__ import annotations

import os
from pathlib import Path

from benchmarks.corpus import growth, memory_of, recipe_of, write_corpus
from configs.load import load_recipe
from rlhf.corpus import corpus_sources, read_documents


def test_a_corpus_has_its_size_in_files_of_four_kinds_and_no_text_twice(tmp_path: Path) -> None:
    write_corpus(tmp_path / "text", 400_000)
    recipe = load_recipe(recipe_of(tmp_path, num_steps=2))
    documents = list(read_documents(corpus_sources(recipe)))
    by_source = [sum(document.num_bytes for document in documents if document.source == at) for at in range(4)]
    assert all(100_000 <= size < 110_000 for size in by_source)
    assert len({document.digest for document in documents}) == len(documents)


def test_equal_sizes_give_equal_files(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_corpus(tmp_path / name, 20_000)
    assert (tmp_path / "one" / "b.jsonl").read_bytes() == (tmp_path / "two" / "b.jsonl").read_bytes()


def test_growth_counts_what_a_process_allocated_and_not_what_it_mapped() -> None:
    small = {"the command": {"anonymous": 400.0, "mapped": 100.0}, "worker": {"anonymous": 300.0, "mapped": 0.0}}
    large = {"the command": {"anonymous": 405.0, "mapped": 900.0}, "worker": {"anonymous": 420.0, "mapped": 0.0}}
    assert growth(small, large) == ["worker 300 -> 420 MiB"]


def test_memory_that_is_allocated_is_seen(tmp_path: Path) -> None:
    before = memory_of(os.getpid())["anonymous"]
    held = bytearray(os.urandom(1 << 20)) * 64
    assert memory_of(os.getpid())["anonymous"] - before > 50
    del held
