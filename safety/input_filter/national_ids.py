"""Identity numbers of some thirty countries: a form, a check digit where there is one, and words nearby where both say too little."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date

from plumbline.safety.text.scripts import GLUED

NEAR = 48  # characters before a number in which a word counts as its context
Check = Callable[[str], bool]  # of the number in capitals, without its separators


@dataclass(frozen=True)
class Form:
    """`words`: one of them must stand nearby; None where form and check are enough. `check` None: the form is all there is."""

    country: str
    pattern: re.Pattern[str]
    check: Check | None = None
    words: re.Pattern[str] | None = None
    score: float = 0.9


def national_ids(text: str) -> Iterator[tuple[int, int, float]]:
    """(start, end, score) of each number in a text that went through `plumbline.safety.text.scripts.plain`."""
    if not _MAYBE.search(text):
        return
    for form in FORMS:
        for found in form.pattern.finditer(text):
            start = found.start()
            if form.words is not None and not form.words.search(text, max(0, start - NEAR), start):
                continue
            if form.words is None and _ORDER.search(text, max(0, start - 24), start):
                continue
            if form.check is None or form.check(re.sub(r"[^0-9A-Za-z]", "", found.group()).upper()):
                yield start, found.end(), form.score


_MAYBE = re.compile(r"(?:[0-9][^0-9]{0,7}){4}")  # in each number that is found below
_ORDER = re.compile(
    r"\b(?:order|invoice|ticket|part|model|serial|version|isbn|sku|lot|batch|ref(?:erence)?)\b[\w .:#]{0,12}$", re.I
)


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
    rest = 11 - weighted(digits[:9], range(10, 1, -1)) % 11
    return rest != 10 and rest % 11 == int(digits[9])


def dni(text: str) -> bool:
    """Spanish DNI and NIE: the letter is the number modulo 23 in a fixed table."""
    number = text[:-1].upper().translate(str.maketrans("XYZ", "012"))
    return "TRWAGMYFPDXBNJZSQVHLCKE"[int(number) % 23] == text[-1].upper()


def weighted(digits: str, weights: range | tuple[int, ...]) -> int:
    """Sum of digits times weights, as far as the shorter of the two goes."""
    return sum(int(digit) * weight for digit, weight in zip(digits, weights, strict=False))


def _date(year: str, month: str, day: str) -> bool:
    """Whether they are a day of the calendar; a year of two digits counts as in this or the last century."""
    for century in ("",) if len(year) == 4 else ("19", "20"):
        try:
            date(int(century + year), int(month), int(day))
        except ValueError:
            continue
        return True
    return False


def _ymd(number: str) -> bool:
    return _date(number[:2], number[2:4], number[4:6])


def _dmy(number: str) -> bool:
    return _date(number[4:6], number[2:4], number[:2])


def _cpf(number: str) -> bool:
    """Brazil: two digits modulo 11."""
    first, second = (weighted(number, range(start, 1, -1)) * 10 % 11 % 10 for start in (10, 11))
    return number[9:11] == f"{first}{second}" and len(set(number)) > 1


def _china(number: str) -> bool:
    """GB 11643: a date of birth, ISO 7064 MOD 11-2."""
    total = weighted(number[:17], (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2))
    return "10X98765432"[total % 11] == number[17] and _date(number[6:10], number[10:12], number[12:14])


def _france(number: str) -> bool:
    """NIR: the key is 97 minus the number modulo 97; Corsica's A and B stand for 1 and 2 million less."""
    body = int(number[:13].replace("2A", "19").replace("2B", "18"))
    return 97 - body % 97 == int(number[13:15])


def _ean13(number: str) -> bool:
    return (10 - weighted(number[:12], (1, 3) * 6) % 10) % 10 == int(number[12])


def _finland(number: str) -> bool:
    """The number's remainder by 31 in a table of digits and letters; the sign between is gone."""
    body = re.sub(r"^(\d{6})[A-FU-Y](?=\d{3})", r"\1", number)
    return _dmy(body) and "0123456789ABCDEFHJKLMNPRSTUVWXY"[int(body[:9]) % 31] == body[9]


def _norway(number: str) -> bool:
    first = 11 - weighted(number, (3, 7, 6, 1, 8, 9, 4, 5, 2)) % 11
    second = 11 - weighted(number, (5, 4, 3, 2, 7, 6, 5, 4, 3, 2)) % 11
    return _dmy(number) and number[9:] == f"{first % 11}{second % 11}"


def _pesel(number: str) -> bool:
    return (10 - weighted(number[:10], (1, 3, 7, 9) * 3) % 10) % 10 == int(number[10])


def _bsn(number: str) -> bool:
    return weighted(number, (9, 8, 7, 6, 5, 4, 3, 2, -1)) % 11 == 0 and int(number) > 0


def _germany(number: str) -> bool:
    """ISO 7064 MOD 11,10."""
    product = 10
    for digit in number[:10]:
        product = ((int(digit) + product) % 10 or 10) * 2 % 11
    return (11 - product) % 10 == int(number[10])


def _belgium(number: str) -> bool:
    return any(97 - int(century + number[:9]) % 97 == int(number[9:]) for century in ("", "2"))


def _portugal(number: str) -> bool:
    rest = weighted(number[:8], range(9, 1, -1)) % 11
    return (0 if rest < 2 else 11 - rest) == int(number[8])


_D = tuple(
    tuple((a + b) % 5 + 5 * (a // 5 ^ b // 5) if a < 5 else (a - b) % 5 + 5 * (1 - b // 5) for b in range(10))
    for a in range(10)
)
_P = (1, 5, 7, 6, 2, 8, 3, 0, 9, 4)


def _verhoeff(number: str) -> bool:
    """India's Aadhaar (Verhoeff 1969): a walk through the dihedral group of the pentagon."""
    check, power = 0, tuple(range(10))
    for digit in reversed(number):
        check = _D[check][power[int(digit)]]
        power = tuple(_P[p] for p in power)
    return check == 0


def _singapore(number: str) -> bool:
    total = weighted(number[1:8], (2, 7, 6, 5, 4, 3, 2)) + {"T": 4, "G": 4, "M": 3}.get(number[0], 0)
    table = {"S": "JZIHGFEDCBA", "T": "JZIHGFEDCBA", "M": "KLJNPQRTUWX"}.get(number[0], "XWUTRQPNMLK")
    return table[total % 11 if number[0] != "M" else 10 - total % 11] == number[8]


def _taiwan(number: str) -> bool:
    letter = 10 + "ABCDEFGHJKLMNPQRSTUVXYWZIO".index(number[0])
    return (letter // 10 + letter % 10 * 9 + weighted(number[1:], (8, 7, 6, 5, 4, 3, 2, 1, 1))) % 10 == 0


def _thailand(number: str) -> bool:
    return (11 - weighted(number[:12], range(13, 1, -1)) % 11) % 10 == int(number[12])


def _turkey(number: str) -> bool:
    d = [int(digit) for digit in number]
    return d[9] == (sum(d[0:9:2]) * 7 - sum(d[1:8:2])) % 10 and d[10] == sum(d[:10]) % 10


def _chile(number: str) -> bool:
    rest = 11 - weighted(number[-2::-1], (2, 3, 4, 5, 6, 7, 2, 3, 4)) % 11
    return "0123456789K0"[rest if rest < 12 else 0] == number[-1]


# --------------------------------------------------------------------------------------------------------------- table


def _form(country: str, pattern: str, check: Check | None = None, words: str = "", score: float = 0.9) -> Form:
    whole = re.compile(rf"(?<![{GLUED}-])(?<![{GLUED}][./,]){pattern}(?![{GLUED}-]|[./][0-9])")
    return Form(country, whole, check, re.compile(words, re.I) if words else None, score)


FORMS: tuple[Form, ...] = (
    # United States: area 001-899 but 666, group and serial not all zeros; without dashes only where the text says so
    _form("US", r"(?!000|666|9)[0-9]{3}-(?!00)[0-9]{2}-(?!0000)[0-9]{4}"),
    _form("US", r"(?!000|666|9)[0-9]{3}[ .]?(?!00)[0-9]{2}[ .]?(?!0000)[0-9]{4}", words=r"\bssn\b|social security", score=0.85),
    _form("GB", r"(?!BG|GB|KN|NK|NT|TN|ZZ)[A-CEGHJ-PR-TW-Z][A-CEGHJ-NPR-TW-Z] ?[0-9]{2} ?[0-9]{2} ?[0-9]{2} ?[A-D]"),
    _form("GB", r"[0-9]{3}[ -]?[0-9]{3}[ -]?[0-9]{4}", mod11, r"\bnhs\b", 0.95),
    _form("ES", r"(?:[0-9]{8}|[XYZxyz][0-9]{7}|[0-9]{2}\.[0-9]{3}\.[0-9]{3})-?[A-Za-z]", dni),
    _form("IT", r"[A-Z]{6}[0-9]{2}[A-EHLMPRST][0-9]{2}[A-Z][0-9]{3}[A-Z]"),
    _form("CA", r"[0-9]{3}[ -]?[0-9]{3}[ -]?[0-9]{3}", luhn, r"\bsin\b|social insurance"),
    _form("BR", r"[0-9]{3}\.[0-9]{3}\.[0-9]{3}-[0-9]{2}", _cpf, score=0.95),
    _form("BR", r"[0-9]{11}", _cpf, r"\bcpf\b", 0.95),
    _form("CN", r"[1-9][0-9]{16}[0-9Xx]", _china, score=0.95),
    _form("KR", r"[0-9]{6}-[1-8][0-9]{6}", _ymd),
    _form("TH", r"[1-8][ -]?[0-9]{4}[ -]?[0-9]{5}[ -]?[0-9]{2}[ -]?[0-9]", _thailand, "บัตร|ประชาชน|thai|citizen|identi"),
    _form("TH", r"[1-8]([ -])[0-9]{4}\1[0-9]{5}\1[0-9]{2}\1[0-9]", _thailand),
    _form("FR", r"[12] ?[0-9]{2} ?(?:0[1-9]|1[0-2]|[2-9][0-9]) ?(?:[0-9]{2}|2[AB]) ?[0-9]{3} ?[0-9]{3} ?[0-9]{2}", _france, score=0.95),
    _form("CH", r"756\.?[0-9]{4}\.?[0-9]{4}\.?[0-9]{2}", _ean13, score=0.95),
    _form("FI", r"[0-9]{6}[-+A-FU-Y][0-9]{3}[0-9A-FHJ-NPR-Y]", _finland, score=0.95),
    _form("SE", r"[0-9]{6}[-+][0-9]{4}", lambda number: _ymd(number) and luhn(number)),
    _form("SE", r"(?:19|20)[0-9]{6}-?[0-9]{4}", lambda number: _ymd(number[2:]) and luhn(number[2:]), "person|\\bid\\b|samordning"),
    _form("NO", r"[0-9]{6} ?[0-9]{5}", _norway),
    _form("DK", r"[0-9]{6}-?[0-9]{4}", _dmy, r"\bcpr|person"),
    _form("PL", r"[0-9]{11}", _pesel, r"\bpesel"),
    _form("NL", r"[0-9]{9}|[0-9]{4}[. ][0-9]{2}[. ][0-9]{3}", _bsn, r"\bbsn\b|burgerservice|sofi"),
    _form("DE", r"[1-9][0-9](?: ?[0-9]{3}){3}", _germany, r"steuer|identifikationsnummer|idnr|tax id"),
    _form("BE", r"[0-9]{2}[. ]?[0-9]{2}[. ]?[0-9]{2}[- ][0-9]{3}[. ]?[0-9]{2}", _belgium),
    _form("PT", r"[1-9][0-9]{2} ?[0-9]{3} ?[0-9]{3}", _portugal, r"\bnif\b|contribuinte"),
    _form("IN", r"[2-9][0-9]{3}([ -]?)[0-9]{4}\1[0-9]{4}", _verhoeff, "aadha|uidai|आधार"),
    _form("IN", r"[A-Z]{3}[ABCFGHLJPTK][A-Z][0-9]{4}[A-Z]", words=r"\bpan\b|income tax"),
    _form("MX", r"[A-Z]{4}[0-9]{6}[HMX][A-Z]{5}[A-Z0-9][0-9]", lambda number: _ymd(number[4:])),
    _form("SG", r"[STFGM][0-9]{7}[A-Z]", _singapore),
    _form("TW", r"[A-Z][1289][0-9]{8}", _taiwan),
    _form("HK", r"[A-Z]{1,2}[0-9]{6}\([0-9A]\)"),
    _form("ZA", r"[0-9]{6} ?[0-9]{4} ?[01][89] ?[0-9]", lambda number: _ymd(number) and luhn(number), r"\bid\b|identity"),
    _form("TR", r"[1-9][0-9]{10}", _turkey, r"\btc\b|t\.c\.|kimlik"),
    _form("JP", r"[0-9]{4}[ -]?[0-9]{4}[ -]?[0-9]{4}", words="マイナンバー|個人番号|my number"),
    _form("CL", r"[0-9]{1,2}\.[0-9]{3}\.[0-9]{3}-[0-9Kk]", _chile),
    _form("IE", r"[0-9]{7}[A-W][A-IW]?", words=r"\bpps"),
    _form("any", r"(?:[A-Z]{1,2}[0-9]{6,8}|[0-9]{9}|[0-9]{2}[A-Z]{2}[0-9]{5})", words="passport|reisepass|passeport|pasaporte|passaport|护照|護照|パスポート|여권|паспорт", score=0.7),
)  # fmt: skip
