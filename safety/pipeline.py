"""A guard around a model: user text -> input filter -> model -> output checks -> answer.

    from plumbline.safety.pipeline import Guard
    guard = Guard("default", model=my_function)        # messages -> text, or an iterator of pieces of text
    print(guard.chat("How do I whittle a spoon?").text)
    for piece in guard.stream("And a fork?"):
        print(piece, end="")

With `facts=FactChecker(...)` an answer is first checked against documents and annotated or corrected; what comes of that is then
checked like any answer.

The same for asyncio with `achat` and `astream`. Streams hold text back until it was checked with enough of what follows it:
nothing that the policy would block or redact is shown first and regretted later.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import re
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plumbline.safety.findings import (
    Action,
    Evidence,
    GuardedAnswer,
    ScanItem,
    Scanner,
    ScannerRun,
    Stage,
    Status,
    Verdict,
)
from plumbline.safety.policy import Policy
from plumbline.safety.scanning import Conversation, Scanning
from plumbline.safety.text.normalise import SURROGATES
from plumbline.safety.text.redaction import PLACEHOLDER, Cut, Vault, merge, redact
from plumbline.safety.text.scripts import NO_BLANKS
from plumbline.safety.workers import Worker

if TYPE_CHECKING:  # the embedder is loaded by those who check facts
    from plumbline.safety.verifier.facts import FactChecker

Message = Mapping[str, str]
Model = Callable[
    [list[dict[str, str]]], Any
]  # -> str, an iterable of str, or (for achat and astream) what awaits to either
FACT_ACTIONS = ("annotate", "correct", "drop", "abstain")
TRUSTED_ROLES = ("system", "assistant")  # just so spelt: what the application and the model themselves said
USER_ROLES = ("user", "human")  # in any case; the vault gives back what they wrote
STAGE_OF_ROLE = {  # of the rest; any other role counts as input, which most rules look at
    **dict.fromkeys(("tool", "function", "ipython", "observation", "environment"), Stage.TOOL_RESULT),
    **dict.fromkeys(("tool_response", "tool_result", "tool_output", "function_response"), Stage.TOOL_RESULT),
    **dict.fromkeys(("document", "documents", "context", "retrieved"), Stage.RETRIEVED),
}
_ID = re.compile(r"[\w.:-]{1,64}")  # of a call, which ties a tool's result to it


class Guard:
    """Checks what goes into a model and what comes out.

    Args:
        policy: the name of a shipped policy, the path of a YAML file, a mapping, or a Policy.
        model: messages (dicts with "role" and "content") -> the answer as text or in pieces. Not needed for `check`.
        scanners: instances by name, for scanners that a policy file cannot build.
        log: a JSON Lines file to which a line a verdict is appended: hashes and categories, never text.
        hold_back: characters that a stream keeps back until what follows them was seen; nothing longer than this is
            sure to be caught before its first characters are out, except what the rules know from its beginning.
        every: characters between two checks of a stream.
        facts: checks answers against documents; rules over `fact.*` see its findings, and `GuardedAnswer.citations` its evidence. A
            correction cannot be taken back, so a stream then comes in one piece.
        fact_action: what becomes of the answer: annotate, correct, drop or abstain (`plumbline.safety.verifier.facts.act`).
    """

    def __init__(
        self,
        policy: Policy | str | Mapping[str, Any] = "default",
        *,
        model: Model | None = None,
        scanners: Mapping[str, Scanner] | None = None,
        log: str | Path | None = None,
        hold_back: int = 120,
        every: int = 120,
        facts: FactChecker | None = None,
        fact_action: str = "annotate",
        fact_seconds: float = 60.0,
    ) -> None:
        if fact_action not in FACT_ACTIONS:
            raise ValueError(f"{fact_action=} must be one of {', '.join(FACT_ACTIONS)}")
        if fact_seconds <= 0:
            raise ValueError(f"{fact_seconds=} must be above 0")
        if hold_back < 1 or every < 1:
            raise ValueError(f"{hold_back=} and {every=} must be at least 1 character")
        self.scanning = Scanning(policy, scanners)
        self.policy = self.scanning.policy
        self.model, self.hold_back, self.every = model, hold_back, every
        self.facts, self.fact_action, self.fact_seconds = facts, fact_action, fact_seconds
        self._log = Path(log) if log else None
        self._log_lock = threading.Lock()

    def check(self, text: str, stage: Stage = Stage.INPUT, **context: Any) -> Verdict:
        """The verdict on one text, without a model; `context` is prompt, system, documents or conversation."""
        return self._logged(self.scanning.check(text, stage, **context))

    # ------------------------------------------------------------------------------------------------------------ chat

    def chat(self, prompt: str | Sequence[Message], *, conversation: Conversation | None = None) -> GuardedAnswer:
        """One guarded answer; `prompt` is the user's text or a list of messages."""
        messages, verdicts, conversation, ms = self._input(prompt, conversation)
        if blocked := _worst(verdicts):
            return _refused(blocked, verdicts, ms)
        started = time.perf_counter()
        said = _joined(self._model()(messages))
        ms["model"] = (time.perf_counter() - started) * 1000
        return self._output(said, messages, verdicts, conversation, ms)

    async def achat(
        self, prompt: str | Sequence[Message], *, conversation: Conversation | None = None
    ) -> GuardedAnswer:
        """As `chat`; scanners run in a worker thread, and the model may be a coroutine function."""
        messages, verdicts, talk, ms = await asyncio.to_thread(self._input, prompt, conversation)
        if blocked := _worst(verdicts):
            return _refused(blocked, verdicts, ms)
        started = time.perf_counter()
        model = self._model()
        result = model(messages) if _is_async(model) else await asyncio.to_thread(lambda: _joined(model(messages)))
        said = "".join([piece async for piece in _pieces(result)])
        ms["model"] = (time.perf_counter() - started) * 1000
        return await asyncio.to_thread(self._output, said, messages, verdicts, talk, ms)

    # ---------------------------------------------------------------------------------------------------------- stream

    def stream(self, prompt: str | Sequence[Message], *, conversation: Conversation | None = None) -> Iterator[str]:
        """The answer in pieces that were checked; when it is cut off, the last piece is the reply of the policy."""
        if self.facts:
            yield self.chat(prompt, conversation=conversation).text
            return
        messages, verdicts, conversation, _ = self._input(prompt, conversation)
        if blocked := _worst(verdicts):
            yield blocked.text
            return
        result = self._model()(messages)
        if isinstance(result, str):  # there is nothing to wait for: one check of the whole
            yield self._output(result, messages, verdicts, conversation, {}).text
            return
        check = self._stream_check(messages, conversation)
        try:
            for piece in result:
                if safe := check.feed(piece):
                    yield safe
                if check.stopped:
                    return
            if safe := check.close():
                yield safe
        finally:
            check.remember(conversation)

    async def astream(
        self, prompt: str | Sequence[Message], *, conversation: Conversation | None = None
    ) -> AsyncIterator[str]:
        """As `stream`; the model gives an asynchronous or a plain iterator."""
        if self.facts:
            yield (await self.achat(prompt, conversation=conversation)).text
            return
        messages, verdicts, talk, _ = await asyncio.to_thread(self._input, prompt, conversation)
        if blocked := _worst(verdicts):
            yield blocked.text
            return
        result = self._model()(messages)
        if isinstance(result, Awaitable):
            result = await result
        if isinstance(result, str):
            answer = await asyncio.to_thread(self._output, result, messages, verdicts, talk, {})
            yield answer.text
            return
        check = self._stream_check(messages, talk)
        try:
            async for piece in _pieces(result):
                if safe := await asyncio.to_thread(check.feed, piece):
                    yield safe
                if check.stopped:
                    return
            if safe := await asyncio.to_thread(check.close):
                yield safe
        finally:
            check.remember(talk)

    def _stream_check(self, messages: Sequence[Message], conversation: Conversation) -> StreamCheck:
        prompt, system = _last_user(messages), _system(messages)
        return StreamCheck(self, conversation.vault, prompt=prompt, system=system)

    # ----------------------------------------------------------------------------------------------------------- parts

    def _input(
        self, prompt: str | Sequence[Message], conversation: Conversation | None
    ) -> tuple[list[dict[str, str]], dict[str, Verdict], Conversation, dict[str, float]]:
        """Messages as the model may see them, verdicts by layer, and the conversation with this turn in it."""
        started = time.perf_counter()
        given = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
        for at, message in enumerate(given):
            if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
                raise ValueError(
                    f"messages[{at}] must have 'role' and 'content', both text; got keys {sorted(message)}"
                )
        messages = [_each_text(message, lambda key, text: mended(text)) for message in given]
        conversation = conversation or Conversation()
        inputs = [m for m in messages if m["role"] not in TRUSTED_ROLES and _stage_of(m) is Stage.INPUT]
        if len(inputs) > 1:
            conversation.turns.clear()  # the messages bring the earlier turns along: they must not count twice
        for message in messages:
            if message["role"] in TRUSTED_ROLES:
                conversation.vault.reserve(message["content"])
        verdicts: dict[str, Verdict] = {}
        for at, message in enumerate(messages):
            if message["role"] not in TRUSTED_ROLES:
                self._check_message(at, messages, verdicts, conversation)
        if not any(message["role"] not in TRUSTED_ROLES for message in messages):
            raise ValueError("no message with the role 'user': there is nothing to answer")
        for at, message in enumerate(messages):
            if message["role"] == "assistant":
                messages[at] = self._mask_answer(at, message, verdicts, conversation, _system(messages))
        if conversation.halted and not _worst(verdicts):
            last = next(reversed(verdicts))
            verdicts[last] = replace(verdicts[last], action=Action.HALT, text=self.policy.replies["refuse"])
        return messages, verdicts, conversation, {"input": (time.perf_counter() - started) * 1000}

    def _check_message(
        self,
        at: int,
        messages: list[dict[str, Any]],
        verdicts: dict[str, Verdict],
        conversation: Conversation,
    ) -> None:
        """Checks message `at`, which neither the application nor the model wrote, and puts in its place what the model may see."""
        message, system = messages[at], _system(messages)
        stage, is_user = _stage_of(message), _is_user(message)
        context = replace(conversation, turns=list(conversation.turns))
        kept = conversation.digest(stage, message["content"]) in conversation.masked

        def checked(text: str, ours: bool = False) -> Verdict:
            item = ScanItem(text=text, stage=stage, system=system)
            how = {"conversation": context, "own": is_user, "ours": ours}
            return self._logged(self.scanning.check_batch([item], **how)[0])

        def of_other(key: str, text: str) -> str:
            if key in ("tool_call_id", "id") and _ID.fullmatch(text) or not text.strip():
                return text
            verdict = checked(text)
            if verdict.action > Action.ALLOW:
                verdicts[f"{name}, {key}"] = verdict
            return verdict.text

        name = f"{stage}" if at == len(messages) - 1 else f"{stage} {at}"
        others = {key: value for key, value in message.items() if key not in ("role", "content")}
        verdict = checked(message["content"], ours=kept)
        verdicts[name] = verdict
        messages[at] = {"role": message["role"], "content": verdict.text} | _each_text(others, of_other)
        conversation.masked.add(conversation.digest(stage, verdict.text))
        if stage is Stage.INPUT:
            conversation.turns.append(verdict.findings)
        if any(one.action is Action.HALT for one in verdicts.values()):
            conversation.halted = True

    def _mask_answer(
        self,
        at: int,
        message: dict[str, Any],
        verdicts: dict[str, Verdict],
        conversation: Conversation,
        system: str,
    ) -> dict[str, Any]:
        """An earlier answer as the model may see it: what the vault hides is hidden in it too.

        An application keeps its history with our answers in clear, or masked, or cut, or begins a new `Conversation` with an old
        history: an answer that this conversation did not give is looked through by the scanners that redact.
        """
        digest = conversation.digest("assistant", message["content"])
        if digest in conversation.masked:
            return message
        vault = conversation.vault
        masked = _each_text(message, lambda key, text: text if key == "role" else vault.mask(text))
        if digest not in conversation.shown and (only := self.scanning.redacting):
            item = ScanItem(text=masked["content"], stage=Stage.OUTPUT, system=system)
            how = {"conversation": conversation, "own": False, "ours": True, "only": only}
            verdict = self.scanning.check_batch([item], **how)[0]
            if any(one.rule in ("on_error", "max_chars") for one in verdict.fired):
                verdicts[f"{Stage.OUTPUT} {at}"] = self._logged(verdict)
            cuts = self.scanning.cuts(verdict, len(item.text))
            masked["content"] = redact(item.text, cuts, vault, own=False, ours=True)
        return masked

    def _output(
        self,
        said: str,
        messages: Sequence[Message],
        verdicts: dict[str, Verdict],
        conversation: Conversation,
        ms: dict[str, float],
    ) -> GuardedAnswer:
        citations: tuple[Evidence, ...] = ()
        said = mended(said)
        if self.facts:
            started = time.perf_counter()
            verdict, said, citations = self._fact_check(said)
            verdicts, ms = {**verdicts, "facts": verdict}, {**ms, "facts": (time.perf_counter() - started) * 1000}
            if verdict.blocked:
                return _refused(verdict, verdicts, ms)
        started = time.perf_counter()
        context = Conversation(vault=conversation.vault)
        verdict = self.check(
            said, Stage.OUTPUT, prompt=_last_user(messages), system=_system(messages), conversation=context
        )
        verdicts = {**verdicts, "output": verdict}
        ms = {**ms, "output": (time.perf_counter() - started) * 1000}
        if verdict.blocked:
            return _refused(verdict, verdicts, ms)
        action = max(one.action for one in verdicts.values())
        text = conversation.vault.restore(verdict.text)
        conversation.masked.add(conversation.digest("assistant", verdict.text))
        conversation.shown.add(conversation.digest("assistant", text))
        return GuardedAnswer(text=text, action=action, verdicts=verdicts, citations=citations, ms=ms)

    def _fact_check(self, said: str) -> tuple[Verdict, str, tuple[Evidence, ...]]:
        """The verdict of the rules over `fact.*`, the answer after `fact_action`, and all evidence."""
        from plumbline.safety.verifier.facts import act

        assert self.facts
        started = time.perf_counter()
        try:
            report = Worker().run(partial(self.facts.check, said), self.fact_seconds)
            if isinstance(report, BaseException):
                raise report
            text = act(report, self.fact_action)  # type: ignore[arg-type]  # checked in __init__
        except Exception as error:  # noqa: BLE001  the policy decides what an unchecked answer is worth
            status = Status.TIMEOUT if isinstance(error, TimeoutError) else Status.ERROR
            failed = ScannerRun(scanner="facts", status=status, detail=type(error).__name__)
            return self._logged(self.scanning.decide(said, (), Stage.OUTPUT, failed)), said, ()
        run = ScannerRun(scanner="facts", status=Status.OK, ms=(time.perf_counter() - started) * 1000)
        verdict = self.scanning.decide(said, report.findings(), Stage.OUTPUT, run)
        if text != said and not verdict.blocked:
            done = Action.ANNOTATE if self.fact_action == "annotate" else Action.REWRITE
            verdict = replace(verdict, action=max(verdict.action, done), text=text)
        return self._logged(verdict), text, tuple(one for checked in report.claims for one in checked.evidence)

    def _model(self) -> Model:
        if self.model is None:
            raise ValueError("this guard has no model; pass model= (messages -> text), or use check()")
        return self.model

    def _logged(self, verdict: Verdict) -> Verdict:
        if self._log:
            with self._log_lock, self._log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record(verdict)) + "\n")
        return verdict


class StreamCheck:
    """Turns pieces of an answer into pieces that may be shown, the same text however the answer is cut into pieces.

    It is checked whenever `every` more characters are there, wherever the pieces end. Text leaves only up to a blank, or a letter of a
    script without blanks, that stands `hold_back` characters before the end of what was checked, and not into a span that is to
    be redacted or into a placeholder. Before the last piece leaves, the whole answer is checked once more as an output.
    """

    CONTEXT = 400  # characters before the held text that are checked with it

    def __init__(self, guard: Guard, vault: Vault, *, prompt: str = "", system: str = "") -> None:
        self.guard, self.vault, self.prompt, self.system = guard, vault, prompt, system
        self.said = ""  # what the model said, as far as it was checked
        self.waiting = ""  # and what it said since
        self.half = ""  # the first half of a surrogate pair
        self.shown = 0  # characters of `said` that left
        self.masked: list[str] = []  # what left, before the vault gave anything back
        self.given: list[str] = []  # and after
        self.stopped = False
        self.verdicts: list[Verdict] = []

    def feed(self, piece: str) -> str:
        """What may be shown now; often nothing."""
        piece = self.half + piece
        self.half = piece[-1:] if "\ud800" <= piece[-1:] <= "\udbff" else ""
        self.waiting += mended(piece[: len(piece) - len(self.half)])
        out = []
        while not self.stopped and len(self.waiting) >= self.guard.every:
            self.said += self.waiting[: self.guard.every]
            self.waiting = self.waiting[self.guard.every :]
            out.append(self._release(final=False))
        return "".join(out)

    def close(self) -> str:
        """The rest, once the model has finished."""
        if self.stopped:
            return ""
        self.said += self.waiting + mended(self.half)
        self.waiting = self.half = ""
        return self._release(final=True)

    def remember(self, conversation: Conversation) -> None:
        """Notes in a conversation what was shown, so that a later turn knows it again."""
        conversation.masked.add(conversation.digest("assistant", "".join(self.masked)))
        conversation.shown.add(conversation.digest("assistant", "".join(self.given)))

    def _release(self, *, final: bool) -> str:
        first = 0 if final else max(0, self.shown - self.CONTEXT)
        # Back to the end of a sentence, so that the next stretch has the same sentences, or at least not into a word.
        while first and self.said[first - 1] not in ".!?\n" and self.shown - first < 1.5 * self.CONTEXT:
            first -= 1
        while first and not self.said[first].isspace() and self.shown - first < 2 * self.CONTEXT:
            first -= 1
        part = self.said[first:]
        stage = Stage.OUTPUT if final else Stage.STREAM
        item = ScanItem(text=part, stage=stage, prompt=self.prompt, system=self.system)
        # No vault yet: the end of `part` may be half an address, which must not take a number.
        verdict = self.guard._logged(self.guard.scanning.check_batch([item])[0])
        self.verdicts.append(verdict)
        if verdict.blocked:
            self.stopped = True
            return self._leave(verdict.text if not self.shown else f"\n\n{verdict.text}")
        cuts = [
            replace(cut, start=max(cut.start + first, self.shown), end=cut.end + first)
            for cut in merge(self.guard.scanning.cuts(verdict, len(part)))
            if cut.end + first > self.shown
        ]
        end = len(self.said) if final else self._safe_end(cuts)
        inside = [
            replace(cut, start=cut.start - self.shown, end=cut.end - self.shown) for cut in cuts if cut.end <= end
        ]
        safe = redact(self.said[self.shown : end], inside, self.vault, own=False, ours=True)
        self.shown = end
        self.stopped = final
        return self._leave(safe)

    def _leave(self, safe: str) -> str:
        self.masked.append(safe)
        self.given.append(self.vault.restore(safe))
        return self.given[-1]

    def _safe_end(self, cuts: Sequence[Cut]) -> int:
        end = max(self.shown, len(self.said) - self.guard.hold_back)
        while end > self.shown and not _breaks(self.said, end):
            end -= 1
        spans = [(cut.start, cut.end) for cut in cuts]
        spans += [found.span() for found in PLACEHOLDER.finditer(self.said, self.shown)]
        for start, last in sorted(spans, reverse=True):  # not into a span: it may still grow
            if start < end < last or last == len(self.said) and start < end:
                end = max(self.shown, start)
        return end


def record(verdict: Verdict) -> dict[str, Any]:
    """A verdict as a line of a log: what was decided and why, with hashes where text would be."""
    return {
        "request_id": verdict.request_id,
        "stage": verdict.stage,
        "action": verdict.action.name.lower(),
        "policy": verdict.policy_id,
        "policy_sha256": verdict.policy_sha256,
        "text_sha256": verdict.text_sha256,
        "fired": [{"rule": one.rule, "action": one.action.name.lower()} for one in verdict.fired],
        "findings": [
            {
                "scanner": found.scanner, "version": found.version, "category": found.category, "score": round(found.score, 4),
                "view": found.view, "spans": [[span.start, span.end] for span in found.spans],
            }
            for found in verdict.findings
        ],
        "runs": {run.scanner: run.status for run in verdict.runs},
    }  # fmt: skip


_NO_BLANK = re.compile(f"[{NO_BLANKS}]")


def _breaks(text: str, at: int) -> bool:
    """Whether a stream may be cut here: after a blank, or after a letter or sign of a script that is written without blanks."""
    return text[at - 1].isspace() or _NO_BLANK.match(text[at - 1]) is not None


def _refused(verdict: Verdict, verdicts: dict[str, Verdict], ms: dict[str, float]) -> GuardedAnswer:
    return GuardedAnswer(text=verdict.text, action=verdict.action, verdicts=verdicts, ms=ms)


def _worst(verdicts: Mapping[str, Verdict]) -> Verdict | None:
    return max((one for one in verdicts.values() if one.blocked), key=lambda one: one.action, default=None)


def mended(text: str) -> str:
    """The text with the two halves of a surrogate pair joined, and half a pair, which is no character, as U+FFFD."""
    if not SURROGATES.search(text):
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _each_text(value: Any, change: Callable[[str, str], str], key: str = "") -> Any:
    """A message, or what is in it, with every text put through `change(key, text)`; everything else as it is."""
    if isinstance(value, str):
        return change(key, value)
    if isinstance(value, Mapping):
        return {name: _each_text(inner, change, str(name)) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_each_text(inner, change, key) for inner in value]
    return value


def _is_user(message: Message) -> bool:
    return message["role"].strip().lower() in USER_ROLES


def _stage_of(message: Message) -> Stage:
    return STAGE_OF_ROLE.get(message["role"].strip().lower(), Stage.INPUT)


def _last_user(messages: Sequence[Message]) -> str:
    return next((message["content"] for message in reversed(messages) if _is_user(message)), "")


def _system(messages: Sequence[Message]) -> str:
    return "\n".join(message["content"] for message in messages if message["role"] == "system")


def _joined(result: str | Iterable[str]) -> str:
    return result if isinstance(result, str) else "".join(result)


def _is_async(model: Model) -> bool:
    """Whether calling the model gives something to await or to iterate asynchronously."""
    call = getattr(model, "__call__", model)  # noqa: B004  an object whose __call__ is a coroutine function counts
    return any(inspect.iscoroutinefunction(f) or inspect.isasyncgenfunction(f) for f in (model, call))


async def _pieces(result: Any) -> AsyncIterator[str]:
    """Pieces of text from a string, an iterable, an asynchronous iterable, or what awaits to one of them."""
    if isinstance(result, Awaitable):
        result = await result
    if isinstance(result, str):
        yield result
    elif isinstance(result, AsyncIterator):
        async for piece in result:
            yield piece
    else:
        iterator, end = iter(result), object()
        while (piece := await asyncio.to_thread(next, iterator, end)) is not end:
            yield piece  # type: ignore[misc]
