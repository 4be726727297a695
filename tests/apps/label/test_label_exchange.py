"""Imports and exports: rows of every format, splits by prompt, what is left out, and TRL trains on all of it."""

import json

import pytest

from plumbline.apps.label.exchange import (
    export_rows,
    in_test,
    item_of,
    margin_of,
    read_items,
    starter_items,
    write_export,
)
from plumbline.apps.label.store.answers import Answer, Span
from plumbline.apps.label.store.backup import backup, restore
from plumbline.apps.label.store.database import SQLiteDatabase
from plumbline.apps.label.store.items import NewItem, NewResponse
from plumbline.apps.label.store.store import LabelStore
from plumbline.apps.label.store.votes import read_votes, settle
from tests.apps.conftest import FAST_HASHER, PASSWORD, pair


@pytest.fixture
def database(tmp_path):  # the store's own tests run on both databases
    return SQLiteDatabase(tmp_path / "labels.db")


@pytest.fixture
def plain(store):
    store.change_settings(None, {"control_share": 0.0, "repeat_share": 0.0, "target_labels": 3, "gold_gap": [1, 1]})
    return store


def vote(store, account, text, **answer):
    """Claims, and prefers the answer that starts with `text` (None: as `answer` says)."""
    task = store.claim(account.id)
    if text is not None:
        winner = [a["text"].startswith(text) for a in task["answers"]].index(True)
        answer = {"outcome": "prefer", "winner": winner, "strength": 3} | answer
    store.submit(account.id, task["assignment"], f"request-{task['assignment']}", Answer(**answer))
    return task


def test_rows_of_every_kind_become_items():
    ours = {"prompt": "q", "responses": ["a", {"text": "b", "model": "m", "params": {"t": 1}}], "warning": "rude"}
    item = item_of("f:1", ours, source="f")
    assert (item.responses[1].model, item.warning, item.gold) == ("m", "rude", None)
    explicit = {"prompt": "q", "chosen": "a", "rejected": "b"}
    assert [r.text for r in item_of("f:1", explicit, source="f").responses] == ["a", "b"]
    assert item_of("f:1", explicit, source="f", gold=True).gold == {"winner": 0}
    turns = [{"role": "user", "content": "q"}]
    implicit = {name: [*turns, {"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    assert item_of("f:1", implicit, source="f").prompt == turns
    content = "".join(json.dumps(row) + "\n" for row in (ours, explicit)).encode()
    assert len(read_items(content, "pairs.jsonl")) == 2


BAD_ROWS = [
    ({"prompt": "q"}, "chosen"),
    ({"prompt": "q", "responses": "ab"}, "list"),
    ({"prompt": "q", "responses": []}, "1 to 6"),
    ({"prompt": "q", "responses": ["a"], "gold": {"winner": 0}}, "one answer"),
    ({"prompt": "q", "responses": ["a", "a"]}, "same text"),
    ({"prompt": "q", "responses": ["a", 3]}, "text"),
    ({"prompt": 3, "responses": ["a", "b"]}, "prompt"),
    ({"prompt": [{"role": "user"}], "responses": ["a", "b"]}, "content"),
    ({"chosen": "The sky is blue.", "rejected": "The sky is green."}, "messages"),  # the prompt is nobody's guess
    ({"prompt": "q", "responses": ["a", "b"], "gold": {"winner": 5}}, "gold"),
    ({"prompt": "q", "responses": ["a", "b"], "gold": "first"}, "gold"),
    ({"prompt": "q", "responses": ["a", "b"], "target_labels": 0}, "target_labels"),
    ({"prompt": "q", "responses": ["a", "b"], "tags": ["x"]}, "tags"),
    ({"prompt": "q", "responses": [{"text": "a", "params": 3}, "b"]}, "params"),
]


@pytest.mark.parametrize("row, rule", BAD_ROWS, ids=[rule for _, rule in BAD_ROWS])
def test_a_bad_row_is_named_with_its_line_and_rule(row, rule):
    content = json.dumps({"prompt": "fine", "responses": ["a", "b"]}).encode() + b"\n" + json.dumps(row).encode()
    with pytest.raises(ValueError, match=rule) as caught:
        read_items(content, "pairs.jsonl")
    assert str(caught.value).startswith("pairs.jsonl:2: ")


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"not json", b"[1, 2]\n"])
def test_files_that_are_no_json_lines_are_refused(content):
    with pytest.raises(ValueError, match="pairs.jsonl"):
        read_items(content, "pairs.jsonl")


def test_a_majority_settles_and_a_reviewer_overrules(plain, make_account):
    plain.add_items([pair(1)])
    people = [make_account(name) for name in ("ann", "bob", "cyd")]
    for account, text, strength in zip(people, ("first", "first", "second"), (4, 2, 1), strict=True):
        vote(plain, account, text, strength=strength)
    (row,) = export_rows(plain, "preference")
    assert (row["chosen"][0]["content"], row["margin"]) == ("first 1", pytest.approx(2 / 3))
    assert row["p_chosen"] == pytest.approx(2 / 3)
    boss = make_account("eve", "reviewer")
    task = plain.open_review(boss.id, 1)
    winner = [a["text"].startswith("second") for a in task["answers"]].index(True)
    answer = Answer(outcome="prefer", winner=winner, strength=1)
    plain.submit(boss.id, task["assignment"], "request-review", answer)
    (row,) = export_rows(plain, "preference")
    assert (row["chosen"][0]["content"], row["margin"]) == ("second 1", 0.0)


def test_ties_and_even_splits_give_no_pair_and_both_bad_is_no_tie(plain, make_account):
    plain.add_items([pair(1)])
    ann, bob, cyd = (make_account(name) for name in ("ann", "bob", "cyd"))
    vote(plain, ann, "first")
    vote(plain, bob, None, outcome="both_bad")
    (row,) = export_rows(plain, "preference")
    assert row["p_chosen"] == 1.0  # both bad says nothing about the order
    vote(plain, cyd, "second")
    assert export_rows(plain, "preference") == []
    labels = {row["completion"][0]["content"]: row["label"] for row in export_rows(plain, "kto")}
    assert labels == {"first 1": False, "second 1": False}


def test_a_ranking_gives_every_pair_but_those_of_one_tier(plain, make_account):
    item = NewItem(prompt=[{"role": "user", "content": "q"}], responses=[NewResponse(text=t) for t in "abcd"])
    plain.add_items([item])
    task = plain.claim(make_account("ann").id)
    at = {a["text"]: slot for slot, a in enumerate(task["answers"])}
    answer = Answer(outcome="rank", ranking=[[at["c"]], [at["a"], at["b"]], [at["d"]]])
    plain.submit(1, task["assignment"], "request-1", answer)
    rows = export_rows(plain, "preference")
    found = {(row["chosen"][0]["content"], row["rejected"][0]["content"]): row["margin"] for row in rows}
    near, far = margin_of(2), margin_of(3)  # a tier apart, two tiers apart
    assert found == {("c", "a"): near, ("c", "b"): near, ("c", "d"): far, ("a", "d"): near, ("b", "d"): near}


def test_what_may_not_be_trained_on_is_left_out(plain, make_account):
    plain.change_settings(None, {"target_labels": 1})
    plain.add_items([pair(1), pair(2), pair(3), pair(9, gold={"winner": 0})])
    ann, bob = make_account("ann"), make_account("bob")
    vote(plain, ann, "first")
    gold = vote(plain, ann, "first")
    assert gold["prompt"][0]["content"] == "question 9"
    vote(plain, ann, None, outcome="flag", reason="personal data")
    vote(plain, bob, "first")
    exported = {row["prompt"][0]["content"] for row in export_rows(plain, "preference")}
    assert "question 9" not in exported and len(exported) == 2
    plain.change_account(bob.id, paused=True)
    assert len(export_rows(plain, "preference")) == 1
    full = export_rows(plain, "full")
    assert len(full) == 4 and {row["outcome"] for row in full} == {"prefer", "flag"}
    assert all(row["annotator"].startswith("annotator-") for row in full) and "ann" not in {
        r["annotator"] for r in full
    }


def test_corrections_and_top_ratings_are_sft_rows_and_a_correction_beats_its_original(plain, make_account):
    plain.change_settings(None, {"target_labels": 1})
    plain.add_items([pair(1), pair(2)])
    ann = make_account("ann")
    top = {"fluency": 5, "relevance": 4, "safety": 5, "toxicity": 1}
    vote(plain, ann, "first", edit_slot=0, edit_text="a better answer")
    task = vote(plain, ann, "first", ratings=[top, top | {"toxicity": 3}])
    rows = [row["messages"][-1]["content"] for row in export_rows(plain, "sft")]
    assert rows == ["a better answer", task["answers"][0]["text"]]
    assert [row for row in export_rows(plain, "preference") if row["chosen"][0]["content"] == "a better answer"]


def test_an_export_of_the_past_is_the_one_of_then(plain, make_account):
    plain.change_settings(None, {"target_labels": 1})
    plain.add_items([pair(1)])
    ann = make_account("ann")
    task = vote(plain, ann, "first")
    then, now = plain.events()[-1]["seq"], export_rows(plain, "preference")
    plain.submit(ann.id, task["assignment"], "request-again", Answer(outcome="tie"))
    assert export_rows(plain, "preference") == []
    assert export_rows(plain, "preference", as_of=then) == now
    with plain.database.read() as run:
        logged = run("SELECT n_rows, max_event_seq FROM export ORDER BY id")
    assert [row["n_rows"] for row in logged] == [1, 0, 1] and logged[-1]["max_event_seq"] == then


def test_splits_hold_out_whole_prompts_and_the_card_says_what_it_is(plain, make_account, tmp_path):
    plain.change_settings(None, {"target_labels": 1})
    plain.change_guidelines(None, "Be kind, be right.")
    plain.add_items([pair(n) for n in range(40)])
    ann = make_account("ann")
    for _ in range(40):
        vote(plain, ann, "first")
    counts = write_export(plain, tmp_path / "out", "preference", test_every=4, licence="cc-by-4.0")
    assert counts["train"] + counts["test"] == 40 and 4 <= counts["test"] <= 16
    test = [json.loads(line) for line in (tmp_path / "out" / "test.jsonl").read_text().splitlines()]
    assert all(in_test(row["prompt"], 4) for row in test)
    card = (tmp_path / "out" / "README.md").read_text()
    for said in ("license: cc-by-4.0", "40 by 1 annotators", "prefer 40", "Be kind, be right."):
        assert said in card


def test_the_starter_pairs_are_items():
    items = starter_items()
    assert len(items) > 400 and all(len(item.responses) == 2 and not item.gold for item in items)


def test_spans_and_order_survive_in_full(plain, make_account):
    plain.add_items([pair(1)])
    task = plain.claim(make_account("ann").id)
    quote = task["answers"][1]["text"][:5]
    spans = [Span(slot=1, start=0, end=5, quote=quote, label="good")]
    plain.submit(1, task["assignment"], "request-1", Answer(outcome="tie", spans=spans))
    (row,) = export_rows(plain, "full")
    assert row["spans"][0]["answer"] == row["order"][1] and row["spans"][0]["quote"] == quote
    assert row["responses"][row["order"][1]]["text"].startswith(quote)
    assert settle(read_votes(plain)) == []


def test_a_backup_restores_into_either_database(plain, make_account, tmp_path, postgres_url):
    import psycopg

    from plumbline.apps.label.store.database import PostgresDatabase

    plain.add_items([pair(1), pair(2)])
    ann = make_account("ann")
    vote(plain, ann, "first")
    file = tmp_path / "labels.gz"
    assert backup(plain.database, file)["judgement"] == 1
    assert file.stat().st_mode & 0o077 == 0
    with pytest.raises(ValueError, match="never overwrites"):
        backup(plain.database, file)
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute("CREATE SCHEMA restored")
    for target in (
        SQLiteDatabase(tmp_path / "again.db"),
        PostgresDatabase(f"{postgres_url}&options=-csearch_path%3Drestored"),
    ):
        restore(target, file)
        store = LabelStore(target, hasher=FAST_HASHER, seed=0)
        assert export_rows(store, "full") == export_rows(plain, "full")
        assert store.check_password("ann", PASSWORD) == ann and store.broken_event() is None
        vote(store, store.add_account("bob", PASSWORD, "annotator"), "first")  # keys go on where they were
        with pytest.raises(ValueError, match="in use"):
            restore(target, file)
        target.close()


def test_a_damaged_backup_restores_nothing(plain, tmp_path):
    plain.add_items([pair(n) for n in range(50)])
    backup(plain.database, tmp_path / "whole.gz")
    content = (tmp_path / "whole.gz").read_bytes()
    (tmp_path / "cut.gz").write_bytes(content[: len(content) // 2])
    (tmp_path / "other.gz").write_bytes(b"no backup")
    target = SQLiteDatabase(tmp_path / "again.db")
    for name in ("cut.gz", "other.gz", "missing.gz"):
        with pytest.raises(ValueError, match=name):
            restore(target, tmp_path / name)
    with target.read() as run:
        assert run("SELECT count(*) AS n FROM item")[0]["n"] == 0


@pytest.mark.slow
def test_exports_load_in_datasets_and_train_in_trl(plain, make_account, tmp_path):
    from datasets import load_dataset
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer

    from plumbline.policy_models.loading import load_policy, load_scalar_model, load_tokenizer

    plain.change_settings(None, {"target_labels": 1})
    plain.add_items([pair(n) for n in range(8)])
    ann = make_account("ann")
    for _ in range(8):
        vote(plain, ann, "first")
    tokenizer = load_tokenizer("bundled:tiny-llama")
    common = {
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
    }
    common |= {"max_length": 64, "output_dir": str(tmp_path / "run"), "bf16": False, "logging_steps": 1}
    for format, trainer_class, config_class, load in (
        ("preference", RewardTrainer, RewardConfig, load_scalar_model),
        ("preference", DPOTrainer, DPOConfig, load_policy),
        ("kto", KTOTrainer, KTOConfig, load_policy),
    ):
        write_export(plain, tmp_path / format, format)
        data = load_dataset("json", data_files=str(tmp_path / format / "train.jsonl"), split="train")
        trainer = trainer_class(
            model=load("bundled:tiny-llama"),
            args=config_class(**common),
            train_dataset=data,
            processing_class=tokenizer,
        )
        trainer.train()
        assert trainer.state.global_step == 1
