"""What a base model or an adapter is known by, wherever its folder lies."""

from __future__ import annotations

import hashlib
from pathlib import Path

from rlhf.adapters import CONFIG, WEIGHTS
from rlhf.disk import file_hash

SAMPLE_BYTES = (
    1 << 20
)  # from the beginning, the middle and the end of each file: reading all of a large base takes long


def fingerprint(folder: str | Path) -> str | None:
    """A hash of configuration, tokenizer and weights of a base; None where there is no such folder.

    Of files above 3 MiB only three samples and the size count.
    """
    path = Path(folder)
    files = sorted(f for f in path.glob("*") if f.suffix in (".json", ".safetensors", ".jinja") and f.is_file())
    if not folder or not files:
        return None
    total = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        total.update(f"{file.name}|{size}|".encode())
        with file.open("rb") as stream:
            for start in _starts(size):
                stream.seek(start)
                total.update(stream.read(SAMPLE_BYTES))
    return total.hexdigest()


def adapter_fingerprint(folder: str | Path | None) -> str | None:
    """A hash of settings and weights of an adapter in PEFT's layout; None where there is none."""
    files = [Path(folder) / name for name in (CONFIG, WEIGHTS)] if folder else []
    if not files or not all(file.is_file() for file in files):
        return None
    return hashlib.sha256("|".join(file_hash(file) for file in files).encode()).hexdigest()


def _starts(size: int) -> tuple[int, ...]:
    if size <= 3 * SAMPLE_BYTES:
        return tuple(range(0, size, SAMPLE_BYTES))
    return (0, (size - SAMPLE_BYTES) // 2, size - SAMPLE_BYTES)
