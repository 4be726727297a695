"""Heads: hand-worked logits, file round trip, refusal of wrong files; Platt scaling against a slow reference."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from plumbline.safety.classifier import Head, HeadCard, fit_platt, sigmoid


def linear(weights, bias, labels=("bad",), **card):
    w = np.array(weights, dtype=np.float32)
    tensors = {"mean": np.zeros(len(w)), "std": np.ones(len(w)), "w": w, "b": np.array(bias)}
    return Head(HeadCard(name="toy", labels=labels, features="f", **card), tensors)


def test_logistic_head_by_hand():
    head = linear([[2.0], [-1.0]], [0.5], scale=2.0, shift=-1.0)
    x = np.array([[1.0, 0.5], [0.0, 0.0]])
    np.testing.assert_allclose(head.logits(x)[:, 0], [2 * 2.0 - 1, 2 * 0.5 - 1], rtol=1e-12)
    np.testing.assert_allclose(head.predict(x), [1 / (1 + np.exp(-3.0)), 0.5], rtol=1e-12)


def test_several_labels_give_a_distribution_at_any_size_of_logit():
    head = linear([[500.0, 0.0, -500.0]], [0.0, 0.0, 0.0], labels=("a", "b", "c"))
    p = head.predict(np.array([[2.0], [0.0]]))
    np.testing.assert_allclose(p.sum(1), 1.0, rtol=1e-12)
    np.testing.assert_allclose(p, [[1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3]], atol=1e-12)


def test_hidden_head_by_hand():
    tensors = {
        "mean": np.array([1.0]),
        "std": np.array([2.0]),
        "w1": np.array([[1.0, -1.0]]),
        "b1": np.array([0.0, 0.5]),
        "w2": np.array([[3.0], [2.0]]),
        "b2": np.array([0.25]),
    }
    head = Head(HeadCard(name="toy", labels=("bad",), features="f"), tensors)
    want = 3 * np.tanh(1.0) + 2 * np.tanh(-1.0 + 0.5) + 0.25  # x = (3 - 1) / 2 = 1
    np.testing.assert_allclose(head.logits(np.array([[3.0]])), [[want]], rtol=1e-12)


def test_round_trip_keeps_every_bit(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {
        "mean": rng.normal(size=7),
        "std": rng.uniform(1, 2, size=7),
        "w1": rng.normal(size=(5, 7)).T,  # as it comes out of a linear layer: not in C order
        "b1": rng.normal(size=5),
        "w2": rng.normal(size=(2, 5)).T,
        "b2": rng.normal(size=2),
    }
    card = HeadCard(
        name="toy", labels=("a", "b"), features="f", scale=1.3, data_hash="9f", details={"dev": {"f1": 0.5}}
    )
    head = Head(card, tensors)
    head.save(tmp_path / "toy.safetensors")
    again = Head.load(tmp_path / "toy.safetensors", features="f")
    assert again.card == card
    assert again.version == head.version
    x = rng.normal(size=(4, 7))
    np.testing.assert_array_equal(again.predict(x), head.predict(x))


def test_errors_say_which_file_and_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="no head at .*gone.safetensors; train it with"):
        Head.load(tmp_path / "gone.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(ValueError, match="text.safetensors is not a head file"):
        Head.load(tmp_path / "text.safetensors")
    save_file({"w": np.zeros(2, dtype=np.float32)}, tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match="plain.safetensors is not a head file"):
        Head.load(tmp_path / "plain.safetensors")
    linear([[1.0]], [0.0]).save(tmp_path / "toy.safetensors")
    with pytest.raises(ValueError, match="fitted on features 'f', not 'g'"):
        Head.load(tmp_path / "toy.safetensors", features="g")
    with pytest.raises(ValueError, match=r"takes features of shape \(B, 1\), got \(3, 2\)"):
        linear([[1.0]], [0.0]).predict(np.zeros((3, 2)))
    with pytest.raises(ValueError, match="2 outputs for 1 labels"):
        linear([[1.0, 1.0]], [0.0, 0.0])


def test_platt_matches_a_slow_search():
    rng = np.random.default_rng(1)
    z = rng.normal(size=400) * 3
    y = (rng.uniform(size=400) < sigmoid(0.5 * z - 0.7)).astype(int)
    scale, shift = fit_platt(z, y)
    positives, negatives = y.sum(), (1 - y).sum()
    target = np.where(y == 1, (positives + 1) / (positives + 2), 1 / (negatives + 2))

    def loss(a, b):
        x = a * z + b
        return (np.logaddexp(0, x) - target * x).sum()

    best = min((loss(a, b), a, b) for a in np.arange(0.2, 0.9, 0.01) for b in np.arange(-1.2, 0.0, 0.01))
    assert loss(scale, shift) <= best[0]
    assert (scale, shift) == pytest.approx(best[1:], abs=0.01)  # the width of the search grid


def test_platt_stays_finite_on_separable_data_and_needs_both_labels():
    scale, shift = fit_platt([-2.0, -1.0, 1.0, 2.0], [0, 0, 1, 1])
    assert 0 < scale < 10 and abs(shift) < 1e-6  # symmetric data: no shift
    with pytest.raises(ValueError, match="needs both labels, got 2 positive and 0 negative"):
        fit_platt([0.0, 1.0], [1, 1])
