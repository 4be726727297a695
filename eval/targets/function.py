"""Any Python function as a target."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from plumbline.eval.tasks import Messages, Prompt, Reply, digest


class CallableTarget:
    """Any function from messages to text; also a guarded pipeline, as `Guard.answer`. Texts to continue are one user turn.

    The fingerprint holds the function's source where Python can find it; what the function calls is not seen: raise
    `version` when that changes.
    """

    gives_logp = False

    def __init__(self, name: str, answer: Callable[[Messages], Any], *, version: str = "1") -> None:
        self.name, self.answer = name, answer
        try:
            source = inspect.getsource(answer)
        except (OSError, TypeError):
            source = ""
        self.fingerprint = digest("callable", name, version, source)

    def reply(self, prompts: Sequence[Prompt], *, max_new_tokens: int, temperature: float, seed: int) -> list[Reply]:
        return [self._one([{"role": "user", "content": p}] if isinstance(p, str) else p) for p in prompts]

    def _one(self, messages: Messages) -> Reply:
        try:
            said = self.answer(messages)
        except Exception as error:  # whatever a user's function does, one sample is unscored and the run goes on
            return Reply(error=f"{type(error).__name__}: {error}")
        text = getattr(said, "text", said)
        return (
            Reply(answers=(text,))
            if isinstance(text, str)
            else Reply(error=f"answered {type(said).__name__}, not text")
        )

    def logp(self, pairs: Sequence[tuple[Prompt, str]]) -> list[float]:
        raise NotImplementedError

    def close(self) -> None:
        pass
