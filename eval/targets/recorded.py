"""Answers that were given elsewhere: a file of transcripts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from plumbline.eval.tasks import Prompt, Reply, digest
from plumbline.messages import ANSWERS, read_example
from plumbline.rows import Row, file_rows


class TranscriptTarget:
    """Answers that were recorded earlier, found by what was asked; a prompt that was not asked is unscored."""

    gives_logp = False

    def __init__(self, name: str, path: str | Path) -> None:
        self.name, self.path = name, Path(path)
        self._answers: dict[str, str | None] = {}
        for place, row in file_rows(self.path):
            asked, answer = _recorded(row, place)
            self._answers.setdefault(asked, answer)
        if not self._answers:
            raise ValueError(f"{self.path}: no transcripts; needs one JSON object a line with prompt and answer")
        self.fingerprint = digest("transcripts", sorted(self._answers.items()))

    def reply(self, prompts: Sequence[Prompt], *, max_new_tokens: int, temperature: float, seed: int) -> list[Reply]:
        return [self._reply(_asked(prompt)) for prompt in prompts]

    def _reply(self, asked: str) -> Reply:
        if asked not in self._answers:
            return Reply(error="not among the transcripts")
        text = self._answers[asked]
        return Reply(error="the recorded answer is null, or calls tools") if text is None else Reply(answers=(text,))

    def logp(self, pairs: Sequence[tuple[Prompt, str]]) -> list[float]:
        raise NotImplementedError

    def close(self) -> None:
        pass


def _recorded(row: Row, place: str) -> tuple[str, str | None]:
    """(what was asked, the answer) of a row in any form of `plumbline.messages`; None for null, and for a call of tools."""
    null = False
    for name in ANSWERS:
        if name in row and row[name] is None:
            row, null = row | {name: ""}, True
    messages = row.get("messages")
    if isinstance(messages, list) and messages and isinstance(messages[-1], dict):
        last = messages[-1]
        if last.get("content") is None:
            row, null = row | {"messages": [*messages[:-1], last | {"content": ""}]}, True
    try:
        found = read_example(place, row, empty_answers=True)
    except ValueError as error:
        fault = str(error).removeprefix(f"{place}: ")
        raise ValueError(f"{place}: not a transcript ({fault}); needs prompt and answer, or messages") from None
    asked = _asked([{"role": m["role"], "content": m["content"]} for m in found.prompt])
    return asked, None if null else found.answer[-1]["content"]


def _asked(prompt: Prompt) -> str:
    """What a transcript is found by: the last user turn of a one-turn conversation, else the whole conversation."""
    if isinstance(prompt, str):
        return prompt
    return prompt[0]["content"] if len(prompt) == 1 else json.dumps(prompt, sort_keys=True)
