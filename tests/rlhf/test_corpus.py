"""A corpus: what a document is, what each bad file is told, and that memory stays flat."""

import gzip
import json
import tracemalloc
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from rlhf import corpus
from rlhf.corpus import MAX_DOCUMENT_BYTES, Source, corpus_fingerprint, read_documents, sample_texts
from rlhf.errors import DataError


def texts(*sources: Source) -> list[str]:
    return [document.text for document in read_documents(sources)]


def rows(path: Path, *values: object) -> Source:
    path.write_text("".join((v if isinstance(v, str) else json.dumps(v)) + "\n" for v in values))
    return Source(str(path))


def file(path: Path, content: str | bytes, **options: object) -> Source:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return Source(str(path), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("split", "wanted"),
    [
        ("file", ["床前明月光\r\n  two\n\n \n\nthree\nfour"]),
        ("paragraph", ["床前明月光\r\n  two", "three\nfour"]),
        ("line", ["床前明月光", "  two", "three", "four"]),
    ],
)
def test_a_document_is_a_file_a_paragraph_or_a_line(tmp_path: Path, split: str, wanted: list[str]):
    source = file(tmp_path / "a.txt", "\ufeff床前明月光\r\n  two\n\n \n\nthree\nfour", split=split)
    assert texts(source) == wanted


def test_all_kinds_of_files_give_documents_in_order_of_sources_and_names(tmp_path: Path):
    file(tmp_path / "b.txt", "second")
    file(tmp_path / "a.txt", "first")
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"third\n"))
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(b'{"text": "fourth"}\n\n{"text": " "}\n{"text": "fifth"}\n'))
    pyarrow.parquet.write_table(
        pyarrow.table({"body": ["sixth", "", "seventh"], "n": [1, 2, 3]}), tmp_path / "e.parquet"
    )
    sources = [Source(str(tmp_path / "*.txt")), *(Source(str(tmp_path / name)) for name in ("c.txt.gz", "d.jsonl.gz"))]
    found = list(read_documents([*sources, Source(str(tmp_path / "e.parquet"), field="body")]))
    assert [d.text for d in found] == ["first", "second", "third\n", "fourth", "fifth", "sixth", "seventh"]
    assert [d.source for d in found] == [0, 0, 1, 2, 2, 3, 3]
    assert [d.num_bytes for d in found] == [5, 6, 6, 6, 5, 5, 7]


def test_equal_texts_have_equal_digests_wherever_they_stand(tmp_path: Path):
    found = list(
        read_documents([rows(tmp_path / "a.jsonl", {"text": "x"}, {"text": "y"}), file(tmp_path / "b.txt", "x")])
    )
    assert found[0].digest == found[2].digest != found[1].digest


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
@pytest.mark.parametrize(
    ("unit", "end"), [("word ", " "), ("line of words\n", "\n"), ("a paragraph\nof lines\n\n", "\n\n"), ("诗", "诗")]
)
def test_a_long_text_is_cut_where_something_ends_and_nothing_is_lost(tmp_path: Path, unit: str, end: str, kind: str):
    whole = unit * (5 * MAX_DOCUMENT_BYTES // 2 // len(unit.encode()))
    found = texts(file(tmp_path / "a.txt", whole) if kind == "txt" else rows(tmp_path / "a.jsonl", {"text": whole}))
    assert "".join(found) == whole
    assert len(found) in (3, 4)
    assert all(len(text.encode()) <= MAX_DOCUMENT_BYTES and text.endswith(end) for text in found)


def test_a_file_of_one_endless_line_is_read_in_flat_memory(tmp_path: Path):
    size = 24 << 20
    with (tmp_path / "a.txt").open("wb") as out:
        for _ in range(size >> 20):
            out.write(b"x" * (1 << 20))
    peaks = []
    for split in ("file", "line"):
        tracemalloc.start()
        total = sum(d.num_bytes for d in read_documents([Source(str(tmp_path / "a.txt"), split=split)]))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert total == size
    assert max(peaks) < 10 * MAX_DOCUMENT_BYTES


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"fine\nalso\n\x00\x01", r"a\.txt, line 3: a NUL byte"),
        (b"fine\nba\xffd\n", r"a\.txt, line 2: not UTF-8, byte 3 of the line"),
        ("utf-16".encode("utf-16"), r"line 1: .*(NUL|not UTF-8)"),
    ],
)
@pytest.mark.parametrize("split", ["file", "paragraph", "line"])
def test_a_binary_file_is_told_with_its_line(tmp_path: Path, content: bytes, told: str, split: str):
    with pytest.raises(DataError, match=told) as caught:
        texts(file(tmp_path / "a.txt", content, split=split))
    assert "UTF-8" in str(caught.value)


def test_a_byte_that_is_no_text_is_told_with_its_line_in_a_long_file(tmp_path: Path):
    content = b"a line\n" * 400_000 + b"\xff\n"
    with pytest.raises(DataError, match="line 400001: not UTF-8, byte 1"):
        texts(file(tmp_path / "a.txt", content))


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ('{"text": "b"', "not valid JSON"),
        ('{"text": ' + "[" * 100_000, "deeper than"),
        ({"body": "b", "n": 1}, r"no text in `text` \(found: body, n\)"),
        ({"text": None}, "no text in `text`"),
        (["b"], "found: a list"),
        ({"text": 3}, "`text` is a int"),
        ('{"text": "\\ud83d"}', "half a character"),
    ],
)
def test_a_malformed_row_is_told_with_its_line(tmp_path: Path, row: object, told: str):
    with pytest.raises(DataError, match=rf"a\.jsonl, line 2: .*{told}"):
        texts(rows(tmp_path / "a.jsonl", {"text": "fine"}, row))


def test_a_parquet_file_without_the_column_or_with_an_empty_cell_is_refused(tmp_path: Path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x", None]}), path)
    with pytest.raises(DataError, match=r"a\.parquet, row 2: no text in `text`"):
        texts(Source(str(path)))
    with pytest.raises(DataError, match=r"no text in `body` \(found: text\)"):
        texts(Source(str(path), field="body"))


def test_a_line_of_jsonl_that_is_too_long_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(corpus, "MAX_LINE_BYTES", 1 << 20)
    source = rows(tmp_path / "a.jsonl", {"text": "a"}, {"text": "b" * (1 << 20)})
    with pytest.raises(DataError, match=r"line 2 is longer than 1 MiB"):
        texts(source)


@pytest.mark.parametrize("content", ["", " \n\n\t", "\u3000\n"])
def test_a_source_without_a_document_is_refused_even_beside_others(tmp_path: Path, content: str):
    full, empty = file(tmp_path / "full.txt", "text"), file(tmp_path / "empty.txt", content)
    with pytest.raises(DataError, match=r"empty\.txt' holds no document"):
        texts(full, empty)


def test_an_unknown_kind_and_a_glob_that_matches_nothing_are_refused(tmp_path: Path):
    with pytest.raises(DataError, match=r"a\.csv is of a kind that is not known.*\.parquet"):
        texts(file(tmp_path / "a.csv", "x"))
    with pytest.raises(DataError, match="matches no file"):
        texts(Source(str(tmp_path / "*.txt")))


@pytest.mark.parametrize("cut", [30, -20])
@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz", "a.parquet"])
def test_a_damaged_archive_is_refused(tmp_path: Path, name: str, cut: int):
    damaged = gzip.compress(b'{"text": "a"}\n' * 500)[:cut]
    with pytest.raises(DataError, match=rf"{name} cannot be read"):
        texts(file(tmp_path / name, damaged))


def test_altered_bytes_in_an_archive_are_refused(tmp_path: Path):
    whole = bytearray(gzip.compress("".join(f"line {n}\n" for n in range(5000)).encode()))
    whole[len(whole) // 2] ^= 0xFF
    with pytest.raises(DataError, match=r"a\.txt\.gz"):
        texts(file(tmp_path / "a.txt.gz", bytes(whole)))


def test_the_fingerprint_knows_contents_names_and_splits_but_no_folders_or_weights(tmp_path: Path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        file(tmp_path / folder / "a.txt", "text")
    one, two = (corpus_fingerprint([Source(str(tmp_path / name / "a.txt"))]) for name in ("one", "two"))
    assert one == two == corpus_fingerprint([Source(str(tmp_path / "one" / "*.txt"), weight=2)])
    assert one != corpus_fingerprint([Source(str(tmp_path / "one" / "a.txt"), split="line")])
    file(tmp_path / "two" / "a.txt", "texT")
    assert one != corpus_fingerprint([Source(str(tmp_path / "two" / "a.txt"))])
    (tmp_path / "one" / "a.txt").rename(tmp_path / "one" / "b.txt")
    assert one != corpus_fingerprint([Source(str(tmp_path / "one" / "b.txt"))])


def test_the_fingerprint_of_a_large_file_sees_its_ends_its_middle_and_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name, value in (("WHOLE_BYTES", 1000), ("BLOCK_BYTES", 10), ("NUM_BLOCKS", 5)):
        monkeypatch.setattr(corpus, name, value)
    seen = {}
    for at in (None, 0, 1000, 2000, 50):
        content = bytearray(b"a" * 2001)
        if at is not None:
            content[at] = ord("b")
        seen[at] = corpus_fingerprint([file(tmp_path / "a.txt", bytes(content))])
    seen["longer"] = corpus_fingerprint([file(tmp_path / "a.txt", b"a" * 2002)])
    assert seen.pop(50) == seen[None]  # between the blocks
    assert len(set(seen.values())) == len(seen)


def test_a_sample_is_even_over_sources_and_a_small_one_leaves_its_room_to_others(tmp_path: Path):
    sizes = {"small": 10, "middle": 1000, "large": 4000}
    sources = [
        rows(tmp_path / f"{name}.jsonl", *({"text": f"{name} {n:04}".ljust(20)} for n in range(num)))
        for name, num in sizes.items()
    ]
    sample = sample_texts(sources, max_bytes=6200)
    counts = {name: sum(text.startswith(name) for text in sample) for name in sizes}
    assert counts == {"small": 10, "middle": 150, "large": 150}
    assert sample == sample_texts(sources, max_bytes=6200)
    numbers = [int(text.split()[1]) for text in sample if text.startswith("large")]
    assert min(numbers) < 400 and max(numbers) > 3600  # from all over the source
    assert len(sample_texts(sources)) == 5010
