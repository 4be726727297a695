"""What every target can do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from plumbline.eval.tasks import Prompt, Reply


class Target(Protocol):
    """`fingerprint` changes whenever answers could: replies are kept by it."""

    name: str
    fingerprint: str
    gives_logp: bool

    def reply(self, prompts: Sequence[Prompt], *, max_new_tokens: int, temperature: float, seed: int) -> list[Reply]:
        """One reply a prompt. What goes wrong with one of them is its `error`; nothing is raised for it."""

    def logp(self, pairs: Sequence[tuple[Prompt, str]]) -> list[float]:
        """Log-probability in nats of each continuation after its prompt."""

    def close(self) -> None:
        """Frees memory; the next call loads again."""
