"""How likely a text is toxic: insulting, hateful or demeaning towards people, whatever was asked.

Every sentence is scored as well as the whole, and the worst counts: one insult before a good paragraph is an insult, and the embedding of
the whole hides it (measured: insults put before or after good answers, AUROC 0.73 by the whole, 0.94 by sentences).

Looks at the text alone, with a head and training data of its own (people's judgements of tone and hate), so that it is
not the harm scanner under another sign. Fitted with sentences that name groups of people in a neutral way: naming a
group must not count as an insult to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from plumbline.safety.classifier import SHIPPED, Head
from plumbline.safety.embedder.embedding import EMBEDDER_ID, Embedder, load_embedder
from plumbline.safety.findings import ALL_STAGES, Category, Cost, Finding, ScanItem, Stage
from plumbline.safety.text.worst_piece import Worst, worst_pieces


class ToxicityScanner:
    """Risk that a text is toxic, by its worst sentence; a blank text has risk 0.

    Args: as for HarmScanner.
    """

    categories: tuple[str, ...] = (Category.TOXICITY,)
    stages: frozenset[Stage] = ALL_STAGES
    cost: Cost = "cpu"
    folds = True

    def __init__(
        self,
        *,
        embedder: Embedder | None = None,
        head: Head | None = None,
        name: str = "toxicity",
        floor: float = 0.1,
    ) -> None:
        self.name, self.floor = name, floor
        self.head = head or Head.load(SHIPPED / "toxicity.safetensors", features=EMBEDDER_ID)
        self.version = self.head.version
        self.embedder = embedder or load_embedder()

    def risk(self, texts: Sequence[str]) -> list[float]:
        """Calibrated P(toxic), one a text."""
        return [worst.score for worst in self._score(texts)]

    def scan(self, items: Sequence[ScanItem]) -> list[list[Finding]]:
        """At most one finding a text."""
        return [
            [
                Finding(
                    scanner=self.name,
                    version=self.head.version,
                    category=Category.TOXICITY,
                    score=score,
                    spans=() if span is None else (span,),
                    reason="insulting, hateful or demeaning tone",
                )
            ]
            if score >= self.floor
            else []
            for score, span, _ in self._score(
                [item.text for item in items], [item.stage is Stage.STREAM for item in items]
            )
        ]

    def _score(self, texts: Sequence[str], parts: Sequence[bool] | None = None) -> list[Worst]:
        return worst_pieces(self.head, self.embedder, texts, share_prior=False, parts=parts)


@lru_cache(maxsize=1)
def load_toxicity_scanner() -> ToxicityScanner:
    """The shipped scanner, loaded once and shared by the pipeline and the reward."""
    return ToxicityScanner()
