"""Whether a reward model learns what people ranked: held-out pairwise accuracy, Plackett-Luce beside all pairs.

    python -m benchmarks.people --rankings FILE --model FOLDER [--folds 5] [--json FILE]     (in the repository's root)

FILE is JSONL with a list in each line: `messages`, `ranked_answers` (best first), `ranks` where some are equal, and
`tree_id`, which names what hangs together (the message tree that a list was taken from; missing: each list is a tree).
The lists are taken in as `tenfold rankings --from` does, into a desk of their own, and are read back from there.

Trees are dealt into folds. For each fold, and with each loss, a reward model is trained on the other folds as the stage
`reward` trains it, from the same start, and scores the fold's answers. Beside them stand the model before any training,
and the rule that the longer answer is better. Intervals are of 95 %, by bootstrap over trees; differences are paired.

What a fold gave is in the JSON file as soon as it is known, and a second start goes on from there.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.people_figures import List, folds_of, summary, table
from cluster.console import StreamConsole, make_console
from configs.desk import DeskConfig
from configs.errors import ConfigError
from configs.load import load_recipe
from configs.schema import Recipe
from requirements.install import ROOT
from rlhf.chat import ChatTokenizer
from rlhf.desk.desk import Desk
from rlhf.desk.exchange import read_rows, rows_of_file
from rlhf.desk.groups import tokenised
from rlhf.desk.records import Item
from rlhf.disk import file_hash, to_json, write_file
from rlhf.errors import DataError, TenfoldError
from rlhf.records import AnswerGroup, Ranking
from rlhf.stages.reward import Ranked

LOSSES = ("plackett_luce", "all_pairs")
LONGER, UNTRAINED = "longer is better", "before training"
BY = "people"
PAGE = 100  # items of the desk that are read at once


@dataclass(frozen=True, slots=True)
class Data:
    """The lists as training takes them, and the tree of each."""

    ranked: Mapping[str, Ranked]  # by prompt id
    tree: Mapping[str, str]

    @property
    def lists(self) -> list[List]:
        return [List(name, self.tree[name], ranking.tiers) for name, (_, ranking) in self.ranked.items()]

    def in_fold(self, fold: Mapping[str, int], number: int) -> list[str]:
        """Prompt ids of a fold's lists."""
        return [name for name, tree in self.tree.items() if fold[tree] == number]


def load(source: Path, chat: ChatTokenizer, seed: int, max_answer_tokens: int | None) -> Data:
    """The lists of a file, through a desk. Raises DataError."""
    rows = list(rows_of_file(source))
    with tempfile.TemporaryDirectory() as folder, Desk(f"sqlite:///{folder}/rankings.db", DeskConfig(), seed=seed) as d:
        d.import_rows(rows, BY)
        items, agreed = list[Item](), d.consensus(0)
        while page := d.items(0, len(items), PAGE):
            items += page
    groups = {group.prompt.id: _cut(group, max_answer_tokens) for group in tokenised(items, chat)}
    ranked = {
        one.prompt_id: (groups[one.prompt_id], Ranking(one.prompt_id, one.tiers, BY))
        for one in agreed
        if len(one.tiers) > 1
    }
    # Row by row, since the desk does not keep what else a row says.
    tree = {taken.prompt_id: str(row.get("tree_id", taken.prompt_id)) for row in rows for taken in read_rows([row], BY)}
    return Data(ranked, {name: tree[name] for name in ranked})


def _cut(group: AnswerGroup, max_answer_tokens: int | None) -> AnswerGroup:
    if max_answer_tokens is None:
        return group
    cut = tuple(replace(a, token_ids=a.token_ids[:max_answer_tokens]) for a in group.answers)
    return replace(group, answers=cut)


class Outcomes:
    """What is known so far, in the JSON file where there is one."""

    def __init__(self, path: Path | None, settings: Mapping[str, Any]) -> None:
        self._path = path
        self.found: dict[str, Any] = {"settings": dict(settings), "outcomes": {}}
        if path is None or not path.exists():
            return
        before = json.loads(path.read_text())
        if before.get("settings") != self.found["settings"]:
            raise DataError(
                f"{path} holds a measurement with other settings or data.", remedy="Name another file, or remove it."
            )
        self.found = before

    def __contains__(self, name: str) -> bool:
        return name in self.found["outcomes"]

    def __getitem__(self, name: str) -> Any:
        return self.found["outcomes"][name]

    def keep(self, name: str, outcome: object) -> None:
        """Adds an outcome; it is on the disk when this returns."""
        self.found["outcomes"][name] = outcome
        self.write()

    def write(self) -> None:
        if self._path is not None:
            write_file(self._path, to_json(self.found))


def measure(data: Data, recipes: Mapping[str, Recipe], folds: int, out: Outcomes, console: StreamConsole) -> None:
    """Nothing; all that is still missing among the outcomes is there."""
    seed = recipes[LOSSES[0]].seed
    fold = folds_of(list(data.tree.values()), folds, seed)
    held_out = [data.in_fold(fold, number) for number in range(folds)]
    wanted = [(number, loss) for number in range(folds) for loss in LOSSES if f"{number}/{loss}" not in out]
    epochs, num = recipes[LOSSES[0]].reward.epochs, len(data.ranked)
    total = sum(epochs * (num - len(held_out[n])) + len(held_out[n]) for n, _ in wanted)
    total += 0 if UNTRAINED in out else num
    from benchmarks.people_trainer import Trainer, alone, peak_gib  # DeepSpeed takes seconds to import

    trainers: dict[str, Trainer] = {}
    with alone(), console.task("people", total, "lists") as work:
        for number, loss in wanted:
            trainer = trainers.get(loss) or trainers.setdefault(loss, Trainer(recipes[loss]))
            inside = set(held_out[number])
            train = [pair for name, pair in data.ranked.items() if name not in inside]
            found = trainer.trained_scores(train, [data.ranked[name][0] for name in held_out[number]], work)
            out.keep(f"{number}/{loss}", found)
            part = summary([one for one in data.lists if one.prompt_id in inside], {loss: found["scores"]})
            console.say(
                f"fold {number + 1} of {folds}, {loss}: accuracy {part['accuracy'][loss]['mean']:.3f} on "
                f"{part['num_pairs']} pairs; {found['train_s']:.0f} s to train, {found['score_s']:.0f} s to score, "
                f"{found['cpu_s']:.0f} s of a core; peak {peak_gib():.1f} GiB"
            )
        if UNTRAINED not in out:
            trainer = trainers.get(LOSSES[0]) or Trainer(recipes[LOSSES[0]])
            groups = [group for group, _ in data.ranked.values()]
            out.keep(UNTRAINED, {"scores": trainer.untrained_scores(groups, work)})


def conclude(data: Data, folds: int, out: Outcomes) -> str:
    """The table; the figures are among the outcomes' file."""
    judges: dict[str, Mapping[str, Sequence[float]]] = {}
    for loss in LOSSES:
        parts = [out[f"{number}/{loss}"]["scores"] for number in range(folds)]
        judges[loss] = {name: scores for part in parts for name, scores in part.items()}
    lengths = {
        name: [float(len(answer.token_ids)) for answer in group.answers] for name, (group, _) in data.ranked.items()
    }
    judges |= {LONGER: lengths, UNTRAINED: out[UNTRAINED]["scores"]}
    out.found["figures"] = summary(data.lists, judges)
    out.write()
    seconds = {loss: sum(out[f"{number}/{loss}"]["train_s"] for number in range(folds)) for loss in LOSSES}
    return table(out.found["figures"], seconds)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 2 for input that is of no use."""
    given = _parse(argv)
    os.environ["HF_HUB_OFFLINE"] = "1"
    with make_console(sys.stdout) as console:
        try:
            changes = [f"model.path={given.model}", f"reward.epochs={given.epochs}", f"seed={given.seed}"]
            changes += [f"learner.micro_batch_tokens={given.micro_batch_tokens}"]
            recipes = {loss: load_recipe(given.recipe, [*changes, f"reward.loss={loss}"]) for loss in LOSSES}
            data = load(given.rankings, ChatTokenizer(given.model), given.seed, given.max_answer_tokens)
            num_trees = len(set(data.tree.values()))
            if not 2 <= given.folds <= num_trees:
                raise DataError(
                    f"--folds {given.folds}: there are {num_trees} trees with a list that orders anything.",
                    limit="From 2 to as many as there are trees.",
                )
            out = Outcomes(given.json, _settings(given, recipes[LOSSES[0]]))
            measure(data, recipes, given.folds, out, console)
            console.say(conclude(data, given.folds, out))
        except (TenfoldError, ConfigError) as error:
            console.error(str(error))
            return 2
    return 0


def _settings(given: argparse.Namespace, recipe: Recipe) -> dict[str, Any]:
    """What figures hang on: another measurement does not go on from this one's file."""
    return {
        "rankings": file_hash(given.rankings),
        "model": {path.name: file_hash(path) for path in sorted(given.model.glob("*.safetensors"))},
        "folds": given.folds,
        "seed": given.seed,
        "max_answer_tokens": given.max_answer_tokens,
        "lora": recipe.lora.model_dump(mode="json"),
        "dtype": recipe.model.dtype,
        "reward": recipe.reward.model_dump(mode="json", exclude={"loss", "rankings"}),
    }


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rankings", type=Path, required=True, help="a JSONL file of ranked lists")
    parser.add_argument("--model", type=Path, default=Path("models/smollm2-135m-instruct"), help="the base")
    parser.add_argument("--recipe", type=Path, default=ROOT / "configs" / "recipes" / "smollm2_cpu.yaml")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of folds, orders and the start of each training")
    parser.add_argument("--max-answer-tokens", type=int, help="cut answers to so many; default: none is cut")
    parser.add_argument("--micro-batch-tokens", type=int, default=2048, help="in a pass: it changes no result")
    parser.add_argument("--json", type=Path, help="a file for all numbers, and to go on from")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
