"""How far a policy is from its reference, and how dear that is.

Estimators follow Schulman, "Approximating KL divergence" (2020); the adaptive controller is Ziegler et al. 2019,
arXiv:1909.08593, section 2.2. KL is per answer: the sum over its kept tokens, in nats.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

ESTIMATORS = ("k1", "k2", "k3")


def kl_estimate(logp: Tensor, ref_logp: Tensor, kind: str) -> Tensor:
    """Per-token estimate of KL(policy || ref) from tokens that the policy sampled, same shape as the inputs, in nats.

    k1 = l, k2 = l^2 / 2, k3 = exp(-l) - 1 + l with l = logp - ref_logp held in [-20, 20]. k1 and k3 are unbiased, k1
    may be negative, k3 may not (and is capped at 10). As part of the reward each is a constant; none is meant to be
    differentiated.
    """
    log_ratio = (logp - ref_logp).clamp(-20.0, 20.0)
    if kind == "k1":
        return log_ratio
    if kind == "k2":
        return log_ratio.square() / 2
    if kind == "k3":
        return (torch.expm1(-log_ratio) + log_ratio).clamp(max=10.0)
    raise ValueError(f"kl_estimator={kind!r}: must be one of {', '.join(ESTIMATORS)}")


@dataclass
class KLController:
    """The KL coefficient of the reward. With a `target` it adapts; without, it stays at `coef`.

    After each rollout: error = clip(KL / target - 1, -0.2, 0.2); coef *= 1 + error * num_answers / horizon. `target` is
    KL per answer (a sum over tokens, nats), `horizon` counts answers.
    """

    coef: float
    target: float | None = None
    horizon: float = 10_000.0

    def __post_init__(self) -> None:
        if self.coef < 0:
            raise ValueError(f"kl_coef={self.coef}: must be at least 0")
        if self.target is not None and self.target <= 0:
            raise ValueError(f"kl_target={self.target}: must be above 0; leave it out for a fixed coefficient")
        if self.horizon <= 0:
            raise ValueError(f"kl_horizon={self.horizon}: must be above 0")

    def update(self, kl_per_answer: float, num_answers: int) -> None:
        """`kl_per_answer` is the mean over `num_answers`, both over all ranks, so that every rank agrees."""
        if self.target is None:
            return
        error = min(max(kl_per_answer / self.target - 1.0, -0.2), 0.2)
        self.coef *= 1.0 + error * num_answers / self.horizon

    def state_dict(self) -> dict[str, float]:
        """What changes during a run; target and horizon are settings."""
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Takes up the coefficient where the checkpoint left it."""
        self.coef = state["coef"]
