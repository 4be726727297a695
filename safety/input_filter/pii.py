"""Personal data with a structure: e-mail, telephone, card, bank account, IP and web addresses, identity and licence numbers.

A pattern proposes, a checksum or the `phonenumbers` library confirms, and words nearby ("card", "call me on") decide where
the form alone does not. Names and postal addresses have no structure: they need a named-entity model, which this is not.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from plumbline.safety.findings import ALL_STAGES, Category, Cost, Finding, ScanItem, Span, Stage
from plumbline.safety.taxonomy import meaning

MAX_PHONE_CHECKS = 40  # numbers a text that the library looks up; a page of digits must not take seconds
NEAR = 48  # characters before a number in which a word counts as its context


@dataclass(frozen=True, slots=True)
class Hit:
    start: int
    end: int
    category: Category
    score: float


class Pii:
    """One finding a hit: a threshold of the policy then decides over each of them.

    Args:
        regions: two-letter countries whose national number formats count as telephone numbers without a prefix.
        kinds: categories to look for, as "email", "phone" ...; all of them if not given.
        floor: hits below it are left out.
    """

    version = "1"
    stages: frozenset[Stage] = ALL_STAGES
    cost: Cost = "regex"
    folds = True

    def __init__(
        self,
        *,
        name: str = "pii",
        regions: Sequence[str] = (
            "US",
            "GB",
            "CA",
            "AU",
            "DE",
            "FR",
            "ES",
            "IT",
            "NL",
            "BE",
            "CH",
            "AT",
            "SE",
            "NO",
            "IN",
        ),
        kinds: Sequence[str] | None = None,
        floor: float = 0.3,
    ) -> None:
        unknown = set(kinds or ()) - {find.__name__ for find in _FINDERS}
        if unknown:
            raise ValueError(
                f"pii kinds {sorted(unknown)} are unknown; known are {[find.__name__ for find in _FINDERS]}"
            )
        self.name, self.regions, self.floor = name, tuple(regions), floor
        self.finders = [find for find in _FINDERS if kinds is None or find.__name__ in kinds]
        self.categories: tuple[str, ...] = ("pii.*",)

    def scan(self, items: Sequence[ScanItem]) -> list[list[Finding]]:
        return [self._scan(item.text) for item in items]

    def hits(self, text: str) -> list[Hit]:
        """Hits that do not overlap, in order; of two that do, the one with the checksum (found first) stays."""
        taken: list[Hit] = []
        for find in self.finders:
            for hit in find(text, self.regions):
                if hit.score >= self.floor and not any(
                    hit.start < other.end and other.start < hit.end for other in taken
                ):
                    taken.append(hit)
        return sorted(taken, key=lambda hit: hit.start)

    def _scan(self, text: str) -> list[Finding]:
        return [
            Finding(
                scanner=self.name,
                version=self.version,
                category=hit.category,
                score=hit.score,
                spans=(Span(start=hit.start, end=hit.end, label=hit.category),),
                reason=meaning(hit.category),
            )
            for hit in self.hits(text)
        ]


# ------------------------------------------------------------------------------------------------------------ finders

_EMAIL = re.compile(
    r"(?<![\w.%+-])[A-Za-z0-9_][\w.%+'-]{0,63}@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,62})\.){1,6}[A-Za-z]{2,24}(?![\w-])"
)
_URL = re.compile(r"(?:https?://|(?<![\w.@/])www\.)[^\s<>\"'`\]){}]{3,500}", re.IGNORECASE)
_NUMBER = re.compile(r"\d(?<![\w.,+-].)(?:[ -]?\d){11,18}(?![\w-])")
_IBAN = re.compile(r"(?<!\w)[A-Za-z]{2}\d{2}(?:[ ]?[A-Za-z0-9]{4}){2,7}(?:[ ]?[A-Za-z0-9]{1,3})?(?!\w)")
_IPV4 = re.compile(r"\d(?<![\w.-].)\d{0,2}\.(?:\d{1,3}\.){2}\d{1,3}(?![\w-]|\.\d)")
_IPV6 = re.compile(r"(?<![\w:.])[0-9A-Fa-f:]{3,39}(?![\w:])")
_PHONE = re.compile(
    r"(?<![\w.,/:=#-])(?:\+|\(\+?)?\d(?:[ ().\-/\u2010-\u2015]{0,3}\d){6,14}(?:[ ,]{0,2}(?:x|ext\.?|#)[ ]?\d{1,6})?(?![\w-]|[.,/]\d)"
)
_LICENCE = re.compile(r"(?<![\w-])(?:[A-Za-z]{1,2}\d{5,14}[A-Za-z]{0,2}|\d{6,12}|\d{4}-\d{2}-\d{4})(?![\w-])")
_CONTEXT = {
    "phone": re.compile(
        r"phone|mobile|\bcell\b|\bcall|\btel\b|\bfax\b|\btext\b|\bring\b|\breach\b|contact|whatsapp|\bnumber\b|hotline",
        re.I,
    ),
    "card": re.compile(r"card|visa|master|amex|credit|debit|charge|\bcc\b", re.I),
    "licence": re.compile(r"licen[cs]e|\bdl\b|driving|driver", re.I),
    "nhs": re.compile(r"\bnhs\b", re.I),
    "sin": re.compile(r"\bsin\b|social insurance", re.I),
    "ssn": re.compile(r"\bssn\b|social security", re.I),
}
_ISSUER = re.compile(r"3[0-9]|4|5[0-9]|6[0-9]|2[2-7]")
_NO_ADDRESS = re.compile(r"(?:section|sec\.|version|release|chapter|clause|paragraph|figure|v\.?|§) ?$", re.I)
_SSN_SHAPE = re.compile(r"\d{3}-\d{2}-\d{4}")
# A year from 1000 to 2099 with a day and a month, and maybe the hour: 1/22/1975, 1975-03-12 14
_DATE = re.compile(r"(?:(?:1\d|20)\d\d([-./])\d{1,2}\1\d{1,2}|\d{1,2}([-./])\d{1,2}\2(?:1\d|20)\d\d)(?: \d{1,2})?")
_LOOKS_LIKE_DATE = re.compile(r"\d{1,4}[-./ ]\d{1,2}[-./ ]\d{1,4}(?: .*)?$")


def near(text: str, start: int, what: str) -> bool:
    """Whether a word of the context `what` stands shortly before a position."""
    return _CONTEXT[what].search(text, max(0, start - NEAR), start) is not None


def email(text: str, regions: Sequence[str]) -> Iterator[Hit]:
    if "@" in text:
        for found in _EMAIL.finditer(text):
            yield Hit(found.start(), found.end(), Category.EMAIL, 0.98)


def url(text: str, regions: Sequence[str]) -> Iterator[Hit]:
    if "://" not in text and "www." not in text.lower():
        return
    for found in _URL.finditer(text):
        end = found.start() + len(found.group().rstrip(".,;:!?"))
        yield Hit(found.start(), end, Category.URL, 0.6)


def iban(text: str, regions: Sequence[str]) -> Iterator[Hit]:
    for found in _IBAN.finditer(text):
        # Words may follow in groups of four letters: the longest start whose checksum holds is the number.
        compact, ends = "", []
        for at in range(found.start(), found.end()):
            if text[at].isalnum():
                compact += text[at].upper()
                ends.append(at + 1)
        for length in range(min(34, len(compact)), 14, -1):
            if mod97(compact[4:length] + compact[:4]) == 1 and (
                ends[length - 1] == found.end() or not text[ends[length - 1]].isalnum()
            ):
                yield Hit(found.start(), ends[length - 1], Category.IBAN, 0.98)
                break


def credit_card(text: str, regions: Sequence[str]) -> Iterator[Hit]:
    for found in _NUMBER.finditer(text):
        digits = re.sub(r"\D", "", found.group())
        if luhn(digits) and len(set(digits)) > 1:
            if _ISSUER.match(digits) and len(digits) >= 13:
                yield Hit(found.start(), found.end(), Category.CREDIT_CARD, 0.95)
            elif near(text, found.start(), "card"):
                yield Hit(found.start(), found.end(), Category.CREDIT_CARD, 0.8)


def ip_address(text: str, regions: Sequence[str]) -> Iterator[Hit]:
    for pattern in (_IPV4, *((_IPV6,) if text.count(":") > 1 else ())):
        for found in pattern.finditer(text):
            value = (
                found.group().rstrip(":") if pattern is _IPV6 and not found.group().endswith("::") else found.group()
            )
            if pattern is _IPV6 and (value.count(":") < 2 or not any(ch.isdigit() for ch in value)):
                continue
            try:
                known = ipaddress.ip_address(value)
            except ValueError:
                continue
            if _NO_ADDRESS.search(text[max(0, found.start() - 12) : found.start()]):
                continue
            if not (known.is_loopback or known.is_unspecified):
                yield Hit(
                    found.start(), found.start() + len(value), Category.IP_ADDRESS, 0.9 if known.is_global else 0.7
                )


def national_id(text: str, regions: Sequence[str]) -> Iterator[Hit]:
    if not _MAYBE_NATIONAL.search(text):
        return
    for pattern, check, score in _NATIONAL:
        for found in pattern.finditer(text):
            confirmed = check(text, found)
            if confirmed:
                yield Hit(found.start(), found.end(), Category.NATIONAL_ID, score)


def driver_licence(text: str, regions: Sequence[str]) -> Iterator[Hit]:
    low = text.lower()
    if "licen" in low or "dl" in low or "driv" in low:
        for found in _LICENCE.finditer(text):
            if near(text, found.start(), "licence"):
                yield Hit(found.start(), found.end(), Category.DRIVER_LICENCE, 0.7)


def phone(text: str, regions: Sequence[str]) -> Iterator[Hit]:
    checks = 0
    for found in _PHONE.finditer(text):
        value = found.group()
        start, end = found.start(), found.end()
        if value.startswith("(") and value.count("(") > value.count(")"):
            start, value = start + 1, value[1:]
        number = re.split(r"[x#]|ext", value)[0]
        digits = re.sub(r"\D", "", number)
        bare = number.isdigit()
        if (
            _LOOKS_LIKE_DATE.fullmatch(number.strip())
            and len(digits) == 8
            or len(set(digits)) < 3
            and not near(text, start, "phone")
        ):
            continue
        if _SSN_SHAPE.fullmatch(number.strip()) or _DATE.fullmatch(number.strip()):
            continue
        said = near(text, start, "phone")
        score = 0.0
        if checks < MAX_PHONE_CHECKS and (said or not bare or 9 <= len(digits) <= 12):
            checks += 1
            if number.lstrip("(").startswith(("+", "00")) and _valid(number, None):
                score = 0.97
            elif any(_valid(number, region) for region in regions):
                score = 0.6 if bare else 0.8
        if said:
            score = max(score, 0.85 if score else 0.7)
        elif not score and not bare and len(re.findall(r"\d+", number)) in (2, 3, 4, 5) and 8 <= len(digits) <= 13:
            score = 0.4  # grouped like a number to dial, in a plan that is not among the regions
        if score:
            yield Hit(start, end, Category.PHONE, score)


@lru_cache(maxsize=256)  # the readings of a text hold the same numbers
def _valid(number: str, region: str | None) -> bool:
    import phonenumbers

    number = number.lstrip("(").strip()
    try:
        parsed = phonenumbers.parse("+" + number[2:] if region is None and number.startswith("00") else number, region)
    except phonenumbers.NumberParseException:
        return False
    return phonenumbers.is_valid_number(parsed)


# ----------------------------------------------------------------------------------------------------------- checksums


def luhn(digits: str) -> bool:
    """ISO/IEC 7812-1, annex B."""
    total = 0
    for at, digit in enumerate(reversed(digits)):
        value = int(digit) * (1 + at % 2)
        total += value - 9 if value > 9 else value
    return total % 10 == 0


def mod97(text: str) -> int:
    """ISO/IEC 7064 MOD 97-10, letters counting from A = 10."""
    return int("".join(str(int(ch, 36)) for ch in text)) % 97


def mod11(digits: str) -> bool:
    """The check digit of an NHS number: weights 10 to 2, 11 minus the remainder (11 counts as 0, 10 never occurs)."""
    rest = 11 - sum(int(digit) * (10 - at) for at, digit in enumerate(digits[:9])) % 11
    return rest != 10 and rest % 11 == int(digits[9])


def dni(text: str) -> bool:
    """Spanish DNI and NIE: the letter is the number modulo 23 in a fixed table."""
    number = text[:-1].upper().translate(str.maketrans("XYZ", "012"))
    return "TRWAGMYFPDXBNJZSQVHLCKE"[int(number) % 23] == text[-1].upper()


def _digits(found: re.Match[str]) -> str:
    return re.sub(r"\D", "", found.group())


_MAYBE_NATIONAL = re.compile(r"\d(?:(?:[ -]?\d){5}|\d[A-Z]\d{2}[A-Z]\d{3}[A-Z])")  # in each number that is found below
_NATIONAL: tuple[tuple[re.Pattern[str], Callable[[str, re.Match[str]], bool], float], ...] = (
    # United States: area 001-899 but 666, group and serial not all zeros; without dashes only where the text says so
    (re.compile(r"\d(?<![\w-].)(?<!9)(?!(?<=0)00|(?<=6)66)\d{2}-(?!00)\d{2}-(?!0000)\d{4}(?![\w-])"), lambda text, found: True, 0.9),
    (re.compile(r"\d(?<![\w-].)(?<!9)(?!(?<=0)00|(?<=6)66)\d{2} ?(?!00)\d{2} ?(?!0000)\d{4}(?![\w-])"), lambda text, found: near(text, found.start(), "ssn"), 0.85),
    # United Kingdom: National Insurance, NHS
    (re.compile(r"(?<!\w)(?!BG|GB|KN|NK|NT|TN|ZZ)[A-CEGHJ-PR-TW-Z][A-CEGHJ-NPR-TW-Z] ?\d{2} ?\d{2} ?\d{2} ?[A-D](?!\w)"), lambda text, found: True, 0.9),
    (re.compile(r"\d(?<![\w-].)\d{2}[ -]?\d{3}[ -]?\d{4}(?![\w-])"), lambda text, found: near(text, found.start(), "nhs") and mod11(_digits(found)), 0.95),
    # Spain, Italy, Canada
    (re.compile(r"(?<!\w)(?:\d{8}|[XYZxyz]\d{7})-?[A-Za-z](?!\w)"), lambda text, found: dni(found.group().replace("-", "")), 0.9),
    (re.compile(r"(?<!\w)[A-Z]{6}\d{2}[A-EHLMPRST]\d{2}[A-Z]\d{3}[A-Z](?!\w)"), lambda text, found: True, 0.9),
    (re.compile(r"\d(?<![\w-].)\d{2}[ -]\d{3}[ -]\d{3}(?![\w-])"), lambda text, found: near(text, found.start(), "sin") and luhn(_digits(found)), 0.9),
)  # fmt: skip

# Those with a checksum or a fixed form first: what they take, the looser ones cannot.
_FINDERS = (email, url, iban, ip_address, national_id, credit_card, driver_licence, phone)
