"""The label store: leases, exactly-once submits, gold, control slice, revisions, audit. Each test on both databases."""

import json
import multiprocessing
import sqlite3

import pytest

from plumbline.apps.label.store.answers import Answer, RefusedError, Span, check_answer
from plumbline.apps.label.store.database import SQLiteDatabase, open_database
from plumbline.apps.label.store.items import LabelSettings, NewItem, NewResponse, first_broken_event
from plumbline.apps.label.store.queue import needs_review
from plumbline.apps.label.store.store import QUEUE_COUNTS_AGE, LabelStore
from tests.apps.conftest import FAST_HASHER, PASSWORD, pair

LEFT = Answer(outcome="prefer", winner=0, strength=3)
TIE = Answer(outcome="tie")


def rows(store, statement, values=()):
    with store.database.read() as run:
        return run(statement, values)


def say(store, account, answer, request_id=None):
    """Claims and answers; returns the task."""
    task = store.claim(account.id)
    store.submit(account.id, task["assignment"], request_id or f"request-{account.id}-{task['assignment']}", answer)
    return task


def refused(status):
    return pytest.raises(RefusedError, check=lambda error: error.status == status)


@pytest.fixture
def plain(store):
    """No gold, no repeats, no control slice: what is served is what priority says."""
    store.change_settings(None, {"control_share": 0.0, "repeat_share": 0.0, "target_labels": 2})
    return store


def test_a_task_shows_texts_and_nothing_of_the_models(plain, make_account):
    plain.add_items([pair(1)])
    task = plain.claim(make_account("ann").id)
    assert {a["text"] for a in task["answers"]} == {"first 1", "second 1"}
    shown = json.dumps(task)
    assert "red" not in shown and "blue" not in shown and "gold" not in shown and "idx" not in shown


def test_claiming_again_gives_the_same_task_and_two_annotators_share_an_item_up_to_its_target(plain, make_account):
    plain.add_items([pair(1)])
    ann, bob, cyd = (make_account(name) for name in ("ann", "bob", "cyd"))
    first = plain.claim(ann.id)
    assert plain.claim(ann.id)["assignment"] == first["assignment"]
    assert plain.claim(bob.id)["assignment"] != first["assignment"]
    assert plain.claim(cyd.id) is None  # two live leases are two labels to come


def test_a_lease_that_runs_out_frees_the_item_and_a_late_answer_is_kept_and_marked(plain, make_account, clock):
    plain.change_settings(None, {"target_labels": 1})
    plain.add_items([pair(1)])
    ann, bob = make_account("ann"), make_account("bob")
    task = plain.claim(ann.id)
    assert plain.claim(bob.id) is None
    clock.now += 1201
    assert plain.claim(bob.id) is not None
    receipt = plain.submit(ann.id, task["assignment"], "late-request", LEFT)
    assert receipt["late"]
    assert rows(plain, "SELECT n_done, status FROM item")[0] == {"n_done": 1, "status": "complete"}


def test_ones_own_expired_lease_is_taken_up_again_with_the_same_sides(plain, make_account, clock):
    plain.add_items([pair(1)])
    ann = make_account("ann")
    before = plain.claim(ann.id)
    clock.now += 5000
    after = plain.claim(ann.id)
    assert (after["assignment"], after["answers"]) == (before["assignment"], before["answers"])


def test_a_heartbeat_extends_the_lease(plain, make_account, clock):
    plain.change_settings(None, {"target_labels": 1})
    plain.add_items([pair(1)])
    ann, bob = make_account("ann"), make_account("bob")
    task = plain.claim(ann.id)
    for _ in range(3):
        clock.now += 1000
        plain.heartbeat(ann.id, task["assignment"])
    assert plain.claim(bob.id) is None


def test_the_same_request_id_is_stored_once_and_a_new_one_is_a_revision(plain, make_account):
    plain.add_items([pair(1), pair(2)])
    ann = make_account("ann")
    task = plain.claim(ann.id)
    first = plain.submit(ann.id, task["assignment"], "request-1", LEFT)
    again = plain.submit(ann.id, task["assignment"], "request-1", TIE)  # a retry: what it says now is not looked at
    assert again == first | {"repeated": True}
    revised = plain.submit(ann.id, task["assignment"], "request-2", TIE)
    assert revised["revision"] == 2
    stored = rows(plain, "SELECT outcome, is_current FROM judgement ORDER BY revision")
    assert stored == [{"outcome": "prefer", "is_current": 0}, {"outcome": "tie", "is_current": 1}]
    assert rows(plain, "SELECT sum(n_done) AS n FROM item")[0]["n"] == 1
    other = plain.claim(ann.id)
    with refused(409):
        plain.submit(ann.id, other["assignment"], "request-2", TIE)


def test_another_annotators_assignment_is_refused_and_changes_nothing(plain, make_account):
    plain.add_items([pair(1)])
    ann, bob = make_account("ann"), make_account("bob")
    task = plain.claim(ann.id)
    events = len(plain.events())
    for act in (
        lambda: plain.submit(bob.id, task["assignment"], "request-1", LEFT),
        lambda: plain.heartbeat(bob.id, task["assignment"]),
        lambda: plain.save_draft(bob.id, task["assignment"], {"rationale": "mine"}),
        lambda: plain.withdraw(bob.id, task["assignment"]),
        lambda: plain.names(bob.id, task["assignment"]),
    ):
        with refused(403):
            act()
    with refused(404):
        plain.submit(bob.id, 999, "request-1", LEFT)
    assert len(plain.events()) == events and not rows(plain, "SELECT 1 FROM judgement")


def test_the_winner_is_the_text_that_was_shown_whatever_the_side(plain, make_account):
    plain.change_settings(None, {"target_labels": 4})
    plain.add_items([pair(1)])
    lefts = []
    for name in ("ann", "bob", "cyd", "dan"):
        task = say(plain, make_account(name), LEFT)
        lefts.append(task["answers"][0]["text"])
    winners = rows(plain, "SELECT r.text FROM judgement j JOIN response r ON r.id = j.winner_id ORDER BY j.id")
    assert [row["text"] for row in winners] == lefts
    assert sorted(lefts) == ["first 1", "first 1", "second 1", "second 1"]  # sides are balanced within an item


def test_sides_are_random_over_items(plain, make_account):
    plain.add_items([pair(n) for n in range(60)])
    ann = make_account("ann")
    lefts = [say(plain, ann, LEFT)["answers"][0]["text"].split()[0] for _ in range(60)]
    assert 15 <= lefts.count("first") <= 45


def test_started_items_come_first_then_priority(plain, make_account):
    plain.add_items([pair(n) for n in range(10)])
    ids = [row["id"] for row in rows(plain, "SELECT id FROM item ORDER BY id")]
    plain.set_priorities({ids[7]: 2.0, ids[3]: 1.0}, model="rm-1")
    plain.rng.random = lambda: 0.5  # always the best one
    ann, bob = make_account("ann"), make_account("bob")
    assert say(plain, ann, LEFT)["prompt"][0]["content"] == "question 7"
    assert say(plain, ann, LEFT)["prompt"][0]["content"] == "question 3"
    plain.set_priorities({ids[5]: 9.0}, model="rm-1")
    assert say(plain, bob, LEFT)["prompt"][0]["content"] in ("question 7", "question 3")


def test_undo_shows_the_last_answer_and_the_open_task_comes_back(plain, make_account):
    plain.add_items([pair(1), pair(2)])
    ann = make_account("ann")
    with refused(404):
        plain.undo(ann.id)
    answer = Answer(outcome="prefer", winner=1, strength=4, rationale="because", ratings=[{"safety": 5}, {"safety": 2}])
    done = say(plain, ann, answer)
    held = plain.claim(ann.id)
    back = plain.undo(ann.id)
    assert back["assignment"] == done["assignment"] and back["answers"] == done["answers"]
    assert (back["said"]["winner"], back["said"]["ratings"]) == (1, [{"safety": 5}, {"safety": 2}])
    assert plain.claim(ann.id)["assignment"] == held["assignment"]


def test_drafts_come_back_and_go_with_the_answer(plain, make_account):
    plain.add_items([pair(1)])
    ann = make_account("ann")
    task = plain.claim(ann.id)
    plain.save_draft(ann.id, task["assignment"], {"rationale": "half a thou"})
    plain.save_draft(ann.id, task["assignment"], {"rationale": "half a thought"})
    assert plain.claim(ann.id)["draft"] == {"rationale": "half a thought"}
    plain.submit(ann.id, task["assignment"], "request-1", LEFT)
    assert not rows(plain, "SELECT 1 FROM draft")
    with refused(422):
        plain.save_draft(ann.id, task["assignment"], {"rationale": "x" * 300_000})


def test_skips_and_flags_take_no_place_and_a_flag_goes_to_review(plain, make_account):
    plain.add_items([pair(1)])
    ann, bob, cyd = (make_account(name) for name in ("ann", "bob", "cyd"))
    say(plain, ann, Answer(outcome="skip", reason="not my language"))
    assert rows(plain, "SELECT n_done, status FROM item")[0] == {"n_done": 0, "status": "open"}
    say(plain, bob, Answer(outcome="flag", reason="personal data"))
    assert plain.claim(cyd.id) is None
    (found,) = plain.review_queue()
    assert found["reasons"] == ["not my language", "personal data"]
    plain.set_item_status(found["id"], "open", by=ann.id)
    assert plain.claim(cyd.id) is not None


def test_a_label_does_not_flag_an_item_that_a_reviewer_has_put_back_in_spite_of_its_skips(plain, make_account):
    plain.add_items([pair(1)])
    people = [make_account(name) for name in ("ann", "bob", "cyd", "dan", "eve")]
    for one in people[:3]:
        say(plain, one, Answer(outcome="skip", reason="not my language"))
    (found,) = plain.review_queue()
    assert found["status"] == "flagged"
    plain.set_item_status(found["id"], "open", by=people[0].id)
    say(plain, people[3], LEFT)
    assert rows(plain, "SELECT status FROM item") == [{"status": "open"}]
    say(plain, people[4], Answer(outcome="skip", reason="not my language"))
    assert rows(plain, "SELECT status FROM item") == [{"status": "flagged"}]


@pytest.mark.parametrize("database", ["postgres"], indirect=True)
def test_writers_go_on_after_the_server_has_dropped_their_connection(store):
    store.add_items([pair(1)])
    with store.database.read() as run:
        run(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND usename IS NOT NULL"
        )
    store.add_items([pair(2)])
    assert rows(store, "SELECT count(*) AS n FROM item") == [{"n": 2}]


def test_disagreement_goes_to_review_until_a_reviewer_has_answered(plain, make_account):
    plain.add_items([pair(1), pair(2)])
    ann, bob, eve = make_account("ann"), make_account("bob"), make_account("eve", "reviewer")
    for _ in range(2):
        task = say(plain, ann, LEFT)
        same = task["prompt"][0]["content"] == "question 2"
        task = plain.claim(bob.id)
        best = [a["text"].startswith("first") for a in task["answers"]].index(True)
        said = rows(plain, "SELECT r.text FROM judgement j JOIN response r ON r.id = j.winner_id ORDER BY j.id DESC")
        winner = best if said[0]["text"].startswith("first") == same else 1 - best
        answer = Answer(outcome="prefer", winner=winner, strength=1)
        plain.submit(bob.id, task["assignment"], f"request-b{task['assignment']}", answer)
    (found,) = plain.review_queue()
    assert found["prompt"] == "question 1" and found["votes"] == "1 for one answer, 1 for another"
    task = plain.open_review(eve.id, found["id"])
    plain.submit(eve.id, task["assignment"], "review-1", LEFT)
    assert plain.review_queue() == []
    assert rows(plain, "SELECT max(n_done) AS n FROM item")[0]["n"] == 2  # the decision is not one more label


def test_a_withdrawn_label_leaves_the_counts_and_frees_the_place(plain, make_account):
    plain.change_settings(None, {"target_labels": 1})
    plain.add_items([pair(1)])
    ann, bob = make_account("ann"), make_account("bob")
    task = say(plain, ann, LEFT)
    plain.withdraw(ann.id, task["assignment"])
    assert plain.claim(ann.id) is None and plain.claim(bob.id) is not None
    with refused(409):
        plain.submit(ann.id, task["assignment"], "request-9", LEFT)
    assert not rows(plain, "SELECT 1 FROM judgement WHERE is_current = 1")


def test_gold_comes_at_random_gaps_to_everyone_and_failing_it_pauses(store, make_account):
    store.change_settings(None, {"gold_gap": [2, 4], "repeat_share": 0.0})
    store.add_items([pair(n) for n in range(80)] + [pair(1000 + n, gold={"winner": 0}) for n in range(20)])
    ann, bob = make_account("ann"), make_account("bob")
    places = []
    with refused(403):
        for at in range(100):
            task = store.claim(ann.id)
            if task["prompt"][0]["content"].startswith("question 10") and len(task["prompt"][0]["content"]) > 11:
                places.append(at)
                wrong = [a["text"].startswith("second") for a in task["answers"]].index(True)
                answer = Answer(outcome="prefer", winner=wrong, strength=2)
            else:
                answer = TIE
            store.submit(ann.id, task["assignment"], f"request-{at}", answer)
    gaps = {after - before for before, after in zip(places, places[1:], strict=False)}
    assert len(places) == 15 and gaps <= {3, 4, 5} and len(gaps) > 1
    assert next(one for one in store.accounts() if one.id == ann.id).paused
    assert rows(store, "SELECT count(*) AS n FROM judgement WHERE gold_pass = 0")[0]["n"] == 15
    assert store.claim(bob.id) is not None
    store.change_account(ann.id, paused=False)
    assert store.claim(ann.id) is not None


def test_the_control_slice_is_drawn_at_import_and_served_at_its_share(store, make_account):
    store.change_settings(None, {"control_share": 0.25, "repeat_share": 0.0})
    store.add_items([pair(n) for n in range(400)])
    assert 70 <= rows(store, "SELECT sum(is_control) AS n FROM item")[0]["n"] <= 130
    ann = make_account("ann")
    for _ in range(120):
        say(store, ann, TIE)
    served = rows(store, "SELECT served_reason, count(*) AS n FROM assignment GROUP BY served_reason")
    share = {row["served_reason"]: row["n"] / 120 for row in served}
    assert 0.12 <= share["control"] <= 0.4 and share["active"] == pytest.approx(1 - share["control"])


def test_ones_own_items_come_again_with_the_sides_swapped_and_do_not_count(store, make_account):
    store.change_settings(None, {"repeat_share": 0.5, "target_labels": 1})
    store.add_items([pair(n) for n in range(90)])
    ann = make_account("ann")
    for _ in range(80):
        say(store, ann, LEFT)
    again = rows(
        store,
        "SELECT a.order_json AS now, b.order_json AS earlier FROM assignment a JOIN assignment b"
        " ON a.item_id = b.item_id AND a.account_id = b.account_id WHERE a.round = 1 AND b.round = 0",
    )
    assert len(again) >= 5
    assert all(json.loads(row["now"]) == json.loads(row["earlier"])[::-1] for row in again)
    assert rows(store, "SELECT max(n_done) AS n FROM item")[0]["n"] == 1


def test_rankings_spans_and_edits_are_kept_by_response(plain, make_account):
    texts = ["alpha 😀 beta", "gamma", "delta"]
    item = NewItem(prompt=[{"role": "user", "content": "q"}], responses=[NewResponse(text=t) for t in texts])
    plain.add_items([item])
    ann = make_account("ann")
    task = plain.claim(ann.id)
    slot = [a["text"] for a in task["answers"]].index(texts[0])
    other = (slot + 1) % 3
    span = Span(slot=slot, start=8, end=12, quote="beta", label="wrong", comment="no")
    answer = Answer(
        outcome="rank", ranking=[[slot], sorted({0, 1, 2} - {slot})], spans=[span], edit_slot=other, edit_text="better"
    )
    plain.submit(ann.id, task["assignment"], "request-1", answer)
    by_id = {row["id"]: row["text"] for row in rows(plain, "SELECT * FROM response")}
    stored = json.loads(rows(plain, "SELECT answer_json FROM judgement")[0]["answer_json"])
    assert by_id[stored["ranking"][0][0]] == texts[0] and by_id[stored["spans"][0]["response_id"]] == texts[0]
    assert by_id[stored["edit_id"]] == task["answers"][other]["text"]
    said = plain.undo(ann.id)["said"]
    assert (said["ranking"], said["edit_slot"], said["spans"][0]["slot"]) == (answer.ranking, other, slot)


BAD_ANSWERS = [
    (Answer(outcome="prefer", winner=2, strength=1), "slots"),
    (Answer(outcome="prefer", winner=0), "strength"),
    (Answer(outcome="tie", winner=0), "no winner"),
    (Answer(outcome="good"), "single answer"),
    (Answer(outcome="rank", ranking=[[0], [1]]), "three answers"),
    (Answer(outcome="skip"), "reason"),
    (Answer(outcome="tie", ratings=[{"safety": 6}, {}]), "1 to 5"),
    (Answer(outcome="tie", ratings=[{"style": 1}, {}]), "criterion"),
    (Answer(outcome="tie", ratings=[{}]), "given for 2"),
    (Answer(outcome="tie", spans=[Span(slot=0, start=0, end=5, quote="other", label="wrong")]), "reads"),
    (Answer(outcome="tie", spans=[Span(slot=0, start=3, end=3, quote="", label="wrong")]), "one character"),
    (Answer(outcome="tie", edit_slot=0, edit_text=" "), "edit_text"),
    (Answer(outcome="tie", rationale="x" * 30_000), "characters"),
    (Answer(outcome="tie", active_ms=-1), "active_ms"),
]


@pytest.mark.parametrize("answer, rule", BAD_ANSWERS, ids=[rule for _, rule in BAD_ANSWERS])
def test_an_answer_that_breaks_a_rule_is_refused_by_name(answer, rule):
    with pytest.raises(RefusedError, match=rule) as caught:
        check_answer(answer, "pair", ["first text", "second text"])
    assert caught.value.status == 422


@pytest.mark.parametrize("outcome", ["tie", "both_bad", "rank"])
def test_a_single_answer_is_good_or_bad_and_not_compared(outcome):
    with pytest.raises(RefusedError) as caught:
        check_answer(Answer(outcome=outcome, ranking=[[0]] if outcome == "rank" else None), "single", ["text"])
    assert caught.value.status == 422
    check_answer(Answer(outcome="good"), "single", ["text"])


def test_thumbs_are_stored_once_revised_and_come_out_as_kto_rows(plain, make_account):
    from plumbline.apps.label.exchange import export_rows

    ann, bob = make_account("ann"), make_account("bob")
    thing = lambda n: NewItem(  # noqa: E731
        prompt=[{"role": "user", "content": f"q {n}"}],
        responses=[NewResponse(text="an answer", model="m")],
        source="chat",
        target_labels=1,
    )
    first = plain.add_thumb(ann.id, thing(1), good=True, request_id="thumb-0001")
    assert plain.add_thumb(ann.id, thing(1), good=True, request_id="thumb-0001") == first | {"repeated": True}
    assert plain.add_thumb(ann.id, thing(1), good=False, request_id="thumb-0002")["revision"] == 2
    plain.add_thumb(ann.id, thing(2), good=True, request_id="thumb-0003")
    plain.add_thumb(bob.id, thing(3), good=True, request_id="thumb-0004")
    plain.add_thumb(ann.id, thing(3), good=False, request_id="thumb-0005")  # they differ: no training row
    with pytest.raises(RefusedError, match="another answer"):
        plain.add_thumb(ann.id, thing(4), good=True, request_id="thumb-0001")
    found = {row["prompt"][0]["content"]: row["label"] for row in export_rows(plain, "kto")}
    assert found == {"q 1": False, "q 2": True}
    assert plain.claim(bob.id) is None  # what was said in a chat is not asked again


@pytest.mark.parametrize("ranking", [None, [[0, 1]], [[0, 1], [2, 2]], [[0, 1, 2], []]])
def test_a_ranking_holds_every_answer_once(ranking):
    with pytest.raises(RefusedError, match="ranking"):
        check_answer(Answer(outcome="rank", ranking=ranking), "ranking", ["a", "b", "c"])


def test_items_are_checked_and_the_same_pair_is_taken_once_in_either_order(store):
    first, second = NewResponse(text="a"), NewResponse(text="b")
    prompt = [{"role": "user", "content": "q"}]
    assert store.add_items([NewItem(prompt=prompt, responses=[first, second])]) == (1, 0)
    assert store.add_items([NewItem(prompt=prompt, responses=[second, first])]) == (0, 1)
    for change, rule in (
        ({"responses": []}, "1 to 6"),
        ({"responses": [first, first]}, "same text"),
        ({"responses": [first, NewResponse(text=" ")]}, "empty"),
        ({"prompt": [{"role": "assistant", "content": "q"}]}, "user"),
        ({"gold": {"winner": 2}}, "gold"),
    ):
        with pytest.raises(ValueError, match=rule):
            store.add_items([pair(5), NewItem(**({"prompt": prompt, "responses": [first, second]} | change))])
    assert rows(store, "SELECT count(*) AS n FROM item")[0]["n"] == 1  # all or nothing


def test_the_audit_trail_is_a_chain_that_the_database_refuses_to_change(plain, make_account):
    plain.add_items([pair(1)])
    say(plain, make_account("ann"), LEFT)
    events = plain.events()
    assert [e["kind"] for e in events] == ["settings", "import", "account", "serve", "judgement"]
    assert plain.broken_event() is None
    changed = [dict(e) for e in events]
    changed[1]["payload_json"] = '{"added": 100}'
    assert first_broken_event(changed) == events[1]["seq"]
    for statement in (
        "UPDATE event SET kind = 'x'",
        "DELETE FROM event",
        "DELETE FROM judgement",
        "UPDATE judgement SET outcome = 'tie'",
    ):
        with pytest.raises(Exception, match="append-only"), plain.database.write() as run:
            run(statement)
    assert plain.broken_event() is None


def test_accounts(store, make_account):
    root, ann = make_account("root", "admin"), make_account("ann")
    assert store.check_password("ann", PASSWORD) == ann
    assert store.check_password("ann", "wrong") is None and store.check_password("nobody", PASSWORD) is None
    for name, password, role, rule in (
        ("ann", PASSWORD, "annotator", "taken"),
        ("bob", "short", "annotator", "characters"),
        ("bob", PASSWORD, "boss", "role"),
        (" bob", PASSWORD, "annotator", "blanks"),
    ):
        with pytest.raises(ValueError, match=rule):
            store.add_account(name, password, role)
    with refused(409):
        store.change_account(root.id, role="annotator")
    changed = store.change_account(ann.id, password="another password")
    assert changed.token_version == 1 and store.check_password("ann", "another password") == changed
    store.change_account(ann.id, active=False)
    assert store.check_password("ann", "another password") is None
    hashes = rows(store, "SELECT pw_hash FROM account")
    assert all(row["pw_hash"].startswith("$argon2id$") for row in hashes)


def test_settings_and_guidelines(store):
    assert store.guidelines() == (1, "")
    assert store.change_guidelines(None, "Be kind.") == 1
    assert store.change_guidelines(None, "Be kind.") == 1
    assert store.change_guidelines(None, "Be right.") == 2
    for changes, rule in (
        ({"targets": 2}, "unknown"),
        ({"target_labels": "2"}, "like"),
        ({"target_labels": 0}, "1 to 50"),
    ):
        with pytest.raises(ValueError, match=rule):
            store.change_settings(None, changes)
    assert store.settings() == LabelSettings()


def _label(target, name, number):
    """One annotator in a process of its own; returns how many labels it sent."""
    store = LabelStore(open_database(target), seed=number, hasher=FAST_HASHER)
    account = store.check_password(name, PASSWORD)
    sent = 0
    while (task := store.claim(account.id)) is not None:
        for _ in range(1 + (sent % 5 == 0)):  # now and then the same request twice
            store.submit(account.id, task["assignment"], f"{name}-{task['assignment']}", TIE)
        sent += 1
    return sent


def test_processes_at_once_reach_the_target_exactly(plain, database, make_account):
    plain.change_settings(None, {"target_labels": 2})
    plain.add_items([pair(n) for n in range(40)])
    names = [f"annotator {n}" for n in range(4)]
    for name in names:
        make_account(name)
    target = str(database.path) if isinstance(database, SQLiteDatabase) else database.url
    with multiprocessing.get_context("spawn").Pool(len(names)) as pool:
        sent = pool.starmap(_label, [(target, name, at) for at, name in enumerate(names)])
    assert sum(sent) == 80
    done = rows(
        plain, "SELECT item_id, count(*) AS n, count(DISTINCT account_id) AS who FROM assignment GROUP BY item_id"
    )
    assert [(row["n"], row["who"]) for row in done] == [(2, 2)] * 40
    assert rows(plain, "SELECT count(*) AS n FROM judgement")[0]["n"] == 80
    assert plain.broken_event() is None


def test_statements_sent_together_answer_in_order_and_one_that_fails_undoes_all(plain):
    put = "INSERT INTO setting (key, value) VALUES (?, ?)"
    read = "SELECT value FROM setting WHERE key = ?"
    with plain.database.write() as run:
        assert run.together((put, ("a", "1")), (read, ("a",)), (put, ("b", "2")), (read, ("b",))) == [
            [], [{"value": "1"}], [], [{"value": "2"}],
        ]  # fmt: skip
    with pytest.raises(Exception, match="(?i)unique"), plain.database.write() as run:
        run.together((put, ("c", "3")), (put, ("a", "again")), (read, ("a",)))
    assert not rows(plain, read, ("c",)) and rows(plain, read, ("a",)) == [{"value": "1"}]
    plain.change_settings(None, {"target_labels": 3})  # the connection still works


def test_finish_commits_with_its_statements_or_undoes_all(plain):
    put = "INSERT INTO setting (key, value) VALUES (?, ?)"
    read = "SELECT value FROM setting WHERE key = ?"
    with plain.database.write() as run:
        run(put, ("a", "1"))
        assert run.finish((put, ("b", "2")), (read, ("a",))) == [[], [{"value": "1"}]]
        assert rows(plain, read, ("b",)) == [{"value": "2"}]  # on another connection, before the block ends
    with pytest.raises(ZeroDivisionError), plain.database.write() as run:
        run.finish((put, ("c", "3")))
        _ = 1 / 0  # too late to undo anything
    assert rows(plain, read, ("c",)) == [{"value": "3"}]
    with pytest.raises(Exception, match="(?i)unique"), plain.database.write() as run:
        run(put, ("d", "4"))
        run.finish((put, ("e", "5")), (put, ("a", "again")))
    assert not rows(plain, read, ("d",)) and not rows(plain, read, ("e",))
    plain.change_settings(None, {"target_labels": 3})  # the connection still works


def test_the_audit_trail_has_the_order_that_was_shown_when_a_lease_revives(plain, make_account, clock):
    plain.add_items([pair(1)])
    ann, shown = make_account("ann"), []
    for _ in range(8):  # a fresh draw would agree with the first by chance once in 256
        shown.append(plain.claim(ann.id)["answers"])
        clock.now += plain.settings().lease_seconds + 1
    assert all(answers == shown[0] for answers in shown)
    served = [
        json.loads(row["payload_json"])["order"] for row in rows(plain, "SELECT * FROM event WHERE kind = 'serve'")
    ]
    assert len(served) == 8 and all(order == served[0] for order in served)


def test_counts_of_the_queue_are_read_anew_after_a_while(plain, make_account, clock):
    ann = make_account("ann")
    assert plain.progress(ann.id) == {"done": 0, "hour": 0, "items": 0, "complete": 0}
    plain.add_items([pair(1), pair(2)])
    say(plain, ann, LEFT)
    assert plain.progress(ann.id)["done"] == 1  # one's own at once
    clock.now += QUEUE_COUNTS_AGE
    assert plain.progress(ann.id)["items"] == 2


def test_files_that_are_no_label_database_are_refused(tmp_path):
    (tmp_path / "text.db").write_text("not a database, long enough to be read as one " * 20)
    with pytest.raises(ValueError, match="cannot be opened"):
        SQLiteDatabase(tmp_path / "text.db")
    with pytest.raises(ValueError, match="does not exist"):
        SQLiteDatabase(tmp_path / "no" / "labels.db")
    SQLiteDatabase(tmp_path / "old.db").close()
    with sqlite3.connect(tmp_path / "old.db") as connection:
        connection.execute("UPDATE setting SET value = '0' WHERE key = 'schema_version'")
    with pytest.raises(ValueError, match="another version"):
        SQLiteDatabase(tmp_path / "old.db")
    with pytest.raises(ValueError, match="postgresql://") as caught:
        open_database("mysql://me:secret@host/db")
    assert "secret" not in str(caught.value)


def test_review_limit(plain):
    with plain.database.read() as run:
        assert needs_review(run, 5) == []
