"""How likely a prompt asks for something harmful, and of which kind.

A small MLP on MiniLM embeddings, trained against harmless prompts that sound harmful ("kill a Python process"): without
those, such a head recognises a topic, not an aim. safety/weights/CARD.md has the data, the held-out figures and the limits.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from plumbline.safety.classifier import SHIPPED, Head
from plumbline.safety.embedder.embedding import EMBEDDER_ID, Embedder, load_embedder
from plumbline.safety.findings import INPUT_STAGES, Category, Cost, Finding, ScanItem, Stage
from plumbline.safety.text.worst_piece import Worst, worst_pieces


class HarmScanner:
    """Risk of a prompt, the answer not looked at.

    A text is scored as a whole, by windows and by sentences, and the worst counts (`plumbline.safety.text.worst_piece`): a
    harmless page does not hide a harmful line at its end. A blank prompt asks for nothing and has risk 0.

    Args:
        embedder, head, kinds: the shipped ones if not given. `kinds` names the hazard of a prompt known to be harmful.
        floor: scores below it make no finding; the thresholds of a policy lie above it.
    """

    stages: frozenset[Stage] = INPUT_STAGES
    cost: Cost = "cpu"
    folds = True

    def __init__(
        self,
        *,
        embedder: Embedder | None = None,
        head: Head | None = None,
        kinds: Head | None = None,
        name: str = "harm",
        floor: float = 0.1,
    ) -> None:
        self.name, self.floor = name, floor
        self.head = head or Head.load(SHIPPED / "harm.safetensors", features=EMBEDDER_ID)
        self.version = self.head.version
        self.kinds = kinds or Head.load(SHIPPED / "harm_kind.safetensors", features=EMBEDDER_ID)
        self.categories: tuple[str, ...] = tuple(self.kinds.card.labels)
        self.embedder = embedder or load_embedder()

    def risk(self, texts: Sequence[str]) -> list[float]:
        """Calibrated P(the prompt asks for something harmful), one a text."""
        return [worst.score for worst in self._score(texts)]

    def scan(self, items: Sequence[ScanItem]) -> list[list[Finding]]:
        """At most one finding a text, its span the piece that scored highest (none if that is the whole text)."""
        scored = self._score([item.text for item in items])
        return [[self._finding(worst)] if worst.score >= self.floor else [] for worst in scored]

    def _finding(self, worst: Worst) -> Finding:
        assert worst.vector is not None  # only a blank text has none, and its risk is 0
        (kind,) = self.kinds.predict(worst.vector[None])
        return Finding(
            scanner=self.name,
            version=self.head.version,
            category=Category(self.kinds.card.labels[int(kind.argmax())]),
            score=worst.score,
            spans=() if worst.span is None else (worst.span,),
            reason=f"asks for something harmful (kind with probability {kind.max():.2f})",
        )

    def _score(self, texts: Sequence[str]) -> list[Worst]:
        return worst_pieces(self.head, self.embedder, texts, share_prior=True)


@lru_cache(maxsize=1)
def load_harm_scanner() -> HarmScanner:
    """The shipped scanner, loaded once and shared by the pipeline and the reward."""
    return HarmScanner()
