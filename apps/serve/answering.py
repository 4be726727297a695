"""One request into guarded answers: input filter, admission, drawing, checks, best-of-n, and what became of each layer.

The only way from a backend to a client. With a guard, a piece of text leaves only after a check has read it; a check that
raises ends the answer. What `x_guard` reports holds codes, scores and statuses, never text.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from plumbline.apps.monitor.metrics import ServeMetrics
from plumbline.apps.serve.engine.backend import (
    Backend,
    BadRequestError,
    Generation,
    Piece,
    Request,
    TokenLogprob,
    UpstreamError,
    find_served,
)
from plumbline.safety.findings import Action, Stage, Verdict
from plumbline.safety.pipeline import Guard, StreamCheck, Turn
from plumbline.safety.scanning import Conversation

Finish = Literal["stop", "length", "content_filter"]
Score = Callable[[Sequence[list[dict[str, str]]]], Sequence[float | None]]


@dataclass(frozen=True, slots=True)
class Checked:
    """A stretch of answer `index` that may leave. The last one of an answer has `finish`, and `guard` where there is one."""

    index: int
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: Finish | None = None
    guard: dict[str, Any] | None = None


@dataclass
class Usage:
    """Tokens of a request."""

    prompt: int = 0
    completion: int = 0
    cached: int = 0

    def to_json(self) -> dict[str, Any]:
        """In OpenAI's shape."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


@dataclass
class _Choice:
    """One answer on its way out."""

    check: StreamCheck | None = None
    said: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)  # not yet released
    dirty: list[tuple[int, int]] = field(default_factory=list)  # stretches that left altered
    finish: Finish | None = None


class Answering:
    """Requests of one server.

    Args:
        guard: None lets everything through unchecked.
        layers: which of "input" and "output" are checked.
        score: of whole conversations, by a reward model; then `best_of` answers are drawn for each one given.
        decode: what constrains drawing, for the report.
    """

    def __init__(
        self,
        backend: Backend,
        guard: Guard | None,
        *,
        layers: Sequence[str] = ("input", "output"),
        score: Score | None = None,
        best_of: int = 1,
        decode: Mapping[str, Any] | None = None,
        metrics: ServeMetrics | None = None,
    ) -> None:
        self.backend, self.guard, self.layers = backend, guard, tuple(layers)
        self.score, self.best_of = score, best_of if score else 1
        self.decode = dict(decode or {})
        self.metrics = metrics or ServeMetrics()

    async def begin(self, request: Request, *, whole: bool) -> "Answer":
        """Filters the input and queues the request; `whole` when the client wants no stream.

        Raises a ServeError for what is not taken: then nothing has been sent yet.
        """
        started = time.monotonic()
        find_served(self.backend, request.model)
        if self.guard and request.drawing.logprobs and "output" in self.layers:
            raise BadRequestError(
                "alternatives of a token are text that no check has read; ask for logprobs without them, "
                "or of a server started with --guard off",
                param="top_logprobs",
            )
        turn = await self._turn(request)
        if turn is not None and turn.blocked:
            return Answer(self, request, turn, None, whole=whole, started=started)
        if turn is not None:
            request = _as_filtered(request, turn)
        best_of = self.best_of if request.drawing.temperature > 0 else 1  # else all of them are the same
        generation = await self.backend.submit(replace(request, n=request.n * best_of))
        return Answer(self, request, turn, generation, whole=whole, started=started, best_of=best_of)

    async def _turn(self, request: Request) -> Turn | None:
        if self.guard is None:
            return None
        messages = [dict(message) for message in _messages(request)]
        if "input" not in self.layers:
            return Turn(self.guard, messages, {}, Conversation(), {})
        try:
            turn = await asyncio.to_thread(self.guard.turn, messages)
        except ValueError as error:
            raise BadRequestError(str(error), param="messages") from error
        for name, verdict in turn.verdicts.items():
            self.metrics.verdict(name.split()[0].rstrip(","), verdict)
        return turn


class Answer:
    """The answers to one request. Iterate it once; leaving early cancels what is under way."""

    def __init__(
        self,
        answering: Answering,
        request: Request,
        turn: Turn | None,
        generation: Generation | None,
        *,
        whole: bool,
        started: float,
        best_of: int = 1,
    ) -> None:
        self.answering, self.request, self.turn, self.generation = answering, request, turn, generation
        self.whole, self.started, self.best_of = whole, started, best_of
        self.usage = Usage()
        guard = answering.guard
        self._checks_output = guard is not None and "output" in answering.layers
        self._in_one_piece = best_of > 1 or (self._checks_output and (whole or bool(guard and guard.facts)))

    async def __aiter__(self) -> AsyncIterator[Checked]:
        if self.generation is None:
            assert self.turn
            for index in range(self.request.n):
                yield Checked(index, self.turn.refusal().text)
                yield Checked(index, finish="content_filter", guard=self._report([]))
            return
        parts = self._whole() if self._in_one_piece else self._pieces()
        try:
            async for part in parts:
                yield part
        finally:
            await parts.aclose()
            self.cancel()
            self.usage.prompt, self.usage.cached = self.generation.prompt_tokens, self.generation.cached_tokens
            self.answering.metrics.usage(self.request.model, self.usage.prompt, self.usage.completion)

    def cancel(self) -> None:
        """Stops drawing; harmless when it has stopped."""
        if self.generation is not None:
            self.generation.cancel()

    # ------------------------------------------------------------------------------------------------- piece by piece

    async def _pieces(self) -> AsyncGenerator[Checked, None]:
        choices = [
            _Choice(self.turn.stream_check() if self._checks_output and self.turn else None)
            for _ in range(self.request.n)
        ]
        async for piece in self._drawn():
            choice = choices[piece.index]
            if choice.finish is not None:  # a check has ended it
                continue
            if choice.check is None:
                yield Checked(
                    piece.index, piece.text, piece.logprobs, piece.finish, self._report([]) if piece.finish else None
                )
                choice.finish = piece.finish
            else:
                async for part in self._checked(choice, piece):
                    yield part
            if all(one.finish is not None for one in choices):
                return
        if any(choice.finish is None for choice in choices):
            raise UpstreamError("the answer broke off before its end")

    async def _checked(self, choice: _Choice, piece: Piece) -> AsyncIterator[Checked]:
        check = choice.check
        assert check is not None
        choice.logprobs += piece.logprobs
        before, seen = check.shown, len(check.verdicts)
        due = len(check.waiting) + len(piece.text) >= check.guard.every
        safe = await asyncio.to_thread(check.feed, piece.text) if due else check.feed(piece.text)
        if piece.finish is not None and not check.stopped:
            if safe:
                yield Checked(piece.index, safe, self._released(choice, before, safe))
                before = check.shown
            safe = await asyncio.to_thread(check.close)
        for verdict in check.verdicts[seen:]:
            self.answering.metrics.verdict("output", verdict)
        blocked = bool(check.verdicts) and check.verdicts[-1].blocked
        if blocked:
            choice.finish = "content_filter"
            if safe:
                yield Checked(piece.index, safe)
        elif safe:
            yield Checked(piece.index, safe, self._released(choice, before, safe))
        if piece.finish is not None and not blocked:
            choice.finish = piece.finish
        if choice.finish is not None:
            yield Checked(piece.index, finish=choice.finish, guard=self._report(check.verdicts))

    def _released(self, choice: _Choice, before: int, safe: str) -> tuple[TokenLogprob, ...]:
        """Log-probabilities of the tokens whose text has left as it was drawn."""
        check = choice.check
        assert check is not None
        if safe != check.said[before : check.shown]:
            choice.dirty.append((before, check.shown))
        out = [one for one in choice.logprobs if one.end <= check.shown]
        choice.logprobs = [one for one in choice.logprobs if one.end > check.shown]
        return tuple(
            one
            for one in out
            if not any(one.start < end and start < max(one.end, one.start + 1) for start, end in choice.dirty)
        )

    async def _drawn(self) -> AsyncIterator[Piece]:
        """The pieces of the backend, counted and timed."""
        metrics, last = self.answering.metrics, 0.0
        assert self.generation is not None
        async for piece in self.generation:
            now = time.monotonic()
            if piece.tokens:
                if last:
                    metrics.between_tokens(self.request.model, now - last)
                else:
                    metrics.first_token(self.request.model, now - self.started)
                last = now
            self.usage.completion += piece.tokens
            yield piece

    # --------------------------------------------------------------------------------------------------- in one piece

    async def _whole(self) -> AsyncGenerator[Checked, None]:
        """All of every answer is drawn first: for the reward model, for the fact check, or since nobody reads it before."""
        drawn = [_Choice() for _ in range(self.request.n * self.best_of)]
        async for piece in self._drawn():
            choice = drawn[piece.index]
            choice.said += piece.text
            choice.logprobs += piece.logprobs
            choice.finish = choice.finish or piece.finish
        if any(choice.finish is None for choice in drawn):
            raise UpstreamError("the answer broke off before its end")
        for index in range(self.request.n):
            candidates = drawn[index * self.best_of : (index + 1) * self.best_of]
            async for part in self._best(index, candidates):
                yield part

    async def _best(self, index: int, candidates: list[_Choice]) -> AsyncIterator[Checked]:
        """The candidate that the reward model likes best, of those that the guard lets pass."""
        order, report = list(range(len(candidates))), {}
        if self.best_of > 1 and self.answering.score:
            messages = [{"role": one["role"], "content": one["content"]} for one in _messages(self.request)]
            talks = [[*messages, {"role": "assistant", "content": one.said}] for one in candidates]
            scores = list(await asyncio.to_thread(self.answering.score, talks))
            order.sort(key=lambda at: -float("inf") if (value := scores[at]) is None else value, reverse=True)
            report = {"best_of": {"n": len(candidates), "scores": scores}}
        for place in order:
            choice = candidates[place]
            if report:
                report["best_of"]["chosen"] = place
            if not self._checks_output or self.turn is None:
                yield Checked(index, choice.said, tuple(choice.logprobs))
                yield Checked(index, finish=choice.finish, guard=self._report([], report))
                return
            answer = await asyncio.to_thread(self.turn.finish, choice.said)
            outputs = {name: verdict for name, verdict in answer.verdicts.items() if name not in self.turn.verdicts}
            for name, verdict in outputs.items():
                self.answering.metrics.verdict(name, verdict)
            if answer.blocked and place != order[-1]:
                continue
            if answer.citations:
                report["facts"] = {"citations": [_citation(one) for one in answer.citations]}
            logprobs = tuple(choice.logprobs) if answer.text == choice.said else ()
            yield Checked(index, answer.text, logprobs)
            finish = "content_filter" if answer.blocked else choice.finish
            yield Checked(index, finish=finish, guard=self._report(list(outputs.values()), report))
            return

    # --------------------------------------------------------------------------------------------------------- report

    def _report(self, outputs: Sequence[Verdict], more: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
        """What each layer did, without the text."""
        answering, turn = self.answering, self.turn
        if answering.guard is None or turn is None:
            return dict(more) if more else None
        layers: dict[str, Any] = {name: layer_report(verdict) for name, verdict in turn.verdicts.items()}
        if answering.decode:
            layers["decode"] = answering.decode
        if outputs:
            layers["output"] = layer_report(max(outputs, key=lambda one: one.action)) | {"checks": len(outputs)}
        actions = [*(one.action for one in turn.verdicts.values()), *(one.action for one in outputs)]
        policy = answering.guard.policy
        return {
            "policy": policy.id,
            "policy_sha256": policy.sha256,
            "action": max(actions, default=Action.ALLOW).name.lower(),
            "layers": layers,
            **(more or {}),
        }


def layer_report(verdict: Verdict) -> dict[str, Any]:
    """A verdict without the text, its spans or its hash."""
    return {
        "action": verdict.action.name.lower(),
        "blocked": verdict.blocked,
        "rules": [{"rule": one.rule, "action": one.action.name.lower()} for one in verdict.fired],
        "findings": [
            {"scanner": one.scanner, "category": str(one.category), "score": round(one.score, 4), "view": one.view}
            for one in verdict.findings
        ],
        "scanners": {run.scanner: str(run.status) for run in verdict.runs},
    }


def _citation(evidence: Any) -> dict[str, Any]:
    return {name: getattr(evidence, name) for name in ("doc_id", "doc_sha256", "start", "end", "score", "stance")}


def _messages(request: Request) -> Sequence[Mapping[str, Any]]:
    """The conversation that the guard reads; a bare prompt is what a user wrote."""
    if request.messages is not None:
        return request.messages
    if not isinstance(request.prompt, str):
        raise BadRequestError(
            "a prompt in tokens cannot be read by the guard; send text, or ask a server started with --guard off",
            param="prompt",
        )
    return [{"role": "user", "content": request.prompt}]


def _as_filtered(request: Request, turn: Turn) -> Request:
    """The request as the input filter lets it through."""
    if request.messages is not None:
        return replace(request, messages=turn.messages)
    return replace(request, prompt=turn.messages[0]["content"])


async def check_texts(guard: Guard, texts: Sequence[str]) -> list[Verdict]:
    """Verdicts on texts as inputs."""

    def check() -> list[Verdict]:
        return [guard.check(text, Stage.INPUT) for text in texts]

    return await asyncio.to_thread(check)
