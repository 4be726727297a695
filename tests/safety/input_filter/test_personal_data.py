"""Personal data and what only looks like it: a table written by hand, 98 % of each half right."""

import re
from pathlib import Path

import pytest

from plumbline.safety.findings import ScanItem
from plumbline.safety.input_filter.pii import Pii

TABLE = Path(__file__).with_name("personal_data.txt")


def rows():
    """(kind, country or form, text, [values])"""
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            kind, form, marked = line.split(" | ", 2)
            marked = re.sub(r"\\u([0-9a-f]{4})", lambda code: chr(int(code[1], 16)), marked).replace("\\n", "\n")
            yield kind, form, re.sub("[«»]", "", marked), re.findall("«(.*?)»", marked, re.DOTALL)


ROWS = list(rows())
ARE, NONE = [row for row in ROWS if row[0] != "none"], [row for row in ROWS if row[0] == "none"]


@pytest.fixture(scope="module")
def pii():
    return Pii()


def redacted(pii, text):
    """(kind, characters) of what the shipped policies take out."""
    (found,) = pii.scan([ScanItem(text=text)])
    return [
        (one.category.removeprefix("pii."), text[span.start : span.end])
        for one in found
        if one.score >= 0.5 and one.category != "pii.url"
        for span in one.spans
    ]


def test_the_table_is_large_and_wide_enough():
    countries = {form for kind, form, *_ in ARE if kind == "phone" and re.fullmatch("[A-Z]{2}", form)}
    assert len(ARE) >= 150 and len(NONE) >= 150 and len(countries) >= 20
    assert len({text for _, _, text, _ in ROWS}) == len(ROWS)


def test_what_is_personal_data_is_found_whole(pii):
    missed = [row for row in ARE if any((row[0], value) not in redacted(pii, row[2]) for value in row[3])]
    assert len(missed) <= 0.02 * len(ARE), missed


def test_what_is_none_is_left_alone(pii):
    wrong = [(form, text, said) for _, form, text, _ in NONE if (said := redacted(pii, text))]
    assert len(wrong) <= 0.02 * len(NONE), wrong
