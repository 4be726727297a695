"""Annotators over HTTP with double submits, walk-aways and a SIGKILL; the full size is benchmarks/bench_label.py."""

from benchmarks.bench_label import check, simulate
from plumbline.apps.label.store.database import SQLiteDatabase


def test_nothing_is_lost_or_stored_twice(database):
    target = str(database.path) if isinstance(database, SQLiteDatabase) else database.url
    store, outcome = simulate(target, annotators=8, items=60, kills=1, double=0.2, walk_away=0.1)
    assert outcome.errors == []
    assert check(store, outcome, items=60, overlap=2) == dict.fromkeys(check(store, outcome, items=60, overlap=2), 0)
    assert len(outcome.accepted) == 120 and outcome.kills == 1
    assert outcome.doubles >= 10 and outcome.walked_away >= 3
    store.database.close()


def test_the_check_sees_a_lost_and_a_doubled_vote(store, make_account):
    from benchmarks.bench_label import Outcome
    from plumbline.apps.label.store.answers import Answer
    from tests.apps.conftest import pair

    store.add_items([pair(1)])
    account = make_account("ann")
    task = store.claim(account.id)
    store.submit(account.id, task["assignment"], "request-1", Answer(outcome="tie"))
    store.submit(account.id, task["assignment"], "request-2", Answer(outcome="tie"))
    wrong = check(store, Outcome(accepted={"request-1": task["assignment"], "request-9": 1}), items=1, overlap=2)
    assert wrong["accepted_but_not_stored"] == 1 and wrong["stored_but_not_accepted"] == 1
    assert wrong["stored_twice"] == 1 and wrong["items_off_target"] == 1
