"""How far annotators agree, how reliable each is, and how strong the models are that they compared.

Plain functions on arrays. Everything that is estimated comes with an interval; where the data say nothing (all labels
alike, one annotator) the estimate is NaN rather than 0 or 1.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from plumbline.eval.stats.intervals import Interval, student_quantile

Array = NDArray[Any]
MISSING = float("nan")
RIDGE = 1e-9
FARTHEST = 60.0  # log-odds beyond which an end is not looked for


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
    votes: Sequence[Comparison], *, position: bool = True, ties: bool = True, prior: float = 1.0, level: float = 0.95
) -> Strengths:
    """Bradley-Terry with Davidson's ties (1970) and a position term: the mode of a posterior, with profile intervals.

    With strengths s, position g and tie parameter t, the three outcomes have weights exp(s_left + g/2),
    exp(s_right - g/2) and exp((s_left + s_right)/2 + t). The prior is `prior` votes won and as many lost by each model against
    the average one, and the same on g and t: no vote is lost to it, but a model that won all of three is not infinitely strong.

    An interval holds the values whose best fit is at most `z**2` worse in twice the log posterior, which is right where few votes
    make the curve lopsided (coverage by number of votes: docs/results.md). Where items have several votes, so that five on one
    pair are not five pairs, the bound grows by the sandwich's design effect, clustered by item, and z is Student's with a degree
    less than there are items; votes on one item alone give no interval (NaN).

    ValueError without votes, with fewer than two models, or where a model is compared with itself.
    """
    names = sorted({name for vote in votes for name in (vote.left, vote.right)})
    if len(names) < 2:
        raise ValueError(f"{len(votes)} votes between {len(names)} models: at least two models are needed")
    if any(vote.left == vote.right for vote in votes):
        raise ValueError("a vote compares a model with itself; leave such votes out")
    if any(vote.outcome not in (0.0, 0.5, 1.0) for vote in votes):
        raise ValueError("outcomes must be 1.0 (left), 0.0 (right) or 0.5 (tie)")
    if not prior >= 0:
        raise ValueError(f"{prior=}: needs 0 or more votes")
    has_ties = ties and any(vote.outcome == 0.5 for vote in votes)
    votes = [vote for vote in votes if has_ties or vote.outcome != 0.5]
    num = len(names)
    centre_QP = np.eye(num + 2)  # what is asked for: strengths less their mean, position, tie
    centre_QP[:num, :num] -= 1 / num
    posterior = _Posterior(votes, names, position=position, ties=has_ties, prior=prior, prior_QP=centre_QP)
    theta_P = posterior.mode(np.zeros(num + 2))
    effect_Q, z = _design_effects(votes, posterior, theta_P, centre_QP, level)
    nothing = Interval(MISSING, MISSING, MISSING)
    asked = [True] * num + [position, has_ties]
    ends = [
        posterior.interval(theta_P, centre_QP[q], z * math.sqrt(effect_Q[q])) if asked[q] else nothing
        for q in range(num + 2)
    ]
    return Strengths(
        strength=dict(zip(names, ends[:num], strict=True)), position=ends[num], tie=ends[num + 1], votes=len(votes)
    )


class _Posterior:
    """Log posterior of the parameters (strengths, position, tie); equal votes are counted once, with their number."""

    def __init__(
        self,
        votes: Sequence[Comparison],
        names: Sequence[str],
        *,
        position: bool,
        ties: bool,
        prior: float,
        prior_QP: Array,
    ) -> None:
        at, num = {name: place for place, name in enumerate(names)}, len(names)
        cells: dict[tuple[str, str, float], int] = {}
        self.cell_of_N = np.array(
            [cells.setdefault((v.left, v.right, v.outcome), len(cells)) for v in votes], dtype=int
        )
        self.count_C = np.bincount(self.cell_of_N, minlength=len(cells)).astype(float)
        self.chosen_C = np.array([{1.0: 0, 0.0: 1, 0.5: 2}[outcome] for _, _, outcome in cells], dtype=int)
        features_COP = np.zeros((len(cells), 3, num + 2))  # of the outcomes left, right, tie
        for row, (left, right, _) in enumerate(cells):
            features_COP[row, 0, at[left]] = features_COP[row, 1, at[right]] = 1.0
            features_COP[row, 2, [at[left], at[right]]] = 0.5
        if position:
            features_COP[:, 0, num], features_COP[:, 1, num] = 0.5, -0.5
        features_COP[:, 2, num + 1] = 1.0
        self.features_COP = features_COP if ties else features_COP[:, :2]
        self.prior, self.prior_QP = prior, prior_QP
        # What no vote says, the mean of the strengths, is held at 0; a tiny ridge holds the rest where there is no prior either.
        self.ridge_PP = RIDGE * np.eye(num + 2)
        self.ridge_PP[:num, :num] += 1 / num

    def value(self, theta_P: Array) -> float:
        """The log posterior."""
        u_Q = self.prior_QP @ theta_P
        believed = -self.prior * (np.logaddexp(0, u_Q) + np.logaddexp(0, -u_Q)).sum()
        logits_CO = self.features_COP @ theta_P
        logits_CO -= np.logaddexp.reduce(logits_CO, axis=1, keepdims=True)
        said = (self.count_C * logits_CO[np.arange(len(self.chosen_C)), self.chosen_C]).sum()
        return float(said + believed - theta_P @ self.ridge_PP @ theta_P / 2)

    def slopes(self, theta_P: Array) -> tuple[Array, Array, Array]:
        """(gradient (P,), negative Hessian (P, P), score of one vote in each cell (C, P)) at a point."""
        logits_CO = self.features_COP @ theta_P
        p_CO = np.exp(logits_CO - np.logaddexp.reduce(logits_CO, axis=1, keepdims=True))
        mean_CP = (p_CO[:, :, None] * self.features_COP).sum(1)
        score_CP = self.features_COP[np.arange(len(self.chosen_C)), self.chosen_C] - mean_CP
        flat_FP = self.features_COP.reshape(-1, len(theta_P))
        second_PP = (flat_FP * (p_CO * self.count_C[:, None]).reshape(-1, 1)).T @ flat_FP
        half_Q = np.tanh(self.prior_QP @ theta_P / 2)
        gradient_P = self.count_C @ score_CP - self.prior * half_Q @ self.prior_QP - self.ridge_PP @ theta_P
        hessian_PP = second_PP - (mean_CP * self.count_C[:, None]).T @ mean_CP + self.ridge_PP
        hessian_PP += (self.prior_QP * (self.prior * (1 - half_Q**2) / 2)[:, None]).T @ self.prior_QP
        return gradient_P, hessian_PP, score_CP

    def mode(self, theta_P: Array, hold_P: Array | None = None) -> Array:
        """The best point, by Newton's method from `theta_P` on; with `hold_P` the best with this sum of parameters as it is there."""
        value, size = self.value(theta_P), len(theta_P)
        for _ in range(100):
            gradient_P, system, _ = self.slopes(theta_P)
            if hold_P is not None:
                system = np.block([[system, hold_P[:, None]], [hold_P[None], np.zeros((1, 1))]])
                gradient_P = np.append(gradient_P, 0.0)
            step_P, length = np.linalg.solve(system, gradient_P)[:size], 1.0
            while (new := self.value(theta_P + length * step_P)) < value - 1e-12 and length > 1e-8:
                length /= 2  # Newton overshoots where a model has won or lost almost everything
            risen, theta_P, value = new - value, theta_P + length * step_P, new
            if np.abs(length * step_P).max() < 1e-9 or risen < 1e-11:
                break
        return theta_P

    def interval(self, best_P: Array, asked_P: Array, z: float) -> Interval:
        """The profile interval of one sum of parameters: as far as twice the log posterior falls by z squared."""
        middle = float(asked_P @ best_P)
        if not math.isfinite(z):
            return Interval(middle, MISSING, MISSING)
        along_P = np.linalg.solve(self.slopes(best_P)[1], asked_P)
        error, top = math.sqrt(max(float(asked_P @ along_P), 1e-12)), self.value(best_P)
        along_P = along_P / (asked_P @ along_P)  # a unit of what is asked for
        ends = []
        for side in (-1.0, 1.0):
            away, theta_P = side * z * error, best_P
            for _ in range(60):
                theta_P = self.mode(theta_P + (middle + away - asked_P @ theta_P) * along_P, asked_P)
                fallen = math.sqrt(max(2 * (top - self.value(theta_P)), 1e-12))
                if abs(fallen - z) < 1e-4 * z or abs(away) > FARTHEST:
                    break
                away *= min(4.0, z / fallen)  # the root of the fall is nearly straight
            ends.append(middle + away)
        return Interval(middle, *ends)


def _design_effects(
    votes: Sequence[Comparison], posterior: _Posterior, theta_P: Array, asked_QP: Array, level: float
) -> tuple[Array, float]:
    """How much votes on the same items widen each variance, at least 1, and the quantile that fits the number of items."""
    clusters_N = np.unique([vote.item for vote in votes], return_inverse=True)[1]
    items = int(clusters_N.max()) + 1
    if items == len(votes):
        return np.ones(len(asked_QP)), NormalDist().inv_cdf((1 + level) / 2)
    if items == 1:
        return np.ones(len(asked_QP)), math.inf
    _, hessian_PP, score_CP = posterior.slopes(theta_P)
    meat_GP = np.zeros((items, len(theta_P)))
    np.add.at(meat_GP, clusters_N, score_CP[posterior.cell_of_N])
    bread_QP = asked_QP @ np.linalg.inv(hessian_PP)
    robust_Q = ((bread_QP @ meat_GP.T) ** 2).sum(1) * items / (items - 1)
    model_Q = np.maximum((bread_QP * asked_QP).sum(1), 1e-12)
    return np.maximum(robust_Q / model_Q, 1.0), student_quantile((1 + level) / 2, items - 1)


def win_probability(strengths: Strengths, a: str, b: str) -> float:
    """Probability that `a` is preferred to `b` when both sides are as likely and ties are left out."""
    gap = strengths.strength[a].mean - strengths.strength[b].mean
    return 1 / (1 + math.exp(-gap))
