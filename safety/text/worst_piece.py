"""The riskiest piece of a text: the whole, a window of the embedder, or a sentence.

A long harmless text hides a bad line from an embedding of the whole. So every piece is scored and the worst counts. Sentences are many:
a head that is wrong once in fifty would be wrong on every page. Where a text as a whole is asked for (harm, injection), a sentence
of n therefore needs n + 1 times the odds: the prior of the text is shared among all that is looked at, the whole included.

Where only the worst line counts (toxicity), a text of more than LONG characters is its sentences, and is not embedded as a whole again.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from plumbline.safety.classifier import Head
from plumbline.safety.embedder.embedding import Embedder, Windows
from plumbline.safety.findings import Span

LONG = 500  # characters, some 120 tokens
_ADDRESS = re.compile(r"[^\s@]{1,64}@[^\s@]{1,255}|https?://\S{1,2000}")
_DOT_INSIDE = re.compile(r"[.!?](?=\w)")


class Worst(NamedTuple):
    """The piece of highest probability: where it is (None: the whole text), and its unit vector (384,), None of a blank text."""

    score: float
    span: Span | None = None
    vector: np.ndarray | None = None


Piece = tuple[Span | None, np.ndarray]


def worst_pieces(
    head: Head, embedder: Embedder, texts: Sequence[str], *, share_prior: bool, parts: Sequence[bool] | None = None
) -> list[Worst]:
    """The worst piece of each text; a blank text has risk 0.

    share_prior: the text as a whole is asked for, and a sentence of n needs n + 1 times the odds; else a long text is its sentences.
    parts: where True, the text is a stretch of a longer one, and has no whole: only its sentences are looked at, most of which the
    embedder knows from the stretch before.
    """
    inside = [sentences(text) for text in texts]
    is_part = parts or [False] * len(texts)
    has_whole = [
        bool(text.strip()) and not (spans and (part or len(text) > LONG and not share_prior))
        for text, spans, part in zip(texts, inside, is_part, strict=True)
    ]
    cut = [
        piece
        for text, spans, whole in zip(texts, inside, has_whole, strict=True)
        for piece in ([text] if whole else []) + [text[span.start : span.end] for span in spans]
    ]
    embedded = iter(embedder.embed_windows(cut))
    pieces: list[Piece] = []
    sizes, share = [], []
    for spans, whole in zip(inside, has_whole, strict=True):
        large = list(of_windows(next(embedded))) if whole else []
        windows = [next(embedded) for _ in spans]
        small: list[Piece] = [
            (span, vector) for span, one in zip(spans, windows, strict=True) for _, vector in of_windows(one)
        ]
        pieces += large + small
        sizes.append(len(large) + len(small))
        share += [1] * len(large) + [len(spans) + 1 if share_prior else 1] * len(small)
    worst = [Worst(0.0)] * len(texts)
    if not pieces:
        return worst
    scores = shared(head.predict(np.stack([vector for _, vector in pieces])), np.array(share))
    at = 0
    for row, size in enumerate(sizes):
        if size:
            best = at + int(scores[at : at + size].argmax())
            worst[row] = Worst(float(scores[best]), *pieces[best])
        at += size
    return worst


def of_windows(text: Windows) -> Iterator[Piece]:
    """A text as a whole, and its windows if there are several."""
    yield None, text.mean()
    if len(text.spans) > 1:
        for (start, end), vector in zip(text.spans, text.vectors, strict=True):
            yield Span(start=start, end=end), vector


def shared(p: np.ndarray, n: np.ndarray) -> np.ndarray:
    """Probabilities with their odds divided by n."""
    return p / (p + n * (1 - p))


def sentences(text: str) -> list[Span]:
    """Sentences of a text with more than one; pieces under three words ("You fool.") stay with what follows them.

    A text of one sentence gives an empty list: it is its own sentence. The dots of an e-mail or web address end none.
    """
    text = _ADDRESS.sub(lambda found: _DOT_INSIDE.sub("_", found.group()), text)  # as long as before
    spans: list[Span] = []
    start, words = None, 0
    for found in re.finditer(r"[^.!?\n]*(?:[.!?]+|\n|$)", text):
        start = found.start() if start is None else start
        glued = found.start() > start and not text[found.start() - 1].isspace() and not found.group()[:1].isspace()
        words += len(found.group().split()) - (glued and found.group().strip() != "")
        if words >= 3:
            spans.append(Span(start=start, end=found.end()))
            start, words = None, 0
    if start is not None and text[start:].strip():  # a short rest belongs to the last sentence
        start = spans.pop().start if spans else start
        spans.append(Span(start=start, end=len(text)))
    return spans if len(spans) > 1 else []
