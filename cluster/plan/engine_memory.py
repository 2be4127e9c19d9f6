"""Bytes that a generator takes on each of its GPUs, as vLLM takes them."""

from __future__ import annotations

from cluster.plan.devices import GIB
from cluster.plan.memory import CONTEXT, MIB, NCCL, Parts
from cluster.plan.work import BYTES, Layout, Work

ENGINE_CONTEXT = CONTEXT + 200 * MIB  # with FlashAttention's and vLLM's own kernels and workspaces
CUDA_GRAPHS = 1024 * MIB  # for decoding at all batch sizes up to 512; none where enforce_eager is set
# Of an engine's process, the same way: by its imports, and by what it sets up.
CPU_ENGINE_IMPORTS = 660 * MIB
CPU_ENGINE_RUNTIME = 80 * MIB
CPU_ENGINE_PROCESS = CPU_ENGINE_IMPORTS + CPU_ENGINE_RUNTIME
CPU_KV_CACHE_GIB = 1.0  # where the recipe does not say (actors/generator.py)
BATCHED_TOKENS = 8192  # of a step of the engine, at most; vLLM's default for its class LLM on smaller GPUs
BATCHED_TOKENS_LARGE = 16384  # and on those of 70 GiB and more, A100 excepted
LARGE_GIB = 70


def engine_fixed(work: Work, layout: Layout) -> Parts:
    """All that an engine takes but its KV cache. vLLM measures it in a pass of the largest batch, and takes the rest.

    Weights and the feed-forward part are cut over the tensor-parallel ranks. One LoRA slot, of the smallest rank that
    vLLM has kernels for (actors/generator.py: max_loras=1).
    """
    shape, size, width = work.shape, BYTES[work.engine_dtype], layout.tensor_parallel
    recipe, on_cpu = work.recipe, work.device.is_cpu
    # On a CPU vLLM packs every matrix for its kernels in the place of the original, but keeps both of the output layer.
    numbers = shape.num_parameters + (shape.vocab * shape.hidden if on_cpu else 0)
    tokens = batched_tokens(work)
    running = recipe.generator.max_running
    inside = tokens * size * (4 * shape.hidden + 3 * shape.widest // width)
    graphs = 0 if recipe.generator.enforce_eager or on_cpu else CUDA_GRAPHS
    nccl = NCCL if width > 1 else 0
    return Parts(
        weights=-(-size * numbers // width),
        adapters=-(-size * shape.adapter_parameters(recipe.lora, engine_rank(recipe.lora.rank)) // width),
        activations=inside,
        # The sampler's, in float32: the logits, the processed ones and their logarithms.
        logits=min(running, work.num_answers) * shape.vocab * 12,
        overhead=CPU_ENGINE_PROCESS if on_cpu else ENGINE_CONTEXT + graphs + nccl,
    )


def engine_parts(work: Work, layout: Layout) -> Parts:
    """The whole engine; its KV cache is what its share of the GPU leaves, or what the recipe sets."""
    parts = engine_fixed(work, layout)
    cache = kv_cache(work, layout, parts)
    return Parts(
        weights=parts.weights, adapters=parts.adapters, activations=parts.activations, logits=parts.logits,
        kv_cache=max(cache, 0), overhead=parts.overhead,
    )  # fmt: skip


def kv_cache(work: Work, layout: Layout, parts: Parts) -> int:
    """Bytes of the KV cache on each of its GPUs; negative where not even the rest has room."""
    asked = work.recipe.generator.kv_cache_gib
    if asked is None and work.device.is_cpu:
        asked = CPU_KV_CACHE_GIB
    if asked is not None:
        return int(asked * GIB)
    assert layout.gpu_memory_share is not None
    return int(layout.gpu_memory_share * work.device.usable) - parts.total


def smallest_cache(work: Work, layout: Layout) -> int:
    """Bytes on each GPU that hold one prompt with all its answers. vLLM starts with less, but then answers wait."""
    tokens = work.prompt_tokens + work.recipe.sampling.n * work.answer_tokens
    block = work.recipe.generator.block_tokens
    return (tokens + block * work.recipe.sampling.n) * token_bytes(work, layout)


def token_bytes(work: Work, layout: Layout) -> int:
    """Of one token in the cache of one GPU; key heads are cut over the ranks, and no further than one each."""
    ranks = min(layout.tensor_parallel, work.shape.key_heads)
    return -(-work.shape.key_value_bytes(BYTES[work.engine_dtype]) // ranks)


def asleep(parts: Parts) -> int:
    """Bytes that a sleeping engine keeps: context and graphs. Weights go to the machine's memory, the cache goes."""
    return parts.overhead


def batched_tokens(work: Work) -> int:
    """Tokens of the largest batch, which the engine tries when it starts."""
    if work.device.is_cpu:
        return min(work.num_answers, work.recipe.generator.max_running) + work.context
    large = work.device.usable_gib >= LARGE_GIB and not work.device.name.startswith("A100")
    return BATCHED_TOKENS_LARGE if large else BATCHED_TOKENS


def engine_rank(rank: int) -> int:
    """The smallest rank that vLLM holds and that is no less; ranks beyond its largest are refused by the actor."""
    return min((size for size in (1, 8, 16, 32, 64, 128, 256, 320, 512) if size >= rank), default=rank)
