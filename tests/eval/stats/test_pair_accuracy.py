"""Reports on margins: counts by hand, calibration on simulated scorers, leaks."""

import math

import numpy as np
import pytest

from plumbline.eval.plotting.pair_plots import plot_pair_reports
from plumbline.eval.stats.intervals import wilson
from plumbline.eval.stats.pair_accuracy import (
    accuracy,
    by_subset,
    calibration_bins,
    confident_mistakes,
    ece,
    fit_temperature,
    fold_of,
    length_controlled_accuracy,
    margin_histogram,
    pair_report,
    scaled_confidence,
    shared_prompts,
)


def simulated(n, scale, seed=0):
    """Margins of a scorer whose log-odds are true, times `scale`."""
    rng = np.random.default_rng(seed)
    odds = rng.normal(0, 2, n)
    right = rng.random(n) < 1 / (1 + np.exp(-np.abs(odds)))
    return np.where(right, np.abs(odds), -np.abs(odds)) * scale


def test_accuracy_counts_a_margin_of_zero_as_half():
    share = accuracy([1.0, -1.0, 0.0, 2.0])
    assert share.mean == 2.5 / 4 and share.n == 4
    assert (share.low, share.high) == wilson(2, 4)[1:]
    assert math.isnan(accuracy([]).mean)
    with pytest.raises(ValueError, match="finite"):
        accuracy([1.0, math.nan])


def test_pairs_of_one_prompt_that_go_together_count_as_one():
    margin, prompts = [1.0] * 6 + [-1.0] * 4, ["a"] * 3 + ["b"] * 3 + ["c"] * 4
    share = accuracy(margin, prompts)
    # between groups: (3 * 0.4)^2 * 2 + (4 * 0.6)^2 = 8.64; 100 * 0.24 / 8.64 = 2.8, so three independent pairs
    assert share.mean == 0.6 and share.n == 10 and (share.low, share.high) == wilson(1, 3)[1:]
    assert accuracy(margin, range(10)) == accuracy(margin)
    assert accuracy([1.0] * 6, ["a", "b"] * 3)[1:3] == wilson(2, 2)[1:]
    assert accuracy([1.0, -1.0] * 3, ["a", "a", "b", "b", "c", "c"]).n == 6  # never narrower than independent pairs
    assert by_subset(margin, ["x"] * 6 + ["y"] * 4, prompts)["x"][1:3] == wilson(2, 2)[1:]


def test_length_control_gives_a_half_to_longer_is_better():
    extra = np.array([5] * 30 + [-5] * 10)
    assert accuracy(extra).mean == 0.75
    assert length_controlled_accuracy(extra, extra).mean == 0.5
    always = length_controlled_accuracy(np.ones(40), extra)
    assert always.mean == always.high == 1.0 and 0.8 < always.low < 1
    assert math.isnan(length_controlled_accuracy([1.0, 1.0], [3, 3]).mean)


def test_by_subset():
    shares = by_subset([1.0, -1.0, 1.0], ["b", "a", "b"])
    assert list(shares) == ["a", "b"] and (shares["a"].mean, shares["b"].mean, shares["b"].n) == (0.0, 1.0, 2)


def test_temperature_is_found_and_calibrates():
    for scale in (0.1, 1.0, 20.0):
        margin = simulated(4000, scale)
        assert fit_temperature(margin) == pytest.approx(scale, rel=0.1)
        confidence, _ = scaled_confidence(margin, range(4000))
        assert ece(calibration_bins(margin, confidence)) < 0.03
    overconfident = 1 / (1 + np.exp(-np.abs(simulated(4000, 20.0))))
    assert ece(calibration_bins(simulated(4000, 20.0), overconfident)) > 0.15


def test_a_scorer_at_chance_gets_confidences_near_a_half():
    margin = np.random.default_rng(0).normal(0, 1, 1000)
    assert scaled_confidence(margin, range(1000))[0].max() < 0.6


def test_folds_keep_prompts_together_and_refuse_too_few():
    prompts = [f"p{n % 40}" for n in range(200)]
    folds = fold_of(prompts, 5)
    assert all(len(set(folds[[p == q for q in prompts]])) == 1 for p in set(prompts))
    assert np.bincount(folds).tolist() == [40] * 5
    with pytest.raises(ValueError, match="3 different prompts for 5 folds"):
        fold_of(["a", "b", "c"], 5)


def test_confident_mistakes_surest_first():
    assert confident_mistakes([1.0, -1.0, -3.0, -2.0], [0.9, 0.6, 0.8, 0.7], count=2) == [2, 3]


def test_margin_histogram_counts_every_pair():
    histogram = margin_histogram(simulated(500, 3.0))
    assert sum(histogram["counts"]) == 500 and len(histogram["edges"]) == 22


def test_pair_report_is_whole_and_says_what_it_could_not_measure():
    margin = simulated(300, 2.0)
    more = {"subsets": ["a", "b"] * 150, "extra_length": np.resize([1, -1, 0], 300), "agreement": ["1.00 of 3"] * 300}
    report = pair_report(margin, groups=range(300), **more)
    assert report["accuracy"]["n"] == 300 and set(report["by_subset"]) == {"a", "b"}
    assert report["temperature"] == pytest.approx(2.0, rel=0.4) and report["by_agreement"]["1.00 of 3"]["n"] == 300
    assert plot_pair_reports({"one": report}).axes
    few = pair_report(margin[:2], groups=[0, 1], subsets=["a", "a"], extra_length=[1, 1])
    assert few["calibration"].startswith("not measured: 2 different prompts") and "ece" not in few
    assert few["length_controlled"]["mean"] is None
    plot_pair_reports({"few": few})


def test_shared_prompts_finds_equal_and_nearly_equal_ones():
    train = ["How do I boil an egg so that the yolk stays soft?", "Why?", "Name a tall tree in Norway"]
    held = ["how do i boil an egg so that the yolk stays soft", "Why not?", "Name a tall tree in Norway, please", "Why"]
    leaks = shared_prompts(train, held)
    assert [(row, other) for row, other, _ in leaks] == [(0, 0), (2, 2), (3, 1)]
    assert leaks[0][2] == 1.0 and leaks[1][2] == pytest.approx(4 / 5)
