"""Weights from pairs: against scikit-learn, signs held, folds kept apart; mixtures and quotas by hand."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from plumbline.align.data.domain_weights import QualityScore, balance, difficulty, update_mixture
from plumbline.reward.tuning import embedding_features, fit_logistic, out_of_fold, tune_weights


def pairs(n, weight, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, len(weight)))
    flip = rng.random(n) > 1 / (1 + np.exp(-x @ np.array(weight)))
    return np.where(flip[:, None], -x, x)


def test_logistic_equals_scikit_learn():
    x = pairs(400, [1.0, -0.5, 0.2])
    l2 = 0.05
    twice, labels = np.concatenate([x, -x]), np.repeat([1, 0], len(x))
    peer = LogisticRegression(C=1 / (l2 * len(twice)), fit_intercept=False, tol=1e-10, max_iter=1000).fit(twice, labels)
    np.testing.assert_allclose(fit_logistic(x, l2=l2), peer.coef_[0], atol=1e-5)


def test_signs_are_held_and_weights_that_would_cross_stay_at_zero():
    x = pairs(500, [1.0, -0.8, 0.5])
    free = fit_logistic(x, l2=0.01)
    assert free[1] < 0
    held = fit_logistic(x, l2=0.01, signs=[1, 1, 1])
    assert held[1] == 0 and held[0] > 0.5 and held[2] > 0.2
    np.testing.assert_allclose(held[[0, 2]], fit_logistic(x[:, [0, 2]], l2=0.01), atol=1e-6)
    np.testing.assert_allclose(fit_logistic(x, l2=0.01, signs=[1, -1, 1]), free, atol=1e-6)


def test_tuned_weights_have_mean_size_one_and_the_right_order():
    x = pairs(3000, [2.0, 0.5, -1.0])
    weights = tune_weights({"a": x[:, 0], "b": x[:, 1], "toxicity": x[:, 2]}, {"a": 1, "b": 1, "toxicity": -1})
    assert sum(abs(w) for w in weights.values()) == pytest.approx(3)
    assert weights["a"] > -weights["toxicity"] > weights["b"] > 0 > weights["toxicity"]
    with pytest.raises(ValueError, match="no part agrees with the labels"):
        tune_weights({"a": -np.ones(10)}, {"a": 1})


def test_out_of_fold_knows_nothing_of_its_fold():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(60, 80))  # enough features to remember every pair
    assert (noise @ fit_logistic(noise, l2=0.01) > 0).mean() > 0.95
    assert (out_of_fold(noise, np.arange(60) % 5, l2=0.01) > 0).mean() < 0.7


def test_bad_differences_are_refused():
    with pytest.raises(ValueError, match="finite rows"):
        fit_logistic(np.array([[np.nan]]), l2=0.1)


def embed(texts):
    return np.array([[1.0, 0.0] if "good" in t else [0.0, 1.0] for t in texts])


def test_quality_scores_chosen_above_rejected():
    quality = QualityScore.fit(embed, ["p"] * 5, ["good"] * 5, ["bad"] * 5)
    scores = quality(["p", "p"], ["bad", "a good one"])
    assert scores[1] > scores[0]
    assert embedding_features(embed, ["good"], ["good"]).shape == (1, 4)


def test_balance_fills_cells_evenly_with_the_best_rows():
    domain = ["a"] * 8 + ["b"] * 2
    quality = [0, 1, 2, 3, 4, 5, 6, 7, 1, 2]
    assert balance(domain, [0] * 10, quality, keep=4, evenness=1.0) == [6, 7, 8, 9]
    assert balance(domain, [0] * 10, quality, keep=5, evenness=0.0) == [4, 5, 6, 7, 9]
    assert balance(domain, [0] * 10, quality, keep=8, evenness=1.0) == [2, 3, 4, 5, 6, 7, 8, 9]  # b is spent
    assert balance(domain, [0] * 10, quality, keep=99) == list(range(10))
    assert len(balance(list(range(10)), [0] * 10, quality, keep=3)) == 3
    with pytest.raises(ValueError, match="keep=0"):
        balance(domain, [0] * 10, quality, keep=0)


def test_difficulty_is_by_length():
    assert difficulty(["a"] * 3, ["b", "b " * 10, "b " * 100]).tolist() == [0, 1, 2]


def test_mixture_follows_the_domain_that_lags_behind():
    even = {"a": 0.5, "b": 0.5}
    assert update_mixture(even, {"a": 2.0, "b": 2.0}, {"a": 2.0, "b": 2.0}) == pytest.approx(even)
    moved = update_mixture(even, {"a": 3.0, "b": 1.0}, {"a": 2.0, "b": 1.5}, floor=0.0)
    assert moved["a"] == pytest.approx(np.e / (np.e + 1))
    for _ in range(100):
        even = update_mixture(even, {"a": 5.0, "b": 1.0}, {"a": 1.0, "b": 1.0}, floor=0.1)
    assert 0.05 <= even["b"] < 0.06 and sum(even.values()) == pytest.approx(1)
    with pytest.raises(ValueError, match="domains differ"):
        update_mixture({"a": 1.0}, {"b": 1.0}, {"a": 1.0})
