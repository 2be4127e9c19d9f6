"""The error of this floor."""

from __future__ import annotations


class ConfigError(Exception):
    """A recipe that cannot be used: each problem with its key, value, limit and remedy.

    The command line prints the message without a traceback and exits with code 2.
    """
