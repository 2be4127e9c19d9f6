"""Bytes that a worker takes, part by part, as the code in actors/ and rlhf/ takes them. Each formula says its source.

What the formulas were compared with: benchmarks/plan_memory.py, on CPUs. No figure of a GPU was measured.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

from cluster.placement import Role
from cluster.plan.devices import GIB
from cluster.plan.work import TRAINED, Layout, Work
from configs.schema import LoraConfig

MIB = 1024**2
CHUNK = 256  # positions whose logits exist at the same time (rlhf/forward.py)
LARGEST_BUCKET = 1 << 26  # numbers of a bucket (actors/engine.py)
LIVE = 10**9  # numbers of the base that ZeRO 3 keeps gathered at most (DeepSpeed's stage3_max_live_parameters)
ALL_REDUCE = 5 * 10**8  # numbers that DeepSpeed's all-reduce without ZeRO lays together at once
HEAD_ROOM = 0.1  # of the usable memory: what the allocator cannot fill, and what the formulas leave out

# What a process takes on a GPU before it computes anything. From common reports, not measured for this project.
CONTEXT = 600 * MIB  # CUDA's context, kernels and the workspace of cuBLAS
NCCL = 400 * MIB  # buffers of a process group over several GPUs
# What a process takes of a machine's memory by its imports (torch, transformers, peft, DeepSpeed), and then by what
# they set up: threads, a process group, DeepSpeed's engine. Measured by benchmarks/plan_memory.py.
CPU_IMPORTS = 525 * MIB
CPU_RUNTIME = 35 * MIB
CPU_PROCESS = CPU_IMPORTS + CPU_RUNTIME
# Of what a forward pass frees between pieces that stay, the share of glibc's heap that nothing fills again. Measured as
# the peak over that with every piece in a mapping of its own (MALLOC_MMAP_THRESHOLD_): 0.49, 0.53 and 0.58 for
# SmolLM2-135M with adapters on all linear layers, on the feed-forward part, and on queries and values.
CPU_HOLES = 0.5

# Inputs that several layers share; where no copy of another type is made, autograd keeps each once.
TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True, slots=True)
class Parts:
    """Bytes on one GPU (or of one process), by what they are for."""

    weights: int = 0
    adapters: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    logits: int = 0
    kv_cache: int = 0
    overhead: int = 0

    @property
    def total(self) -> int:
        """The peak."""
        return sum(getattr(self, part.name) for part in fields(self))

    @property
    def resting(self) -> int:
        """What stays between two passes, when torch has given back what it keeps for the next one."""
        return self.weights + self.adapters + self.optimizer + self.overhead


def trainer_parts(work: Work, layout: Layout, roles: Iterable[Role], world: int) -> Parts:
    """A worker that plays these roles on one base. Roles take turns in it: their passes' memory is not added up.

    Its base is frozen, and the reference is that base with adapters off (actors/base.py). Under ZeRO 3 it is cut over
    the workers from its first parameter on (actors/load.py), that of a reference alone too (actors/spread.py).
    """
    roles = tuple(roles)
    recipe, shape = work.recipe, work.shape
    trained: list[Role] = [role for role in roles if role in TRAINED]
    spread = layout.zero_stage == 3
    base = work.dtype_bytes * shape.num_parameters
    adapter = shape.adapter_parameters(recipe.lora)
    states = [learner_state(_trained(work, role), layout.zero_stage, world) for role in trained]
    weights = base
    if spread:
        gathered = work.dtype_bytes * min(shape.num_parameters, max(LIVE, shape.largest_module))
        weights = -(-base // world) + (gathered if world > 1 else 0)
    continues = recipe.adapter_from or recipe.adapter  # one that is there, or that `sft` of this run makes
    frozen = -(-4 * adapter // (world if spread else 1)) if "reference" in roles and continues else 0
    tokens = work.pass_tokens(layout.micro_batch_tokens, world)
    on_cpu = work.device.is_cpu
    overhead = CPU_PROCESS if on_cpu else CONTEXT + (NCCL if world > 1 and (trained or spread) else 0)
    return Parts(
        weights=weights,
        adapters=frozen + sum(state.adapters for state in states),
        gradients=max((state.gradients + state.passing for state in states), default=0),
        optimizer=sum(state.optimizer for state in states),
        activations=activations(work, layout, tokens, trains=bool(trained)),
        logits=logits(work, tokens, roles),
        overhead=overhead,
    )


def _trained(work: Work, role: Role) -> int:
    """Numbers that a role's optimizer moves: its adapter, and the scalar head of all but the policy."""
    head = 0 if role == "policy" else work.shape.hidden + 1
    return work.shape.adapter_parameters(work.recipe.lora) + head


@dataclass(frozen=True, slots=True)
class State:
    """Bytes of one learner besides its base."""

    adapters: int  # what the passes read
    gradients: int
    optimizer: int  # what stays: copies that the optimizer steps, and both moments
    passing: int  # what an update takes besides, and gives back


def learner_state(num: int, zero_stage: int, world: int) -> State:
    """Of `num` trained numbers, in float32 with AdamW (Rajbhandari et al. 2020, arXiv:1910.02054, sections 3 and 5).

    Stages as DeepSpeed does them (runtime/engine.py, runtime/zero/stage_1_and_2.py, stage3.py): stages 1 and 2 lay all
    parameters into one flat tensor and step a copy of this rank's part; a bucket has room for twice all numbers
    (actors/engine.py). Without ZeRO, several ranks lay their gradients
    together for the sum. Under ZeRO 3 adapters stay float32, cut like the rest.
    """
    part = -(-num // world)
    bucket = 4 * min(2 * num, LARGEST_BUCKET)
    if zero_stage == 0:
        together = 4 * min(num, ALL_REDUCE) if world > 1 else 0
        return State(4 * num, 4 * num + together, 8 * num, 0)
    if zero_stage == 3:
        return State(4 * part, 8 * part + bucket, 12 * part, 4 * part)
    gradients = (4 * num if zero_stage == 1 else 4 * part) + bucket
    return State(4 * num, gradients, 12 * part, 4 * part)


def activations(work: Work, layout: Layout, tokens: int, *, trains: bool) -> int:
    """Of one pass over so many tokens.

    What autograd keeps for the backward pass of a frozen decoder with LoRA, layer by layer, and what is there at one
    time inside a layer besides. With checkpointing a layer's input alone is kept, and one layer is computed again at a
    time (Chen et al. 2016, arXiv:1604.06174).
    """
    shape, size = work.shape, work.dtype_bytes
    inside = tokens * shape.widest * (12 + size)  # LoRA's part, scaled, and the sum: float32; and the result
    ends = tokens * (3 * size + 4) * shape.hidden  # embeddings, the last norm, states at answers with their slopes
    kept = 0
    if trains:
        layer = tokens * kept_per_token(work, work.recipe.lora)
        if work.device.is_cpu:
            layer += int(CPU_HOLES * tokens * freed_per_token(work, work.recipe.lora))
        if layout.gradient_checkpointing:
            kept = shape.num_layers * tokens * size * shape.hidden + layer
        else:
            kept = shape.num_layers * layer
    return kept + inside + ends + _mask(work, tokens)


def kept_per_token(work: Work, lora: LoraConfig) -> int:
    """Bytes that one layer keeps of one token for its backward pass.

    A frozen linear layer keeps nothing. Norms keep their input in float32; attention its query, key, value, output and
    the logarithm of its sums (Dao et al. 2022, arXiv:2205.14135); the gated feed-forward part three numbers of its
    width. LoRA keeps its input for the gradient of A, and A's output for that of B: in float32, as it is itself, so
    that in bfloat16 each adapted layer keeps a copy of its own (peft's cast of the input).
    """
    shape, size = work.shape, work.dtype_bytes
    norms = 4 * shape.norms_per_layer
    # On CPUs answers' queries are copied, and each answer's call gets its prompt's keys too (rlhf/attention.py).
    queries, keys = (3, 2 * _pieces_over_tokens(work)) if work.device.is_cpu else (2, 2)
    attention = size * queries * shape.queries + int(size * keys * shape.keys) + 4 * shape.heads
    feed_forward = 3 * size * shape.widest
    adapted = shape.adapted(lora)
    inputs: dict[object, int] = {}
    for layer in adapted:
        shared = next((names for names in TOGETHER if layer.name in names), layer.name)
        inputs[shared if size == 4 else layer.name] = layer.inputs
    return norms + attention + feed_forward + 4 * sum(inputs.values()) + 4 * lora.rank * len(adapted)


def freed_per_token(work: Work, lora: LoraConfig) -> int:
    """Bytes of one token that one layer's forward pass makes and frees again between those that it keeps.

    Norms: the square, and the result before it is scaled. Rotation: queries and keys before it, times cosine, turned,
    and times sine. What attention and feed-forward part add to the sum. LoRA: the layer's own result, and in float32
    B's and that scaled (peft's Linear).
    """
    shape, size = work.shape, work.dtype_bytes
    outputs = sum(layer.outputs for layer in shape.adapted(lora))
    base = 2 * shape.norms_per_layer + 4 * (shape.queries + shape.keys) + 2 * shape.hidden
    return size * base + (size + 8) * outputs


def _pieces_over_tokens(work: Work) -> float:
    """How many keys attention sees for each token of a row, where every answer's call gets its prompt's keys too."""
    n, prompt, answer = work.recipe.sampling.n, work.prompt_tokens, work.answer_tokens
    return (prompt + n * (prompt + answer)) / (prompt + n * answer)


def _mask(work: Work, tokens: int) -> int:
    """What the mask of rows takes while it is made: [L, L] truth values, one on a CPU and six on a GPU.

    rlhf/rows.py (`visible`) gives five comparisons and their result to create_block_mask.
    """
    return tokens * tokens * (1 if work.device.is_cpu else 6)


def logits(work: Work, tokens: int, roles: Iterable[Role]) -> int:
    """Of policy and reference: all of a chunk of positions, whatever the ZeRO stage.

    rlhf/forward.py: the logits, and in float32 their logarithms, probabilities, and two factors of the entropy. A
    reference alone has the logits in float32, and their exponentials for the sum.
    """
    roles = set(roles)
    if not {"policy", "reference"} & roles:
        return 0
    n, prompt, answer = work.recipe.sampling.n, work.prompt_tokens, work.answer_tokens
    answers = tokens * n * answer // (prompt + n * answer)
    size = work.dtype_bytes
    each = 16 + size if "policy" in roles else (8 if size == 4 else size + 8)
    return min(CHUNK, answers) * work.shape.vocab * each


def gib(num_bytes: float) -> str:
    """`15.2 GiB`, `0.31 GiB`, `24 MiB`."""
    amount = num_bytes / GIB
    if 0 < amount < 0.095:
        return f"{num_bytes / MIB:.0f} MiB"
    return f"{amount:.1f} GiB" if amount >= 0.95 or amount == 0 else f"{amount:.2f} GiB"
