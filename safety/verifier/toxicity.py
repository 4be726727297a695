"""How likely a text is toxic: insulting, hateful or demeaning towards people, whatever was asked.

Looks at the text alone, with a head and training data of its own (people's judgements of tone and hate), so that it is
not the harm scanner under another sign. Fitted with sentences that name groups of people in a neutral way: naming a
group must not count as an insult to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from safety.embedding import EMBEDDER_ID, Embedder, load_embedder
from safety.findings import Category, Finding, Span
from safety.heads import SHIPPED, Head
from safety.input_filter.harm import worst_window


class ToxicityScanner:
    """Risk that a text is toxic; long texts by their worst window, a blank text has risk 0.

    Args: as for HarmScanner.
    """

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
        self.embedder = embedder or load_embedder()

    def risk(self, texts: Sequence[str]) -> list[float]:
        """Calibrated P(toxic), one a text."""
        return [score for score, _ in self._score(texts)]

    def scan(self, texts: Sequence[str]) -> list[list[Finding]]:
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
            for score, span in self._score(texts)
        ]

    def _score(self, texts: Sequence[str]) -> list[tuple[float, Span | None]]:
        windows = self.embedder.embed_windows(texts)
        return [
            worst_window(self.head, piece) if text.strip() else (0.0, None)
            for text, piece in zip(texts, windows, strict=True)
        ]


@lru_cache(maxsize=1)
def load_toxicity_scanner() -> ToxicityScanner:
    """The shipped scanner, loaded once and shared by the pipeline and the reward."""
    return ToxicityScanner()
