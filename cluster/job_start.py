"""Where a submitted job begins, on the cluster: its files come to where they last, then it is `tenfold run`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from cluster.console import make_console
from cluster.recipe_paths import INPUTS, stage
from cluster.run import exit_code
from configs.load import dump_recipe, load_recipe
from rlhf.disk import disk_errors, write_file


def main(words: list[str]) -> int:
    """The exit code, if it does not come to the run; else this process becomes it.

    `words`: the recipe in the package, then options of `tenfold run`.
    """
    console = make_console()
    path = Path()

    def work() -> None:
        nonlocal path
        recipe = load_recipe(words[0])
        home = Path(recipe.runs) / INPUTS / recipe.name
        with disk_errors(home, "made"), console.task("files of the package"):
            home.mkdir(parents=True, exist_ok=True)
            recipe = stage(recipe, Path.cwd())
            path = home / "recipe.yaml"
            write_file(path, dump_recipe(recipe).encode())

    with console:
        code = exit_code(console, "tenfold submit", work)
    if code:
        return code
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "cluster.cli", "run", str(path), *words[1:]])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
