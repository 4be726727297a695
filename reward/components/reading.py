"""A text as a person reads it, so that no part of the reward can be talked round with letters that only look the same."""

from __future__ import annotations

import re

from plumbline.safety.text.normalise import CONFUSABLE, fold, raw_view


def as_read(text: str) -> str:
    """Look-alike letters, invisible characters and compatibility forms undone; plain ASCII comes back as it is.

    Words that are wholly in another script stay: see `plumbline.safety.text.normalise`.
    """
    return text if text.isascii() else fold(raw_view(text)).text


def mixed_share(text: str) -> float:
    """Share of the words of two letters or more that mix ASCII letters with look-alikes from other scripts, in [0, 1]."""
    if text.isascii():
        return 0.0
    words = re.findall(r"[^\W\d_]{2,}", text)
    mixed = sum(any(ord(c) in CONFUSABLE for c in word) and re.search("[A-Za-z]", word) is not None for word in words)
    return mixed / max(1, len(words))
