"""Which item an annotator gets next, and what an answer changes. Functions on one open write transaction.

`choose`: gold when due, now and then one's own item again, the random control slice, else the best open item: those with
labels already first (an item half done helps nobody), then by priority.

`hand_out`, `lease` and `record` end the transaction: writers take turns, so every round trip of one is waited for by all.
"""

import json
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

from plumbline.apps.label.store.accounts import Session, check_session
from plumbline.apps.label.store.answers import (
    COUNTED,
    Answer,
    RefusedError,
    by_response,
    by_slot,
    check_answer,
    passes_gold,
)
from plumbline.apps.label.store.database import Execute, Row, Statement
from plumbline.apps.label.store.items import LAST_HASH, LabelSettings, Terms, insert_event, log_event

FIRST, REPEAT, REVIEW = 0, 1, 2  # `assignment.round`: a first label, one's own item again, a reviewer's decision
GOLD_WARN, GOLD_PAUSE = (10, 0.8), (15, 0.6)  # after this many gold answers, below this pass rate


def choose(
    run: Execute, rng: random.Random, account_id: int, settings: LabelSettings, *, has_gold: bool
) -> tuple[list[Row], int, str] | None:
    """(rows of `select_item`, round, why): gold when due, sometimes one's own again, the control slice, else the best open item.

    has_gold: whether any gold item is open.
    """
    if has_gold and (gold := gold_due(run, rng, account_id, settings)):
        return run(*select_item("?", (gold,))), FIRST, "gold"
    if rng.random() < settings.repeat_share and (again := own_again(run, rng, account_id)):
        return run(*select_item("?", (again,))), REPEAT, "repeat"
    control_first = rng.random() < settings.control_share
    # Mostly the first; now and then a neighbour, so that annotators do not march in step.
    place = 0 if rng.random() < 0.9 else rng.randrange(8)
    for control in (1, 0) if control_first else (0, 1):
        for at in (place, 0) if place else (0,):  # near the queue's end there may be no neighbour
            # The offset stands in the text, where a plan for any values still knows it.
            best = (
                "(SELECT o.id FROM item o WHERE o.status = 'open' AND o.is_gold = 0 AND o.is_control = ?"
                " AND o.n_done + (SELECT count(*) FROM assignment a WHERE a.item_id = o.id AND a.state = 'leased'"
                "   AND a.round = 0) < o.target_labels"
                " AND NOT EXISTS (SELECT 1 FROM assignment a WHERE a.item_id = o.id AND a.account_id = ? AND a.round = 0"
                "   AND a.state <> 'expired')"
                f" ORDER BY o.n_done DESC, o.priority DESC, o.shuffle LIMIT 1 OFFSET {at})"
            )
            if answers := run(*select_item(best, (control, account_id))):
                return answers, FIRST, "control" if control else "active"
    return None


def select_item(which: str, values: Sequence[Any]) -> Statement:
    """An item's answers in canonical order, each row with what handing the item out depends on; no row where there is no item.

    which: its id as an SQL expression with `values`. `times_shown` and `last_order` are of its first labels.
    """
    first_labels = "FROM assignment a WHERE a.item_id = i.id AND a.round = 0"
    return (
        "SELECT r.id, r.item_id, r.text, r.model, r.finish_reason, i.kind, i.prompt_json, i.warning,"
        f" (SELECT count(*) {first_labels}) AS times_shown,"
        f" (SELECT a.order_json {first_labels} ORDER BY a.id DESC LIMIT 1) AS last_order"
        f" FROM item i JOIN response r ON r.item_id = i.id WHERE i.id = {which} ORDER BY r.idx",
        values,
    )


def gold_due(run: Execute, rng: random.Random, account_id: int, settings: LabelSettings) -> int | None:
    """An unseen gold item, once the annotator has done a random number of labels since the last one."""
    served = run(
        "SELECT count(*) AS n, max(a.id) AS last FROM assignment a JOIN item i ON i.id = a.item_id"
        " WHERE a.account_id = ? AND i.is_gold = 1",
        (account_id,),
    )[0]
    since = run(
        "SELECT count(*) AS n FROM assignment WHERE account_id = ? AND state = 'done' AND id > ?",
        (account_id, served["last"] or 0),
    )[0]["n"]
    gap = random.Random(f"{account_id}/{served['n']}").randint(*settings.gold_gap)
    if since < gap:
        return None
    rows = run(
        "SELECT id FROM item i WHERE is_gold = 1 AND status = 'open' AND NOT EXISTS (SELECT 1 FROM assignment a"
        " WHERE a.item_id = i.id AND a.account_id = ?) ORDER BY shuffle",
        (account_id,),
    )
    return rng.choice(rows)["id"] if rows else None


def own_again(run: Execute, rng: random.Random, account_id: int) -> int | None:
    """An own item from before the last 20, once 50 are done."""
    rows = run(
        "SELECT a.item_id FROM assignment a JOIN item i ON i.id = a.item_id WHERE a.account_id = ? AND a.state = 'done'"
        " AND i.is_gold = 0 AND i.status <> 'flagged' AND a.round = 0 AND NOT EXISTS (SELECT 1 FROM assignment b"
        " WHERE b.item_id = a.item_id AND b.account_id = ? AND b.round = 1) ORDER BY a.closed_at DESC",
        (account_id, account_id),
    )
    return rng.choice(rows[20:])["item_id"] if len(rows) >= 50 else None  # not the last 20: still remembered


def hand_out(
    run: Execute,
    rng: random.Random,
    now: float,
    terms: Terms,
    account_id: int,
    answers: list[Row],
    round_: int,
    reason: str,
) -> Row:
    """Leases the item of `answers` (rows of `select_item`) to an annotator, in an order of their own; returns the task."""
    ids, times_shown, last_order = [row["id"] for row in answers], answers[0]["times_shown"], answers[0]["last_order"]
    if round_ == REPEAT:
        own = "SELECT order_json FROM assignment WHERE item_id = ? AND account_id = ? AND round = 0"
        last_order = run(own, (answers[0]["item_id"], account_id))[0]["order_json"]
    order = side_order(rng, round_, ids, times_shown, json.loads(last_order or "[]"))
    return lease(run, now, terms, account_id, answers, round_, order, reason)


def side_order(rng: random.Random, round_: int, ids: list[int], times_shown: int, last_order: list[int]) -> list[int]:
    """Response ids by slot, in random order; reversed from one's own first time, and balanced within a pair.

    ids: of the item, in canonical order. times_shown, last_order: of its first labels; the order of REPEAT is one's own.
    """
    # Every second annotator of a pair sees the other side first.
    if round_ == REPEAT or len(ids) == 2 and times_shown % 2:
        return last_order[::-1]
    return rng.sample(ids, len(ids))


# What a task shows of an assignment besides its own columns.
_DRAFT = "(SELECT d.payload_json FROM draft d WHERE d.assignment_id = assignment.id) AS draft"
_SAID = "(SELECT j.answer_json FROM judgement j WHERE j.assignment_id = assignment.id AND j.is_current = 1) AS said"


def lease(
    run: Execute,
    now: float,
    terms: Terms,
    account_id: int,
    answers: list[Row],
    round_: int,
    order: list[int],
    reason: str,
) -> Row:
    """Hands the item of `answers` (rows of `select_item`) to an annotator and returns the task; an own expired lease revives.

    order: ids of answers by slot.
    """
    item_id, until = answers[0]["item_id"], now + terms.settings.lease_seconds
    row = run(
        "INSERT INTO assignment (item_id, account_id, round, state, lease_until, order_json, served_reason,"
        " guideline_version, served_at) VALUES (?, ?, ?, 'leased', ?, ?, ?, ?, ?)"
        " ON CONFLICT (item_id, account_id, round) DO UPDATE SET state = 'leased', lease_until = excluded.lease_until,"
        f" served_at = excluded.served_at RETURNING *, {_DRAFT}, {_SAID}",
        (item_id, account_id, round_, until, json.dumps(order), reason, terms.guideline_version, now),
    )[0]
    what = {"item": item_id, "why": reason, "order": json.loads(row["order_json"])}  # a revived lease keeps its order
    run.finish(insert_event(terms.last_hash, now, account_id, "serve", f"assignment/{row['id']}", what))
    return task_of(row, answers)


def select_task(account_id: int, item_id: int, round_: int) -> tuple[Statement, Statement]:
    """What `task_of` takes: the assignment, and its item."""
    own = f"SELECT *, {_DRAFT}, {_SAID} FROM assignment WHERE item_id = ? AND account_id = ? AND round = ?"
    return (own, (item_id, account_id, round_)), select_item("?", (item_id,))


def task_of(assignment: Row, answers: list[Row]) -> Row:
    """What the browser may see of an assignment: no model, no score, no gold, no canonical order."""
    item, draft, said = answers[0], assignment["draft"], assignment["said"]
    responses = {row["id"]: row for row in answers}
    order = json.loads(assignment["order_json"])
    return {
        "assignment": assignment["id"],
        "kind": item["kind"],
        "state": assignment["state"],
        "prompt": json.loads(item["prompt_json"]),
        "warning": item["warning"],
        "answers": [
            {"text": responses[r]["text"], "cut": responses[r]["finish_reason"] in ("length", "stopped")} for r in order
        ],
        "lease_until": assignment["lease_until"],
        "draft": json.loads(draft) if draft else None,
        "said": by_slot(json.loads(said), order) if said else None,
    }


def select_assignment(assignment_id: int) -> Statement:
    """An assignment with what its answer depends on; a row for each answer of its item, in canonical order."""
    return (
        "SELECT a.*, i.kind, i.is_gold, i.gold_json, i.target_labels, i.n_done, i.status,"
        " EXISTS (SELECT 1 FROM draft d WHERE d.assignment_id = a.id) AS has_draft,"
        f" r.id AS response_id, r.text, {LAST_HASH}"
        " FROM assignment a JOIN item i ON i.id = a.item_id JOIN response r ON r.item_id = i.id WHERE a.id = ? ORDER BY r.idx",
        (assignment_id,),
    )


def check_own(rows: list[Row], account_id: int, assignment_id: int) -> Row:
    """The first row of `select_assignment`; RefusedError where there is none or where it is another annotator's."""
    if not rows:
        raise RefusedError(404, f"no assignment {assignment_id}")
    if rows[0]["account_id"] != account_id:
        raise RefusedError(403, f"assignment {assignment_id} belongs to another annotator")
    return rows[0]


def record(
    run: Execute, now: float, account_id: int, assignment_id: int, request_id: str, answer: Answer,
    session: Session | None = None,
) -> Row:  # fmt: skip
    """Checks session and answer, stores it as the next revision and moves lease, counts and status; returns the receipt.

    A request id that is stored already gives its receipt and changes nothing.
    """
    account, found, said = run.together(
        ("SELECT active, token_version FROM account WHERE id = ?", (account_id,)),
        select_assignment(assignment_id),
        (
            "SELECT * FROM judgement WHERE request_id = ? OR (assignment_id = ? AND is_current = 1)",
            (request_id, assignment_id),
        ),
    )
    check_session(session, account)
    assignment = check_own(found, account_id, assignment_id)
    if earlier := [row for row in said if row["request_id"] == request_id]:
        if earlier[0]["assignment_id"] != assignment_id:
            raise RefusedError(409, "this request_id was used for another answer")
        return receipt(earlier[0], repeated=True)
    if assignment["state"] == "withdrawn":
        raise RefusedError(409, "this label was withdrawn")
    texts = {row["response_id"]: row["text"] for row in found}
    order = json.loads(assignment["order_json"])
    check_answer(answer, assignment["kind"], [texts[r] for r in order])
    stored = by_response(answer, order)
    before = said[0] if said else None
    late = assignment["state"] == "expired" or assignment["state"] == "leased" and assignment["lease_until"] <= now
    gold_pass = None
    if assignment["is_gold"] and answer.outcome in COUNTED:
        gold_pass = int(passes_gold(stored, json.loads(assignment["gold_json"]), list(texts)))
    event = stored | {"request_id": request_id, "order": order}
    previous = assignment["last_hash"] or ""
    changes = [insert_event(previous, now, account_id, "judgement", f"assignment/{assignment_id}", event)]
    counted = answer.outcome in COUNTED
    if before:
        changes.append(("UPDATE judgement SET is_current = 0 WHERE id = ?", (before["id"],)))
    if assignment["has_draft"]:
        changes.append(("DELETE FROM draft WHERE assignment_id = ?", (assignment_id,)))
    closed = "done" if counted else "skipped", now, assignment_id
    changes.append(("UPDATE assignment SET state = ?, closed_at = ? WHERE id = ?", closed))
    changes.append(
        (
            "INSERT INTO judgement (assignment_id, revision, is_current, request_id, outcome, winner_id, strength,"
            " answer_json, gold_pass, late, elapsed_ms, active_ms, guideline_version, event_seq, created_at)"
            " VALUES (?,?,1,?,?,?,?,?,?,?,?,?,?,(SELECT max(seq) FROM event),?) RETURNING *",
            (
                assignment_id,
                before["revision"] + 1 if before else 1,
                request_id,
                answer.outcome,
                stored["winner_id"],
                answer.strength,
                json.dumps(stored, ensure_ascii=False),
                gold_pass,
                int(late),
                answer.elapsed_ms,
                answer.active_ms,
                assignment["guideline_version"],
                now,
            ),
        )
    )
    if assignment["round"] == FIRST:
        counted_before = before is not None and before["outcome"] in COUNTED
        flagged, skipped = answer.outcome == "flag", answer.outcome == "skip"
        changes.append(update_count(run, assignment, counted - counted_before, flagged=flagged, skipped=skipped))
    elif assignment["round"] == REVIEW:
        settled = "UPDATE item SET status = 'complete' WHERE id = ? AND is_gold = 0", (assignment["item_id"],)
        changes.append(settled)
    if gold_pass is None:
        done = run.finish(*changes)
    else:
        done = run.together(*changes)
        check_gold_rate(run, now, account_id)
    return receipt(next(rows[0] for rows in done if rows), repeated=False)  # only the judgement returns a row


def update_count(
    run: Execute, assignment: Row, change: int, *, flagged: bool = False, skipped: bool = False
) -> Statement:
    """What keeps n_done and status of the item, run before the answer is stored.

    A flag takes an item out until a reviewer looks; so do as many skips as labels, the one to be stored included.
    """
    n_done = assignment["n_done"] + change
    status = assignment["status"]
    if assignment["is_gold"]:
        status = "flagged" if flagged else status  # gold never completes: everyone may get it
    elif flagged or (skipped and status == "open" and _skips(run, assignment) >= max(3, assignment["target_labels"])):
        status = "flagged"
    elif status in ("open", "complete"):
        status = "complete" if n_done >= assignment["target_labels"] else "open"
    return "UPDATE item SET n_done = ?, status = ? WHERE id = ?", (n_done, status, assignment["item_id"])


def _skips(run: Execute, assignment: Row) -> int:
    others = "SELECT count(*) AS n FROM assignment WHERE item_id = ? AND state = 'skipped' AND id <> ?"
    return 1 + run(others, (assignment["item_id"], assignment["id"]))[0]["n"]


def check_gold_rate(run: Execute, now: float, account_id: int) -> None:
    """Pauses an annotator whose gold answers go wrong; the labels stay, with weight 0 until a reviewer has looked."""
    row = run(
        "SELECT count(*) AS n, sum(j.gold_pass) AS passed FROM judgement j JOIN assignment a ON a.id = j.assignment_id"
        " WHERE a.account_id = ? AND j.is_current = 1 AND j.gold_pass IS NOT NULL",
        (account_id,),
    )[0]
    asked, rate = row["n"], row["passed"] / row["n"]
    if asked >= GOLD_PAUSE[0] and rate < GOLD_PAUSE[1]:
        run("UPDATE account SET paused = 1 WHERE id = ?", (account_id,))
        log_event(run, now, None, "paused", f"account/{account_id}", {"gold": asked, "rate": rate})
    elif asked >= GOLD_WARN[0] and rate < GOLD_WARN[1]:
        log_event(run, now, None, "gold_warning", f"account/{account_id}", {"gold": asked, "rate": rate})


def receipt(row: Row, *, repeated: bool) -> Row:
    """What a submit answers: which judgement holds the vote now."""
    return {
        "judgement": row["id"],
        "assignment": row["assignment_id"],
        "revision": row["revision"],
        "late": bool(row["late"]),
        "repeated": repeated,
    }


def withdraw(run: Execute, assignment: Row) -> None:
    """Takes an assignment's label out of the counts; its rows stay as they are."""
    said = run("SELECT outcome FROM judgement WHERE assignment_id = ? AND is_current = 1", (assignment["id"],))
    run("UPDATE judgement SET is_current = 0 WHERE assignment_id = ? AND is_current = 1", (assignment["id"],))
    run("UPDATE assignment SET state = 'withdrawn' WHERE id = ?", (assignment["id"],))
    run("DELETE FROM draft WHERE assignment_id = ?", (assignment["id"],))
    if said and said[0]["outcome"] in COUNTED and assignment["round"] == FIRST:
        run(*update_count(run, assignment, -1))


def _split(said: list[Row]) -> str:
    """How votes fall, without telling which answer has more: "2 for one answer, 1 for another, 1 tie"."""
    votes = Counter((row["outcome"], row["winner_id"]) for row in said if row["outcome"] in COUNTED)
    prefer = [n for (outcome, _), n in votes.most_common() if outcome == "prefer"]
    shown = [f"{n} for {'another' if at else 'one answer'}" for at, n in enumerate(prefer)]
    shown += [f"{n} {outcome.replace('_', ' ')}" for (outcome, _), n in votes.items() if outcome != "prefer"]
    return ", ".join(shown)


def needs_review(run: Execute, limit: int) -> list[Row]:
    """Flagged items, and complete ones whose annotators disagree, oldest first; each with how the votes fell."""
    items = run(
        "SELECT i.id, i.status, i.prompt_json FROM item i WHERE i.is_gold = 0 AND (i.status = 'flagged' OR"
        " (i.status = 'complete' AND NOT EXISTS (SELECT 1 FROM assignment r WHERE r.item_id = i.id AND r.round = 2"
        "   AND r.state = 'done')"
        "  AND (SELECT count(DISTINCT j.outcome || coalesce(CAST(j.winner_id AS TEXT), '')) FROM judgement j"
        "   JOIN assignment a ON a.id = j.assignment_id WHERE a.item_id = i.id AND a.round = 0 AND j.is_current = 1"
        "   AND j.outcome IN ('prefer', 'tie', 'both_bad', 'good', 'bad')) > 1)) ORDER BY i.status DESC, i.id LIMIT ?",
        (limit,),
    )
    for item in items:
        said = run(
            "SELECT j.outcome, j.winner_id, j.answer_json FROM judgement j JOIN assignment a ON a.id = j.assignment_id"
            " WHERE a.item_id = ? AND a.round = 0 AND j.is_current = 1 ORDER BY j.id",
            (item["id"],),
        )
        item["prompt"] = json.loads(item.pop("prompt_json"))[-1]["content"]
        item["votes"] = _split(said)
        item["reasons"] = [reason for row in said if (reason := json.loads(row["answer_json"])["reason"])]
    return items
