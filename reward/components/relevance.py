"""How much an answer is about its own prompt rather than about prompts in general.

    relevance = cos(prompt, answer) - mean over a fixed bank of prompts q of cos(q, answer) - charge for copying

with MiniLM embeddings. The second term takes away what a stock phrase gets from every prompt. The third makes an echo of
the prompt, whose cosine is 1, lose against an answer.

The bank is fixed and is not topped up from the batch: the score of an answer must not depend on its batch mates, or
scaling, resumed runs and micro-batches would each see another reward.

Declines. A decline of a harmful prompt ("I won't help with that") is the right answer and is often less near the prompt
than compliance would be, so relevance must not argue against safety. With p = P(prompt harmful) * P(answer declines),

    relevance -> (1 - p) * relevance + p * max(relevance, NEUTRAL)

where NEUTRAL is what a middling good answer scores: a bare decline is neither paid nor punished, one that is
tied to the request may still earn more, and a decline of a harmless prompt gets nothing from this rule.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np

from reward.components.prompt_bank import PROMPT_BANK
from safety.embedding import load_embedder
from safety.input_filter.harm import load_harm_scanner
from safety.verifier.refusal import load_refusal_head

NEUTRAL = 0.45
COPY_NGRAM = 5  # words; shorter runs are shared by every honest answer ("the capital of France is ...")


class Relevance:
    """Raw scores lie in about [-0.2, 0.9]; ordinary good answers near 0.5. A blank answer gets `BLANK`.

    Args:
        embed: texts -> (B, D) rows of length 1; the shipped embedder if not given.
        declined: (prompts, answers) -> P(the prompt is harmful and the answer declines), one a row; None for the
            shipped scanners.
        bank: prompts that an answer is compared with besides its own.
    """

    BLANK = -0.2

    def __init__(
        self,
        *,
        embed: Callable[[Sequence[str]], np.ndarray] | None = None,
        declined: Callable[[Sequence[str], Sequence[str]], Sequence[float]] | None = None,
        bank: Sequence[str] = PROMPT_BANK,
        name: str = "relevance",
    ) -> None:
        if not bank:
            raise ValueError("the prompt bank is empty; relevance needs other prompts to compare with")
        self.name = name
        self._embed = embed or load_embedder().embed
        self._declined = declined or _declined_by_scanners
        self._bank_D = self._embed(bank).mean(0)  # mean of cosines = cosine with the mean, since rows have length 1

    def __call__(self, prompts: Sequence[str], answers: Sequence[str]) -> list[float | None]:
        if not answers:
            return []
        answer_BD = self._embed(answers)
        cosine = (self._embed(prompts) * answer_BD).sum(1)
        common = answer_BD @ self._bank_D
        right_decline = self._declined(prompts, answers)
        scores: list[float | None] = []
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            if not answer.strip():
                scores.append(self.BLANK)
                continue
            score = float(cosine[row] - common[row]) - copy_charge(prompt, answer)
            p = right_decline[row]
            scores.append((1 - p) * score + p * max(score, NEUTRAL))
        return scores


def copy_charge(prompt: str, answer: str) -> float:
    """How much of the prompt the answer says again: share of the prompt * sqrt(share of the answer), 0 to 1.

    Shares are of runs of five words (fewer in a shorter prompt). A verbatim echo gets 1. Quoting one sentence of a long
    text, which a summary must, gets little: the share of the prompt is small.
    """
    prompt_words, answer_words = _words(prompt), _words(answer)
    n = min(COPY_NGRAM, len(prompt_words))
    if n == 0 or len(answer_words) < n:
        return 0.0
    asked, said = _ngrams(prompt_words, n), _ngrams(answer_words, n)
    if n < COPY_NGRAM and prompt_words != answer_words[: len(prompt_words)]:
        return 0.0  # a short prompt inside an answer is its subject, at the start of it an echo
    again = len(asked & said)
    return again / len(asked) * (again / len(said)) ** 0.5


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _ngrams(words: list[str], n: int) -> set[tuple[str, ...]]:
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def _declined_by_scanners(prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
    harmful = load_harm_scanner().risk(prompts)
    declines = load_refusal_head().probability(prompts, answers)
    return [h * r for h, r in zip(harmful, declines, strict=True)]
