"""Readings of a text: what a person would read in it, and what is encoded in it, each with a map back to the original.

    folded     compatibility forms, look-alike letters, invisible characters, s p a c e d letters and l33t undone
    tags       what Unicode tag characters spell (a reader sees nothing)
    base64, hex, url, entities, rot13, reversed    a stretch of the text decoded; up to two layers deep

Scanners read every view, and a view may only add findings: the raw text is always scanned too. Nothing here decides that a text
is bad; a reading that makes no sense is simply scanned for nothing. Where a rule needs to know English words (leet, rot13, letter
spacing without word gaps) it uses the vocabulary of the bundled tokenizer, ordered by frequency; without it those rules do less.
"""

from __future__ import annotations

import base64
import binascii
import codecs
import html
import re
import string
import unicodedata
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from plumbline.safety.text.words import common_words, vocabulary, word_ends

DEPTH = 2  # layers of encoding that are undone
MAX_DECODED = 20_000  # characters of decoded text a text, all segments together
MAX_SEGMENTS = 16
MAX_MARKS = 32  # of one letter that are put in order together (UAX 15 stream-safe text has 30): sorting them takes quadratic time
Edit = tuple[int, int, str]  # characters [start, end) become the string

# Zero-width, joiners, bidi controls and isolates, soft hyphen, fillers, variation selectors, tags, and controls but for \t \n \r.
INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f"
    "\ufeff\uffa0\U000e0000-\U000e0fff\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]"
)
TAGS = re.compile("[\U000e0020-\U000e007e]+")
SURROGATES = re.compile("[\ud800-\udfff]")

_LOOKALIKES = {  # letter -> characters that are drawn like it and that NFKC leaves alone
    "a": "аɑαᴀ", "b": "ЬʙВвƄ", "c": "сϲᴄ", "d": "ԁɗᴅ", "e": "еєҽε℮ᴇ", "f": "ғꜰ", "g": "ɡցɢ", "h": "һհʜ", "i": "іɩιıɪӏ",
    "j": "јϳᴊ", "k": "κкᴋ", "l": "ʟⅼ", "m": "мᴍ", "n": "ոռɴ", "o": "оοօσᴏ", "p": "рρᴘ", "q": "ԛզ", "r": "ʀг", "s": "ѕꜱ",
    "t": "тτᴛ", "u": "υսᴜ", "v": "νѵᴠ", "w": "ԝաᴡѡ", "x": "хχ", "y": "уүʏγ", "z": "ᴢ",
    "A": "АΑᎪ", "B": "ВΒᏴ", "C": "СϹᏟ", "D": "Ꭰ", "E": "ЕΕᎬ", "F": "Ϝ", "G": "Ԍ", "H": "НΗᎻ", "I": "ІΙӀ", "J": "ЈᎫ",
    "K": "КΚᏦ", "L": "Ꮮ", "M": "МΜᎷ", "N": "Ν", "O": "ОΟՕ", "P": "РΡᏢ", "Q": "Ԛ", "R": "Ꭱ", "S": "ЅᏚ", "T": "ТΤᎢ",
    "U": "Ս", "V": "ѴᏙ", "W": "ԜᎳ", "X": "ХΧ", "Y": "УΥҮ", "Z": "ΖᏃ",
}  # fmt: skip
CONFUSABLE = {ord(other): letter for letter, others in _LOOKALIKES.items() for other in others}
LEET = str.maketrans("4@3105$7!8+", "aaeiosstibt")
LEET_L = str.maketrans("4@3105$7!8+", "aaelosstlbt")  # 1 and ! can also stand for l

_NON_ASCII = re.compile(r"[^\x00-\x7f]+")
_WORD = re.compile(r"\w+")
# Single characters with blanks between them, at least five; or letters with one sign between them.
_SPACED = re.compile(
    r"(?<!\S)\S(?:[ \t]{1,4}\S){4,}(?!\S)|(?<![^\W_])[^\W_](?:(?:[._*|~-][ \t]?|[ \t][._*|~-][ \t])[^\W_]){4,}(?![^\W_])"
)
_LEET_WORD = re.compile(r"(?<![\w@$!+])[^\W\d]{0,29}[\d@$!+][\w@$!+]{0,29}")
_BASE64 = re.compile(r"(?<![\w+/=-])(?:[A-Za-z0-9+/_-]{40,76}\r?\n){0,200}[A-Za-z0-9+/_-]{16,20000}={0,2}")
_HEX = re.compile(r"(?<![0-9A-Za-z])(?:(?:0x|\\x)?[0-9a-fA-F]{2}[ :,]{0,2}){8,10000}(?![0-9A-Za-z])")
_URL = re.compile(r"(?:[\w.~+-]|%[0-9a-fA-F]{2}){9,20000}")
_ENTITY = re.compile(r"(?:&#(?:x[0-9a-fA-F]{1,6}|[0-9]{1,7});[ ]?){4,5000}")
_LETTERS = re.compile(r"[A-Za-z]{2,30}")


@dataclass(frozen=True, slots=True)
class View:
    """One reading. `starts[i]`, `ends[i]` are the characters of the original that character i of `text` stands for."""

    name: str
    text: str
    starts: Sequence[int]
    ends: Sequence[int]

    def to_original(self, start: int, end: int) -> tuple[int, int]:
        """Characters [start, end) of this reading as characters of the original; an empty stretch gives an empty one."""
        start, end = min(start, len(self.text)), min(end, len(self.text))
        if start >= end:
            at = self.starts[start] if start < len(self.starts) else (self.ends[-1] if self.ends else 0)
            return at, at
        return min(self.starts[start:end]), max(self.ends[start:end])

    def edited(self, name: str, edits: Sequence[Edit]) -> View:
        """This reading with the edits made (sorted, not overlapping); each new character maps to all that it replaced."""
        if not edits:
            return self
        text: list[str] = []
        starts: list[int] = []
        ends: list[int] = []
        at = 0
        for start, end, new in edits:
            text.append(self.text[at:start])
            starts += self.starts[at:start]
            ends += self.ends[at:start]
            text.append(new)
            where = self.to_original(start, end)
            starts += [where[0]] * len(new)
            ends += [where[1]] * len(new)
            at = end
        text.append(self.text[at:])
        starts += self.starts[at:]
        ends += self.ends[at:]
        return View(name, "".join(text), starts, ends)


def raw_view(text: str) -> View:
    """The text itself; lone surrogates, which no tokenizer takes, become U+FFFD, character for character."""
    clean = text if text.isascii() else SURROGATES.sub("\ufffd", text)
    return View("raw", clean, range(len(text)), range(1, len(text) + 1))


def views(text: str) -> list[View]:
    """The raw text first, then every other reading that differs from it."""
    raw = raw_view(text)
    found = [raw]
    folded = fold(raw)
    if folded.text != raw.text:
        found.append(folded)
    budget = MAX_DECODED
    layer = [raw, folded] if folded.text != raw.text else [raw]
    seen = {view.text for view in layer}
    for _ in range(DEPTH):
        deeper: list[View] = []
        for view in layer:
            for inner in _decoded(view):
                if inner.text in seen or len(inner.text) > budget or len(found) > MAX_SEGMENTS:
                    continue
                seen.add(inner.text)
                budget -= len(inner.text)
                clear = fold(inner)
                deeper.append(clear)
                found.append(clear)
        layer = deeper
    return found


# ------------------------------------------------------------------------------------------------------------ folding


def fold(view: View) -> View:
    """The reading as a person would take it in: see the top of this file. Keeps its name unless it is the raw text."""
    name = "folded" if view.name == "raw" else view.name
    if not view.text.isascii() or INVISIBLE.search(view.text):
        view = view.edited(name, [(m.start(), m.end(), "") for m in INVISIBLE.finditer(view.text)])
        view = view.edited(name, list(_compatibility(view.text)))
        view = view.edited(name, list(_lookalikes(view.text)))
    view = view.edited(name, list(_spacing(view.text)))
    return view.edited(name, list(_leet(view.text)))


def _compatibility(text: str) -> Iterator[Edit]:
    """NFKC, and accents off Latin letters, one letter with its combining marks at a time."""
    for run in _NON_ASCII.finditer(text):
        at = run.start()
        # An ASCII letter before the run may carry its first marks.
        if at and unicodedata.combining(text[at]):
            at -= 1
        while at < run.end():
            end = at + 1
            while end < min(run.end(), at + MAX_MARKS) and unicodedata.combining(text[end]):
                end += 1
            piece = text[at:end]
            new = unicodedata.normalize("NFKC", piece)
            plain = unicodedata.normalize("NFD", new)
            if plain and plain[0].isascii():
                new = "".join(ch for ch in plain if not unicodedata.combining(ch))
            if new != piece:
                yield at, end, new
            at = end


def _lookalikes(text: str) -> Iterator[Edit]:
    """Words that are wholly Latin once their look-alikes are replaced.

    In a text with other words in Cyrillic or Greek, only words that mix scripts: there, "как" is a word and no disguise.
    """
    words = [word for word in _WORD.finditer(text) if not word.group().isascii()]
    latin = [word.group().translate(CONFUSABLE) for word in words]
    real = any(not new.isascii() for new in latin)
    for word, new in zip(words, latin, strict=True):
        mixed = any(ch.isascii() and ch.isalpha() for ch in word.group())
        if new.isascii() and (mixed or not real):
            for i, (a, b) in enumerate(zip(word.group(), new, strict=True)):
                if a != b:
                    yield word.start() + i, word.start() + i + 1, b


def _spacing(text: str) -> Iterator[Edit]:
    """`h o w  t o`: wider gaps are word gaps; where all gaps are alike, the likeliest words are found."""
    for run in _SPACED.finditer(text):
        by_blanks = all(len(piece) == 1 for piece in run.group().split())
        keep = [i for i in range(run.start(), run.end()) if (not text[i].isspace() if by_blanks else text[i].isalnum())]
        if sum(text[i].isalnum() for i in keep) < 5:
            continue
        gaps = [text[a + 1 : b] for a, b in zip(keep, keep[1:], strict=False)]
        narrow = min(len(gap) for gap in gaps)
        wide = [len(gap) > narrow for gap in gaps]
        if not any(wide):
            cuts = word_ends("".join(text[i] for i in keep))
            wide = [i + 1 in cuts for i in range(len(gaps))]
        for a, b, is_wide in zip(keep, keep[1:], wide, strict=False):
            yield a + 1, b, " " if is_wide else ""


def _leet(text: str) -> Iterator[Edit]:
    """Words that mix letters with the digits and signs drawn like letters, where that gives a known word."""
    known = vocabulary()
    found: list[Edit] = []
    for word in _LEET_WORD.finditer(text):
        old = word.group().rstrip("!+")
        if not any(ch.isalpha() for ch in old):
            continue
        for table in (LEET, LEET_L):
            new = old.translate(table)
            if new != old and new.isalpha() and (new.lower() in known if known else len(new) > 3):
                found.append((word.start(), word.start() + len(old), new))
                break
    if len(found) > 2:  # a text in leet: numbers in it may be words too ("70" for "to")
        taken = {start for start, _, _ in found}
        for word in re.finditer(r"(?<!\w)[0-9@$]{1,10}(?!\w)", text):
            new = word.group().translate(LEET)
            if word.start() not in taken and new.isalpha() and known.get(new, 1 << 20) < 3000:
                found.append((word.start(), word.end(), new))
        found.sort()
    yield from found


# ------------------------------------------------------------------------------------------------------------ decoding


def _decoded(view: View) -> Iterator[View]:
    text = view.text
    for tags in TAGS.finditer(text):
        yield _segment(view, "tags", tags.start(), tags.end(), "".join(chr(ord(ch) - 0xE0000) for ch in tags.group()))
    for name, sign, pattern, decode in _CODECS:
        for match in pattern.finditer(text) if sign in text else ():
            plain = decode(match.group())
            if plain and _readable(plain):
                yield _segment(view, name, match.start(), match.end(), plain)
    yield from _ciphers(view)


def _segment(view: View, name: str, start: int, end: int, plain: str) -> View:
    first, last = view.to_original(start, end)
    if len(plain) == end - start:  # letter for letter
        return View(name, plain, list(view.starts[start:end]), list(view.ends[start:end]))
    return View(name, plain, [first] * len(plain), [last] * len(plain))


def _base64(text: str) -> str | None:
    packed = re.sub(r"\s", "", text).rstrip("=").replace("-", "+").replace("_", "/")
    if packed.isalpha() and (packed.islower() or packed.isupper()) or packed.isdigit():
        return None  # a word or a number, not base64
    return _utf8(lambda: base64.b64decode(packed[: len(packed) - (len(packed) % 4 == 1)] + "=" * (-len(packed) % 4)))


def _hex(text: str) -> str | None:
    digits = re.sub(r"0x|\\x|[ :,]", "", text)
    return _utf8(lambda: bytes.fromhex(digits))


def _url(text: str) -> str | None:
    return urllib.parse.unquote_plus(text, errors="replace") if text.count("%") >= 3 else None


def _utf8(decode: Callable[[], bytes]) -> str | None:
    try:
        return decode().decode("utf-8")
    except (ValueError, binascii.Error):
        return None


_CODECS: tuple[tuple[str, str, re.Pattern[str], Callable[[str], str | None]], ...] = (  # name, what must occur, ...
    ("base64", "", _BASE64, _base64),
    ("hex", "", _HEX, _hex),
    ("url", "%", _URL, _url),
    ("entities", "&#", _ENTITY, html.unescape),
)


def _readable(text: str) -> bool:
    """Mostly letters, digits, blanks: bytes that happen to be valid UTF-8 seldom are."""
    usual = sum(ch.isalnum() or ch in " \n\t.,;:!?'\"-_=/()" for ch in text)
    return usual >= 0.85 * len(text) and sum(ch.isalpha() for ch in text) >= 4


def _ciphers(view: View) -> Iterator[View]:
    """The stretch of words that rot13, or reading backwards, turns into known words most clearly, if four or more."""
    common = common_words()
    words = " ".join(_LETTERS.findall(view.text)).lower().split()
    odd = [word for word in words if word not in common]
    if not common or len(words) < 4 or len(odd) < 0.02 * len(words):
        return
    for name, change in (("rot13", _rot13), ("reversed", _reversed)):
        disguised = _disguised(change)
        if sum(word in disguised for word in odd) < 4:  # no run can gain more
            continue
        first, last, best = _best_run([(word in disguised) - (word in common) for word in words])
        if best >= 4:
            spans = [word.span() for word in _LETTERS.finditer(view.text)]
            start, end = spans[first][0], spans[last][1]
            yield _segment(view, name, start, end, change(view.text[start:end]))


@lru_cache(maxsize=2)
def _disguised(change: Callable[[str], str]) -> frozenset[str]:
    """The common words as they look in a cipher; both ciphers undo themselves."""
    return frozenset(map(change, common_words()))


_ROT13 = {ord(a): codecs.encode(a, "rot13") for a in string.ascii_letters}


def _rot13(text: str) -> str:
    return text.translate(_ROT13)


def _reversed(text: str) -> str:
    return text[::-1]


def _best_run(gain: Sequence[int]) -> tuple[int, int, int]:
    """First and last index of the stretch with the greatest sum, and the sum (Kadane)."""
    best, first, last = 0, 0, 0
    total, start = 0, 0
    for at, value in enumerate(gain):
        if total <= 0:
            total, start = 0, at
        total += value
        if total > best:
            best, first, last = total, start, at
    return first, last, best
