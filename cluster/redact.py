"""Secrets stay out of everything that is printed or kept."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

_NAME = re.compile(r"(API_?KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL)", re.IGNORECASE)
_SHAPE = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|wandb_v\d_[A-Za-z0-9_]{16,}|gh[pousr]_[A-Za-z0-9]{20,})"
    r"|(?<=//)[^/\s:@]+:[^/\s@]+(?=@)"  # user:password in a URL
)
_SHORTEST = 8  # characters: a shorter value is a flag ("true"), and replacing it would garble the text


def is_secret(name: str) -> bool:
    """Whether a variable of that name is taken for a secret."""
    return bool(_NAME.search(name))


def redact(text: str, environ: Mapping[str, str] | None = None) -> str:
    """The text without secrets: values of secret-looking environment variables, known shapes of keys, URL passwords."""
    for name, value in (os.environ if environ is None else environ).items():
        if len(value) >= _SHORTEST and is_secret(name):
            text = text.replace(value, "***")
    return _SHAPE.sub("***", text)
