"""Ways in which people hide a request from a filter, and texts that try to break one: for measuring and testing."""

from __future__ import annotations

import base64
import codecs
import random
from collections.abc import Callable

_GREEK_AND_CYRILLIC = str.maketrans("aceiopxyABEHKMOPT", "асеіорхуАВЕНКМОРТ")
_LEET = str.maketrans("aeiostAEIOST", "431057431057")

OBFUSCATIONS: dict[str, Callable[[str], str]] = {
    "spaced words": lambda text: "   ".join(" ".join(word) for word in text.split()),
    "spaced letters": lambda text: " ".join("".join(text.split())),
    "homoglyphs": lambda text: text.translate(_GREEK_AND_CYRILLIC),
    "zero width": lambda text: "\u200b".join(text),
    "leet": lambda text: text.translate(_LEET),
    "base64": lambda text: base64.b64encode(text.encode()).decode(),
    "rot13": lambda text: codecs.encode(text, "rot13"),
    "hex": lambda text: text.encode().hex(),
    "tags": lambda text: "Hello! " + "".join(chr(0xE0000 + ord(ch)) for ch in text if 0x20 <= ord(ch) < 0x7F),
}

UNITS = (
    [
        "a",
        "1",
        "{",
        "[",
        "(",
        "<",
        "é",
        "\u200b",
        "\ud800",
        "\x00",
        "%41",
        "&#65;",
        "4a",
        "a@",
        "@a.",
        "1.",
        "12 ",
        "A1 ",
        "= ",
        "key=",
    ]
    + [
        "://",
        ":x@",
        "eyJ",
        "-----BEGIN PRIVATE KEY-----",
        "ignore all ",
        "a b ",
        "\\x41",
        "\U000e0041",
        "\u0301",
        "𝕳",
        "Ａ",
        "\n",
        "\r\n",
    ]
    + ["==", "AKIA", "::", "+1", "(1", "no ", "b\u202e", "h4x "]
)


def hostile_texts(count: int, seed: int) -> list[str]:
    """Random texts and the shapes that break parsers: empty, 1 MB, surrogates, controls, deep nesting, one pattern repeated."""
    rng = random.Random(seed)
    texts = ["", " ", "\n" * 50, "a" * 1_000_000, "[" * 100_000, '{"a":' * 3000, "\ud800\udfff" * 300]
    while len(texts) < count:
        kind = rng.randrange(4)
        if kind == 0:
            ends = rng.choices((0x80, 0x3000, 0x110000), k=rng.randrange(300))
            texts.append("".join(chr(rng.randrange(end)) for end in ends))
        elif kind == 1:
            texts.append(rng.choice(UNITS) * rng.randrange(1, 400))
        elif kind == 2:
            texts.append("".join(rng.choice(UNITS) for _ in range(rng.randrange(200))))
        elif rng.random() < 0.05:
            texts.append(rng.choice(UNITS) * 700)
        else:
            texts.append(" ".join(rng.choice(UNITS) for _ in range(rng.randrange(60))))
    return texts[:count]
