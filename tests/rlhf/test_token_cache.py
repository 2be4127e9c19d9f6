"""The token cache: what it holds, what makes it anew, how it is split and weighted, and that memory stays flat."""

import errno
import json
import os
import pickle
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest
from transformers import PreTrainedTokenizerFast

from rlhf import token_cache
from rlhf.corpus import Source
from rlhf.disk import TMP
from rlhf.errors import DataError, StoreError
from rlhf.token_cache import INDEX, TOKENS, TokenCache, make_cache
from rlhf.tokenizer import train_tokenizer
from tests.fakes import SilentConsole

BOS, EOS = 0, 1
LINES = [f"line {n} 床前明月光" for n in range(50)]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(LINES * 4, 300)


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return lines(tmp_path / "a.txt", LINES)


def lines(path: Path, texts: list[str], weight: float = 1.0) -> Source:
    path.write_text("\n".join(texts))
    return Source(str(path), weight, split="line")


def cached(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, *sources: Source) -> TokenCache:
    return make_cache(tmp_path / "cache", sources, tokenizer, console=SilentConsole())


class Refuses:
    """A console in front of which nothing may be tokenised."""

    def __init__(self) -> None:
        self.inner = SilentConsole()

    def say(self, text: str) -> None: ...

    def warn(self, text: str) -> None:
        raise AssertionError(text)

    @contextmanager
    def task(
        self, name: str, total: int | None = None, unit: str = "", patient: bool = False, before: int = 0
    ) -> Iterator[SilentConsole]:
        assert name != "tokenise"
        yield self.inner


def test_each_document_has_its_tokens_between_bos_and_eos(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, source: Source
):
    cache = cached(tmp_path, tokenizer, source)
    assert len(cache) == len(LINES)
    for index, line in enumerate(LINES):
        ids = cache.document(index)
        assert ids[0] == BOS and ids[-1] == EOS
        assert tokenizer.decode(ids[1:-1].tolist()) == line
    assert cache.num_tokens == sum(len(cache.document(index)) for index in range(len(cache)))
    assert cache.num_bytes == sum(len(line.encode()) for line in LINES)
    assert cache.document(0).dtype == np.uint16


def test_a_cache_travels_as_its_folder(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, source: Source):
    cache = cached(tmp_path, tokenizer, source)
    travelled = pickle.dumps(cache)
    assert len(travelled) < 500
    assert pickle.loads(travelled).document(7).tolist() == cache.document(7).tolist()


def test_batches_of_any_size_give_the_same_files(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, source: Source, monkeypatch: pytest.MonkeyPatch
):
    whole = cached(tmp_path, tokenizer, source)
    monkeypatch.setattr(token_cache, "BATCH_BYTES", 100)
    small = make_cache(tmp_path / "small", [source], tokenizer, console=SilentConsole())
    for name in (TOKENS, INDEX):
        assert (whole.folder / name).read_bytes() == (small.folder / name).read_bytes()


def test_a_large_vocabulary_takes_four_bytes_a_token(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, source: Source, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(token_cache, "num_ids", lambda _: 65_537)
    cache = cached(tmp_path, tokenizer, source)
    assert cache.document(3).dtype == np.uint32
    assert tokenizer.decode(cache.document(3)[1:-1].tolist()) == LINES[3]


def test_a_cache_is_used_again_wherever_the_corpus_lies(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, source: Source
):
    first = cached(tmp_path, tokenizer, source)
    (tmp_path / "moved").mkdir()
    moved = Path(source.path).rename(tmp_path / "moved" / "a.txt")
    again = make_cache(tmp_path / "cache", [Source(str(moved), weight=3, split="line")], tokenizer, console=Refuses())
    assert again.folder == first.folder


def test_another_text_tokenizer_or_split_is_another_cache(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, source: Source
):
    keys = {cached(tmp_path, tokenizer, source).key}
    keys.add(cached(tmp_path, tokenizer, Source(source.path)).key)
    keys.add(cached(tmp_path, train_tokenizer(LINES * 4, 270), source).key)
    keys.add(cached(tmp_path, tokenizer, lines(Path(source.path), LINES[:-1])).key)
    assert len(keys) == 4


@pytest.mark.parametrize("harm", ["cut", "altered", "missing", "manifest"])
def test_a_damaged_cache_is_made_again_and_said_so(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, source: Source, harm: str
):
    folder = cached(tmp_path, tokenizer, source).folder
    whole = (folder / TOKENS).read_bytes()
    if harm == "cut":
        os.truncate(folder / TOKENS, len(whole) - 2)
    elif harm == "altered":
        (folder / TOKENS).write_bytes(whole[:-1] + b"\x07")
    else:
        (folder / (INDEX if harm == "missing" else "manifest.json")).unlink()
    if harm != "altered":  # a worker looks at names and sizes only
        with pytest.raises(StoreError, match="no complete token cache"):
            TokenCache.open(folder)
    console = SilentConsole()
    make_cache(tmp_path / "cache", [source], tokenizer, console=console)
    assert "is damaged" in console.warned[0]
    assert (TokenCache.open(folder).folder / TOKENS).read_bytes() == whole


def test_a_corpus_that_turns_out_bad_leaves_nothing_behind(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, source: Source
):
    (tmp_path / "b.txt").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"b\.txt, line 1"):
        cached(tmp_path, tokenizer, source, Source(str(tmp_path / "b.txt")))
    assert [path.name for path in (tmp_path / "cache").iterdir() if not path.name.startswith(".lock")] == []


def test_a_full_disk_is_told_and_leaves_nothing_behind(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, source: Source, monkeypatch: pytest.MonkeyPatch
):
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(token_cache._Output, "write", full)
    with pytest.raises(StoreError, match="Free some disk space"):
        cached(tmp_path, tokenizer, source)
    assert [path.name for path in (tmp_path / "cache").iterdir() if not path.name.startswith(".lock")] == []


def test_what_a_killed_process_left_is_no_hindrance(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, source: Source):
    folder = cached(tmp_path, tokenizer, source).folder
    folder.rename(folder.with_name(TMP + folder.name))
    assert len(cached(tmp_path, tokenizer, source)) == len(LINES)
    assert not folder.with_name(TMP + folder.name).exists()


def test_two_at_a_time_tokenise_once(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, source: Source):
    names: list[str] = []

    class Notes(SilentConsole):
        @contextmanager
        def task(
            self, name: str, total: int | None = None, unit: str = "", patient: bool = False, before: int = 0
        ) -> Iterator[SilentConsole]:
            names.append(name)
            yield self

    def one() -> None:
        make_cache(tmp_path / "cache", [source], tokenizer, console=Notes())

    threads = [threading.Thread(target=one) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert names.count("tokenise") == 1
    assert names.count("check the token cache") == 2


def test_a_folder_that_is_no_cache_is_refused(tmp_path: Path):
    with pytest.raises(StoreError, match="no complete token cache"):
        TokenCache.open(tmp_path)


def test_the_split_goes_by_the_text_alone(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    texts = [f"text {n}" for n in range(400)]
    whole = cached(tmp_path, tokenizer, lines(tmp_path / "a.txt", texts))
    other = cached(tmp_path, tokenizer, lines(tmp_path / "b.txt", texts[::-2]), lines(tmp_path / "c.txt", texts[:10]))

    def read(cache: TokenCache, indices: np.ndarray) -> set[str]:
        return {str(tokenizer.decode(cache.document(int(i))[1:-1].tolist())) for i in indices}

    train, held_out = whole.split(0.1)
    assert sorted([*train, *held_out]) == list(range(400))
    assert 20 <= len(held_out) <= 60
    assert read(other, other.split(0.1)[1]) <= read(whole, held_out)
    assert read(other, other.split(0.1)[0]) <= read(whole, train)
    assert set(held_out) < set(whole.split(0.3)[1])
    assert [len(side) for side in whole.split(0)] == [400, 0]


@pytest.mark.parametrize("share", [1e-9, 1 - 1e-9, 1.0])
def test_neither_side_is_empty(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, share: float):
    cache = cached(tmp_path, tokenizer, lines(tmp_path / "a.txt", ["one", "two", "one", "two"]))
    assert [len(side) for side in cache.split(share)] == [2, 2]


def test_a_single_document_cannot_be_held_out(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    cache = cached(tmp_path, tokenizer, lines(tmp_path / "a.txt", ["same", "same"]))
    with pytest.raises(DataError, match=r"share of 0\.1.*At least 2 different"):
        cache.split(0.1)
    assert list(cache.split(0)[0]) == [0, 1]


def test_a_weight_is_how_often_a_sources_documents_come(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    names = "abc"
    cache = cached(
        tmp_path, tokenizer, *(lines(tmp_path / f"{n}.txt", [f"{n} {i}" for i in range(200)]) for n in names)
    )
    everything = np.arange(600)
    kept = cache.weighted(everything, [2.0, 0.25, 1.5])
    counts = np.bincount(kept, minlength=600)
    assert set(counts[:200]) == {2}
    assert set(counts[200:400]) == {0, 1} and 30 <= counts[200:400].sum() <= 70
    assert set(counts[400:]) == {1, 2} and 270 <= counts[400:].sum() <= 330
    more = np.bincount(cache.weighted(everything, [1, 0.5, 1]), minlength=600)
    assert (counts[200:400] <= more[200:400]).all()
    assert list(cache.weighted(everything[:3], [1, 1, 1])) == [0, 1, 2]
    with pytest.raises(DataError, match="no document of 2 is left"):
        cache.weighted(everything[:2], [1e-12, 1, 1])


def test_tokens_and_bytes_are_counted_for_any_documents(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, source: Source
):
    cache = cached(tmp_path, tokenizer, source)
    chosen = np.array([0, 7, 49, 7])
    wanted = (sum(len(cache.document(i)) for i in chosen), sum(len(LINES[i].encode()) for i in chosen))
    assert cache.count(chosen) == cache.count(chosen.astype(np.uint32)) == wanted
    assert cache.count(np.arange(50)) == (cache.num_tokens, cache.num_bytes)


def test_a_cache_that_a_newer_version_wrote_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, source: Source
):
    folder = cached(tmp_path, tokenizer, source).folder
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(StoreError, match="format 99"):
        TokenCache.open(folder)


class Meter(SilentConsole):
    """Keeps how much memory the process had after each batch, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.resident: list[int] = []

    def advance(self, num: int = 1, note: str = "") -> None:
        self.resident.append(psutil.Process().memory_info().rss)


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(token_cache, "BATCH_BYTES", 64 << 10)
    text = "a paragraph of " + "line after line " * 60 + "\n\n"
    source = Source(str(tmp_path / "a.txt"), split="paragraph")
    Path(source.path).write_text(text * 8000)
    meter = Meter()
    cache = make_cache(tmp_path / "cache", [source], train_tokenizer([text] * 2, 320), console=meter)
    assert cache.num_bytes > 7 << 20
    middle = len(meter.resident) // 2
    # The second half of the texts alone is nearly 4 MiB.
    assert max(meter.resident[middle:]) - max(meter.resident[:middle]) < 2 << 20
