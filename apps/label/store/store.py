"""What the labelling app does to its database, one method and one transaction each.

An annotator claims an item and gets a lease on it; the lease is theirs through reloads, restarts and other tabs until it
runs out. A submit carries a request id made by the client: sent twice, it is stored once. Nothing that was said is ever
changed: another answer is another revision, and every step is an event in a chain of hashes.

Departs from the usual: an item belongs to the random control slice from the moment it is imported (a draw of its own,
independent of any reward model), where others draw at serving time from what active sampling has left over. Win rates
and agreement of the slice are then those of a random sample, however the rest was chosen.
"""

import json
import math
import random
import secrets
import time
from collections.abc import Callable, Iterable
from typing import Any

from plumbline.apps.label.store import queue
from plumbline.apps.label.store.accounts import (
    Account,
    Session,
    account_of,
    check_password_rule,
    check_session,
    insert_account,
    password_hasher,
)
from plumbline.apps.label.store.answers import Answer, RefusedError
from plumbline.apps.label.store.database import Database, Execute, Row
from plumbline.apps.label.store.items import (
    TERMS,
    LabelSettings,
    NewItem,
    check_characters,
    content_hash,
    first_broken_event,
    get_setting,
    insert_item,
    log_event,
    put_setting,
    read_settings,
    read_terms,
    settings_of,
    terms_of,
)

MAX_DRAFT = 200_000  # characters
# Columns for a SELECT FROM account c: labels of the account, and those closed after a time, its one value.
OWN_COUNTS = (
    "(SELECT count(*) FROM assignment b WHERE b.account_id = c.id AND b.state = 'done') AS done,"
    " (SELECT count(*) FROM assignment b WHERE b.account_id = c.id AND b.state = 'done' AND b.closed_at > ?) AS hour"
)
QUEUE_COUNTS_AGE = 2.0  # seconds that counts of the whole queue are shown again before they are read anew


class LabelStore:
    """The store of one project. RefusedError carries the HTTP status that fits; ValueError is for what an admin typed.

    `account_id` says who acts; whether they may is checked by the caller for roles (label_api.py) and here for leases.
    """

    def __init__(
        self, database: Database, *, clock: Callable[[], float] = time.time, seed: int | None = None, hasher: Any = None
    ) -> None:
        self.database, self.clock, self.rng = database, clock, random.Random(seed)
        self._hasher = hasher or password_hasher()
        self._queue_counts: tuple[float, Row] = (-math.inf, {})  # when read, what: each takes a walk through all items
        first = {"session_key": secrets.token_urlsafe(32), "guidelines": "", "guideline_version": "1"}
        with database.write() as run:
            for key, value in first.items():
                run("INSERT INTO setting (key, value) VALUES (?, ?) ON CONFLICT (key) DO NOTHING", (key, value))
        # What an unknown name is checked against, so that it takes as long as a wrong password.
        self._nobody = self._hasher.hash(secrets.token_hex(16))

    # Settings and guidelines

    def setting(self, key: str) -> str | None:
        """A stored text, or None."""
        with self.database.read() as run:
            return get_setting(run, key)

    def settings(self) -> LabelSettings:
        """The settings in force."""
        with self.database.read() as run:
            return read_settings(run)

    def change_settings(self, account_id: int | None, changes: dict[str, Any]) -> LabelSettings:
        """Stores changed settings; ValueError for a name or a value that does not fit."""
        with self.database.write() as run:
            stored = json.loads(get_setting(run, "label_settings") or "{}") | changes
            settings = settings_of(stored)
            put_setting(run, "label_settings", json.dumps(stored))
            log_event(run, self.clock(), account_id, "settings", "settings", changes)
        return settings

    def guidelines(self) -> tuple[int, str]:
        """(version, Markdown text)."""
        with self.database.read() as run:
            return read_terms(run).guideline_version, get_setting(run, "guidelines") or ""

    def change_guidelines(self, account_id: int | None, text: str) -> int:
        """Stores new guidelines; returns their version, which is kept with every label from now on."""
        check_characters(text)
        with self.database.write() as run:
            version, old = read_terms(run).guideline_version, get_setting(run, "guidelines")
            if text != old:
                version += bool(old)
                put_setting(run, "guidelines", text)
                put_setting(run, "guideline_version", str(version))
                log_event(run, self.clock(), account_id, "guidelines", f"version/{version}", {"text": text})
        return version

    # Accounts

    def add_account(self, name: str, password: str, role: str, *, by: int | None = None) -> Account:
        """A new account; ValueError for a name that is taken, an unknown role or a short password."""
        hashed = self._hasher.hash(check_password_rule(password))
        with self.database.write() as run:
            account = insert_account(run, name, hashed, role, self.clock())
            log_event(run, self.clock(), by, "account", f"account/{account.id}", {"name": name, "role": role})
        return account

    def check_password(self, name: str, password: str) -> Account | None:
        """The account when name and password fit and it is active."""
        from argon2.exceptions import VerificationError

        with self.database.read() as run:
            rows = run("SELECT * FROM account WHERE name = ?", (name.replace("\x00", ""),))
        try:
            self._hasher.verify(rows[0]["pw_hash"] if rows else self._nobody, password)
        except VerificationError:
            return None
        return account_of(rows[0]) if rows and rows[0]["active"] else None

    def account_of(self, session: Session) -> Account | None:
        """Whose session it is; None where it has ended."""
        rows = self.database.query("SELECT * FROM account WHERE id = ?", (session.account_id,))
        return account_of(rows[0]) if session.holds(rows) else None

    def end_sessions(self, session: Session) -> None:
        """Ends all sessions of the account, on the server: a copy of the cookie is worth nothing from now on."""
        with self.database.write() as run:
            rows = run("SELECT * FROM account WHERE id = ?", (session.account_id,))
            if session.holds(rows):
                run("UPDATE account SET token_version = token_version + 1 WHERE id = ?", (session.account_id,))
                log_event(run, self.clock(), session.account_id, "sign-out", f"account/{session.account_id}", {})

    def accounts(self) -> list[Account]:
        """All accounts, by name."""
        with self.database.read() as run:
            return [account_of(row) for row in run("SELECT * FROM account ORDER BY name")]

    def change_account(
        self,
        account_id: int,
        *,
        by: int | None = None,
        role: str | None = None,
        active: bool | None = None,
        paused: bool | None = None,
        password: str | None = None,
    ) -> Account:
        """Changes what is not None. A new role, password or closing ends the account's sessions."""
        hashed = None if password is None else self._hasher.hash(check_password_rule(password))
        with self.database.write() as run:
            if not run("SELECT 1 FROM account WHERE id = ?", (account_id,)):
                raise RefusedError(404, f"no account {account_id}")
            admins = run("SELECT id FROM account WHERE role = 'admin' AND active = 1")
            if [row["id"] for row in admins] == [account_id] and (role not in (None, "admin") or active is False):
                raise RefusedError(409, "this is the last admin; make another one first")
            rows = run(
                "UPDATE account SET role = coalesce(?, role), active = coalesce(?, active), paused = coalesce(?, paused),"
                " pw_hash = coalesce(?, pw_hash), token_version = token_version + ? WHERE id = ? RETURNING *",
                (
                    role,
                    None if active is None else int(active),
                    None if paused is None else int(paused),
                    hashed,
                    int(not (role is None and active is None and password is None)),
                    account_id,
                ),
            )
            changes = {"role": role, "active": active, "paused": paused, "password": password and "changed"}
            shown = {name: value for name, value in changes.items() if value is not None}
            log_event(run, self.clock(), by, "account", f"account/{account_id}", shown)
            return account_of(rows[0])

    # Items

    def add_items(self, items: Iterable[NewItem], *, by: int | None = None) -> tuple[int, int]:
        """(added, left out because prompt and answers are there already). One transaction: all or nothing."""
        added = doubles = 0
        with self.database.write() as run:
            settings = read_settings(run)
            for item in items:
                is_new = insert_item(run, self.rng, self.clock(), item, settings) is not None
                added, doubles = added + is_new, doubles + (not is_new)
            log_event(run, self.clock(), by, "import", "items", {"added": added, "doubles": doubles})
        return added, doubles

    def add_arena_item(self, account_id: int, item: NewItem, order: list[int]) -> Row:
        """Stores a pair that the annotator has just watched, leased to them as shown; returns the task.

        `order` holds indices of `item.responses` by slot.
        """
        with self.database.write() as run:
            item_id = insert_item(run, self.rng, self.clock(), item, read_settings(run))
            if item_id is None:
                raise RefusedError(409, "this prompt with these answers is in the queue already; change the prompt")
            answers = run(*queue.select_item("?", (item_id,)))
            by_slot = [answers[index]["id"] for index in order]
            return queue.lease(run, self.clock(), read_terms(run), account_id, answers, queue.FIRST, by_slot, "arena")

    def add_thumb(self, account_id: int, item: NewItem, *, good: bool, request_id: str) -> Row:
        """Stores what the account thinks of one answer that it was given (`plumbline chat`); returns the receipt.

        Another thumb on the same answer is a revision, as of any other label. Two transactions: a lease that was left
        without its answer in between is found by the next thumb.
        """
        with self.database.write() as run:
            item_id = insert_item(run, self.rng, self.clock(), item, read_settings(run))
            if item_id is None:
                item_id = run("SELECT id FROM item WHERE content_hash = ?", (content_hash(item),))[0]["id"]
            own = "SELECT id FROM assignment WHERE item_id = ? AND account_id = ? AND round = 0"
            if not run(own, (item_id, account_id)):
                answers = run(*queue.select_item("?", (item_id,)))
                queue.hand_out(run, self.rng, self.clock(), read_terms(run), account_id, answers, queue.FIRST, "chat")
        answer = Answer(outcome="good" if good else "bad")
        with self.database.write() as run:
            assignment = run(own, (item_id, account_id))[0]["id"]
            return queue.record(run, self.clock(), account_id, assignment, request_id, answer)

    def set_priorities(self, priorities: dict[int, float], *, model: str, by: int | None = None) -> None:
        """Sets the priority of items (higher is served earlier) and logs which model gave them."""
        with self.database.write() as run:
            for item_id, priority in priorities.items():
                run("UPDATE item SET priority = ? WHERE id = ?", (priority, item_id))
            log_event(run, self.clock(), by, "priorities", f"model/{model}", {"items": len(priorities)})

    def set_scores(self, scores: dict[int, float], *, model: str) -> None:
        """Sets the reward-model score of responses."""
        with self.database.write() as run:
            for response_id, score in scores.items():
                run("UPDATE response SET score = ?, scored_by = ? WHERE id = ?", (score, model, response_id))

    def set_item_status(self, item_id: int, status: str, *, by: int) -> None:
        """A reviewer puts an item back (`open`, `complete` if it has its labels) or takes it out (`retired`)."""
        if status not in ("open", "retired"):
            raise RefusedError(422, f"status={status!r}: must be 'open' or 'retired'")
        with self.database.write() as run:
            rows = run("SELECT n_done, target_labels FROM item WHERE id = ?", (item_id,))
            if not rows:
                raise RefusedError(404, f"no item {item_id}")
            full = status == "open" and rows[0]["n_done"] >= rows[0]["target_labels"]
            run("UPDATE item SET status = ? WHERE id = ?", ("complete" if full else status, item_id))
            log_event(run, self.clock(), by, "item", f"item/{item_id}", {"status": status})

    # The annotator's day

    def claim(self, account_id: int) -> Row | None:
        """The annotator's next task, or None when there is none for them. A live lease of theirs comes first."""
        return self.next_task(account_id)["task"]

    def next_task(self, account_id: int, session: Session | None = None) -> Row:
        """{"task": see `claim`, "progress": see `progress`}. session: RefusedError(401) where it has ended."""
        queue_counts = self._counts_of_queue(self.clock())
        with self.database.write() as run:
            now = self.clock()  # once it is our turn: the trail's times follow its order
            rows = run(
                f"SELECT {TERMS}, {OWN_COUNTS}, c.paused, c.active, c.token_version, a.id, a.item_id, a.round,"
                " EXISTS (SELECT 1 FROM assignment WHERE state = 'leased' AND lease_until <= ?) AS some_ran_out,"
                " EXISTS (SELECT 1 FROM item WHERE status = 'open' AND is_gold = 1) AS has_gold"
                " FROM account c LEFT JOIN assignment a ON a.account_id = c.id AND a.state = 'leased'"
                " AND a.lease_until > ? AND a.round <> ? WHERE c.id = ? ORDER BY a.served_at LIMIT 1",
                (now - 3600, now, now, queue.REVIEW, account_id),
            )
            check_session(session, rows)
            own, terms = rows[0], terms_of(rows[0])
            progress = {"done": own["done"], "hour": own["hour"]} | queue_counts
            if own["paused"]:
                raise RefusedError(
                    403, "labelling is paused for this account until a reviewer has looked at its answers"
                )
            if own["id"] is not None:
                until = now + terms.settings.lease_seconds
                longer = "UPDATE assignment SET lease_until = ? WHERE id = ?", (until, own["id"])
                _, (assignment,), answers = run.finish(
                    longer, *queue.select_task(account_id, own["item_id"], own["round"])
                )
                return {"task": queue.task_of(assignment, answers), "progress": progress}
            if own["some_ran_out"]:
                run("UPDATE assignment SET state = 'expired' WHERE state = 'leased' AND lease_until <= ?", (now,))
            chosen = queue.choose(run, self.rng, account_id, terms.settings, has_gold=bool(own["has_gold"]))
            task = chosen and queue.hand_out(run, self.rng, now, terms, account_id, *chosen)
            return {"task": task, "progress": progress}

    def submit(
        self, account_id: int, assignment_id: int, request_id: str, answer: Answer, session: Session | None = None
    ) -> Row:
        """Stores an answer once. The same request id again gives the first receipt; another answer is a revision.

        A lease that ran out is no reason to refuse: the answer is kept and marked late. session: see `next_task`.
        """
        if not 8 <= len(request_id) <= 100 or not request_id.isascii() or not request_id.isprintable():
            raise RefusedError(422, "request_id: must be 8 to 100 printable ASCII characters")
        with self.database.write() as run:
            return queue.record(run, self.clock(), account_id, _key(assignment_id), request_id, answer, session)

    def heartbeat(self, account_id: int, assignment_id: int) -> float:
        """Extends a live lease; returns until when."""
        with self.database.write() as run:
            assignment = self._own(run, account_id, assignment_id)
            until = self.clock() + read_settings(run).lease_seconds
            if assignment["state"] != "leased":
                return assignment["lease_until"]
            run("UPDATE assignment SET lease_until = ? WHERE id = ?", (until, assignment_id))
            return until

    def save_draft(self, account_id: int, assignment_id: int, payload: dict[str, Any]) -> None:
        """Keeps an unfinished answer; it is shown again after a reload, on any machine."""
        check_characters(payload)
        text = json.dumps(payload, ensure_ascii=False)
        if len(text) > MAX_DRAFT:
            raise RefusedError(422, f"the draft has {len(text)} characters; {MAX_DRAFT} at most")
        with self.database.write() as run:
            if self._own(run, account_id, assignment_id)["state"] == "withdrawn":
                raise RefusedError(409, "this label was withdrawn")
            run(
                "INSERT INTO draft (assignment_id, payload_json, at) VALUES (?, ?, ?) ON CONFLICT (assignment_id)"
                " DO UPDATE SET payload_json = excluded.payload_json, at = excluded.at",
                (assignment_id, text, self.clock()),
            )

    def undo(self, account_id: int) -> Row:
        """The task answered last, with what was said; it counts as it is until another answer is sent."""
        with self.database.read() as run:
            rows = run(
                "SELECT item_id, round FROM assignment WHERE account_id = ? AND state IN ('done', 'skipped')"
                " ORDER BY closed_at DESC, id DESC LIMIT 1",
                (account_id,),
            )
            if not rows:
                raise RefusedError(404, "nothing to undo: no answer was sent yet")
            (assignment,), answers = run.together(*queue.select_task(account_id, rows[0]["item_id"], rows[0]["round"]))
            return queue.task_of(assignment, answers)

    def withdraw(self, account_id: int, assignment_id: int) -> None:
        """Takes a label back for good: it leaves counts and exports, and the item goes to somebody else."""
        with self.database.write() as run:
            assignment = self._own(run, account_id, assignment_id)
            queue.withdraw(run, assignment)
            log_event(run, self.clock(), account_id, "withdraw", f"assignment/{assignment_id}", {})

    def names(self, account_id: int, assignment_id: int) -> list[str]:
        """The models behind the answers by slot, once one's own vote is in and only for pairs of the arena."""
        with self.database.read() as run:
            assignment = self._own(run, account_id, assignment_id)
            if assignment["state"] != "done" or assignment["served_reason"] != "arena":
                raise RefusedError(403, "names are shown after the vote, for pairs of the arena")
            models = {row["id"]: row["model"] for row in run(*queue.select_item("?", (assignment["item_id"],)))}
            return [models[r] for r in json.loads(assignment["order_json"])]

    def progress(self, account_id: int) -> Row:
        """Counts for the page: own labels, own labels of the last hour, and the queue as of the last second or two."""
        now = self.clock()
        own = self.database.query(f"SELECT {OWN_COUNTS} FROM account c WHERE c.id = ?", (now - 3600, account_id))[0]
        return own | self._counts_of_queue(now)

    def _counts_of_queue(self, now: float) -> Row:
        if not 0 <= now - self._queue_counts[0] < QUEUE_COUNTS_AGE:
            counts = "SELECT count(*) AS items, coalesce(sum(CASE WHEN status = 'complete' THEN 1 ELSE 0 END), 0) AS complete"
            self._queue_counts = now, self.database.query(f"{counts} FROM item WHERE is_gold = 0")[0]
        return self._queue_counts[1]

    # Review and audit

    def review_queue(self, limit: int = 100) -> list[Row]:
        """Items that need a reviewer: flagged, or complete with counted votes that do not agree; oldest first."""
        with self.database.read() as run:
            return queue.needs_review(run, limit)

    def open_review(self, account_id: int, item_id: int) -> Row:
        """A task of the reviewer's own on this item; their answer settles it. Others' votes are not shown before."""
        with self.database.write() as run:
            answers = run(*queue.select_item("?", (item_id,)))
            if not answers:
                raise RefusedError(404, f"no item {item_id}")
            terms = read_terms(run)
            return queue.hand_out(run, self.rng, self.clock(), terms, account_id, answers, queue.REVIEW, "review")

    def events(self, after: int = 0, limit: int = 1000) -> list[Row]:
        """The audit trail from sequence number `after` on."""
        with self.database.read() as run:
            return run("SELECT * FROM event WHERE seq > ? ORDER BY seq LIMIT ?", (after, limit))

    def broken_event(self) -> int | None:
        """The first event whose hash does not fit, or None: somebody changed the database behind the app's back."""
        with self.database.read() as run:
            return first_broken_event(run("SELECT * FROM event ORDER BY seq"))

    def _own(self, run: Execute, account_id: int, assignment_id: int) -> Row:
        return queue.check_own(run(*queue.select_assignment(_key(assignment_id))), account_id, assignment_id)


def _key(number: int) -> int:
    """The number, or 0, which no row has, where it is beyond what PostgreSQL holds as a key."""
    return number if number < 2**31 else 0
