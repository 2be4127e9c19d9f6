"""Numbers as a person says them."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """A time: `0.4 s`, `24 s`, `3 min 05 s`, `2 h 07 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def share(value: float) -> str:
    """A share of one, in percent with one digit: `61.5%`."""
    return f"{value:.1%}"
