"""Held-back streams over scripted sources that say something banned at any position."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plumbline.safety.constrained.spellings import Phrases
from plumbline.safety.constrained.streaming import REFUSAL, Checked, HeldStream, LocalSource, phrase_check

PHRASES = Phrases(["banned words", "ass", "*cunt*"], ["Scunthorpe"])
CLEAN = "One fine day. The sun was out, and nothing else happened! Was it so? It was.\nA last line without an end"
SPELLINGS = ["banned words", "BANNED\u200b words", "b-a-n-n-e-d w.o.r.d.s", "bannedwords", "4ss", "cunts"]


def scripted(*texts, size=3):
    """Says text n at attempt n (the last one from then on), from where the answer stands."""

    def source(answer, attempt):
        text = texts[min(attempt, len(texts) - 1)]
        rest = text[len(answer) :] if text.startswith(answer) else " " + text
        yield from (rest[at : at + size] for at in range(0, len(rest), size))

    return source


def test_a_clean_answer_comes_through_in_sentences():
    held = HeldStream(scripted(CLEAN), phrase_check(PHRASES))
    pieces = list(held)
    assert "".join(pieces) == held.text == CLEAN and held.outcome == "complete" and held.backtracks == 0
    assert pieces[0] == "One fine day. " and len(pieces) >= 4


@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, len(CLEAN)), st.sampled_from(SPELLINGS), st.integers(2, 30), st.integers(8, 60), st.booleans()
)  # fmt: skip
def test_nothing_banned_is_ever_shown_wherever_it_is_said(at, spelling, size, block, stubborn):
    bad = f"{CLEAN[:at]} {spelling} {CLEAN[at:]}"
    held = HeldStream(
        scripted(*([bad] if stubborn else [bad, CLEAN]), size=size), phrase_check(PHRASES), block_chars=block
    )
    shown = ""
    for piece in held:
        shown += piece
        assert PHRASES.find(shown) is None
        # not one letter of it: what is out is a beginning of the text before the phrase, of the clean text, or the refusal
        assert f"{CLEAN[:at]} ".startswith(shown) or shown.endswith(REFUSAL) or held.backtracks > 0
    assert shown == held.text
    if stubborn:
        assert held.outcome == "refused" and held.text.endswith(REFUSAL) and held.backtracks == 3
    else:
        assert held.outcome == "complete" and held.backtracks == 1


def test_an_answer_goes_back_to_the_last_sentence_before_the_finding():
    calls = []
    script = scripted("One two. Three four. Now the ass is here. More.", "One two. Three four. All well.")

    def source(answer, attempt):
        calls.append((answer, attempt))
        return script(answer, attempt)

    held = HeldStream(source, phrase_check(PHRASES))
    assert "".join(held) == "One two. Three four. All well."
    assert calls == [("", 0), ("One two. Three four. ", 1)]


def test_a_check_that_raises_ends_the_answer_in_the_refusal():
    def check(answer, final):
        if "out" in answer:
            raise RuntimeError("no memory")
        return Checked(None, len(answer))

    held = HeldStream(scripted(CLEAN), check)
    assert "".join(held) == f"One fine day. {REFUSAL}" and held.outcome == "error"


def test_a_source_that_raises_shows_no_more():
    def source(answer, attempt):
        yield "Good. Bad"
        raise OSError("gone")

    held, shown = HeldStream(source, phrase_check(PHRASES)), []
    with pytest.raises(OSError, match="gone"):
        for piece in held:
            shown.append(piece)
    assert shown == ["Good. "] and held.outcome == "running"


def test_a_finding_over_the_whole_answer_keeps_what_was_shown():
    """A classifier that says no more than "bad" (found 0) cannot take back what is out."""
    held = HeldStream(scripted(CLEAN), lambda a, final: Checked(0 if "Was" in a else None, len(a)), attempts=0)
    assert "".join(held) == f"One fine day. The sun was out, and nothing else happened! {REFUSAL}"


@pytest.mark.parametrize(
    "options, message",
    [({"block_chars": 0}, "block_chars"), ({"attempts": -1}, "attempts"), ({"refusal": "you ass"}, "refusal")],
)
def test_settings_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        HeldStream(scripted(CLEAN), phrase_check(PHRASES), **options)


def test_a_model_as_a_source_goes_another_way_after_a_backtrack(tiny):
    model, tokenizer = tiny
    prompt = tokenizer.encode("Hello there")
    source = LocalSource(model, tokenizer, prompt, max_new_tokens=24, temperature=0.0)
    first, again, third = ("".join(source("", attempt)) for attempt in range(3))
    assert len({first, again, third}) == 3
    given = first[:5]
    assert tokenizer.encode(given) and "".join(source(given, 0)) is not None
    # a check that dislikes the first three ways
    source = LocalSource(model, tokenizer, prompt, max_new_tokens=24, temperature=0.0)
    held = HeldStream(source, lambda a, final: Checked(0 if a and first.startswith(a[:3]) else None, len(a)))
    text = "".join(held)
    assert held.outcome in ("complete", "refused") and (held.outcome == "refused" or not text.startswith(first[:3]))
