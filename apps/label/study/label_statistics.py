"""What the labels say about themselves: agreement, sides, annotators, models, and the reward model's hits.

Agreement and win rates are also given on the random control slice alone, because actively chosen items are not a random
sample of anything.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from plumbline.apps.label.store.answers import CRITERIA
from plumbline.apps.label.store.queue import FIRST, REPEAT
from plumbline.apps.label.store.store import LabelStore
from plumbline.apps.label.store.votes import Vote, for_training, read_votes, settle
from plumbline.apps.label.study.agreement import (
    Array,
    Comparison,
    alpha_interval,
    annotator_accuracy,
    bradley_terry,
    cohen_kappa,
    fleiss_kappa,
    raw_agreement,
)
from plumbline.eval.stats.intervals import Interval, wilson

MIN_PAIR_ITEMS = 5  # items that two annotators share before their kappa is shown
RESAMPLES = 300


def preference_value(vote: Vote) -> float:
    """-4 (second answer much better) to 4 (first much better), 0 for a tie; NaN for anything but a vote on a pair."""
    if len(vote.responses) != 2 or vote.outcome not in ("prefer", "tie"):
        return math.nan
    return 0.0 if vote.outcome == "tie" else (vote.strength or 1) * (1.0 if vote.winner == 0 else -1.0)


def value_table(votes: Sequence[Vote], value: Any) -> tuple[Array, list[str], list[int]]:
    """(annotators x items table, annotators, items) of `value(vote)`; NaN where there is none."""
    annotators = sorted({vote.annotator for vote in votes})
    items = sorted({vote.item for vote in votes})
    row, column = {a: at for at, a in enumerate(annotators)}, {i: at for at, i in enumerate(items)}
    table_AU = np.full((len(annotators), len(items)), np.nan)
    for vote in votes:
        table_AU[row[vote.annotator], column[vote.item]] = value(vote)
    return table_AU, annotators, items


def agreement_table(votes: Sequence[Vote]) -> dict[str, Interval]:
    """Alpha of choice (nominal), of strength (ordinal) and of each criterion, those that have anything to compare."""
    pairs = [vote for vote in votes if vote.round == FIRST and not math.isnan(preference_value(vote))]
    tables = {}
    if pairs:
        tables["alpha, choice"] = (value_table(pairs, lambda v: np.sign(preference_value(v)))[0], "nominal")
        tables["alpha, choice with strength"] = (value_table(pairs, preference_value)[0], "ordinal")
    for criterion in CRITERIA:
        rated = [  # each rated answer is one thing to agree on
            (vote, at, values[criterion])
            for vote in votes
            if vote.round == FIRST
            for at, values in vote.ratings.items()
            if criterion in values
        ]
        if rated:
            annotators = {a: i for i, a in enumerate(sorted({vote.annotator for vote, _, _ in rated}))}
            things = {key: i for i, key in enumerate(sorted({(vote.item, at) for vote, at, _ in rated}))}
            table_AU = np.full((len(annotators), len(things)), np.nan)
            for vote, at, number in rated:
                table_AU[annotators[vote.annotator], things[vote.item, at]] = number
            tables[f"alpha, {criterion}"] = (table_AU, "ordinal")
    found = {name: alpha_interval(table, level, resamples=RESAMPLES) for name, (table, level) in tables.items()}
    return {name: interval for name, interval in found.items() if not math.isnan(interval.mean)}


def comparisons(votes: Sequence[Vote]) -> list[Comparison]:
    """Votes on pairs of two named models, sides as shown. "Both bad" says nothing about the order and is left out."""
    found = []
    for vote in votes:
        if len(vote.responses) != 2 or vote.outcome not in ("prefer", "tie") or vote.round != FIRST:
            continue
        left, right = (str(vote.responses[at]["model"]) for at in vote.order)
        if left and right and left != right:
            outcome = 0.5 if vote.outcome == "tie" else float(vote.order[0] == vote.winner)
            found.append(Comparison(left=left, right=right, outcome=outcome, item=vote.item))
    return found


def label_statistics(store: LabelStore) -> dict[str, Any]:
    """Everything the Statistics page shows, ready for JSON; what the data do not give is null."""
    votes = read_votes(store)
    first = [vote for vote in votes if vote.round == FIRST]
    chosen = [vote for vote in first if vote.outcome == "prefer" and not vote.is_gold]
    control = [vote for vote in first if vote.is_control]
    left = sum(vote.winner == vote.order[0] for vote in chosen)
    table_AU = value_table(first, lambda v: np.sign(preference_value(v)))[0] if first else np.zeros((0, 0))
    result = {
        "judgements": len(first),
        "items": len({vote.item for vote in first}),
        "outcomes": dict(Counter(vote.outcome for vote in first)),
        "served": dict(Counter(vote.served_reason for vote in votes)),
        "late": sum(vote.late for vote in first),
        "left_share": _rate(left, len(chosen)),
        "raw_agreement": raw_agreement(table_AU) if table_AU.size else math.nan,
        "fleiss_kappa": _fleiss(table_AU),
        "agreement": agreement_table(first),
        "agreement_control": agreement_table(control),
        "annotators": annotator_rows(votes),
        "kappas": kappa_rows(first),
        "models": model_strengths(first),
        "models_control": model_strengths(control),
        "reward_model": reward_model_rows(votes),
    }
    return _plain(result)


def annotator_rows(votes: Sequence[Vote]) -> list[dict[str, Any]]:
    """One row an annotator: counts, gold, left share, estimated accuracy, agreement with oneself, time."""
    first = [vote for vote in votes if vote.round == FIRST]
    pairs = [vote for vote in first if vote.outcome == "prefer" and len(vote.responses) == 2 and not vote.is_gold]
    accuracy: dict[str, Interval] = {}
    shared = {item for item, n in Counter(vote.item for vote in pairs).items() if n >= 2}
    both = [vote for vote in pairs if vote.item in shared]
    if len({vote.annotator for vote in both}) >= 3:  # of two annotators nobody can say who is right
        table_AU, names, _ = value_table(both, lambda v: float(v.winner == 0))
        accuracy = dict(zip(names, annotator_accuracy(table_AU, resamples=100)[0], strict=True))
    again = {(vote.annotator, vote.item): vote for vote in votes if vote.round == REPEAT}
    rows = []
    for name in sorted({vote.annotator for vote in first}):
        own = [vote for vote in first if vote.annotator == name]
        prefer = [vote for vote in own if vote.outcome == "prefer"]
        gold = [vote.gold_pass for vote in own if vote.gold_pass is not None]
        repeats = [(vote, again[name, vote.item]) for vote in own if (name, vote.item) in again]
        same = sum((a.outcome, a.winner) == (b.outcome, b.winner) for a, b in repeats)
        times = [vote.active_ms / 1000 for vote in own if vote.active_ms]
        rows.append(
            {
                "annotator": name,
                "labels": len(own),
                "skipped": sum(vote.outcome in ("skip", "flag") for vote in own),
                "gold_pass": _rate(sum(gold), len(gold)),
                "left_share": _rate(sum(v.winner == v.order[0] for v in prefer), len(prefer)),
                "accuracy": accuracy.get(name),
                "same_again": _rate(same, len(repeats)),
                "median_seconds": float(np.median(times)) if times else None,
                "paused": own[-1].paused,
            }
        )
    return rows


def kappa_rows(first: Sequence[Vote]) -> list[dict[str, Any]]:
    """Cohen's kappa of each two annotators who share enough items, on choice."""
    said: dict[str, dict[int, float]] = defaultdict(dict)
    for vote in first:
        if not math.isnan(value := preference_value(vote)):
            said[vote.annotator][vote.item] = float(np.sign(value))
    rows, names = [], sorted(said)
    for at, a in enumerate(names):
        for b in names[at + 1 :]:
            items = sorted(said[a].keys() & said[b].keys())
            if len(items) >= MIN_PAIR_ITEMS:
                kappa = cohen_kappa([said[a][i] for i in items], [said[b][i] for i in items])
                rows.append({"a": a, "b": b, "items": len(items), "kappa": kappa})
    return rows


def model_strengths(first: Sequence[Vote]) -> dict[str, Any] | None:
    """Bradley-Terry strengths of named models, with position and tie terms; None with too few to compare."""
    votes = comparisons([vote for vote in first if not vote.is_gold])
    if len({name for vote in votes for name in (vote.left, vote.right)}) < 2:
        return None
    fitted = bradley_terry(votes)
    return {"strength": fitted.strength, "position": fitted.position, "tie": fitted.tie, "votes": fitted.votes}


def reward_model_rows(votes: Sequence[Vote]) -> list[dict[str, Any]]:
    """How often the stored reward-model scores rank a pair as people do, by how sure the model was (in thirds)."""
    scored = []
    for verdict in settle(for_training(votes)):
        better, worse = (verdict.vote.responses[at]["score"] for at in (verdict.better, verdict.worse))
        if better is not None and worse is not None and better != worse:
            scored.append((abs(better - worse), better > worse))
    scored.sort()
    names = ("least sure", "between", "most sure")
    parts = [part for part in np.array_split(np.arange(len(scored)), 3)] if len(scored) >= 3 else []
    return [
        {"model_was": name, "pairs": len(part), "agrees": _rate(sum(scored[at][1] for at in part), len(part))}
        for name, part in zip(names, parts, strict=False)
    ]


def _rate(hits: int, n: int) -> Interval | None:
    return wilson(int(hits), n) if n else None


def _fleiss(table_AU: Array) -> float | None:
    """Only where every item has the same number of labels."""
    values = [v for v in (-1.0, 0.0, 1.0)]
    counts_UK = np.stack([(table_AU == v).sum(0) for v in values], axis=-1) if table_AU.size else np.zeros((0, 3))
    counts_UK = counts_UK[counts_UK.sum(1) > 0]
    try:
        return fleiss_kappa(counts_UK)
    except ValueError:
        return None


def _plain(value: Any) -> Any:
    if isinstance(value, Interval):
        return {name: _plain(v) for name, v in value._asdict().items()}
    if isinstance(value, dict):
        return {name: _plain(v) for name, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
