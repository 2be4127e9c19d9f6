"""Attention over rows: only what is visible is computed.

A dense mask over a row of L tokens costs L² pairs and skips nothing; with ten long answers most of it is hidden. On a
GPU FlexAttention skips the hidden blocks. Elsewhere each piece of a micro-batch (a prompt, an answer) gets a call of
its own: an answer's queries against its prompt's and its own keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rlhf.errors import ModelError
from rlhf.rows import MicroBatch, Piece, visible

NAME = "tenfold_rows"  # among transformers' attention implementations


@dataclass(frozen=True, slots=True, eq=False)
class Visible:
    """What each piece sees, ready for a model's layers."""

    pieces: tuple[Piece, ...]
    # Per piece [queries · heads per key head, keys], None where it is plainly causal; empty with a FlexAttention mask.
    biases: tuple[torch.Tensor | None, ...]
    longest: int  # positions that a token can look back over, at most


def attention_inputs(micro_batch: MicroBatch, config: PretrainedConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Keyword arguments for a model's body, so that its tokens see what `visible` says.

    The mask is always passed: without one, transformers takes restarting position ids for packed sequences, and the
    answers lose their prompt.
    """
    device = micro_batch.token_ids.device
    pieces = micro_batch.pieces
    longest = max(piece.length + (0 if piece.sees is None else pieces[piece.sees].length) for piece in pieces)
    if device.type == "cuda":
        rule = visible(micro_batch.row, micro_batch.branch)
        mask = create_block_mask(rule, None, None, micro_batch.num_tokens, micro_batch.num_tokens, device=device)
        return {"attention_mask": mask, "rows": Visible(pieces, (), longest)}
    heads, key_heads = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    biases = _biases(pieces, heads // (key_heads or heads), dtype, device)
    return {"attention_mask": micro_batch.mask, "rows": Visible(pieces, biases, longest)}


def rows_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | BlockMask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    rows: Visible | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention's output [B, L, heads, head size], in the form of transformers' attention functions.

    Args:
        query: [B, heads, L, head size]; key and value: the same with key heads.
        attention_mask: for FlexAttention where it is a BlockMask; else for SDPA, which is used without `rows`.
        rows: what the pieces of a micro-batch see; B is 1.
    """
    if rows is None:
        assert not isinstance(attention_mask, BlockMask)
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    assert dropout == 0, "dropout is off in every role"
    _check_plain(kwargs, rows.longest)
    if isinstance(attention_mask, BlockMask):
        return flex_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    lengths = [piece.length for piece in rows.pieces]
    # One split each: its backward joins the parts once, where slices would add up full-size gradients.
    queries, keys, values = (part.split(lengths, dim=2) for part in (query, key, value))
    outputs = list[torch.Tensor]()
    for i, (piece, bias) in enumerate(zip(rows.pieces, rows.biases, strict=True)):
        if piece.sees is None:
            seen = _causal(queries[i], keys[i], values[i], scaling)
        else:
            whole_key = torch.cat((keys[piece.sees], keys[i]), dim=2)
            whole_value = torch.cat((values[piece.sees], values[i]), dim=2)
            # Query heads that share a key head are laid along the queries: keys need not be repeated.
            folded = queries[i].reshape(1, whole_key.shape[1], -1, query.shape[-1])
            seen = scaled_dot_product_attention(folded, whole_key, whole_value, attn_mask=bias, scale=scaling)
            seen = seen.reshape(queries[i].shape)
        outputs.append(seen)
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _causal(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None) -> torch.Tensor:
    times = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(times, dim=1) for part in (key, value))
    return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)


def _biases(
    pieces: Sequence[Piece], heads_per_key: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor | None, ...]:
    """For each piece that sees another one: 0 where visible, -inf elsewhere; the same tensor for equal lengths."""
    made: dict[tuple[int, int], torch.Tensor] = {}
    for piece in pieces:
        if piece.sees is not None and (key := (piece.length, pieces[piece.sees].length)) not in made:
            own = torch.full((piece.length, piece.length), float("-inf"), dtype=dtype, device=device).triu(1)
            made[key] = torch.nn.functional.pad(own, (key[1], 0)).repeat(heads_per_key, 1)
    return tuple(None if p.sees is None else made[p.length, pieces[p.sees].length] for p in pieces)


def _check_plain(options: dict[str, Any], longest: int) -> None:
    window = options.get("sliding_window")
    if window is not None and longest > window:
        raise ModelError(
            f"A prompt and its answer have {longest} tokens.",
            limit=f"The model's layers see {window} tokens back (sliding window).",
            remedy="Lower data.max_prompt_tokens or sampling.max_answer_tokens, or take another base.",
        )
    for name in ("softcap", "s_aux", "position_bias"):
        if options.get(name) is not None:
            raise ModelError(
                f"The model's attention uses {name!r}.",
                limit="Tenfold trains models with plain causal attention.",
                remedy="Take another base, of the Llama, Qwen, Mistral or SmolLM family for example.",
            )


AttentionInterface.register(NAME, rows_attention)
# For calls without rows: a padding mask means the same as under SDPA.
AttentionMaskInterface.register(NAME, sdpa_mask)
