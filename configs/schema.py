"""The recipe: every key there is, with its default, unit and limit. Unknown keys are refused."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from configs.desk import MOST_RANKED, DeskConfig
from configs.model_stages import PretrainConfig, SFTConfig
from configs.ppo import PPOConfig
from configs.scores import ScoreServerConfig, ScoreSource, is_address
from configs.section import Amount, Dtype, Name, OptimizerConfig, Positive, Section, Share

Stage = Literal["pretrain", "sft", "sample", "rank", "reward", "ppo", "evaluate"]
STAGES: tuple[Stage, ...] = ("pretrain", "sft", "sample", "rank", "reward", "ppo", "evaluate")
REPEATED: tuple[Stage, ...] = STAGES[2:6]  # in each of `rounds`
MODEL_STAGES: tuple[Stage, ...] = STAGES[:2]  # they make the model that the others stand on
GroupName = Literal["trainer", "policy", "critic", "reward", "reference", "generator"]
ALIGNMENT: tuple[Stage, ...] = STAGES[2:]


class ModelConfig(Section):
    """The base: a folder in Hugging Face layout, or what the stage `pretrain` makes."""

    path: str = ""
    dtype: Dtype = "bfloat16"


class LoraConfig(Section):
    """Adapters of policy, critic and reward. There is no dropout: it would make the ratio differ from 1."""

    rank: Positive = 16
    alpha: Annotated[float, Field(gt=0)] = 32
    targets: Annotated[tuple[str, ...], Field(min_length=1)] | Literal["all-linear"] = "all-linear"


class LearnerConfig(Section):
    """How a forward and backward pass is cut up. None of it changes a result."""

    rows: Literal["auto", "shared", "separate"] = "auto"
    micro_batch_tokens: Positive = 2048
    gradient_checkpointing: bool = False
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 0


class DataConfig(Section):
    """Prompts, split once by hash into train and held-out."""

    # JSONL or Parquet files (globs allowed), "hub:owner/name/files" or "chatterbot:coding,trivia"
    prompts: str | tuple[str, ...] = ()
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
    params: dict[str, Any] = Field(default_factory=dict[str, Any])


class SampleConfig(Section):
    """Answers for the rankings."""

    num_prompts: Positive | None = None  # None: all of the train split
    prompts_per_request: Positive = 16  # committed to the run store after so many


class RankConfig(Section):
    """Who says which answers are better."""

    judge: Literal["rules", "reward", "people"] = "rules"
    tie_margin: Annotated[float, Field(ge=0)] = 0.0  # scores nearer than this are a tie


class RewardConfig(Section):
    """The reward model, trained on rankings."""

    loss: Literal["plackett_luce", "all_pairs"] = "plackett_luce"
    rankings: str | None = None  # a JSONL file of people's rankings, learned beside the run's own or without any
    epochs: Positive = 1
    groups_per_batch: Positive = 8
    held_out: Share = 0.2  # of the ranked groups, for accuracy and Kendall's tau
    newest_weight: Positive = 1  # how often an epoch holds groups of the newest round; those of earlier ones: once
    save_every: Positive = 20  # batches
    optimizer: OptimizerConfig = OptimizerConfig()


class EvaluateConfig(Section):
    """Before and after, on held-out prompts."""

    judge: ScoreSource = "rules"
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
    # Before a run begins, what the recipe leaves open of memory and placement is chosen to fit the GPUs, and what
    # cannot fit is refused. false: everything is taken as it is written here.
    plan: bool = True
    workers: dict[GroupName, Positive] = Field(default_factory=dict[GroupName, int])
    cpus_per_worker: Annotated[float, Field(gt=0)] = 0.25  # what Ray counts
    threads: Positive | None = None  # what torch uses, per worker; None: the cores of the machine
    # What else each worker of a group takes of its node, so that the group goes where that is: {generator: {L40S: 1}}
    resources: dict[GroupName, dict[str, Amount]] = Field(default_factory=dict[GroupName, dict[str, float]])
    strategy: Literal["pack", "spread"] = "pack"  # workers on as few nodes as can be, or on as many
    autoscale: bool = False  # the cluster at `address` starts nodes when it is asked: what it lacks now is waited for
    wait_s: Positive = 300  # for resources and for an actor to start
    call_s: Positive = 3600  # for one call
    max_failures: Annotated[int, Field(ge=0)] = 3  # how often lost workers are started again, with no progress between

    @model_validator(mode="after")
    def _resources_agree(self) -> Self:
        for name, wanted in self.resources.items():
            for kind in wanted:
                if kind.upper() in ("CPU", "GPU", "MEMORY", "OBJECT_STORE_MEMORY"):
                    raise ValueError(
                        f"resources.{name}.{kind}: name a custom resource of the nodes; CPUs are cpus_per_worker, GPUs "
                        "follow from placement"
                    )
        if self.autoscale and self.address is None:
            raise ValueError("autoscale without address: a Ray of our own has this machine only; set address")
        if self.autoscale and self.gpus == "auto":
            raise ValueError(
                "autoscale with gpus=auto: it is not known how many GPUs will come; set gpus to a number (0 for none)"
            )
        return self


class TrackerConfig(Section):
    """Weights & Biases. Without WANDB_API_KEY the run is kept offline."""

    project: str = "tenfold"
    entity: str | None = None
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    table_groups: Annotated[int, Field(ge=0)] = 2  # groups of the `completions` table per step


class Recipe(Section):
    """One run, from raw text or a model on the disk to a judged policy."""

    name: Name
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    runs: str = "runs"  # the folder of run folders
    stages: tuple[Stage, ...] = ALIGNMENT
    rounds: Positive = 1  # of sample, rank, reward and ppo (so many steps in each), from the newest policy
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    sampling: SamplingConfig = SamplingConfig()
    lora: LoraConfig = LoraConfig()
    adapter: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] | None = None  # that sft and ppo train
    adapter_from: str | None = None  # a PEFT folder that it starts from
    learner: LearnerConfig = LearnerConfig()
    generator: GeneratorConfig = GeneratorConfig()
    rules: tuple[RuleConfig, ...] = ()
    on_bad_score: Literal["stop", "retry", "drop"] = (
        "stop"  # a rule that raises, a server that fails, a score not finite
    )
    pretrain: PretrainConfig = PretrainConfig()
    sft: SFTConfig = SFTConfig()
    score_server: ScoreServerConfig = ScoreServerConfig()
    sample: SampleConfig = SampleConfig()
    rank: RankConfig = RankConfig()
    desk: DeskConfig = DeskConfig()
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
            or ("ppo" in stages and ("reward" in self.ppo.score_sources or judged_in_loop))
            or ("evaluate" in stages and self.evaluate.judge == "reward")
        )

    def asks_prompts(self, stages: Collection[Stage]) -> bool:
        """Whether any of these stages works on prompts of its own: a reward model of a file's rankings needs none."""
        alone = self.reward.rankings is not None and "reward" in stages
        return any(stage in stages for stage in ALIGNMENT if not (alone and stage == "reward"))

    def score_servers(self, stages: Collection[Stage]) -> tuple[str, ...]:
        """The addresses of the servers that any of these stages asks for scores."""
        judges = "evaluate" in stages or ("ppo" in stages and self.ppo.evaluate_every is not None)
        sources = (*(self.ppo.score_sources if "ppo" in stages else ()), *((self.evaluate.judge,) if judges else ()))
        return tuple(dict.fromkeys(source for source in sources if is_address(source)))

    def _missing(self) -> Iterator[str]:
        """What the recipe's own stages lack, in words."""
        makes_model = "pretrain" in self.stages and self.pretrain.sizes is not None
        if not self.model.path and not makes_model:
            yield (
                "model.path is missing: name a folder in Hugging Face layout, or let the stage `pretrain` make a model "
                "from pretrain.sizes"
            )
        if self.model.path and makes_model:
            yield (
                f"model.path={self.model.path} and pretrain.sizes are two models to start from: leave out model.path "
                "to train from nothing, or pretrain.sizes to go on with that model"
            )
        if "pretrain" in self.stages and not self.pretrain.sources:
            yield "pretrain.sources is missing: name files of raw text, such as `- path: corpus/*.jsonl`"
        if "sft" in self.stages and not self.sft.sources:
            yield "sft.sources is missing: name files of conversations, such as `- path: pairs.jsonl`"
        if self.data.prompts in ((), "") and self.asks_prompts(self.stages):
            yield 'data.prompts is missing: name a file of prompts, one row {"prompt": ...} a line'
        if self.pretrain.sizes and self.pretrain.row_tokens > self.pretrain.sizes.context_tokens:
            yield (
                f"pretrain.row_tokens={self.pretrain.row_tokens} is more than pretrain.sizes.context_tokens="
                f"{self.pretrain.sizes.context_tokens}"
            )
        if self.rounds > 1 and (lacking := [stage for stage in REPEATED if stage not in self.stages]):
            yield f"rounds={self.rounds} repeats {', '.join(REPEATED)}: stages lacks {', '.join(lacking)}"
        if self.adapter_from and "sft" in self.stages and not self.adapter:
            yield (
                f"adapter_from={self.adapter_from} without adapter: sft would merge it, and ppo add it once more; "
                "name the adapter that is continued (adapter: NAME)"
            )
        if self.adapter and self.sft.train == "full" and "sft" in self.stages:
            yield f"adapter={self.adapter} with sft.train=full: a named adapter is LoRA; set sft.train=lora"
        if self.adapter in ("base", "sft", "policy", "reward", "critic", "reference"):
            yield f"adapter={self.adapter}: that name is taken for a model of the run; choose another"

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        wants_rules = [
            key
            for key, value in (
                ("rank.judge", (self.rank.judge,) if "rank" in self.stages else ()),
                ("ppo.score", self.ppo.score_sources if "ppo" in self.stages else ()),
                ("evaluate.judge", (self.evaluate.judge,) if "evaluate" in self.stages else ()),
            )
            if "rules" in value
        ]
        if wants_rules and not self.rules:
            raise ValueError(f"{', '.join(wants_rules)}: rules, but the recipe lists no rules; add a `rules:` section")
        if problems := list(self._missing()):
            raise ValueError("; ".join(problems))
        if self.rank.judge == "people" and self.sampling.n > MOST_RANKED:
            raise ValueError(f"rank.judge=people with sampling.n={self.sampling.n}: people rank at most {MOST_RANKED}")
        aligns = any(stage in ALIGNMENT for stage in self.stages)
        if aligns and self.cluster.placement == "shared" and self.learner.zero_stage == 3:
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
