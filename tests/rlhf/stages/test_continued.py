"""PPO that continues an adapter: every stage stands on the adapter's start where it stood on the base."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from rlhf.errors import ModelError
from rlhf.records import Adapter
from rlhf.stages import evaluate, ppo, sample
from rlhf.stages.context import Context
from tests.fakes import TableReference
from tests.rlhf.stages.conftest import MakeContext

START = torch.tensor([0.0, 0.0, 0.0, 0.0, 3.0, 0.0, 0.0, 1.0])  # it likes token 4


@pytest.fixture
def law(tmp_path: Path) -> Path:
    """The folder of an adapter for the small worlds of the fakes."""
    folder = tmp_path / "law"
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({"lora_B": START}, folder / "adapter_model.safetensors")
    return folder


def continuing(context: Context) -> Context:
    """The context, its roles as the real ones are when they start from the adapter."""
    team: Any = context.team
    with torch.no_grad():
        team.policy.logits.copy_(START)
    team.reference = TableReference(START)
    return context


def share_of(token: int, context: Context) -> float:
    answers = [answer for group in context.store.groups("sample", 0) for answer in group.answers]
    tokens = [each for answer in answers for each in answer.token_ids]
    return tokens.count(token) / len(tokens)


def test_the_answers_to_rank_are_written_by_the_start(make_context: MakeContext, law: Path) -> None:
    base = make_context("base")
    sample.run(base)
    assert share_of(4, base) < 0.3
    context = continuing(make_context("law", adapter_from=str(law)))
    sample.run(context)
    assert torch.equal(context.team.generator.logits, START)  # type: ignore[attr-defined]
    assert share_of(4, context) > 0.5
    assert {answer.version for group in context.store.groups("sample", 0) for answer in group.answers} == {0}


def test_answers_that_are_all_there_load_nothing(make_context: MakeContext, law: Path) -> None:
    sample.run(make_context(adapter_from=str(law)))
    context = make_context(adapter_from=str(law))
    context.team.generator.load_adapter = None  # type: ignore[assignment]
    sample.run(context)


def test_a_start_that_does_not_fit_stops_before_anything_is_sampled(make_context: MakeContext, law: Path) -> None:
    (law / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 16, "lora_alpha": 8}))
    context = make_context(adapter_from=str(law))
    with pytest.raises(ModelError, match="its rank is 16"):
        sample.run(context)
    assert context.team.generator.requests == []  # type: ignore[attr-defined]


def test_kl_is_zero_at_the_first_step_and_grows_from_the_start(make_context: MakeContext, law: Path) -> None:
    context = continuing(make_context(adapter_from=str(law)))
    ppo.run(context)
    rows = context.store.metrics("ppo")
    assert rows[0]["objective/kl"] == 0.0
    assert rows[-1]["objective/kl"] != 0.0
    assert all(row["sync/canary_checked"] == 1.0 for row in rows)


def test_before_is_the_start_and_not_the_base(make_context: MakeContext, law: Path) -> None:
    context = continuing(make_context(adapter_from=str(law)))
    ppo.run(context)
    loaded: list[Adapter] = []
    load = context.team.generator.load_adapter

    def spy(adapter: Adapter) -> dict[str, float]:
        loaded.append(adapter)
        return load(adapter)

    context.team.generator.load_adapter = spy  # type: ignore[method-assign]
    evaluate.run(context)
    before, after = loaded
    assert torch.equal(before.tensors["lora_B"], START)
    assert (before.version, after.version) == (0, 6)
    assert not torch.equal(after.tensors["lora_B"], START)
