"""From the scores of a rollout to what the losses read: advantages and returns, and what is logged about them.

Rows without a total take no part. A constraint takes its component out of the score and gives it a value, a return and
an advantage of its own, which the multiplier then weighs in.

B answers, R answer positions.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from plumbline.align.rl.advantages import gae, group_advantages, token_rewards, whiten
from plumbline.align.rl.kl_control import kl_estimate
from plumbline.align.rl.lagrangian import Lagrangian
from plumbline.align.rl.rollouts import RolloutBatch
from plumbline.align.rl.settings import PPOSettings
from plumbline.reward import Parts, Reward


@dataclass(frozen=True, kw_only=True)
class Signals:
    """What a rollout teaches: keep, advantage (B, R); returns (B, R), or (B, R, 2) under a constraint; metrics."""

    keep: Tensor
    advantage: Tensor
    returns: Tensor
    measured: dict[str, float]


def signals(
    batch: RolloutBatch,
    reward: Reward,
    *,
    settings: PPOSettings,
    weights: Mapping[str, float],
    kl_coef: float,
    lagrangian: Lagrangian | None,
    all_reduce: Callable[[Tensor], Tensor],
) -> Signals:
    """Token rewards, advantages and returns. Advantages are whitened over all ranks, but for grpo and rloo.

    `weights` are those of the reward's components, `kl_coef` the charge of this step.
    """
    s = settings
    score, scored = scores(batch, reward, settings)
    keep = batch.keep & scored[:, None]
    kl = kl_estimate(batch.old_logp, batch.ref_logp, s.kl_estimator).masked_fill(~keep, 0.0)
    charge = kl_coef if s.kl_in == "reward" else 0.0
    rewards = token_rewards(score, kl, keep, kl_coef=charge)
    extra: dict[str, Tensor] = {}
    if not s.has_critic:
        answer = _against_group(reward, rewards, score, batch, scored, settings, weights)
        advantage = answer[:, None].expand(keep.shape).masked_fill(~keep, 0.0)
        if s.advantage == "gdpo":
            advantage = whiten(advantage, keep, all_reduce=all_reduce)
        returns = rewards.flip(1).cumsum(1).flip(1).masked_fill(~keep, 0.0)
    elif lagrangian is None:
        plain, returns = gae(rewards, batch.old_value, keep, gamma=s.gamma, lam=s.lam)
        advantage = whiten(plain, keep, all_reduce=all_reduce)
    else:
        cost, raw_cost = costs(reward, scored, str(s.cost_component), weights)
        # the KL is charged to both, so that combined it counts once, whatever the multiplier
        token_costs = token_rewards(cost, kl, keep, kl_coef=-charge)
        plain, returns = gae(rewards, batch.old_value[..., 0], keep, gamma=s.gamma, lam=s.lam)
        cost_plain, cost_returns = gae(token_costs, batch.old_value[..., 1], keep, gamma=s.gamma, lam=s.lam)
        advantage = whiten(lagrangian.combine(plain, cost_plain), keep, all_reduce=all_reduce)
        returns = torch.stack([returns, cost_returns], dim=-1)
        extra = {"cost": raw_cost.sum()}
    sums = {**_sums(batch, rewards, score, scored, keep, advantage, returns), **extra}
    flat = torch.stack([value.to(keep.device, torch.float64) for value in sums.values()])
    totals = dict(zip(sums, all_reduce(flat).tolist(), strict=True))
    measured = _measured(totals) | {"rollout/answer_tokens_max": float(batch.keep.sum(dim=1).max())}
    if not s.has_critic:
        measured.pop("val/explained_variance")
    if lagrangian is not None:
        measured["lagrangian/cost"] = totals["cost"] / max(totals["scored"], 1.0)
        measured["lagrangian/multiplier"] = lagrangian.value
    return Signals(keep=keep, advantage=advantage, returns=returns, measured=measured)


def scores(batch: RolloutBatch, reward: Reward, settings: PPOSettings) -> tuple[Tensor, Tensor]:
    """(score, whether there is one), each (B,). A row counts only with a total and, under a constraint, with a cost."""
    s, device = settings, batch.keep.device
    total = list(reward.total)
    if s.cost_component:
        charged = reward.parts.weighted[s.cost_component]
        total = [None if t is None or c is None else t - c for t, c in zip(total, charged, strict=True)]
    scored = torch.tensor([t is not None for t in total], device=device)
    score = torch.tensor([t if t is not None else 0.0 for t in total], device=device)
    # an answer that never ended is charged before the clip, and its tokens still count
    score = (score - s.missing_eos_penalty * (~batch.finished)).clamp(-s.score_clip, s.score_clip)
    return score.masked_fill(~scored, 0.0), scored


def costs(reward: Reward, scored: Tensor, component: str, weights: Mapping[str, float]) -> tuple[Tensor, Tensor]:
    """(scaled as the other parts are, raw) costs, each (B,), 0 where not scored.

    The cost is the component's score where its weight is negative (more is worse), else the negated score.
    """
    sign = 1.0 if weights[component] < 0 else -1.0
    parts = (reward.parts.scaled[component], reward.parts.raw[component])
    scaled, raw = (torch.tensor([0.0 if c is None else sign * c for c in part], device=scored.device) for part in parts)
    return scaled.masked_fill(~scored, 0.0), raw.masked_fill(~scored, 0.0)


def _against_group(
    reward: Reward,
    rewards: Tensor,
    score: Tensor,
    batch: RolloutBatch,
    scored: Tensor,
    settings: PPOSettings,
    weights: Mapping[str, float],
) -> Tensor:
    """How much better each whole answer is than the others to its prompt, (B,).

    gdpo compares each part of the reward on its own before it is weighted, so that no part drowns another; its sum is
    whitened over the rollout afterwards (arXiv:2601.05242).
    """
    s = settings
    if s.advantage != "gdpo":
        return group_advantages(rewards.sum(dim=1), scored, s.answers_per_prompt, kind=s.advantage)
    kl_charge = rewards.sum(dim=1) - score
    answer = (kl_charge - s.missing_eos_penalty * (~batch.finished)).masked_fill(~scored, 0.0)
    for name, part in reward.parts.scaled.items():
        known = scored & torch.tensor([c is not None for c in part], device=scored.device)
        value = torch.tensor([0.0 if c is None else c for c in part], device=scored.device)
        answer = answer + weights[name] * group_advantages(value, known, s.answers_per_prompt, kind="grpo")
    return answer


def _sums(
    batch: RolloutBatch,
    rewards: Tensor,
    score: Tensor,
    scored: Tensor,
    keep: Tensor,
    advantage: Tensor,
    returns: Tensor,
) -> dict[str, Tensor]:
    """What each rank adds to the metrics."""
    kl_B = kl_estimate(batch.old_logp, batch.ref_logp, "k1").masked_fill(~batch.keep, 0.0).sum(dim=1)
    of_reward = returns.dim() == 3  # the first of two values is the reward's
    return_N = (returns[..., 0] if of_reward else returns)[keep].double()
    value_N = (batch.old_value[..., 0] if of_reward else batch.old_value)[keep].double()
    return {
        "answers": torch.tensor(len(batch)),
        "scored": scored.sum(),
        "kl": kl_B.sum(),
        "score": score.sum(),
        "reward": rewards.sum(),
        "finished": batch.finished.sum(),
        "tokens": batch.keep.sum(),
        "mismatch": (batch.old_logp - batch.sample_logp).abs().masked_fill(~batch.keep, 0.0).sum(),
        "kept": keep.sum(),
        "return": return_N.sum(),
        "return_squared": return_N.square().sum(),
        "advantage": advantage[keep].double().sum(),
        "advantage_squared": advantage[keep].double().square().sum(),
        "unexplained": (return_N - value_N).sum(),
        "unexplained_squared": (return_N - value_N).square().sum(),
    }


def _measured(totals: dict[str, float]) -> dict[str, float]:
    """Metrics from sums over all ranks."""
    answers, num_scored = totals["answers"], max(totals["scored"], 1.0)
    tokens, kept = max(totals["tokens"], 1.0), max(totals["kept"], 1.0)
    variance = totals["return_squared"] / kept - (totals["return"] / kept) ** 2
    residual = totals["unexplained_squared"] / kept - (totals["unexplained"] / kept) ** 2
    advantage_mean = totals["advantage"] / kept
    return {
        "objective/kl": totals["kl"] / answers,
        "objective/kl_per_token": totals["kl"] / tokens,
        "objective/scores": totals["score"] / num_scored,
        "objective/rlhf_reward": totals["reward"] / num_scored,
        "objective/non_score_reward": (totals["reward"] - totals["score"]) / num_scored,
        "objective/advantage_mean": advantage_mean,
        "objective/advantage_std": max(totals["advantage_squared"] / kept - advantage_mean**2, 0.0) ** 0.5,
        "objective/return_mean": totals["return"] / kept,
        "rollout/answer_tokens_mean": totals["tokens"] / answers,
        "rollout/finished_share": totals["finished"] / answers,
        "rollout/logp_mismatch": totals["mismatch"] / tokens,
        "rollout/dropped_rows": answers - totals["scored"],
        "rollout/answers": answers,
        "rollout/answer_tokens": totals["tokens"],
        "val/explained_variance": 1.0 - residual / variance if variance > 0 else 0.0,
    }


def over_ranks(reward: Reward, accelerator: Accelerator) -> Reward:
    """The scores of all ranks, rows of rank 0 first, for the log. Every rank has as many rows; `why` is left empty."""
    if accelerator.num_processes == 1:
        return reward
    stages = (reward.parts.raw, reward.parts.scaled, reward.parts.weighted)
    columns = [reward.total, *(scores for stage in stages for scores in stage.values())]
    own = [[math.nan if x is None else x for x in column] for column in columns]
    shape = (len(columns), accelerator.num_processes, len(reward))
    everyone = torch.zeros(shape, dtype=torch.float64, device=accelerator.device)
    everyone[:, accelerator.process_index] = torch.tensor(own, dtype=torch.float64)
    summed = accelerator.reduce(everyone, reduction="sum")  # keeps a NaN, which stands for None
    rows = [[None if x != x else x for x in column] for column in summed.flatten(1).tolist()]
    parts = iter(rows[1:])
    raw, scaled, weighted = ({name: next(parts) for name in stage} for stage in stages)
    return Reward(total=rows[0], parts=Parts(raw=raw, scaled=scaled, weighted=weighted), why=[None] * len(rows[0]))
