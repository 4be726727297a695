"""Intervals and tests against SciPy, formulas worked by hand, and slow references."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import NormalIndPower
from statsmodels.stats.proportion import proportion_confint, proportion_effectsize

from plumbline.eval.stats.intervals import (
    auc,
    bootstrap_mean,
    cluster_index,
    holm,
    length_controlled_gain,
    mcnemar_exact,
    paired_bootstrap,
    prompts_needed,
    unscored_band,
    wilson,
)


@pytest.mark.parametrize("successes, n", [(0, 1), (1, 1), (0, 100), (5, 100), (16, 313), (50, 100), (313, 313)])
@pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
def test_wilson_equals_scipy(successes, n, level):
    want = scipy.stats.binomtest(successes, n).proportion_ci(level, method="wilson")
    got = wilson(successes, n, level)
    assert got.mean == successes / n
    np.testing.assert_allclose((got.low, got.high), (want.low, want.high), atol=1e-12)


def test_wilson_by_hand():
    low, high = wilson(5, 100)[1:]  # often quoted: 5 of 100 is 2.2 to 11.2 percent
    assert (round(low, 3), round(high, 3)) == (0.022, 0.112)


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_rate_and_mirrors(counts):
    successes, n = counts
    rate, mirrored = wilson(successes, n), wilson(n - successes, n)
    assert 0 <= rate.low <= rate.mean <= rate.high <= 1
    assert rate.low == pytest.approx(1 - mirrored.high, abs=1e-12)


@pytest.mark.parametrize("successes, n, level", [(1, 0, 0.95), (-1, 5, 0.95), (6, 5, 0.95), (1, 5, 1.0), (1, 5, 95)])
def test_wilson_refuses(successes, n, level):
    with pytest.raises(ValueError, match="needs"):
        wilson(successes, n, level)


def test_bootstrap_mean_is_near_scipy_and_the_normal_interval():
    values = np.random.default_rng(0).normal(3, 2, 200)
    got = bootstrap_mean(values)
    want = scipy.stats.bootstrap((values,), np.mean, n_resamples=10_000, method="percentile", rng=1).confidence_interval
    spread = values.std() / math.sqrt(200)  # resampling error of an end is about 0.02 of the spread
    assert got.mean == pytest.approx(values.mean())
    assert got.low == pytest.approx(want.low, abs=0.08 * spread)
    assert got.high == pytest.approx(want.high, abs=0.08 * spread)
    assert got.low == pytest.approx(values.mean() - 1.96 * spread, abs=0.15 * spread)


def test_bootstrap_of_few_values_equals_all_resamples():
    values = [0.0, 1.0, 5.0]
    means = sorted(sum(draw) / 3 for draw in itertools.product(values, repeat=3))
    got = bootstrap_mean(values, resamples=200_000, level=0.8)
    want = np.quantile(means, [0.1, 0.9])
    np.testing.assert_allclose((got.low, got.high), want, atol=1e-12)  # discrete: the same step of the distribution


def test_bootstrap_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(5)
    held = 0
    for trial in range(300):
        interval = bootstrap_mean(rng.exponential(1.0, 60), resamples=500, seed=trial)
        held += interval.low <= 1.0 <= interval.high
    assert 0.89 <= held / 300 <= 0.98  # percentile intervals of a skewed mean are a little short


def test_same_seed_same_interval_and_chunks_do_not_matter(monkeypatch):
    values = np.arange(50.0)
    whole = bootstrap_mean(values, seed=3)
    assert bootstrap_mean(values, seed=3) == whole != bootstrap_mean(values, seed=4)
    monkeypatch.setattr("plumbline.eval.stats.intervals.CHUNK", 7 * 50)
    assert bootstrap_mean(values, seed=3) == whole


def test_clusters_of_one_change_nothing_and_copies_do_not_narrow():
    values = np.random.default_rng(2).normal(0, 1, 40)
    plain = bootstrap_mean(values)
    assert bootstrap_mean(values, clusters=range(40)) == plain
    copied = bootstrap_mean(np.repeat(values, 5), clusters=np.repeat(np.arange(40), 5).tolist())
    np.testing.assert_allclose(copied, plain, atol=1e-12)  # five answers of each prompt, all alike: no news
    naive = bootstrap_mean(np.repeat(values, 5))
    assert naive.high - naive.low < 0.6 * (plain.high - plain.low)


def test_unequal_clusters_keep_the_mean_over_values():
    got = bootstrap_mean([1.0, 1.0, 1.0, 5.0], clusters=["a", "a", "a", "b"], resamples=4000)
    assert got.mean == 2.0
    assert (got.low, got.high) == (1.0, 5.0)  # only a, or only b


def test_cluster_index_keeps_order_of_first_appearance():
    assert cluster_index(["b", "a", "b", "c"], 4).tolist() == [0, 1, 0, 2]
    with pytest.raises(ValueError, match="one label a value"):
        cluster_index(["a"], 2)


def test_paired_bootstrap_sees_what_a_shared_prompt_hides():
    rng = np.random.default_rng(1)
    difficulty = rng.normal(0, 10, 100)
    before, after = difficulty + rng.normal(0, 0.5, 100), difficulty + 0.5 + rng.normal(0, 0.5, 100)
    gain = paired_bootstrap(after, before)
    assert gain.low > 0 and gain.mean == pytest.approx((after - before).mean())
    with pytest.raises(ValueError, match="differ"):
        paired_bootstrap(after, before[:-1])


def test_one_value_has_no_interval():
    mean, low, high = bootstrap_mean([2.5])
    assert mean == 2.5 and math.isnan(low) and math.isnan(high)


@pytest.mark.parametrize("values", [[], [[1.0, 2.0]], [1.0, float("nan")], [float("inf")]])
def test_values_must_be_finite_and_flat(values):
    with pytest.raises(ValueError):
        bootstrap_mean(values)


# ---- McNemar --------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
@settings(deadline=None, max_examples=30)
def test_mcnemar_is_a_binomial_test_on_changed_pairs(pairs):
    before, after = zip(*pairs, strict=True)
    gone, new = sum(b and not a for b, a in pairs), sum(a and not b for b, a in pairs)
    want = scipy.stats.binomtest(gone, gone + new, 0.5).pvalue if gone + new else 1.0
    got = mcnemar_exact(before, after)
    assert (got.only_before, got.only_after) == (gone, new)
    assert got.p == pytest.approx(want, abs=1e-12)


def test_mcnemar_by_hand():
    assert mcnemar_exact([0] * 6, [1] * 6).p == pytest.approx(2 / 64)  # six of six changed one way
    assert mcnemar_exact([1, 1, 0], [1, 1, 0]).p == 1.0
    with pytest.raises(ValueError, match="same length"):
        mcnemar_exact([True], [True, False])


# ---- length ---------------------------------------------------------------------------------------------------------


def test_intercept_equals_scipy_linregress():
    rng = np.random.default_rng(0)
    extra = rng.normal(20, 10, 80)
    gain = 0.3 + 0.05 * extra + rng.normal(0, 0.2, 80)
    got = length_controlled_gain(gain, extra)
    assert got.mean == pytest.approx(scipy.stats.linregress(extra, gain).intercept, abs=1e-12)
    assert got.low < 0.3 < got.high


def test_gain_that_is_only_length_vanishes():
    rng = np.random.default_rng(1)
    extra = rng.normal(30, 15, 200)
    gain = 0.02 * extra + rng.normal(0, 0.3, 200)
    assert bootstrap_mean(gain).low > 0.4
    left = length_controlled_gain(gain, extra)
    assert left.low < 0 < left.high


def test_length_without_variation():
    assert length_controlled_gain([1.0, 2.0, 3.0], [0, 0, 0]).mean == 2.0  # equal lengths: the plain mean
    assert math.isnan(length_controlled_gain([1.0, 2.0, 3.0], [7, 7, 7]).mean)  # cannot be told apart
    with pytest.raises(ValueError, match="one of each"):
        length_controlled_gain([1.0, 2.0], [0])


# ---- AUC ------------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=40))
def test_auc_counts_pairs(rows):
    positives, negatives = [s for s, y in rows if y], [s for s, y in rows if not y]
    if not positives or not negatives:
        with pytest.raises(ValueError, match="needs both"):
            auc([s for s, _ in rows], [y for _, y in rows])
        return
    pairs = [(p > n) + 0.5 * (p == n) for p in positives for n in negatives]
    got = auc([s for s, _ in rows], [y for _, y in rows])
    assert got == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)
    want = scipy.stats.mannwhitneyu(positives, negatives).statistic / len(pairs)
    assert got == pytest.approx(want, abs=1e-12)


# ---- against statsmodels and SciPy to 1e-9 --------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(
    st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.sampled_from([0.9, 0.95, 0.99])
)
def test_wilson_equals_statsmodels(counts, level):
    low, high = proportion_confint(*counts, alpha=1 - level, method="wilson")
    found = wilson(*counts, level)
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-9)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_mcnemar_equals_statsmodels(pairs):
    before, after = zip(*pairs, strict=True)
    table = [[sum(p == (a, b) for p in pairs) for b in (True, False)] for a in (True, False)]
    if table[0][1] + table[1][0] == 0:  # nothing changed: statsmodels has no p
        assert mcnemar_exact(before, after).p == 1
        return
    assert mcnemar_exact(before, after).p == pytest.approx(mcnemar(table, exact=True).pvalue, abs=1e-9)


def test_bootstrap_equals_scipy_draw_for_draw():
    values = np.random.default_rng(3).normal(2, 1, 40)
    want = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=2000, method="percentile", rng=np.random.default_rng(5), vectorized=True
    ).confidence_interval
    found = bootstrap_mean(values, seed=5, resamples=2000)
    assert (found.low, found.high) == pytest.approx((want.low, want.high), abs=1e-9)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_equals_statsmodels(p_values):
    assert holm(p_values) == pytest.approx(multipletests(p_values, method="holm")[1].tolist(), abs=1e-9)


def test_unscored_band_by_hand():
    assert unscored_band(30, 40, 10) == (0.6, 0.8)  # 30 of 50, or 40 of 50
    with pytest.raises(ValueError, match="no rows"):
        unscored_band(0, 0, 0)


def test_prompts_needed_agrees_with_statsmodels_and_with_simulation():
    want = NormalIndPower().solve_power(proportion_effectsize(0.35, 0.30), power=0.8, alpha=0.05)
    assert prompts_needed(0.30, 0.05, paired=False) == pytest.approx(want, rel=1e-3)
    n = prompts_needed(0.30, 0.10, agreement=0.7)
    rng, found, rate, change = np.random.default_rng(0), 0, 0.30, 0.10
    independent = rate * (1 - rate - change) + (rate + change) * (1 - rate)
    differ = change + 0.3 * (independent - change)
    up, down = (differ + change) / 2, (differ - change) / 2
    for _ in range(400):
        only_after, only_before, _ = rng.multinomial(n, [up, down, 1 - differ])
        before = [1] * only_before + [0] * only_after
        found += mcnemar_exact(before, [1 - b for b in before]).p < 0.05
    assert 0.70 <= found / 400 <= 0.90  # the exact test gives away a little of the 0.8
    with pytest.raises(ValueError, match="sum in"):
        prompts_needed(0.98, 0.05)
