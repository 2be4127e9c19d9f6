from __future__ import annotations

import pytest

from rlhf.loopback import is_loopback


@pytest.mark.parametrize(
    ("host", "here"),
    [
        ("127.0.0.1", True),
        ("127.3.2.1", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.0.2.7", False),
        ("10.0.0.1", False),
        ("127.example.invalid", False),  # a name, for all that it begins like an address
        ("no such host", False),
        ("", False),
    ],
)
def test_loopback_is_what_other_machines_cannot_reach(host: str, here: bool) -> None:
    assert is_loopback(host) == here
