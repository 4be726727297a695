"""C8 to C11 of the rewards checklist: sums, None, scaling before weighting, the sign of toxicity."""

import math
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plumbline.reward import CompositeReward, RewardComponent, Scaling, fit_scaling, statistics


@dataclass
class Fixed:
    """A component that returns given scores, whatever the texts."""

    name: str
    scores: list = field(default_factory=list)

    def __call__(self, prompts, answers):
        return self.scores


def score(*components, rows=3, **kwargs):
    return CompositeReward(list(components), **kwargs)(["p"] * rows, ["a"] * rows)


def test_a_plain_class_with_a_name_is_a_component():
    assert isinstance(Fixed("x"), RewardComponent)


def test_total_by_hand():
    scaling = Scaling(mean={"good": 1.0, "bad": 0.0}, std={"good": 2.0, "bad": 0.5}, count={"good": 9, "bad": 9})
    reward = score((Fixed("good", [1.0, 3.0, 5.0]), 2.0), (Fixed("bad", [0.0, 0.5, 1.0]), -1.0), scaling=scaling)
    assert reward.parts.scaled == {"good": [0.0, 1.0, 2.0], "bad": [0.0, 1.0, 2.0]}
    assert reward.parts.weighted == {"good": [0.0, 2.0, 4.0], "bad": [0.0, -1.0, -2.0]}
    assert reward.total == [0.0, 1.0, 2.0]
    assert reward.why == [None] * 3


SCORES = st.lists(st.one_of(st.none(), st.floats(-1e6, 1e6)), min_size=3, max_size=3)


@given(SCORES, SCORES, SCORES, st.floats(-9, 9), st.floats(-9, 9), st.booleans())
def test_total_is_exactly_the_sum_of_the_weighted_parts(a, b, c, alpha, beta, scale):
    scaling = fit_scaling({"a": [0.1, 3.0], "b": [-5.0, 0.7], "c": [1e3, 1e4]}) if scale else None
    reward = score((Fixed("a", a), alpha), (Fixed("b", b), beta), (Fixed("c", c), -0.3), scaling=scaling)
    for row, total in enumerate(reward.total):
        known = [part[row] for part in reward.parts.weighted.values() if part[row] is not None]
        assert total == (sum(known) if known else None)


def test_multiplying_a_component_by_100_changes_nothing():
    scores, other = [0.2, 0.9, 0.4, 0.1], [3.0, -1.0, 0.5, 2.0]

    def total(factor):
        first = Fixed("a", [factor * s for s in scores])
        composite = CompositeReward([(first, 0.7), (Fixed("b", other), 1.3)])
        composite.fit(["p"] * 4, ["a"] * 4)
        return composite(["p"] * 4, ["a"] * 4).total

    assert total(100.0) == pytest.approx(total(1.0), rel=1e-12)


def test_optional_none_is_left_out_and_not_counted_as_zero():
    scaling = Scaling(mean={"a": 5.0, "b": 5.0}, std={"a": 1.0, "b": 1.0}, count={"a": 2, "b": 2})
    reward = score((Fixed("a", [7.0, 7.0, None]), 1.0), (Fixed("b", [4.0, None, None]), 1.0), scaling=scaling)
    assert reward.total == [1.0, 2.0, None]  # a None read as raw 0 would have cost 5
    assert reward.why == [None, None, "no component has an opinion"]
    assert statistics(reward)["reward/b_none_fraction"] == pytest.approx(2 / 3)


def test_safety_none_takes_the_total_away():
    reward = score((Fixed("fluency", [1.0, 1.0, 1.0]), 1.0), (Fixed("safety", [1.0, None, 0.0]), 1.0))
    assert reward.total == [2.0, None, 1.0]
    assert reward.why[1] == "no score from required component safety"
    assert reward.parts.weighted["fluency"][1] == 1.0  # still logged
    assert statistics(reward)["reward/none_fraction"] == pytest.approx(1 / 3)


def test_what_is_required_can_be_said():
    safety, fluency = Fixed("safety", [None, 1.0, 1.0]), Fixed("fluency", [1.0, None, 1.0])
    assert score((safety, 1.0), (fluency, 1.0), required=["fluency"]).total == [1.0, None, 2.0]
    assert score((safety, 1.0), (fluency, 1.0), required=[]).total == [1.0, 1.0, 2.0]


def test_weight_zero_is_logged_and_not_paid():
    reward = score((Fixed("a", [1.0, 2.0, 3.0]), 1.0), (Fixed("watched", [9.0, 0.0, 9.0]), 0.0))
    assert reward.total == [1.0, 2.0, 3.0]
    assert statistics(reward)["reward/watched_raw_mean"] == 6.0


@pytest.mark.parametrize(
    "scores, message",
    [
        ([1.0, 2.0], r"'judge' returned 2 scores for 3 answers"),
        ([1.0] * 4, r"'judge' returned 4 scores for 3 answers"),
        (None, r"'judge' returned None scores for 3 answers"),
        ([1.0, math.nan, 1.0], r"'judge' returned nan for row 1"),
        ([1.0, 1.0, math.inf], r"'judge' returned inf for row 2"),
    ],
)
def test_bad_scores_raise_and_name_the_component(scores, message):
    with pytest.raises(ValueError, match=message):
        score((Fixed("fine", [1.0, 1.0, 1.0]), 1.0), (Fixed("judge", scores), 1.0))


def test_bad_settings_raise_before_anything_is_scored():
    a = Fixed("a", [1.0])
    with pytest.raises(ValueError, match="at least one"):
        CompositeReward([])
    with pytest.raises(ValueError, match="names must differ"):
        CompositeReward([(a, 1.0), (Fixed("a"), 2.0)])
    with pytest.raises(ValueError, match="weight of 'a' is nan"):
        CompositeReward([(a, math.nan)])
    with pytest.raises(ValueError, match=r"required components \['b'\]"):
        CompositeReward([(a, 1.0)], required=["b"])
    with pytest.raises(ValueError, match=r"no scaling for components \['a'\]"):
        CompositeReward([(a, 1.0)], scaling=Scaling(mean={}, std={}, count={}))
    with pytest.raises(ValueError, match="2 prompts but 1 answers"):
        CompositeReward([(a, 1.0)])(["p", "p"], ["a"])


def test_statistics_by_hand():
    reward = score((Fixed("a", [0.0, 2.0, 4.0]), 1.0), (Fixed("b", [1.0, 1.0, None]), -0.5))
    metrics = statistics(reward)
    assert reward.total == [-0.5, 1.5, 4.0]
    assert metrics["reward/a_raw_mean"] == 2.0
    assert metrics["reward/a_raw_std"] == pytest.approx(math.sqrt(8 / 3))
    assert metrics["reward/b_weighted_mean"] == -0.5
    assert metrics["reward/a_scaled_extreme"] == 4.0
    assert metrics["reward/total_mean"] == pytest.approx(5 / 3)
    # weighted: a = (0, 2, 4), b = (-.5, -.5, 0); cov(a, total) / var(total) by hand
    assert metrics["reward/a_variance_share"] == pytest.approx(3.0 / (61 / 18), rel=1e-12)
    assert metrics["reward/a_variance_share"] + metrics["reward/b_variance_share"] == pytest.approx(1.0, rel=1e-12)
    assert metrics["reward/none_fraction"] == 0.0


def test_statistics_of_a_batch_without_totals():
    metrics = statistics(score((Fixed("safety", [None] * 3), 1.0)))
    assert metrics == {"reward/safety_none_fraction": 1.0, "reward/none_fraction": 1.0}


def test_fit_uses_the_smallest_meaningful_spread_of_a_component():
    component = Fixed("toxicity", [0.01, 0.02])
    component.min_std = 0.05
    composite = CompositeReward([(component, -1.0)])
    assert composite.fit(["p"] * 2, ["a"] * 2).std == {"toxicity": 0.05}
    assert composite.scaling is not None
