"""What every target can do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

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


def reply_of(message: Mapping[str, Any], what: str) -> Reply:
    """The text of an assistant's message. Null, and calls of tools without text, are a reply that cannot be scored."""
    content = text_of(message.get("content"))
    calls = bool(message.get("tool_calls") or message.get("function_call"))
    if content is None or calls and not content.strip():
        return Reply(
            error=f"{what} calls tools and holds no text" if calls else f"{what} is null, not text", final=True
        )
    return Reply(answers=(content,))


def text_of(content: Any) -> str | None:
    """The text of a message's content, which may come in parts; None for null, ValueError for anything else."""
    if content is None or isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
        return "".join(part["text"] for part in content) if content else None
    raise ValueError(f"content is {type(content).__name__}; needs text, or a list of parts with text")
