"""Any target behind the safety pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from plumbline.eval.targets.target import Target
from plumbline.eval.tasks import Messages, Prompt, Reply, digest


class GuardedTarget:
    """Another target behind a safety pipeline: anything with chat(messages) -> .text that asks its `.model`.

    The pipeline is asked twice, so that the model answers in batches: once to see what it would ask the model, with
    redactions made, and once with the model's answers at hand. Layers are switched on and off by the policy file.

    `known` holds what the model answered when it was asked without the guard, by conversation: those are not asked again, so
    that a guarded target differs from its bare one by what the guard did, and by nothing else.
    """

    gives_logp = False

    def __init__(self, name: str, inner: Target, guard: Any, *, policy_hash: str) -> None:
        self.name, self.inner, self.guard = name, inner, guard
        self.fingerprint = digest("guard", inner.fingerprint, policy_hash)
        self.known: dict[str, Reply] = {}

    def reply(self, prompts: Sequence[Prompt], *, max_new_tokens: int, temperature: float, seed: int) -> list[Reply]:
        talks = [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in prompts]
        asked: dict[int, Messages] = {}
        for at, messages in enumerate(talks):

            def note(passed: Messages, at: int = at) -> str:
                asked[at] = [dict(message) for message in passed]
                return ""

            self.guard.model = note
            self._chat(messages)
        said = {at: self.known[key] for at, passed in asked.items() if (key := digest(passed)) in self.known}
        new = {at: passed for at, passed in asked.items() if at not in said}
        if new:
            options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
            said |= zip(new, self.inner.reply(list(new.values()), **options), strict=True)
        replies = []
        for at, messages in enumerate(talks):
            if at in said and said[at].error:
                replies.append(said[at])
                continue
            self.guard.model = lambda _, at=at: said[at].text if at in said else ""
            answer = self._chat(messages)
            replies.append(answer if isinstance(answer, Reply) else Reply(answers=(answer,)))
        return replies

    def _chat(self, messages: Messages) -> str | Reply:
        try:
            return self.guard.chat(messages).text
        except (
            Exception
        ) as error:  # a pipeline that raises leaves the sample unscored; it never lets the answer through
            return Reply(error=f"guard: {type(error).__name__}: {error}")

    def logp(self, pairs: Sequence[tuple[Prompt, str]]) -> list[float]:
        raise NotImplementedError

    def close(self) -> None:
        self.inner.close()
