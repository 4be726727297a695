"""A conversation behind the guard, as events for a page: what each layer saw, took out, steered and verified."""

import copy
import logging
import queue
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plumbline.safety.findings import Action, Stage, Verdict
from plumbline.safety.pipeline import Guard
from plumbline.safety.policy import Policy
from plumbline.safety.taxonomy import meaning

if TYPE_CHECKING:
    from plumbline.safety.verifier.facts import FactChecker

Message = dict[str, str]
# (messages, report) -> pieces of an answer; what was steered goes into `report`
Speaker = Callable[[list[Message], dict[str, Any]], Iterator[str]]
KEPT_ANSWERS = 1000  # that a thumb may still come for

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Said:
    """One answer as a label would hold it: what the model saw and said, with placeholders for what was redacted."""

    messages: list[Message]
    answer: str


class _Watched(Guard):
    """A guard that keeps the verdicts of one answer."""

    seen: list[Verdict]

    def _logged(self, verdict: Verdict) -> Verdict:
        self.seen.append(verdict)
        return super()._logged(verdict)


class GuardedChat:
    """A model behind a guard, with or without a fact checker; each turn is a stream of events for the page."""

    def __init__(
        self,
        speaker: Speaker,
        *,
        policy: Policy | str | Mapping[str, Any] = "default",
        checker: "FactChecker | None" = None,
        name: str = "model",
        system: str = "",
        steering: Sequence[str] = (),
    ) -> None:
        self.speaker, self.checker, self.name, self.system = speaker, checker, name, system
        self.guard = _Watched(policy)
        self.about = {
            "model": name,
            "policy": f"{self.guard.policy.id} ({self.guard.policy.sha256[:12]})",
            "steering": list(steering),
            "facts": checker.tier if checker else "",
        }
        self._said: OrderedDict[str, Said] = OrderedDict()

    def said(self, answer_id: str) -> Said:
        """An answer by the id of its `done` event; ValueError when it is unknown or too long ago."""
        if answer_id not in self._said:
            raise ValueError(f"no answer {answer_id!r}: it was given too long ago, or before the app was started anew")
        return self._said[answer_id]

    def turn(self, messages: Sequence[Message]) -> Iterator[dict[str, Any]]:
        """Events of one answer: {"layer": ...} as layers finish, {"text": piece} as it may be shown, {"done": id} last.

        The guard and the model work in a thread of their own, which ends early when the iterator is closed.
        """
        events: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        gone = threading.Event()

        def work() -> None:
            try:
                for event in self._answer(list(messages), events.put):
                    events.put(event)
                    if gone.is_set():
                        return
            except ValueError as error:
                events.put({"error": str(error)})
            except Exception as error:  # a model or an endpoint may raise anything; the page says so, the app goes on
                logger.exception("an answer failed")
                events.put({"error": f"the answer failed: {type(error).__name__}: {error}"[:500]})
            finally:
                events.put(None)

        threading.Thread(target=work, daemon=True).start()
        try:
            while (event := events.get()) is not None:
                yield event
        finally:
            gone.set()

    def _answer(self, messages: list[Message], put: Callable[[dict[str, Any]], None]) -> Iterator[dict[str, Any]]:
        guard = copy.copy(self.guard)  # the same scanners, and a list of verdicts of its own
        guard.seen = []
        model_saw: list[Message] = []
        report: dict[str, Any] = {}

        def model(asked: list[Message]) -> Iterator[str]:
            model_saw.extend(asked)
            put(layer_of("input", guard.seen[-1]))  # the checks of earlier turns are in `seen` too
            yield from self.speaker(asked, report)

        guard.model = model
        system = [{"role": "system", "content": self.system}] if self.system else []
        started = time.perf_counter()
        shown = ""
        for piece in guard.stream(system + messages):
            shown += piece
            yield {"text": piece}
        if not model_saw:  # blocked before the model was asked
            blocked = next(verdict for verdict in reversed(guard.seen) if verdict.blocked)
            yield layer_of("input", blocked)
            yield {"done": None, "seconds": time.perf_counter() - started}
            return
        yield {"layer": "steered"} | report
        last = guard.seen[-1]
        yield layer_of("output", last)
        if self.checker is not None and not last.blocked and shown.strip():
            yield {"layer": "facts"} | self._facts(shown)
        answer_id = None
        if not last.blocked and last.stage is Stage.OUTPUT:
            answer_id = secrets.token_urlsafe(12)
            self._said[answer_id] = Said(messages=model_saw, answer=last.text)
            while len(self._said) > KEPT_ANSWERS:
                self._said.popitem(last=False)
        yield {"done": answer_id, "seconds": time.perf_counter() - started}

    def _facts(self, answer: str) -> dict[str, Any]:
        assert self.checker is not None
        found = self.checker.check(answer)
        claims = [
            {
                "text": one.claim.text,
                "verdict": one.verdict.value,
                "score": one.score,
                "reason": one.reason,
                "evidence": [asdict(evidence) for evidence in one.evidence],
            }
            for one in found.claims
        ]
        return {"tier": found.tier, "counts": found.counts(), "claims": claims}


def layer_of(name: str, verdict: Verdict) -> dict[str, Any]:
    """A verdict as an event. `passed_on` is the text that went on, where that is not the text that came in."""
    return {
        "layer": name,
        "action": verdict.action.name.lower(),
        "blocked": verdict.blocked,
        "passed_on": verdict.text if Action.ALLOW < verdict.action else None,
        "rules": [{"rule": one.rule, "action": one.action.name.lower(), "why": one.why} for one in verdict.fired],
        "findings": [
            {
                "what": meaning(found.category),
                "score": found.score,
                "scanner": found.scanner,
                "view": found.view,
                "reason": found.reason,
            }
            for found in sorted(verdict.findings, key=lambda found: -found.score)
        ],
        "scanners": [{"name": run.scanner, "status": str(run.status), "ms": run.ms} for run in verdict.runs],
    }


# Speakers


def endpoint_speaker(url: str, name: str, **options: Any) -> Speaker:
    """A model behind an OpenAI-compatible endpoint; its decoding is out of reach, so nothing is steered."""
    from plumbline.safety.backends import openai_endpoint

    ask = openai_endpoint(url, name, **options)
    return lambda messages, report: ask(messages)


class LocalSpeaker:
    """A model on this machine, loaded when first asked, one answer at a time.

    `banned`: phrases that no answer may spell; an answer that begins to goes back a sentence and is drawn another way.
    `expert`: folder of a safety adapter that leans the first tokens (SafeDecoding). What they did is reported as
    `backtracks`, `outcome` and `divergence` (KL(expert || base) in nats, one number a leaned token).
    """

    def __init__(
        self, source: str, *, banned: Sequence[str] = (), expert: str = "", max_new_tokens: int = 256, temperature: float = 0.7
    ) -> None:  # fmt: skip
        from plumbline.policy_models.loading import resolve_model_source
        from plumbline.safety.constrained.spellings import Phrases

        resolve_model_source(source)
        if expert and not (Path(expert) / "adapter_config.json").is_file():
            raise ValueError(f"expert={expert!r}: no adapter_config.json there; give the folder of an adapter")
        if max_new_tokens < 1 or temperature < 0:
            raise ValueError(f"{max_new_tokens=} must be at least 1 and {temperature=} at least 0")
        self.source, self.expert, self.max_new_tokens, self.temperature = source, expert, max_new_tokens, temperature
        self.phrases = Phrases(list(banned)) if banned else None
        self._lock = threading.Lock()
        self._loaded: Any = None

    def _load(self) -> Any:
        from plumbline.policy_models.loading import attach_adapter, load_for_answers, load_tokenizer

        model: Any = load_for_answers(self.source)
        if self.expert:
            model = attach_adapter(model, self.expert, adapter_name="expert").eval()
        return model, load_tokenizer(self.source)

    def __call__(self, messages: list[Message], report: dict[str, Any]) -> Iterator[str]:
        from contextlib import nullcontext

        from plumbline.policy_models.chat import encode_prompts
        from plumbline.safety.constrained.guided import OtherAdapter, SafeDecoding, only_adapter
        from plumbline.safety.constrained.streaming import HeldStream, LocalSource, phrase_check

        with self._lock:
            self._loaded = self._loaded or self._load()
            model, tokenizer = self._loaded
            guides = [SafeDecoding(OtherAdapter(model, "expert", tokenizer.pad_token_id))] if self.expert else []
            source = LocalSource(
                model, tokenizer, encode_prompts(tokenizer, [messages])[0], max_new_tokens=self.max_new_tokens,
                temperature=self.temperature, seed=secrets.randbelow(2**31), processors=guides,
            )  # fmt: skip
            with only_adapter(model, None) if self.expert else nullcontext():
                if self.phrases is None:
                    yield from source("", 0)
                else:
                    held = HeldStream(source, phrase_check(self.phrases))
                    yield from held
                    report |= {"backtracks": held.backtracks, "outcome": held.outcome, "checks": held.checks}
            for guide in guides:
                report["divergence"] = [kl for row in guide.divergence.values() for kl in row]
