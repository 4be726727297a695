"""Agreement and strengths against other implementations, by hand, at the edges, and on data of known truth."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import minimize
from sklearn.metrics import cohen_kappa_score

from plumbline.apps.label.study.agreement import (
    Comparison,
    alpha_interval,
    annotator_accuracy,
    bradley_terry,
    cohen_kappa,
    fleiss_kappa,
    krippendorff_alpha,
    raw_agreement,
    win_probability,
)

NAN = float("nan")


def slow_alpha(values, level):
    """Krippendorff's alpha from its definition: mean distance within items over mean distance of all pairs."""
    units = [[v for v in column if not math.isnan(v)] for column in np.asarray(values).T]
    units = [unit for unit in units if len(unit) >= 2]
    flat = [v for unit in units for v in unit]

    def distance(a, b):
        if level == "nominal":
            return float(a != b)
        if level == "interval":
            return (a - b) ** 2
        low, high = min(a, b), max(a, b)
        between = sum(low <= v <= high for v in flat) - (sum(v == a for v in flat) + sum(v == b for v in flat)) / 2
        return float(between) ** 2 if a != b else 0.0

    n = len(flat)
    expected = sum(distance(a, b) for a in flat for b in flat) / (n * (n - 1)) if n > 1 else 0
    if expected == 0:
        return NAN
    observed = sum(sum(distance(a, b) for a in unit for b in unit) / (len(unit) - 1) for unit in units) / n
    return 1 - observed / expected


KRIPPENDORFF_2011 = np.array(  # the example of his paper, four observers and twelve units
    [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, NAN, NAN, NAN],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, NAN, 3],
        [NAN, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, NAN],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, NAN],
    ]
)


@pytest.mark.parametrize("level, published", [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)])
def test_alpha_of_the_published_example(level, published):
    assert krippendorff_alpha(KRIPPENDORFF_2011, level) == pytest.approx(published, abs=5e-4)


@settings(max_examples=60, deadline=None)
@given(
    arrays(float, st.tuples(st.integers(2, 5), st.integers(1, 8)), elements=st.sampled_from([NAN, 0.0, 1.0, 2.0, 5.0])),
    st.sampled_from(["nominal", "ordinal", "interval"]),
)
def test_alpha_is_the_definition(values, level):
    want = slow_alpha(values, level)
    got = krippendorff_alpha(values, level)
    assert math.isnan(got) if math.isnan(want) else got == pytest.approx(want, abs=1e-9)


def test_alpha_of_complete_labels_follows_from_other_statistics():
    """With every label there, n in all: 1 - alpha = (1 - kappa) (n - 1) / n with Fleiss' kappa for nominal labels, and mean
    squares within items over those of all labels for interval ones (Krippendorff 2011)."""
    from statsmodels.stats import inter_rater

    rng = np.random.default_rng(1)
    for annotators, items in ((2, 30), (3, 10), (6, 25)):
        values_AU = rng.choice([-1.0, 0.0, 1.0], size=(annotators, items), p=[0.2, 0.3, 0.5])
        counts_UK, _ = inter_rater.aggregate_raters(values_AU.T)
        n = values_AU.size
        want = 1 - (1 - inter_rater.fleiss_kappa(counts_UK)) * (n - 1) / n
        assert krippendorff_alpha(values_AU, "nominal") == pytest.approx(want, abs=1e-9)
        within = ((values_AU - values_AU.mean(0)) ** 2).sum() / (items * (annotators - 1))
        want = 1 - within / values_AU.var(ddof=1)
        assert krippendorff_alpha(values_AU, "interval") == pytest.approx(want, abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(arrays(int, st.tuples(st.integers(2, 12), st.just(4)), elements=st.integers(0, 3)))
def test_fleiss_kappa_is_that_of_statsmodels(ratings_UA):
    from statsmodels.stats import inter_rater

    counts_UK = inter_rater.aggregate_raters(ratings_UA, n_cat=4)[0]
    if (counts_UK.sum(0) > 0).sum() == 1:
        assert math.isnan(fleiss_kappa(counts_UK))
    else:
        assert fleiss_kappa(counts_UK) == pytest.approx(inter_rater.fleiss_kappa(counts_UK), abs=1e-9)


def test_alpha_at_the_edges():
    assert math.isnan(krippendorff_alpha(np.ones((3, 5))))  # no variation: undefined, not 1
    assert math.isnan(krippendorff_alpha(np.array([[1.0, NAN], [NAN, 2.0]])))  # nobody shares an item
    assert krippendorff_alpha(np.array([[1.0, 2.0], [1.0, 2.0]])) == 1.0
    assert krippendorff_alpha(np.array([[1.0, 2.0], [2.0, 1.0]])) < 0
    with pytest.raises(ValueError, match="level"):
        krippendorff_alpha(np.ones((2, 2)), "ratio")


def test_alpha_interval_covers_the_truth():
    """Annotators who say the truth with probability 0.8 on two even classes: alpha = (2 * 0.8 - 1) ** 2."""
    covered = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        truth = rng.integers(2, size=150)
        values = np.where(rng.random((3, 150)) < 0.8, truth, 1 - truth).astype(float)
        interval = alpha_interval(values, resamples=200, seed=seed)
        covered += interval.low <= 0.36 <= interval.high
    assert covered >= 34


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=40))
def test_cohen_kappa_is_that_of_scikit_learn(pairs):
    first, second = map(list, zip(*pairs, strict=True))
    for weights in (None, "linear", "quadratic"):
        got = cohen_kappa(first, second, weights)
        if len(set(first + second)) == 1:
            assert math.isnan(got)
        else:
            assert got == pytest.approx(cohen_kappa_score(first, second, weights=weights), abs=1e-9)


def test_fleiss_kappa_of_the_1971_layout():
    counts = np.array(  # the worked example of many textbooks: ten subjects, fourteen raters, kappa 0.210
        [[0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1],
         [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7]]
    )  # fmt: skip
    assert fleiss_kappa(counts) == pytest.approx(0.20993070442195522, abs=1e-9)
    assert fleiss_kappa(np.array([[2, 0], [0, 2]])) == 1.0
    assert math.isnan(fleiss_kappa(np.array([[2, 0], [2, 0]])))
    with pytest.raises(ValueError, match="same number"):
        fleiss_kappa(np.array([[2, 0], [1, 0]]))


def test_raw_agreement_by_hand():
    assert raw_agreement(np.array([[1, 1, 2.0], [1, 2, NAN], [1, 1, NAN]])) == pytest.approx(4 / 6)
    assert math.isnan(raw_agreement(np.array([[1.0, NAN]])))


def simulate(strengths, *, votes, position, tie, seed):
    rng = np.random.default_rng(seed)
    names = sorted(strengths)
    comparisons = []
    for item in range(votes):
        left, right = rng.choice(names, size=2, replace=False)
        weights = np.exp(
            [
                strengths[left] + position / 2,
                strengths[right] - position / 2,
                (strengths[left] + strengths[right]) / 2 + tie,
            ]
        )
        outcome = rng.choice([1.0, 0.0, 0.5], p=weights / weights.sum())
        comparisons.append(Comparison(left=left, right=right, outcome=float(outcome), item=item))
    return comparisons


def slow_fit(votes, *, ridge=1e-6):
    """The same likelihood, written as it is said, maximised by scipy."""
    names = sorted({n for v in votes for n in (v.left, v.right)})

    def loss(theta):
        s, g, t = dict(zip(names, theta, strict=False)), theta[-2], theta[-1]
        total = 0.0
        for v in votes:
            left, right = s[v.left] + g / 2, s[v.right] - g / 2
            tie = (s[v.left] + s[v.right]) / 2 + t
            said = {1.0: left, 0.0: right, 0.5: tie}[v.outcome]
            total += said - np.log(np.exp([left, right, tie]).sum())
        return -total + ridge / 2 * theta @ theta

    def gradient(theta):  # to the last digit, by a step along the imaginary axis: differences leave 1e-6 to chance
        return [loss(theta + step).imag / 1e-30 for step in 1e-30j * np.eye(len(theta))]

    theta = minimize(loss, np.zeros(len(names) + 2), jac=gradient, method="BFGS", options={"gtol": 1e-9}).x
    return dict(zip(names, theta[:-2] - theta[:-2].mean(), strict=True)), theta[-2], theta[-1]


def test_bradley_terry_is_the_maximum_of_its_likelihood():
    votes = simulate({"a": 0.0, "b": 0.7, "c": -0.4}, votes=300, position=0.3, tie=-0.5, seed=0)
    fitted = bradley_terry(votes, prior=0)
    strengths, position, tie = slow_fit(votes)
    for name, value in strengths.items():
        assert fitted.strength[name].mean == pytest.approx(value, abs=1e-6)
    assert fitted.position.mean == pytest.approx(position, abs=1e-6)
    assert fitted.tie.mean == pytest.approx(tie, abs=1e-6)


def test_bradley_terry_without_ties_is_the_logit_of_statsmodels():
    """Strengths, position and their sandwich errors, where each item has one vote."""
    import statsmodels.api as sm

    strengths = {"a": 0.0, "b": 0.7, "c": -0.4, "d": 0.2}
    votes = [v for v in simulate(strengths, votes=500, position=0.3, tie=-9.0, seed=3) if v.outcome != 0.5]
    fitted = bradley_terry(votes, ties=False, prior=0)
    x_NF = np.array([[(v.left == n) - (v.right == n) for n in "abc"] + [1] for v in votes], dtype=float)
    want = sm.Logit([v.outcome for v in votes], x_NF).fit(disp=0, tol=1e-12, cov_type="HC0")
    for name, value in zip("abc", want.params[:3], strict=True):
        assert fitted.strength[name].mean - fitted.strength["d"].mean == pytest.approx(value, abs=1e-6)
    assert fitted.position.mean == pytest.approx(want.params[3], abs=1e-6)
    assert (fitted.position.high - fitted.position.low) / 2 / 1.959963985 == pytest.approx(want.bse[3], rel=0.03)


def test_bradley_terry_of_two_models_by_hand():
    votes = [Comparison(left="a", right="b", outcome=1.0, item=n) for n in range(30)]
    votes += [Comparison(left="b", right="a", outcome=1.0, item=30 + n) for n in range(10)]
    fitted = bradley_terry(votes, position=False, ties=False, prior=0)
    assert fitted.strength["a"].mean - fitted.strength["b"].mean == pytest.approx(math.log(3), abs=1e-5)
    assert win_probability(fitted, "a", "b") == pytest.approx(0.75, abs=1e-5)
    # The ends are where twice the log likelihood of 30 and 10 has fallen by 1.96 squared; a strength is half of the gap.
    for end in (fitted.strength["a"].low, fitted.strength["a"].high):
        p = 1 / (1 + math.exp(-2 * end))
        fall = 2 * (30 * math.log(0.75 / p) + 10 * math.log(0.25 / (1 - p)))
        assert fall == pytest.approx(1.959964**2, rel=1e-3)


@pytest.mark.parametrize("votes", [1, 2, 3, 4, 6, 10])
def test_few_votes_between_equal_models_seldom_tell_them_apart(votes):
    """All outcomes that so many votes can have, each with its probability, sides half and half: no draw is needed."""
    missed = 0.0
    for left_wins in range(votes + 1):
        # a is on the left in all: by symmetry of the sides this is the harshest case for the position term
        cast = [
            Comparison(
                left="a" if n % 2 else "b",
                right="b" if n % 2 else "a",
                outcome=float((n < left_wins) == bool(n % 2)),
                item=n,
            )
            for n in range(votes)
        ]
        interval = bradley_terry(cast).strength["a"]
        missed += math.comb(votes, left_wins) / 2**votes * (not interval.low <= 0 <= interval.high)
    assert missed <= 0.08


def test_one_item_says_nothing_however_many_vote_on_it_and_two_alike_count_as_one():
    alone = bradley_terry([Comparison(left="a", right="b", outcome=1.0, item=1)] * 5).strength["a"]
    assert math.isnan(alone.low) and math.isnan(alone.high) and alone.mean > 0
    one = [
        Comparison(left="a" if n % 3 else "b", right="b" if n % 3 else "a", outcome=float(n % 4 > 0), item=n)
        for n in range(24)
    ]
    single, double = bradley_terry(one).strength["a"], bradley_terry([v for v in one for _ in range(2)]).strength["a"]
    assert double.high - double.low > 0.9 * (single.high - single.low)


def test_unanimous_votes_are_finite_and_symmetric():
    fitted = bradley_terry([Comparison(left="a", right="b", outcome=0.5, item=n) for n in range(2)]).strength
    assert fitted["a"].low < 0 < fitted["a"].high and fitted["a"].low == pytest.approx(-fitted["b"].high, abs=1e-3)
    sides = [("a", "b"), ("b", "a")] * 100
    votes = [
        Comparison(left=left, right=right, outcome=float(left == "a"), item=n) for n, (left, right) in enumerate(sides)
    ]
    won = bradley_terry(votes).strength
    assert 0 < won["a"].low < won["a"].mean < won["a"].high < 60
    assert won["b"].high < 0 and won["a"].mean == pytest.approx(-won["b"].mean, abs=1e-6)


def test_bradley_terry_intervals_cover_strengths_position_and_ties():
    truth, hits, asked = {"a": -0.6, "b": 0.0, "c": 0.6}, 0, 0
    for seed in range(30):
        fitted = bradley_terry(simulate(truth, votes=400, position=0.35, tie=-0.7, seed=seed))
        checks = [(fitted.strength[name], value) for name, value in truth.items()]
        for interval, value in [*checks, (fitted.position, 0.35), (fitted.tie, -0.7)]:
            hits, asked = hits + (interval.low <= value <= interval.high), asked + 1
    assert 0.90 <= hits / asked <= 0.99


def test_bradley_terry_stays_finite_where_a_model_never_wins_and_refuses_nonsense():
    fitted = bradley_terry([Comparison(left="a", right="b", outcome=1.0, item=n) for n in range(5)])
    assert math.isfinite(fitted.strength["a"].mean) and fitted.strength["a"].mean > fitted.strength["b"].mean
    with pytest.raises(ValueError, match="two models"):
        bradley_terry([])
    with pytest.raises(ValueError, match="itself"):
        bradley_terry([Comparison(left=m, right="a", outcome=1.0, item=0) for m in "ab"])


def test_annotator_accuracy_recovers_the_noise_of_each():
    """Annotators who are right 95, 85, 75 and 60 percent of the time, each on most of the items."""
    truth_A, hits = np.array([0.95, 0.85, 0.75, 0.6]), 0
    for seed in range(10):
        rng = np.random.default_rng(seed)
        better_U = rng.integers(2, size=300)
        choice_AU = np.where(rng.random((4, 300)) < truth_A[:, None], better_U, 1 - better_U).astype(float)
        choice_AU[rng.random((4, 300)) < 0.2] = NAN
        intervals, posterior_U = annotator_accuracy(choice_AU, resamples=60, seed=seed)
        hits += sum(i.low <= p <= i.high for i, p in zip(intervals, truth_A, strict=True))
        assert ((posterior_U > 0.5) == better_U).mean() > 0.88
    assert hits >= 34
