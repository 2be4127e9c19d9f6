"""docs/plan.md shows what the command prints."""

from __future__ import annotations

from cluster.plan.devices import GPUS
from tests.cluster.plan.pages import BLOCK, DOC, rewritten


def test_the_page_on_plans_shows_what_the_command_prints() -> None:
    text = DOC.read_text(encoding="utf-8")
    assert rewritten(text) == text, "write it anew: python -m tests.cluster.plan.pages"


def test_the_page_on_plans_shows_the_cases_that_it_must() -> None:
    text = DOC.read_text(encoding="utf-8")
    shown = [found[3] for found in BLOCK.finditer(text) if found[2] == "plan"]
    for gpus, memory, model in ((1, 24, "1.5b"), (1, 80, "7b"), (8, 80, "7b"), (8, 80, "70b"), (64, 80, "70b")):
        assert any(f"--gpus {gpus} --gpu-memory {memory}GB" in words and model in words for words in shown), (
            gpus,
            model,
        )
    assert "It does not fit." in text
    for device in GPUS.values():
        assert device.source in text and device.basis in text, device.name
