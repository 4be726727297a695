"""What an annotator can say about one item, and the rules a valid answer keeps.

The browser speaks in slots (0 is the left or first answer on that annotator's screen); the database speaks in response
ids. The order shown is fixed when the item is handed out, so a winner is never worked out from "left" and "right" later.
"""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

CRITERIA = ("fluency", "relevance", "safety", "toxicity")  # the axes of the composite reward; toxicity: 5 is worst
STRENGTHS = {1: "negligibly better", 2: "slightly better", 3: "better", 4: "significantly better"}
SKIP_REASONS = ("cannot judge the facts", "not my language", "unclear prompt", "do not want to read this", "other")
FLAG_REASONS = ("harmful content", "personal data", "broken or cut text", "duplicate", "other")
SPAN_LABELS = ("wrong", "unsafe", "irrelevant", "rude", "good")
MAX_TEXT = 20_000  # characters of a rationale, comment or corrected answer

Outcome = Literal["prefer", "tie", "both_bad", "rank", "good", "bad", "skip", "flag"]
COUNTED = ("prefer", "tie", "both_bad", "rank", "good", "bad")  # outcomes that count towards an item's target


class RefusedError(Exception):
    """A request that the store will not carry out; `status` is the HTTP status that says why."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, kw_only=True)
class Span:
    """A marked passage: offsets in Unicode code points of the shown answer, `quote` its text (a check on offsets)."""

    slot: int
    start: int
    end: int
    quote: str
    label: str
    comment: str = ""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One answer. `winner` and `strength` (1 to 4) belong to `prefer`; `ranking` to `rank`: slots in tiers, best first;
    `good` and `bad` are for an answer that stands alone.

    `both_bad` says that none of the answers is acceptable, also of more than two; it is no tie. `ratings` has one
    mapping a slot, criterion -> 1..5. `edit_text` corrects the answer in `edit_slot`.
    """

    outcome: Outcome
    winner: int | None = None
    strength: int | None = None
    ranking: list[list[int]] | None = None
    ratings: list[dict[str, int]] = field(default_factory=list)
    rationale: str = ""
    reason: str = ""
    edit_slot: int | None = None
    edit_text: str = ""
    spans: list[Span] = field(default_factory=list)
    elapsed_ms: int = 0
    active_ms: int = 0


def _need(condition: bool, rule: str) -> None:
    if not condition:
        raise RefusedError(422, rule)


def check_answer(answer: Answer, kind: str, texts: list[str]) -> None:
    """Raises RefusedError(422) with the rule that the answer breaks. `texts`: the answers in the order shown."""
    slots = set(range(len(texts)))
    pair = kind == "pair"
    if answer.outcome == "prefer":
        _need(pair, "outcome 'prefer' is for pairs; rank these answers")
        _need(answer.winner in slots, f"winner={answer.winner}: must be one of the slots {sorted(slots)}")
        _need(answer.strength in STRENGTHS, f"strength={answer.strength}: must be 1 to 4")
    else:
        _need(answer.winner is None and answer.strength is None, f"{answer.outcome!r} takes no winner and no strength")
    if answer.outcome in ("good", "bad"):
        _need(kind == "single", f"outcome {answer.outcome!r} is for a single answer; compare these")
    if answer.outcome == "both_bad":
        _need(kind != "single", "outcome 'both_bad' is for two answers and more; say 'bad'")
    if answer.outcome == "tie":
        _need(pair, "outcome 'tie' is for pairs; put ranked answers in one tier")
    if answer.outcome == "rank":
        _need(kind == "ranking", "outcome 'rank' is for three answers and more")
        placed = [slot for tier in answer.ranking or [] for slot in tier]
        _need(sorted(placed) == sorted(slots), f"ranking={answer.ranking}: must hold each of {sorted(slots)} once")
        _need(all(answer.ranking or [[]]), "ranking: an empty tier")
    else:
        _need(answer.ranking is None, f"{answer.outcome!r} takes no ranking")
    if answer.outcome in ("skip", "flag"):
        _need(bool(answer.reason.strip()), f"outcome {answer.outcome!r} needs a reason")
    _need(len(answer.ratings) in (0, len(texts)), f"ratings: {len(answer.ratings)} given for {len(texts)} answers")
    for rated in answer.ratings:
        for criterion, value in rated.items():
            _need(criterion in CRITERIA, f"criterion {criterion!r}: must be one of {', '.join(CRITERIA)}")
            _need(1 <= value <= 5, f"{criterion}={value}: must be 1 to 5")
    if answer.edit_slot is not None:
        _need(answer.edit_slot in slots, f"edit_slot={answer.edit_slot}: must be one of {sorted(slots)}")
        _need(bool(answer.edit_text.strip()), "edit_text is empty: write the corrected answer or leave edit_slot out")
    for span in answer.spans:
        _need(span.slot in slots, f"span slot={span.slot}: must be one of {sorted(slots)}")
        _need(0 <= span.start < span.end, f"span {span.start}..{span.end}: must be at least one character long")
        found = texts[span.slot][span.start : span.end]
        _need(found == span.quote, f"span {span.start}..{span.end} reads {found!r:.40}, not {span.quote!r:.40}")
        _need(span.label in SPAN_LABELS, f"span label {span.label!r}: must be one of {', '.join(SPAN_LABELS)}")
    _need(len(answer.spans) <= 100, f"{len(answer.spans)} spans: 100 at most")
    for text in (answer.rationale, answer.reason, answer.edit_text, *(span.comment for span in answer.spans)):
        _need(len(text) <= MAX_TEXT, f"a text of {len(text)} characters: {MAX_TEXT} at most")
        _need("\x00" not in text, "a text holds a zero byte")
    for name in ("elapsed_ms", "active_ms"):
        _need(0 <= getattr(answer, name) < 2**31, f"{name}={getattr(answer, name)}: must be 0 to 2147483647")


def by_response(answer: Answer, order: list[int]) -> dict[str, Any]:
    """The answer with response ids in place of slots, ready for JSON; `order[slot]` is the id shown there."""
    stored = asdict(answer)
    for name in ("elapsed_ms", "active_ms", "winner", "edit_slot"):
        del stored[name]
    stored["winner_id"] = None if answer.winner is None else order[answer.winner]
    stored["ranking"] = None if answer.ranking is None else [[order[s] for s in tier] for tier in answer.ranking]
    stored["ratings"] = {str(order[slot]): rated for slot, rated in enumerate(answer.ratings) if rated}
    stored["edit_id"] = None if answer.edit_slot is None else order[answer.edit_slot]
    stored["spans"] = [asdict(s) | {"response_id": order[s.slot]} for s in answer.spans]
    for span in stored["spans"]:
        del span["slot"]
    return stored


def by_slot(stored: dict[str, Any], order: list[int]) -> dict[str, Any]:
    """The inverse of `by_response`, for showing an earlier answer again (without the times)."""
    slot = {response: at for at, response in enumerate(order)}
    return {
        "outcome": stored["outcome"],
        "winner": slot.get(stored["winner_id"]),
        "strength": stored["strength"],
        "ranking": stored["ranking"] and [[slot[r] for r in tier] for tier in stored["ranking"]],
        "ratings": [stored["ratings"].get(str(r), {}) for r in order] if stored["ratings"] else [],
        "rationale": stored["rationale"],
        "reason": stored["reason"],
        "edit_slot": slot.get(stored["edit_id"]),
        "edit_text": stored["edit_text"],
        "spans": [
            {k: v for k, v in s.items() if k != "response_id"} | {"slot": slot[s["response_id"]]}
            for s in stored["spans"]
        ],
    }


def passes_gold(stored: dict[str, Any], gold: dict[str, Any], response_ids: list[int]) -> bool:
    """Whether an answer agrees with a gold item: {"winner": index} or {"outcome": "tie" | "both_bad"}.

    A ranking passes when the winner is alone in the first tier. Skipped gold is no answer and is never asked here.
    """
    if "winner" in gold:
        best = response_ids[gold["winner"]]
        return stored["winner_id"] == best or bool(stored["ranking"]) and stored["ranking"][0] == [best]
    return stored["outcome"] == gold["outcome"]
