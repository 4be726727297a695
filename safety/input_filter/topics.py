"""Topics of your own, each given by a few example sentences; a text is on a topic when it means something near one of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from plumbline.safety.embedder.embedding import EMBEDDER_ID, Embedder, load_embedder
from plumbline.safety.findings import ALL_STAGES, Category, Cost, Finding, ScanItem, Span, Stage


class Topics:
    """One finding a topic, its score the cosine with the nearest example mapped so that `same` is 0.5 and 1 is 1.

    Args:
        topics: name -> example sentences, as users would write them; five to twenty work well.
        same: cosine from which a text counts as on the topic, for the policy's threshold of 0.5.
    """

    version = EMBEDDER_ID
    categories: tuple[str, ...] = (Category.TOPIC,)
    stages: frozenset[Stage] = ALL_STAGES
    cost: Cost = "cpu"
    folds = False

    def __init__(
        self,
        topics: Mapping[str, Sequence[str]],
        *,
        same: float = 0.5,
        embedder: Embedder | None = None,
        name: str = "topics",
    ) -> None:
        if not topics or not all(isinstance(given, list | tuple) and given for given in topics.values()):
            raise ValueError(f"topics {dict(topics)!r} must map each topic to a list of example sentences")
        if not 0 < same < 1:
            raise ValueError(f"topics: {same=} must lie between 0 and 1")
        self.name, self.same = name, same
        self.embedder = embedder or load_embedder()
        self.examples = {topic: self.embedder.embed(list(given)) for topic, given in topics.items()}

    def scan(self, items: Sequence[ScanItem]) -> list[list[Finding]]:
        found: list[list[Finding]] = []
        for windows in self.embedder.embed_windows([item.text for item in items]):
            here = []
            for topic, examples_ND in self.examples.items():
                cosine_WN = windows.vectors @ examples_ND.T
                at = int(cosine_WN.max(1).argmax())
                score = self._score(float(cosine_WN.max()))
                if score >= 0.1:
                    start, end = windows.spans[at]
                    spans = (Span(start=start, end=end, label=topic),) if len(windows.spans) > 1 else ()
                    here.append(Finding(
                        scanner=self.name, version=self.version, category=Category.TOPIC, score=score, spans=spans, reason=topic
                    ))  # fmt: skip
            found.append(here)
        return found

    def _score(self, cosine: float) -> float:
        return float(np.clip(np.interp(cosine, [0.0, self.same, 1.0], [0.0, 0.5, 1.0]), 0, 1))
