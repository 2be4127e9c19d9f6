"""Whether domain adapters on one frozen base are each better in their own domain, and leave the base as it is.

    python -m benchmarks.domains [--model FOLDER] [--folder runs/domains] [--json FILE]      (in the repository's root)

Makes the data, runs configs/recipes/domain_arithmetic.yaml (SFT, then PPO) and domain_style.yaml (SFT), and exports
both adapters. Then plain transformers and peft load the base, alone and with each adapter, and answer test prompts of
both domains greedily. An answer's score is what its domain's rules give it; `faultless` is the share of answers that
the rules give 1, and `named` the share that name the value asked for, whatever they say beside it. Intervals are of
95 %, by bootstrap over prompts, and differences are paired by prompt.

Exits with 1 if an adapter is not better in its own domain than the base and than the other (the whole interval of the
difference above 0), or if a byte of the base changed. Once more, it trains nothing again and measures anew; remove
the folder to begin from nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.estimates import Estimate, estimate
from cluster.run import termination_interrupts
from configs.load import load_recipe
from configs.schema import DataConfig
from requirements import domains as data
from requirements.install import ROOT
from requirements.steps import StepFailed, run, say
from rlhf.chat import ChatTokenizer
from rlhf.data import load_prompts
from rlhf.disk import file_hash
from rlhf.import_model import quiet_transformers
from rlhf.records import Answer, AnswerGroup, Prompt
from rlhf.rules import RuleScorer

DOMAINS = ("arithmetic", "style")
WRITERS = ("base", "arithmetic after SFT", "arithmetic", "style")
JUDGED = (("arithmetic", "base"), ("arithmetic", "style"), ("style", "base"), ("style", "arithmetic"))
ANSWER_TOKENS = 48  # at most: the base, too, has room for a sentence
AT_ONCE = 50  # answers that are written side by side
SHOWN = 3
Scores = Mapping[str, Mapping[str, torch.Tensor]]  # writer -> domain -> [P]
Answers = Mapping[str, Mapping[str, Sequence[AnswerGroup]]]  # the same; groups of one answer


def main(argv: Sequence[str] | None = None) -> int:
    """0 if both adapters are better where they should be and the base is unchanged."""
    options = _parse(argv)
    os.environ["HF_HUB_OFFLINE"] = "1"
    if code := data.main():
        return code
    began = time.perf_counter()
    try:
        before = first_hashes(options.model, options.folder)
        adapters = {name: train_and_export(name, options) for name in DOMAINS}
    except StepFailed as error:
        say(str(error))
        return 1
    after_sft = options.folder / "domain-arithmetic" / "models" / "arithmetic"
    trained = time.perf_counter() - began
    chat = ChatTokenizer(options.model)
    prompts = {name: test_prompts(name, chat, options.prompts) for name in DOMAINS}
    answers = {
        writer: write_all(writer, options.model, chat, adapter, prompts)
        for writer, adapter in zip(WRITERS, (None, after_sft, *adapters.values()), strict=True)
    }
    scores = {writer: {name: scored(name, groups) for name, groups in of.items()} for writer, of in answers.items()}
    changed = sorted({name for name, _ in set(before.items()) ^ set(hashes(options.model).items())})
    found = differences(scores)
    passed = is_shown(found) and not changed
    took = time.perf_counter() - began
    print(table(scores, answers))
    for (one, other, name), difference in found.items():
        print(f"{f'{one} less {other}, {name}':44} {difference}")
    print(f"base: {'CHANGED: ' + ', '.join(changed) if changed else f'all {len(before)} files unchanged'}")
    print(f"{'shown' if passed else 'NOT SHOWN'}; {took:.0f} s in all, {trained:.0f} s of them for training and export")
    if options.json:
        report = {
            "passed": passed,
            "measured": details(scores, answers),
            "differences": [[*key, asdict(difference)] for key, difference in found.items()],
            "base": {"sha256": before, "changed": changed},
            "seconds": {"training": trained, "all": took},
        }
        options.json.write_text(json.dumps(report, ensure_ascii=False, indent=2) + "\n")
    return int(not passed)


def train_and_export(name: str, options: argparse.Namespace) -> Path:
    """The folder of the exported adapter of a domain. What is trained already is not trained again."""
    recipe = ROOT / "configs" / "recipes" / f"domain_{name}.yaml"
    tenfold, log = [sys.executable, "-m", "cluster.cli"], options.folder / f"{name}.log"
    changes = [f"runs={options.folder}", f"model.path={options.model}", "tracker.mode=disabled"]
    run(f"Training the adapter {name}", [*tenfold, "run", recipe, *changes], log=log)
    dest = options.folder / "exported" / name
    shutil.rmtree(dest, ignore_errors=True)
    run(f"Exporting it to {dest}", [*tenfold, "export", options.folder / f"domain-{name}", "--to", dest], log=log)
    return dest


def test_prompts(name: str, chat: ChatTokenizer, num: int) -> tuple[Prompt, ...]:
    """The first `num` test prompts of a domain, in an order by hash."""
    return load_prompts(DataConfig(prompts=str(data.DATA / f"{name}_test.jsonl"), held_out=0), chat).train[:num]


def write_all(
    writer: str, base: Path, chat: ChatTokenizer, adapter: Path | None, prompts: Mapping[str, Sequence[Prompt]]
) -> dict[str, list[AnswerGroup]]:
    """The greedy answers of the base, with the adapter if there is one, as anybody would load them."""
    with quiet_transformers():
        model: Any = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32)
        if adapter is not None:
            from peft import PeftModel  # not before it is told that there is no GPU

            model = PeftModel.from_pretrained(model, str(adapter))
    model.eval()
    written: dict[str, list[AnswerGroup]] = {}
    for name, asked in prompts.items():
        began = time.perf_counter()
        written[name] = []
        for first in range(0, len(asked), AT_ONCE):
            written[name] += write(model, chat, asked[first : first + AT_ONCE])
            say(f"  {writer}, {name}: {len(written[name])} answers, {time.perf_counter() - began:.0f} s")
    return written


def write(model: Any, chat: ChatTokenizer, prompts: Sequence[Prompt]) -> list[AnswerGroup]:
    """One greedy answer to each prompt."""
    longest = max(len(prompt.token_ids) for prompt in prompts)
    gaps = [longest - len(prompt.token_ids) for prompt in prompts]
    ids = torch.tensor([[0] * gap + list(prompt.token_ids) for gap, prompt in zip(gaps, prompts, strict=True)])
    seen = torch.tensor([[0] * gap + [1] * (longest - gap) for gap in gaps])
    with torch.no_grad():
        made = model.generate(
            input_ids=ids,
            attention_mask=seen,
            do_sample=False,
            max_new_tokens=ANSWER_TOKENS,
            eos_token_id=sorted(chat.eos_ids),
            pad_token_id=0,
        )
    return [_group(prompt, row[longest:].tolist(), chat) for prompt, row in zip(prompts, made, strict=True)]


def _group(prompt: Prompt, ids: list[int], chat: ChatTokenizer) -> AnswerGroup:
    end = next((place for place, token in enumerate(ids) if token in chat.eos_ids), None)
    kept = ids if end is None else ids[: end + 1]
    ended = "length" if end is None else "eos"
    return AnswerGroup(prompt, (Answer(tuple(kept), (0.0,) * len(kept), ended, 0, chat.decode(kept)),))


def scored(name: str, groups: Sequence[AnswerGroup]) -> torch.Tensor:
    """[P] what the rules of a domain's recipe give the answers."""
    return RuleScorer(load_recipe(ROOT / "configs" / "recipes" / f"domain_{name}.yaml").rules).scores(groups)


def names_value(group: AnswerGroup) -> bool:
    """Whether the answer names the value that was asked for, as a number or as words of their own."""
    extra, text = group.prompt.extra, group.answers[0].text
    wanted = extra["fact"] if "fact" in extra else json.loads(extra["entry"])["answer"]
    return bool(re.search(rf"(?<![\w.-]){re.escape(wanted)}(?!\w|\.\d)", text, re.IGNORECASE))


def differences(scores: Scores) -> dict[tuple[str, str, str], Estimate]:
    """(writer, other writer, domain) -> what the first has more than the other, for all that is judged and for PPO."""
    pairs = [(better, worse, better) for better, worse in JUDGED]
    pairs.append(("arithmetic", "arithmetic after SFT", "arithmetic"))
    return {(one, other, name): estimate(scores[one][name] - scores[other][name]) for one, other, name in pairs}


def is_shown(found: Mapping[tuple[str, str, str], Estimate]) -> bool:
    """Whether each adapter is surely better in its own domain than the base and than the other adapter."""
    return all(found[better, worse, better].low > 0 for better, worse in JUDGED)


def shares(scores: torch.Tensor, groups: Sequence[AnswerGroup]) -> dict[str, float]:
    """The shares of answers that are faultless, name the value, and ended by themselves."""
    return {
        "faultless": float((scores == 1).float().mean()),
        "named": sum(map(names_value, groups)) / len(groups),
        "ended": sum(group.answers[0].ended == "eos" for group in groups) / len(groups),
    }


def examples(groups: Sequence[AnswerGroup]) -> list[list[str]]:
    """The first questions with their answers."""
    return [[group.prompt.text, group.answers[0].text] for group in groups[:SHOWN]]


def table(scores: Scores, answers: Answers) -> str:
    """A block for each domain, a line for each writer, and one of its answers."""
    lines: list[str] = []
    for name in DOMAINS:
        num = len(answers["base"][name])
        lines.append(
            f"\n{f'{name}, {num} test prompts':24} {'score':>6} {'interval':>16} {'faultless':>10} {'named':>7}"
        )
        for writer in WRITERS:
            mean, share = estimate(scores[writer][name]), shares(scores[writer][name], answers[writer][name])
            lines.append(
                f"{writer:24} {mean.mean:6.3f} {f'{mean.low:.3f} - {mean.high:.3f}':>16} {share['faultless']:10.0%} "
                f"{share['named']:7.0%}  {examples(answers[writer][name])[0][1].strip()[:60]!r}"
            )
    return "\n".join([*lines, ""])


def details(scores: Scores, answers: Answers) -> dict[str, dict[str, Any]]:
    """All figures and the first answers by writer and domain, as JSON holds them."""
    return {
        writer: {
            name: {"num_prompts": len(groups), "score": asdict(estimate(scores[writer][name]))}
            | shares(scores[writer][name], groups)
            | {"examples": examples(groups)}
            for name, groups in of.items()
        }
        for writer, of in answers.items()
    }


def first_hashes(model: Path, folder: Path) -> dict[str, str]:
    """The hashes of the base from before the first training in this folder."""
    path = folder / "base.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(hashes(model), indent=2) + "\n")
    return json.loads(path.read_text())


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a model."""
    return {str(path.relative_to(folder)): file_hash(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("models/smollm2-135m-instruct"), help="the base")
    parser.add_argument("--folder", type=Path, default=Path("runs/domains"), help="for runs, exports and logs")
    parser.add_argument("--prompts", type=int, default=100, help="test prompts of each domain, at most 100")
    parser.add_argument("--json", type=Path, help="a file for all numbers")
    return parser.parse_args(argv)


if __name__ == "__main__":
    with termination_interrupts():
        raise SystemExit(main())
