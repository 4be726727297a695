"""Rows that say the same: in the same words, in nearly the same words (MinHash, Broder 1997), in other words (embeddings, after
SemDeDup, Abbas et al. 2023, arXiv:2303.09540). Of several the first stays.

Each function gives (row that goes, row that stays, rule, detail).
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

SHINGLE = 3  # words
PERMUTATIONS = 64
CLUSTER_SIZE = 200  # rows that a cluster has on average
EMBED_CHARS = 400  # of a text: what it is about stands at its start
WORDS = 20_000  # the most frequent ones, which rows are compared by
COMMON = 1e-3  # share of all words from which a word counts for less than half
LIKE = 0.85  # cosine of the vectors of two rows from which they are looked at more closely

Found = tuple[int, int, str, str]


@dataclass(frozen=True, slots=True)
class Row:
    """A prompt and its answer; `place` names the row for people."""

    prompt: str
    answer: str
    place: str = ""


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold())


def exact_duplicates(rows: Sequence[Row], among: Sequence[int]) -> Iterator[Found]:
    """Rows whose words are those of an earlier row, whatever case, punctuation and blanks are."""
    seen: dict[bytes, int] = {}
    for number in among:
        text = " ".join(_words(rows[number].prompt)) + "\n" + " ".join(_words(rows[number].answer))
        first = seen.setdefault(hashlib.blake2b(text.encode(), digest_size=16).digest(), number)
        if first != number:
            yield number, first, "exact duplicate", ""


def near_duplicates(rows: Sequence[Row], among: Sequence[int], threshold: float) -> Iterator[Found]:
    """Rows whose 3-word shingles are nearly those of an earlier row: candidates by MinHash, then the exact Jaccard index.

    Rows of fewer than 8 words are left to the exact rule: two sums or two capitals are not one question.
    """
    try:
        from datasketch import MinHash, MinHashLSH
    except ImportError:
        raise ValueError(
            "near duplicates are found with datasketch, which is not installed: pip install 'plumbline-rlhf[curate]'"
        ) from None
    index = MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS)
    blank = MinHash(num_perm=PERMUTATIONS, seed=1)
    for number in among:
        shingles = _shingles(rows[number])
        if len(shingles) < 6:
            continue
        sketch = blank.copy()
        sketch.update_batch([" ".join(shingle).encode() for shingle in shingles])
        for other in sorted(index.query(sketch)):
            others = _shingles(rows[other])
            jaccard = len(shingles & others) / len(shingles | others)
            if jaccard >= threshold:
                yield number, other, "near duplicate", f"Jaccard {jaccard:.2f}"
                break
        else:
            index.insert(number, sketch, check_duplication=False)


def _shingles(row: Row) -> set[tuple[str, ...]]:
    words = [*_words(row.prompt), "\n", *_words(row.answer)]
    return {tuple(words[i : i + SHINGLE]) for i in range(len(words) - SHINGLE + 1)}


def row_vectors(texts: Sequence[str], embed: Callable[[Sequence[str]], NDArray[Any]]) -> NDArray[Any]:
    """(N, D) float16, rows of length 1: the mean of what a text's words mean, common ones counting little.

    Only the words are embedded, each by itself (after Model2Vec), so 100,000 texts cost hardly more than 10,000. Weights are
    a / (a + share of the word) (Arora et al. 2017), and what all words have in common is taken away.
    """
    from sklearn.feature_extraction.text import CountVectorizer

    once = len(texts) < 1000  # in many rows, a word of one row alone says nothing about which rows are alike
    counter = CountVectorizer(token_pattern=r"\w+", min_df=1 if once else 2, max_features=WORDS, dtype=np.float32)
    count_NV = counter.fit_transform(texts)
    word_VD = np.asarray(embed(counter.get_feature_names_out().tolist()), dtype=np.float32)
    word_VD = word_VD - word_VD.mean(0)
    share_V = np.asarray(count_NV.sum(0))[0] / count_NV.sum()
    vector_ND = count_NV @ (word_VD * (COMMON / (COMMON + share_V))[:, None])
    return (vector_ND / np.maximum(np.linalg.norm(vector_ND, axis=1, keepdims=True), 1e-9)).astype(np.float16)


def clusters(vector_ND: NDArray[Any], *, seed: int = 0) -> tuple[NDArray[Any], NDArray[Any]]:
    """(N,) cluster of each row, and (N,) distance from its centre (1 - cosine), by mini-batch k-means."""
    from sklearn.cluster import MiniBatchKMeans

    count = max(1, len(vector_ND) // CLUSTER_SIZE)
    vectors = vector_ND.astype(np.float32)
    means = MiniBatchKMeans(count, random_state=seed, n_init=1, batch_size=4096, max_iter=20).fit(vectors)
    centre_KD = means.cluster_centers_ / np.linalg.norm(means.cluster_centers_, axis=1, keepdims=True)
    label_N = np.asarray(means.labels_)
    return label_N, 1 - (vectors * centre_KD[label_N]).sum(1)


def like_pairs(vector_ND: NDArray[Any], label_N: NDArray[Any], *, most: int = 3) -> Iterator[tuple[int, int]]:
    """(row, earlier row of its cluster) with a cosine of at least LIKE; for each row the nearest few.

    A cluster of n rows is compared in blocks, so memory stays small when one cluster is large.
    """
    order = np.argsort(label_N, kind="stable")
    for members in np.split(order, np.flatnonzero(np.diff(label_N[order])) + 1):
        vectors = vector_ND[members].astype(np.float32)
        for start in range(0, len(members), 1024):
            cosine = vectors[start : start + 1024] @ vectors.T
            for at, row in enumerate(range(start, min(start + 1024, len(members)))):
                near = np.flatnonzero(cosine[at, :row] >= LIKE)
                for other in near[np.argsort(-cosine[at, near], kind="stable")][:most]:
                    yield int(members[row]), int(members[other])


def paraphrases(
    rows: Sequence[Row],
    among: Sequence[int],
    pairs: Iterable[tuple[int, int]],
    thresholds: tuple[float, float],
    embed: Callable[[Sequence[str]], NDArray[Any]],
) -> Iterator[Found]:
    """Those pairs (places in `among`) whose prompts and whose answers are both near: one question with two answers is not
    a repetition, nor is one answer ("Yes.") to two questions. Answers, the longer texts, are embedded only where prompts are near.
    """
    alike = [(among[row], among[other]) for row, other in pairs]
    prompts = _cosines([row.prompt for row in rows], alike, embed)
    alike = [pair for pair in alike if prompts[pair] >= thresholds[0]]
    answers = _cosines([row.answer for row in rows], alike, embed)
    for pair in alike:
        if answers[pair] >= thresholds[1]:
            yield *pair, "paraphrase", f"cosines {prompts[pair]:.2f}, {answers[pair]:.2f}"


def _cosines(
    texts: Sequence[str], pairs: Sequence[tuple[int, int]], embed: Callable[[Sequence[str]], NDArray[Any]]
) -> dict[tuple[int, int], float]:
    """The cosine of each pair of texts (their first EMBED_CHARS); a text is embedded once, and only where a pair has it."""
    needed = sorted({number for pair in pairs for number in pair})
    if not needed:
        return {}
    at = {number: place for place, number in enumerate(needed)}
    vector_ND = embed([texts[number][:EMBED_CHARS] for number in needed])
    return {(row, other): float(vector_ND[at[row]] @ vector_ND[at[other]]) for row, other in pairs}
