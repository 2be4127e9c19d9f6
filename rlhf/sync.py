"""The adapter on its way from the policy to the generator, and the proofs that it arrived."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from rlhf.errors import SyncError
from rlhf.ports import Generator, Policy, Reference
from rlhf.records import Adapter, Answer, AnswerGroup, Prompt

CANARY = (3, 1, 4, 1, 5, 2, 6, 5, 3, 5)  # ids that every vocabulary has, for callers without a prompt at hand
CLEAR = 3.0  # times the noise: from here on the adapter's effect on the canary is told apart from it
NOISE = 0.05  # nats between trainer and engine in bfloat16, where no reference measures it


def sync(
    policy: Policy,
    generator: Generator,
    reference: Reference | None = None,
    canary: Sequence[int] = CANARY,
    *,
    continues: bool = False,
    adapter: Adapter | None = None,
) -> dict[str, float]:
    """`sync/*` metrics, once the generator holds the policy's adapter as it is now.

    The generator proves by checksum that it holds the tensors. In addition the canary (fixed tokens, best a real
    prompt's) tells whether it uses them: as soon as the adapter moves the trainer's logprobs by more than trainer and
    engine differ anyway, the engine's must be nearer to them with the adapter than without. `reference` measures that
    difference; without one it is taken to be `NOISE`. Where PPO continues an adapter (`continues`), the reference is
    that adapter, and once the policy has left it by as much, the engine must be nearer to the policy than to the start.
    `adapter` is the policy's as it is now, for a caller that needs it too: it is large, and asked for once.

    Raises SyncError.
    """
    adapter = adapter or policy.adapter()
    metrics = generator.load_adapter(adapter)
    return metrics | check_canary(policy, generator, reference, canary, adapter.version, continues=continues)


def check_canary(
    policy: Policy,
    generator: Generator,
    reference: Reference | None,
    canary: Sequence[int],
    version: int,
    *,
    continues: bool = False,
) -> dict[str, float]:
    """`sync/canary_*`: mean gap to the trainer in nats with and without the adapter, and whether it was a proof."""
    assert len(canary) > 1, "a canary needs a token to predict"
    group = _as_group(canary, version)
    ours = policy.logprobs([group], temperature=1.0)[0]
    with_adapter, without = map(torch.tensor, generator.canary_logprobs(canary))
    gap_with, gap_without = _gap(with_adapter, ours), _gap(without, ours)
    if reference is None:
        moved, noise = gap_without, NOISE
    else:
        of_base = reference.base_logprobs if continues else reference.logprobs
        base = of_base([group], temperature=1.0)[0]
        moved, noise = _gap(ours, base), _gap(without, base)
    if not all(math.isfinite(gap) for gap in (gap_with, gap_without, moved, noise)):
        raise SyncError(
            f"On the canary the logprobs of policy and generator differ by {gap_with} nats at version {version}.",
            limit="They must be finite.",
            remedy="A NaN in the weights: resume the run from its checkpoint with a lower learning rate.",
        )
    is_proof = moved > CLEAR * noise
    if is_proof and not gap_with < gap_without:
        raise SyncError(
            f"The generator does not use the adapter of version {version}: on the canary its logprobs are "
            f"{gap_with:.4g} nats from the policy's with the adapter and {gap_without:.4g} without.",
            limit=f"With the adapter they must be nearer, since it moves the policy by {moved:.4g} nats.",
            remedy="Start the run again; if it comes back, check that lora.targets are layers that the engine adapts.",
        )
    if continues and reference is not None:
        start = reference.logprobs([group], temperature=1.0)[0]
        left, gap_start = _gap(ours, start), _gap(with_adapter, start)
        if left > CLEAR * noise and not gap_with < gap_start:
            raise SyncError(
                f"The generator stayed at the adapter that PPO began with, at version {version}: on the canary its "
                f"logprobs are {gap_with:.4g} nats from the policy's and {gap_start:.4g} from that adapter's.",
                limit=f"They must be nearer to the policy's, which has moved by {left:.4g} nats since.",
                remedy="Start the run again: the adapter is sent again.",
            )
    return {
        "sync/canary_gap": gap_with,
        "sync/canary_gap_without": gap_without,
        "sync/canary_checked": float(is_proof),
    }


def check_versions(groups: Sequence[AnswerGroup], current: int, max_staleness: int = 0) -> None:
    """Nothing, if an adapter of the version window, `current` - `max_staleness` to `current`, wrote every answer.

    Raises SyncError.
    """
    window = f", and answers may be {max_staleness} behind it (ppo.max_staleness)" if max_staleness else ""
    for group in groups:
        for answer in group.answers:
            if not current - max_staleness <= answer.version <= current:
                raise SyncError(
                    f"An answer to the prompt {group.prompt.id} was written by adapter version {answer.version}.",
                    limit=f"The policy is at version {current}{window}.",
                    remedy="An update or a sync went missing: resume the run from its checkpoint.",
                )


def _as_group(token_ids: Sequence[int], version: int) -> AnswerGroup:
    """The canary as a prompt of one token and one answer, so that every token after the first is predicted."""
    tail = tuple(token_ids[1:])
    answer = Answer(tail, (0.0,) * len(tail), "length", version, "")
    return AnswerGroup(Prompt("canary", (), tuple(token_ids[:1])), (answer,))


def _gap(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left - right).abs().mean())
