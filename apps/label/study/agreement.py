"""How far annotators agree, how reliable each is, and how strong the models are that they compared.

Plain functions on arrays. Everything that is estimated comes with an interval; where the data say nothing (all labels
alike, one annotator) the estimate is NaN rather than 0 or 1.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from plumbline.eval.stats.intervals import Interval

Array = NDArray[Any]
MISSING = float("nan")


# Agreement


def krippendorff_alpha(values_AU: Array, level: str = "nominal") -> float:
    """Krippendorff's alpha (2011, "Computing Krippendorff's alpha-reliability"): 1 full agreement, 0 chance, below 0 worse.

    values_AU: one row an annotator, one column an item; NaN where an annotator did not label it. level: `nominal`,
    `ordinal` or `interval`. NaN when no two labels of the data differ: agreement beyond chance is then undefined.
    """
    units_UK, categories_K = _unit_counts(values_AU)
    return _alpha(units_UK, _squared_distance(level, categories_K, _pairable(units_UK).sum(0)))


def alpha_interval(
    values_AU: Array, level: str = "nominal", *, resamples: int = 1000, seed: int = 0, coverage: float = 0.95
) -> Interval:
    """Alpha with a percentile bootstrap over items, which are what the annotators are a sample's judges of."""
    units_UK, categories_K = _unit_counts(values_AU)
    units_UK = _pairable(units_UK)
    point = krippendorff_alpha(values_AU, level)
    if math.isnan(point) or len(units_UK) < 2:
        return Interval(point, MISSING, MISSING)
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(resamples):
        sample_UK = units_UK[rng.integers(len(units_UK), size=len(units_UK))]
        drawn.append(_alpha(sample_UK, _squared_distance(level, categories_K, sample_UK.sum(0))))
    low, high = np.nanquantile(drawn, [(1 - coverage) / 2, (1 + coverage) / 2])
    return Interval(point, float(low), float(high))


def _unit_counts(values_AU: Array) -> tuple[Array, Array]:
    """(U, K) counts of each category an item, and the categories (K,) in order."""
    values_AU = np.asarray(values_AU, dtype=float)
    categories_K = np.unique(values_AU[~np.isnan(values_AU)])
    return (values_AU[:, :, None] == categories_K).sum(0), categories_K


def _pairable(units_UK: Array) -> Array:
    return units_UK[units_UK.sum(1) >= 2]


def _alpha(units_UK: Array, distance_KK: Array) -> float:
    units_UK = _pairable(units_UK)
    size_U1 = units_UK.sum(1, keepdims=True)
    total = size_U1.sum()
    if total < 2:
        return MISSING
    weighted_UK = units_UK / (size_U1 - 1)
    observed = np.einsum("uk,ul,kl->", weighted_UK, units_UK, distance_KK)  # distance 0 takes out pairs with oneself
    values_K = units_UK.sum(0)
    expected = values_K @ distance_KK @ values_K / (total - 1)
    return MISSING if expected == 0 else float(1 - observed / expected)


def _squared_distance(level: str, categories_K: Array, counts_K: Array) -> Array:
    if level == "nominal":
        return 1.0 - np.eye(len(categories_K))
    if level == "interval":
        return (categories_K[:, None] - categories_K[None, :]) ** 2
    if level == "ordinal":  # (labels between the two categories, and half of those in each) squared
        middle_K = np.cumsum(counts_K) - counts_K / 2
        return (middle_K[:, None] - middle_K[None, :]) ** 2
    raise ValueError(f"level={level!r}: must be 'nominal', 'ordinal' or 'interval'")


def raw_agreement(values_AU: Array) -> float:
    """Share of pairs of labels of one item that are equal; NaN without such a pair."""
    units_UK, _ = _unit_counts(values_AU)
    size_U = units_UK.sum(1)
    pairs = (size_U * (size_U - 1)).sum()
    return float((units_UK * (units_UK - 1)).sum() / pairs) if pairs else MISSING


def cohen_kappa(first: Sequence[float], second: Sequence[float], weights: str | None = None) -> float:
    """Cohen's kappa of two annotators on the same items; `weights`: None, "linear" or "quadratic" by category rank.

    NaN when both use one and the same category only. Kappa falls as categories get uneven: show their shares with it.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} labels: both annotators must have labelled the same items")
    if not len(first):
        return MISSING
    categories = np.unique(np.concatenate([first, second]))
    joint_KK = np.zeros((len(categories), len(categories)))
    np.add.at(joint_KK, (np.searchsorted(categories, first), np.searchsorted(categories, second)), 1.0)
    joint_KK /= joint_KK.sum()
    rank_K = np.arange(len(categories))
    gap_KK = np.abs(rank_K[:, None] - rank_K[None, :]).astype(float)
    cost_KK = {None: (gap_KK > 0).astype(float), "linear": gap_KK, "quadratic": gap_KK**2}.get(weights)
    if cost_KK is None:
        raise ValueError(f"weights={weights!r}: must be None, 'linear' or 'quadratic'")
    expected = (np.outer(joint_KK.sum(1), joint_KK.sum(0)) * cost_KK).sum()
    return MISSING if expected == 0 else float(1 - (joint_KK * cost_KK).sum() / expected)


def fleiss_kappa(counts_UK: Array) -> float:
    """Fleiss' kappa (1971); counts_UK: labels of each category an item, the same number an item (else ValueError)."""
    counts_UK = np.asarray(counts_UK, dtype=float)
    size = counts_UK.sum(1)
    if len(counts_UK) == 0 or size[0] < 2 or (size != size[0]).any():
        raise ValueError("Fleiss' kappa needs the same number of labels, at least 2, for every item; use alpha instead")
    observed = ((counts_UK**2).sum(1) - size[0]).mean() / (size[0] * (size[0] - 1))
    expected = ((counts_UK.sum(0) / counts_UK.sum()) ** 2).sum()
    return MISSING if expected == 1 else float((observed - expected) / (1 - expected))


# Annotators


def annotator_accuracy(
    choice_AU: Array, *, resamples: int = 200, seed: int = 0, coverage: float = 0.95
) -> tuple[list[Interval], Array]:
    """How often each annotator picks the answer that is better, with nobody told which is (Dawid & Skene 1979, one coin).

    choice_AU: 1 where the first answer was preferred, 0 for the second, NaN for no label or no preference. Returns an
    interval an annotator (bootstrap over items; NaN for one without labels) and the posterior (U,) that the first answer
    is the better one. The labels fix accuracies up to "everybody is wrong"; the solution in which most are right is taken.
    """
    accuracy_A, posterior_U = _one_coin(choice_AU)
    rng = np.random.default_rng(seed)
    num_items = choice_AU.shape[1]
    drawn_SA = np.array([_one_coin(choice_AU[:, rng.integers(num_items, size=num_items)])[0] for _ in range(resamples)])
    low_A, high_A = np.quantile(drawn_SA, [(1 - coverage) / 2, (1 + coverage) / 2], axis=0)
    silent_A = np.isnan(choice_AU).all(axis=1)
    accuracy_A, low_A, high_A = (np.where(silent_A, np.nan, x_A) for x_A in (accuracy_A, low_A, high_A))
    intervals = [Interval(*map(float, ends)) for ends in zip(accuracy_A, low_A, high_A, strict=True)]
    return intervals, posterior_U


def _one_coin(choice_AU: Array, steps: int = 100) -> tuple[Array, Array]:
    labelled_AU = ~np.isnan(choice_AU)
    sign_AU = np.where(labelled_AU, 2 * np.nan_to_num(choice_AU) - 1, 0.0)
    posterior_U = (sign_AU.sum(0) / np.maximum(labelled_AU.sum(0), 1) + 1) / 2  # the share of votes to begin with
    accuracy_A = np.full(len(choice_AU), 0.7)
    for _ in range(steps):
        agree_A = (np.where(sign_AU > 0, posterior_U, 1 - posterior_U) * labelled_AU).sum(1)
        updated_A = np.clip((agree_A + 1) / (labelled_AU.sum(1) + 2), 0.01, 0.99)  # one right, one wrong a priori
        log_odds_U = (sign_AU * np.log(updated_A / (1 - updated_A))[:, None]).sum(0)
        posterior_U = 1 / (1 + np.exp(-np.clip(log_odds_U, -50, 50)))
        moved, accuracy_A = float(np.abs(updated_A - accuracy_A).max(initial=0)), updated_A
        if moved < 1e-6:
            break
    return accuracy_A, posterior_U


# Models


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One vote between two models; `left` was shown on the left. outcome: 1.0 left, 0.0 right, 0.5 tie."""

    left: str
    right: str
    outcome: float
    item: int


@dataclass(frozen=True, kw_only=True)
class Strengths:
    """A fitted model, each number with its interval.

    strength: log-odds against the mean of all models (they sum to 0). position: log-odds gained by being shown on the left.
    tie: log of the tie parameter; NaN where no vote was a tie.
    """

    strength: dict[str, Interval]
    position: Interval
    tie: Interval
    votes: int


def bradley_terry(
    votes: Sequence[Comparison], *, position: bool = True, ties: bool = True, ridge: float = 1e-6, level: float = 0.95
) -> Strengths:
    """Bradley-Terry with Davidson's ties (1970) and a position term, by maximum likelihood with Newton's method.

    With strengths s, position g and tie parameter t, the three outcomes have weights exp(s_left + g/2),
    exp(s_right - g/2) and exp((s_left + s_right)/2 + t). Intervals are from the sandwich covariance clustered by item,
    so that five votes on one pair do not count as five pairs. The tiny ridge only keeps a model that never won finite.

    ValueError without votes, with fewer than two models, or where a model is compared with itself.
    """
    names = sorted({name for vote in votes for name in (vote.left, vote.right)})
    if len(names) < 2:
        raise ValueError(f"{len(votes)} votes between {len(names)} models: at least two models are needed")
    if any(vote.left == vote.right for vote in votes):
        raise ValueError("a vote compares a model with itself; leave such votes out")
    if any(vote.outcome not in (0.0, 0.5, 1.0) for vote in votes):
        raise ValueError("outcomes must be 1.0 (left), 0.0 (right) or 0.5 (tie)")
    has_ties = ties and any(vote.outcome == 0.5 for vote in votes)
    votes = [vote for vote in votes if has_ties or vote.outcome != 0.5]
    at = {name: place for place, name in enumerate(names)}
    num = len(names)
    # Features of the outcomes (left, right, tie) in the parameters (strengths, position, tie).
    features_NOP = np.zeros((len(votes), 3, num + 2))
    for row, vote in enumerate(votes):
        left, right = at[vote.left], at[vote.right]
        features_NOP[row, 0, left] = features_NOP[row, 1, right] = 1.0
        features_NOP[row, 2, [left, right]] = 0.5
    if position:
        features_NOP[:, 0, num], features_NOP[:, 1, num] = 0.5, -0.5
    features_NOP[:, 2, num + 1] = 1.0
    if not has_ties:
        features_NOP = features_NOP[:, :2]
    chosen_N = np.array([{1.0: 0, 0.0: 1, 0.5: 2}[vote.outcome] for vote in votes], dtype=int)
    theta_P, score_NP, hessian_PP = _multinomial_logit(features_NOP, chosen_N, ridge)

    clusters = np.unique([vote.item for vote in votes], return_inverse=True)[1]
    meat_CP = np.zeros((clusters.max() + 1, num + 2))
    np.add.at(meat_CP, clusters, score_NP)
    bread_PP = np.linalg.inv(hessian_PP)
    centre_PP = np.eye(num + 2)
    centre_PP[:num, :num] -= 1 / num
    covariance_PP = centre_PP @ bread_PP @ (meat_CP.T @ meat_CP) @ bread_PP @ centre_PP.T
    estimate_P, error_P = centre_PP @ theta_P, np.sqrt(np.maximum(np.diag(covariance_PP), 0))

    from statistics import NormalDist

    z = NormalDist().inv_cdf((1 + level) / 2)
    ends = [Interval(float(e), float(e - z * s), float(e + z * s)) for e, s in zip(estimate_P, error_P, strict=True)]
    nothing = Interval(MISSING, MISSING, MISSING)
    return Strengths(
        strength=dict(zip(names, ends[:num], strict=True)),
        position=ends[num] if position else nothing,
        tie=ends[num + 1] if has_ties else nothing,
        votes=len(votes),
    )


def _multinomial_logit(features_NOP: Array, chosen_N: Array, ridge: float) -> tuple[Array, Array, Array]:
    """(parameters, score of each row, Hessian with the ridge) at the maximum; the likelihood is concave."""
    rows = np.arange(len(chosen_N))
    theta_P = np.zeros(features_NOP.shape[2])
    ridge_PP = ridge * np.eye(len(theta_P))

    def state(theta_P: Array) -> tuple[float, Array]:
        logits_NO = features_NOP @ theta_P
        logits_NO = logits_NO - logits_NO.max(1, keepdims=True)
        log_p_NO = logits_NO - np.log(np.exp(logits_NO).sum(1, keepdims=True))
        return float(log_p_NO[rows, chosen_N].sum() - ridge / 2 * theta_P @ theta_P), np.exp(log_p_NO)

    value, p_NO = state(theta_P)
    for _ in range(200):
        mean_NP = np.einsum("no,nop->np", p_NO, features_NOP)
        score_NP = features_NOP[rows, chosen_N] - mean_NP
        second_PP = np.einsum("no,nop,noq->pq", p_NO, features_NOP, features_NOP, optimize=True)
        hessian_PP = second_PP - mean_NP.T @ mean_NP + ridge_PP
        step_P = np.linalg.solve(hessian_PP, score_NP.sum(0) - ridge * theta_P)
        size = 1.0
        while (new := state(theta_P + size * step_P))[0] < value - 1e-12 and size > 1e-8:
            size /= 2  # Newton overshoots where a model has won or lost almost everything
        theta_P = theta_P + size * step_P
        value, p_NO = new
        if np.abs(size * step_P).max() < 1e-10:
            break
    return theta_P, score_NP, hessian_PP


def win_probability(strengths: Strengths, a: str, b: str) -> float:
    """Probability that `a` is preferred to `b` when both sides are as likely and ties are left out."""
    gap = strengths.strength[a].mean - strengths.strength[b].mean
    return 1 / (1 + math.exp(-gap))
