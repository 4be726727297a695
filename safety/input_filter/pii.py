"""Personal data with a structure: e-mail, telephone, card, bank account, IP and web addresses, identity and licence numbers.

A pattern proposes, a checksum or the `phonenumbers` library confirms, and words nearby ("card", "call me on") decide where
the form alone does not. Names and postal addresses have no structure: they need a named-entity model, which this is not.
"""

from __future__ import annotations

import ipaddress
import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from plumbline.safety.findings import ALL_STAGES, Category, Cost, Finding, ScanItem, Span, Stage
from plumbline.safety.input_filter.national_ids import luhn, mod97, national_ids
from plumbline.safety.input_filter.phone import phones
from plumbline.safety.taxonomy import meaning
from plumbline.safety.text.scripts import GLUED, NO_BLANKS, plain

NEAR = 48  # characters before a number in which a word counts as its context
REGIONS = tuple(
    "US GB CA AU DE FR ES IT NL BE CH AT SE NO DK FI IE PT PL CZ GR TR RU UA IN CN JP KR TW HK SG TH VN ID PH MY BR MX AR CO CL ZA NG EG IL SA AE NZ".split()
)


@dataclass(frozen=True, slots=True)
class Hit:
    start: int
    end: int
    category: Category
    score: float


class Pii:
    """One finding a hit: a threshold of the policy then decides over each of them.

    Args:
        regions: two-letter countries in whose plans a number may be valid to count beside words such as "call" (see `phone.py`).
        kinds: categories to look for, as "email", "phone" ...; all of them if not given.
        floor: hits below it are left out.
    """

    version = "2"
    stages: frozenset[Stage] = ALL_STAGES
    cost: Cost = "regex"
    folds = True

    def __init__(
        self,
        *,
        name: str = "pii",
        regions: Sequence[str] = REGIONS,
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
        if not _ANY.search(text):
            return []
        text = plain(text)
        taken: list[Hit] = []  # in order
        for find in self.finders:
            for hit in find(text, self.regions):
                at = bisect_left(taken, hit.end, key=lambda other: other.start)
                if hit.score >= self.floor and not (at and taken[at - 1].end > hit.start):
                    taken.insert(at, hit)
        return taken

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
# Each takes a text that went through `plumbline.safety.text.scripts.plain`: digits, dashes and blanks are ASCII, and offsets stay. Patterns that
# end in a look at the next character are tried at few places and over few characters, so that the time grows with the text alone.

_ANY = re.compile(r"\d|[@\uff20]|%40|://|www\.|[(\[{<] ?at", re.I)  # in every text that holds something
_BEFORE, _BEHIND = f"(?<![{GLUED}])", f"(?![{GLUED}])"
_LOCAL = re.compile(rf"(?:[{GLUED}.+'\u0300-\u036f-]|%(?!40))+")
_DOMAIN = re.compile(
    rf"(?:[{GLUED}](?:[{GLUED}-]{{0,61}}[{GLUED}])?\.){{1,6}}[A-Za-z\u00c0-\u024f\u0370-\u052f]{{2,24}}(?![{GLUED}-]|[(\[])"
)
_OTHER_LOCAL, _OTHER_DOMAIN = re.compile(r"[\w.+-]+"), re.compile(r"(?:[^\W_]{1,61}\.){1,4}[^\W\d_]{2,24}")
_NO_MAIL_BEFORE = re.compile(
    r"(?:\b(?:ssh|scp|sftp|rsync|git clone|message-id:|in-reply-to:|references:)[^\n]{0,60}|(?<!mailto)://[^\s/@]{0,64})$",
    re.I,
)
_SPELLED_MAIL = re.compile(
    rf"{_BEFORE}[{GLUED}][{GLUED}.+-]{{0,63}} ?[(\[{{<] ?(?:at|@) ?[)\]}}>] ?[{GLUED}-]{{1,62}}"
    rf"(?:(?: ?[(\[{{<] ?(?:dot|\.) ?[)\]}}>] ?|\.)[{GLUED}-]{{1,62}}){{1,4}}", re.I
)  # fmt: skip
_URL = re.compile(rf"(?:https?://|(?<![\w.@/])www\.)[^\s<>\"'`\]){{}}{NO_BLANKS}]{{3,500}}", re.IGNORECASE)
_IBAN = re.compile(
    rf"{_BEFORE}[A-Za-z]{{2}}[0-9]{{2}}(?:[ \n.-]?[A-Za-z0-9]{{4}}){{2,7}}(?:[ \n.-]?[A-Za-z0-9]{{1,3}})?"
)
_CARD = re.compile(r"(?<![0-9A-Za-z_\u00c0-\u024f])(?<![0-9][.,+-])[0-9](?:[ .\n-]?[0-9]){11,24}" + _BEHIND)
_IPV4 = re.compile(rf"(?<![{GLUED}-])(?<![{GLUED}]\.)[0-9]{{1,3}}(?:\.[0-9]{{1,3}}){{3}}(?![{GLUED}-]|\.[0-9])")
_IPV6 = re.compile(rf"(?<![{GLUED}:.])[0-9A-Fa-f:]{{3,39}}(?![{GLUED}:])")
_LICENCE = re.compile(
    rf"(?<![{GLUED}-])(?:[A-Za-z]{{1,2}}[0-9]{{5,14}}[A-Za-z]{{0,2}}|[0-9]{{6,12}}|[0-9]{{4}}-[0-9]{{2}}-[0-9]{{4}})(?![{GLUED}-])"
)
_CONTEXT = {
    "card": re.compile(
        r"card|visa|master|amex|credit|debit|charge|\bcc\b|karte|carte|tarjeta|cart[aã]o|carta|kort|kaart|kart|卡|カード|카드|บัตร|карт|بطاقة|כרטיס", re.I
    ),
    "licence": re.compile(r"licen[cs]e|\bdl\b|driving|driver", re.I),
    "imei": re.compile(r"\bimei\b|\bserial\b", re.I),
    "ip": re.compile(r"\bips?\b|\bip(?:v4)?[ -]?addr|\bhost|server|\bdns\b|ping|gateway|地址|アドレス|주소", re.I),
}  # fmt: skip
_NO_LICENCE = re.compile(r"(?:version|software|source)\b[^.\n]{0,16}$", re.I)
_GROUPS_OF_CARDS = frozenset(
    {(4, 4, 4, 4), (4, 6, 5), (4, 6, 4), (4, 4, 4, 4, 3), (4, 4, 4, 1), (4, 4, 5), (6, 8), (6, 13), (4, 4, 4, 4, 2)}
)
_ISSUER = tuple(  # ISO/IEC 7812: leading digits of the large networks, and the lengths they have
    (re.compile(pattern), frozenset(lengths))
    for pattern, lengths in (
        (r"4", (13, 16, 19)),
        (r"5[1-5]|222[1-9]|22[3-9]|2[3-6]|27[01]|2720", (16,)),
        (r"3[47]", (15,)),
        (r"30[0-5]|3[689]", (14, 16, 19)),
        (r"6011|64[4-9]|65|62|60|81|82|220[0-4]", (16, 17, 18, 19)),
        (r"35(?:2[89]|[3-8])", (16, 17, 18, 19)),
        (r"2131|1800", (15,)),
        (r"5[0678]|6[37]", (12, 13, 14, 15, 16, 17, 18, 19)),
    )
)
_NO_ADDRESS = re.compile(
    r"(?:section|sec\.|version|release|chapter|clause|paragraph|figure|build|firmware|driver|update|upgrade|player|chrome|chromium|firefox|edge|opera|safari|sdk|dll|api|"
    r"kernel|library|package|plugin|app|oid|ver\.?|v\.?|\u00a7|==|[<>~^]=?|@) ?(?:to |is |no\.? ?)?$", re.I
)  # fmt: skip


def near(text: str, start: int, what: str) -> bool:
    """Whether a word of the context `what` stands shortly before a position."""
    return _CONTEXT[what].search(text, max(0, start - NEAR), start) is not None


def email(text: str, regions: Sequence[str]) -> Iterator[Hit]:
    """Addresses of RFC 5321 as people write them, also with %40; grown to both sides from each sign, so that none is read twice."""
    last = 0
    for sign in re.finditer(r"@|%40", text):
        if sign.start() < last:
            continue
        span = _mailbox(text, sign.start(), sign.end(), last)
        if span:
            last = span[1]
            yield Hit(*span, Category.EMAIL, 0.98)
    if ("at" in text or "At" in text or "AT" in text or "@" in text) and re.search(r"[(\[{<] ?(?:at|@)", text, re.I):
        for found in _SPELLED_MAIL.finditer(text):
            yield Hit(found.start(), found.end(), Category.EMAIL, 0.8)


def _mailbox(text: str, sign: int, behind: int, least: int) -> tuple[int, int] | None:
    """The address around a sign, or None."""
    low = max(least, sign - 64)
    local, domain = _tail(_LOCAL, text, low, sign), _DOMAIN.match(text, behind, behind + 255)
    if not local and sign > low and not text[sign - 1].isascii():  # a local part in another script
        local, domain = _tail(_OTHER_LOCAL, text, low, sign), _OTHER_DOMAIN.match(text, behind, behind + 255)
    if not local or domain is None:
        return None
    start, end = sign - len(local), domain.end()
    while start < sign and text[start] in ".+'-%":
        start += 1
    if start == sign or text[sign - 1] == "." or domain.end() < len(text) and text[domain.end()] == "@":
        return None
    if re.match(r"\d+\.\d|\d+x\.", domain[0]):  # lodash@4.17.x, icon@2x.png
        return None
    if text[start:sign].lower() == "git" or re.match(
        r":(?![/ ]{0,2}\d)[~\w.-]*/|:[~/]", text[end : end + 80]
    ):  # git@host:path
        return None
    if _NO_MAIL_BEFORE.search(text, max(0, start - 80), start):
        return None
    return start, end


def _tail(pattern: re.Pattern[str], text: str, low: int, high: int) -> str:
    """The characters before `high`, down to `low`, that all fit the pattern."""
    last = ""
    for found in pattern.finditer(text, low, high):
        last = found.group() if found.end() == high else ""
    return last


def url(text: str, regions: Sequence[str]) -> Iterator[Hit]:
    if "://" not in text and "www." not in text.lower():
        return
    for found in _URL.finditer(text):
        end = found.start() + len(found.group().rstrip(".,;:!?"))
        yield Hit(found.start(), end, Category.URL, 0.6)


def iban(text: str, regions: Sequence[str]) -> Iterator[Hit]:
    """Accounts by ISO 13616: the length that their country has, and the checksum. What follows may be words."""
    for found in _IBAN.finditer(text):
        length = IBAN_LENGTHS.get(text[found.start() : found.start() + 2].upper())
        compact, at = "", found.start()
        while length and at < found.end() and len(compact) < length:
            compact += text[at].upper() if text[at].isalnum() else ""
            at += 1
        behind = re.match(f"[{GLUED}]", text[at : at + 1])
        if length and len(compact) == length and not behind and mod97(compact[4:] + compact[:4]) == 1:
            yield Hit(found.start(), at, Category.IBAN, 0.98)


def credit_card(text: str, regions: Sequence[str]) -> Iterator[Hit]:
    """Luhn's checksum, and a known issuer in the groups that cards are printed in; or any groups and a word for a card."""
    for found in _CARD.finditer(text):
        for start, end in _cards(text, found.start(), found.end()):
            yield Hit(start, end, Category.CREDIT_CARD, 0.95)


def _cards(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The whole run if it is a card, else the first card that whole groups of it make, and what comes behind it."""
    groups = [(start + group.start(), start + group.end()) for group in re.finditer(r"[0-9]+", text[start:end])]
    at = 0
    while at < len(groups):
        step = 1
        for last in range(min(len(groups), at + 6) - 1, at - 1, -1):
            if _is_card(text, groups[at : last + 1], whole=(at, last) == (0, len(groups) - 1)):
                yield groups[at][0], groups[last][1]
                step = last - at + 1
                break
        at += step


def _is_card(text: str, groups: Sequence[tuple[int, int]], whole: bool) -> bool:
    sizes = tuple(end - start for start, end in groups)
    if not 12 <= sum(sizes) <= 19:
        return False
    digits = "".join(text[start:end] for start, end in groups)
    if not luhn(digits) or len(set(digits)) == 1:
        return False
    start = groups[0][0]
    issued = any(issuer.match(digits) and len(digits) in lengths for issuer, lengths in _ISSUER)
    if issued and (len(groups) == 1 or sizes in _GROUPS_OF_CARDS) and not near(text, start, "imei"):
        return True
    return whole and near(text, start, "card")


def ip_address(text: str, regions: Sequence[str]) -> Iterator[Hit]:
    """Version 4 and 6; not this machine's own, no masks, and no version numbers, which small parts make likely."""
    for found in _IPV4.finditer(text):
        parts = [int(part) for part in found.group().split(".")]
        if any(part > 255 for part in parts) or parts[0] in (0, 127, 255) or any(re.findall(r"\b0\d", found.group())):
            continue
        if _NO_ADDRESS.search(text, max(0, found.start() - 24), found.start()):
            continue
        if max(parts) < 32 and not near(text, found.start(), "ip"):
            continue
        yield Hit(found.start(), found.end(), Category.IP_ADDRESS, _score_of(found.group()))
    if text.count(":") > 1:
        for found in _IPV6.finditer(text):
            value = found.group() if found.group().endswith("::") else found.group().rstrip(":")
            parts6 = [part for part in value.split(":") if part]
            if value.count(":") < 2 or not any(ch.isdigit() for ch in value) or all(len(part) == 2 for part in parts6):
                continue  # a scope (b::c), a time, a hardware address
            if len(parts6) < 3 and not (parts6 and len(parts6[0]) == 4 and any(ch.isalpha() for ch in value)):
                continue  # x[1::2]
            score = _score_of(value)
            if score:
                yield Hit(found.start(), found.start() + len(value), Category.IP_ADDRESS, score)


def _score_of(address: str) -> float:
    try:
        known = ipaddress.ip_address(address)
    except ValueError:
        return 0.0
    return 0.0 if known.is_loopback or known.is_unspecified else 0.9 if known.is_global else 0.7


def national_id(text: str, regions: Sequence[str]) -> Iterator[Hit]:
    for start, end, score in national_ids(text):
        yield Hit(start, end, Category.NATIONAL_ID, score)


def driver_licence(text: str, regions: Sequence[str]) -> Iterator[Hit]:
    low = text.lower()
    if "licen" in low or "dl" in low or "driv" in low:
        for found in _LICENCE.finditer(text):
            if near(text, found.start(), "licence") and not _NO_LICENCE.search(
                text, max(0, found.start() - 24), found.start()
            ):
                yield Hit(found.start(), found.end(), Category.DRIVER_LICENCE, 0.7)


def phone(text: str, regions: Sequence[str]) -> Iterator[Hit]:
    for start, end, score in phones(text, regions):
        yield Hit(start, end, Category.PHONE, score)


# Countries and the length of their numbers (ISO 13616, the registry of SWIFT).
IBAN_LENGTHS = {
    code: length
    for length, codes in {
        15: "NO", 16: "BE", 18: "DK FI FO GL NL SD FK", 19: "MK SI", 20: "AT BA EE KZ LT LU XK MN", 21: "CH HR LI LV", 22: "BG BH CR DE GB GE IE ME RS VA",
        23: "AE GI IL IQ OM SO TL", 24: "AD CZ ES MD PK RO SA SE SK TN VG", 25: "LY PT ST", 26: "IS TR", 27: "BI DJ FR GR IT MC MR SM",
        28: "AL AZ BY CY DO GT HN HU LB NI PL SV", 29: "BR EG PS QA UA", 30: "JO KW MU YE", 31: "MT SC", 32: "LC", 33: "RU",
    }.items()
    for code in codes.split()
}  # fmt: skip

# Those with a checksum or a fixed form first: what they take, the looser ones cannot.
_FINDERS = (email, url, iban, ip_address, driver_licence, national_id, credit_card, phone)
