"""Keys of the stage `ppo`: the loop, its losses, and the pull back to the reference."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from configs.scores import ScoreSource
from configs.section import OptimizerConfig, Positive, Section, Share


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
    # How many updates an answer may be behind the policy that learns from it. 1: the next step's answers are written
    # while this one trains, so a step takes max(generate, train). It needs a generator with GPUs of its own.
    max_staleness: Annotated[int, Field(ge=0, le=1)] = 0
    epochs: Positive = 1
    num_minibatches: Positive = 1
    score: ScoreSource | dict[ScoreSource, float] = "reward"
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

    @property
    def score_sources(self) -> tuple[str, ...]:
        """What `score` names: `reward`, `rules`, addresses of servers."""
        return (self.score,) if isinstance(self.score, str) else tuple(self.score)

    @model_validator(mode="after")
    def _no_contradictions(self) -> Self:
        if self.advantage != "gae" and self.kl.where == "reward" and self.kl.beta > 0:
            raise ValueError(
                f"advantage={self.advantage} with kl.where=reward: the group methods take KL in the loss; "
                "set ppo.kl.where=loss or ppo.kl.beta=0"
            )
        if not self.score:
            raise ValueError("score={} weighs nothing; name rules, reward or a server, or several with their weights")
        if self.advantage != "gae" and self.value_init == "reward":
            raise ValueError(
                f"value_init=reward with advantage={self.advantage}: there is no critic to start; leave it at zero"
            )
        if self.advantage != "gae" and self.critic_warmup_steps:
            raise ValueError(
                f"critic_warmup_steps={self.critic_warmup_steps} with advantage={self.advantage}: there is no critic "
                "to warm up; set it to 0"
            )
        if self.max_staleness and self.is_clip is None:
            raise ValueError(
                f"max_staleness={self.max_staleness} with is_clip=null: answers of an older policy need "
                "importance weights; set ppo.is_clip (2.0), or max_staleness to 0"
            )
        if self.critic_warmup_steps >= self.num_steps:
            raise ValueError(
                f"critic_warmup_steps={self.critic_warmup_steps} leaves no step of num_steps={self.num_steps} to the "
                "policy"
            )
        return self
