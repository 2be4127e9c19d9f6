"""Run folders for tests: a small recipe, records with awkward values, and ways to do harm."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from configs.schema import Recipe
from rlhf.checksum import checksum
from rlhf.records import Answer, AnswerGroup, Message, Prompt, RoleState
from rlhf.store import RunStore


def recipe(**sections: object) -> Recipe:
    base = {"name": "run", "model": {"path": "m"}, "data": {"prompts": "p"}, "rules": [{"name": "short"}]}
    return Recipe.model_validate(base | sections)


@contextmanager
def opened_again(store: RunStore, warnings: list[str] | None = None, **sections: object) -> Iterator[RunStore]:
    store.close()
    with RunStore.open(store.folder.parent, recipe(**sections), (warnings or []).append) as again:
        yield again


def group(name: str = "p1") -> AnswerGroup:
    prompt = Prompt(
        name, (Message("system", "Be brief."), Message("user", "Why?\n\u2028\ud83d")), (1, 2, 3), {"gold": "x"}
    )
    answers = (
        Answer((5, 2), (-0.1, -1e-45), "eos", 3, "Because.\n\nIt is 你好"),
        Answer((7,), (0.1 + 0.2 - 1,), "length", 3, ""),
    )
    return AnswerGroup(prompt, answers)


def role(seed: int) -> RoleState:
    torch.manual_seed(seed)
    tensors = {"lora_A": torch.randn(3, 4), "rng": torch.get_rng_state(), "step": torch.tensor(seed)}
    return RoleState(tensors, {"scheduler": {"last": seed}, "big": 2**80, "gain": 0.1})


def same(a: RoleState, b: RoleState) -> bool:
    return checksum(a.tensors) == checksum(b.tensors) and a.values == b.values


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@contextmanager
def disk_of(num_bytes: int) -> Iterator[None]:
    """A block in which no file may grow beyond so many bytes, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
