"""Token rewards, generalised advantage estimation, whitening, and advantages against answers to the same prompt.

Departs from the paper (Schulman et al. 2016, arXiv:1506.02438): an answer ends the episode, so the value after its last
kept token is 0, for truncated answers too; and advantages are whitened over the kept tokens of the whole rollout, all
ranks together, not per minibatch.

B answers, R answer positions. `keep_BR` is True where a position counts.
"""

import torch
from torch import Tensor

ESTIMATORS = ("gae", "grpo", "rloo", "gdpo")


def token_rewards(score_B: Tensor, kl_BR: Tensor, keep_BR: Tensor, *, kl_coef: float) -> Tensor:
    """r_t = -kl_coef * kl_t, and the answer's score on top at its last kept token. Shape (B, R), 0 where not kept.

    An answer without a kept token gets no reward anywhere.
    """
    reward_BR = (-kl_coef * kl_BR).masked_fill(~keep_BR, 0.0)
    last_B = last_kept(keep_BR)
    has_token_B = keep_BR.any(dim=1)
    rows = torch.arange(len(score_B), device=score_B.device)
    reward_BR[rows, last_B] += torch.where(has_token_B, score_B.to(reward_BR.dtype), 0.0)
    return reward_BR


def last_kept(keep_BR: Tensor) -> Tensor:
    """Index of the last True of each row, 0 for a row that has none. Shape (B,)."""
    positions_R = torch.arange(keep_BR.shape[1], device=keep_BR.device)
    return (keep_BR * positions_R).amax(dim=1)


def gae(reward_BR: Tensor, value_BR: Tensor, keep_BR: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages A_t = delta_t + gamma*lam*A_{t+1}, delta_t = r_t + gamma*V_{t+1} - V_t (eq. 11-16), and returns A + V.

    Positions that are not kept are stepped over: the next kept position is the successor of the one before, so a gap
    inside an answer changes nothing. Both outputs are (B, R) and 0 where not kept; neither is whitened.
    """
    advantage_BR = torch.zeros_like(reward_BR)
    next_value_B = torch.zeros_like(reward_BR[:, 0])
    next_advantage_B = torch.zeros_like(reward_BR[:, 0])
    for t in reversed(range(reward_BR.shape[1])):
        keep_B = keep_BR[:, t]
        delta_B = reward_BR[:, t] + gamma * next_value_B - value_BR[:, t]
        advantage_B = delta_B + gamma * lam * next_advantage_B
        advantage_BR[:, t] = torch.where(keep_B, advantage_B, 0.0)
        next_advantage_B = torch.where(keep_B, advantage_B, next_advantage_B)
        next_value_B = torch.where(keep_B, value_BR[:, t], next_value_B)
    return advantage_BR, torch.where(keep_BR, advantage_BR + value_BR, 0.0)


def whiten(x_BR: Tensor, keep_BR: Tensor, *, shift_mean: bool = True, all_reduce=lambda totals: totals) -> Tensor:
    """(x - mean) / std over kept positions, 0 elsewhere; with `shift_mean=False` the mean is put back afterwards.

    `all_reduce` sums a tensor over ranks: the statistics are then those of every rank's positions together, and the
    result does not depend on how many ranks share the rollout. Variance is the population's, floored at 1e-8.
    """
    x64_BR = x_BR.double().masked_fill(~keep_BR, 0.0)
    totals = all_reduce(torch.stack([x64_BR.sum(), x64_BR.square().sum(), keep_BR.sum().double()]))
    count = totals[2].clamp(min=1.0)
    mean = totals[0] / count
    variance = (totals[1] / count - mean.square()).clamp(min=0.0)
    white_BR = (x64_BR - mean) * (variance + 1e-8).rsqrt()
    if not shift_mean:
        white_BR = white_BR + mean
    return white_BR.masked_fill(~keep_BR, 0.0).to(x_BR.dtype)


def group_advantages(score_B: Tensor, scored_B: Tensor, group_size: int, *, kind: str) -> Tensor:
    """How much better an answer is than the others to its prompt, (B,); rows of a group are neighbours.

    grpo  (score - mean) / (std + 1e-4), both over the group (Shao et al. 2024, arXiv:2402.03300, eq. 3)
    rloo  score - mean of the others (Ahmadian et al. 2024, arXiv:2402.14740, eq. 8)

    Rows that are not `scored_B` are no part of their group and get 0, as does a row alone in its group.
    """
    score_GK = score_B.double().masked_fill(~scored_B, 0.0).view(-1, group_size)
    scored_GK = scored_B.view(-1, group_size)
    count_G1 = scored_GK.sum(dim=1, keepdim=True)
    mean_G1 = score_GK.sum(dim=1, keepdim=True) / count_G1.clamp(min=1)
    centred_GK = (score_GK - mean_G1).masked_fill(~scored_GK, 0.0)
    if kind == "rloo":
        advantage_GK = centred_GK * count_G1 / (count_G1 - 1).clamp(min=1)
    else:
        variance_G1 = centred_GK.square().sum(dim=1, keepdim=True) / (count_G1 - 1).clamp(min=1)
        advantage_GK = centred_GK / (variance_G1.sqrt() + 1e-4)
    return advantage_GK.flatten().to(score_B.dtype)
