"""Puts every component on one scale before it is weighted.

A raw reward-model logit (spread 2 to 4) drowns a probability in [0, 1], so each component is scaled by its mean and
standard deviation over answers of the frozen reference policy:

    scaled = clip((raw - mean) / std, -limit, limit)

Weights are therefore in reference-policy standard deviations: with gamma = 1, an answer whose safety is one reference
standard deviation above the reference mean gains 1. Multiplying a raw component by 100 changes nothing. The statistics
are fitted once and then frozen: running statistics would let the meaning of the reward drift with the policy.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

RELATIVE_FLOOR = 1e-3  # of |mean|: scales with the component, so a change of its unit still changes nothing
ABSOLUTE_FLOOR = 1e-8  # only keeps the division finite for a component that is 0 on every reference answer


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """Frozen statistics by component name.

    mean, std  over reference answers, in the unit of the component; std is already floored and > 0
    count      how many reference answers had a score
    limit      scaled scores are held within [-limit, limit], so that one outlier does not own a batch
    """

    mean: Mapping[str, float]
    std: Mapping[str, float]
    count: Mapping[str, int]
    limit: float = 10.0

    def __post_init__(self) -> None:
        if not self.mean.keys() == self.std.keys() == self.count.keys():
            raise ValueError(f"scaling names differ: mean {sorted(self.mean)}, std {sorted(self.std)}")
        if not (math.isfinite(self.limit) and self.limit > 0):
            raise ValueError(f"scaling limit={self.limit} must be finite and above 0")
        for name in self.mean:
            if not (math.isfinite(self.mean[name]) and math.isfinite(self.std[name]) and self.std[name] > 0):
                raise ValueError(
                    f"scaling of {name!r}: mean={self.mean[name]}, std={self.std[name]}; "
                    "both must be finite and std above 0; fit again with fit_scaling"
                )

    def scale(self, name: str, score: float) -> float:
        """One raw score in reference standard deviations, within [-limit, limit]."""
        if name not in self.mean:
            raise KeyError(f"no scaling for component {name!r}, only for {sorted(self.mean)}; fit it again")
        return max(-self.limit, min(self.limit, (score - self.mean[name]) / self.std[name]))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Scaling:
        unknown = set(fields) - {"mean", "std", "count", "limit"}
        if unknown or not {"mean", "std", "count"} <= set(fields):
            raise ValueError(f"scaling fields are mean, std, count, limit; got {sorted(fields)}")
        return cls(**fields)

    def save(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Scaling:
        return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))


def fit_scaling(
    raw: Mapping[str, Sequence[float | None]],
    *,
    min_std: Mapping[str, float] | None = None,
    limit: float = 10.0,
) -> Scaling:
    """Fits mean and (population) standard deviation of each component, leaving out None.

    Args:
        raw: raw scores on reference-policy answers, by component name, as in `Reward.parts.raw`.
        min_std: smallest meaningful spread by name, in the unit of the component.
        limit: see Scaling.

    Raises:
        ValueError: a component has fewer than two scores: a spread cannot be fitted.
    """
    mean, std, count = {}, {}, {}
    for name, scores in raw.items():
        known = [float(score) for score in scores if score is not None]
        if len(known) < 2:
            raise ValueError(
                f"component {name!r} scored {len(known)} of {len(scores)} reference answers; at least 2 are needed: "
                "use more reference answers or drop the component"
            )
        centre = math.fsum(known) / len(known)
        spread = math.sqrt(math.fsum((score - centre) ** 2 for score in known) / len(known))
        mean[name], count[name] = centre, len(known)
        std[name] = max(spread, (min_std or {}).get(name, 0.0), RELATIVE_FLOOR * abs(centre), ABSOLUTE_FLOOR)
    return Scaling(mean=mean, std=std, count=count, limit=limit)
