"""Checks an answer against documents: every claim gets a verdict, the passages it rests on, and what clashes.

    answer -> claims -> retrieval (words + meaning) -> entailment of each passage -> vetoes -> verdict with citations

Verdicts: SUPPORTED, REFUTED, NOT_ENOUGH_INFO, CONFLICTING (one passage supports, another refutes), NOT_CHECKABLE. Weak or empty
retrieval is NOT_ENOUGH_INFO, never support. A veto turns support into refutation, never the reverse. Every quote is a piece of
its document, character for character.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Literal

from plumbline.safety.findings import Category, Evidence, Finding, Span
from plumbline.safety.text.normalise import SURROGATES
from plumbline.safety.verifier.claims import Claim, sentence_spans, split_claims
from plumbline.safety.verifier.entailment import EntailmentModel, load_entailment
from plumbline.safety.verifier.knowledge import Hit, KnowledgeBase
from plumbline.safety.verifier.vetoes import Veto, name_clashes, stems, unmatched_numbers, vetoes

Action = Literal["annotate", "correct", "drop", "abstain"]
ABSTAIN = "I could not confirm enough of that from the documents I have, so I would rather not answer."


class FactVerdict(StrEnum):
    """What the documents say of a claim."""

    SUPPORTED = "supported"
    REFUTED = "refuted"
    NOT_ENOUGH_INFO = "not_enough_info"
    CONFLICTING = "conflicting"
    NOT_CHECKABLE = "not_checkable"


@dataclass(frozen=True, kw_only=True)
class VerifierSettings:
    """top: passages read a claim. support, refute: probabilities from which a passage counts. about: share of the claim's words (or
    cosine) below which a passage is about something else and its vetoes do not count. clash: the same, from which a veto refutes by itself:
    a head that looks for what the passage covers gives a changed number no support, and the rules alone know that it contradicts."""

    top: int = 5
    support: float = 0.5
    refute: float = 0.5
    about: float = 0.5
    clash: float = 0.8

    def __post_init__(self) -> None:
        if self.top < 1:
            raise ValueError(f"top={self.top} must be at least 1")
        for name in ("support", "refute", "about", "clash"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie in (0, 1]")


@dataclass(frozen=True, kw_only=True)
class CheckedClaim:
    """A claim, its verdict, the evidence for it, best first, and the vetoes that decided it."""

    claim: Claim
    verdict: FactVerdict
    score: float
    evidence: tuple[Evidence, ...] = ()
    vetoes: tuple[Veto, ...] = ()
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class FactReport:
    """The claims of one answer. `tier` says which entailment model ran and of what quality it is."""

    answer: str
    claims: tuple[CheckedClaim, ...]
    tier: str

    def counts(self) -> dict[str, int]:
        """Claims by verdict, all verdicts named."""
        found = Counter(checked.verdict for checked in self.claims)
        return {verdict.value: found[verdict] for verdict in FactVerdict}

    def findings(self, scanner: str = "facts") -> list[Finding]:
        """One finding for each refuted, conflicting or unsupported claim, for the policy to act on."""
        category = {
            FactVerdict.REFUTED: Category.FACT_REFUTED,
            FactVerdict.CONFLICTING: Category.FACT_CONFLICTING,
            FactVerdict.NOT_ENOUGH_INFO: Category.FACT_UNSUPPORTED,
        }
        return [
            Finding(
                scanner=scanner,
                version=self.tier,
                category=category[checked.verdict],
                score=checked.score,
                spans=(Span(start=checked.claim.start, end=checked.claim.end),),
                reason=checked.reason,
                evidence=checked.evidence,
            )
            for checked in self.claims
            if checked.verdict in category
        ]

    def to_json(self) -> dict[str, Any]:
        """Plain values, for a file or an endpoint."""
        return {"tier": self.tier, "counts": self.counts(), "claims": [asdict(checked) for checked in self.claims]}


class FactChecker:
    """Answers against one knowledge base."""

    def __init__(
        self,
        base: KnowledgeBase,
        *,
        entailment: EntailmentModel | None = None,
        settings: VerifierSettings | None = None,
    ) -> None:
        self.base, self.entailment = base, entailment or load_entailment()
        self.settings = settings or VerifierSettings()

    @property
    def tier(self) -> str:
        return f"{self.entailment.name} ({self.entailment.quality})"

    def check(self, answer: str) -> FactReport:
        """All claims of an answer at once."""
        answer = SURROGATES.sub("\ufffd", answer)  # half a surrogate pair is no character
        claims = split_claims(answer)
        worth = [claim for claim in claims if claim.worth]
        hits = self.base.search([claim.reading for claim in worth], self.settings.top)
        pairs = [(hit.passage.text, claim.reading) for claim, found in zip(worth, hits, strict=True) for hit in found]
        scores = iter(self.entailment.score(pairs).tolist())
        checked = {
            claim.start: judge(claim, [(hit, next(scores)) for hit in found], self.settings)
            for claim, found in zip(worth, hits, strict=True)
        }
        return FactReport(
            answer=answer,
            claims=tuple(
                checked[claim.start]
                if claim.worth
                else CheckedClaim(claim=claim, verdict=FactVerdict.NOT_CHECKABLE, score=0.0, reason=claim.why_not)
                for claim in claims
            ),
            tier=self.tier,
        )


def judge(claim: Claim, read: Sequence[tuple[Hit, Sequence[float]]], settings: VerifierSettings) -> CheckedClaim:
    """The verdict over passages with their (supported, not enough, refuted) probabilities."""
    supports: list[tuple[float, Evidence]] = []
    refutes: list[tuple[float, Evidence, list[Veto]]] = []
    missing: list[str] = []
    for hit, (yes, _, no) in read:
        passage = hit.passage.text
        about = max(_coverage(claim.reading, passage), hit.cosine)
        found = [*vetoes(claim.reading, passage), *name_clashes(claim.reading, passage, _others(read, hit))]
        if about < settings.about:
            continue
        if no >= settings.refute or (found and (no + yes >= settings.support or about >= settings.clash)):
            refutes.append((max(no, yes), _evidence(claim, hit, max(no, yes), "refutes"), found))
        elif yes >= settings.support and not found:
            absent = unmatched_numbers(claim.reading, passage)
            if absent:  # a number that the passage does not give is not supported by it
                missing += absent
            else:
                supports.append((yes, _evidence(claim, hit, yes, "supports")))
    supports.sort(key=lambda item: -item[0])
    refutes.sort(key=lambda item: -item[0])
    if supports and refutes:
        # passages of one document overlap: there the one that is nearer to the claim decides, and only others conflict
        sources = {item[1].doc_id for item in supports} ^ {item[1].doc_id for item in refutes}
        if sources and refutes[0][0] > 0.8 * supports[0][0]:
            evidence = (*(item[1] for item in supports), *(item[1] for item in refutes))
            return CheckedClaim(
                claim=claim,
                verdict=FactVerdict.CONFLICTING,
                score=min(supports[0][0], refutes[0][0]),
                evidence=evidence,
                vetoes=tuple(refutes[0][2]),
                reason="the documents disagree",
            )
        if supports[0][0] >= refutes[0][0]:
            refutes = []
    if refutes:
        score, _, found = refutes[0]
        reason = "; ".join(f"{v.kind}: {v.claim!r} against {v.passage!r}" for v in found) or "a passage says otherwise"
        return CheckedClaim(
            claim=claim,
            verdict=FactVerdict.REFUTED,
            score=score,
            evidence=tuple(item[1] for item in refutes),
            vetoes=tuple(found),
            reason=reason,
        )
    if supports:
        return CheckedClaim(
            claim=claim,
            verdict=FactVerdict.SUPPORTED,
            score=supports[0][0],
            evidence=tuple(item[1] for item in supports),
            reason="a passage says so",
        )
    best = max((yes for _, (yes, *_) in read), default=0.0)
    why = f"no passage gives {missing[0]}" if missing else "no passage is near enough"
    return CheckedClaim(claim=claim, verdict=FactVerdict.NOT_ENOUGH_INFO, score=1 - best, reason=why)


def _others(read: Sequence[tuple[Hit, Sequence[float]]], hit: Hit) -> list[str]:
    """Other passages of the same document among those read, and its name: a name in them is known to the document."""
    document = hit.passage.document
    return [document.doc_id, *(h.passage.text for h, _ in read if h.passage.document is document and h is not hit)]


def _coverage(claim: str, passage: str) -> float:
    words = set(stems(claim))
    return len(words & set(stems(passage))) / max(1, len(words))


def _evidence(claim: Claim, hit: Hit, score: float, stance: str) -> Evidence:
    """The sentence of the passage that shares most words with the claim."""
    passage = hit.passage
    start, end = max(
        sentence_spans(passage.text) or [(0, len(passage.text))],
        key=lambda span: _coverage(claim.reading, passage.text[slice(*span)]),
    )
    start, end = passage.start + start, passage.start + end
    return Evidence(
        doc_id=passage.document.doc_id,
        doc_sha256=passage.document.sha256,
        start=start,
        end=end,
        quote=passage.document.text[start:end],
        score=round(float(score), 4),
        stance=stance,
    )


def act(report: FactReport, action: Action, *, least_supported: float = 0.5) -> str:
    """The answer after an action on its claims.

    annotate   "[1]" after supported claims, "[disputed: ...]" after refuted and conflicting ones, "[unverified]", and the sources below
    correct    where a number, date or name is all that clashes, what the best passage says is put in; then as drop
    drop       sentences with a refuted or conflicting claim are left out; nothing left gives `ABSTAIN`
    abstain    the answer as it is where nothing is refuted and at least `least_supported` of the checkable claims is
               supported, else `ABSTAIN`
    """
    if action == "annotate":
        return _annotated(report)
    if action == "abstain":
        counts = report.counts()
        checkable = len(report.claims) - counts["not_checkable"]
        good = counts["refuted"] + counts["conflicting"] == 0 and counts["supported"] >= least_supported * checkable
        return report.answer if good else ABSTAIN
    if action not in ("correct", "drop"):
        raise ValueError(f"action {action!r} must be one of annotate, correct, drop, abstain")
    edits: list[tuple[int, int, str]] = []
    sentences = sentence_spans(report.answer)
    for checked in report.claims:
        if checked.verdict not in (FactVerdict.REFUTED, FactVerdict.CONFLICTING):
            continue
        mended = _mended(checked) if action == "correct" and checked.verdict is FactVerdict.REFUTED else None
        if mended is not None:
            edits.append((checked.claim.start, checked.claim.end, mended))
        else:
            edits.append(next((a, b, "") for a, b in sentences if a <= checked.claim.start and checked.claim.end <= b))
    text, before = report.answer, math.inf
    for start, end, new in sorted(set(edits), reverse=True):
        if end <= before:
            text = text[:start].rstrip(" ") + text[end:] if not new else text[:start] + new + text[end:]
            before = start
    return text.strip() or ABSTAIN


def _mended(checked: CheckedClaim) -> str | None:
    text = checked.claim.text
    for veto in checked.vetoes:
        if veto.kind == "negation" or text.count(veto.claim) != 1:
            return None
        text = text.replace(veto.claim, veto.passage)
    return text if checked.vetoes else None


def _annotated(report: FactReport) -> str:
    sources: dict[tuple[str, str], int] = {}
    text, shift = report.answer, 0
    for checked in report.claims:
        numbers = [
            sources.setdefault((e.doc_id, e.quote), len(sources) + 1)
            for e in checked.evidence[:2]
            if checked.verdict is not FactVerdict.NOT_CHECKABLE
        ]
        cited = "".join(f"[{number}]" for number in numbers)
        note = {
            FactVerdict.SUPPORTED: f" {cited}",
            FactVerdict.REFUTED: f" [disputed: {checked.reason}]{cited}",
            FactVerdict.CONFLICTING: f" [sources disagree]{cited}",
            FactVerdict.NOT_ENOUGH_INFO: " [unverified]",
            FactVerdict.NOT_CHECKABLE: "",
        }[checked.verdict]
        at = checked.claim.end + shift
        text, shift = text[:at] + note + text[at:], shift + len(note)
    listed = [f'[{number}] {doc_id}: "{quote}"' for (doc_id, quote), number in sources.items()]
    return "\n".join([text, "", *listed]) if listed else text
