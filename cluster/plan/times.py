"""A coarse estimate of how long a step of PPO takes, phase by phase. It ranks plans; it promises nothing.

Matrix work over the device's peak and memory traffic over its bandwidth, each by a share that is common in practice.
Answers are taken to be of full length, so a run whose answers end earlier is faster. Never compared with a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from cluster.placement import TRAINER, Role
from cluster.plan.engine_memory import token_bytes
from cluster.plan.model_memory import pass_tokens
from cluster.plan.work import BYTES, Layout, Work

# Assumptions: the share of a device's peak that is reached.
COMPUTE_SHARE = 0.4  # of the matrix peak, in forward and backward passes
BANDWIDTH_SHARE = 0.6  # of the memory's bandwidth, in decoding
LINK_SHARE = 0.6  # of a link's bandwidth
NODE_LINK = 25e9  # bytes per second of a GPU to another node: 200 Gbit/s of network for each
HOST_LINK = 20e9  # bytes per second between a GPU and its machine's memory
DECODE_STEP_S = 0.004  # what a decoding step takes besides: launches, sampling, the scheduler
HALF_SPEED_TOKENS = 512  # a pass of so many tokens reaches half of that share

ByRole = dict[Role, tuple[float, float]]  # seconds that a role scores, and that it updates

PHASES = ("generate", "score", "update", "hand over")


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of each phase of a step."""

    generate: float
    score: float
    update: float
    hand_over: float  # of a GPU that two groups share: weights to the machine's memory and back

    @property
    def step(self) -> float:
        """All phases, one after the other."""
        return self.generate + self.score + self.update + self.hand_over

    def by_phase(self) -> Mapping[str, float]:
        """Seconds by the names of PHASES."""
        return dict(zip(PHASES, (self.generate, self.score, self.update, self.hand_over), strict=True))


def estimate(work: Work, layout: Layout, cache: int, gpus_per_node: int) -> Times:
    """Seconds of a step. `cache`: bytes of the KV cache on each GPU of a generator."""
    trained = ByRole((role, role_times(work, layout, role, gpus_per_node)) for role in work.hosted)
    return combine(work, layout, trained, generate_time(work, layout, cache) if work.generates else 0.0)


def combine(work: Work, layout: Layout, by_role: ByRole, generate: float) -> Times:
    """The step of roles that score and update for so long: at the same time where each has a group of its own.

    The reward model goes first, since the ten are ranked by its scores.
    """
    if "policy" not in work.roles:
        update = _model_step(work, layout) if work.makes and not work.roles else 0.0
        return Times(generate, 0.0, update, 0.0)
    first = by_role["reward"][0] if "reward" in by_role and "reward" in work.recipe.ppo.score else 0.0
    others = [times for role, times in by_role.items() if role != "reward"]
    together = sum if layout.placement == "shared" else max
    moved = BYTES[work.engine_dtype] * work.shape.num_parameters
    both = layout.placement == "shared" and work.generates and not work.device.is_cpu
    return Times(
        generate,
        first + together(score for score, _ in others),
        together(update for _, update in others),
        2 * moved / HOST_LINK if both else 0.0,
    )


def _model_step(work: Work, layout: Layout) -> float:
    """Seconds of a step of `pretrain` or `sft`: six operations a parameter and token, eight with recomputation."""
    stage = work.makes[0]
    recipe = work.recipe
    pretrains = stage == "pretrain"
    tokens = (
        recipe.pretrain.batch_rows * recipe.pretrain.row_tokens
        if pretrains
        else recipe.sft.batch_texts * recipe.sft.max_text_tokens
    )
    times = 8 if layout.gradient_checkpointing else 6
    world = max(layout.workers.get(TRAINER, 1), 1)
    in_a_pass = pass_tokens(work, layout, stage)
    reached = COMPUTE_SHARE * in_a_pass / (in_a_pass + HALF_SPEED_TOKENS)
    operations = times * tokens * work.shape.num_parameters
    return operations / world / (work.device.flops(recipe.model.dtype) * reached)


def role_times(work: Work, layout: Layout, role: Role, gpus_per_node: int) -> tuple[float, float]:
    """Seconds that a role scores all answers of a step, and that it updates on them."""
    score = _pass(work, layout, role, gpus_per_node, backward=False)
    if role not in ("policy", "critic"):
        return score, 0.0
    return score, work.recipe.ppo.epochs * _pass(work, layout, role, gpus_per_node, backward=True)


def _pass(work: Work, layout: Layout, role: Role, gpus_per_node: int, *, backward: bool) -> float:
    """Seconds of one role's passes over all answers of a step, dealt over its workers.

    Two operations a parameter and token forward and four backward (Kaplan et al. 2020, arXiv:2001.08361, section 2.1),
    of which a frozen weight spares its own gradient, two; recomputation adds the forward pass once more.
    """
    shape, world = work.shape, layout.world(role)
    tokens = work.recipe.ppo.num_prompts * work.group_tokens(layout.micro_batch_tokens)
    times = (2 + layout.gradient_checkpointing) if backward else 1
    each = 2 * shape.matmul_parameters + 4 * shape.num_layers * shape.queries * work.context // 2
    operations = times * tokens * each
    if role in ("policy", "reference"):
        answers = work.num_answers * work.answer_tokens
        operations += (2 if backward else 1) * 2 * answers * shape.vocab * shape.hidden
    in_a_pass = work.pass_tokens(layout.micro_batch_tokens, world)
    reached = COMPUTE_SHARE * in_a_pass / (in_a_pass + HALF_SPEED_TOKENS)
    seconds = operations / world / (work.device.flops(work.recipe.model.dtype) * reached)
    if layout.zero_stage == 3 and world > 1:
        passes = math.ceil(tokens / world / in_a_pass)
        link = work.device.link if world <= gpus_per_node else min(NODE_LINK, work.device.link)
        seconds += times * passes * work.dtype_bytes * shape.num_parameters / (link * LINK_SHARE)
    return seconds


def generate_time(work: Work, layout: Layout, cache: int) -> float:
    """Prefill of the prompts, then decoding: each step reads the weights once and the keys and values of who runs.

    Answers are of full length here, so that those who find no room begin when all before them have ended.
    """
    shape, device, width = work.shape, work.device, layout.tensor_parallel
    recipe = work.recipe
    engines = layout.world("generator")
    answers = math.ceil(work.num_answers / engines)
    a_token = token_bytes(work, layout)
    tokens_each = work.answer_tokens + math.ceil(work.prompt_tokens / recipe.sampling.n)  # prompts are shared
    room = max(cache // max(a_token * tokens_each, 1), 1)
    running = min(answers, recipe.generator.max_running, room)
    matmul = shape.matmul_parameters + shape.vocab * shape.hidden
    flops = device.flops(work.engine_dtype) * COMPUTE_SHARE * width
    bandwidth = device.bandwidth * BANDWIDTH_SHARE * width
    prefill = 2 * shape.matmul_parameters * math.ceil(recipe.ppo.num_prompts / engines) * work.prompt_tokens / flops
    weights = BYTES[work.engine_dtype] * matmul / bandwidth
    seen = (work.prompt_tokens + work.answer_tokens / 2) * a_token * width / bandwidth

    def step(num: int) -> float:
        """Seconds in which each of so many answers gets a token."""
        return max(weights, 2 * matmul * num / flops) + num * seen + DECODE_STEP_S if num else 0.0

    full, rest = divmod(answers, running)
    return prefill + work.answer_tokens * (full * step(running) + step(rest))
