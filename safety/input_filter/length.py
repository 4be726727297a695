"""Texts that are shorter or longer than a policy wants."""

from __future__ import annotations

from collections.abc import Sequence

from plumbline.safety.findings import ALL_STAGES, Category, Cost, Finding, ScanItem, Stage


class Length:
    """A finding with score 1 where the text has fewer than `min_words` or more than `max_chars` or `max_words`."""

    version = "1"
    categories: tuple[str, ...] = (Category.LENGTH,)
    stages: frozenset[Stage] = ALL_STAGES
    cost: Cost = "regex"
    folds = False

    def __init__(
        self, *, name: str = "length", min_words: int = 0, max_chars: int | None = None, max_words: int | None = None
    ) -> None:
        for what, size in (("max_chars", max_chars), ("max_words", max_words)):
            if size is not None and size < max(1, min_words):
                raise ValueError(f"length: {what} {size} must be at least 1 and not below min_words {min_words}")
        self.name, self.min_words, self.max_chars, self.max_words = name, min_words, max_chars, max_words

    def scan(self, items: Sequence[ScanItem]) -> list[list[Finding]]:
        return [self._scan(item.text) for item in items]

    def _scan(self, text: str) -> list[Finding]:
        words, why = len(text.split()), ""
        if words < self.min_words:
            why = f"{words} words, below {self.min_words}"
        elif self.max_words is not None and words > self.max_words:
            why = f"{words} words, above {self.max_words}"
        elif self.max_chars is not None and len(text) > self.max_chars:
            why = f"{len(text)} characters, above {self.max_chars}"
        if not why:
            return []
        return [Finding(scanner=self.name, version=self.version, category=Category.LENGTH, score=1.0, reason=why)]
