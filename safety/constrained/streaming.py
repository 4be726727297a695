"""Streams that hold back what has not been checked.

Text leaves in whole sentences (or blocks, where a sentence is long), after a check of the answer up to there, and only as far as
the check calls it settled: the rest could be the beginning of something bad. When a check finds something, the answer goes
back to the last sentence before it and is drawn anew; when that keeps failing, a refusal ends it. So a user never sees
text that is taken back afterwards.

A source is anything that goes on from a text: `LocalSource` is a model on this machine; an endpoint that can prefill, or a
scripted one in a test, is a function of two arguments.
"""

from __future__ import annotations

import codecs
import logging
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from plumbline.policy_models.chat import stop_ids
from plumbline.policy_models.rollout.generation import DecodeRow, Processor
from plumbline.policy_models.rollout.streaming import stream
from plumbline.safety.constrained.rows import continued, token_bytes
from plumbline.safety.constrained.spellings import Phrases

logger = logging.getLogger(__name__)

Source = Callable[[str, int], Iterator[str]]  # (answer so far, attempt from 0) -> pieces of text that follow it
REFUSAL = "I can't continue with this answer."
_SENTENCE_END = re.compile(r"(?:[.!?][\"')\]]*\s+|\n+)")


@dataclass(frozen=True, slots=True)
class Checked:
    """What a check says of an answer so far.

    found    where the first finding begins (a character), or None
    settled  characters that no later text can make part of a finding; a scanner whose findings are never longer than n
             characters says `max(0, len(answer) - n + 1)`
    """

    found: int | None
    settled: int


# (answer so far, nothing follows it) -> what may be shown. Raises for what it cannot check, and the answer ends there.
Check = Callable[[str, bool], Checked]


@dataclass
class HeldStream:
    """Iterate it for the text that may be shown; afterwards `text`, `outcome` and the counters say what happened.

    Args:
        block_chars: a sentence longer than this is checked and released in blocks of it.
        attempts: how often the answer may be drawn anew, over its whole length, before the refusal.

    outcome    "running", "complete", "refused", or "error" when the check raised: then the refusal ends the answer too
    backtracks how often the answer went back
    checks     how often the check was asked
    """

    source: Source
    check: Check
    refusal: str = REFUSAL
    block_chars: int = 160
    attempts: int = 3
    text: str = field(default="", init=False)
    outcome: str = field(default="running", init=False)
    backtracks: int = field(default=0, init=False)
    checks: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.block_chars < 1 or self.attempts < 0:
            raise ValueError(f"block_chars={self.block_chars} must be at least 1, attempts={self.attempts} at least 0")
        if self.check(self.refusal, True).found is not None:
            raise ValueError(f"the check finds fault with the refusal {self.refusal!r}; choose another")

    def __iter__(self) -> Iterator[str]:
        kept = ""  # of the answer, where the source goes on
        while True:
            drawn, seen = kept, None
            num_checked = len(kept)
            try:
                for piece in self.source(kept, self.backtracks):
                    drawn += piece
                    if self._due(drawn, num_checked):
                        seen = self._ask(drawn, final=False)
                        if seen.found is not None:
                            break
                        num_checked = len(drawn)
                        yield from self._release(drawn, seen.settled)
                else:
                    seen = self._ask(drawn, final=True)
                    if seen.found is None:
                        yield from self._show(drawn, len(drawn))
                        self.outcome = "complete"
                        return
            except _CheckError:
                self.outcome = "error"
                yield from self._refuse()
                return
            if self.backtracks == self.attempts:
                self.outcome = "refused"
                yield from self._refuse()
                return
            self.backtracks += 1
            # what has been shown stays; of the rest, the sentences before the finding
            shown = len(self.text)
            ends = [match.end() for match in _SENTENCE_END.finditer(drawn, shown, max(seen.found, shown))]
            kept = drawn[: ends[-1] if ends else shown]

    def _due(self, drawn: str, num_checked: int) -> bool:
        fresh = drawn[num_checked:]
        return len(fresh) >= self.block_chars or _SENTENCE_END.search(fresh) is not None

    def _release(self, checked: str, settled: int) -> Iterator[str]:
        """Whole sentences that are settled; all that is settled once a block has piled up."""
        shown = len(self.text)
        ends = [match.end() for match in _SENTENCE_END.finditer(checked, shown, max(settled, shown))]
        if ends:
            yield from self._show(checked, ends[-1])
        elif settled - shown >= self.block_chars:
            yield from self._show(checked, settled)

    def _show(self, checked: str, end: int) -> Iterator[str]:
        piece, self.text = checked[len(self.text) : end], checked[:end]
        if piece:
            yield piece

    def _refuse(self) -> Iterator[str]:
        gap = "" if not self.text or self.text[-1].isspace() else " "
        yield from self._show(self.text + gap + self.refusal, len(self.text) + len(gap) + len(self.refusal))

    def _ask(self, answer: str, final: bool) -> Checked:
        self.checks += 1
        try:
            return self.check(answer, final)
        except Exception as error:
            logger.exception("the check of a stream raised %s: the answer ends in the refusal", type(error).__name__)
            raise _CheckError from error


class _CheckError(Exception):
    pass


def phrase_check(phrases: Phrases) -> Check:
    """Banned phrases, for sources whose logits are out of reach. Not one letter of a phrase is ever shown."""

    def check(answer: str, final: bool) -> Checked:
        found, open_from = phrases.read(answer, ended=final)
        return Checked(found, open_from)

    return check


class LocalSource:
    """A model on this machine as a source: `source(answer so far, attempt)` streams what follows.

    Each attempt draws with a seed of its own, and after a backtrack the tokens that began a rejected continuation at the same
    place are left out, so that it goes another way even at temperature 0.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompt_ids: Sequence[int],
        *,
        max_new_tokens: int,
        temperature: float = 0.7,
        seed: int = 0,
        processors: Sequence[Processor] = (),
    ) -> None:
        self.model, self.tokenizer, self.prompt_ids = model, tokenizer, list(prompt_ids)
        self.max_new_tokens, self.temperature, self.seed = max_new_tokens, temperature, seed
        self.processors = list(processors)
        self.stop_ids = stop_ids(model, tokenizer)
        self._bytes = token_bytes(tokenizer)
        self._tried: defaultdict[str, set[int]] = defaultdict(set)

    def __call__(self, answer: str, attempt: int) -> Iterator[str]:
        given: list[int] = self.tokenizer.encode(answer, add_special_tokens=False) if answer else []
        room = self.max_new_tokens - len(given)
        if room < 1:
            return
        tried = self._tried[answer]

        def another_way(rows: Sequence[DecodeRow], logits_BV: Tensor) -> Tensor:
            if rows[0].answer or not tried:
                return logits_BV
            index = torch.tensor(sorted(tried), device=logits_BV.device)
            return logits_BV.index_fill(1, index, -torch.inf)

        tokens = stream(
            self.model,
            [*self.prompt_ids, *given],
            max_new_tokens=room,
            stop_ids=self.stop_ids,
            temperature=self.temperature,
            generator=torch.Generator().manual_seed(self.seed + attempt),
            processors=[*(continued(processor, [len(given)]) for processor in self.processors), another_way],
        )
        decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character may take several tokens
        first = True
        for token in tokens:
            if first:
                tried.add(token)
                first = False
            if text := decoder.decode(self._bytes[token]):
                yield text
        if text := decoder.decode(b"", final=True):
            yield text
