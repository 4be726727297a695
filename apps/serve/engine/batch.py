"""Continuous batching: all requests in one batch, which they join and leave between two tokens.

A step reads at most `step_tokens` tokens: one for each row that is being answered, and what is left of the budget goes to
prompts that are being read, first come first served. So a long prompt delays the others by a chunk a step and never by all
of itself. Synchronous and for one thread; `scheduler.py` runs it.
"""

import logging
import math
import random
import time
from collections import Counter, deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from plumbline.apps.serve.engine.backend import DeadlineError, Drawing, Finish, Piece, ServeError, TokenLogprob
from plumbline.apps.serve.engine.prefixes import PrefixCache
from plumbline.apps.serve.engine.text import AnswerText, Vocabulary
from plumbline.policy_models.rollout.generation import DecodeRow, Processor
from plumbline.policy_models.rollout.joining import Adapter, Staged
from plumbline.policy_models.rollout.row_sampling import RowSampling, log_probabilities, sample_rows

logger = logging.getLogger(__name__)
LEAST_READ = 16  # prompt tokens a step, however many rows there are: reading never stands still


@dataclass(eq=False, kw_only=True)
class Job:
    """One request in the engine. `pieces` is where its answers appear, errors too; `cancelled` may be set by any thread."""

    ids: list[int]
    drawing: Drawing
    max_tokens: int
    n: int = 1
    adapter: Adapter = None
    processors: Sequence[Processor] = ()
    shown: Collection[str] = ()
    deadline: float = math.inf  # by time.monotonic
    pieces: deque[Piece | ServeError] = field(default_factory=deque)
    cancelled: bool = False
    over: bool = False  # every answer has ended, or an error did
    reused: int = 0  # prompt tokens that came from a prefix


@dataclass(eq=False)
class _Row:
    """One answer under way."""

    job: Job
    index: int
    slot: int  # names the row to processors; no two rows at a time share one
    text: AnswerText
    how: RowSampling
    random: random.Random
    answer: list[int] = field(default_factory=list)
    counts: Counter[int] = field(default_factory=Counter)
    held: list[TokenLogprob] = field(default_factory=list)  # of text that has not been shown
    shown: int = 0  # characters
    ended: bool = False


@dataclass(eq=False)
class _Reading:
    job: Job
    staged: Staged | None = None


class Batch:
    """The rows of one decoder, and the prompts that are to become rows.

    Args:
        decoder: a JoiningDecoder or a ForwardRows.
        stop_ids: tokens that end an answer.
        step_tokens: tokens that one step reads at most, prompts and answers together.
    """

    def __init__(
        self, decoder: Any, vocabulary: Vocabulary, *, stop_ids: Sequence[int], prefixes: PrefixCache, step_tokens: int = 256
    ) -> None:  # fmt: skip
        self.decoder, self.vocabulary, self.prefixes, self.step_tokens = decoder, vocabulary, prefixes, step_tokens
        self.stop_ids = frozenset(stop_ids)
        self.rows: list[_Row] = []
        self.reading: list[_Reading] = []
        self.touched: set[Job] = set()
        self._slots = list(range(decoder.max_rows))

    @property
    def free(self) -> int:
        """Answers that may still join."""
        return self.decoder.max_rows - len(self.rows) - sum(reading.job.n for reading in self.reading)

    @property
    def idle(self) -> bool:
        """Whether a step would do nothing."""
        return not self.rows and not self.reading

    def take(self, job: Job) -> None:
        """Lets a job join, for which there must be room."""
        assert 0 < job.n <= self.free and job.ids
        self.reading.append(_Reading(job))

    @torch.inference_mode()
    def step(self) -> None:
        """One token further for every answer, some further for the prompts."""
        self._sweep()
        self._read()
        if self.rows:
            tokens = torch.tensor([row.answer[-1] for row in self.rows], device=self.decoder.device)
            self._draw(self.rows, self.decoder.step(tokens))
            self._leave()

    @torch.inference_mode()
    def fail(self, error: ServeError) -> None:
        """Ends everything that is under way with an error."""
        for job in {*(row.job for row in self.rows), *(reading.job for reading in self.reading)}:
            self._end_job(job, error)
        self.reading.clear()
        for row in self.rows:
            row.ended = True
        self._leave(keep_prefix=False)

    # ---------------------------------------------------------------------------------------------------------- reading

    def _read(self) -> None:
        budget = max(self.step_tokens - len(self.rows), LEAST_READ)
        work: list[tuple[Staged, int]] = []
        readers: list[_Reading] = []
        for reading in self.reading:
            if budget <= 0:
                break
            if reading.staged is None:  # not before its turn: by then a prompt ahead of it may have left its prefix
                prefix, shared = self.prefixes.find(reading.job.ids, reading.job.adapter)
                reading.staged = self.decoder.stage(reading.job.ids, reading.job.adapter, prefix, shared)
                reading.job.reused = shared
            length = min(budget, len(reading.staged.ids) - reading.staged.done)
            work.append((reading.staged, length))
            readers.append(reading)
            budget -= length
        if not work:
            return
        new: list[tuple[_Row, Staged]] = []
        logits: list[Tensor] = []
        for reading, row_V in zip(readers, self.decoder.extend(work), strict=True):
            if row_V is None:
                continue
            assert reading.staged is not None
            self.prefixes.add(self.decoder.prefix_of(reading.staged))
            self.reading.remove(reading)
            new += [(self._row(reading.job, index), reading.staged) for index in range(reading.job.n)]
            logits += [row_V] * reading.job.n
        if new:
            self._draw([row for row, _ in new], torch.stack(logits))
            self.decoder.admit([staged for row, staged in new if not row.ended])
            self.rows += [row for row, _ in new if not row.ended]
            self._slots += [row.slot for row, _ in new if row.ended]

    def _row(self, job: Job, index: int) -> _Row:
        how = RowSampling(temperature=job.drawing.temperature, top_k=job.drawing.top_k, top_p=job.drawing.top_p)
        seed = None if job.drawing.seed is None else f"{job.drawing.seed}/{index}"
        text = AnswerText(self.vocabulary, job.drawing.stop, job.shown)
        return _Row(job, index, self._slots.pop(), text, how, random.Random(seed))

    # ---------------------------------------------------------------------------------------------------------- drawing

    def _draw(self, rows: Sequence[_Row], logits_BV: Tensor) -> None:
        """The next token of each row, from the logits after its last one."""
        changed = self._changed(rows, logits_BV)
        uniform = torch.tensor([row.random.random() if row.how.temperature else 0.0 for row in rows])
        token_B = sample_rows(changed, [row.how for row in rows], uniform.to(changed.device))
        sound = changed.gather(1, token_B[:, None])[:, 0].isfinite().tolist()
        for at, (row, token) in enumerate(zip(rows, token_B.tolist(), strict=True)):
            if row.ended:  # its processors failed
                continue
            if not sound[at]:
                self._end_job(
                    row.job, ServeError("no token can be drawn: the logits are not finite, or all are forbidden")
                )
                self._mark(row.job, rows)
                continue
            self._append(row, token, logits_BV[at])

    def _append(self, row: _Row, token: int, logits_V: Tensor) -> None:
        drawing, start = row.job.drawing, row.text.length
        row.answer.append(token)
        row.counts[token] += 1
        finish: Finish | None = None
        if token in self.stop_ids:
            text, finish = row.text.end(), "stop"
        else:
            text = row.text.feed(token)
            if drawing.logprobs is not None:
                row.held.append(self._logprob(token, logits_V, drawing.logprobs, start, row.text.length))
            if row.text.stopped:
                finish = "stop"
            elif len(row.answer) >= row.job.max_tokens:
                text, finish = text + row.text.end(), "length"
        row.shown += len(text)
        if finish is None:
            ready = sum(one.end <= row.shown for one in row.held)
        else:
            ready = sum(row.text.cut < 0 or one.start < row.text.cut for one in row.held)
        logprobs, row.held = tuple(row.held[:ready]), row.held[ready:]
        row.ended = finish is not None
        self._tell(row.job, Piece(row.index, text, 1, logprobs, finish))

    def _logprob(self, token: int, logits_V: Tensor, top: int, start: int, end: int) -> TokenLogprob:
        logp, likeliest = log_probabilities(logits_V, token, top)
        shown = tuple((*self.vocabulary.text_of(id_), value) for id_, value in likeliest)
        return TokenLogprob(*self.vocabulary.text_of(token), logp, start, end, shown)

    def _changed(self, rows: Sequence[_Row], logits_BV: Tensor) -> Tensor:
        """The logits after penalties, biases and processors; a job whose processor raises ends in an error."""
        own = [row for row in rows if row.job.processors or _adjusts(row.job.drawing)]
        if not own:
            return logits_BV
        changed = logits_BV.float().clone()
        for at, row in enumerate(rows):
            if _adjusts(row.job.drawing):
                _adjust(changed[at], row.counts, row.job.drawing)
        by_processor: dict[int, tuple[Processor, list[int]]] = {}
        for at, row in enumerate(rows):
            for processor in row.job.processors:
                by_processor.setdefault(id(processor), (processor, []))[1].append(at)
        for processor, places in by_processor.values():
            seen = [DecodeRow(rows[at].slot, rows[at].job.ids, rows[at].answer) for at in places]
            try:
                changed[places] = processor(seen, changed[places]).to(changed.dtype)
            except Exception as error:  # noqa: BLE001  one request's grammar must not end the others
                logger.exception("a processor failed")
                for job in {rows[at].job for at in places}:
                    self._end_job(job, ServeError(f"constrained decoding failed ({type(error).__name__})"))
                    self._mark(job, rows)
        return changed

    # ---------------------------------------------------------------------------------------------------------- leaving

    def _leave(self, *, keep_prefix: bool = True) -> None:
        """Rows that have ended make room; what they read is kept for the next turn of their conversation."""
        stay = [at for at, row in enumerate(self.rows) if not row.ended]
        if len(stay) == len(self.rows):
            return
        for at, row in enumerate(self.rows):
            if row.ended:
                self._slots.append(row.slot)
                if (
                    keep_prefix
                    and not row.job.cancelled
                    and len(row.job.ids) + len(row.answer) <= self.prefixes.max_tokens
                ):
                    self.prefixes.add(self.decoder.copy_row(at, [*row.job.ids, *row.answer[:-1]]))
        origin = self.decoder.keep(stay)
        self.rows = [self.rows[at] for at in origin]

    def _sweep(self) -> None:
        """Lets go of what was cancelled or has run out of time."""
        now = time.monotonic()
        for job in {*(row.job for row in self.rows), *(reading.job for reading in self.reading)}:
            if job.deadline < now and not job.cancelled:
                self._end_job(job, DeadlineError("the answer took longer than the deadline; ask for fewer tokens"))
        self.reading = [reading for reading in self.reading if not reading.job.cancelled]
        for row in self.rows:
            row.ended = row.ended or row.job.cancelled
        self._leave()

    def _end_job(self, job: Job, error: ServeError) -> None:
        if not job.over and not job.cancelled:
            job.pieces.append(error)
            self.touched.add(job)
        job.over = job.cancelled = True

    def _mark(self, job: Job, rows: Sequence[_Row]) -> None:
        for row in rows:
            if row.job is job:
                row.ended = True

    def _tell(self, job: Job, piece: Piece) -> None:
        job.pieces.append(piece)
        self.touched.add(job)


def _adjusts(drawing: Drawing) -> bool:
    return bool(drawing.frequency_penalty or drawing.presence_penalty or drawing.logit_bias)


def _adjust(logits_V: Tensor, counts: Counter[int], drawing: Drawing) -> None:
    """OpenAI's penalties, over the answer's own tokens, and biases; in place."""
    for id_, bias in drawing.logit_bias.items():
        if 0 <= id_ < len(logits_V):
            logits_V[id_] += bias
    if counts and (drawing.frequency_penalty or drawing.presence_penalty):
        ids = torch.tensor(list(counts), device=logits_V.device)
        times = torch.tensor(list(counts.values()), dtype=logits_V.dtype, device=logits_V.device)
        logits_V[ids] -= drawing.frequency_penalty * times + drawing.presence_penalty
