"""Banned phrases against a slow checker written another way, token by token, in our engine and under transformers."""

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plumbline.policy_models.rollout.generation import DecodeRow
from plumbline.safety.constrained.banned import BannedPhrases
from plumbline.safety.constrained.spellings import Phrases, canonical, readings

PHRASES = ["ass", "*cunt*", "how to kill", "b0mb", "*ab*"]
ALLOWED = ["Scunthorpe", "cabbage", "kick ass now"]
STOP = 0

CASES = [  # text, phrases, allowed, where it is found
    ("You ass!", ["ass"], [], 4),
    ("a class, an assistant", ["ass"], [], None),
    ("a class", ["*ass"], [], 4),
    ("an assistant", ["*ass"], [], None),
    ("You A\u200bS\u00adS", ["ass"], [], 4),
    ("so a-s-s it is", ["ass"], [], 3),
    ("4ss", ["ass"], [], 0),
    ("it cost 455 and $$$", ["ass", "sss"], [], None),  # no real letter: a number stays a number
    ("call 911 now", ["911"], [], 5),
    ("\uff42\u00f3\u043cb", ["bomb"], [], 0),  # full width, accent, Cyrillic
    ("How,\nto   KILL", ["how to kill"], [], 0),
    ("howtokill", ["how to kill"], [], 0),
    ("how to killjoy", ["how to kill"], [], None),
    ("in Scunthorpe", ["*cunt*"], ["Scunthorpe"], None),
    ("in Scunthorp", ["*cunt*"], ["Scunthorpe"], 4),
    ("in Scunthorps", ["*cunt*"], ["Scunthorpe"], 4),
    ("\u7206\u5f39 is", ["*\u7206\u5f39*"], [], 0),
    ("kick ass now", ["ass"], ["kick ass now"], None),
    ("kick ass then", ["ass"], ["kick ass now"], 5),
]


@pytest.mark.parametrize("text, phrases, allowed, where", CASES)
def test_find_by_hand(text, phrases, allowed, where):
    assert Phrases(phrases, allowed).find(text) == where


def slow(text, phrases=PHRASES, allowed=ALLOWED, ended=True):
    """All of it by brute force: every reading of the text, every place, every spelling.

    ended False: may the text still go on to something without a banned phrase? (an exception half-written counts)
    """
    folded = [(" ",)] if True else []
    real = [False]
    for char in text + ("\n" if ended else ""):
        for options, is_real in readings(char):
            if options == (" ",) and folded[-1] == (" ",):
                continue
            folded.append(options)
            real.append(is_real)

    def at(pattern, start):
        return start + len(pattern) <= len(folded) and all(
            ch in folded[start + i] for i, ch in enumerate(pattern)
        )  # fmt: skip

    def forms(body):
        joined = body.replace(" ", "")
        return {body, joined, " ".join(joined)}

    excuses, begun = [], []
    for word in allowed:
        for form in forms(canonical(word)):
            for start in range(len(folded)):
                if at(form, start):
                    excuses.append((start, start + len(form)))
                rest = len(folded) - start
                if rest < len(form) and at(form[:rest], start):
                    begun.append(start)
    for phrase in phrases:
        for form in forms(canonical(phrase.strip("*"))):
            left, right = not phrase.startswith("*"), not phrase.endswith("*")
            pattern = " " * left + form + " " * right
            for start in range(len(folded)):
                if not at(pattern, start):
                    continue
                first, last = start + left, start + len(pattern) - right
                if any(c.isalpha() for c in form) and not any(real[first:last]):
                    continue
                if any(s <= first and last <= e for s, e in excuses):
                    continue
                if not ended and any(s <= first for s in begun):
                    continue
                return False
    return True


ALPHABET = "abcuntshorpekilwme   -.04$5\u200b\u0430\u00e1X"
text_of = st.text(alphabet=ALPHABET, max_size=14)
pieces = st.lists(
    st.one_of(text_of, st.sampled_from([*PHRASES, *ALLOWED, "c", "unt", "scunt", "horpe", " ass", "ass ", "k1ll"])),
    max_size=5,
)


@settings(max_examples=400, deadline=None)
@given(pieces)
def test_find_agrees_with_the_slow_checker(parts):
    text = "".join(parts).replace("*", "")
    assert (Phrases(PHRASES, ALLOWED).find(text) is None) == slow(text)


def vocabulary(seed, size=160):
    """Random tokens, each byte among them, some that cut a character in two or hold whole phrases."""
    rng = random.Random(seed)
    words = [p.strip("*") for p in (*PHRASES, *ALLOWED)]
    tokens = [b"", *(bytes([b]) for b in range(256))]
    for _ in range(size):
        text = rng.choice(words) if rng.random() < 0.7 else "".join(rng.choices(ALPHABET, k=6))
        text = rng.choice(["", " ", "x"]) + text + rng.choice(["", " ", "s"])
        raw = text.encode()
        low = rng.randrange(len(raw))
        tokens.append(raw[low : low + rng.randrange(1, 8)])
    return tokens


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.integers(0, 416), max_size=6))
def test_a_token_is_forbidden_exactly_when_nothing_can_excuse_the_text_with_it(seed, drawn):
    tokens = vocabulary(seed)
    banned = BannedPhrases(PHRASES_COMPILED, tokens, [STOP])
    state, given_bytes = PHRASES_COMPILED.start, b""
    for token in drawn:
        if token in banned.forbidden(state).tolist():
            continue
        state, given_bytes = banned._read(state, token), given_bytes + tokens[token]
    forbidden = set(banned.forbidden(state).tolist())
    for token in random.Random(seed).sample(range(1, len(tokens)), 60):
        whole = given_bytes + tokens[token]
        assert (token in forbidden) == (not slow(visible(whole), ended=False)), whole
    assert (STOP in forbidden) == (not slow(given_bytes.decode("utf-8", "replace")))


PHRASES_COMPILED = Phrases(PHRASES, ALLOWED)


def visible(raw):
    """Text without the first bytes of a character whose rest is still to come."""
    return raw.decode("utf-8", "replace")


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40))
def test_no_answer_ends_or_is_cut_with_a_banned_phrase(seed, limit):
    """Adversarial logits: pieces of phrases are by far the likeliest; whatever the limit cuts is clean too."""
    tokens = vocabulary(seed)
    banned = BannedPhrases(PHRASES_COMPILED, tokens, [STOP], max_new_tokens=limit)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, len(tokens), generator=generator)
    logits[0, 257:] += 6
    answer = []
    for _ in range(limit):
        left = banned([DecodeRow(0, [1], answer)], logits)[0]
        assert left.max() > -math.inf
        token = int(left.softmax(-1).multinomial(1, generator=generator))
        if token == STOP:
            break
        answer.append(token)
    text = b"".join(tokens[token] for token in answer).decode("utf-8", "replace")
    assert PHRASES_COMPILED.find(text) is None and slow(text)


def test_an_exception_once_begun_must_be_finished():
    tokens = [b"", b"S", b"cunt", b"horpe", b" ", b"x", b"h"]
    banned = BannedPhrases(Phrases(["*cunt*"], ["Scunthorpe"]), tokens, [STOP])
    plain = banned.forbidden(banned.phrases.start).tolist()
    assert plain == [2]
    state = banned._read(banned._read(banned.phrases.start, 1), 2)
    assert banned.forbidden(state).tolist() == [STOP, 1, 2, 4, 5]


def test_rows_and_calls_do_not_touch_each_other():
    tokens = vocabulary(3)
    banned = BannedPhrases(PHRASES_COMPILED, tokens, [STOP])
    rows = [DecodeRow(0, [1], []), DecodeRow(1, [1], [98, 99]), DecodeRow(2, [1], [1 + ord("a")])]
    logits = torch.zeros(3, len(tokens))
    together = banned(rows, logits)
    assert logits.eq(0).all()  # the caller's are left alone
    for at, row in enumerate(rows):
        alone = BannedPhrases(PHRASES_COMPILED, tokens, [STOP])([row], logits[:1])
        torch.testing.assert_close(alone[0], together[at])
    again = banned([DecodeRow(1, [1], [])], logits[:1])  # another answer under the same number
    torch.testing.assert_close(again[0], together[0])


@pytest.mark.parametrize("phrase", ["", "**", " - "])
def test_a_phrase_without_letters_is_refused(phrase):
    with pytest.raises(ValueError, match="no letter"):
        Phrases([phrase])
