"""LLM Guard's `scan(text) -> (text, is_valid, risk)`, both ways, for code written against that library or its successors."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

from plumbline.safety.findings import (
    ALL_STAGES,
    OUTPUT_STAGES,
    Action,
    Category,
    Cost,
    Finding,
    ScanItem,
    Span,
    Stage,
)
from plumbline.safety.pipeline import Guard


class AsLLMGuard:
    """A guard with the shape of one of LLM Guard's scanners: `scan(prompt)`, or `scan(prompt, output)` for answers."""

    def __init__(self, guard: Guard) -> None:
        self.guard = guard

    def scan(self, prompt: str, output: str | None = None) -> tuple[str, bool, float]:
        """(text to pass on, whether it may pass, highest score in [0, 1])."""
        if output is None:
            verdict = self.guard.check(prompt)
        else:
            verdict = self.guard.check(output, Stage.OUTPUT, prompt=prompt)
        failed = any(one.rule in ("on_error", "max_chars") for one in verdict.fired)
        risk = 1.0 if failed else max((found.score for found in verdict.findings), default=0.0)
        return verdict.text, verdict.action < Action.BLOCK, risk


class FromLLMGuard:
    """One of LLM Guard's scanners in a pipeline. Its rewritten text is dropped: redaction happens once, at the end.

    Args:
        scanner: an object with `scan(prompt)`, or with `scan(prompt, output)` where `output` is True.
        category: what a hit counts as.
    """

    stages: frozenset[Stage]

    def __init__(
        self,
        scanner: Any,
        *,
        category: str = Category.INJECTION,
        output: bool = False,
        name: str = "",
        cost: Cost = "cpu",
    ) -> None:
        self.name = name or type(scanner).__name__
        self.version = hashlib.sha256(type(scanner).__qualname__.encode()).hexdigest()[:12]
        self.categories: tuple[str, ...] = (category,)
        self.stages = OUTPUT_STAGES if output else ALL_STAGES - OUTPUT_STAGES
        self.cost, self.folds, self.category = cost, True, category
        self._ask: Callable[[ScanItem], Sequence[Any]] = (
            (lambda item: scanner.scan(item.prompt, item.text)) if output else (lambda item: scanner.scan(item.text))
        )

    def scan(self, items: Sequence[ScanItem]) -> list[list[Finding]]:
        """A finding where the scanner says that a text is not valid; its risk is used where it lies in [0, 1]."""
        found = []
        for item in items:
            changed, valid, risk = self._ask(item)
            score = float(risk) if 0 <= float(risk) <= 1 else 1.0
            here = []
            if not valid:
                spans = _changed(item.text, changed)
                here.append(Finding(
                    scanner=self.name, version=self.version, category=self.category, score=max(score, 0.5), spans=spans,
                    reason="not valid",
                ))  # fmt: skip
            found.append(here)
        return found


def _changed(before: str, after: str) -> tuple[Span, ...]:
    """The one stretch that differs, if the text was rewritten; none if it was not."""
    if before == after:
        return ()
    start = 0
    while start < min(len(before), len(after)) and before[start] == after[start]:
        start += 1
    end = 0
    while end < min(len(before), len(after)) - start and before[-1 - end] == after[-1 - end]:
        end += 1
    return (Span(start=start, end=len(before) - end),) if start < len(before) - end else ()
