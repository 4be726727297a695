"""The way back into training: a better model each round, promotion and roll-back, and the order of the queue."""

import random

import numpy as np
import pytest

from plumbline.apps.label.loop import LoopSettings, rank_items, run_loop
from plumbline.apps.label.store.answers import Answer
from plumbline.apps.label.store.database import SQLiteDatabase
from plumbline.apps.label.store.items import NewItem, NewResponse
from plumbline.apps.label.study.label_statistics import label_statistics
from plumbline.apps.registry import Registry

WORDS = [f"w{n}" for n in range(24)]
WORTH = dict(zip(WORDS, np.random.default_rng(0).normal(size=len(WORDS)), strict=True))  # the truth


def worth(text):
    return sum(WORTH[word] for word in text.split())


def train_words(pairs, run, settings):
    """A linear reward model on word counts, by logistic regression: small, exact, and it needs labels to be good."""
    from plumbline.align.data.rows import read_preferences, split_pairs

    train, _ = split_pairs(read_preferences(pairs), settings.holdout_every)
    x_ND = np.array([counts(p.chosen[0]["content"]) - counts(p.rejected[0]["content"]) for p in train])
    weight_D = np.zeros(len(WORDS))
    for _ in range(300):
        weight_D += 0.5 * ((1 / (1 + np.exp(x_ND @ weight_D))) @ x_ND / len(x_ND) - 0.01 * weight_D)
    (run / "model").mkdir(exist_ok=True)
    np.savez(run / "model" / "weights.npz", weight_D)
    return run / "model"


def counts(text):
    return np.array([text.split().count(word) for word in WORDS], dtype=float)


def load_words(path):
    weight_D = np.load(path / "weights.npz")["arr_0"]
    return lambda prompts, answers: [float(counts(answer) @ weight_D) for answer in answers]


def new_items(rng, start, number, **changes):
    texts = lambda: " ".join(rng.choice(WORDS) for _ in range(6))  # noqa: E731
    return [
        NewItem(
            prompt=[{"role": "user", "content": f"question {start + n}"}],
            responses=[NewResponse(text=f"{texts()}", model="red"), NewResponse(text=f"{texts()}", model="blue")],
            **changes,
        )
        for n in range(number)
    ]


def annotate(store, account, rng, *, accuracy, left_bias=0.0, limit=10**6):
    """Labels what comes: the better answer with probability `accuracy`, then now and then simply the left one."""
    done = 0
    while done < limit and (task := store.claim(account.id)):
        values = [worth(a["text"]) for a in task["answers"]]
        winner = int(values[1] > values[0]) if rng.random() < accuracy else int(values[1] <= values[0])
        winner = 0 if rng.random() < left_bias else winner
        answer = Answer(outcome="prefer", winner=winner, strength=2)
        store.submit(account.id, task["assignment"], f"request-{task['assignment']}", answer)
        done += 1


@pytest.fixture
def database(tmp_path):
    return SQLiteDatabase(tmp_path / "labels.db")


def test_three_rounds_end_with_a_better_model_that_can_be_rolled_back(store, make_account, tmp_path):
    rng = random.Random(0)
    store.change_settings(None, {"repeat_share": 0.0, "target_labels": 1, "gold_gap": [500, 500]})
    people = [make_account(name) for name in ("ann", "bob")]
    registry = Registry(tmp_path / "registry")
    settings = LoopSettings(runs=tmp_path / "runs", min_labels=20, promote="always")
    truth = new_items(rng, 10_000, 400)
    accuracies = []
    for number in range(3):
        store.add_items(new_items(rng, 1000 * number, 30 * 4**number))
        for account in people:
            annotate(store, account, rng, accuracy=0.9)
        report = run_loop(store, registry, settings, train=train_words, load=load_words)
        scorer = load_words(tmp_path / "runs" / f"round-{number + 1}" / "model")
        scored = [scorer(["", ""], [r.text for r in item.responses]) for item in truth]
        better = [worth(item.responses[0].text) > worth(item.responses[1].text) for item in truth]
        accuracies.append(np.mean([(a > b) == first for (a, b), first in zip(scored, better, strict=True)]))
    assert accuracies[2] > accuracies[0] + 0.05 and accuracies[2] > 0.85
    assert report["before"] == "reward-model-2" and report["held_out"]["old"] is not None
    assert registry.current("reward-model").name == "reward-model-3"
    assert registry.roll_back("reward-model").name == registry.current("reward-model").name == "reward-model-2"
    assert registry.roll_back("reward-model").name == "reward-model-1"
    with pytest.raises(ValueError, match="nothing to roll back"):
        registry.roll_back("reward-model")


def test_changed_weights_are_not_put_into_use(tmp_path):
    (tmp_path / "model").mkdir()
    np.savez(tmp_path / "model" / "weights.npz", np.ones(2))
    registry = Registry(tmp_path / "registry")
    registry.register("reward-model", tmp_path / "model", name="one")
    with pytest.raises(ValueError, match="never replaced"):
        registry.register("reward-model", tmp_path / "model", name="one")
    np.savez(tmp_path / "model" / "weights.npz", np.zeros(2))
    with pytest.raises(ValueError, match="not the weights"):
        registry.promote("one")
    with (tmp_path / "registry" / "registry.jsonl").open("a") as file:
        file.write('{"promote": "on')  # a crash in the middle of a line
    assert registry.current("reward-model") is None
    assert registry.register("reward-model", tmp_path / "model").name == "reward-model-2"
    assert len(registry.versions()) == 2


def test_statistics_recover_noise_and_the_bias_to_the_left(store, make_account):
    rng = random.Random(1)
    store.change_settings(None, {"repeat_share": 0.0, "target_labels": 4})
    store.add_items(new_items(rng, 0, 250))
    truth = {"ann": 0.95, "bob": 0.85, "cyd": 0.75}
    for name, accuracy in truth.items():
        annotate(store, make_account(name), rng, accuracy=accuracy)
    lefty = make_account("dan")
    annotate(store, lefty, rng, accuracy=0.9, left_bias=0.3)
    found = {row["annotator"]: row for row in label_statistics(store)["annotators"]}
    pseudonyms = {account.name: account.pseudonym for account in store.accounts()}
    for name, accuracy in truth.items():
        interval = found[pseudonyms[name]]["accuracy"]
        assert interval["low"] <= accuracy <= interval["high"]
    left = found[lefty.pseudonym]["left_share"]
    assert left["low"] > 0.5 and left["low"] <= 0.65 <= left["high"]
    assert found[pseudonyms["ann"]]["left_share"]["low"] < 0.5 < found[pseudonyms["ann"]]["left_share"]["high"]


def test_statistics_recover_model_strengths_and_the_position_term(store, make_account):
    rng = random.Random(4)
    truth, position, tie = {"base": -0.6, "sft": 0.1, "ppo": 0.5}, 0.4, -0.8
    store.change_settings(None, {"repeat_share": 0.0, "target_labels": 1})
    store.add_items(
        NewItem(prompt=[{"role": "user", "content": f"question {n}"}],
                responses=[NewResponse(text=f"{m} {n}", model=m) for m in rng.sample(sorted(truth), 2)])
        for n in range(450)
    )  # fmt: skip
    ann = make_account("ann")
    while task := store.claim(ann.id):
        left, right = (truth[answer["text"].split()[0]] for answer in task["answers"])
        weights = np.exp([left + position / 2, right - position / 2, (left + right) / 2 + tie])
        said = rng.choices([{"winner": 0, "strength": 2}, {"winner": 1, "strength": 2}, {}], weights)[0]
        answer = Answer(outcome="prefer" if said else "tie", **said)
        store.submit(ann.id, task["assignment"], f"request-{task['assignment']}", answer)
    models = label_statistics(store)["models"]
    found = [(models["strength"][name], value) for name, value in truth.items()]
    for interval, value in [*found, (models["position"], position), (models["tie"], tie)]:
        assert interval["low"] <= value <= interval["high"] and interval["high"] - interval["low"] < 0.7


def test_strategies_by_hand():
    gaps = {1: 0.0, 2: 3.0, 3: -1.0}
    order = lambda ranked: sorted(ranked, key=ranked.get, reverse=True)  # noqa: E731
    assert order(rank_items(gaps, "uncertain")) == [1, 3, 2]
    assert order(rank_items(gaps, "gap")) == [2, 3, 1]
    assert order(rank_items(gaps, "disagreement", others={1: 0.1, 2: 2.9, 3: 4.0})) == [3, 1, 2]
    assert rank_items(gaps, "random", seed=1) == rank_items(gaps, "random", seed=1)


def test_bad_settings_and_too_few_labels_are_refused(store, tmp_path):
    for changes, rule in (
        ({"strategy": "best"}, "strategy"),
        ({"promote": "maybe"}, "promote"),
        ({"holdout_every": 1}, "2"),
    ):
        with pytest.raises(ValueError, match=rule):
            LoopSettings(**changes)
    with pytest.raises(ValueError, match="no labels"):
        run_loop(
            store, Registry(tmp_path / "r"), LoopSettings(runs=tmp_path / "runs"), train=train_words, load=load_words
        )
