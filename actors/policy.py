"""The policy: a LoRA adapter that PPO trains."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from actors.base import Base
from actors.learner import Learner
from actors.passes import answer_logprobs, micro_batches_of, minibatches
from configs.schema import Recipe
from rlhf.adapters import starting_adapter
from rlhf.checksum import checksum
from rlhf.errors import StoreError
from rlhf.forward import token_logprobs
from rlhf.kl import kl_loss
from rlhf.losses import importance_weights, policy_loss, policy_metrics
from rlhf.records import Adapter, AnswerGroup, RoleState, Rollout
from rlhf.rollout import sampling_metrics
from rlhf.rows import MicroBatch

NAME = "policy"


class Policy:
    """One rank's part of the policy. All but `logprobs` are collective, and give the same on every rank.

    It begins as the base, or as the adapter that the recipe continues. Raises ModelError for one that does not fit.

    Args:
        base: the decoder; the adapter is attached to it here.
        recipe: the run's.
        rank: of this worker.
        world_size: workers of the group.
    """

    def __init__(self, base: Base, recipe: Recipe, rank: int, world_size: int) -> None:
        start = starting_adapter(recipe)
        base.attach(NAME, start)
        self._start = None if start is None else start.checksum
        self._base, self._recipe, self._config = base, recipe, recipe.ppo
        self._rank, self._world_size = rank, world_size
        self._learner = Learner(base, NAME, None, recipe.ppo.optimizer, recipe.learner, rank, world_size)
        self._version = 0

    def adapter(self) -> Adapter:
        """The adapter as it is now; its version counts the calls of `update` since the start."""
        tensors = self._learner.tensors()
        return Adapter(self._version, tensors, self._base.adapter_config(NAME), checksum(tensors))

    def logprobs(self, groups: Sequence[AnswerGroup], temperature: float | None = None) -> torch.Tensor:
        """[N, T] nats, 0 at padding, at `temperature` (None: the sampling temperature of the recipe)."""
        temperature = self._recipe.sampling.temperature if temperature is None else temperature
        return answer_logprobs(groups, self._recipe.learner, self._learner.run, self._base.model, temperature)

    def update(self, rollout: Rollout) -> dict[str, float]:
        """Metrics of one step: every epoch's minibatches, unless the KL to the old policy passes `target_kl`.

        Every rank is given the whole rollout and computes its share.
        """
        steps: list[dict[str, float]] = []
        gaps: dict[str, float] = {}
        for parts in minibatches(rollout, self._recipe, self._world_size):
            assert not steps or rollout.old_logprobs is not None, "a second minibatch needs logprobs from before"
            step, gaps = self._minibatch(rollout, parts)
            steps.append(step)
            if self._config.target_kl is not None and step["approx_kl"] / step["num_tokens"] > self._config.target_kl:
                break
        self._version += 1
        return _metrics(steps) | gaps

    def state(self) -> RoleState:
        """Adapter, optimizer, version, which start: all that the next update depends on, and what it is held to."""
        state = self._learner.state()
        start = {} if self._start is None else {"start": self._start}
        return RoleState(state.tensors, {**state.values, "version": self._version, **start})

    def load_state(self, state: RoleState) -> None:
        """Takes up a state exactly. Raises StoreError for one that does not fit, or that began as another adapter."""
        if (began := state.values.get("start")) != self._start:
            raise StoreError(
                f"The saved policy began as {_begun(began)}.",
                limit=f"The reference that it would be held to now is {_begun(self._start)}.",
                remedy="Bring that adapter back (adapter_from, or the run's own in models/), or start another run.",
            )
        self._learner.load_state(state)
        version = state.values["version"]
        assert isinstance(version, int)
        self._version = version

    def _minibatch(self, rollout: Rollout, parts: Sequence[Sequence[int]]) -> tuple[dict[str, float], dict[str, float]]:
        """(sums over all ranks of one optimizer step, `sampling/*` where they are measured here)."""
        chosen = [index for part in parts for index in part]
        num_tokens = int(rollout.mask[chosen].sum())
        learner, mine = self._learner, parts[self._rank]
        logprobs = torch.zeros_like(rollout.sampling_logprobs)

        def loss(micro_batch: MicroBatch) -> tuple[torch.Tensor, dict[str, float]]:
            return self._loss(rollout, micro_batch, logprobs)

        micro_batches = learner.pad(micro_batches_of(rollout.groups, self._recipe.learner, mine))
        sums = learner.step(micro_batches, loss, num_tokens) | {"num_tokens": num_tokens}
        if rollout.old_logprobs is not None:
            return sums, {}
        own, mask = learner.total(logprobs)[chosen], rollout.mask[chosen]
        sampled = rollout.sampling_logprobs[chosen]
        return sums, sampling_metrics(own[mask], sampled[mask], self._config.is_clip)

    def _loss(
        self, rollout: Rollout, micro_batch: MicroBatch, seen: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """(sum over the micro-batch's tokens, what to report of it); `seen` [N, T] takes the logprobs."""
        config = self._config
        at = (micro_batch.answer, micro_batch.step)

        def of(values: torch.Tensor) -> torch.Tensor:
            return values.to(micro_batch.answer.device)[at]

        logprobs, entropies = token_logprobs(self._base.model, micro_batch, self._recipe.sampling.temperature)
        now = logprobs.detach()
        old = now if rollout.old_logprobs is None else of(rollout.old_logprobs)
        weights = importance_weights(old, of(rollout.sampling_logprobs), config.is_clip)
        terms = policy_loss(
            logprobs,
            old,
            of(rollout.advantages),
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            weights=weights,
        )
        total = terms.loss
        reported = {
            "loss": float(terms.loss.detach()),
            "clipped": float(terms.clipped),
            "approx_kl": float(terms.approx_kl),
            "ratio_shift": float(terms.ratio_shift),
            "ratio_shift_sq": float(terms.ratio_shift_sq),
            "ratio_error_max": float(torch.expm1(now - old).abs().max()),
            "entropy": float(entropies.detach().sum()),
        }
        if rollout.ref_logprobs is not None and rollout.beta > 0:
            kl = kl_loss(logprobs, of(rollout.ref_logprobs), config.kl.estimator, old_logprobs=old, weights=weights)
            total = total + rollout.beta * kl
            reported["kl"] = float(kl.detach())
        seen[at[0].cpu(), at[1].cpu()] = now.cpu()
        return total, reported


def _begun(start: object) -> str:
    return "the base" if start is None else f"the adapter {str(start)[:12]}"


def _metrics(steps: Sequence[dict[str, float]]) -> dict[str, float]:
    """Metrics under the names that TRL's users know: means over all tokens of all optimizer steps."""
    if not steps:
        return {"policy/num_updates": 0.0}

    def total(name: str) -> float:
        return sum(step.get(name, 0.0) for step in steps)

    num_tokens = total("num_tokens")
    metrics = policy_metrics(
        clipped=total("clipped"),
        approx_kl=total("approx_kl"),
        ratio_shift=total("ratio_shift"),
        ratio_shift_sq=total("ratio_shift_sq"),
        num_tokens=num_tokens,
    )
    metrics |= {
        "loss/policy_avg": total("loss") / num_tokens,
        "val/ratio_first_error": steps[0]["ratio_error_max"],
        "policy/entropy": total("entropy") / num_tokens,
        "policy/grad_norm": total("grad_norm") / len(steps),
        "policy/lr": steps[-1]["lr"],
        "policy/num_updates": float(len(steps)),
    }
    if "kl" in steps[0]:
        metrics["loss/kl_avg"] = total("kl") / num_tokens
    return metrics
