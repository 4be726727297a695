"""Answers that were given elsewhere: a file of transcripts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from plumbline.eval.tasks import Prompt, Reply, digest


class TranscriptTarget:
    """Answers that were recorded earlier, found by what was asked; a prompt that was not asked is unscored."""

    gives_logp = False

    def __init__(self, name: str, path: str | Path) -> None:
        self.name, self.path = name, Path(path)
        self._answers: dict[str, str] = {}
        for line_no, line in enumerate(self.path.read_text(encoding="utf-8").split("\n"), start=1):
            if line.strip():
                asked, answer = _recorded(line, f"{self.path}:{line_no}")
                self._answers.setdefault(asked, answer)
        if not self._answers:
            raise ValueError(f"{self.path}: no transcripts; needs one JSON object a line with prompt and answer")
        self.fingerprint = digest("transcripts", sorted(self._answers.items()))

    def reply(self, prompts: Sequence[Prompt], *, max_new_tokens: int, temperature: float, seed: int) -> list[Reply]:
        found = [self._answers.get(_asked(prompt)) for prompt in prompts]
        return [Reply(error="not among the transcripts") if text is None else Reply(answers=(text,)) for text in found]

    def logp(self, pairs: Sequence[tuple[Prompt, str]]) -> list[float]:
        raise NotImplementedError

    def close(self) -> None:
        pass


def _recorded(line: str, where: str) -> tuple[str, str]:
    try:
        row = json.loads(line)
        if "messages" in row:
            *asked, answer = row["messages"]
            return _asked(asked), str(answer["content"])
        if not (isinstance(row["prompt"], str) and isinstance(row["answer"], str)):
            raise ValueError("prompt and answer must be text")
        return row["prompt"], row["answer"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{where}: not a transcript ({error}); needs prompt and answer, or messages") from None


def _asked(prompt: Prompt) -> str:
    """What a transcript is found by: the last user turn of a one-turn conversation, else the whole conversation."""
    if isinstance(prompt, str):
        return prompt
    return prompt[0]["content"] if len(prompt) == 1 else json.dumps(prompt, sort_keys=True)
