"""Items, settings and the audit trail: the parts of a label database that both its queue and its store use."""

import hashlib
import json
import random
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from plumbline.apps.label.store.database import Execute, Row, Statement

MAX_ANSWERS = 6


@dataclass(frozen=True, kw_only=True)
class LabelSettings:
    """Settings of a label database, stored in it; `plumbline label settings NAME=VALUE` changes them."""

    target_labels: int = 2  # labels an item gets before it is complete
    lease_seconds: int = 1200
    control_share: float = 0.2  # of imported items: the random slice; also the share of serves from it
    gold_gap: tuple[int, int] = (8, 15)  # labels between two gold items, a new random number each time
    repeat_share: float = 0.04  # of serves: one's own earlier item with sides swapped, once 50 are done

    def __post_init__(self) -> None:
        if not 1 <= self.target_labels <= 50:
            raise ValueError(f"target_labels={self.target_labels}: must be 1 to 50")
        if not 600 <= self.lease_seconds <= 7 * 86400:
            raise ValueError(f"lease_seconds={self.lease_seconds}: must be 600 to 604800; background tabs tick slowly")
        if not (0 <= self.control_share <= 1 and 0 <= self.repeat_share <= 0.5):
            raise ValueError(
                f"control_share={self.control_share!r} must be in [0, 1] and repeat_share={self.repeat_share!r} "
                "in [0, 0.5]"
            )
        if not (len(self.gold_gap) == 2 and 1 <= self.gold_gap[0] <= self.gold_gap[1]):
            raise ValueError(f"gold_gap={self.gold_gap}: must be two numbers, 1 <= low <= high")


@dataclass(frozen=True, kw_only=True)
class NewResponse:
    """One answer of an item to import."""

    text: str
    model: str = ""
    params: dict[str, Any] = field(default_factory=dict)
    finish_reason: str = ""


@dataclass(frozen=True, kw_only=True)
class NewItem:
    """A prompt (messages that end with the user) with one to six answers, to import; one alone is judged good or bad.

    gold: {"winner": index} or {"outcome": "tie" | "both_bad"} makes it a gold item. warning: shown in place of the
    text until the annotator asks to see it.
    """

    prompt: list[dict[str, str]]
    responses: Sequence[NewResponse]
    source: str = ""
    warning: str = ""
    gold: dict[str, Any] | None = None
    target_labels: int | None = None
    tags: dict[str, str] = field(default_factory=dict)


def check_item(item: NewItem) -> None:
    """ValueError with the rule that an item to import breaks."""
    if not item.prompt or item.prompt[-1].get("role") != "user" or not item.prompt[-1].get("content", "").strip():
        raise ValueError(f"prompt={str(item.prompt)!r:.80}: must be messages that end with a text of the user")
    if not 1 <= len(item.responses) <= MAX_ANSWERS:
        raise ValueError(f"{len(item.responses)} answers: an item has 1 to {MAX_ANSWERS}")
    texts = [response.text for response in item.responses]
    if not all(text.strip() for text in texts):
        raise ValueError("an answer is empty; drop it, or the item")
    if len(set(texts)) < len(texts):
        raise ValueError(f"two answers are the same text ({max(texts, key=texts.count)!r:.60}); drop one of them")
    check_characters([item.prompt, texts, item.source, item.warning, item.tags])
    if item.gold is not None:
        winner, outcome = item.gold.get("winner"), item.gold.get("outcome")
        in_range = isinstance(winner, int) and 0 <= winner < len(texts)
        if len(texts) == 1:
            raise ValueError("gold: an item of one answer cannot be gold; give two answers and more")
        if set(item.gold) not in ({"winner"}, {"outcome"}) or not (in_range or outcome in ("tie", "both_bad")):
            raise ValueError(f"gold={item.gold}: takes {{'winner': index}} or {{'outcome': 'tie' or 'both_bad'}}")
    if item.target_labels is not None and not 1 <= item.target_labels <= 50:
        raise ValueError(f"target_labels={item.target_labels}: must be 1 to 50")


def check_characters(value: Any) -> None:
    """ValueError for texts, however nested, with a zero byte or half of a surrogate pair, which no database holds."""
    text = json.dumps(value, ensure_ascii=False)
    if re.search(r"(?<!\\)(?:\\\\)*\\u0000", text):  # as JSON writes it; a text may also say so in six characters
        raise ValueError("a text holds a zero byte; remove it")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(
            "a text holds half of a surrogate pair (half of an emoji), which is no character; remove it"
        ) from None


def prompt_hash(prompt: Sequence[dict[str, str]]) -> str:
    """What splits by prompt use: the same for a prompt whatever its answers, case and outer blanks."""
    return hashlib.sha256(json.dumps([m["content"].strip().lower() for m in prompt]).encode()).hexdigest()


def content_hash(item: NewItem) -> str:
    """The same for a prompt with the same answers in any order."""
    texts = sorted(response.text for response in item.responses)
    return hashlib.sha256(json.dumps([item.prompt, texts]).encode()).hexdigest()


def insert_item(run: Execute, rng: random.Random, now: float, item: NewItem, settings: LabelSettings) -> int | None:
    """The new id; None when the prompt with these answers is there already."""
    check_item(item)
    prompt = json.dumps(item.prompt, ensure_ascii=False)
    if run("SELECT 1 FROM item WHERE content_hash = ?", (content_hash(item),)):
        return None
    rows = run(
        "INSERT INTO item (kind, prompt_json, prompt_hash, content_hash, source, warning, is_gold, gold_json,"
        " is_control, target_labels, shuffle, tags_json, created_at) VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?) RETURNING id",
        (
            {1: "single", 2: "pair"}.get(len(item.responses), "ranking"),
            prompt,
            prompt_hash(item.prompt),
            content_hash(item),
            item.source,
            item.warning,
            int(item.gold is not None),
            None if item.gold is None else json.dumps(item.gold),
            int(item.gold is None and rng.random() < settings.control_share),
            item.target_labels or settings.target_labels,
            rng.random(),
            json.dumps(item.tags, ensure_ascii=False),
            now,
        ),
    )
    for idx, response in enumerate(item.responses):
        run(
            "INSERT INTO response (item_id, idx, text, model, params_json, finish_reason) VALUES (?,?,?,?,?,?)",
            (rows[0]["id"], idx, response.text, response.model, json.dumps(response.params), response.finish_reason),
        )
    return rows[0]["id"]


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What a task is handed out under, as of the open transaction. `last_hash`: of the audit trail, for its next event."""

    settings: LabelSettings
    guideline_version: int
    last_hash: str


# Columns for any SELECT: what `terms_of` reads.
LAST_HASH = "(SELECT hash FROM event ORDER BY seq DESC LIMIT 1) AS last_hash"
TERMS = (
    "(SELECT value FROM setting WHERE key = 'label_settings') AS label_settings,"
    f" (SELECT value FROM setting WHERE key = 'guideline_version') AS guideline_version, {LAST_HASH}"
)


def terms_of(row: Row) -> Terms:
    """The terms in a row with the columns of TERMS."""
    return Terms(
        settings=settings_of(json.loads(row["label_settings"] or "{}")),
        guideline_version=int(row["guideline_version"] or 1),
        last_hash=row["last_hash"] or "",
    )


def read_terms(run: Execute) -> Terms:
    """The terms in force."""
    return terms_of(run(f"SELECT {TERMS}")[0])


def read_settings(run: Execute) -> LabelSettings:
    """The settings in force."""
    return read_terms(run).settings


def get_setting(run: Execute, key: str) -> str | None:
    """A stored text, or None."""
    rows = run("SELECT value FROM setting WHERE key = ?", (key,))
    return rows[0]["value"] if rows else None


def put_setting(run: Execute, key: str, value: str) -> None:
    """Stores a text under a key."""
    run(
        "INSERT INTO setting (key, value) VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value",
        (key, value),
    )


def settings_of(stored: dict[str, Any]) -> LabelSettings:
    """Settings from plain JSON values; ValueError for an unknown name or a value that does not fit."""
    known = asdict(LabelSettings())
    for name, value in stored.items():
        if name not in known:
            raise ValueError(f"unknown setting {name!r}; known: {', '.join(known)}")
        if not _fits(value, known[name]):
            raise ValueError(f"{name}={value!r:.80}: must be like {known[name]!r}")
    if "gold_gap" in stored:
        stored = stored | {"gold_gap": tuple(stored["gold_gap"])}
    return LabelSettings(**stored)


def _fits(value: Any, like: Any) -> bool:
    """Whether a JSON value has the type of a setting: a whole number, a finite number, or as many whole numbers in a list."""
    if isinstance(like, tuple):
        return isinstance(value, list | tuple) and len(value) == len(like) and all(map(_fits, value, like))
    if isinstance(value, bool) or not isinstance(value, int | float if isinstance(like, float) else int):
        return False
    return abs(value) < 2**31


def log_event(
    run: Execute, now: float, account_id: int | None, kind: str, subject: str, payload: dict[str, Any]
) -> None:
    """Appends to the audit trail."""
    previous = run(f"SELECT {LAST_HASH}")[0]["last_hash"] or ""
    run(*insert_event(previous, now, account_id, kind, subject, payload))


def insert_event(
    previous: str, now: float, account_id: int | None, kind: str, subject: str, payload: dict[str, Any]
) -> Statement:
    """The statement that appends an event. previous: the hash of the last one ("" if none), which the new hash covers."""
    text = json.dumps(payload, ensure_ascii=False, sort_keys=True)
    digest = event_hash(previous, now, account_id, kind, subject, text)
    return (
        "INSERT INTO event (at, account_id, kind, subject, payload_json, prev_hash, hash) VALUES (?,?,?,?,?,?,?)",
        (now, account_id, kind, subject, text, previous, digest),
    )


def event_hash(previous: str, at: float, account_id: int | None, kind: str, subject: str, payload_json: str) -> str:
    """SHA-256 over an event and the hash of the one before."""
    return hashlib.sha256(json.dumps([previous, at, account_id, kind, subject, payload_json]).encode()).hexdigest()


def first_broken_event(events: Sequence[Row]) -> int | None:
    """The sequence number of the first event (in order, from the first) whose hash does not fit; None if all do."""
    previous = ""
    for e in events:
        fields = (e["at"], e["account_id"], e["kind"], e["subject"], e["payload_json"])
        if e["prev_hash"] != previous or e["hash"] != event_hash(previous, *fields):
            return e["seq"]
        previous = e["hash"]
    return None
