"""How much an answer is about its own prompt rather than about prompts in general.

    s(text) = cos(prompt, text) - mean over a fixed bank of prompts q of cos(q, text)
    relevance = min((1 - c) * s(answer) + c * s(answer without what it copied from the prompt), s(own) + allowance)

with MiniLM embeddings, s = 0 for a text without words, and c the share of the prompt that the answer says again word for
word. The mean takes away what a stock phrase gets from every prompt. The second line counts only what an echo adds: the
prompt alone, whose cosine is 1, says nothing and scores as a blank answer does; with an answer after it, that answer
scores. Quoting a sentence of a long text, which a summary must, costs little: c is small. All texts are compared as a
person reads them, with look-alike letters and invisible characters undone.

An embedding hardly minds the order of words, so the prompt's words shuffled or listed are as near to it as the prompt.
`own` is therefore the answer without any word of its prompt: what it says must be about the prompt in other words too. The
allowance is wide, since a short answer has few of those; it shrinks to its half for an answer without
any of its own, which may be an extract that was asked for, or a list of keywords.

The bank is fixed and is not topped up from the batch: the score of an answer must not depend on its batch mates, or
scaling, resumed runs and micro-batches would each see another reward.

Declines. A decline of a harmful prompt ("I won't help with that") is the right answer and is often less near the prompt
than compliance would be, so relevance must not argue against safety. With p = P(prompt harmful) * P(answer declines),

    relevance -> (1 - p) * relevance + p * TYPICAL

so that a right decline counts as being about its prompt, and a decline of a harmless one gets nothing from this rule.

Nothing is paid above TYPICAL, what the middle one of good answers scores. Being about the prompt is a yes-or-no matter:
among answers that are, the ones that restate it are nearest to it (on the ordinary pairs of data/starter the rejected
answer is nearer in two cases of three), and a policy would learn to restate.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np

from plumbline.reward.components.known import HarmOfPrompts
from plumbline.reward.components.prompt_bank import PROMPT_BANK
from plumbline.reward.components.reading import as_read
from plumbline.safety.embedder.embedding import load_embedder
from plumbline.safety.input_filter.harm import load_harm_scanner
from plumbline.safety.verifier.refusal import load_refusal_head

TYPICAL = 0.55  # median of the ordinary answers in data/starter/sft.jsonl
ALLOWANCE = 0.25  # half of what good answers score: few of those have so little to say of their own
FEW = 5  # words: an answer as short as that ("the Pacific") may all be taken from its prompt
COPY_NGRAM = 5  # words; shorter runs are shared by every honest answer ("the capital of France is ...")


class Relevance:
    """Raw scores lie in about [-0.2, 0.55]; every other good answer has the most. A blank answer gets `BLANK`.

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
        self._declined = declined or declined_harm()
        self._bank_D = self._embed(bank).mean(0)  # mean of cosines = cosine with the mean, since rows have length 1

    def __call__(self, prompts: Sequence[str], answers: Sequence[str]) -> list[float | None]:
        right_decline = self._declined(prompts, answers)
        prompts, answers = [as_read(prompt) for prompt in prompts], [as_read(answer) for answer in answers]
        copied = [copied_share(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        whole = self._contrast(prompts, answers)
        rest = self._contrast(prompts, [text if share else "" for share, text in copied])
        own = self._contrast(prompts, [own_words(p, a) for p, a in zip(prompts, answers, strict=True)])
        scores: list[float | None] = []
        for row, answer in enumerate(answers):
            c, p = copied[row][0], right_decline[row]
            beyond = rest[row] if copied[row][1] else self.BLANK  # what it says that the prompt did not
            score = min((1 - c) * whole[row] + c * beyond, own[row] + allowance(prompts[row], answer), TYPICAL)
            scores.append((1 - p) * score + p * TYPICAL if answer.strip() else self.BLANK)
        return scores

    def _contrast(self, prompts: Sequence[str], texts: Sequence[str]) -> list[float]:
        """s(text) of the module's docstring, one a row."""
        rows = [row for row, text in enumerate(texts) if text.strip()]
        scores = [0.0] * len(texts)
        if rows:
            text_BD = self._embed([texts[row] for row in rows])
            own = (self._embed([prompts[row] for row in rows]) * text_BD).sum(1)
            for row, score in zip(rows, (own - text_BD @ self._bank_D).tolist(), strict=True):
                scores[row] = score
        return scores


def copied_share(prompt: str, answer: str) -> tuple[float, str]:
    """(share of the prompt that the answer says again, the words of the answer that it does not copy).

    Both by runs of five words, or of the whole prompt if that is shorter. One or two words are the subject of any
    answer: there only a bare echo counts.
    """
    asked, said = _words(prompt), _words(answer)
    n = min(COPY_NGRAM, len(asked))
    if n < 3:
        return (1.0, "") if asked and asked == said else (0.0, " ".join(said))
    runs = {tuple(asked[i : i + n]) for i in range(len(asked) - n + 1)}
    found, own = set(), [True] * len(said)
    for i in range(len(said) - n + 1):
        if (run := tuple(said[i : i + n])) in runs:
            found.add(run)
            own[i : i + n] = [False] * n
    return len(found) / len(runs), " ".join(word for word, mine in zip(said, own, strict=True) if mine)


def own_words(prompt: str, answer: str) -> str:
    """The words of the answer that its prompt does not have, in order."""
    asked = set(_words(prompt))
    return " ".join(word for word in _words(answer) if word not in asked)


def allowance(prompt: str, answer: str) -> float:
    """How much nearer to the prompt than its own words an answer may be, in [ALLOWANCE / 2, ALLOWANCE]."""
    said, own = len(_words(answer)), len(own_words(prompt, answer).split())
    return ALLOWANCE * (min(1.0, 0.5 + own / said) if said > FEW else 1.0)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def declined_harm(harm: HarmOfPrompts | None = None) -> Callable[[Sequence[str], Sequence[str]], list[float]]:
    """(prompts, answers) -> P(the prompt is harmful and the answer declines), by the shipped scanners where not given."""

    def declined(prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
        harmful = (harm or load_harm_scanner()).risk(prompts)
        declines = load_refusal_head().at_once(prompts, answers)
        return [h * r for h, r in zip(harmful, declines, strict=True)]

    return declined
