"""Intervals and tests for evaluation results: plain functions on arrays, no state.

Single rates get Wilson intervals, means percentile bootstrap intervals, two targets on the same prompts are compared
pairwise. Several rows of one prompt (samples, paraphrases) are one cluster: they are resampled together, so that asking
the same thing five times does not make an interval narrower.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[Any]
CHUNK = 2_000_000  # resampled indices held at once, 16 MB


class Interval(NamedTuple):
    """An estimate and its interval. Both ends are NaN where the data cannot give one (a single observation)."""

    mean: float
    low: float
    high: float


class McNemar(NamedTuple):
    """Paired yes/no outcomes that changed, and the exact two-sided p-value of "as many each way"."""

    p: float
    only_before: int
    only_after: int


def student_quantile(p: float, df: int) -> float:
    """Quantile of Student's t for p >= 0.5: exact for one and two degrees of freedom, else by Hill (1970, Algorithm 396)."""
    if not (0.5 <= p < 1 and df >= 1):
        raise ValueError(f"{p=}, {df=}: needs 0.5 <= p < 1 and df >= 1")
    if df == 1:
        return math.tan(math.pi * (p - 0.5))
    tails = 2 * (1 - p)
    if df == 2:
        return math.sqrt(max(0.0, 2 / (tails * (2 - tails)) - 2))
    a = 1 / (df - 0.5)
    b = 48 / (a * a)
    c = ((20700 * a / b - 98) * a - 16) * a + 96.36
    d = ((94.5 / (b + c) - 3) / b + 1) * math.sqrt(a * math.pi / 2) * df
    y = (d * tails) ** (2 / df)
    if y > 0.05 + a:
        x = NormalDist().inv_cdf(1 - p)
        y = x * x
        if df < 5:
            c += 0.3 * (df - 4.5) * (x + 0.6)
        c = (((0.05 * d * x - 5) * x - 7) * x - 2) * x + b + c
        y = (((((0.4 * y + 6.3) * y + 36) * y + 94.5) / c - y - 3) / b + 1) * x
        y = math.expm1(a * y * y)
    else:
        y = ((1 / (((df + 6) / (df * y) - 0.089 * d - 0.822) * (df + 2) * 3) + 0.5 / (df + 4)) * y - 1) * (df + 1) / (
            df + 2
        ) + 1 / y
    return math.sqrt(df * y)


def wilson(successes: int, n: int, level: float = 0.95) -> Interval:
    """Score interval of a rate (Wilson 1927); `mean` is successes / n. Stays inside [0, 1] and is honest at 0 and n."""
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"{successes=} of {n=}: needs 0 <= successes <= n and n >= 1")
    _check_level(level)
    z = NormalDist().inv_cdf(0.5 + level / 2)
    rate = successes / n
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    # at the ends the formula gives exactly 0 and 1; rounding must not push them past
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return Interval(rate, low, high)


def bootstrap_mean(
    values: ArrayLike,
    *,
    clusters: Sequence[object] | None = None,
    seed: int = 0,
    resamples: int = 10_000,
    level: float = 0.95,
) -> Interval:
    """Percentile bootstrap interval of the mean of (N,) finite values.

    clusters: one label a value; values with equal labels are drawn together. The mean stays the mean over values.
    """
    values_N = _finite(values, "values")
    if clusters is None:
        sums, counts = values_N, np.ones(len(values_N))
    else:
        index = cluster_index(clusters, len(values_N))
        sums, counts = np.bincount(index, weights=values_N), np.bincount(index).astype(float)
    drawn = [sums[i].sum(1) / counts[i].sum(1) for i in _resampled(len(sums), seed, resamples)]
    return _percentiles(float(values_N.mean()), np.concatenate(drawn), len(sums), level)


def paired_bootstrap(
    a: ArrayLike,
    b: ArrayLike,
    *,
    clusters: Sequence[object] | None = None,
    seed: int = 0,
    resamples: int = 10_000,
    level: float = 0.95,
) -> Interval:
    """Mean of a - b with a percentile interval; a[i] and b[i] belong to the same prompt and are drawn together."""
    a_N, b_N = _finite(a, "a"), _finite(b, "b")
    if len(a_N) != len(b_N):
        raise ValueError(f"{len(a_N)=} and {len(b_N)=} differ: a paired comparison needs one value of each a prompt")
    return bootstrap_mean(a_N - b_N, clusters=clusters, seed=seed, resamples=resamples, level=level)


def length_controlled_gain(
    gain: ArrayLike, extra_tokens: ArrayLike, *, seed: int = 0, resamples: int = 10_000, level: float = 0.95
) -> Interval:
    """The gain that is left at equal answer length: intercept of gain ~ extra_tokens, with a bootstrap interval.

    gain: (N,) reward differences of paired answers; extra_tokens: (N,) differences of their lengths. The idea is that
    of length-controlled AlpacaEval (arXiv:2404.04475), with a straight line where that uses a logistic model. Read it
    with care where no pair has nearly equal lengths: the line is then followed outside the data. If all differences are
    one number other than 0, length and gain cannot be told apart and the result is NaN.
    """
    y_N, x_N = _finite(gain, "gain"), _finite(extra_tokens, "extra_tokens")
    if len(y_N) != len(x_N):
        raise ValueError(f"{len(y_N)=} gains and {len(x_N)=} length differences: needs one of each a prompt")
    drawn = [_intercept(x_N[i], y_N[i]) for i in _resampled(len(y_N), seed, resamples)]
    return _percentiles(float(_intercept(x_N[None], y_N[None])[0]), np.concatenate(drawn), len(y_N), level)


def mcnemar_exact(before: ArrayLike, after: ArrayLike) -> McNemar:
    """Exact McNemar test on (N,) paired booleans: two-sided binomial on the pairs that changed (p = 1 if none did)."""
    before_N, after_N = np.asarray(before, dtype=bool), np.asarray(after, dtype=bool)
    if before_N.shape != after_N.shape or before_N.ndim != 1:
        raise ValueError(f"{before_N.shape=} and {after_N.shape=}: needs two lists of the same length")
    only_before, only_after = int((before_N & ~after_N).sum()), int((~before_N & after_N).sum())
    changed, fewer = only_before + only_after, min(only_before, only_after)
    tail = sum(math.comb(changed, k) for k in range(fewer + 1)) / 2**changed
    return McNemar(min(1.0, 2 * tail), only_before, only_after)


def auc(scores: ArrayLike, labels: ArrayLike) -> float:
    """Probability that a positive scores above a negative, ties counting one half (area under the ROC curve)."""
    scores_N, labels_N = _finite(scores, "scores"), np.asarray(labels, dtype=bool)
    positives, negatives = int(labels_N.sum()), int((~labels_N).sum())
    if len(scores_N) != len(labels_N) or not positives or not negatives:
        raise ValueError(
            f"{len(scores_N)} scores, {positives} positives, {negatives} negatives: needs both, one label each"
        )
    _, inverse, counts = np.unique(scores_N, return_inverse=True, return_counts=True)
    rank_N = (np.cumsum(counts) - (counts - 1) / 2)[inverse]  # tied scores share the middle rank
    return float((rank_N[labels_N].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def cluster_index(clusters: Sequence[object], n: int) -> Array:
    """(N,) integers, equal where the labels are equal, numbered in order of first appearance."""
    if len(clusters) != n:
        raise ValueError(f"{len(clusters)=} for {n} values: needs one label a value")
    seen: dict[object, int] = {}
    return np.array([seen.setdefault(label, len(seen)) for label in clusters])


def _resampled(n: int, seed: int, resamples: int):
    """Yields (rows, n) index arrays, `resamples` rows in all, few enough at a time to stay small in memory."""
    if resamples < 1:
        raise ValueError(f"{resamples=}: needs at least 1; 10000 gives stable 95 percent ends")
    rng, rows = np.random.default_rng(seed), max(1, CHUNK // n)
    for start in range(0, resamples, rows):
        yield rng.integers(0, n, size=(min(rows, resamples - start), n))


def _intercept(x_SN: Array, y_SN: Array) -> Array:
    """Least-squares intercept of each row; where x does not vary: mean of y if x is 0 throughout, else NaN."""
    x_mean, y_mean = x_SN.mean(1), y_SN.mean(1)
    dx = x_SN - x_mean[:, None]
    variation = (dx * dx).sum(1)
    flat = variation == 0
    slope = (dx * (y_SN - y_mean[:, None])).sum(1) / np.where(flat, 1.0, variation)
    return np.where(flat & (x_mean != 0), np.nan, y_mean - slope * x_mean)


def _percentiles(mean: float, drawn: Array, units: int, level: float) -> Interval:
    _check_level(level)
    drawn = drawn[np.isfinite(drawn)]
    if units < 2 or not len(drawn):  # one unit resampled is itself for ever: that would look like certainty
        return Interval(mean, math.nan, math.nan)
    low, high = np.quantile(drawn, [0.5 - level / 2, 0.5 + level / 2])
    return Interval(mean, float(low), float(high))


def _finite(values: ArrayLike, name: str) -> Array:
    array = np.asarray(values, dtype=float)
    if array.ndim != 1 or not len(array):
        raise ValueError(f"{name} has shape {array.shape}: needs a list of at least one number")
    if not np.isfinite(array).all():
        at = int(np.flatnonzero(~np.isfinite(array))[0])
        raise ValueError(f"{name}[{at}] is {array[at]}: leave unscored rows out and count them")
    return array


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"{level=}: needs a share between 0 and 1, such as 0.95")


# ---- several tests, several judges, unscored rows -------------------------------------------------------------------


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values (1979), in the order given: below 0.05 holds for all of them together."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def kappa(table: ArrayLike) -> float:
    """Cohen's kappa of a (2, 2) table of counts: agreement beyond what the margins give by chance, 1 at best."""
    counts = np.asarray(table, dtype=float)
    if counts.shape != (2, 2) or (counts < 0).any() or counts.sum() == 0:
        raise ValueError(f"table {counts.tolist()}: needs four counts, not all 0")
    share = counts / counts.sum()
    agreed, chance = np.trace(share), float(share.sum(0) @ share.sum(1))
    return 1.0 if chance == 1 else float((agreed - chance) / (1 - chance))


def unscored_band(successes: int, scored: int, unscored: int) -> tuple[float, float]:
    """The lowest and highest rate there can be: all unscored rows a failure, all of them a success."""
    n = scored + unscored
    if n < 1:
        raise ValueError("no rows at all: there is no rate to bound")
    return successes / n, (successes + unscored) / n


def prompts_needed(
    rate: float, change: float, *, paired: bool = True, agreement: float = 0.8, power: float = 0.8, level: float = 0.95
) -> int:
    """How many prompts show a change of a rate (0.30 -> 0.35 is change=0.05) with probability `power`.

    paired     both targets answer the same prompts and McNemar's test decides (Connor 1987); else each target has prompts
               of its own, this many, and the arcsine test of two rates decides (Cohen 1988)
    agreement  share of the largest possible agreement between the targets: 0 they err independently, 1 only one of them
               ever errs alone. Twins of one base model lie near 0.8
    """
    other = rate + change
    if not (0 < rate < 1 and 0 <= other <= 1 and change):
        raise ValueError(f"{rate=}, {change=}: needs 0 < rate < 1, a change other than 0, and their sum in [0, 1]")
    if not (0 <= agreement <= 1 and 0 < power < 1):
        raise ValueError(f"{agreement=} must lie in [0, 1] and {power=} in (0, 1)")
    _check_level(level)
    alpha, beta = NormalDist().inv_cdf(0.5 + level / 2), NormalDist().inv_cdf(power)
    if not paired:
        effect = abs(2 * math.asin(math.sqrt(other)) - 2 * math.asin(math.sqrt(rate)))
        return math.ceil(2 * ((alpha + beta) / effect) ** 2)
    least, independent = abs(change), rate * (1 - other) + other * (1 - rate)
    differ = least + (1 - agreement) * (independent - least)  # share of prompts on which the two differ
    root = alpha * math.sqrt(differ) + beta * math.sqrt(max(0.0, differ - change * change))
    return max(math.ceil((root / change) ** 2), math.ceil(5 / differ))  # fewer than 5 changes can never reach p < 0.05
