"""Telephone numbers, precision first: most runs of digits in a text are something else.

A number counts in one of three ways:

1. **International**: `+` or 00 and a country code, of a length that the country's plan allows, however it is grouped.
2. **A form that is hardly anything else** (`FORMS`), without any word nearby: a trunk 0 and groups ("020 7946 0958", "06.12.34.56.78"),
   brackets round the area code, an extension, "415-555-0132" and the like.
3. **Words** in the `NEAR` characters before it. `SAID` ("phone", "Rufnummer", "电话" ...) takes 7 to 15 digits: any within `CLOSE`
   characters, else those that are valid in a region or of a form. `ASKED` ("call", "reach me") takes the latter only.

An `IDENTIFIER` ("invoice", "page", "version", "ISBN" ...) within `CLOSE` characters, with no such word behind it, leaves the first way
only. Bare digits, years, dates, times, scores, ranges, amounts in groups of three, decimals and versions never count by
their form.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache

from plumbline.safety.text.scripts import GLUED

NEAR = 48  # characters before a number in which a word counts
CLOSE = 24  # characters before it in which a word stands right beside it
AFTER = 24  # characters after it
VALID, WITH_WORD, POSSIBLE, FORM, ASKED_FOR, IN_ONE_PIECE = 0.97, 0.85, 0.8, 0.75, 0.7, 0.6  # scores
MAX_LOOKUPS = 150
MOST_TOKENS = 8  # parts between blanks that a number may have
Found = tuple[int, int, float]  # characters [start, end), score

_RUN = re.compile(r"(?:\+ ?\(?|\(\+? ?)?[0-9](?:[ ().\-/]{0,4}[0-9])*")
_EXTENSION = re.compile(
    r"[ ,;]{0,2}(?:x|ext(?:ension|\.)?|#|durchwahl|poste|int\.)[ .:]{0,2}[0-9]{1,6}(?![0-9A-Za-z])", re.I
)
_GROUP = re.compile("[0-9]+")
_GLUED = re.compile(f"[{GLUED}]")

SAID = re.compile(
    r"phone|\bmobil|\bfax|\btel\b|\btel[e\xe9]?f|\bt\xe9l|\bhandy|\bhot ?line|\bhelp ?line|\bland ?line|\bcell(?: ?phone|[ .]*(?:no|number|:))|whats ?app|\bviber|\bsms\b"
    r"|rufnummer|festnetz|durchwahl|\bm\xf3vil|\bcelular|\bcellulare|\btelem[o\xf3]vel|\bkom[o\xf3]rk|\bgsm\b|\bpuhelin|\bmobiel|\bpuh\b|\btlf\b|\btfn\b|\bmob\b"
    r"|тел|моб|факс|сотов|τηλ|κινητ|\u0111i\u1ec7n tho\u1ea1i|\bs?\u0111t\b|\btelp|\bnomor hp|\bno\.? hp"
    r"|电话|電話|手机|手機|致电|致電|拨打|撥打|座机|座機|携帯|携帶|전화|휴대폰|핸드폰|โทร|เบอร์|มือถือ|هاتف|جوال|موبايل|تلفن|تليفون|טלפון|נייד|फ़ोन|फोन|मोबाइल"
    r"|(?:^|[\s|\u2022])(?:t|m|f|p|ph|mob|hp|c)[.:]{1,2}\s?$",
    re.IGNORECASE,
)  # fmt: skip
ASKED = re.compile(
    r"\bcall(?:ed|ing)?\b|\bmessag(?:e|es|ing)\b (?:\w+ )?(?:to|on|at|from)\b|\bget (?:back )?(?:to|hold of)\b|\bring\b|\btext\b|\bdial(?:led|ing)?\b|\breach|\bcontact|\bcell\b|\b(?:my|your|his|her|our|their|new|whose) (?:\w+ )?number\b|\bnumbers? (?:is|are|was)\b"
    r"|\bappele|\bjoindre|\bjoignable|\brappele|\bnum[e\xe9]ro|\banruf|\berreich|\bruf(?:en|t)?\b|\bmelde|\bnummer|\bll[a\xe1]m|\bn[u\xfa]mero|\bligu?[ae]r?\b|\bchiam|\bcontat"
    r"|\bbel(?:len|t)?\b|\bbereik|\bn\xe5s\b|\bring(?:a|e)?\b|zadzwo|dzwo\u0144|\bnumer|звон|номер|связ|\bara(?:y|yın)?\b|\bnumara|\bsoit|\bcislo|\b\u010d\xed?slo|\bvolej"
    r"|联系|聯絡|聯繫|联络|号码|號碼|連絡|番号|연락|번호|ติดต่อ|اتصل|رقم|התקשר|מספר|संपर्क|नंबर|नम्बर|\bhubungi|\bnomor|\bg\u1ecdi|li\xean h\u1ec7|\bs\u1ed1\b|αριθμ|καλ[έε]σ",
    re.IGNORECASE,
)  # fmt: skip
IDENTIFIER = re.compile(
    r"\b(?:orders?|invoices?|tickets?|references?|ref|receipts?|tracking|parcels?|packages?|shipments?|serial|s/n|parts?|models?|sku|upc|ean|gtin|isbn(?:-1[03])?|issn|doi|arxiv|"
    r"pmid|imei|iccid|vin|uuid|guid|ids?|commits?|hash|sha-?\d*|md5|builds?|versions?|release|pages?|pp?|pgs?|chapters?|sections?|figures?|tables?|lines?|rows?|verses?|"
    r"population|total|sum|scores?|sets?|balance|amount|price|costs?|debt|revenue|account|acct|customer|member(?:ship)?|policy|claim|case|docket|patent|bill|omb|rfc|cve|bug|"
    r"issue|ports?|pid|timestamps?|epoch|seed|offset|size|bytes|coordinates?|lat|lon|lng|latitude|longitude|gps|articles?|items?|products?|assets?|lots?|batch|jobs?|requests?|"
    r"sessions?|transactions?|txn|flights?|zip|postcode|plz|barcode|code|pin|otp|token|key|numbers drawn|lottery|years?|seasons?|wars?|"
    r"rechnung\w*|bestell\w*|auftrag\w*|kundennummer|artikel\w*|seiten?|aktenzeichen|facture|commande|dossier|r[e\xe9]f[e\xe9]rence|factura|pedido|p[a\xe1]ginas?|fattura|ordine|"
    r"pagin[ae]|factuur|bestelling|faktura|zam\xf3wieni\w*|sipari\u015f|fatura)\b\W{0,3}(?:(?:no|number|nr|num|id|code|is|#)\b\W{0,3}){0,2}\w{0,3}\W{0,2}$"
    r"|заказ|сч[её]т|страниц|订单|訂單|单号|單號|编号|編號|学号|工号|快递|流水|发票|發票|注文|伝票|品番|주문|송장|운송장|หน้า|ใบสั่ง",
    re.IGNORECASE,
)  # fmt: skip
_AMOUNT_AFTER = re.compile(
    r"\s?(?:%|\u20ac|\$|\xa3|\xb0|[\u5143\u5186\u4eba\u4e07\u4ebf]|\uc6d0|\ubc30|\u0e1a\u0e32\u0e17|руб|(?:eur|usd|gbp|chf|dollars?|euros?|pounds?|people|inhabitants|residents|users|"
    r"votes|km|kg|m\xb2|bytes|[kmg]b|units|copies|years|times|einwohner|habitants|personas|menschen)\b)",
    re.IGNORECASE,
)
_TOLD_AFTER = re.compile(r"\s{0,2}(?:mobile|cell|fax|office|home|work|phone|landline|tel)\b", re.IGNORECASE)
_SAID_AFTER = re.compile(
    r"\s?[(\[](?:mobile|cell|fax|office|home|work|tel|phone|direct|landline|mobil|handy|b\xfcro|privat|bureau|portable)\b|\s(?:is|was) (?:my|his|her|our|their|the) (?:\w+ )?(?:phone|mobile|cell|fax|number)",
    re.IGNORECASE,
)

# National forms; each says how many digits it has.
FORMS = tuple(
    (re.compile(pattern), least, most)
    for pattern, least, most in (
        (r"\(?0[1-9][0-9]{0,4}\)?(?:(?:[ .\-]|/| [-/] )[0-9]{2,8}){2,5}", 9, 12),  # a trunk 0 and three groups or more
        (r"0[1-9][0-9]{0,4}[ /\-][0-9]{4,8}", 10, 12),  # and two: 0171 2345678, 030/12345678, 06-12345678
        (r"0[1-9][0-9]{0,2}-[0-9]{2,3} [0-9]{2,3}(?: [0-9]{2})?", 8, 10),  # 08-12 34 56 (Sweden)
        (
            r"(?:[01][ .\-]?)?\((?!(?:19|20)[0-9]{2}\))[0-9]{2,5}\)[ .\-/]{0,2}[0-9]{2,8}(?:[ .\-][0-9]{2,5}){0,3}",
            9,
            12,
        ),  # (212) 664-7665
        (r"[78][ \-]?\(?[0-9]{3}\)?[ \-]?[0-9]{3}[ \-][0-9]{2}[ \-][0-9]{2}", 11, 11),  # 8 (916) 123-45-67
        (r"(?:(?:00)?1[ .\-])?[0-9]{3}([.\-])[0-9]{3}\1[0-9]{4}", 10, 13),  # 415-555-0132
        (r"(?:1 )?[2-9][0-9]{2} (?:[2-9][0-9]{2} |[0-9]{3}-)[0-9]{4}", 10, 11),  # 415 555 0132
        (r"3[2-9][0-9](?: [0-9]{3} [0-9]{4}|[ \-/.][0-9]{7})", 10, 10),  # 347 123 4567 (Italy)
        (r"[6789][0-9]{2}([ .\-])[0-9]{2}\1[0-9]{2}\1[0-9]{2}", 9, 9),  # 612 34 56 78 (Spain)
        (r"(?:[1-9][0-9] )?(?:9[0-9]{4}|[2-5][0-9]{3})-[0-9]{4}", 10, 11),  # 11 91234-5678 (Brazil)
        (r"[6-9][0-9]{4}[ \-][0-9]{5}", 10, 10),  # 98765 43210 (India)
        (r"1[3-9][0-9]([ \-])[0-9]{4}\1[0-9]{4}", 11, 11),  # 138 1234 5678 (China)
        (r"1[38]00 [0-9]{3} [0-9]{3}", 10, 10),  # 1300 123 456 (Australia)
    )
)
_WITH_ZERO = re.compile(r"0[1-9][0-9]{8,9}(?<!0123456789)")  # in one piece
_IN_CHARACTERS = re.compile(r"1[3-9][0-9]{9}|0[1-9]0[0-9]{8}")  # a mobile number in Chinese, Japanese or Korean text
_CHARACTER = re.compile("[\u3040-\u30ff\u4e00-\u9fff\uac00-\ud7af]")

_YEAR = r"(?:1[0-9]|20)[0-9]{2}"
_DAY = rf"(?:{_YEAR}([-./ ])[01]?[0-9]\1[0-3]?[0-9]|[0-3]?[0-9]([-./ ])[0-3]?[0-9]\2{_YEAR})"
NEVER = re.compile(  # whatever is said nearby
    rf"(?:{_DAY})(?: [0-9]{{1,2}})?"  # a date, and maybe the hour
    rf"|[0-9]{{1,4}}[-./][0-9]{{1,2}}[-./][0-9]{{1,4}} ?[-/ ] ?[0-9]{{1,4}}[-./][0-9]{{1,2}}[-./][0-9]{{1,4}}"  # two of them
    rf"|[12][0-9]{{3}}(?: ?[-/ ] ?[12][0-9]{{3}})+(?<=[12][0-9]{{3}})"  # years
    r"|[0-9]{1,3}\.[0-9]{6,}|[0-9]{3}-[0-9]{2}-[0-9]{4}"  # a decimal; a social security number
    r"|[0-9]{1,3}-[0-9]{1,3}(?: [0-9]{1,3}-[0-9]{1,3})+"  # scores
    r"|(?:19|20)[0-9]{2}[01][0-9][0-3][0-9][-. ]?[0-9]{2,8}"  # a day and a time or a counter
    r"|97[89][ -]?(?:[0-9][ -]?){9}[0-9]"  # ISBN-13
)
UNSAID = re.compile(  # unless a word for a telephone stands close by
    r"[1-9][0-9]{0,2}(?:[ .][0-9]{3})+"  # an amount
    r"|([0-9]{3,6}) ?[-/] ?([0-9]{3,6})"  # a range
    r"|(?:[01][0-9]|2[0-4])[0-5][0-9](?:[ -](?:[01][0-9]|2[0-4])[0-5][0-9])+"  # times
    r"|[0-9]{5}-[0-9]{4}|[0-9]+-[0-9]+-[0-9]+-[0-9X]"  # ZIP + 4, ISBN-10
)


class _Lookups:
    """What the library says of numbers in the plans of some regions, for at most MAX_LOOKUPS numbers a text.

    Past them a number beside a word counts as valid, and none counts for how it is printed: a page of digits takes a bounded time, and
    nothing that a word names as a number goes unread.
    """

    def __init__(self, regions: Sequence[str]) -> None:
        self.regions, self.left = tuple(regions), MAX_LOOKUPS

    def somewhere(self, number: str) -> bool:
        self.left -= 1
        return self.left < 0 or _valid_somewhere(number, self.regions)

    def as_printed(self, number: str) -> bool:
        self.left -= 1
        return self.left >= 0 and _as_printed(number, self.regions)


def phones(text: str, regions: Sequence[str]) -> Iterator[Found]:
    """(start, end, score) of each telephone number in a text that went through `plumbline.safety.text.scripts.plain`, left to right."""
    lookups = _Lookups(regions)
    for run in _RUN.finditer(text):
        if run.end() - run.start() < 7 or sum(map(str.isdigit, run.group())) < 7:
            continue
        start, end = run.span()
        # A first part that is glued to a word is no part of the number.
        while start < end and _bound(text, start):
            blank = text.find(" ", start, end)
            start = end if blank < 0 else blank + 1
        cut = start > run.start()
        start = _first_sign(text, start, end)
        if end - start >= 7:
            yield from _in_run(text, start, end, lookups, cut)


def _in_run(text: str, start: int, end: int, lookups: _Lookups, cut: bool) -> Iterator[Found]:
    """The whole run if it is a number; else the numbers among its parts between blanks. `cut`: a part before it is glued to a word."""
    if end - start <= 40:
        found = _judged(text, start, end, lookups, cut)
        if found:
            yield found
            return
    parts = [(start + part.start(), start + part.end()) for part in re.finditer(r"[^ ]+", text[start:end])]
    at = 0
    while at < len(parts):
        step = 1
        for last in range(min(at + MOST_TOKENS, len(parts)) - 1, at - 1, -1):
            first, past = parts[at][0], parts[last][1]
            while past > first and not text[past - 1].isdigit():
                past -= 1
            if (at, last) == (0, len(parts) - 1) or not 7 <= past - first <= 30 or not _apart(text, parts, at, last):
                continue
            found = _judged(text, _first_sign(text, first, past), past, lookups, cut)
            if found:
                yield found
                step = last - at + 1
                break
        at += step


def _apart(text: str, parts: Sequence[tuple[int, int]], first: int, last: int) -> bool:
    """Whether parts [first, last] look unlike what stands beside them; a row of bare numbers is not cut into pieces."""

    def bare(at: int) -> bool:
        return text[slice(*parts[at])].isdigit()

    if text[parts[first][0]] in "+(":
        return True
    inside = all(bare(at) for at in range(first, last + 1))
    beside = [at for at in (first - 1, last + 1) if 0 <= at < len(parts)]
    return not inside or not any(bare(at) for at in beside)


def _judged(text: str, start: int, end: int, lookups: _Lookups, cut: bool) -> Found | None:
    """The span with its score, or None; an extension behind it belongs to it."""
    if end - start < 7 or _bound(text, start) or len(_GROUP.findall(text, start, end)) > MOST_TOKENS - 1:
        return None
    extension = _EXTENSION.match(text, end)
    past = extension.end() if extension else end
    if _follows(text, past):
        return None
    score = _score(text, start, end, lookups, form=not cut, extended=extension is not None)
    return (start, past, score) if score else None


def _score(text: str, start: int, end: int, lookups: _Lookups, *, form: bool, extended: bool) -> float:
    """`form`: whether the number may count by its form alone."""
    number = text[start:end]
    digits = re.sub(r"\D", "", number)
    if not 7 <= len(digits) <= 17:
        return 0.0
    if "+" in number:
        if _valid(number, None):
            return VALID
        free = not re.search(rf"[{GLUED})] ?$", text[max(0, start - 2) : start]) or not number[1:].isdigit()
        return POSSIBLE if free and _possible(number.replace("+ ", "+")) else 0.0
    if NEVER.fullmatch(number) or _dotted(number):
        return 0.0
    if number.startswith("00") and not number.isdigit() and _valid(number, None):
        return VALID
    before, after = text[max(0, start - NEAR) : start], text[end : end + AFTER]
    said, asked = _last(SAID, before), _last(ASKED, before)
    close = before[-CLOSE:]
    identifier = IDENTIFIER.search(close)
    if identifier and max(said, asked) <= len(before) - len(close) + identifier.start():
        return 0.0
    is_close = said >= 0 and len(before) - said <= CLOSE or _SAID_AFTER.match(after) is not None
    if digits.endswith("00000") or number.isdigit() and _AMOUNT_AFTER.match(after):
        return 0.0
    if is_close and len(digits) <= 15:
        return WITH_WORD
    if _AMOUNT_AFTER.match(after) or len(set(digits)) < 3:
        return 0.0
    if _unsaid(number):
        asked_close = asked >= 0 and len(before) - asked <= CLOSE
        amount = asked_close and re.fullmatch(r"[0-9]{3}(?:[ .][0-9]{3}){2}", number)
        return ASKED_FOR if amount and lookups.somewhere(number) else 0.0
    is_form = any(least <= len(digits) <= most and shape.fullmatch(number) for shape, least, most in FORMS)
    if said >= 0 or asked >= 0 or _TOLD_AFTER.match(after):
        short = re.fullmatch(r"[2-9]\d{2}[-.]\d{4}", number)
        if is_form or extended or short or lookups.somewhere(number):
            return WITH_WORD if said >= 0 else ASKED_FOR
    if not form:
        return 0.0
    if extended or is_form and not _drawn(number) or lookups.as_printed(number):
        return FORM
    if _WITH_ZERO.fullmatch(number) and lookups.somewhere(number):
        return IN_ONE_PIECE
    if _IN_CHARACTERS.fullmatch(number) and _CHARACTER.search(before[-12:] + after[:12]):
        return FORM
    return 0.0


def _unsaid(number: str) -> bool:
    """Whether the number has a shape that only a word right beside it makes a telephone number."""
    shape = UNSAID.fullmatch(number)
    if shape:
        low, high = shape.group(1), shape.group(2)
        return low is None or int(low) < int(high) or len(low) == len(high)
    return False


def _drawn(number: str) -> bool:
    """Pairs of digits in rising order, as the numbers of a lottery are printed."""
    pairs = re.split(r"[ .\-]", number)
    return len(pairs) >= 4 and all(len(pair) == 2 for pair in pairs) and pairs == sorted(pairs)


def _dotted(number: str) -> bool:
    """A version or a chain of sections: dots only, and a part of one digit that is not a leading 1."""
    parts = number.split(".")
    return len(parts) >= 3 and all(map(str.isdigit, parts)) and any(len(part) == 1 for part in parts[parts[0] == "1" :])


def _last(pattern: re.Pattern[str], text: str) -> int:
    """Where the last match ends, or -1."""
    return max((found.end() for found in pattern.finditer(text)), default=-1)


def _first_sign(text: str, start: int, end: int) -> int:
    """`start` without a bracket that does not close inside the run, and without the blanks behind it."""
    while start < end and (
        text[start] in " .-/)" or text[start] == "(" and text.count("(", start, end) > text.count(")", start, end)
    ):
        start += 1
    return start


def _bound(text: str, start: int) -> bool:
    """Whether what stands right before makes a run of digits part of something else: a word, an amount, a path, a decimal."""
    before, other = text[start - 1 : start], text[max(0, start - 2) : start - 1]
    if not before:
        return False
    if text[start] == "+":
        return before == "+" or bool(_GLUED.match(before))
    if _GLUED.match(before) or before in "#$\u20ac\xa3\xa5/\\^~%&@+":
        return True
    if before in ",:'\u2019":
        return other.isdigit()
    return before in ".-" and (bool(_GLUED.match(other)) if before == "-" else other.isdigit() or other == "v")


def _follows(text: str, end: int) -> bool:
    """Whether what stands right behind makes a run of digits part of something else."""
    after = text[end : end + 2]
    if not after:
        return False
    if _GLUED.match(after) or after[0] == "@":
        return True
    return (
        after[0] in ".,:/-'"
        and len(after) > 1
        and (after[1].isdigit() or after[0] in "-/" and bool(_GLUED.match(after[1])))
    )


@lru_cache(maxsize=512)  # the readings of a text hold the same numbers
def _valid_somewhere(number: str, regions: tuple[str, ...]) -> bool:
    return any(_valid(number, region) for region in regions)


@lru_cache(maxsize=512)
def _as_printed(number: str, regions: tuple[str, ...]) -> bool:
    """Whether a region prints a valid number in just these groups, which are three or more and not all of one length."""
    import phonenumbers

    groups = re.findall(r"\d+", number)
    if len(groups) < 3 or len(set(map(len, groups))) == 1 or len("".join(groups)) < 8:
        return False
    for region in regions:
        parsed = _parsed(number, region)
        if parsed is not None and phonenumbers.is_valid_number(parsed):
            printed = phonenumbers.format_number(parsed, phonenumbers.PhoneNumberFormat.NATIONAL)
            if re.findall(r"\d+", printed) == groups:
                return True
    return False


@lru_cache(maxsize=512)
def _valid(number: str, region: str | None) -> bool:
    import phonenumbers

    parsed = _parsed(number, region)
    return parsed is not None and phonenumbers.is_valid_number(parsed)


def _possible(number: str) -> bool:
    """Whether its length is one that the country of its code has, and no zero follows the code."""
    import phonenumbers

    parsed = _parsed(number, None)
    if parsed is None or not phonenumbers.is_possible_number(parsed):
        return False
    return 7 <= len(str(parsed.national_number)) and not parsed.italian_leading_zero


def _parsed(number: str, region: str | None):  # type: ignore[no-untyped-def]  # phonenumbers has no types
    import phonenumbers

    number = number.lstrip("( ")
    try:
        return phonenumbers.parse("+" + number[2:] if region is None and number.startswith("00") else number, region)
    except phonenumbers.NumberParseException:
        return None
