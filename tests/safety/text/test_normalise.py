"""Readings: each obfuscation undone by hand, offsets into the original by property, harmless look-alikes left alone."""

import base64
import codecs

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plumbline.safety.text.normalise import View, _best_run, fold, raw_view, views
from plumbline.safety.text.words import split_words, vocabulary, word_ends

PLAIN = "Please tell me how to open the heavy door without any key"
needs_words = pytest.mark.skipif(not vocabulary(), reason="the tokenizer wheel is not installed")
LEET = str.maketrans("aeiost", "431057")


def tags(text):
    return "".join(chr(0xE0000 + ord(ch)) for ch in text)


OBFUSCATED = {  # name -> text, the reading that undoes it
    "spaced words": ("   ".join(" ".join(word) for word in PLAIN.split()), "folded"),
    "spaced letters": (" ".join(PLAIN.replace(" ", "")), "folded"),
    "dotted letters": (".".join(PLAIN.replace(" ", "")), "folded"),
    "zero width": ("\u200b".join(PLAIN), "folded"),
    "homoglyphs": (PLAIN.translate(str.maketrans("aeopc", "аеорс")), "folded"),
    "full width": ("".join(chr(ord(ch) + 0xFEE0) if ch != " " else ch for ch in PLAIN), "folded"),
    "combining marks": ("".join(ch + "\u0336" if ch.isalpha() else ch for ch in PLAIN), "folded"),
    "leet": (PLAIN.translate(LEET), "folded"),
    "base64": (base64.b64encode(PLAIN.encode()).decode(), "base64"),
    "base64 twice": (base64.b64encode(base64.b64encode(PLAIN.encode())).decode(), "base64"),
    "hex": (PLAIN.encode().hex(), "hex"),
    "hex pairs": (" ".join(f"{byte:02x}" for byte in PLAIN.encode()), "hex"),
    "url": ("".join(f"%{byte:02X}" for byte in PLAIN.encode()), "url"),
    "entities": ("".join(f"&#{ord(ch)};" for ch in PLAIN), "entities"),
    "rot13": (codecs.encode(PLAIN, "rot13"), "rot13"),
    "reversed": (PLAIN[::-1], "reversed"),
    "tags": (tags(PLAIN), "tags"),
}


@needs_words
@pytest.mark.parametrize("name", OBFUSCATED)
def test_each_obfuscation_is_undone(name):
    text, view = OBFUSCATED[name]
    readings = {(v.name, v.text.lower()) for v in views(text)}
    assert (view, PLAIN.lower()) in readings


@needs_words
@pytest.mark.parametrize("name", [name for name in OBFUSCATED if "twice" not in name])
def test_an_obfuscated_stretch_is_found_inside_other_text_and_located(name):
    hidden, view = OBFUSCATED[name]
    before, after = "Here is the thing we spoke about. ", " (end of it)"
    text = before + hidden + after
    for reading in views(text):
        at = reading.text.lower().find(PLAIN.lower())
        if reading.name == view and at >= 0:
            start, end = reading.to_original(at, at + len(PLAIN))
            assert text[start:end].strip() == hidden.strip()
            return
    pytest.fail(f"no {view} reading holds the text: {[(v.name, v.text) for v in views(text)]}")


HARMLESS = [
    "It's 25% up on last year; see p. 34, fig. 2.",
    "The mp3 player costs $30, the h2o bottle £4.50, and covid19 rules (3rd ed.) apply to B2B.",
    "sha256: 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    "Internationalisation and Donaudampfschifffahrtsgesellschaft are long words.",
    "A B C D are the options; 1 2 3 are the marks.",
    "https://example.org/a/long/path_with-words?and=query",
]


@pytest.mark.parametrize("text", HARMLESS)
def test_ordinary_text_has_no_other_reading(text):
    assert [view.name for view in views(text)] == ["raw"]


def test_russian_and_greek_stay_as_they_are():
    for text in ("Привет, как дела сегодня?", "Καλημέρα σας, τι κάνετε;"):
        assert fold(raw_view(text)).text == text


def test_offsets_by_hand():
    view = fold(raw_view("a\u200bb é c"))
    assert view.text == "ab e c"
    assert view.to_original(0, 2) == (0, 3)  # the zero-width space between counts as inside
    assert view.to_original(3, 4) == (4, 5)
    assert view.to_original(2, 2) == (3, 3)


TEXT = st.text(max_size=200) | st.text(alphabet="aA4 \u200bе=%&#x;.\U000e0041\u0301ﬁ①½", max_size=120)


@given(TEXT)
def test_every_character_of_a_reading_points_into_the_original(text):
    for view in views(text):
        assert len(view.starts) == len(view.ends) == len(view.text)
        assert all(0 <= a < b <= len(text) for a, b in zip(view.starts, view.ends, strict=True))
    raw = views(text)[0]
    assert raw.name == "raw" and len(raw.text) == len(text)
    assert [raw.to_original(i, i + 1) for i in range(len(text))] == [(i, i + 1) for i in range(len(text))]


@given(TEXT)
def test_folding_keeps_order_and_folding_twice_changes_nothing_more_than_once(text):
    view = fold(raw_view(text))
    assert list(view.starts) == sorted(view.starts) and list(view.ends) == sorted(view.ends)


@given(
    st.text(max_size=60), st.lists(st.tuples(st.integers(0, 60), st.integers(0, 6), st.text(max_size=3)), max_size=5)
)
def test_edits_against_a_slow_reference(text, proposed):
    edits, at = [], 0
    for start, length, new in sorted(proposed):
        if start >= at and start + length <= len(text) and length:
            edits.append((start, start + length, new))
            at = start + length
    view = raw_view(text).edited("x", edits)
    slow, where, at = "", [], 0
    for start, end, new in edits:
        for i in range(at, start):
            slow, where = slow + raw_view(text).text[i], [*where, (i, i + 1)]
        slow, where, at = slow + new, where + [(start, end)] * len(new), end
    for i in range(at, len(text)):
        slow, where = slow + raw_view(text).text[i], [*where, (i, i + 1)]
    assert view.text == slow
    assert list(zip(view.starts, view.ends, strict=True)) == where


@given(st.lists(st.integers(-1, 1), max_size=12))
def test_best_run_against_all_runs(gain):
    first, last, best = _best_run(gain)
    sums = [sum(gain[i : j + 1]) for i in range(len(gain)) for j in range(i, len(gain))]
    assert best == max([0, *sums])
    assert best == 0 or sum(gain[first : last + 1]) == best


@needs_words
def test_words_without_gaps_are_split():
    assert split_words("howdoiopenthedoor") == [3, 5, 6, 10, 13, 17]
    assert split_words("") == []
    assert split_words("dissolving") == [10]  # a word with an ending


@needs_words
@pytest.mark.parametrize(
    "said",
    [
        "I don't know how, he said.",
        "My neighbour's dog is 70. What could I do?",
        "We're in a hurry, so they've sent it!",
    ],
)
def test_letters_with_blanks_between_them_are_read_with_their_signs(said):
    packed = "".join(said.split())
    ends = word_ends(packed)
    split = "".join(f" {ch}" if at in ends else ch for at, ch in enumerate(packed))
    assert split == said
    folded = fold(raw_view(" ".join(packed)))
    assert folded.text == split
    at = folded.text.index(split.split()[-1])
    start, end = folded.to_original(at, len(split))
    assert " ".join(packed)[start:end].replace(" ", "") == split.split()[-1]


def test_wider_gaps_are_word_gaps_whatever_stands_between_the_letters():
    assert fold(raw_view("d o n ' t   g o   t h e r e ,   n o w !")).text == "don't go there, now!"
    assert fold(raw_view("x.y.z.z.y here")).text == "xyzzy here" or vocabulary()
    for said in ("plan A or B", "a + b = c * d"):
        assert fold(raw_view(said)).text == said


def test_a_view_of_nothing():
    empty = View("x", "", (), ())
    assert empty.to_original(0, 0) == (0, 0) and [view.text for view in views("")] == [""]
