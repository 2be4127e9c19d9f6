"""Files of a data set on a hub: `hub:OWNER/NAME`, with `@REVISION` and `/FILES` where they are wanted."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from pathlib import Path

from rlhf.errors import DataError

HUB = "hub:"
_SOURCE = re.compile(r"hub:(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w.-]+))?(?:/(?P<files>.+))?")


def hub_files(source: str, kinds: Sequence[str], *, named: str) -> list[Path]:
    """The files in the hub's local cache, in order of names; what is not there yet is fetched.

    `source` is `hub:OWNER/NAME[@REVISION][/FILES]`; FILES is a glob over the data set's files, whose `*` goes over
    folders too, and without it all files of the `kinds` are meant. A revision that is a commit never changes, and is
    looked for on the hub only once.

    Raises DataError: the source cannot be read, the hub does not give it, no file matches.
    """
    parts = _SOURCE.fullmatch(source)
    if parts is None:
        raise DataError(
            f"{named} names no data set of a hub.",
            limit="It is hub:OWNER/NAME, hub:OWNER/NAME@REVISION or hub:OWNER/NAME@REVISION/FILES.",
            remedy="Name one, as hub:HuggingFaceH4/no_robots/data/train*.parquet.",
        )
    wanted = [parts["files"]] if parts["files"] else [f"*{kind}" for kind in kinds]
    folder = _fetch(parts["name"], parts["revision"], wanted, named)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    found = [path for path in files if any(fnmatch.fnmatch(str(path.relative_to(folder)), glob) for glob in wanted)]
    if not found:
        raise DataError(
            f"{named}: the data set has no file that matches {' or '.join(wanted)}.",
            remedy="See its list of files on the hub, and name those you want after the data set's name.",
        )
    return found


def _fetch(name: str, revision: str | None, wanted: list[str], named: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, repo_type="dataset", revision=revision, allow_patterns=wanted))
    except Exception as error:  # the library raises its own errors, and those of what it speaks HTTP with
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{named}: the hub did not give it: {reason}",
            remedy="Check the spelling (owner/name@revision) and the network; set HF_TOKEN for a data set that wants a "
            "login; unset HF_HUB_OFFLINE if it is set; or fetch the files elsewhere and name them.",
        ) from error
