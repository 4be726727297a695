"""Quality filtering of training texts, levels 1 and 2: which rows to drop, and why. Nothing is dropped without a reason.

Level 1, rules: empty and overlong rows, garbage, other languages, personal data, exact and near duplicates (MinHash, Broder
1997). Level 2, embeddings: rows that say the same in other words, found among the neighbours in k-means clusters (SemDeDup,
Abbas et al. 2023, arXiv:2303.09540), and outliers. Of duplicates the first row stays. Level 3 is align/data/domain_weights.py.

Time and memory grow linearly with the rows, up to the clusters' sizes, which are bounded.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from plumbline.align.data.duplicates import (
    EMBED_CHARS,
    Row,
    clusters,
    exact_duplicates,
    like_pairs,
    near_duplicates,
    paraphrases,
    row_vectors,
)


@dataclass(frozen=True, slots=True)
class Drop:
    """Why a row goes: level and rule, a detail, and for duplicates the row that stays."""

    rule: str
    detail: str = ""
    kept_row: int | None = None


@dataclass(frozen=True, kw_only=True)
class CurationRules:
    """What is dropped.

    languages        ISO codes that stay; empty: any
    max_chars        of prompt and answer together
    near_duplicate   Jaccard index of 3-word shingles from which two rows are one
    paraphrase       (cosine of prompts, cosine of answers), both at least
    outlier          share of rows, those farthest from the centre of their cluster
    drop_personal    e-mail addresses, card numbers, US social security numbers: drop, or only count
    """

    languages: tuple[str, ...] = ("en",)
    max_chars: int = 20_000
    near_duplicate: float = 0.7
    paraphrase: tuple[float, float] = (0.75, 0.80)
    outlier: float = 0.0
    drop_personal: bool = False

    def __post_init__(self) -> None:
        shares = (self.near_duplicate, *self.paraphrase)
        if not all(0 < share <= 1 for share in shares) or not 0 <= self.outlier < 0.5:
            raise ValueError(
                f"near_duplicate, paraphrase={shares} must be in (0, 1], outlier={self.outlier} in [0, 0.5)"
            )
        if self.max_chars < 1:
            raise ValueError(f"max_chars={self.max_chars} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Curated:
    """drops[i] says why row i goes, None: it stays. `cluster` is -1 for rows that went before they were embedded."""

    drops: list[Drop | None]
    cluster: NDArray[Any]
    personal: list[int]

    def kept(self) -> list[int]:
        return [row for row, drop in enumerate(self.drops) if drop is None]


def curate(
    rows: Sequence[Row],
    rules: CurationRules,
    *,
    embed: Callable[[Sequence[str]], NDArray[Any]] | None = None,
    seed: int = 0,
) -> Curated:
    """Levels 1 and 2. embed: texts -> (B, D) rows of length 1; None leaves level 2 out."""
    drops: list[Drop | None] = [None] * len(rows)
    for number, row in enumerate(rows):
        drops[number] = _length(row, rules) or _garbage(row)
    if rules.languages:
        share = _wanted_share(rules.languages)
        for number, row in enumerate(rows):
            drops[number] = drops[number] or _foreign(row, share)
        for number, odd in unusual_letters(rows, _staying(drops)):
            drops[number] = Drop("garbage", f"{odd:.0%} of letter triples are unusual")
    personal = [number for number, row in enumerate(rows) if PERSONAL.search(f"{row.prompt}\n{row.answer}")]
    if rules.drop_personal:
        for number in personal:
            drops[number] = drops[number] or Drop("personal data")
    _apply(drops, exact_duplicates(rows, _staying(drops)))
    _apply(drops, near_duplicates(rows, _staying(drops), rules.near_duplicate))
    cluster_N = np.full(len(rows), -1)
    staying = _staying(drops)
    if embed is not None and len(staying) > 1:
        texts = [f"{rows[n].prompt[:EMBED_CHARS]}\n{rows[n].answer[:EMBED_CHARS]}" for n in staying]
        vector_ND = row_vectors(texts, embed)
        label_N, distance_N = clusters(vector_ND, seed=seed)
        cluster_N[staying] = label_N
        _apply(drops, paraphrases(rows, staying, like_pairs(vector_ND, label_N), rules.paraphrase, embed))
        for at in np.argsort(-distance_N)[: int(rules.outlier * len(staying))]:
            drops[staying[at]] = drops[staying[at]] or Drop(
                "outlier", f"distance {distance_N[at]:.2f} from its cluster"
            )
    return Curated(drops=drops, cluster=cluster_N, personal=personal)


# ---- level 1: one row at a time -------------------------------------------------------------------------------------

PERSONAL = re.compile(
    r"\b[\w.+-]+@(?!example\.)[\w-]+\.[a-z]{2,}\b|\b(?:\d{4}[ -]){3}\d{4}\b|\b\d{3}-\d{2}-\d{4}\b", re.IGNORECASE
)
_VOWELS = set("aeiouyäöüáéíóúàèìòùâêîôûåøæœãõ")


def _length(row: Row, rules: CurationRules) -> Drop | None:
    for name, text in (("prompt", row.prompt), ("answer", row.answer)):
        if re.search(r"\w", text) is None:
            return Drop("empty", f"the {name} has no letter or digit")
    chars = len(row.prompt) + len(row.answer)
    return Drop("too long", f"{chars} characters") if chars > rules.max_chars else None


def _garbage(row: Row) -> Drop | None:
    """Either text is hardly text. A short answer ("42", "A) Paris") is never garbage; code has words and passes."""
    for name, text in (("prompt", row.prompt), ("answer", row.answer)):
        if why := garbage(text):
            return Drop("garbage", f"{name}: {why}")
    return None


def garbage(text: str) -> str | None:
    """What is wrong with the text, or None. Works for any script: letters are judged where they are Latin only."""
    solid = [char for char in text if not char.isspace()]
    if len(solid) < 25:
        return None
    wordlike = sum(unicodedata.category(char)[0] in "LMN" for char in solid) / len(solid)
    if wordlike < 0.4:
        return f"{wordlike:.0%} letters and digits"
    if text.count("\ufffd") > 2 or len(re.findall(r"[ÃÂâ][\u0080-\u00bf€™œ]", text)) > 3:
        return "broken encoding"
    if len(re.findall(r"</?\w+[^>]*>|&\w+;", text)) > 0.12 * len(text.split()) + 3:
        return "markup"
    words = text.lower().split()
    if len(words) >= 20:
        distinct = len(set(zip(words, words[1:], strict=False))) / (len(words) - 1)
        if distinct < 0.25:
            return f"{distinct:.0%} of word pairs are new"
    latin = re.findall(r"[a-z]{4,}", text.lower())
    if len(latin) >= 4:
        odd = sum(not _pronounceable(word) for word in latin) / len(latin)
        if odd > 0.45:
            return f"{odd:.0%} of words cannot be spoken"
    longest = max((len(word) for word in text.split()), default=0)
    if longest > 0.6 * len(text) and longest > 60 and "http" not in text and text.isascii():
        return "one unbroken run of characters"
    return None


def _pronounceable(word: str) -> bool:
    """At least a vowel in six letters, never five consonants or four vowels running, no rare pairs of consonants."""
    vowels = sum(char in _VOWELS for char in word)
    runs = re.search(r"[^aeiouy]{5}|[aeiou]{4}|[jqvwxz]{2}|q[^u]|[bcdfghjklmnprstvwxz]q|[bcdfgjkmpqvwxz][jqvwxz]", word)
    return vowels * 6 >= len(word) and runs is None


def _wanted_share(languages: Sequence[str]) -> Callable[[str], tuple[float, str]]:
    """text -> (probability that it is in one of the languages, the likeliest language)."""
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise ValueError(
            "languages are told apart by py3langid, which is not installed: pip install 'plumbline-rlhf[curate]', "
            "or keep every language with languages=none"
        ) from None
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)

    def share(text: str) -> tuple[float, str]:
        ranked = [(str(code), float(p)) for code, p in identifier.rank(text)]
        return sum(p for code, p in ranked if code in languages), ranked[0][0]

    return share


def _foreign(row: Row, share: Callable[[str], tuple[float, str]]) -> Drop | None:
    """The whole row, and the prompt alone, are in another language; a request to translate is not."""
    if len(row.prompt) + len(row.answer) < 20:
        return None
    whole, code = share(f"{row.prompt}\n{row.answer}"[:1000])
    if whole > 0.1 or share(row.prompt[:500])[0] > 0.5:
        return None
    return Drop("language", f"{code} ({1 - whole:.2f})")


def unusual_letters(rows: Sequence[Row], among: Sequence[int]) -> Iterator[tuple[int, float]]:
    """Rows in which more than 30% of the letter triples are none of those that make up 97% of these rows' text.

    Letters in random order are found so, in whatever language the rows are; nothing is said about fewer than 200 rows.
    """
    if len(among) < 200:
        return
    counts: Counter[str] = Counter()
    for number in among[:: max(1, len(among) // 20_000)]:
        counts.update(_triples(rows[number].answer[:EMBED_CHARS]))
    total, usual, covered = sum(counts.values()), set(), 0
    for triple, count in counts.most_common():
        usual.add(triple)
        covered += count
        if covered > 0.97 * total:
            break
    for number in among:
        for text in (rows[number].prompt, rows[number].answer):
            triples = _triples(text[:EMBED_CHARS])
            odd = sum(triple not in usual for triple in triples) / len(triples) if len(triples) >= 20 else 0.0
            if odd > 0.3:
                yield number, odd
                break


def _triples(text: str) -> list[str]:
    return [word[i : i + 3] for word in re.findall(r"[^\W\d_]{4,}", text.lower()) for i in range(len(word) - 2)]


def _staying(drops: Sequence[Drop | None]) -> list[int]:
    return [row for row, drop in enumerate(drops) if drop is None]


def _apply(drops: list[Drop | None], found: Any) -> None:
    """Marks rows that go, unless the one that should stay went itself."""
    for row, other, rule, detail in found:
        if drops[row] is None and drops[other] is None:
            drops[row] = Drop(rule, detail, other)
