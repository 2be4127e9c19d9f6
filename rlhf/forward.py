"""A model's forward pass over a micro-batch of rows: logprobs, values, and hidden states for scores.

Logits are formed only where an answer token is predicted, a chunk of positions at a time: [K, V] never exists whole,
neither in the forward nor in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch.nn.functional import log_softmax
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig, PreTrainedModel

from rlhf.attention import NAME, attention_inputs
from rlhf.errors import ModelError
from rlhf.rows import MicroBatch

T = TypeVar("T")
Linear = Callable[[torch.Tensor], torch.Tensor]  # hidden states [K, H] -> logits [K, V]

CHUNK = 256  # positions whose logits exist at the same time: 256 · V numbers, three times over
ONE_CALL = "in_one_call"  # the attribute of an output layer that holds its HeadPass
SCALINGS = ("final_logit_softcapping", "logit_scale", "logits_scaling")  # done to logits outside the head


class HeadPass(torch.nn.Module):
    """All that a pass does with an output layer, as one call of a module that holds the layer's parameters.

    DeepSpeed gathers parameters that are spread over ranks in hooks around a module's call, and all ranks must make as
    many calls. Ranks have different numbers of chunks, so the chunks lie within one call.
    """

    def __init__(self, head: torch.nn.Module) -> None:
        super().__init__()
        self._layer = [head]  # in a list, so that it is not a part of this module: only its parameters are
        for name, parameter in head.named_parameters():
            self.register_parameter(name.replace(".", "_"), parameter)

    def forward(self, hidden: torch.Tensor, work: Callable[[Linear, torch.Tensor], T]) -> T:
        """What `work` makes of the layer and `hidden`; the layer is called without hooks of its own."""
        return work(self._layer[0].forward, hidden)


def use_head_in_one_call(model: torch.nn.Module) -> HeadPass:
    """The module that passes over `model` call its output layer through from now on."""
    head = _head(model)
    head.__dict__[ONE_CALL] = HeadPass(head)  # not as a submodule: names in checkpoints stay as they are
    return head.__dict__[ONE_CALL]


def through_head(model: torch.nn.Module, hidden: torch.Tensor, work: Callable[[Linear, torch.Tensor], T]) -> T:
    """What `work` makes of the output layer and the hidden states [K, H], while the layer's weights are whole."""
    head = _head(model)
    one_call = head.__dict__.get(ONE_CALL)
    return work(head, hidden) if one_call is None else one_call(hidden, work)


def token_logprobs(
    model: torch.nn.Module, micro_batch: MicroBatch, temperature: float, *, chunk: int = CHUNK
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logprobs [K] of the answer tokens and entropies [K] of the distributions they come from, nats, float32.

    log_softmax(logits / temperature): the distribution that answers are sampled from. Entropies carry no gradient.

    Args:
        model: a causal LM of transformers, or one that peft wraps.
        chunk: positions whose logits exist at the same time; does not change the result.
    """
    assert temperature > 0
    frozen = not any(weight.requires_grad for weight in _head(model).parameters())

    def work(head: Linear, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        parts = [
            _chunk_logprobs(head, some, targets, temperature, frozen)
            for some, targets in zip(hidden.split(chunk), micro_batch.target_ids.split(chunk), strict=True)
        ]
        return torch.cat([logprobs for logprobs, _ in parts]), torch.cat([entropies for _, entropies in parts])

    return through_head(model, hidden_states(model, micro_batch), work)


def token_logprobs_alone(
    model: torch.nn.Module, micro_batch: MicroBatch, temperature: float, *, chunk: int = CHUNK
) -> torch.Tensor:
    """Logprobs [K] as `token_logprobs` gives them, without entropies and gradients: fewer passes over all logits."""
    assert temperature > 0 and not torch.is_grad_enabled()

    def work(head: Linear, hidden: torch.Tensor) -> torch.Tensor:
        parts: list[torch.Tensor] = []
        for some, targets in zip(hidden.split(chunk), micro_batch.target_ids.split(chunk), strict=True):
            logits = head(some).float().div_(temperature)
            parts.append(_of(targets, logits) - logits.logsumexp(-1))
        return torch.cat(parts)

    return through_head(model, hidden_states(model, micro_batch), work)


def token_values(model: torch.nn.Module, head: torch.nn.Module, micro_batch: MicroBatch) -> torch.Tensor:
    """Values [K] of the states before each answer token is written, float32; `head` maps [K, H] to [K, 1]."""
    return head(hidden_states(model, micro_batch)).squeeze(-1).float()


def last_token_hidden(model: torch.nn.Module, micro_batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states [M, H] at each answer's last token, where a reward model scores, and the answers' indices [M]."""
    return _body_output(model, micro_batch)[micro_batch.last], micro_batch.last_answer


def hidden_states(model: torch.nn.Module, micro_batch: MicroBatch) -> torch.Tensor:
    """Hidden states [K, H] after the final norm, at the positions that predict answer tokens."""
    return _body_output(model, micro_batch)[micro_batch.predict]


def _body_output(model: torch.nn.Module, micro_batch: MicroBatch) -> torch.Tensor:
    """Hidden states [L, H] after the final norm."""
    plain = _plain(model)
    body = cast(torch.nn.Module, plain.base_model)
    if plain.config._attn_implementation != NAME:
        _check_rows_work(plain.config)
        # It stays: gradient checkpointing computes layers again in the backward pass.
        plain.set_attn_implementation(NAME)
    output = body(
        input_ids=micro_batch.token_ids,
        position_ids=micro_batch.position_ids,
        use_cache=False,
        **attention_inputs(micro_batch, plain.config, plain.dtype),
    )
    return output.last_hidden_state[0]


def _plain(model: Any) -> PreTrainedModel:
    """The transformers model inside a peft one, or the model itself. Adapters are layers within it."""
    return cast(PreTrainedModel, model.get_base_model() if hasattr(model, "get_base_model") else model)


def _head(model: torch.nn.Module) -> torch.nn.Module:
    """The output layer."""
    return cast(torch.nn.Module, _plain(model).get_output_embeddings())


def _check_rows_work(config: PretrainedConfig) -> None:
    """Raises ModelError for a model whose result would be wrong without a word."""
    odd = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    odd |= {name for name in SCALINGS if getattr(config, name, None) not in (None, 1)}
    if odd:
        raise ModelError(
            f"The model ({config.model_type}) has {', '.join(sorted(odd))}.",
            limit="Tenfold trains models whose layers are all attention and whose logits are the head's own.",
            remedy="Take another base, of the Llama, Qwen, Mistral or SmolLM family for example.",
        )


def _chunk_logprobs(
    head: Linear, hidden: torch.Tensor, targets: torch.Tensor, temperature: float, frozen: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    if not torch.is_grad_enabled():
        return _distribution(head(hidden), targets, temperature)[:2]
    if not frozen:  # it needs a gradient of its own
        redone = checkpoint(_logprobs_to_differentiate, head, hidden, targets, temperature, use_reentrant=False)
        return cast(tuple[torch.Tensor, torch.Tensor], redone)
    # A logprob depends on its own position's hidden state only. So its gradient, [H] numbers, can be had now, while the
    # logits are there: a third less work for the head than computing them again in the backward pass.
    leaf = hidden.detach().requires_grad_()
    logits = head(leaf)
    logprobs, entropies, probabilities = _distribution(logits.detach(), targets, temperature)
    pull = probabilities.neg_()  # d logprob / d logits = (one-hot - probabilities) / temperature
    pull[torch.arange(len(targets), device=pull.device), targets] += 1
    (slope,) = torch.autograd.grad(logits, leaf, pull.div_(temperature).to(logits.dtype))
    # Adds zero, whose gradient is the slope.
    return logprobs + ((hidden - hidden.detach()) * slope).sum(-1), entropies


def _logprobs_to_differentiate(
    head: Linear, hidden: torch.Tensor, targets: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    logs = log_softmax(head(hidden).float() / temperature, dim=-1)
    return _of(targets, logs), _entropies(logs.detach(), logs.detach().exp())


def _distribution(
    logits: torch.Tensor, targets: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logprobs [K] of the targets, entropies [K], and all probabilities [K, V]; for logits without a gradient."""
    logs = log_softmax(logits.float() / temperature, dim=-1)
    probabilities = logs.exp()
    return _of(targets, logs), _entropies(logs, probabilities), probabilities


def _of(targets: torch.Tensor, logs: torch.Tensor) -> torch.Tensor:
    return logs.gather(-1, targets[:, None]).squeeze(-1)


def _entropies(logs: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    # A token that is ruled out (-inf) adds nothing.
    return -(probabilities * logs.clamp_min(torch.finfo(logs.dtype).min)).sum(-1)
