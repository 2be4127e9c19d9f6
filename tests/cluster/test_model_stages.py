"""From raw text to PPO, and a domain adapter from SFT through PPO to an export: on real Ray, vLLM and DeepSpeed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from cluster.console import LineConsole
from cluster.export import export_run
from cluster.ray_session import RaySession
from cluster.run import run
from rlhf.disk import file_hash
from rlhf.errors import StoreError
from tests.recipes import WORDS, tiny_recipe

CONSTANT = {"lr": 3e-3, "warmup_steps": 0, "schedule": "constant"}
pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.timeout(400)]


def write_texts(folder: Path) -> tuple[Path, Path]:
    """(a corpus, pairs of prompts and answers)."""
    corpus, pairs = folder / "corpus.txt", folder / "pairs.jsonl"
    corpus.write_text("\n\n".join(" ".join(WORDS[(i + j * j) % len(WORDS)] for j in range(20)) for i in range(80)))
    rows = [{"prompt": f"Say {word} {i}", "completion": word} for i in range(4) for word in WORDS]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return corpus, pairs


def test_raw_text_becomes_a_model_that_answers_and_that_ppo_takes(session: RaySession, tmp_path: Path) -> None:
    corpus, pairs = write_texts(tmp_path)
    recipe = tiny_recipe(
        "",
        tmp_path,
        stages=["pretrain", "sft", "ppo"],
        pretrain={
            "sources": [{"path": str(corpus), "split": "paragraph"}],
            "sizes": {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "context_tokens": 128},
            "vocab_size": 320,
            "row_tokens": 128,
            "batch_rows": 2,
            "num_steps": 4,
            "evaluate_every": 2,
        },
        sft={
            "sources": [{"path": str(pairs)}],
            "template": "roles",
            "train": "full",
            "max_text_tokens": 64,
            "batch_texts": 8,
            "sample_tokens": 4,
        },
        ppo={"score": "rules", "num_steps": 1},
        tracker={"mode": "offline"},
    )
    outcome = run(recipe, LineConsole(), session=session)
    assert list(outcome.results) == ["pretrain", "sft", "ppo"]
    folder = Path(outcome.places.run)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["stage"] == "pretrain"] == [1, 2, 3, 4]
    (ppo,) = (row for row in rows if row["stage"] == "ppo")
    assert ppo["sampling/logp_difference_max"] < 1e-3 and ppo["objective/kl"] == pytest.approx(0.0, abs=1e-3)
    policy = json.loads((folder / "models" / "policy" / "adapter_config.json").read_text())
    assert policy["r"] == 4
    again = run(recipe, LineConsole(), session=session)
    assert again.results == outcome.results


def test_later_stages_say_so_where_the_model_they_stand_on_is_not_made(session: RaySession, tmp_path: Path) -> None:
    corpus, _ = write_texts(tmp_path)
    recipe = tiny_recipe(
        "",
        tmp_path,
        stages=["pretrain", "sample"],
        pretrain={
            "sources": [{"path": str(corpus)}],
            "sizes": {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "context_tokens": 128},
            "row_tokens": 128,
        },
    )
    with pytest.raises(StoreError, match="stand on what `pretrain` makes"):
        run(recipe, LineConsole(), session=session, only=["sample"])


def test_a_domain_adapter_goes_from_sft_through_ppo_to_plain_peft_on_an_unchanged_base(
    session: RaySession, tiny_model: Path, tmp_path: Path
) -> None:
    _, pairs = write_texts(tmp_path)
    before = file_hash(tiny_model / "model.safetensors")
    recipe = tiny_recipe(
        tiny_model,
        tmp_path,
        stages=["sft", "sample", "ppo"],
        adapter="law",
        sft={"sources": [{"path": str(pairs)}], "max_text_tokens": 64, "batch_texts": 8, "optimizer": CONSTANT},
        ppo={"score": "rules", "num_steps": 2, "advantage": "group", "kl": {"where": "loss"}},
        tracker={"mode": "disabled"},
    )
    outcome = run(recipe, LineConsole(), session=session)
    assert outcome.results["sft"]["result"] == "law"
    folder = Path(outcome.places.run)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    first = next(row for row in rows if row["stage"] == "ppo")
    assert first["objective/kl"] == pytest.approx(0.0, abs=1e-5), "the reference is the adapter's start"
    assert first["sampling/logp_difference_max"] < 1e-3, "vLLM writes with the adapter's start"
    done: Any = export_run(str(folder), tmp_path / "law", merge=False, console=LineConsole())
    assert done["stage"] == "ppo" and done["to_base"] > 3 * done["to_trained"]
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    plain = PeftModel.from_pretrained(base, str(tmp_path / "law"))
    assert plain.peft_config["default"].r == 4  # type: ignore[union-attr]
    assert file_hash(tiny_model / "model.safetensors") == before
