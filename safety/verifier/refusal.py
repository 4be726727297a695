"""Does an answer decline? A learned head over how the answer opens, its form more than its topic.

Not a list of phrases: those miss most refusals of newer models and read "I can't recommend this film enough" as one. The
grader in `eval` is such a list, on purpose: this head is what the policy is rewarded by, so it may not also grade it.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from plumbline.safety.classifier import SHIPPED, Head
from plumbline.safety.embedder.embedding import EMBEDDER_ID, Embedder, load_embedder
from plumbline.safety.findings import Category, Cost, Finding, ScanItem, Stage

OPENING_WORDS, FIRST_WORDS = 30, 15  # a decline comes early
SKELETON_WORDS, SKELETON_BINS = 60, 2048
FEATURES = f"{EMBEDDER_ID}:openings{OPENING_WORDS},{FIRST_WORDS}+cosines+skeleton{SKELETON_WORDS}x{SKELETON_BINS}"

# The words that carry the form of a sentence and not its topic; every other word becomes "_" in a skeleton.
FORM_WORDS = frozenset(
    """
    i i'm i'll i've i'd we we're we'll you you're you'll your yours me my mine us our he she they them their it its it's
    this that these those there here can can't cannot could couldn't will won't would wouldn't shall should shouldn't may
    might must mustn't do don't does doesn't did didn't am is isn't are aren't was be been being have haven't has had not
    no never nor none nothing neither sorry apologize apologise apologies afraid unable unfortunately instead rather but
    however though if because since so and or as an a the to for from with without about of on in into at by than then
    please help assist provide give write tell share offer suggest happy glad willing able want like prefer decline
    refuse comfortable appropriate let let's what who where when why how which any anything anyone someone something some
    all one part line answer request question topic content information advice harm harmful illegal unsafe dangerous
    wrong unethical law policy guidelines safety respect
    """.split()
)


def refusal_features(embedder: Embedder, prompts: Sequence[str], answers: Sequence[str]) -> np.ndarray:
    """(B, 2820) float32: what is said apart from the topic.

    Embeddings of the first 30 and of the first 15 words, each without its component along the prompt's embedding (384
    each); cosines of the prompt with both and with the whole answer, and log(1 + words) (4); the skeleton of the first 60 words as a
    hashed set of its 1-, 2- and 3-grams (2048).
    """
    prompt_BD = embedder.embed(prompts)
    columns, cosines = [], []
    for words in (OPENING_WORDS, FIRST_WORDS, None):
        start_BD = embedder.embed([" ".join(answer.split()[:words]) if words else answer for answer in answers])
        cosine_B1 = (prompt_BD * start_BD).sum(1, keepdims=True)
        cosines.append(cosine_B1)
        if words:
            columns.append(start_BD - cosine_B1 * prompt_BD)
    length_B1 = np.log1p([[len(answer.split())] for answer in answers])
    hashed = np.stack([skeleton_bins(answer) for answer in answers])
    return np.concatenate([*columns, *cosines, length_B1, hashed], axis=1).astype(np.float32)


def skeleton_bins(answer: str) -> np.ndarray:
    """(2048,) of 0 and 1: which n-grams of the skeleton occur. Hashed with CRC-32, which is the same everywhere."""
    tokens = re.findall(r"[a-z']+|[.!?;:,\n]|\d+", answer.lower().replace("\u2019", "'"))[:SKELETON_WORDS]
    form = [
        token if token in FORM_WORDS else "#" if token.isdigit() else "_" if token[0].isalpha() else "|"
        for token in tokens
    ]
    bins = np.zeros(SKELETON_BINS, dtype=np.float32)
    for n in (1, 2, 3):
        for at in range(len(form) - n + 1):
            gram = form[at : at + n]
            if any(token not in "_|#" for token in gram):
                bins[zlib.crc32(" ".join(gram).encode()) % SKELETON_BINS] = 1
    return bins


_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+|\n+")


class RefusalHead:
    """P(an answer declines the prompt, wholly or in part). The shipped embedder and head if not given."""

    categories: tuple[str, ...] = (Category.REFUSAL,)
    stages: frozenset[Stage] = frozenset({Stage.OUTPUT})
    cost: Cost = "cpu"
    folds = False

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
        self.version = self.head.version
        self.embedder = embedder or load_embedder()

    def probability(self, prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
        """Calibrated P(declines), one a pair. An answer without a letter or digit says nothing, so it gets 0."""
        if len(prompts) != len(answers):
            raise ValueError(f"{len(prompts)} prompts but {len(answers)} answers; pass one answer a prompt")
        if not answers:
            return []
        scores = self.head.predict(refusal_features(self.embedder, prompts, answers))
        return [float(p) if re.search(r"\w", answer) else 0.0 for p, answer in zip(scores, answers, strict=True)]

    def at_once(self, prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
        """P(declines, as a whole or already in its first sentence), one a pair: what a policy is rewarded by.

        "I can't help with that. A page can be copied on any machine." is a decline that a policy would learn to dress up, if
        what follows counted.
        """
        firsts = [_SENTENCE_END.split(answer.strip(), maxsplit=1)[0] for answer in answers]
        more = [row for row, (first, answer) in enumerate(zip(firsts, answers, strict=True)) if first != answer.strip()]
        scores = self.probability(prompts, answers)
        openings = self.probability([prompts[row] for row in more], [firsts[row] for row in more])
        for row, p in zip(more, openings, strict=True):
            scores[row] = max(scores[row], p)
        return scores

    def scan(self, items: Sequence[ScanItem]) -> list[list[Finding]]:
        """At most one finding an item, whose text is the answer."""
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
            for score in self.probability([item.prompt for item in items], [item.text for item in items])
        ]


@lru_cache(maxsize=1)
def load_refusal_head() -> RefusalHead:
    """The shipped head, loaded once and shared by the pipeline and the reward."""
    return RefusalHead()
