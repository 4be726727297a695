"""Phrases of your own that may not occur, in every spelling that the normalised readings undo."""

from __future__ import annotations

import re
from collections.abc import Sequence

from plumbline.safety.findings import ALL_STAGES, Category, Cost, Finding, ScanItem, Span, Stage


class Phrases:
    """A finding with score 1 where a phrase stands as whole words, whatever its case and spacing.

    Args:
        phrases: words or phrases.
        allowed: longer phrases that contain a banned one and are fine ("Scunthorpe").
        part_of_word: whether a phrase also counts inside a longer word.
        category: under which the finding goes; one of your own begins with "x_".
    """

    version = "1"
    stages: frozenset[Stage] = ALL_STAGES
    cost: Cost = "regex"
    folds = True

    def __init__(
        self,
        phrases: Sequence[str],
        *,
        allowed: Sequence[str] = (),
        part_of_word: bool = False,
        category: str = Category.PHRASE,
        name: str = "phrases",
    ) -> None:
        if isinstance(phrases, str) or not phrases or not all(isinstance(p, str) and p.strip() for p in phrases):
            raise ValueError(f"phrases {phrases!r} must be a list of phrases, none of them blank")
        self.name, self.category = name, category
        self.categories: tuple[str, ...] = (category,)
        self.pattern = _either(phrases, whole=not part_of_word)
        self.allowed = _either(allowed, whole=False) if allowed else None

    def scan(self, items: Sequence[ScanItem]) -> list[list[Finding]]:
        return [self._scan(item.text) for item in items]

    def _scan(self, text: str) -> list[Finding]:
        fine = [m.span() for m in self.allowed.finditer(text)] if self.allowed else []
        spans = tuple(
            Span(start=m.start(), end=m.end(), label="phrase")
            for m in self.pattern.finditer(text)
            if not any(start <= m.start() and m.end() <= end for start, end in fine)
        )
        if not spans:
            return []
        reason = f"{len(spans)} banned phrases"
        return [
            Finding(
                scanner=self.name, version=self.version, category=self.category, score=1.0, spans=spans, reason=reason
            )
        ]


def _either(phrases: Sequence[str], *, whole: bool) -> re.Pattern[str]:
    """Any of the phrases, the longest first; blanks match any run of blanks."""
    parts = [r"\s+".join(map(re.escape, phrase.split())) for phrase in sorted(phrases, key=len, reverse=True)]
    pattern = "(?:" + "|".join(parts) + ")"
    return re.compile(rf"(?<!\w){pattern}(?!\w)" if whole else pattern, re.IGNORECASE)
