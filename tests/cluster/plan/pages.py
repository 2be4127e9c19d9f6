"""What docs/plan.md shows, as the command prints it: `python -m tests.cluster.plan.pages` writes it anew."""

from __future__ import annotations

import re
import shlex
from io import StringIO
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.table import Table

from cluster.plan.devices import GPUS
from cluster.plan.page import comparison, page
from cluster.planning import Wanted, numbers, plans

ROOT = Path(__file__).parents[3]
DOC = ROOT / "docs" / "plan.md"
WIDTH = 118
BLOCK = re.compile(r"(<!-- (plan|devices): ?([^>]*?) ?-->\n```text\n)(.*?)(\n```)", re.DOTALL)


def rewritten(text: str) -> str:
    """The page with each block that a comment marks as the command that it names prints it."""
    return BLOCK.sub(lambda found: found[1] + shown(found[2], found[3]) + found[5], text)


def shown(kind: str, words: str) -> str:
    """What a block of this kind holds."""
    out = StringIO()
    console = Console(file=out, width=WIDTH, color_system=None)
    console.print(devices() if kind == "devices" else _page(shlex.split(words)))
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines())


def devices() -> Table:
    """The table of devices."""
    table = Table(
        "device",
        "label",
        "usable",
        "BF16",
        "FP32",
        "bandwidth",
        "link",
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
    )
    for device in GPUS.values():
        table.add_row(
            device.name, f"{device.label_gb:g} GB", f"{device.usable_gib:.2f} GiB",
            f"{device.bfloat16_flops / 1e12:g} TFLOP/s", f"{device.float32_flops / 1e12:g} TFLOP/s",
            f"{device.bandwidth / 1e9:,.0f} GB/s", f"{device.link / 1e9:g} GB/s",
        )  # fmt: skip
    return table


def _page(words: list[str]) -> RenderableType:
    """What `tenfold plan` prints for these words."""
    options = dict(zip(words[1::2], words[2::2], strict=True))
    gpus = options.get("--gpus")
    wanted = Wanted(
        None if gpus is None else int(gpus),
        8,
        options.get("--gpu"),
        options.get("--gpu-memory"),
        options.get("--model"),
    )
    compared = numbers(options.get("--compare"))
    found = plans(str(ROOT / words[0]), (), wanted, compared)
    return comparison(found) if compared else page(found[0])


if __name__ == "__main__":
    DOC.write_text(rewritten(DOC.read_text(encoding="utf-8")), encoding="utf-8")
