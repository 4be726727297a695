"""How good is a judge, and what does its error do to a rate?

A judge with sensitivity Se and specificity Sp turns a true rate into an apparent one, p = rate * Se + (1 - rate) * (1 - Sp).
`corrected` turns it back (Rogan and Gladen 1978) with the interval of Lang and Reiczigel (2014), which carries three
uncertainties: of the rate, of Se and of Sp. garak's correction (as of 0.17) treats Se and Sp as known.

A correction holds where the judge errs as it did on the labelled rows; another kind of prompt or of model may change that.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np

from plumbline.eval.stats.intervals import Interval, kappa, wilson

WEAKEST = 0.2  # Youden's index Se + Sp - 1 under which nothing is corrected: the judge hardly tells the two apart


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Counts of a judge against people, on rows labelled positive and negative by them."""

    judge: str
    source: str
    true_positive: int
    false_negative: int
    true_negative: int
    false_positive: int

    @property
    def positives(self) -> int:
        return self.true_positive + self.false_negative

    @property
    def negatives(self) -> int:
        return self.true_negative + self.false_positive

    @property
    def sensitivity(self) -> Interval:
        """Share of true positives that the judge calls positive, with its Wilson interval."""
        return wilson(self.true_positive, self.positives)

    @property
    def specificity(self) -> Interval:
        """Share of true negatives that the judge calls negative, with its Wilson interval."""
        return wilson(self.true_negative, self.negatives)

    @property
    def youden(self) -> float:
        """Se + Sp - 1: 1 for a perfect judge, 0 for a coin."""
        return self.sensitivity.mean + self.specificity.mean - 1

    def figures(self, *, seed: int = 0, resamples: int = 2000) -> dict:
        """Everything a report prints, as plain values; precision, recall and F1 are of the positive label."""
        counts = np.array(
            [self.true_positive, self.false_negative, self.true_negative, self.false_positive], dtype=float
        )
        drawn = np.random.default_rng(seed).multinomial(int(counts.sum()), counts / counts.sum(), size=resamples)
        named = {
            "f1": (_f1, lambda c: c), "kappa": (_kappa, lambda c: c), "precision": (_precision, lambda c: c),
        }  # fmt: skip
        out: dict = {"judge": self.judge, "source": self.source, "n": int(counts.sum()), "positives": self.positives}
        out["counts"] = {k: v for k, v in asdict(self).items() if isinstance(v, int)}
        for name, interval in (("sensitivity", self.sensitivity), ("specificity", self.specificity)):
            out[name] = interval._asdict()
        for name, (figure, _) in named.items():
            of_drawn = [figure(row) for row in drawn]
            low, high = np.quantile([x for x in of_drawn if math.isfinite(x)] or [math.nan], [0.025, 0.975])
            out[name] = {"mean": figure(counts), "low": float(low), "high": float(high)}
        out["accuracy"] = wilson(self.true_positive + self.true_negative, int(counts.sum()))._asdict()
        return out

    def save(self, path: str | Path) -> None:
        """Writes the counts and what follows from them."""
        Path(path).write_text(json.dumps(asdict(self) | {"figures": self.figures()}, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Reads what `save` wrote; ValueError naming the file otherwise."""
        try:
            row = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(**{name: row[name] for name in cls.__dataclass_fields__})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a calibration ({error}); write one with: plumbline calibrate") from error


def calibrate(judge: str, source: str, says: Sequence[bool], truth: Sequence[bool]) -> Calibration:
    """Counts a judge's labels against people's. Needs at least one positive and one negative row."""
    pairs = list(zip(map(bool, says), map(bool, truth), strict=True))
    found = Calibration(
        judge=judge, source=source,
        true_positive=pairs.count((True, True)), false_negative=pairs.count((False, True)),
        true_negative=pairs.count((False, False)), false_positive=pairs.count((True, False)),
    )  # fmt: skip
    if not found.positives or not found.negatives:
        raise ValueError(
            f"{source}: {found.positives} positive and {found.negatives} negative labels; a judge needs rows of both"
        )
    return found


def corrected(
    positives: float, n: float, judge: Calibration, *, level: float = 0.95
) -> tuple[Interval | None, str]:  # fmt: skip
    """The true rate behind `positives` of `n` as the judge saw them, or None and the reason why not.

    Args:
        positives, n: counts; with clusters give the effective n, so that positives / n stays the rate.
    """
    if not 0 <= positives <= n or n <= 0:
        raise ValueError(f"{positives=} of {n=}: needs 0 <= positives <= n and n > 0")
    if judge.youden < WEAKEST:
        return None, (
            f"not corrected: {judge.judge} has sensitivity {judge.sensitivity.mean:.2f} and specificity "
            f"{judge.specificity.mean:.2f} on {judge.source}; their sum less 1 is {judge.youden:.2f}, below {WEAKEST}"
        )
    z = NormalDist().inv_cdf(0.5 + level / 2)
    se, sp = judge.sensitivity.mean, judge.specificity.mean
    point = min(1.0, max(0.0, (positives / n + sp - 1) / (se + sp - 1)))

    # Lang and Reiczigel 2014, eq. 5-8: everything shrunk a little towards one half, and the bias of the ratio put right
    p = (positives + z * z / 2) / (n + z * z)
    se = (judge.true_positive + 1) / (judge.positives + 2)
    sp = (judge.true_negative + 1) / (judge.negatives + 2)
    rate = (p + sp - 1) / (se + sp - 1)
    spread_se, spread_sp = se * (1 - se) / (judge.positives + 2), sp * (1 - sp) / (judge.negatives + 2)
    shift = 2 * z * z * (rate * spread_se - (1 - rate) * spread_sp)
    variance = (p * (1 - p) / (n + z * z) + rate**2 * spread_se + (1 - rate) ** 2 * spread_sp) / (se + sp - 1) ** 2
    low, high = rate + shift - z * math.sqrt(variance), rate + shift + z * math.sqrt(variance)
    low, high = min(1.0, max(0.0, low)), min(1.0, max(0.0, high))
    return Interval(min(max(point, low), high), low, high), ""


def _precision(counts: np.ndarray) -> float:
    tp, _, _, fp = counts
    return tp / (tp + fp) if tp + fp else math.nan


def _f1(counts: np.ndarray) -> float:
    tp, fn, _, fp = counts
    return 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else math.nan


def _kappa(counts: np.ndarray) -> float:
    tp, fn, tn, fp = counts
    return kappa([[tp, fn], [fp, tn]])
