"""An answer as claims: sentences, split into clauses where each stands on its own, with offsets into the answer.

Rules for English text, no model. A claim that opens with a pronoun carries the last named subject along for reading. Questions,
requests, opinions and small talk are marked as not worth checking.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_ABBREVIATIONS = frozenset(
    "mr mrs ms dr prof st vs etc e.g i.e fig no inc ltd co corp u.s u.k jr sr gen col sen rep jan feb mar apr jun jul aug sep sept oct"
    " nov dec approx ca al vol pp".split()
)
LONGEST_SENTENCE = 1000  # characters; what is longer is cut at a blank
LONGEST_WORD = 24  # characters that are looked at before a full stop
_END = re.compile(r"[.!?]+[\"'\u201d\u2019)\]]*(?=\s|$)|\n+")
_CLAUSE = re.compile(
    r"(?<!\s)\s*;\s+"
    r"|(?<!\s),?\s+(?:and|but|while|whereas)\s+(?=(?:he|she|it|they|the \w+|this \w+|[A-Z][\w'-]+(?: [A-Z][\w'-]+)*)\s+"
    r"(?:is|are|was|were|has|have|had|can|will|won|did|does|became|wrote|made|began|lies|stands|rises|holds|found|won|"
    r"built|led|took|gave|came|went|left|held|fell|rose|grew|lost|sold|uses|needs|contains|\w+ed)\b)"
)
_PRONOUN = re.compile(r"(he|she|it|they|this|that|these|those|his|her|its|their)\b", re.IGNORECASE)
_SUBJECT = re.compile(
    r"(?:The\s+|An?\s+)?((?:[A-Z][\w'\u2019.-]*|of|de|the|and)(?:\s+(?:[A-Z][\w'\u2019.-]*|of|de|the|and))*)"
)
_OPINION = re.compile(
    r"\b(i (?:think|believe|feel|guess|hope|would say)|in my (?:opinion|view)|personally|arguably|i'm not sure|perhaps you|"
    r"you (?:should|could|might|can|may want)|let me know|feel free|i hope|i can't|i cannot|i'm sorry|as an ai|happy to)\b",
    re.IGNORECASE,
)
_TALK = re.compile(
    r"(sure|certainly|of course|thanks?|thank you|hello|hi|great question|here (?:is|are)|okay|ok)\b[^.]*[:!.]?$", re.I
)
_REQUEST = re.compile(
    r"(please|try|consider|remember|note that you|make sure|check|visit|ask|tell|contact|see|click|add|mix|stir|use|avoid)\s", re.I
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Claim:
    """Characters [start, end) of the answer.

    text      these characters, word for word
    reading   the same with its subject named, for retrieval and comparison
    worth     False: not a statement of fact; `why_not` says what it is
    """

    text: str
    start: int
    end: int
    reading: str
    worth: bool = True
    why_not: str = ""


def sentence_spans(text: str) -> list[tuple[int, int]]:
    """(start, end) of each sentence without the blanks around it; abbreviations, initials and decimals do not end one."""
    spans, start = [], 0
    for found in _END.finditer(text):
        if found[0][0] == "." and _goes_on(text, start, found.start()):
            continue
        spans += _pieces(text, start, found.end())
        start = found.end()
    spans += _pieces(text, start, len(text))
    return [_trimmed(text, a, b) for a, b in spans if re.search(r"\w", text[a:b])]


def _goes_on(text: str, start: int, stop: int) -> bool:
    """Whether the full stop at `stop` ends no sentence: an abbreviation, an initial, or the "1." that opens an item of a list."""
    at = stop
    while at > max(start, stop - LONGEST_WORD) and (text[at - 1].isalnum() or text[at - 1] in "._"):
        at -= 1
    word = text[at:stop].lower()
    if word in _ABBREVIATIONS or re.fullmatch(r"[a-z]|(?:[a-z]\.)+[a-z]", word):
        return True
    return word.isdigit() and at - start < LONGEST_WORD and not text[start:at].strip().strip("-* ")


def _pieces(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The stretch, cut at blanks where it is too long to be a sentence, so that what is asked of each has a bounded cost."""
    while end - start > LONGEST_SENTENCE:
        blank = max(text.rfind(" ", start + LONGEST_SENTENCE // 2, start + LONGEST_SENTENCE), -1)
        cut = blank + 1 if blank >= 0 else start + LONGEST_SENTENCE
        yield start, cut
        start = cut
    yield start, end


def split_claims(answer: str) -> list[Claim]:
    """Claims in the order of the answer."""
    claims: list[Claim] = []
    subject = ""
    for start, end in sentence_spans(answer):
        pieces, first = [], start
        for cut in _CLAUSE.finditer(answer, start, end):
            if min(len(answer[first : cut.start()].split()), len(answer[cut.end() : end].split())) >= 3:
                pieces.append((first, cut.start()))
                first = cut.end()
        for low, high in [*pieces, (first, end)]:
            low, high = _trimmed(answer, low, high)
            text = answer[low:high]
            reading = re.sub(r"^(?:[-*\u2022]|\d+[.)])\s+", "", text)
            pronoun = _PRONOUN.match(reading)
            if pronoun and subject:
                rest = reading[pronoun.end() :]
                owner = pronoun[1].lower() in ("his", "her", "its", "their")
                reading = f"{subject}'s{rest}" if owner else f"{subject}{rest}"
            elif named := _subject(reading):
                subject = named
            why_not = _not_worth(text)
            claims.append(Claim(text, low, high, reading, not why_not, why_not))
    return claims


def _subject(sentence: str) -> str:
    found = _SUBJECT.match(sentence)
    if not found:
        return ""
    name = re.sub(r"(?:(?<!\s)\s+(?:of|de|the|and))+$", "", found[1])
    return name if name[:1].isupper() and name.lower() not in _COMMON_OPENERS else ""


_COMMON_OPENERS = frozenset(
    "in on at the a an it he she they this that these those there here when while if after before since as for by with from some"
    " many most all both each however also because although yes no one two i we you my our your what who how why where".split()
)


def _not_worth(text: str) -> str:
    body = re.sub(r"^(?:[-*\u2022]|\d+[.)])\s+", "", text).strip()
    if body.endswith("?"):
        return "a question"
    if _OPINION.search(body):
        return "an opinion, advice or talk"
    if _TALK.match(body):
        return "talk"
    if _REQUEST.match(body):
        return "a request"
    if len(re.findall(r"\w+", body)) < 3:
        return "too short to state a fact"
    return ""


def _trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    piece = text[start:end]
    return start + len(piece) - len(piece.lstrip()), end - (len(piece) - len(piece.rstrip()))
