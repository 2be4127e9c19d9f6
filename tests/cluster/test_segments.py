"""W&B's logs are read as LevelDB writes them, and as a killed process leaves them."""

from __future__ import annotations

import struct
import zlib

from cluster import segments


def chunk(kind: int, content: bytes) -> bytes:
    return struct.pack("<IHB", zlib.crc32(bytes([kind]) + content), len(content), kind) + content


def test_records_are_read_up_to_the_first_that_is_torn_or_damaged() -> None:
    # The first ends 3 bytes before the block does, where no header fits; the last goes over three blocks.
    one, two = b"a" * (32768 - 7 - 7 - 3), b"b" * 100
    parts = [b"c" * (32768 - 107 - 7), b"c" * (32768 - 7), b"c" * 50]
    data = b":W&B\xe1\xbe\x00" + chunk(1, one) + b"\0\0\0" + chunk(1, two)
    whole = data + b"".join(chunk(kind, part) for kind, part in zip((2, 3, 4), parts, strict=True))
    read = [(32768 - 3, one), (32768 + 107, two), (len(whole), b"".join(parts))]
    assert list(segments.records(whole)) == read
    for size in (len(whole) - 1, 3 * 32768, len(data) + 3, len(data)):
        assert list(segments.records(whole[:size])) == read[:2]
    assert list(segments.records(data[:-1] + b"x" + whole[len(data) :])) == read[:1]
    assert list(segments.records(data + bytes(500))) == read[:2]
    assert list(segments.records(b"")) == []
