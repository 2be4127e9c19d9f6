"""What steps finished is found by the next process, until a checkpoint holds it."""

from functools import partial
from pathlib import Path

from rlhf.step_journal import StepJournal
from rlhf.together import together


def test_results_are_found_by_step_and_phase_by_the_next_process(tmp_path: Path):
    journal = StepJournal(tmp_path / "ppo.jsonl")
    journal.add(3, "generate", {"groups": [1]})
    journal.add(3, "score", {"scores": [0.1]})
    assert journal.find(3, "generate") is None  # what this process did it need not find
    again = StepJournal(tmp_path / "ppo.jsonl")
    assert again.find(3, "generate") == {"groups": [1]} and again.find(3, "score") == {"scores": [0.1]}
    assert again.find(4, "generate") is None


def test_steps_below_a_checkpoint_are_forgotten(tmp_path: Path):
    journal = StepJournal(tmp_path / "ppo.jsonl")
    for step in range(5):
        journal.add(step, "generate", {"step": step})
    journal.drop_below(3)
    again = StepJournal(tmp_path / "ppo.jsonl")
    assert [again.find(step, "generate") for step in range(5)] == [None, None, None, {"step": 3}, {"step": 4}]


def test_a_torn_result_was_not_finished(tmp_path: Path):
    journal = StepJournal(tmp_path / "ppo.jsonl")
    journal.add(0, "generate", {"a": 1})
    journal.add(0, "score", {"b": 2})
    data = (tmp_path / "ppo.jsonl").read_bytes()
    (tmp_path / "ppo.jsonl").write_bytes(data[:-4])
    again = StepJournal(tmp_path / "ppo.jsonl")
    assert again.find(0, "generate") == {"a": 1} and again.find(0, "score") is None


def test_what_is_added_beside_the_forgetting_is_kept(tmp_path: Path):
    journal = StepJournal(tmp_path / "ppo.jsonl")

    def adds() -> None:
        for step in range(100, 130):
            journal.add(step, "generate", {"step": step})

    together(adds, *(partial(journal.drop_below, step) for step in range(30)))
    again = StepJournal(tmp_path / "ppo.jsonl")
    assert [again.find(step, "generate") for step in range(100, 130)] == [{"step": step} for step in range(100, 130)]
