"""Whether an answer gives away the system prompt: long word-for-word runs of it, or a canary planted in it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from plumbline.safety.findings import OUTPUT_STAGES, Category, Cost, Finding, ScanItem, Span, Stage


class PromptLeak:
    """A finding where the answer holds `words` words of the system prompt in a row, or a canary.

    The score is 1 for a canary; otherwise the share of the system prompt's runs of that length that the answer repeats, from
    0.5 for one run to 1 for all. Items without a system prompt have nothing to leak.
    """

    version = "1"
    categories: tuple[str, ...] = (Category.SYSTEM_PROMPT_EXTRACTION,)
    stages: frozenset[Stage] = OUTPUT_STAGES
    cost: Cost = "regex"
    folds = True

    def __init__(self, *, words: int = 8, canaries: Sequence[str] = (), name: str = "prompt_leak") -> None:
        if words < 3:
            raise ValueError(f"prompt_leak: {words=} must be at least 3; shorter runs are everyday language")
        self.name, self.words, self.canaries = name, words, tuple(canaries)

    def scan(self, items: Sequence[ScanItem]) -> list[list[Finding]]:
        return [self._scan(item.text, item.system) for item in items]

    def _scan(self, text: str, system: str) -> list[Finding]:
        spans = [
            Span(start=m.start(), end=m.end()) for canary in self.canaries for m in re.finditer(re.escape(canary), text)
        ]
        if spans:
            return [self._finding(1.0, spans, "a canary of the system prompt")]
        secret = [word.lower() for word in re.findall(r"\w+", system)]
        runs = {tuple(secret[i : i + self.words]) for i in range(len(secret) - self.words + 1)}
        if not runs:
            return []
        said = list(re.finditer(r"\w+", text))
        low = [word.group().lower() for word in said]
        hits: set[tuple[str, ...]] = set()
        for i in range(len(low) - self.words + 1):
            run = tuple(low[i : i + self.words])
            if run in runs:
                hits.add(run)
                start, end = said[i].start(), said[i + self.words - 1].end()
                if spans and start <= spans[-1].end:
                    spans[-1] = Span(start=spans[-1].start, end=end)
                else:
                    spans.append(Span(start=start, end=end))
        if not hits:
            return []
        return [
            self._finding(
                0.5 + 0.5 * len(hits) / len(runs), spans, f"{len(hits)} runs of {self.words} words of the system prompt"
            )
        ]

    def _finding(self, score: float, spans: list[Span], reason: str) -> Finding:
        return Finding(
            scanner=self.name,
            version=self.version,
            category=Category.SYSTEM_PROMPT_EXTRACTION,
            score=score,
            spans=tuple(spans),
            reason=reason,
        )
