"""The comparison of active with random sampling at toy size; the figures are benchmarks/rewards/bench_active.py's."""

import pytest

from benchmarks.rewards.bench_active import interval, learn, measure, table, world_of_words


def test_strategies_start_alike_and_part_at_equal_labels():
    world = world_of_words(160)
    result = measure(world, seeds=2, rounds=2, labels=25, noise=0.0, strategies=("uncertain", "random"))
    uncertain, random = (result["strategies"][name] for name in ("uncertain", "random"))
    assert uncertain["accuracy"][0] == random["accuracy"][0]  # nothing to go by yet
    assert uncertain["accuracy"][1] != random["accuracy"][1] and random["gain"] is None
    assert result["labels"] == [25, 50] and table(result).count("\n") == 5
    with pytest.raises(ValueError, match="too few"):
        learn(world, "random", 0, rounds=2, labels=100, noise=0.0, held_out=40)


def test_the_interval_by_hand():
    mean, half = interval([1.0, 2.0, 3.0])
    assert mean == 2.0 and half == pytest.approx(4.303 / 3**0.5, abs=1e-6)
