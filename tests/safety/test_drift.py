"""Drift: PSI by hand, MMD against its definition, its p-value uniform when nothing changed."""

import math

import numpy as np
import pytest

from plumbline.safety.drift import compare, mmd, psi, read_texts


def test_psi_by_hand():
    reference, window = np.array([0.0, 1.0] * 10), np.array([0.0] * 15 + [1.0] * 5)
    # one edge, at the median of the reference; half a row is added to both bins
    a, b = np.array([10.5, 10.5]) / 21, np.array([15.5, 5.5]) / 21
    want = sum((x - y) * math.log(x / y) for x, y in zip(a, b, strict=True))
    assert psi(reference, window, bins=2) == pytest.approx(want, rel=1e-12)
    assert psi(reference, reference) == 0


def test_mmd_against_its_definition():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(7, 3)), rng.normal(1, 1, size=(5, 3))
    both = np.concatenate([x, y])
    width = np.median([((a - b) ** 2).sum() for i, a in enumerate(both) for j, b in enumerate(both) if i != j])
    k = lambda a, b: np.mean([[math.exp(-((p - q) ** 2).sum() / width) for q in b] for p in a])  # noqa: E731
    assert mmd(x, y, permutations=10)[0] == pytest.approx(k(x, x) + k(y, y) - 2 * k(x, y), rel=1e-9)


def test_mmd_sees_a_shift_and_does_not_cry_wolf():
    rng = np.random.default_rng(1)
    same = [mmd(rng.normal(size=(40, 4)), rng.normal(size=(40, 4)), permutations=99)[1] for _ in range(40)]
    assert 0.3 < np.mean(same) < 0.7 and np.mean(np.array(same) < 0.05) <= 0.2
    assert mmd(rng.normal(size=(40, 4)), rng.normal(1.5, 1, size=(40, 4)), permutations=99)[1] == 0.01
    many = rng.normal(size=(150, 4))
    assert mmd(many[:75], many[75:], permutations=50)[0] == pytest.approx(
        mmd(np.concatenate([many[:75]]), many[75:], permutations=50)[0]
    )


def test_too_few_texts_and_bad_lines_are_named(tmp_path):
    with pytest.raises(ValueError, match="the window window has 3 texts"):
        compare(["a"] * 20, ["b"] * 3)
    path = tmp_path / "w.jsonl"
    path.write_text('{"text": "a"}\n{"txt": 1}\n')
    with pytest.raises(ValueError, match=r"w.jsonl:2: needs a JSON object with a field 'text'"):
        read_texts(path)
