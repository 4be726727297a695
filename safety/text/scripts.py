"""Letters, digits and signs of all scripts as far as rules need them: one reading of a text, character for character.

Chinese, Japanese, Korean, Thai, Lao, Khmer and Burmese are written without blanks, or join endings to whatever stands before: an
address can stand right beside their letters. In Latin, Greek and Cyrillic a letter beside a number makes both one word.
"""

from __future__ import annotations

import unicodedata
from functools import lru_cache

# Ranges for a character class, without the brackets.
NO_BLANKS = (
    "\u0e00-\u0eff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff\u2e80-\u2fdf\u3001-\u30ff\u3105-\u318f\u31a0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\ua960-\ua97f\uac00-\ud7ff\uf900-\ufaff\uff61-\uffdc\U00020000-\U0003ffff"
)
GLUED = (
    "0-9A-Za-z_\u00aa\u00b5\u00ba\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u02af"
    "\u0370-\u0373\u0376-\u037d\u0386-\u0481\u048a-\u052f\u1e00-\u1fff"
)


@lru_cache(maxsize=1)
def _table() -> dict[int, str]:
    """Decimal digits of every script, full-width signs, dashes and blanks -> the ASCII character that means the same."""
    table = {}
    for code in range(0x80, 0x20000):
        kind = unicodedata.category(chr(code))
        if kind == "Nd":
            table[code] = str(unicodedata.decimal(chr(code)))
        elif kind == "Pd" or code in (0x2212, 0xFE63):
            table[code] = "-"
        elif kind == "Zs" and code != 0x3000:
            table[code] = " "
    table |= {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}
    return table | {0x3000: " ", 0x2024: ".", 0xFE52: ".", 0xFE6B: "@"}


def plain(text: str) -> str:
    """The text with digits, dashes, blanks and full-width signs in ASCII; as long as before, so that offsets stay."""
    return text if text.isascii() else text.translate(_table())
