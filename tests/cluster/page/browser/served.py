"""The page on uvicorn, in a process of its own: `python -m tests.cluster.page.browser.served DATABASE PORT`."""

from __future__ import annotations

import sys

import uvicorn

from cluster.page.app import make_app
from configs.desk import DeskConfig
from rlhf.desk.desk import Desk

GUIDELINES = "# How to rank\n\n1. **True** before fluent.\n2. Short before long.\n"


def main(database: str, port: int) -> None:
    """Serves until it is ended."""
    with Desk(database, DeskConfig(quota=2, repeats=0), seed=1) as desk:
        app = make_app(desk, run="demo", guidelines=GUIDELINES)
        uvicorn.run(app, host="127.0.0.1", port=port, log_level="error", access_log=False)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
