"""What a scorer of answers is worth on labelled pairs: accuracy with intervals, length control, calibration, mistakes.

Everything works on the margins of pairs, score(chosen) - score(rejected), and on nothing else of the scorer, so that a
reward model, a composite, a length count and a linear baseline are measured alike. Ties of the labels are left out
before; a margin of exactly 0 is half a hit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from plumbline.eval.stats.intervals import cluster_index, wilson

Array = NDArray[Any]
ECE_BINS = 5  # of the confidence, from 0.5 to 1: the mirror image of ten bins from 0 to 1


class Accuracy(NamedTuple):
    """Share of pairs ranked right with a 95% Wilson interval, and how many pairs."""

    mean: float
    low: float
    high: float
    n: int


def hits(margin: ArrayLike) -> Array:
    """(N,) 1 where the pair is ranked right, 0 where wrong, 0.5 for a margin of exactly 0."""
    margin_N = _finite(margin)
    return (margin_N > 0) + 0.5 * (margin_N == 0)


def accuracy(margin: ArrayLike, groups: Sequence[object] | None = None) -> Accuracy:
    """Of (N,) finite margins. NaN interval for no pairs; hits are rounded down for the interval.

    groups: a label a pair, such as its prompt. Pairs of one prompt tend to be right or wrong together, so the interval is
    that of as many independent pairs as would vary as much as the groups do (Kish's design effect, never below 1).
    """
    hit_N = hits(margin)
    if not len(hit_N):
        return Accuracy(math.nan, math.nan, math.nan, 0)
    mean, count = float(hit_N.mean()), len(hit_N)
    independent = count if groups is None else _independent(hit_N, groups)
    _, low, high = wilson(math.floor(mean * independent + 1e-9), independent)
    return Accuracy(mean, low, high, count)


def _independent(hit_N: Array, groups: Sequence[object]) -> int:
    """How many independent pairs would give a mean of the same variance: N p (1 - p) / (sum over groups of (sum of hits
    less mean)^2 / N), at most N; the number of groups where all hits are equal."""
    index_N = cluster_index(groups, len(hit_N))
    mean = hit_N.mean()
    between = float((np.bincount(index_N, weights=hit_N - mean) ** 2).sum())
    if not 0 < mean < 1:
        return int(index_N.max()) + 1
    return max(1, min(len(hit_N), round(len(hit_N) ** 2 * mean * (1 - mean) / max(between, 1e-12))))


def by_subset(margin: ArrayLike, subsets: Sequence[str], groups: Sequence[object] | None = None) -> dict[str, Accuracy]:
    """Accuracy of each subset, in alphabetical order; groups as for `accuracy`."""
    margin_N, names = _finite(margin), np.asarray(subsets)
    if len(names) != len(margin_N):
        raise ValueError(f"{len(names)} subsets for {len(margin_N)} margins: needs one each")
    rows = {str(name): np.flatnonzero(names == name) for name in np.unique(names)}
    return {name: accuracy(margin_N[at], groups and [groups[row] for row in at.tolist()]) for name, at in rows.items()}


def length_controlled_accuracy(
    margin: ArrayLike, extra_length: ArrayLike, groups: Sequence[object] | None = None
) -> Accuracy:
    """Mean of the accuracy where the chosen answer is longer and where it is shorter: 0.5 for "longer is better".

    extra_length: (N,) length of chosen less length of rejected; pairs of one length are left out. The interval is that
    of a mean of two rates from their Wilson intervals (Newcombe 1998, method 10). NaN where one side has no pairs.
    """
    sides = by_subset(margin, np.sign(np.asarray(extra_length, dtype=float)).astype(int).astype(str), groups)
    none = Accuracy(math.nan, math.nan, math.nan, 0)
    longer, shorter = sides.get("1", none), sides.get("-1", none)
    if not longer.n or not shorter.n:
        return Accuracy(math.nan, math.nan, math.nan, longer.n + shorter.n)
    mean = (longer.mean + shorter.mean) / 2
    down = math.hypot(longer.mean - longer.low, shorter.mean - shorter.low) / 2
    up = math.hypot(longer.high - longer.mean, shorter.high - shorter.mean) / 2
    return Accuracy(mean, max(0.0, mean - down), min(1.0, mean + up), longer.n + shorter.n)


def fit_temperature(margin: ArrayLike) -> float:
    """T > 0 that makes P(chosen wins) = s(margin / T) likeliest (Guo et al. 2017); 1-D golden-section search in log T.

    A scorer that ranks no better than chance gets the upper end, 1000 times the spread: every probability near 0.5.
    """
    margin_N = _finite(margin)
    spread = float(np.abs(margin_N).mean())
    if not len(margin_N) or spread == 0:
        raise ValueError(f"{len(margin_N)} margins of mean size {spread}: a temperature needs margins other than 0")

    def loss(log_t: float) -> float:
        return float(np.logaddexp(0, -margin_N / (spread * math.exp(log_t))).mean())

    low, high = math.log(1e-3), math.log(1e3)
    golden = (math.sqrt(5) - 1) / 2
    while high - low > 1e-4:
        a, b = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, b) if loss(a) < loss(b) else (a, high)
    return spread * math.exp((low + high) / 2)


def scaled_confidence(margin: ArrayLike, groups: Sequence[object], *, folds: int = 5) -> tuple[Array, Array]:
    """(confidence of the ranking in [0.5, 1], the temperature that each pair was scaled with), both (N,).

    Each pair is scaled with the temperature of the other folds, so that the calibration is measured on pairs that it
    was not fitted on. groups: a label a pair, such as its prompt; pairs of one label share a fold.
    """
    margin_N = _finite(margin)
    fold_N = fold_of(groups, folds)
    temperature_N = np.ones(len(margin_N))
    for fold in range(folds):
        inside = fold_N == fold
        if inside.any():
            temperature_N[inside] = fit_temperature(margin_N[~inside])
    return 1 / (1 + np.exp(-np.minimum(np.abs(margin_N) / temperature_N, 700))), temperature_N


def fold_of(groups: Sequence[object], folds: int, *, seed: int = 0) -> Array:
    """(N,) fold of each row; rows of one group are together. ValueError for fewer groups than folds."""
    seen: dict[object, int] = {}
    index = np.array([seen.setdefault(group, len(seen)) for group in groups], dtype=int)
    if len(seen) < folds:
        raise ValueError(f"{len(seen)} different prompts for {folds} folds: more prompts are needed")
    return (np.random.default_rng(seed).permutation(len(seen)) % folds)[index]


def calibration_bins(margin: ArrayLike, confidence: ArrayLike, bins: int = ECE_BINS) -> list[tuple[float, float, int]]:
    """(mean confidence, share ranked right, pairs) of the bins of equal width that hold pairs."""
    right_N = (_finite(margin) > 0) + 0.5 * (_finite(margin) == 0)
    confidence_N = np.asarray(confidence, dtype=float)
    at_N = np.minimum(((confidence_N - 0.5) * 2 * bins).astype(int), bins - 1)
    return [
        (float(confidence_N[at_N == b].mean()), float(right_N[at_N == b].mean()), int((at_N == b).sum()))
        for b in range(bins)
        if (at_N == b).any()
    ]


def ece(bins: Sequence[tuple[float, float, int]]) -> float:
    """Expected calibration error: |confidence - accuracy| averaged over pairs."""
    return sum(abs(sure - right) * n for sure, right, n in bins) / sum(n for _, _, n in bins)


def confident_mistakes(margin: ArrayLike, confidence: ArrayLike, count: int = 20) -> list[int]:
    """Rows that are ranked wrong, surest first."""
    margin_N, confidence_N = _finite(margin), np.asarray(confidence, dtype=float)
    order = np.argsort(-confidence_N, kind="stable")
    return [int(row) for row in order if margin_N[row] < 0][:count]


def margin_histogram(margin: ArrayLike, bins: int = 21) -> dict[str, list[float]]:
    """Counts of margins in units of their mean size, over [-5, 5]; what lies beyond is in the outer bins."""
    margin_N = _finite(margin)
    unit = float(np.abs(margin_N).mean()) or 1.0
    counts, edges = np.histogram(np.clip(margin_N / unit, -5, 5), bins=bins, range=(-5, 5))
    return {"edges": edges.tolist(), "counts": counts.tolist(), "unit": [unit]}


def pair_report(
    margin: ArrayLike,
    *,
    subsets: Sequence[str],
    extra_length: ArrayLike,
    groups: Sequence[object],
    agreement: Sequence[str] | None = None,
) -> dict[str, Any]:
    """The whole report of one scorer as plain numbers. groups: a label a pair, its prompt.

    Temperature, ECE and mistakes are left out, with `calibration` saying why, where there are too few prompts to fit a
    temperature on others.
    """
    margin_N = _finite(margin)
    report: dict[str, Any] = {
        "accuracy": _plain(accuracy(margin_N, groups)),
        "length_controlled": _plain(length_controlled_accuracy(margin_N, extra_length, groups)),
        "by_subset": {name: _plain(share) for name, share in by_subset(margin_N, subsets, groups).items()},
        "margins": margin_histogram(margin_N),
    }
    if agreement is not None and any(agreement):
        report["by_agreement"] = {k: _plain(v) for k, v in by_subset(margin_N, agreement, groups).items()}
    try:
        confidence_N, temperature_N = scaled_confidence(margin_N, groups)
    except ValueError as error:
        report["calibration"] = f"not measured: {error}"
        return report
    bins = calibration_bins(margin_N, confidence_N)
    report |= {"temperature": float(np.median(temperature_N)), "ece": ece(bins), "calibration": bins}
    report["confident_mistakes"] = confident_mistakes(margin_N, confidence_N)
    return report


def shared_prompts(train: Sequence[str], held_out: Sequence[str], *, near: float = 0.8) -> list[tuple[int, int, float]]:
    """(row of held_out, row of train, similarity) of prompts that leaked: equal, or nearly so.

    Similarity is the Jaccard index of sets of three words running, after letters, digits and case are all that is left;
    texts of fewer than three words must be equal. Only pairs that share a run are compared.
    """
    seen: dict[tuple[str, ...], list[int]] = {}
    train_sets = [_runs(text) for text in train]
    for row, runs in enumerate(train_sets):
        for run in runs:
            seen.setdefault(run, []).append(row)
    leaks = []
    for row, text in enumerate(held_out):
        runs = _runs(text)
        common: dict[int, int] = {}
        for run in runs:
            for other in seen.get(run, ()):
                common[other] = common.get(other, 0) + 1
        best = max(((n / (len(runs) + len(train_sets[o]) - n), o) for o, n in common.items()), default=(0.0, -1))
        if best[0] >= near:
            leaks.append((row, best[1], best[0]))
    return leaks


def _runs(text: str) -> set[tuple[str, ...]]:
    words = "".join(char if char.isalnum() else " " for char in text.lower()).split()
    return {tuple(words[i : i + 3]) for i in range(len(words) - 2)} or {tuple(words)}


def _plain(share: Accuracy) -> dict[str, float | None]:
    return {name: None if math.isnan(value) else value for name, value in share._asdict().items()}


def _finite(margin: ArrayLike) -> Array:
    margin_N = np.asarray(margin, dtype=float)
    if margin_N.ndim != 1 or not np.isfinite(margin_N).all():
        raise ValueError(
            f"margins of shape {margin_N.shape} must be a list of finite numbers: leave unscored pairs out"
        )
    return margin_N


def as_percent(share: dict[str, float | None]) -> str:
    """`63.2 [60.1, 66.2]`, or `-` for what could not be measured."""
    mean, low, high = (share[k] for k in ("mean", "low", "high"))
    if mean is None or low is None or high is None:
        return "-"
    return f"{100 * mean:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
