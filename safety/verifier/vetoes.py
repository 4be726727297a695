"""What a claim may not get wrong: numbers with their units, dates, names, negation. Rules, no model.

A veto says that a passage which is about the claim contradicts it in one such point. It can turn "supported" into "refuted", never
the reverse, and says which words clash, so that a correction can be offered.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from plumbline.safety.text.scripts import plain

_MONTHS = "january february march april may june july august september october november december".split()
_WORDS = dict(
    zip(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen "
        "nineteen twenty".split(),
        range(21),
        strict=True,
    )
) | dict(zip("thirty forty fifty sixty seventy eighty ninety".split(), range(30, 100, 10), strict=True))
_ORDINALS = dict(
    zip(
        "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth".split(),
        range(1, 13),
        strict=True,
    )
)
_SCALES = {"hundred": 1e2, "thousand": 1e3, "million": 1e6, "billion": 1e9, "trillion": 1e12}
_SHORT = {"k": 1e3, "m": 1e6, "mn": 1e6, "b": 1e9, "bn": 1e9, "t": 1e12}
_UNITS = {  # unit -> (kind, factor to the first unit of its kind)
    **dict.fromkeys(["m", "metre", "metres", "meter", "meters"], ("length", 1.0)),
    **dict.fromkeys(["km", "kilometre", "kilometres", "kilometer", "kilometers"], ("length", 1000.0)),
    **dict.fromkeys(["cm", "centimetre", "centimetres", "centimeter", "centimeters"], ("length", 0.01)),
    **dict.fromkeys(["mm", "millimetre", "millimetres", "millimeter", "millimeters"], ("length", 0.001)),
    **dict.fromkeys(["ft", "foot", "feet"], ("length", 0.3048)),
    **dict.fromkeys(["mi", "mile", "miles"], ("length", 1609.344)),
    **dict.fromkeys(["inch", "inches"], ("length", 0.0254)),
    **dict.fromkeys(["kg", "kilogram", "kilograms", "kilo", "kilos"], ("mass", 1.0)),
    **dict.fromkeys(["g", "gram", "grams"], ("mass", 0.001)),
    **dict.fromkeys(["tonne", "tonnes"], ("mass", 1000.0)),
    **dict.fromkeys(["lb", "lbs", "pound", "pounds"], ("mass", 0.45359237)),
    **dict.fromkeys(["%", "percent", "per cent"], ("share", 1.0)),
    **dict.fromkeys(["second", "seconds"], ("time", 1.0)),
    **dict.fromkeys(["minute", "minutes"], ("time", 60.0)),
    **dict.fromkeys(["hour", "hours"], ("time", 3600.0)),
    **dict.fromkeys(["day", "days"], ("time", 86400.0)),
    **dict.fromkeys(["week", "weeks"], ("time", 604800.0)),
    **dict.fromkeys(["year", "years"], ("years", 1.0)),
    **dict.fromkeys(["decade", "decades"], ("years", 10.0)),
    **dict.fromkeys(["century", "centuries"], ("years", 100.0)),
    **dict.fromkeys(["$", "dollar", "dollars", "usd"], ("dollars", 1.0)),
    **dict.fromkeys(["\u20ac", "euro", "euros"], ("euros", 1.0)),
    **dict.fromkeys(["\u00a3"], ("pounds sterling", 1.0)),
}
_UNIT = "|".join(sorted((re.escape(unit) for unit in _UNITS if unit.isalpha() or " " in unit), key=len, reverse=True))
_SMALL = "|".join(_WORDS)
_MONTH = "|".join(_MONTHS) + "|" + "|".join(f"{month[:3]}\\.?" for month in _MONTHS if month != "may")
_QUANTITY = re.compile(
    rf"(?P<sign>[$\u20ac\u00a3])?(?P<minus>(?<![\w.\u2013-])[-\u2212])?"
    rf"(?:(?<![\w.])(?P<digits>"
    rf"(?:\d{{1,3}}(?:[,'\u2019\u00a0\u2007\u2009\u202f]\d{{3}})+(?!\d)|[1-9]\d{{0,2}}(?: \d{{3}})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
    rf"(?:(?P<ordinal>st|nd|rd|th)|(?P<short>(?-i:[kK]|M|[bB]n|mn|B|T))(?![A-Za-z0-9]))?|"
    rf"\b(?P<words>(?:{_SMALL})(?:[- ](?:{_SMALL}))?)\b|"
    rf"\b(?P<place>{'|'.join(_ORDINALS)})\b)"
    rf"(?:[\s-]+(?P<scale>hundred|thousand|million|billion|trillion))?"
    rf"(?:(?P<percent>\s?%)|[\s-]?(?P<unit>{_UNIT})\b)?",
    re.IGNORECASE,
)
_DATE = re.compile(
    rf"\b(?:(?P<d1>\d{{1,2}})(?:st|nd|rd|th)?\s+(?:of\s+)?(?P<m1>{_MONTH})|(?P<m2>{_MONTH})\s+(?P<d2>\d{{1,2}})(?:st|nd|rd|th)?(?!\d))"
    rf"(?:,?\s+(?P<y>\d{{4}}))?",
    re.IGNORECASE,
)
_CLOCK = re.compile(
    r"(?<![\d:.])(?P<hour>[01]?\d|2[0-4]):(?P<minute>[0-5]\d)(?::[0-5]\d)?(?![\d:])(?:\s*(?P<half>[ap])\.?m\b\.?)?"
    r"|(?<![\w.:])(?P<bare>[01]?\d|2[0-4])(?:\s*(?P<half2>[ap])\.?m\b\.?|\s*o['\u2019]clock\b)"
    r"|\b(?:at|from|until|till|by|before|after|opens|closes) (?P<word>[01]?\d|2[0-4])"
    r"(?=(?: (?:in the (?:morning|afternoon|evening)|at night|on|every|each|daily|to|until|till))\b|\s*(?:[,;!?]|\.(?!\d)|$))",
    re.IGNORECASE,
)
_LATE = re.compile(r"\s*(?:in the (?:afternoon|evening)|at night)\b", re.IGNORECASE)
_NEGATION = re.compile(  # "not only", "no fewer than 300", "No. 5" deny nothing
    r"(?:\b(?!not (?:only|just|merely)\b|no (?:fewer|less|more|later|sooner) than\b|no\. ?\d)"
    r"(?:not|never|no|none|nor|cannot|without|neither|nobody|nothing|fails? to|failed to|denied|false)|n't)\b",
    re.I,
)
_CLAUSE_END = re.compile(
    r"[,;:()]|\b(?:and|but|or|which|who|whose|that|because|although|though|while|when|where|until|unless|since)\b", re.I
)
_NAME = re.compile(
    r"(?:(?:[A-Z]\.)+|[A-Z][\w\u2019'&-]*)(?:\s+(?:(?:of|de|la|van|von|der|the)\s+)?(?:(?:[A-Z]\.)+|[A-Z][\w\u2019'&-]*))*"
)
_OPENING = re.compile(r"[.!?:]\s+$")
_ABOUT = re.compile(
    r"\b(about|around|roughly|approximately|nearly|almost|some|over|more than|at least|up to|less than|under)\s*$", re.I
)


@dataclass(frozen=True, slots=True)
class Quantity:
    """A number as written, characters [start, end): its value in the first unit of its kind.

    kind  "length", "mass", "share", "year", "date", "clock" (minutes), "place" (first, 2nd), "plain" ...
    about the words before it leave room ("about 1,600 metres"): 5 % instead of rounding only
    """

    kind: str
    value: float
    start: int
    end: int
    text: str
    about: bool = False


@dataclass(frozen=True, slots=True)
class Veto:
    """kind: "number", "date", "name" or "negation"; what the claim says and what the passage says instead."""

    kind: str
    claim: str
    passage: str


def quantities(text: str) -> list[Quantity]:
    """Numbers, dates and places in a text, left to right."""
    found: list[Quantity] = []
    taken: set[int] = set()
    for match in _DATE.finditer(text):
        month = next(n for n, name in enumerate(_MONTHS, 1) if name[:3] == (match["m1"] or match["m2"])[:3].lower())
        day = int(match["d1"] or match["d2"])
        if not 1 <= day <= 31:
            continue
        end = match.start("y") if match["y"] else match.end()
        found.append(_quantity("date", month * 100 + day, match.start(), end, text))
        taken |= set(range(match.start(), end))
    for match in _CLOCK.finditer(text):
        group = next(name for name in ("hour", "bare", "word") if match[name])
        if match.start(group) not in taken:
            found.append(_clock(match, group, text))
            taken |= set(range(match.start(group), match.end()))
    for match in _QUANTITY.finditer(text):
        number = next(at for name in ("digits", "words", "place") if (at := match.start(name)) >= 0)
        if number in taken:
            continue
        value, digits = _value(match), match["digits"] or ""
        unit = (match["unit"] or "").lower() or ("%" if match["percent"] else match["sign"] or "")
        if match["place"] or match["ordinal"]:
            if unit and match["place"]:  # "second", "the first year": the word is no unit of the number
                unit = ""
            found.append(
                _quantity("place", value, match.start(), match.end("place") if match["place"] else match.end(), text)
            )
        elif unit:
            kind, factor = _UNITS[unit]
            found.append(_quantity(kind, value * factor, match.start(), match.end(), text))
        elif len(digits) == 4 and digits.isdigit() and 1000 <= value <= 2100 and not match["scale"]:
            found.append(_quantity("year", value, match.start(), match.end(), text))
        elif value != 1 or digits:  # "one" is mostly no number
            found.append(_quantity("plain", value, match.start(), match.end(), text))
    return sorted(found, key=lambda quantity: quantity.start)


def _clock(match: re.Match[str], group: str, text: str) -> Quantity:
    """A time of day in minutes; `about` where it may be before or after noon."""
    hour = int(match[group])
    half = (match["half"] or match["half2"] or "").lower()
    late = half == "p" or _LATE.match(text, match.end()) is not None
    if half or late:
        hour = hour % 12 + 12 * late
    start = match.start(group)
    return Quantity(
        "clock",
        hour * 60 + int(match["minute"] or 0),
        start,
        match.end(),
        text[start : match.end()],
        not half and 0 < hour <= 12,
    )


def _value(match: re.Match[str]) -> float:
    if match["place"]:
        return float(_ORDINALS[match["place"].lower()])
    if match["words"]:
        value = float(sum(_WORDS[word] for word in re.split(r"[- ]", match["words"].lower())))
    else:
        value = float(re.sub(r"[^\d.]", "", plain(match["digits"])))
        if match["short"]:
            value *= _SHORT[match["short"].lower()]
    if match["scale"]:
        value *= _SCALES[match["scale"].lower()]
    return -value if match["minus"] else value


def _quantity(kind: str, value: float, start: int, end: int, text: str) -> Quantity:
    end = start + len(text[start:end].rstrip(" ,"))
    return Quantity(
        kind, value, start, end, text[start:end], _ABOUT.search(text, max(0, start - 24), start) is not None
    )


def same(a: Quantity, b: Quantity) -> bool:
    """Equal up to rounding, or to 5 % where either says "about"; a bare number equals one with a unit."""
    if {a.kind, b.kind} == {"plain", "clock"}:  # "opens **at 9**" beside "at 9": a bare number may be an hour
        hour, clock = (a, b) if b.kind == "clock" else (b, a)
        return (hour.value * 60 - clock.value) % (720 if clock.about else 1440) == 0
    if a.kind != b.kind and "plain" not in (a.kind, b.kind):
        return False
    if a.kind == b.kind == "clock":
        return (a.value - b.value) % (720 if a.about or b.about else 1440) == 0
    if a.kind == b.kind in ("year", "date", "place"):
        return a.value == b.value
    room = 0.05 if a.about or b.about else 0.006 if a.kind == b.kind and a.kind != "plain" else 1e-9
    return abs(a.value - b.value) <= room * max(abs(a.value), abs(b.value))


def names(text: str) -> list[str]:
    """Runs of capitalised words that name something; a single one that only opens a sentence does not count."""
    found = []
    for match in _NAME.finditer(text):
        before = text[max(0, match.start() - 24) : match.start()].rstrip("\"'([")
        opens = (
            match.start() < 24 and not before.strip() or before.endswith("\n") or _OPENING.search(before) is not None
        )
        words = match[0].split()
        if opens and words[0].lower() in _OPENERS:
            words = words[1:]
        elif opens and len(words) == 1 and not words[0][1:].lower() != words[0][1:]:
            continue
        if words and words[0].lower() not in {*_MONTHS, "i"} and (len(words) > 1 or words[0].lower() not in _OPENERS):
            found.append(" ".join(words).rstrip(".'\u2019"))
    return found


_OPENERS = frozenset(
    "the a an in on at it he she they this that these those there when while if after before since as for by with from some many"
    " most all both each however also because although his her its their during under its of to and but".split()
)


def vetoes(claim: str, passage: str) -> list[Veto]:
    """The points in which a passage about the same thing contradicts a claim.

    A number clashes when the passage has numbers of its kind and none is equal; a negation when the sentence nearest to the claim
    is negated and the claim is not, or the other way round. Names: see `name_clashes`.
    """
    return [*number_clashes(claim, passage), *negation_clash(claim, passage)]


def number_clashes(claim: str, passage: str) -> Iterator[Veto]:
    """Numbers and dates of the claim that the passage gives otherwise."""
    there = quantities(passage)
    for quantity in quantities(claim):
        rivals = [other for other in there if _comparable(quantity, other)]
        if rivals and not any(same(quantity, other) for other in there):
            near = min(rivals, key=lambda other: _context_distance(claim, quantity, passage, other))
            kind = "date" if quantity.kind in ("year", "date") else "number"
            yield Veto(kind, quantity.text, near.text)


def unmatched_numbers(claim: str, passage: str) -> list[str]:
    """Numbers of the claim that the passage does not have at all, of whatever kind."""
    there = quantities(passage)
    return [quantity.text for quantity in quantities(claim) if not any(same(quantity, other) for other in there)]


def _comparable(a: Quantity, b: Quantity) -> bool:
    loose = {"plain", "share", "length", "mass", "time", "years"}
    return a.kind == b.kind or ("plain" in (a.kind, b.kind) and {a.kind, b.kind} <= loose)


def _context_distance(claim: str, a: Quantity, passage: str, b: Quantity) -> float:
    """Fewer shared words around two numbers: further apart. Equal kinds win over bare numbers."""
    around_a = set(stems(claim[max(0, a.start - 60) : a.end + 60]))
    around_b = set(stems(passage[max(0, b.start - 60) : b.end + 60]))
    return -len(around_a & around_b) / max(1, len(around_a)) + (a.kind != b.kind)


def negation_clash(claim: str, passage: str) -> Iterator[Veto]:
    """The sentence that shares most words with the claim denies what the claim says, or the other way round.

    A negation counts only if what it negates is spoken of on the other side: "opened in 1932 and carries no trains" says nothing
    against "opened in 1932".
    """
    mine = set(stems(_NEGATION.sub(" ", claim)))
    best, overlap = "", 0.0
    for sentence in re.split(r"(?<=[.!?])\s+", passage):
        shared = len(mine & set(stems(sentence))) / max(1, len(mine))
        if shared > overlap:
            best, overlap = sentence, shared
    if overlap < 0.7:
        return
    ours, theirs = _denials(claim, set(stems(best))), _denials(best, mine)
    if len(ours) % 2 != len(theirs) % 2:
        yield Veto("negation", ours[0] if ours else "", theirs[0] if theirs else "")


def _denials(text: str, other: set[str]) -> list[str]:
    """The negations of a text whose next words (three at most, within the clause; else those before) are mostly in `other`."""
    found = []
    for match in _NEGATION.finditer(text):
        after = _CLAUSE_END.split(text[match.end() :], maxsplit=1)[0]
        before = _CLAUSE_END.split(text[: match.start()])[-1]
        scope = stems(after)[:3] or stems(before)[-3:]
        if scope and sum(stem in other for stem in scope) > len(scope) / 2:
            found.append(match[0])
    return found


def name_clashes(claim: str, passage: str, known: Iterable[str] = ()) -> list[Veto]:
    """Names of the claim that neither the passage nor `known` (a title, other passages of the document) has a word of, where the
    passage puts another name in the same surroundings: the words left and right of the name are the same."""
    there = {stem[:5] for stem in stems(" ".join([passage, *known]))}  # "German" knows Germany
    clashes = []
    for name in names(claim):
        if {stem[:5] for stem in stems(name)} & there:
            continue
        at = claim.find(name)
        left, right = stems(claim[:at])[-3:], stems(claim[at + len(name) :])[:3]
        for other in names(passage):
            if set(stems(other)) & set(stems(claim)):
                continue
            place = passage.find(other)
            near = stems(passage[max(0, place - 60) : place])[-3:], stems(passage[place + len(other) :])[:3]
            if (left and left[-1:] == near[0][-1:]) or (right and right[:1] == near[1][:1]):
                clashes.append(Veto("name", name, other))
                break
    return clashes


_STOP = frozenset(
    "the a an of in on at to for and or but is are was were be been being it its he she they his her their this that these those"
    " with by from as which who whom what when where while than then so such into over under about between after before during"
    " has have had do does did can could will would may might also there one not no".split()
)


def stems(text: str) -> list[str]:
    """Content words, lower case, plural and verb endings cut: enough to compare wording."""
    words = re.findall(r"[^\W_]+(?:['\u2019][a-z]+)?|\d+", text.lower())
    return [_stem(word) for word in words if word not in _STOP]


def _stem(word: str) -> str:
    word = re.sub(r"['\u2019]s?$", "", word)
    for ending in (
        "ations",
        "ation",
        "ments",
        "ment",
        "ingly",
        "edly",
        "ings",
        "ing",
        "ies",
        "ied",
        "ers",
        "ed",
        "es",
        "ly",
        "er",
        "s",
        "e",
    ):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return word[: -len(ending)]
    return word
