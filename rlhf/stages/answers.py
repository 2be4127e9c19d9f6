"""The answers that PPO learns from, step by step: written when a step needs them, or while the one before trains."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Self

from rlhf.checksum import checksum
from rlhf.data import PromptStream
from rlhf.errors import SyncError
from rlhf.journal import group_from_row, group_to_row
from rlhf.records import Adapter, AnswerGroup, Prompt, RoleState
from rlhf.saver import Saver
from rlhf.seeds import request_seed
from rlhf.stages.context import Context
from rlhf.sync import check_versions

GENERATOR = "generator"  # in a checkpoint: the adapter that writes the next step's answers


@dataclass(slots=True)
class Batch:
    """What one step asks, and is answered."""

    step: int
    position: Mapping[str, object]  # of the stream of prompts, before this batch
    prompts: Sequence[Prompt]
    groups: list[AnswerGroup] = field(default_factory=list[AnswerGroup])
    seconds: float = 0.0  # that it took beside a step


class Answers:
    """The batches of the loop, each committed as soon as it is there; a context manager.

    With `ppo.max_staleness: 0` a step's batch is written when the step takes it. With 1 the next step's is asked for
    ahead and written in a thread while this one trains: one batch and no more, since an engine takes another adapter
    only between two batches. It is then one update behind the policy that learns from it.

    Leaving the block ends that. A batch under way, as after an error, is neither waited for nor committed; its call
    ends with the generator's workers, or at its deadline (`cluster.call_s`).
    """

    def __init__(self, context: Context, prompts: PromptStream) -> None:
        self._context, self._config, self._prompts = context, context.recipe.ppo, prompts
        self._steps = context.store.steps("ppo")
        self._beside = Saver(daemon=True, name="tenfold-answers")
        self._ahead: Batch | None = None
        self._held: Adapter | None = None  # by the generator
        self._is_owed = False  # after a resume: `_held` has a batch to write that was asked for before
        self._committing, self._ended = threading.Lock(), False
        self.metrics: dict[str, float] = {}  # of the batch taken last; none where nothing is written ahead

    def settle(self, step: int) -> None:
        """Nothing, once the generator is free: what was asked for ahead is there.

        At the first step of a resume that is asked for again, of the adapter of then.
        """
        if self._is_owed:
            assert self._held is not None and self._ahead is None
            if self._steps.find(step, "generate") is None:
                self._context.team.generator.load_adapter(self._held)
            batch = self._next(step)
            self._write(batch, self._held)
            self._ahead, self._is_owed = batch, False
        self._beside.wait()

    def take(self, step: int, adapter: Adapter) -> list[AnswerGroup]:
        """[P] groups of ten for the step, whose `sync` has just given the generator this adapter, the policy as it is.

        Raises SyncError for an answer outside the version window.
        """
        self._held = adapter
        batch, self._ahead = self._ahead, None
        if batch is None:
            batch = self._next(step)
            self._write(batch, adapter)
        assert batch.step == step, f"step {step} takes the answers of step {batch.step}"
        check_versions(batch.groups, adapter.version, self._config.max_staleness)
        if self._config.max_staleness:
            ages = [adapter.version - answer.version for group in batch.groups for answer in group.answers]
            self.metrics = {"sampling/staleness": sum(ages) / len(ages), "time/generate_beside": batch.seconds}
        return batch.groups

    def ask_ahead(self, step: int) -> None:
        """Has the batch of a step begun, of the adapter that the generator holds, where answers may be that stale."""
        if not self._config.max_staleness or step >= self._context.ppo_steps.stop:
            return
        assert self._held is not None and self._ahead is None, "one batch ahead, and the one before was taken"
        batch, adapter = self._next(step), self._held

        def write() -> None:
            began = time.perf_counter()
            with self._context.store.events.around("ppo", step, "generate ahead"):
                self._write(batch, adapter)
            batch.seconds = time.perf_counter() - began

        self._ahead = batch
        self._beside.start(write)

    @property
    def position(self) -> Mapping[str, object]:
        """Of the stream of prompts, before the first batch that no step has taken."""
        return self._prompts.state() if self._ahead is None else self._ahead.position

    def state(self) -> dict[str, RoleState]:
        """For a checkpoint: the adapter that writes the next step's answers, if it may be another than the policy's."""
        if not self._config.max_staleness:
            return {}
        assert self._held is not None, "a step took its answers"
        return {GENERATOR: RoleState(self._held.tensors, {"version": self._held.version})}

    def load_state(self, saved: Mapping[str, RoleState]) -> None:
        """Goes on from a checkpoint, once the policy does. Of one without that adapter no answer is stale at first."""
        if not self._config.max_staleness or GENERATOR not in saved:
            return
        tensors, version = saved[GENERATOR].tensors, saved[GENERATOR].values["version"]
        assert isinstance(version, int)
        now = self._context.team.policy.adapter()  # whose settings all versions share
        self._held = replace(now, version=version, tensors=tensors, checksum=checksum(tensors))
        self._is_owed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._committing:  # what is just being committed is committed whole
            self._ended = True

    def _next(self, step: int) -> Batch:
        return Batch(step, self._prompts.state(), self._prompts.take(self._config.num_prompts))

    def _write(self, batch: Batch, adapter: Adapter) -> None:
        """Fills the batch: from the journal, or by the generator, which holds the adapter, and then it is committed."""
        found = self._steps.find(batch.step, "generate")
        if found is not None:
            if found["adapter"] != adapter.checksum:
                self._context.console.warn(
                    f"ppo step {batch.step}: the answers that were committed are of a policy that differs in its last "
                    "bits (another number of workers, or another machine); they are used."
                )
            batch.groups = [group_from_row(row) for row in found["groups"]]
            return
        seed, round = self._context.recipe.seed, self._context.round
        seeds = [request_seed(seed, "ppo", round, batch.step, prompt.id) for prompt in batch.prompts]
        groups = self._context.team.generator.answer(batch.prompts, self._context.sampling, seeds)
        rows = [group_to_row(group) for group in groups]
        with self._committing:
            if self._ended:
                raise SyncError(
                    f"The loop ended before the answers of step {batch.step} came.", remedy="Resume the run."
                )
            self._steps.add(batch.step, "generate", {"adapter": adapter.checksum, "groups": rows})
        batch.groups = groups
