"""The loop: ten answers per prompt, scored and ranked, then one PPO update of policy and critic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from rlhf.data import PromptStream
from rlhf.errors import StoreError
from rlhf.judges import checked_scores, make_scorer
from rlhf.kl import KLController
from rlhf.phases import Phases
from rlhf.ports import Reference, Scorer
from rlhf.records import Adapter, AnswerGroup, RoleState, Rollout
from rlhf.rollout import make_rollout, needs_old_logprobs, needs_ref_logprobs, penalised_scores, rank_groups
from rlhf.stages.answers import Answers
from rlhf.stages.context import Context, StageLeft
from rlhf.stages.evaluate import InLoop
from rlhf.step_journal import StepJournal
from rlhf.sync import sync
from rlhf.together import together

CANARY_TOKENS = 32
COLUMNS = ("step", "prompt", "answer", "rank", "score", "advantage", "ended")  # of the table `completions`


def run(context: Context) -> dict[str, object]:
    """First and last metrics of the round's loop; the policy's adapter is then in the run store.

    Steps are counted through all rounds: policy, critic, optimizers, KL coefficient and the order of prompts go on from
    one to the next, with another reward model.
    """
    config, team, store = context.recipe.ppo, context.team, context.store
    end = context.ppo_steps.stop
    prepare(context)
    scorer = make_scorer(config.score, context.recipe, team)
    prompts = PromptStream(context.prompts.train, context.recipe.seed)
    controller, answers = KLController(config.kl), Answers(context, prompts)
    start = restore(context, prompts, controller, answers)
    in_loop, saving = InLoop(context), {}
    steps = store.steps("ppo")
    with answers, context.console.task("ppo", total=end - start, unit="steps") as task:
        for step in range(start, end):
            phase = Phases(task, store.events, "ppo", step)
            if config.max_staleness:
                with phase("wait_for_answers"):
                    answers.settle(step)  # the generator takes an adapter only while it does not write
            with phase("sync"):
                # Also at the first step of a resume, which so is no special case.
                adapter, metrics = hand_over(context)
            if config.evaluate_every and step % config.evaluate_every == 0:
                with phase("evaluate"):
                    metrics |= in_loop.measure(step)
            with phase("generate"):
                groups = answers.take(step, adapter)
            answers.ask_ahead(step + 1)  # as far as they may be stale: the one difference to a loop in turns
            with phase("score"):
                scored = score(context, scorer, groups, step, steps)
                rollout = experience(context, *scored, step, controller)
            with phase("update"):
                metrics |= update(context, rollout)
            controller.update(rollout.metrics.get("objective/kl", 0.0), len(rollout.scores))
            metrics |= dict(rollout.metrics) | {"objective/beta": rollout.beta}
            metrics |= answers.metrics | phase.metrics() | saving | team.stats()
            context.tracker.log("ppo", step + 1, metrics)
            context.tracker.table("ppo", step + 1, "completions", COLUMNS, table(context, rollout))
            is_last = step + 1 == end
            leaves = not is_last and context.is_to_leave()
            if (step + 1) % config.save_every == 0 or is_last or leaves:
                # After the metrics: a step that a checkpoint counts as done has its row.
                with phase("save"):
                    store.save_checkpoint("ppo", step + 1, states(context, answers), values(answers, controller))
            # What saving took of this step, and beside it, stands in the next step's row.
            saving = {"time/save": phase.seconds.get("save", 0.0), "time/save_beside": store.settle(wait=False)}
            task.advance(
                1, f"score {metrics['objective/scores']:+.2f}, length {metrics['completions/mean_length']:.0f}"
            )
            if leaves:
                store.settle()
                raise StageLeft
    store.settle()
    keep_policy(context)
    return results(context)


def keep_policy(context: Context) -> None:
    """Puts the policy into the run store: to be gone on from, and as an adapter that others load."""
    policy, store = context.team.policy, context.store
    store.save_role("policy", policy.state())
    store.save_adapter("policy", policy.adapter())
    if context.recipe.rounds > 1:
        store.save_adapter(f"policy-round-{context.round + 1}", policy.adapter())


def prepare(context: Context) -> None:
    """Starts the roles of the loop, so that the first step's times are those of a step."""
    config = context.recipe.ppo
    context.team.prepare(
        "generator",
        "policy",
        *(("critic",) if config.advantage == "gae" else ()),
        *(("reference",) if needs_ref_logprobs(config) else ()),
        *(("reward",) if context.recipe.uses_reward(("ppo",)) else ()),
    )


def hand_over(context: Context) -> tuple[Adapter, dict[str, float]]:
    """The policy's adapter as it is now, which the generator then holds, and `sync/*` metrics."""
    policy, generator = context.team.policy, context.team.generator
    adapter = policy.adapter()
    return adapter, sync(
        policy, generator, reference(context), canary(context), continues=context.continues, adapter=adapter
    )


def score(
    context: Context, scorer: Scorer, groups: list[AnswerGroup], step: int, steps: StepJournal
) -> tuple[list[AnswerGroup], torch.Tensor, int]:
    """(the groups kept, their raw scores [N], how many were dropped), committed.

    Groups whose score failed are dropped, if the recipe says so. Ranks follow from the scores alone.
    """
    found = steps.find(step, "score")
    if found is not None:
        kept = [groups[index] for index in found["kept"]]
        return kept, torch.tensor(found["scores"], dtype=torch.float32), len(groups) - len(kept)
    scores, kept, num_dropped = checked_scores(scorer, groups, context.recipe.on_bad_score)
    places = {group.prompt.id: index for index, group in enumerate(groups)}
    steps.add(step, "score", {"kept": [places[group.prompt.id] for group in kept], "scores": scores.tolist()})
    return kept, scores, num_dropped


def canary(context: Context) -> Sequence[int]:
    """Fixed tokens of a real prompt: enough to tell adapters apart, few enough to cost nothing."""
    return context.prompts.train[0].token_ids[:CANARY_TOKENS]


def reference(context: Context) -> Reference | None:
    """The reference, if the loop needs one anyway."""
    return context.team.reference if needs_ref_logprobs(context.recipe.ppo) else None


def experience(
    context: Context,
    groups: list[AnswerGroup],
    scores: torch.Tensor,
    num_dropped: int,
    step: int,
    controller: KLController,
) -> Rollout:
    """What the update learns from."""
    config, team = context.recipe.ppo, context.team
    old_logprobs, ref_logprobs, critic_values = together(
        lambda: team.policy.logprobs(groups) if needs_old_logprobs(config) else None,
        lambda: team.reference.logprobs(groups) if needs_ref_logprobs(config) else None,
        lambda: team.critic.values(groups) if config.advantage == "gae" else None,
    )
    return make_rollout(
        step,
        groups,
        scores=scores,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        values=critic_values,
        config=config,
        beta=controller.beta,
        extra_metrics={"completions/dropped_groups": float(num_dropped)},
    )


def update(context: Context, rollout: Rollout) -> dict[str, float]:
    """Metrics of policy and critic. In its warm-up the critic learns alone."""
    config, team, around = context.recipe.ppo, context.team, context.store.events.around

    def of_policy() -> dict[str, float]:
        if rollout.step < config.critic_warmup_steps:
            return {}
        with around("ppo", rollout.step, "update policy"):
            return team.policy.update(rollout)

    def of_critic() -> dict[str, float]:
        if config.advantage != "gae":
            return {}
        with around("ppo", rollout.step, "update critic"):
            return team.critic.update(rollout)

    policy_metrics, critic_metrics = together(of_policy, of_critic)
    return policy_metrics | critic_metrics


def restore(context: Context, prompts: PromptStream, controller: KLController, answers: Answers) -> int:
    """The step to go on with, every role as it was; at the beginning, reward model and critic get their start."""
    config, team, store = context.recipe.ppo, context.team, context.store
    reward: RoleState | None = None
    if context.recipe.uses_reward(("ppo",)):
        reward = context.load_reward(f"ppo.score={config.score}, evaluate.judge={context.recipe.evaluate.judge}")
    elif config.value_init == "reward":
        reward = store.load_role("reward")
        if reward is None:
            raise StoreError(
                "ppo.value_init=reward: the run has no reward model.",
                remedy="Run the stages `sample`, `rank` and `reward` first, or set value_init=zero.",
            )
    found = store.load_checkpoint("ppo")
    began = context.ppo_steps.start
    if found is None and not began:
        if reward is not None and config.value_init == "reward":
            team.critic.start_from(reward)
        store.cut_metrics("ppo", 0)
        return 0
    if found is None or found[0] < began:
        raise StoreError(
            f"ppo of round {context.round + 1} goes on from step {began}, and the newest whole checkpoint is of step "
            f"{found[0] if found else 0}.",
            limit="The steps between were made with the reward model of an earlier round.",
            remedy="Bring the checkpoint back from the mirror or a copy, or start a run with another name.",
        )
    step, saved, plain = found
    if config.advantage == "gae" and "critic" not in saved:
        raise StoreError(
            f"ppo.advantage=gae: the checkpoint of step {step} has no critic.",
            limit="It was made with group advantages.",
            remedy="Go on with those, or start a run with another name.",
        )
    team.policy.load_state(saved["policy"])
    if config.advantage == "gae":
        team.critic.load_state(saved["critic"])
    prompts.load_state(_mapping(plain["prompts"]))
    if step > began or not context.round:
        answers.load_state(saved)  # but a round begins with answers of the policy as it is
    controller.load_state(_mapping(plain["kl"]))
    store.cut_metrics("ppo", step)
    context.console.say(f"ppo: going on from the checkpoint of step {step}")
    return step


def states(context: Context, answers: Answers) -> dict[str, RoleState]:
    """The trained roles, by name, and where answers may be stale the adapter that writes the next ones."""
    roles = {"policy": context.team.policy.state()}
    if context.recipe.ppo.advantage == "gae":
        roles["critic"] = context.team.critic.state()
    return roles | answers.state()


def values(answers: Answers, controller: KLController) -> dict[str, object]:
    """What else shapes the future: data position and KL coefficient. Seeds are hashes of the step, so need no state."""
    return {"prompts": answers.position, "kl": controller.state()}


def table(context: Context, rollout: Rollout) -> list[list[object]]:
    """Rows of the `completions` table: the first groups of the step, best answer first; ties share a rank.

    The rank is the one that is trained on, after the penalty; the score is raw; the advantage a mean over tokens.
    """
    rows: list[list[object]] = []
    first = 0
    tiers = rank_groups(rollout.groups, penalised_scores(rollout.groups, rollout.scores, context.recipe.ppo))
    mean_advantages = (rollout.advantages * rollout.mask).sum(1) / rollout.mask.sum(1)
    shown = context.recipe.tracker.table_groups
    for group, ranked in zip(rollout.groups[:shown], tiers[:shown], strict=True):
        for rank, tier in enumerate(ranked, 1):
            for index in tier:
                one, flat = group.answers[index], first + index
                figures = [rank, float(rollout.scores[flat]), float(mean_advantages[flat])]
                rows.append([rollout.step + 1, group.prompt.text, one.text, *figures, one.ended])
        first += len(group.answers)
    return rows


def results(context: Context) -> dict[str, object]:
    """What the summary shows, from the metrics of the round's steps, also those before a resume."""
    began = context.ppo_steps.start
    steps = [row for row in context.store.metrics("ppo") if "objective/scores" in row and row["step"] > began]
    # Of the sync, and what no step waited for.
    parts = ("time/sync_check", "time/sync_load", "time/save_beside", "time/generate_beside")
    names = {key for row in steps for key in row if key.startswith("time/") and key not in parts}
    total = {key: sum(row.get(key, 0.0) for row in steps) for key in names}
    of_steps = total["time/step"] - total.get("time/evaluate", 0.0)
    gaps = [row for row in steps if "sampling/logp_difference_mean" in row]
    ages = [row["sampling/staleness"] for row in steps if "sampling/staleness" in row]
    return {
        "num_steps": len(steps),
        "first": steps[0],
        "last": steps[-1],
        "gap_mean": sum(row["sampling/logp_difference_mean"] for row in gaps) / max(len(gaps), 1),
        "gap_max": max((row["sampling/logp_difference_max"] for row in gaps), default=0.0),
        "sync_share": total["time/sync"] / of_steps,
        "save_share": total.get("time/save", 0.0) / of_steps,
        **({"staleness": sum(ages) / len(ages)} if ages else {}),
        "times": {key.removeprefix("time/"): value for key, value in total.items()},
    }


def _mapping(value: object) -> Mapping[str, object]:
    assert isinstance(value, Mapping)
    return value
