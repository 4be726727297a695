"""Runs the scanners of a policy over texts, cheapest first, and turns what they find into verdicts.

    length -> readings (plumbline.safety.text.normalise) -> scanners by cost -> rules of the policy -> redaction, merged once

A scanner that raises, answers nonsense or runs out of time ends as ERROR or TIMEOUT in the verdict, and blocks where the policy
says "closed". Python cannot interrupt a thread: a scanner that ran out of time is left behind, and counts as busy (and so
as timed out) for the next texts until it comes back, so that a scanner that hangs cannot pile up threads.
"""

from __future__ import annotations

import hashlib
import threading
import time
import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any

from plumbline.safety.findings import (
    OUTPUT_STAGES,
    Action,
    Finding,
    Fired,
    ScanItem,
    Scanner,
    ScannerRun,
    Span,
    Stage,
    Status,
    Verdict,
)
from plumbline.safety.policy import Policy, ScannerSettings, load_policy
from plumbline.safety.scanners import build_scanner
from plumbline.safety.text.normalise import SURROGATES, View, views
from plumbline.safety.text.redaction import Cut, Vault, cuts_of, redact
from plumbline.safety.workers import Worker

COSTS = ("regex", "cpu", "gpu", "llm")
MAX_FINDINGS = 10_000  # that a scanner may have in one text
MAX_LEFT_BEHIND = 2  # hung threads a scanner may have before it counts as busy


@dataclass
class Conversation:
    """What the rules about several turns look back on, and the vault of placeholders that the turns share."""

    turns: list[tuple[Finding, ...]] = field(default_factory=list)
    vault: Vault = field(default_factory=Vault)
    halted: bool = False
    masked: set[str] = field(default_factory=set)  # digests of texts with placeholders that the guard made
    shown: set[str] = field(default_factory=set)  # and of answers that it gave to the user

    @staticmethod
    def digest(role: str, text: str) -> str:
        """What `masked` and `shown` hold of a text of a role; blanks around it do not count."""
        return hashlib.sha256(f"{role}\0{text.strip()}".encode("utf-8", "surrogatepass")).hexdigest()


@dataclass
class _Text:
    """A text on its way through the tiers."""

    item: ScanItem
    views: list[View]
    earlier: Sequence[Sequence[Finding]]
    findings: list[Finding] = field(default_factory=list)
    runs: list[ScannerRun] = field(default_factory=list)
    failed: list[Fired] = field(default_factory=list)


class Scanning:
    """The scanners of a policy, ready to check texts. Safe to use from several threads.

    Args:
        policy: a Policy, or what `load_policy` takes.
        scanners: instances by name, for scanners that a policy file cannot build; they replace those of the same name.
    """

    def __init__(
        self, policy: Policy | str | Mapping[str, Any] = "default", scanners: Mapping[str, Scanner] | None = None
    ) -> None:
        self.policy = policy if isinstance(policy, Policy) else load_policy(policy)
        given = dict(scanners or {})
        if unknown := set(given) - {entry.name for entry in self.policy.scanners}:
            raise ValueError(
                f"the policy {self.policy.id!r} has no scanner called {', '.join(sorted(unknown))}; add it under `scanners`"
            )
        self.scanners = [(entry, given.get(entry.name) or build_scanner(entry)) for entry in self.policy.scanners]
        # Cheapest first; a gated scanner after its gate, which is listed before it and so comes first within a tier.
        self.scanners.sort(key=lambda pair: COSTS.index(pair[1].cost))
        place = {entry.name: at for at, (entry, _) in enumerate(self.scanners)}
        for entry, _ in self.scanners:
            if entry.gate and place[entry.gate] > place[entry.name]:
                raise ValueError(f"scanner {entry.name!r} is cheaper than its gate {entry.gate!r}; drop the gate")
        self._idle: list[Worker] = []
        self._left_behind: dict[str, list[threading.Thread]] = {entry.name: [] for entry, _ in self.scanners}

    def check(
        self, text: str, stage: Stage = Stage.INPUT, *, conversation: Conversation | None = None, **context: Any
    ) -> Verdict:
        """The verdict on one text; `context` is what else ScanItem takes (prompt, system, documents)."""
        return self.check_batch([ScanItem(text=text, stage=stage, **context)], conversation=conversation)[0]

    def check_batch(
        self,
        items: Sequence[ScanItem],
        *,
        conversation: Conversation | None = None,
        own: bool | None = None,
        ours: bool | None = None,
        only: Collection[str] | None = None,
    ) -> list[Verdict]:
        """One verdict an item. With a conversation, the rules see its earlier turns; nothing is added to it here but to its vault.

        own: whether the user wrote the texts, and may get back what is hidden (None: those of the input stage).
        ours: whether placeholders in them are the vault's (None: in answers), or were typed.
        only: names of the scanners to run.
        """
        earlier = conversation.turns if conversation else ()
        vault = conversation.vault if conversation else Vault()
        texts = [self._take(item, earlier) for item in items]
        for tier in COSTS:
            for entry, scanner in self.scanners:
                if scanner.cost == tier and (only is None or entry.name in only):
                    waiting = [text for text in texts if self._wanted(entry, scanner, text)]
                    if waiting:
                        self._run(entry, scanner, waiting)
        return [self._verdict(text, vault, own, ours) for text in texts]

    @property
    def redacting(self) -> frozenset[str]:
        """Names of the scanners that a redacting rule may act on."""
        return frozenset(
            entry.name for entry, scanner in self.scanners if self.policy.may_redact(entry.name, scanner.categories)
        )

    def decide(self, text: str, findings: Sequence[Finding], stage: Stage, run: ScannerRun) -> Verdict:
        """The policy's verdict on findings made elsewhere, such as those of a fact check; a failed `run` goes through `on_error`."""
        taken = _Text(ScanItem(text=text, stage=stage), [], (), findings=list(findings), runs=[run])
        if run.status is not Status.OK and self.policy.fails_closed(("fact.*",)):
            taken.failed.append(
                Fired(rule="on_error", action=Action.BLOCK, why=f"{run.scanner} ended with {run.status}: {run.detail}")
            )
        return self._verdict(taken, Vault())

    def _take(self, item: ScanItem, earlier: Sequence[Sequence[Finding]]) -> _Text:
        if not isinstance(item.text, str):
            raise TypeError(f"a text to check is {type(item.text).__name__}; pass a string")
        if len(item.text) > self.policy.max_chars:
            why = f"{len(item.text)} characters, the policy reads at most {self.policy.max_chars}"
            text = _Text(item, [], earlier, failed=[Fired(rule="max_chars", action=Action.BLOCK, why=why)])
            text.runs = [
                ScannerRun(scanner=entry.name, status=Status.SKIPPED, detail="text too long")
                for entry, _ in self.scanners
            ]
            return text
        try:
            return _Text(item, views(item.text), earlier)
        except Exception as error:  # noqa: BLE001  a text that cannot be normalised has not been checked
            why = f"the normaliser ended with {type(error).__name__}"
            return _Text(item, [], earlier, failed=[Fired(rule="on_error", action=Action.BLOCK, why=why)])

    def _wanted(self, entry: ScannerSettings, scanner: Scanner, text: _Text) -> bool:
        """Whether a scanner is to run on a text; where the cascade saves it, that is noted."""
        stage = text.item.stage
        if not text.views or stage not in scanner.stages or stage not in entry.stages:
            return False
        why = ""
        if entry.gate and not any(
            run.scanner == entry.gate and run.status in (Status.ERROR, Status.TIMEOUT) for run in text.runs
        ):
            score = max((found.score for found in text.findings if found.scanner == entry.gate), default=0.0)
            low, high = self.policy.grey_band
            if not low <= score <= high:
                why = f"{entry.gate} is sure: {score:.2f} is outside [{low}, {high}]"
        if self.policy.stop_early and scanner.cost != "regex" and self._blocked(text):
            why = "already blocked"
        if why:
            text.runs.append(ScannerRun(scanner=entry.name, status=Status.SKIPPED, detail=why))
        return not why

    def _blocked(self, text: _Text) -> bool:
        fired = [*text.failed, *self.policy.decide(text.findings, text.item.stage, text.earlier)]
        return any(one.action >= Action.BLOCK for one in fired)

    def _run(self, entry: ScannerSettings, scanner: Scanner, texts: list[_Text]) -> None:
        """One scanner over every reading of every text; where the batch fails, one text at a time."""
        readings = [(text, view) for text in texts for view in (text.views if scanner.folds else text.views[:1])]
        items = [replace(text.item, text=view.text) for text, view in readings]
        started = time.perf_counter()
        status, found, detail = self._scan(entry, scanner, items)
        if status is Status.ERROR and len(texts) > 1:
            for text in texts:
                self._run(entry, scanner, [text])
            return
        ms = (time.perf_counter() - started) * 1000 / len(texts)
        for text in texts:
            text.runs.append(ScannerRun(scanner=entry.name, status=status, ms=ms, detail=detail))
            if status is not Status.OK and self.policy.fails_closed(scanner.categories):
                why = f"{entry.name} ended with {status}: {detail}"
                text.failed.append(Fired(rule="on_error", action=Action.BLOCK, why=why))
        for (text, view), findings in zip(readings, found, strict=False):
            for finding in findings:
                _add(text.findings, _in_original(replace(finding, scanner=entry.name), view))

    def _scan(
        self, entry: ScannerSettings, scanner: Scanner, items: list[ScanItem]
    ) -> tuple[Status, list[list[Finding]], str]:
        """Status, findings an item (none unless OK), and what went wrong."""
        left = self._left_behind[entry.name] = [thread for thread in self._left_behind[entry.name] if thread.is_alive()]
        if len(left) >= MAX_LEFT_BEHIND:
            return Status.TIMEOUT, [], "still busy with earlier texts"
        worker = self._worker()
        try:
            result = worker.run(partial(_answers, scanner, items), entry.timeout_ms / 1000 * max(1, len(items)))
        except TimeoutError:
            left.append(worker.thread)
            return Status.TIMEOUT, [], f"no answer after {entry.timeout_ms:g} ms a text"
        self._idle.append(worker)
        if isinstance(result, BaseException):  # the message may quote the text: only the kind is kept
            return Status.ERROR, [], type(result).__name__
        if result is None:
            return Status.ERROR, [], f"did not answer with one list of findings for each of {len(items)} texts"
        return Status.OK, result, ""

    def _worker(self) -> Worker:
        while True:
            try:
                worker = self._idle.pop()
            except IndexError:
                return Worker()
            if worker.thread.is_alive():  # in a forked process those of the parent are not
                return worker

    def _verdict(self, text: _Text, vault: Vault, own: bool | None = None, ours: bool | None = None) -> Verdict:
        policy, original, stage = self.policy, text.item.text, text.item.stage
        own = stage is Stage.INPUT if own is None else own
        ours = stage in OUTPUT_STAGES if ours is None else ours
        fired = [*text.failed, *policy.decide(text.findings, stage, text.earlier)]
        action = max((one.action for one in fired), default=Action.ALLOW)
        verdict = Verdict(
            action=action, text=original, stage=stage, findings=tuple(text.findings), fired=tuple(fired), runs=tuple(text.runs),
            policy_id=policy.id, policy_sha256=policy.sha256, request_id=uuid.uuid4().hex,
            text_sha256=hashlib.sha256(original.encode("utf-8", "surrogatepass")).hexdigest(),
        )  # fmt: skip
        if action >= Action.BLOCK:
            return replace(verdict, text=self._reply(fired, action))
        passed_on = SURROGATES.sub(
            "\ufffd", original
        )  # half a pair is no character: it is read and passed on as U+FFFD
        cuts = self.cuts(verdict, len(original))
        return replace(verdict, text=redact(passed_on, cuts, vault, own=own, ours=ours))

    def cuts(self, verdict: Verdict, length: int) -> list[Cut]:
        """What the redacting rules of a verdict take out of its text of `length` characters."""
        cuts = []
        for one in verdict.fired:
            rule = self.policy.rule(one.rule)
            if rule and rule.action is Action.REDACT:
                for index in one.findings:
                    found = verdict.findings[index]
                    cuts += cuts_of(found.spans, found.category, rule.redact, length)
        return cuts

    def _reply(self, fired: Sequence[Fired], action: Action) -> str:
        """What is said instead: the reply of the first rule that led to this action."""
        for one in fired:
            if one.action == action:
                rule = self.policy.rule(one.rule)
                return self.policy.replies[rule.reply if rule else "refuse"]
        return self.policy.replies["refuse"]


def _answers(scanner: Scanner, items: list[ScanItem]) -> list[list[Finding]] | None:
    """What a scanner says, read to its end here, in the worker: it may be a generator. None if it is not a list of findings an item."""
    said = scanner.scan(items)
    answers: list[list[Finding]] = []
    try:
        for findings in said:
            answers.append(list(islice(findings, MAX_FINDINGS + 1)))
            if len(answers) > len(items) or len(answers[-1]) > MAX_FINDINGS:
                return None
            if not all(isinstance(one, Finding) for one in answers[-1]):
                return None
    except TypeError:  # nothing to iterate over
        return None
    return answers if len(answers) == len(items) else None


def _in_original(finding: Finding, view: View) -> Finding:
    """The finding with its spans as offsets of the original; a decoded stretch as a whole is the stretch it came from."""
    if view.name == "raw":
        return finding
    spans = finding.spans
    if not spans and view.name != "folded":
        spans = (Span(start=0, end=len(view.text)),)
    moved = []
    for span in spans:
        start, end = view.to_original(span.start, span.end)
        moved.append(replace(span, start=start, end=end))
    return replace(finding, spans=tuple(moved), view=view.name)


def _add(findings: list[Finding], new: Finding) -> None:
    """Adds a finding; of the same thing seen in two readings, the higher score is kept."""
    for at, known in enumerate(findings):
        if (known.scanner, known.category, known.spans) == (new.scanner, new.category, new.spans):
            if new.score > known.score:
                findings[at] = new
            return
    findings.append(new)
