"""Harm of prompts whose kind is written down: the label where there is one, the scanner's guess elsewhere.

A training set of prompts usually says which of them are harmful. A scanner is wrong about some of them, and a policy that
is paid by its guesses learns its errors: to help with the harm it does not see, to decline the twins it is afraid of. Held-out
prompts have no label here, so what is measured on them is still by the scanner alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

KIND_RISK = {"harmful": 1.0, "twin": 0.0, "ordinary": 0.0}


class HarmOfPrompts(Protocol):
    """What the safety and relevance parts ask of a scanner."""

    def risk(self, texts: Sequence[str]) -> list[float]:
        """P(the prompt asks for harm), one a text."""
        ...


class KnownHarm:
    """`risk` of labelled texts is their label; only the others are handed to `scanner`.

    Args:
        labels: risk in [0, 1] by the whole text of the prompt.
    """

    def __init__(self, scanner: HarmOfPrompts, labels: Mapping[str, float]) -> None:
        if odd := next(((text, risk) for text, risk in labels.items() if not 0 <= risk <= 1), None):
            raise ValueError(f"label {odd[1]} of {odd[0][:60]!r} must be between 0 and 1")
        self.scanner, self.labels = scanner, dict(labels)

    def risk(self, texts: Sequence[str]) -> list[float]:
        unknown = [text for text in texts if text not in self.labels]
        guesses = iter(self.scanner.risk(unknown) if unknown else [])
        return [self.labels[text] if text in self.labels else next(guesses) for text in texts]
