"""benchmarks/elsewhere: the task that lm-eval is given."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from benchmarks.elsewhere import write_task


def test_the_task_asks_twenty_questions_with_two_words_to_choose_from(tmp_path: Path) -> None:
    task = yaml.safe_load((write_task(tmp_path) / "continue_text.yaml").read_text())
    rows = [json.loads(line) for line in Path(task["dataset_kwargs"]["data_files"]["test"]).read_text().splitlines()]
    assert len(rows) == 20
    for row in rows:
        right, wrong = row["choices"]
        assert right in row["given"] and wrong not in row["given"]
