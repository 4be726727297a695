"""Every category has a meaning, every label of a guard a category, and the way back is stable."""

import pytest

from plumbline.safety.findings import Category
from plumbline.safety.taxonomy import MEANING, NEAREST, TO_CATEGORY, meaning, severity, to_category, to_label


def test_every_category_has_a_meaning_and_a_severity():
    assert set(MEANING) == set(Category)
    assert all(1 <= level <= 5 for _, level in MEANING.values())
    assert severity("x_ours") == 3 and meaning("x_house_rules") == "house rules"


@pytest.mark.parametrize("guard", TO_CATEGORY)
def test_labels_survive_the_way_there_and_back(guard):
    for label, category in TO_CATEGORY[guard].items():
        assert to_category(guard, label.upper()) is category
        assert to_category(guard, to_label(guard, category)) is category


@pytest.mark.parametrize("guard", NEAREST)
def test_a_finer_category_goes_to_a_label_that_exists(guard):
    for category, nearest in NEAREST[guard].items():
        assert to_label(guard, category) == to_label(guard, nearest) in TO_CATEGORY[guard]


def test_what_another_guard_does_not_know():
    assert to_label("llama_guard", Category.HIDDEN_TEXT) is None
    with pytest.raises(ValueError, match="llama_guard has no label 'S99'"):
        to_category("llama_guard", "S99")
    with pytest.raises(ValueError, match="no labels for the guard 'x'"):
        to_label("x", Category.HATE)
