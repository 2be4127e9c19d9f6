"""The loss of text: how many nats its tokens cost, with gradients for a body and a head that are both trained.

Logits are formed a chunk of positions at a time and their gradient is taken at once, while they are there: [K, V] never
exists whole, and nothing is computed again in the backward pass.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from rlhf.forward import CHUNK, Linear, hidden_states, through_head, token_logprobs
from rlhf.rows import MicroBatch


def text_loss(model: nn.Module, micro_batch: MicroBatch, *, chunk: int = CHUNK) -> torch.Tensor:
    """The sum, in nats, of -log p over the predicted tokens; float32.

    Args:
        model: a causal LM of transformers, or one that peft wraps.
        chunk: positions whose logits exist at the same time; does not change the result.
    """
    head = cast(nn.Module, cast(Any, model).get_output_embeddings())
    # Not head.weight: where it is spread over ranks, to name it is to gather it, and an idle rank would not be there.
    weights = list(head.parameters())
    if type(head) is not nn.Linear or len(weights) != 1:  # something else, or with a bias
        return -token_logprobs(model, micro_batch, 1.0, chunk=chunk)[0].sum()

    def work(_: Linear, hidden: torch.Tensor) -> torch.Tensor:
        device = hidden.device.type
        if torch.is_autocast_enabled(device):
            hidden = hidden.to(torch.get_autocast_dtype(device))
        return cast(torch.Tensor, _Nats.apply(hidden, weights[0], micro_batch.target_ids, chunk))

    return through_head(model, hidden_states(model, micro_batch), work)


class _Nats(torch.autograd.Function):
    """Cross-entropy of `hidden` [K, H] through a head [V, H], summed; cut into chunks of positions."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, chunk: int
    ) -> torch.Tensor:
        cast_weight = weight.detach().to(hidden.dtype)
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        slope = torch.empty_like(hidden) if wants_hidden else None
        weight_slope = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for first in range(0, len(targets), chunk):
            part, wanted = hidden[first : first + chunk], targets[first : first + chunk]
            logits = (part @ cast_weight.T).float()
            norm = logits.logsumexp(-1, keepdim=True)
            total += (norm.squeeze(1) - logits.gather(1, wanted[:, None]).squeeze(1)).sum()
            if slope is None and weight_slope is None:
                continue
            # d nats / d logits = probabilities - one-hot
            pull = logits.sub_(norm).exp_()
            pull[torch.arange(len(wanted), device=pull.device), wanted] -= 1
            pull = pull.to(hidden.dtype)
            if slope is not None:
                slope[first : first + chunk] = pull @ cast_weight
            if weight_slope is not None:
                weight_slope += pull.T @ part
        ctx.save_for_backward(slope, weight_slope)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        slope, weight_slope = ctx.saved_tensors
        (grad,) = grads
        return (
            None if slope is None else slope * grad.to(slope.dtype),
            None if weight_slope is None else weight_slope.mul_(grad),
            None,
            None,
        )
