"""Judgements as records, and what they say about each pair of answers. Read by exports, statistics and the loop."""

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from plumbline.apps.label.store.answers import COUNTED
from plumbline.apps.label.store.database import Row
from plumbline.apps.label.store.queue import FIRST, REVIEW
from plumbline.apps.label.store.store import LabelStore


@dataclass(frozen=True, kw_only=True)
class Vote:
    """One judgement with its item. Answers are named by canonical index, never by side.

    `order` says which index was shown in each slot; `paused` that the annotator fails gold and is not yet reviewed.
    """

    item: int
    prompt: list[dict[str, str]]
    prompt_hash: str
    responses: list[Row]  # text, model, params, finish_reason, score
    annotator: str
    round: int
    outcome: str
    winner: int | None
    strength: int | None
    ranking: list[list[int]] | None
    ratings: dict[int, dict[str, int]]
    edit: tuple[int, str] | None
    spans: list[dict[str, Any]]
    rationale: str
    reason: str
    order: list[int]
    served_reason: str
    source: str
    tags: dict[str, str]
    is_gold: bool
    is_control: bool
    item_status: str
    gold_pass: bool | None
    late: bool
    paused: bool
    elapsed_ms: int
    active_ms: int
    guideline_version: int
    revision: int
    event_seq: int
    at: float

    def preferences(self) -> list[tuple[int, int, int]]:
        """(better, worse, strength 1..4) for each pair of answers that this judgement orders."""
        if self.outcome == "prefer" and self.winner is not None:
            return [
                (self.winner, other, self.strength or 1) for other in range(len(self.responses)) if other != self.winner
            ]
        tiers = self.ranking or []
        return [
            (better, worse, min(4, 1 + low - high))
            for high, tier in enumerate(tiers)
            for low in range(high + 1, len(tiers))
            for better in tier
            for worse in tiers[low]
        ]


def read_votes(store: LabelStore, *, as_of: int | None = None) -> list[Vote]:
    """All judgements in force, oldest first; `as_of`: as they were after that event of the audit trail.

    Withdrawn labels are never read, whatever `as_of` says: they were taken back for good.
    """
    with store.database.read() as run:
        rows = run(
            "SELECT j.*, a.item_id, a.account_id, a.round, a.order_json, a.served_reason, i.prompt_json, i.prompt_hash,"
            " i.source, i.tags_json, i.is_gold, i.is_control, i.status, c.pseudonym, c.paused FROM judgement j"
            " JOIN assignment a ON a.id = j.assignment_id JOIN item i ON i.id = a.item_id"
            " JOIN account c ON c.id = a.account_id WHERE a.state <> 'withdrawn' AND j.event_seq <= ? ORDER BY j.id",
            (2**31 - 1 if as_of is None else as_of,),
        )
        by_item: dict[int, list[Row]] = defaultdict(list)
        for row in run("SELECT * FROM response ORDER BY item_id, idx"):
            by_item[row["item_id"]].append(row)
    latest = {row["assignment_id"]: row for row in rows}  # in order of id: the last revision wins
    votes = [_vote(row, by_item[row["item_id"]]) for row in latest.values()]
    return sorted(votes, key=lambda vote: vote.event_seq)


def _vote(row: Row, responses: list[Row]) -> Vote:
    said, index = json.loads(row["answer_json"]), {r["id"]: at for at, r in enumerate(responses)}
    shown = ("text", "model", "finish_reason", "score")
    return Vote(
        item=row["item_id"],
        prompt=json.loads(row["prompt_json"]),
        prompt_hash=row["prompt_hash"],
        responses=[{name: r[name] for name in shown} | {"params": json.loads(r["params_json"])} for r in responses],
        annotator=row["pseudonym"],
        round=row["round"],
        outcome=row["outcome"],
        winner=index.get(row["winner_id"]),
        strength=row["strength"],
        ranking=said["ranking"] and [[index[r] for r in tier] for tier in said["ranking"]],
        ratings={index[int(r)]: rated for r, rated in said["ratings"].items()},
        edit=None if said["edit_id"] is None else (index[said["edit_id"]], said["edit_text"]),
        spans=[{k: v for k, v in s.items() if k != "response_id"} | {"answer": index[s["response_id"]]} for s in said["spans"]],
        rationale=said["rationale"],
        reason=said["reason"],
        order=[index[r] for r in json.loads(row["order_json"])],
        served_reason=row["served_reason"],
        source=row["source"],
        tags=json.loads(row["tags_json"]),
        is_gold=bool(row["is_gold"]),
        is_control=bool(row["is_control"]),
        item_status=row["status"],
        gold_pass=None if row["gold_pass"] is None else bool(row["gold_pass"]),
        late=bool(row["late"]),
        paused=bool(row["paused"]),
        elapsed_ms=row["elapsed_ms"],
        active_ms=row["active_ms"],
        guideline_version=row["guideline_version"],
        revision=row["revision"],
        event_seq=row["event_seq"],
        at=row["created_at"],
    )  # fmt: skip


def for_training(votes: Iterable[Vote]) -> list[Vote]:
    """Votes that may be trained on: no gold, no item in doubt or taken out, no paused annotator, no repeats or skips."""
    return [
        vote
        for vote in votes
        if not vote.is_gold
        and not vote.paused
        and vote.round in (FIRST, REVIEW)
        and vote.outcome in COUNTED
        and vote.item_status not in ("flagged", "retired")
    ]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What all votes on two answers of one item come to. `share`: of the votes for `better`, ties as halves."""

    vote: Vote  # any of them, for prompt and texts
    better: int
    worse: int
    strength: float
    share: float
    votes: int


def settle(votes: Sequence[Vote], *, min_share: float = 0.5) -> list[Verdict]:
    """A verdict for each pair of answers that has a majority above `min_share`; a reviewer's decision stands alone.

    Even splits and ties give none. Items in order of their first vote.
    """
    by_item: dict[int, list[Vote]] = defaultdict(list)
    for vote in votes:
        by_item[vote.item].append(vote)
    verdicts = []
    for said in by_item.values():
        said = [vote for vote in said if vote.round == REVIEW][-1:] or said
        for i in range(len(said[0].responses)):
            for j in range(i + 1, len(said[0].responses)):
                strengths: dict[bool, list[int]] = {True: [], False: []}
                for vote in said:
                    for better, worse, strength in vote.preferences():
                        if {better, worse} == {i, j}:
                            strengths[better == i].append(strength)
                total = sum(vote.outcome != "both_bad" for vote in said)  # it says nothing about the order
                for_i, for_j = len(strengths[True]), len(strengths[False])
                if for_i == for_j:
                    continue
                won, lost = max(for_i, for_j), min(for_i, for_j)
                share = (won + (total - won - lost) / 2) / total
                if share > min_share or share == 1.0:
                    i_wins = for_i > for_j
                    verdicts.append(
                        Verdict(
                            vote=said[0],
                            better=i if i_wins else j,
                            worse=j if i_wins else i,
                            strength=sum(strengths[i_wins]) / won,
                            share=share,
                            votes=total,
                        )
                    )
    return verdicts
