"""Answers that were given elsewhere: a file of transcripts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from plumbline.eval.targets.target import reply_of, text_of
from plumbline.eval.tasks import Prompt, Reply, digest


class TranscriptTarget:
    """Answers that were recorded earlier, found by what was asked.

    A prompt that was not asked is unscored, and so is one whose recorded answer is no text: null, or calls of tools alone.
    """

    gives_logp = False

    def __init__(self, name: str, path: str | Path) -> None:
        self.name, self.path = name, Path(path)
        self._answers: dict[str, Reply] = {}
        for line_no, line in enumerate(_utf8_text(self.path).split("\n"), start=1):
            if line.strip():
                asked, answer = _recorded(line, f"{self.path}:{line_no}")
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


def _recorded(line: str, where: str) -> tuple[str, Reply]:
    """(what was asked, the recorded reply) of a line; ValueError naming it where it is no transcript."""
    try:
        row = json.loads(line)
        line.encode()
        json.dumps(row, ensure_ascii=False).encode()  # half of a surrogate pair, which no file can hold
        if "messages" in row:
            *asked, answer = row["messages"]
            if answer["role"] != "assistant":
                raise ValueError(f"the last message is of {answer['role']!r}, not of the assistant")
            return _asked(asked), reply_of(answer, "the recorded answer")
        if not isinstance(row["prompt"], str):
            raise ValueError("prompt must be text")
        return row["prompt"], reply_of({"content": row["answer"]}, "the recorded answer")
    except UnicodeEncodeError:
        raise ValueError(
            f"{where}: holds half of a surrogate pair, which is no character; mend or drop the row"
        ) from None
    except RecursionError:
        raise ValueError(
            f"{where}: nested too deeply to be a transcript; needs prompt and answer, or messages"
        ) from None
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{where}: not a transcript ({error}); needs prompt and answer, or messages") from None


def _utf8_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from None


def _asked(prompt: Prompt) -> str:
    """What a transcript is found by: the last user turn of a one-turn conversation, else the whole conversation."""
    if isinstance(prompt, str):
        return prompt
    turns = [dict(message) | {"content": text_of(message["content"])} for message in prompt]
    return str(turns[0]["content"]) if len(turns) == 1 else json.dumps(turns, sort_keys=True)
