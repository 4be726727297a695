"""Block-wise best-of-n: a few continuations at a time, the one that a reward model likes best goes on.

Between best-of-n over whole answers, which throws most of its tokens away, and per-token search, which asks the reward
model for every token (ARGS, arXiv:2402.01694). A block ends at the end of a sentence where it can, so that the reward model reads
whole sentences.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from plumbline.messages import Messages
from plumbline.policy_models.chat import encode_prompts, stop_ids
from plumbline.policy_models.rollout.generation import Processor, generate
from plumbline.safety.constrained.rows import continued

Score = Callable[[Sequence[Any], Sequence[str]], Sequence[float | None]]  # a `reward` component, LearnedPreference say
SENTENCE_END = re.compile(r"[.!?][\"')\]]*(?=\s|$)|\n")


@dataclass
class BestAnswer:
    """An answer, whether a stop token ended it, and per block the scores of all candidates (None: no opinion)."""

    ids: list[int] = field(default_factory=list)
    text: str = ""
    finished: bool = False
    scores: list[list[float | None]] = field(default_factory=list)


@dataclass(frozen=True)
class _Candidate:
    ids: list[int]
    text: str
    finished: bool


def blockwise_best_of_n(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Messages],
    score: Score,
    *,
    candidates: int = 4,
    block_tokens: int = 32,
    max_new_tokens: int = 256,
    temperature: float = 0.8,
    generator: torch.Generator | None = None,
    processors: Sequence[Processor] = (),
) -> list[BestAnswer]:
    """One answer a prompt; all prompts and candidates of a block decode together.

    A prompt is a text or the messages of a conversation. The score reads (prompt, answer so far), prompts as they are
    given. None counts below every number; where all are None the first candidate goes on.
    Never grade the result with the model that chose it: it was searched for what that model likes.
    """
    if candidates < 1 or block_tokens < 1 or max_new_tokens < 1:
        raise ValueError(f"{candidates=}, {block_tokens=} and {max_new_tokens=} must be at least 1")
    asked = [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in prompts]
    prompt_ids = encode_prompts(tokenizer, asked)
    ends = stop_ids(model, tokenizer)
    answers = [BestAnswer() for _ in prompts]
    while open_rows := [i for i, a in enumerate(answers) if not a.finished and len(a.ids) < max_new_tokens]:
        # 1. n continuations of every open answer, each at most a block and never beyond the limit
        room = min(block_tokens, min(max_new_tokens - len(answers[i].ids) for i in open_rows))
        rows = [i for i in open_rows for _ in range(candidates)]
        given = [len(answers[i].ids) for i in rows]
        sampled = generate(
            model,
            [[*prompt_ids[i], *answers[i].ids] for i in rows],
            max_new_tokens=room,
            stop_ids=ends,
            pad_id=tokenizer.pad_token_id,
            temperature=temperature,
            generator=generator,
            processors=[continued(processor, given) for processor in processors],
        )
        # 2. cut at the last end of a sentence, score, keep the best
        tried = [_cut(tokenizer, answers[i].ids, new.ids, new.finished) for i, new in zip(rows, sampled, strict=True)]
        values = score([prompts[i] for i in rows], [candidate.text for candidate in tried])
        for place, i in enumerate(open_rows):
            span = slice(place * candidates, (place + 1) * candidates)
            mine = list(values[span])
            best = max(range(candidates), key=lambda n: _or_least(mine[n]))
            chosen = tried[span][best]
            answers[i].ids, answers[i].text, answers[i].finished = chosen.ids, chosen.text, chosen.finished
            answers[i].scores.append(mine)
    return answers


def _or_least(value: float | None) -> float:
    return -math.inf if value is None else value


def _cut(tokenizer: Any, before: list[int], new: list[int], finished: bool) -> _Candidate:
    """Before and new, the new part cut after its last whole sentence unless it ended by itself or holds none."""
    if not finished:
        start = len(tokenizer.decode(before, skip_special_tokens=True))
        for kept in range(len(new), 0, -1):
            text = tokenizer.decode([*before, *new[:kept]], skip_special_tokens=True)
            found = list(SENTENCE_END.finditer(text, start))
            if not found:
                break
            if found[-1].end() == len(text):
                return _Candidate([*before, *new[:kept]], text, False)
    ids = [*before, *new]
    return _Candidate(ids, tokenizer.decode(ids, skip_special_tokens=True), finished)
