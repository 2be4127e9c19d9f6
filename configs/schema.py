"""The recipe: every key there is, with its default, unit and limit. Unknown keys are refused."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Stage = Literal["sample", "rank", "reward", "ppo", "evaluate"]
STAGES: tuple[Stage, ...] = ("sample", "rank", "reward", "ppo", "evaluate")
Dtype = Literal["float32", "bfloat16"]
Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A part of a recipe: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class ModelConfig(Section):
    """The base: a folder in Hugging Face layout."""

    path: str
    dtype: Dtype = "bfloat16"


class LoraConfig(Section):
    """Adapters of policy, critic and reward. There is no dropout: it would make the ratio differ from 1."""

    rank: Positive = 16
    alpha: Annotated[float, Field(gt=0)] = 32
    targets: tuple[str, ...] | Literal["all-linear"] = "all-linear"


class OptimizerConfig(Section):
    """AdamW, with a linear warm-up and then a constant rate or, where the number of steps is known, a cosine."""

    lr: Annotated[float, Field(gt=0)] = 1e-4
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    schedule: Literal["constant", "cosine"] = "constant"
    min_lr_share: Share = 0.1  # of lr, where a cosine ends


class LearnerConfig(Section):
    """How a forward and backward pass is cut up. None of it changes a result."""

    rows: Literal["auto", "shared", "separate"] = "auto"
    micro_batch_tokens: Positive = 2048
    gradient_checkpointing: bool = False
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 0


class DataConfig(Section):
    """Prompts, split once by hash into train and held-out."""

    prompts: str | tuple[str, ...]  # JSONL or Parquet files (globs allowed), or "chatterbot:coding,trivia"
    system: str | None = None  # a system message put before each prompt that has none
    held_out: Share = 0.2
    limit: Positive | None = None  # use at most so many prompts
    max_prompt_tokens: Positive = 512


class SamplingConfig(Section):
    """How the ten answers are drawn, in every stage."""

    n: Annotated[int, Field(ge=2)] = 10
    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    max_answer_tokens: Positive = 256

    @model_validator(mode="after")
    def _whole_distribution(self) -> Self:
        if self.top_p < 1 or self.top_k > 0:
            raise ValueError(
                f"top_p={self.top_p}, top_k={self.top_k}: training samples from the whole distribution, since a cut "
                "one makes the probability ratio of PPO wrong; leave top_p at 1 and top_k at 0"
            )
        return self


class GeneratorConfig(Section):
    """The vLLM engine."""

    dtype: Dtype | None = None  # None: as the model
    tensor_parallel: Positive = 1
    kv_cache_gib: Annotated[float, Field(gt=0)] | None = None  # None on a GPU: gpu_memory_share decides
    gpu_memory_share: Share = 0.4
    max_running: Positive = 256  # answers that are decoded at the same time
    block_tokens: Positive = 32  # KV block: answers share a prompt in whole blocks
    enforce_eager: bool = False


class RuleConfig(Section):
    """One rule reward: a registered name or a dotted path, its weight and its parameters."""

    name: str
    weight: float = 1.0
    params: dict[str, Any] = {}


class SampleConfig(Section):
    """Answers for the rankings."""

    num_prompts: Positive | None = None  # None: all of the train split
    prompts_per_request: Positive = 16  # committed to the run store after so many


class RankConfig(Section):
    """Who says which answers are better."""

    judge: Literal["rules", "reward"] = "rules"
    tie_margin: Annotated[float, Field(ge=0)] = 0.0  # scores nearer than this are a tie


class RewardConfig(Section):
    """The reward model, trained on rankings."""

    loss: Literal["plackett_luce", "all_pairs"] = "plackett_luce"
    epochs: Positive = 1
    groups_per_batch: Positive = 8
    held_out: Share = 0.2  # of the ranked groups, for accuracy and Kendall's tau
    save_every: Positive = 20  # batches
    optimizer: OptimizerConfig = OptimizerConfig()


class KLConfig(Section):
    """The pull back to the reference."""

    beta: Annotated[float, Field(ge=0)] = 0.05
    estimator: Literal["k1", "k2", "k3"] = "k1"
    where: Literal["reward", "loss"] = "reward"
    adaptive: bool = False
    target: Annotated[float, Field(gt=0)] = 6.0  # nats per answer
    horizon: Positive = 10_000  # answers

    @model_validator(mode="after")
    def _can_adapt(self) -> Self:
        if self.adaptive and self.beta == 0:
            raise ValueError("adaptive=true with beta=0: beta is multiplied, so it would stay 0; start it above 0")
        return self


class TrainOn(Section):
    """Which of the ten are trained on: the best k and the worst k by rank."""

    best: Annotated[int, Field(ge=0)]
    worst: Annotated[int, Field(ge=0)]

    @model_validator(mode="after")
    def _selects_something(self) -> Self:
        if self.best + self.worst == 0:
            raise ValueError(
                "best=0 and worst=0 leave nothing to train on; raise one of them, or leave train_on out for all"
            )
        return self


class PPOConfig(Section):
    """The loop."""

    num_steps: Positive = 100
    num_prompts: Positive = 16  # per step; ten answers each
    epochs: Positive = 1
    num_minibatches: Positive = 1
    score: Literal["reward", "rules"] | dict[Literal["reward", "rules"], float] = "reward"
    reward_from: Literal["score", "rank"] = "score"
    kl: KLConfig = KLConfig()
    advantage: Literal["gae", "group", "group_loo"] = "gae"
    scale: Literal["std", "none"] = "std"  # of `group`
    gamma: Share = 1.0
    lam: Share = 0.95
    whiten: bool = True  # of `gae`
    clip_low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    clip_high: Annotated[float, Field(gt=0)] = 0.2
    value_clip: Annotated[float, Field(gt=0)] | None = 0.2
    value_init: Literal["zero", "reward"] = "zero"
    is_clip: Annotated[float, Field(ge=1)] | None = 2.0  # truncation of the trainer-engine ratio; None: no correction
    target_kl: Annotated[float, Field(gt=0)] | None = None
    missing_eos: Literal["none", "penalty"] = "none"
    missing_eos_penalty: Annotated[float, Field(ge=0)] = 1.0  # taken off the score of an answer cut by length
    train_on: TrainOn | None = None  # None: all
    critic_warmup_steps: Annotated[int, Field(ge=0)] = 0  # steps in which the critic alone is trained
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-5)
    critic_optimizer: OptimizerConfig = OptimizerConfig(lr=5e-5)
    evaluate_every: Positive | None = None
    evaluate_prompts: Positive = 16
    save_every: Positive = 10  # steps

    @model_validator(mode="after")
    def _no_contradictions(self) -> Self:
        if self.advantage != "gae" and self.kl.where == "reward" and self.kl.beta > 0:
            raise ValueError(
                f"advantage={self.advantage} with kl.where=reward: the group methods take KL in the loss; "
                "set ppo.kl.where=loss or ppo.kl.beta=0"
            )
        if not self.score:
            raise ValueError("score={} weighs nothing; name rules, reward, or both with their weights")
        if self.advantage != "gae" and self.value_init == "reward":
            raise ValueError(
                f"value_init=reward with advantage={self.advantage}: there is no critic to start; leave it at zero"
            )
        if self.advantage != "gae" and self.critic_warmup_steps:
            raise ValueError(
                f"critic_warmup_steps={self.critic_warmup_steps} with advantage={self.advantage}: there is no critic "
                "to warm up; set it to 0"
            )
        if self.critic_warmup_steps >= self.num_steps:
            raise ValueError(
                f"critic_warmup_steps={self.critic_warmup_steps} leaves no step of num_steps={self.num_steps} to the "
                "policy"
            )
        return self


class EvaluateConfig(Section):
    """Before and after, on held-out prompts."""

    judge: Literal["rules", "reward"] = "rules"
    num_prompts: Positive = 64
    text: str | None = None  # a text file for bits per byte: what was lost
    text_tokens: Positive = 8192
    bootstrap: Positive = 2000


class CheckpointsConfig(Section):
    """What is kept of a training stage's checkpoints, and where a copy goes."""

    keep: Positive = 2  # the newest of each stage
    keep_every: Positive | None = None  # and those whose step is a multiple of this, for good
    mirror: str | None = None  # a folder (NFS, say) or an fsspec URL such as s3://bucket/runs

    @model_validator(mode="after")
    def _no_secret(self) -> Self:
        if self.mirror and re.search(r"://[^/]*@", self.mirror):
            raise ValueError(
                "mirror holds a user or password, and a recipe is kept in the run folder; give them in the environment "
                "(AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, ...) and leave them out of the URL"
            )
        return self


class ClusterConfig(Section):
    """Where the groups go."""

    address: str | None = None  # None: a Ray of our own, on this machine
    placement: Literal["shared", "separate"] = "shared"
    gpus: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    workers: dict[Literal["trainer", "policy", "critic", "reward", "reference", "generator"], Positive] = {}
    cpus_per_worker: Annotated[float, Field(gt=0)] = 0.25  # what Ray counts
    threads: Positive | None = None  # what torch uses, per worker; None: the cores of the machine
    wait_s: Positive = 300  # for resources and for an actor to start
    call_s: Positive = 3600  # for one call


class TrackerConfig(Section):
    """Weights & Biases. Without WANDB_API_KEY the run is kept offline."""

    project: str = "tenfold"
    entity: str | None = None
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    table_groups: Annotated[int, Field(ge=0)] = 2  # groups of the `completions` table per step


class Recipe(Section):
    """One run, from prompts to a judged policy."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    runs: str = "runs"  # the folder of run folders
    stages: tuple[Stage, ...] = STAGES
    model: ModelConfig
    data: DataConfig
    sampling: SamplingConfig = SamplingConfig()
    lora: LoraConfig = LoraConfig()
    learner: LearnerConfig = LearnerConfig()
    generator: GeneratorConfig = GeneratorConfig()
    rules: tuple[RuleConfig, ...] = ()
    on_bad_score: Literal["stop", "retry", "drop"] = "stop"  # a rule that raises, a score that is not finite
    sample: SampleConfig = SampleConfig()
    rank: RankConfig = RankConfig()
    reward: RewardConfig = RewardConfig()
    ppo: PPOConfig = PPOConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    checkpoints: CheckpointsConfig = CheckpointsConfig()
    cluster: ClusterConfig = ClusterConfig()
    tracker: TrackerConfig = TrackerConfig()

    def uses_reward(self, stages: Collection[Stage]) -> bool:
        """Whether any of these stages asks for the reward model."""
        judged_in_loop = self.ppo.evaluate_every is not None and self.evaluate.judge == "reward"
        return (
            "reward" in stages
            or ("rank" in stages and self.rank.judge == "reward")
            or ("ppo" in stages and ("reward" in self.ppo.score or judged_in_loop))
            or ("evaluate" in stages and self.evaluate.judge == "reward")
        )

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        wants_rules = [
            key
            for key, value in (
                ("rank.judge", self.rank.judge if "rank" in self.stages else ""),
                ("ppo.score", self.ppo.score if "ppo" in self.stages else ""),
                ("evaluate.judge", self.evaluate.judge if "evaluate" in self.stages else ""),
            )
            if "rules" in value
        ]
        if wants_rules and not self.rules:
            raise ValueError(f"{', '.join(wants_rules)}: rules, but the recipe lists no rules; add a `rules:` section")
        if self.cluster.placement == "shared" and self.learner.zero_stage == 3:
            raise ValueError(
                "learner.zero_stage=3 with cluster.placement=shared: roles that share a base use ZeRO 0 to 2; "
                "set cluster.placement=separate or learner.zero_stage=2"
            )
        if self.ppo.train_on and self.ppo.train_on.best + self.ppo.train_on.worst > self.sampling.n:
            raise ValueError(
                f"ppo.train_on takes {self.ppo.train_on.best} + {self.ppo.train_on.worst} of "
                f"sampling.n={self.sampling.n} answers"
            )
        return self
