"""Answers that were given elsewhere: a file of transcripts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from plumbline.eval.targets.target import reply_of
from plumbline.eval.tasks import Prompt, Reply, digest
from plumbline.messages import ANSWERS, CONVERSATIONS, read_example
from plumbline.rows import Row, file_rows


class TranscriptTarget:
    """Answers that were recorded earlier, found by what was asked; a prompt that was not asked is unscored."""

    gives_logp = False

    def __init__(self, name: str, path: str | Path) -> None:
        self.name, self.path = name, Path(path)
        self._answers: dict[str, Reply] = {}
        for place, row in file_rows(self.path):
            asked, answer = _recorded(row, place)
            self._answers.setdefault(asked, answer)
        if not self._answers:
            raise ValueError(f"{self.path}: no transcripts; needs one JSON object a line with prompt and answer")
        said = {asked: reply.text if reply.answers else [reply.error] for asked, reply in self._answers.items()}
        self.fingerprint = digest("transcripts", sorted(said.items()))

    def reply(self, prompts: Sequence[Prompt], *, max_new_tokens: int, temperature: float, seed: int) -> list[Reply]:
        missing = Reply(error="not among the transcripts")
        return [self._answers.get(_asked(prompt), missing) for prompt in prompts]

    def logp(self, pairs: Sequence[tuple[Prompt, str]]) -> list[float]:
        raise NotImplementedError

    def close(self) -> None:
        pass


def _recorded(row: Row, place: str) -> tuple[str, Reply]:
    """(what was asked, the recorded reply) of a row in any form of `plumbline.messages`; ValueError for what is none."""
    try:
        said = _said(row)
        found = read_example(place, row, empty_answers=True)
        reply = reply_of(said, "the recorded answer")
    except ValueError as error:
        fault = str(error).removeprefix(f"{place}: ")
        raise ValueError(f"{place}: not a transcript ({fault}); needs prompt and answer, or messages") from None
    return _asked([{"role": m["role"], "content": m["content"]} for m in found.prompt]), reply


def _said(row: Row) -> dict:
    """The answer as it was recorded. Null becomes an empty text in the row, which can then be read as any other."""
    for name in CONVERSATIONS:
        turns = row.get(name)
        if isinstance(turns, list) and turns and isinstance(turns[-1], dict) and "from" not in turns[-1]:
            last = turns[-1]
            if last.get("content") is None:
                row[name] = [*turns[:-1], last | {"content": ""}]
            return last
    field = next((name for name in ANSWERS if name in row), None)
    if field is None:
        return {"content": ""}
    said = row[field]
    if said is None:
        row[field] = ""
    return (
        said[-1]
        if isinstance(said, list) and said and isinstance(said[-1], dict) and "role" in said[-1]
        else {"content": said}
    )


def _asked(prompt: Prompt) -> str:
    """What a transcript is found by: the last user turn of a one-turn conversation, else the whole conversation."""
    if isinstance(prompt, str):
        return prompt
    return prompt[0]["content"] if len(prompt) == 1 else json.dumps(prompt, sort_keys=True)
