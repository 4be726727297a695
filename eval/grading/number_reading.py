"""Numbers as people and models write them: the one place where a grader reads a number.

    29.00 = 29      70,000.00 = 70'000 = 1 000 with any blank, no-break or thin      −5 (U+2212)      .5      1e-3      2 × 10^3
    1/2 = ½ = \\frac{1}{2}      $29.00      20 %      3 million      ２９ (full width), ٢٩ (any script with decimal digits)

What could be two things is read so: a comma before one or two last digits is a decimal comma (29,00), before three a
separator (70,000); a single dot is always a decimal point (1.000 is one); a blank joins groups of three digits after a first group of
one to three that does not begin with 0. "3 million" is 3000000 and also stands for 3 (somebody may have asked for millions),
"20 %" is 20 and also stands for 0.2. Digits inside a word (CO2, H2O), dates with slashes (5/6/2024), clock times (9:30)
and version numbers (1.2.3) are no numbers.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

_BLANKS = " \u00a0\u2007\u2009\u202f\u2002\u2006\u2008"  # those that stand between groups of digits
_AS_ASCII = str.maketrans(
    {
        "\u2212": "-", "\u2010": "-", "\u2011": "-", "\u2012": "-", "\u2013": "-", "\ufe63": "-", "\uff0d": "-",
        "\uff0b": "+", "\uff0c": ",", "\uff0e": ".", "\uff05": "%", "\u066a": "%", "\u066b": ".", "\u066c": ",",
        "\u2019": "'", "\u00b7": "*", "\u22c5": "*", "\u00d7": "*", "\u2044": "/", "\uff04": "$",
    }
)  # fmt: skip
_POWERS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_VULGAR = {ch: Fraction(unicodedata.numeric(ch)).limit_denominator(10) for ch in "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅐⅛⅜⅝⅞⅑⅒"}
_SCALES = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12, "mn": 6, "bn": 9}
SCALE_WORDS = frozenset(_SCALES)
_SMALL = """two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen
nineteen""".split()  # "one" is mostly no number
_WORDS = {word: at for at, word in enumerate(_SMALL, start=2)}
_TENS = dict(zip("twenty thirty forty fifty sixty seventy eighty ninety".split(), range(20, 100, 10), strict=True))
_IN_WORDS = re.compile(
    rf"\b(?:(?P<tens>{'|'.join(_TENS)})(?:[- ](?P<ones>one|{'|'.join(list(_WORDS)[:8])}))?|(?P<small>{'|'.join(_WORDS)}|zero))"
    rf"(?P<scales>(?: (?:hundred|{'|'.join(_SCALES)}))*)\b", re.IGNORECASE,
)  # fmt: skip
_LATEX = ((r"\\[dt]?frac\s*\{\s*(-?\d+)\s*\}\s*\{\s*(\d+)\s*\}", r" \1/\2 "), (r"\{,\}", ","), (r"\\[,;:! ]", "\u2009"),
          (r"\\([$%])", r"\1"), (r"\\times\b|\\cdot\b", "*"))  # fmt: skip
_B = f"[{_BLANKS}]"
_NUMBER = re.compile(
    rf"""(?<![\w.])(?<![\w][/:.])  # not inside a word or a longer run of digits
    (?P<sign>[-+]?)(?P<money>[$€£¥]\s?(?P<after>-?))?
    (?P<whole>
        \d{{1,3}}(?:,\d{{3}})+(?!\d)          # 70,000
      | [1-9]\d{{0,2}}(?:{_B}\d{{3}})+(?!\d)  # 1 000
      | \d{{1,3}}(?:'\d{{3}})+(?!\d)          # 70'000
      | \d{{1,3}}(?:\.\d{{3}}){{2,}}(?![.\d]) # 1.234.567
      | \d+
    )?
    (?P<part>[.]\d+|(?<=\d),\d{{1,2}}(?!\d|,\d))?
    (?P<exponent>[eE][-+]?\d{{1,3}}(?!\w)|\s?[*x]\s?10(?:\^|\*\*)\{{?(?P<power>[-+]?\d{{1,3}})\}}?)?
    (?:{_B}?(?P<vulgar>[{"".join(_VULGAR)}])|\s?/\s?(?P<below>[1-9]\d*)(?![\d/.,]*[\d/]))?
    (?:{_B}*(?P<percent>%|percent\b|per{_B}cent\b)|[-{_BLANKS}](?P<scale>{"|".join(_SCALES)})s?\b)?
    """,
    re.VERBOSE,
)
_RUN = re.compile(r"\d+(?:\.\d+){2,}|\d+/\d+/\d+|\d{1,2}(?::\d{2})+(?!\d)")  # a version, a date, a clock time


@dataclass(frozen=True)
class Number:
    """A number of a text. `values`: the one that it says, then what it also stands for; `start`, `end`: in the text as read."""

    values: tuple[Fraction, ...]
    start: int
    end: int

    def equals(self, other: Number) -> bool:
        """Whether one of them stands for what the other says."""
        return self.values[0] in other.values or other.values[0] in self.values

    def __str__(self) -> str:
        return plain(self.values[0])


def plain(value: Fraction) -> str:
    """The shortest way to write a value: 29, -5, 0.5, and 1/3 where decimals have no end."""
    if value.denominator == 1:
        return str(value.numerator)
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    if rest != 1:
        return f"{value.numerator}/{value.denominator}"
    return format((Decimal(value.numerator) / Decimal(value.denominator)).normalize(), "f")


def numbers_in(text: str) -> list[Number]:
    """All numbers of a text, in order."""
    return list(_numbers(_readable(text)))


def numbers_in_words(text: str) -> list[Number]:
    """Numbers that are spelled, "zero" and from "two" on: seven, twenty-one, three million. Years and dates in words are not read."""
    found = []
    for match in _IN_WORDS.finditer(text):
        words = {name: (match[name] or "").lower() for name in ("tens", "ones", "small", "scales")}
        value = Fraction(_TENS.get(words["tens"], 0) + (_WORDS | {"one": 1}).get(words["ones"] or words["small"], 0))
        base = value
        for scale in words["scales"].split():
            value *= 10 ** (_SCALES | {"hundred": 2})[scale]
        found.append(Number((value,) if value == base else (value, base), *match.span()))
    return found


def as_number(text: str) -> Number | None:
    """The number that the whole text is, currency, emphasis, brackets, "x =" and a final stop aside; None if it is more or none."""
    readable = re.sub(r"\\(?:boxed|text|mathrm|mathbf)\s*\{([^{}]*)\}", r"\1", _readable(text))
    bare = re.sub(r"^\s*[A-Za-z]\w*\s*=", "", readable).strip(' \t\r\n*_`"()[]{}:;!~≈=').rstrip(".,").strip()
    found = list(_numbers(bare))
    rest = (bare[: found[0].start] + bare[found[0].end :]) if len(found) == 1 else "more"
    return found[0] if len(found) == 1 and not rest.strip(" $€£¥*_") else None


def final_number(text: str) -> Number | None:
    r"""The number that an answer comes to; None if it holds none.

    The first of these that holds one: what stands behind the last "####" (GSM8K's mark), the last \boxed{...}, the sentence
    behind the last "answer is" or "answer:", the whole text, the whole text in words ("seven"). Behind "####" the first number
    counts ("#### 3 in 2 steps"), elsewhere the last.
    """
    readable = _readable(text)
    marked = re.split(r"#{3,}", readable)
    if len(marked) > 1:
        for line in marked[-1].strip().split("\n")[:1]:
            found = list(_numbers(line))
            if found:
                return found[0] if not line[: found[0].start].strip(" $€£¥*_:=") else _after_phrase(line) or found[-1]
    boxed = re.findall(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}", readable)
    if boxed and (found := list(_numbers(boxed[-1]))):
        return found[-1]
    found = list(_numbers(readable))
    return _after_phrase(readable) or next(reversed(found or numbers_in_words(text)), None)


def _after_phrase(readable: str) -> Number | None:
    """The last number of the sentence behind the last "answer is", "answer:" or "answer ="; None without one."""
    for phrase in reversed(list(re.finditer(r"\b(?:answer|result)\b[*_]*\s*(?:is|[:=])", readable, re.IGNORECASE))):
        sentence = re.split(
            r"(?<=[^\s\d.])[.!?](?=\s|$)|(?<=\d)[.!?](?=\s|$)|\n", readable[phrase.end() :].lstrip(), maxsplit=1
        )[0]
        if found := list(_numbers(sentence)):
            return found[-1]
    return None


def equal_numbers(a: str, b: str) -> bool:
    """Whether both texts are one number each, and those are equal."""
    first, second = as_number(a), as_number(b)
    return first is not None and second is not None and first.equals(second)


def _numbers(readable: str) -> Iterator[Number]:
    out = [match.span() for match in _RUN.finditer(readable) if not _is_grouped(match.group())]
    at = 0
    while at <= len(readable) and (match := _NUMBER.search(readable, at)):
        at = max(match.end(), match.start() + 1)
        if not (match["whole"] or match["part"] or match["vulgar"]):
            continue
        if any(start <= match.end() - 1 and match.start() < end for start, end in out):
            at = max([at, *(end for start, end in out if start <= match.end() - 1 and match.start() < end)])
            continue
        if (match["part"] or "").startswith(",") and readable[: match.start()].endswith(","):
            at = match.end("whole")  # 1,2,3 is a list: no decimal comma behind another comma
            match = _NUMBER.match(readable[:at], match.start())
            assert match is not None
        yield Number(_values(match), match.start(), match.end())


def runs_in(text: str) -> list[str]:
    """Dates with slashes, clock times and version numbers, as they are written."""
    return [run for run in _RUN.findall(_readable(text)) if not _is_grouped(run)]


def _is_grouped(run: str) -> bool:
    return re.fullmatch(r"\d{1,3}(?:\.\d{3}){2,}", run) is not None


def _values(match: re.Match[str]) -> tuple[Fraction, ...]:
    whole = re.sub(rf"[,'.{_BLANKS}]", "", match["whole"] or "") or "0"
    value = Fraction(f"{whole}.{match['part'][1:]}") if match["part"] else Fraction(whole)
    if match["exponent"]:
        value *= Fraction(10) ** int(match["power"] or match["exponent"][1:])
    if match["vulgar"]:
        value += _VULGAR[match["vulgar"]]
    if match["below"]:
        value /= int(match["below"])
    if match["sign"] == "-" or match["after"]:
        value = -value
    if match["scale"]:
        return value * 10 ** _SCALES[match["scale"]], value
    return (value, value / 100) if match["percent"] else (value,)


def _readable(text: str) -> str:
    """The text with decimal digits, signs and separators of Unicode and LaTeX in ASCII."""
    for pattern, plainer in _LATEX:
        text = re.sub(pattern, plainer, text)
    if text.isascii():
        return text
    text = re.sub(r"10([⁻⁺]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+)", lambda m: f"10^{m.group(1).translate(_POWERS)}", text)
    return "".join(map(_ascii_digit, text.translate(_AS_ASCII)))


_ascii_digit: Callable[[str], str] = lambda ch: (  # noqa: E731
    ch if ch.isascii() or (value := unicodedata.decimal(ch, None)) is None else str(value)
)
