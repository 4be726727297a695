"""Scaling: numbers by hand, unit invariance, round trip, errors."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plumbline.reward.scaling import RELATIVE_FLOOR, Scaling, fit_scaling


def test_mean_and_std_by_hand_without_none():
    scaling = fit_scaling({"a": [1.0, None, 3.0, 5.0]})
    assert scaling.mean["a"] == 3.0
    assert scaling.std["a"] == pytest.approx(math.sqrt(8 / 3), rel=1e-15)  # population: (4 + 0 + 4) / 3
    assert scaling.count["a"] == 3
    assert scaling.scale("a", 5.0) == pytest.approx(2 / math.sqrt(8 / 3), rel=1e-15)


@given(
    st.lists(st.floats(-50, 50), min_size=2, max_size=20),
    st.floats(-50, 50),
    st.sampled_from([100.0, 0.01, 1024.0]),
)
def test_a_component_times_a_constant_scales_to_the_same(scores, probe, factor):
    one = fit_scaling({"a": scores})
    other = fit_scaling({"a": [factor * score for score in scores]})
    if one.std["a"] > 1e-6 and other.std["a"] > 1e-6:  # else the absolute floor, which only avoids 0 / 0
        assert other.scale("a", factor * probe) == pytest.approx(one.scale("a", probe), rel=1e-9, abs=1e-9)


def test_outliers_are_held_at_the_limit():
    scaling = fit_scaling({"a": [0.0, 2.0]}, limit=3.0)
    assert [scaling.scale("a", x) for x in (1.0, 3.5, 5.0, -99.0)] == [0.0, 2.5, 3.0, -3.0]


@pytest.mark.parametrize(
    "scores, min_std, want",
    [
        ([0.01, 0.01], {}, RELATIVE_FLOOR * 0.01),  # constant: the floor follows the unit of the component
        ([0.0, 0.0], {}, 1e-8),  # constant zero: only the division is saved
        ([0.01, 0.02], {"a": 0.05}, 0.05),  # the component says that less than 0.05 means nothing
        ([0.0, 2.0], {"a": 0.05}, 1.0),  # a real spread is left alone
    ],
)
def test_std_floor(scores, min_std, want):
    assert fit_scaling({"a": scores}, min_std=min_std).std["a"] == want


def test_file_round_trip(tmp_path):
    scaling = fit_scaling({"a": [0.1, 0.7, 0.3], "b": [-3.0, None, 4.0]}, limit=7.0)
    scaling.save(tmp_path / "scaling.json")
    assert Scaling.load(tmp_path / "scaling.json") == scaling


def test_errors_name_the_component_and_the_way_out():
    with pytest.raises(ValueError, match=r"'a' scored 1 of 3 reference answers; at least 2"):
        fit_scaling({"a": [None, 1.0, None]})
    with pytest.raises(ValueError, match="std=0"):
        Scaling(mean={"a": 0.0}, std={"a": 0.0}, count={"a": 2})
    with pytest.raises(ValueError, match="names differ"):
        Scaling(mean={"a": 0.0}, std={"b": 1.0}, count={"a": 2})
    with pytest.raises(KeyError, match="no scaling for component 'b'"):
        fit_scaling({"a": [0.0, 1.0]}).scale("b", 0.0)
    with pytest.raises(ValueError, match="fields are mean, std, count, limit"):
        Scaling.from_dict({"mean": {}, "std": {}, "count": {}, "extra": 1})
