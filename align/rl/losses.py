"""The losses of PPO (Schulman et al. 2017, arXiv:1707.06347), and a KL term for those who want it in the loss.

Normalisation: a loss here is a *sum* over kept tokens divided by `num_tokens`, the count over every micro-batch and
rank of one optimizer step. Gradients then only need adding up: how a step is split into micro-batches or ranks changes
nothing.

B answers, R answer positions. Everything here is fp32.
"""

import torch
from torch import Tensor

from plumbline.align.rl.kl_control import kl_estimate


def masked_mean(x_BR: Tensor, keep_BR: Tensor) -> Tensor:
    """Mean over kept positions, 0 when none is kept; what stands elsewhere, NaN included, does not matter."""
    return x_BR.masked_fill(~keep_BR, 0.0).sum() / keep_BR.sum().clamp(min=1)


def like(keep_BR: Tensor, x: Tensor) -> Tensor:
    """`keep_BR` with a dimension more where x has one, (B, R) or (B, R, values)."""
    return keep_BR if x.dim() == keep_BR.dim() else keep_BR[..., None].expand(x.shape)


def clipped_policy_loss(
    logp_BR: Tensor, old_logp_BR: Tensor, adv_BR: Tensor, keep_BR: Tensor, *, clip: float, num_tokens: Tensor | float
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO surrogate, sum over kept tokens / num_tokens (eq. 7), and sums over kept tokens for the log.

    ratio = exp(logp - old_logp), the exponent held in [-20, 20]; loss = -min(ratio * A, clip(ratio, 1 - clip, 1 + clip)
    * A).
    """
    log_ratio_BR = (logp_BR - old_logp_BR).masked_fill(~keep_BR, 0.0).clamp(-20.0, 20.0)
    ratio_BR = log_ratio_BR.exp()
    adv_BR = adv_BR.masked_fill(~keep_BR, 0.0)
    free_BR = -adv_BR * ratio_BR
    held_BR = -adv_BR * ratio_BR.clamp(1 - clip, 1 + clip)
    with torch.no_grad():
        sums = {
            "policy/clip_fraction": ((held_BR > free_BR) & keep_BR).sum().float(),
            "policy/approx_kl": (ratio_BR - 1 - log_ratio_BR)
            .masked_fill(~keep_BR, 0.0)
            .sum(),  # k3 of old || new: >= 0
            "policy/ratio": ratio_BR.masked_fill(~keep_BR, 0.0).sum(),
        }
    return torch.maximum(free_BR, held_BR).masked_fill(~keep_BR, 0.0).sum() / num_tokens, sums


def clipped_value_loss(
    value_BR: Tensor,
    old_value_BR: Tensor,
    return_BR: Tensor,
    keep_BR: Tensor,
    *,
    clip: float,
    num_tokens: Tensor | float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """0.5 * max((V - R)^2, (V_clipped - R)^2), V_clipped within `clip` of V_old; sum over kept tokens / num_tokens."""
    value_BR, old_value_BR, return_BR = (x.masked_fill(~keep_BR, 0.0) for x in (value_BR, old_value_BR, return_BR))
    # a clamp between bounds, not old + clamp(difference): inside the band it is V to the bit, and no rounding counts as clipped
    near_BR = value_BR.clamp(old_value_BR - clip, old_value_BR + clip)
    free_BR = (value_BR - return_BR).square()
    held_BR = (near_BR - return_BR).square()
    with torch.no_grad():
        sums = {"value/clip_fraction": ((held_BR > free_BR) & keep_BR).sum().float()}
    return 0.5 * torch.maximum(free_BR, held_BR).masked_fill(~keep_BR, 0.0).sum() / num_tokens, sums


def kl_loss(logp_BR: Tensor, ref_logp_BR: Tensor, keep_BR: Tensor, *, kind: str, num_tokens: Tensor | float) -> Tensor:
    """KL(policy || ref) as a part of the loss, sum over kept tokens / num_tokens.

    The value is that of the estimator `kind`; the gradient is that of k2, whatever the kind: differentiated as they
    stand, k1 has gradient 0 in expectation and k3 that of KL(ref || policy).
    """
    log_ratio_BR = (logp_BR - ref_logp_BR).masked_fill(~keep_BR, 0.0)
    k2_BR = kl_estimate(log_ratio_BR, torch.zeros_like(log_ratio_BR), "k2")
    with torch.no_grad():
        value_BR = kl_estimate(log_ratio_BR, torch.zeros_like(log_ratio_BR), kind)
    return (k2_BR - k2_BR.detach() + value_BR).masked_fill(~keep_BR, 0.0).sum() / num_tokens
