"""Does an answer decline? A learned head over how the answer opens, its form more than its topic.

Not a list of phrases: those miss most refusals of newer models and read "I can't recommend this film enough" as one. The
grader in `eval` is such a list, on purpose: this head is what the policy is rewarded by, so it may not also grade it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from safety.embedding import EMBEDDER_ID, Embedder, load_embedder
from safety.findings import Category, Finding
from safety.heads import SHIPPED, Head

OPENING_WORDS = 30  # a decline comes early
FEATURES = f"{EMBEDDER_ID}:opening{OPENING_WORDS}+answer+cosines"


def refusal_features(embedder: Embedder, prompts: Sequence[str], answers: Sequence[str]) -> np.ndarray:
    """(B, 771): embedding of the opening, of the whole answer, then the cosines prompt-opening, prompt-answer, and log
    of the answer's words."""
    openings = [" ".join(answer.split()[:OPENING_WORDS]) for answer in answers]
    opening_BD, answer_BD, prompt_BD = embedder.embed(openings), embedder.embed(answers), embedder.embed(prompts)
    words = np.log1p(np.array([len(answer.split()) for answer in answers], dtype=np.float32))
    pair = np.stack([(prompt_BD * opening_BD).sum(1), (prompt_BD * answer_BD).sum(1), words], axis=1)
    return np.concatenate([opening_BD, answer_BD, pair], axis=1)


class RefusalHead:
    """P(an answer declines the prompt, wholly or in part). The shipped embedder and head if not given."""

    def __init__(
        self,
        *,
        embedder: Embedder | None = None,
        head: Head | None = None,
        name: str = "refusal",
        floor: float = 0.1,
    ) -> None:
        self.name, self.floor = name, floor
        self.head = head or Head.load(SHIPPED / "refusal.safetensors", features=FEATURES)
        self.embedder = embedder or load_embedder()

    def probability(self, prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
        """Calibrated P(declines), one a pair. An answer without a letter or digit says nothing, so it gets 0."""
        if len(prompts) != len(answers):
            raise ValueError(f"{len(prompts)} prompts but {len(answers)} answers; pass one answer a prompt")
        if not answers:
            return []
        scores = self.head.predict(refusal_features(self.embedder, prompts, answers))
        return [float(p) if re.search(r"\w", answer) else 0.0 for p, answer in zip(scores, answers, strict=True)]

    def scan(self, prompts: Sequence[str], answers: Sequence[str]) -> list[list[Finding]]:
        """At most one finding a pair."""
        return [
            [
                Finding(
                    scanner=self.name,
                    version=self.head.version,
                    category=Category.REFUSAL,
                    score=score,
                    reason="declines what was asked",
                )
            ]
            if score >= self.floor
            else []
            for score in self.probability(prompts, answers)
        ]


@lru_cache(maxsize=1)
def load_refusal_head() -> RefusalHead:
    """The shipped head, loaded once and shared by the pipeline and the reward."""
    return RefusalHead()
