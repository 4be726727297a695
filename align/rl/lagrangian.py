"""Safety as a constraint: maximise the reward subject to a mean cost of at most a limit.

The multiplier follows Safe RLHF (Dai et al. 2023, arXiv:2310.12773, eq. 9): gradient ascent on its logarithm, so that it
stays above 0. Departs from the released code in one thing: it moves once a rollout, where that moves once a micro-batch
and epoch with the same costs, so that its rate depends on the layout of the batch.

B answers, R answer positions.
"""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

CONTROLS = ("log", "pid")


@dataclass
class Lagrangian:
    """The multiplier of the constraint mean cost <= limit. Costs and limit are in one unit.

    After each rollout, with e = (mean cost - limit) in units of the costs' spread:

        log   log(value) += lr * value * e, held at `maximum`
        pid   value = gain * e + integral + damping * max(e - e before, 0), held in [0, `maximum`], with
              integral = max(integral + lr * e, 0), which begins at the first value (Stooke et al. 2020, arXiv:2007.03964)

    The first is an integral alone: it answers late, overshoots, and keeps on pushing until it has been unwound. The second
    answers at once, and lets go at once when the constraint is met, which a run of a dozen rollouts needs.
    """

    value: float
    limit: float
    lr: float = 0.1
    maximum: float = 10.0
    control: str = "log"
    gain: float = 1.0
    damping: float = 0.0
    integral: float = math.nan
    last: float | None = None  # the error before

    def __post_init__(self) -> None:
        if not 0 < self.value <= self.maximum:
            raise ValueError(
                f"multiplier_start={self.value}: must be above 0 and at most multiplier_max={self.maximum}"
            )
        if not self.lr > 0:
            raise ValueError(f"multiplier_lr={self.lr}: must be above 0")
        if self.control not in CONTROLS:
            raise ValueError(f"multiplier_control={self.control!r}: must be one of {', '.join(CONTROLS)}")
        for name in ("gain", "damping"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"multiplier_{name}={getattr(self, name)}: must be at least 0 and finite")
        if math.isnan(self.integral):
            self.integral = self.value
        if not math.isfinite(self.limit):
            raise ValueError(f"cost_limit={self.limit}: must be a finite number")

    def update(self, mean_cost: float, *, unit: float = 1.0) -> None:
        """`mean_cost` is over all ranks; its distance from the limit counts in `unit`s (a spread of the costs)."""
        if self.control == "pid":
            error = (mean_cost - self.limit) / unit
            self.integral = min(max(self.integral + self.lr * error, 0.0), self.maximum)
            rise = 0.0 if self.last is None else max(error - self.last, 0.0)
            self.value = min(max(self.gain * error + self.integral + self.damping * rise, 0.0), self.maximum)
            self.last = error
            return
        step = self.lr * self.value * (mean_cost - self.limit) / unit
        # a step of more than a factor of e per rollout says that the unit or the rate is off, not that costs are that bad
        self.value = min(self.value * math.exp(min(max(step, -1.0), 1.0)), self.maximum)

    def combine(self, adv_BR: Tensor, cost_adv_BR: Tensor) -> Tensor:
        """(A_reward - value * A_cost) / (1 + value): of the size of one advantage, however large the multiplier."""
        return (adv_BR - self.value * cost_adv_BR) / (1.0 + self.value)

    def state_dict(self) -> dict[str, float | None]:
        """What changes during a run; the rest are settings."""
        return {"value": self.value, "integral": self.integral, "last": self.last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up the multiplier where the checkpoint left it."""
        self.value = state["value"]
        self.integral = state.get("integral", self.value)  # a checkpoint of before there was one
        self.last = state.get("last")
