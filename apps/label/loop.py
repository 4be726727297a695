"""The way back: labels -> reward model -> the next items to label.

    plumbline label-loop --db labels.db --config configs/reward_model/demo.yaml

1. Exports the labels so far. One prompt in `--holdout-every` is held out by its hash, the same ones in every round, so that
   no version was ever trained on what any version is judged by.
2. Trains a reward model on the rest.
3. Compares it with the version in use on the held-out labels and on the gold items.
4. Registers it, and puts it into use if it is better (`--promote`); the previous one stays, `plumbline models roll-back`.
5. Scores the open items with the version in use and orders the queue by `--strategy`.
"""

import argparse
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from plumbline.align.data.rows import PreferencePair, last_user_text, read_preferences, split_pairs
from plumbline.apps.label.exchange import export_rows
from plumbline.apps.label.store.database import Row, open_database
from plumbline.apps.label.store.store import LabelStore
from plumbline.apps.registry import DEFAULT_FOLDER, Registry, Version
from plumbline.eval.stats.intervals import mcnemar_exact, wilson
from plumbline.reward.contracts import ask

KIND = "reward-model"
STRATEGIES = ("uncertain", "gap", "disagreement", "diverse", "random")

Scorer = Callable[[Sequence[str], Sequence[str]], Sequence[float | None]]  # prompts, answers -> scores
Trainer = Callable[[Path, Path, "LoopSettings"], Path]  # pairs file, run folder -> model folder


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """Settings of one round."""

    runs: Path = Path("runs/label_loop")
    config: str = ""  # settings file of the reward stage
    holdout_every: int = 5
    strategy: str = "uncertain"
    promote: str = "better"  # or "always", "never"
    min_labels: int = 50  # pairs for training; fewer teach nothing
    seed: int = 0

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ValueError(f"strategy={self.strategy!r}: must be one of {', '.join(STRATEGIES)}")
        if self.promote not in ("better", "always", "never"):
            raise ValueError(f"promote={self.promote!r}: must be 'better', 'always' or 'never'")
        if self.holdout_every < 2:
            raise ValueError(f"holdout_every={self.holdout_every}: must be at least 2, or nothing is left to train on")


def train_reward_model(pairs: Path, run: Path, settings: LoopSettings) -> Path:
    """The reward stage as `plumbline reward-model` runs it, on these pairs."""
    from trl import RewardConfig

    from plumbline.align.reward_model import RewardModelSettings, train
    from plumbline.align.runtime.launch import parse_settings, trainer_defaults

    argv = ["--config", settings.config] if settings.config else []
    argv += ["--train_file", str(pairs), "--output_dir", str(run), "--holdout_every", str(settings.holdout_every)]
    stage, args = parse_settings(
        (RewardModelSettings, RewardConfig), argv, stage="reward_model", defaults=trainer_defaults()
    )
    return train(stage, args) / "model"


def load_reward_model(path: Path) -> Scorer:
    """Scores of a trained reward model."""
    from plumbline.reward.learned import LearnedPreference

    return LearnedPreference(str(path))


def run_loop(
    store: LabelStore,
    registry: Registry,
    settings: LoopSettings,
    *,
    train: Trainer = train_reward_model,
    load: Callable[[Path], Scorer] = load_reward_model,
) -> dict[str, Any]:
    """One round; returns its report, which is also written to `report.json` in the round's folder."""
    # 1. Labels out.
    number = len(registry.versions(KIND)) + 1
    run = settings.runs / f"round-{number}"
    run.mkdir(parents=True, exist_ok=True)
    pairs_file = run / "pairs.jsonl"
    rows = export_rows(store, "preference")
    if not rows:
        raise ValueError("no labels to train on yet; label some pairs first")
    pairs_file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    train_pairs, held_out = split_pairs(read_preferences(pairs_file), settings.holdout_every)
    if len(train_pairs) < settings.min_labels or not held_out:
        raise ValueError(
            f"{len(train_pairs)} labelled pairs to train on and {len(held_out)} held out; at least {settings.min_labels}"
            " and 1 are asked for: label more, or lower --min-labels"
        )

    # 2. and 3. Train, and compare on what neither version has seen.
    before = registry.current(KIND)
    model = train(pairs_file, run, settings)
    new, old = load(model), load(Path(before.path)) if before else None
    gold = gold_pairs(store)
    report: dict[str, Any] = {"round": number, "train_pairs": len(train_pairs), "model": str(model)}
    for name, some in (("held_out", held_out), ("gold", gold)):
        report[name] = compare(new, old, some) if some else None

    # 4. Register, and decide.
    metrics = {name: report[name]["new"]["mean"] for name in ("held_out", "gold") if report[name]}
    parents = [before.name] if before else []
    version = registry.register(KIND, model, parents=parents, data=[pairs_file], metrics=metrics)
    take = settings.promote == "always" or settings.promote == "better" and is_better(report)
    if take:
        registry.promote(version.name)
    report |= {"version": version.name, "promoted": take, "before": before.name if before else None}

    # 5. What to label next.
    scorer = new if take or old is None else old
    in_use: Version = version if take or before is None else before
    report["reordered"] = reorder(store, scorer, old if take else new, settings, model=in_use.name)
    (run / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def gold_pairs(store: LabelStore) -> list[PreferencePair]:
    """Gold items with a known winner, as pairs."""
    with store.database.read() as run:
        items = run("SELECT id, prompt_json, gold_json FROM item WHERE is_gold = 1 AND status = 'open' ORDER BY id")
        texts = {
            item["id"]: run("SELECT text FROM response WHERE item_id = ? ORDER BY idx", (item["id"],)) for item in items
        }
    pairs = []
    for item in items:
        winner = json.loads(item["gold_json"]).get("winner")
        for idx, row in enumerate(texts[item["id"]]):
            if winner is not None and idx != winner:
                chosen, rejected = texts[item["id"]][winner]["text"], row["text"]
                pairs.append(
                    PreferencePair(
                        prompt=json.loads(item["prompt_json"]),
                        chosen=[{"role": "assistant", "content": chosen}],
                        rejected=[{"role": "assistant", "content": rejected}],
                    )
                )
    return pairs


def hits(scorer: Scorer, pairs: Sequence[PreferencePair]) -> np.ndarray:
    """(len(pairs),) whether the chosen answer scores higher; an answer without a score loses."""
    prompts = [pair.prompt for pair in pairs]
    texts = [pair.chosen[-1]["content"] for pair in pairs] + [pair.rejected[-1]["content"] for pair in pairs]
    scores = np.array([-math.inf if s is None else s for s in ask(scorer, prompts + prompts, texts)], dtype=float)
    return scores[: len(pairs)] > scores[len(pairs) :]


def compare(new: Scorer, old: Scorer | None, pairs: Sequence[PreferencePair]) -> dict[str, Any]:
    """Accuracy of both with Wilson intervals, and McNemar's exact p for "both are as good" on the same pairs."""
    found = hits(new, pairs)
    result: dict[str, Any] = {"pairs": len(pairs), "new": wilson(int(found.sum()), len(pairs))._asdict(), "old": None}
    if old is not None:
        earlier = hits(old, pairs)
        result["old"] = wilson(int(earlier.sum()), len(pairs))._asdict()
        result["p"] = mcnemar_exact(earlier, found).p
    return result


def is_better(report: dict[str, Any]) -> bool:
    """More held-out pairs right than the version in use, or as many and gold no worse; always without one in use."""
    held_out, gold = report["held_out"], report["gold"]
    if held_out["old"] is None:
        return True
    gain = held_out["new"]["mean"] - held_out["old"]["mean"]
    gold_gain = gold["new"]["mean"] - gold["old"]["mean"] if gold else 0.0
    return gain > 0 or gain == 0 and gold_gain >= 0


def reorder(store: LabelStore, scorer: Scorer, other: Scorer | None, settings: LoopSettings, *, model: str) -> int:
    """Scores the answers of open items and sets priorities; returns how many items. The random slice keeps its order."""
    with store.database.read() as run:
        items = run(
            "SELECT id, prompt_json FROM item WHERE status = 'open' AND is_gold = 0 AND is_control = 0 ORDER BY id"
        )
        open_items = {item["id"]: json.loads(item["prompt_json"]) for item in items}
        responses = [
            row
            for row in run("SELECT id, item_id, text FROM response ORDER BY item_id, idx")
            if row["item_id"] in open_items
        ]
        labelled = run("SELECT prompt_json FROM item WHERE n_done > 0")
    if not responses:
        return 0
    prompts = [open_items[row["item_id"]] for row in responses]
    texts = [row["text"] for row in responses]
    scores = ask(scorer, prompts, texts)
    gaps = top_gaps(responses, scores)
    others = top_gaps(responses, ask(other, prompts, texts)) if other and settings.strategy == "disagreement" else None
    priorities = rank_items(
        gaps,
        settings.strategy,
        others=others,
        prompts={item: last_user_text(prompt) for item, prompt in open_items.items()},
        labelled=[last_user_text(json.loads(row["prompt_json"])) for row in labelled],
        seed=settings.seed,
    )
    known = {row["id"]: float(score) for row, score in zip(responses, scores, strict=True) if score is not None}
    store.set_scores(known, model=model)
    store.set_priorities(priorities, model=model)
    return len(priorities)


def top_gaps(responses: Sequence[Row], scores: Sequence[float | None]) -> dict[int, float]:
    """item -> score of its first answer less that of the second; of more than two: of the best two, in that order."""
    by_item: dict[int, list[float]] = {}
    for row, score in zip(responses, scores, strict=True):
        by_item.setdefault(row["item_id"], []).append(0.0 if score is None else float(score))
    best = {item: values if len(values) == 2 else sorted(values)[-2:] for item, values in by_item.items()}
    return {item: values[0] - values[1] for item, values in best.items()}


def rank_items(
    gaps: dict[int, float],
    strategy: str,
    *,
    others: dict[int, float] | None = None,
    prompts: dict[int, str] | None = None,
    labelled: Sequence[str] = (),
    seed: int = 0,
) -> dict[int, float]:
    """Priorities in [0, 1], higher first.

    uncertain      the model gives both answers about the same chance
    gap            the model is surest (arXiv:2603.09692 gained most there)
    disagreement   two versions of the model differ most in the chance they give; without a second one: uncertain
    diverse        the prompt is farthest from all labelled ones, by embedding
    random         a draw
    """
    chance = {item: 1 / (1 + math.exp(-max(-50.0, min(50.0, gap)))) for item, gap in gaps.items()}
    if strategy == "random":
        rng = random.Random(seed)
        return {item: rng.random() for item in gaps}
    if strategy == "gap":
        return {item: abs(2 * p - 1) for item, p in chance.items()}
    if strategy == "disagreement" and others is not None:
        other = {item: 1 / (1 + math.exp(-max(-50.0, min(50.0, gap)))) for item, gap in others.items()}
        return {item: abs(p - other[item]) for item, p in chance.items()}
    if strategy == "diverse" and labelled and prompts:
        from plumbline.safety.embedder.embedding import load_embedder

        embedder = load_embedder()
        new_ND, known_MD = embedder.embed([prompts[item] for item in gaps]), embedder.embed(list(labelled))
        nearest_N = (new_ND @ known_MD.T).max(1)
        return {item: float((1 - cosine) / 2) for item, cosine in zip(gaps, nearest_N, strict=True)}
    return {item: 1 - abs(2 * p - 1) for item, p in chance.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="plumbline label-loop", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--db", default="labels.db", help="SQLite file or postgresql:// URL")
    parser.add_argument("--registry", default=DEFAULT_FOLDER)
    parser.add_argument("--runs", type=Path, default=Path("runs/label_loop"))
    parser.add_argument("--config", default="", help="settings file of the reward stage")
    parser.add_argument("--holdout-every", type=int, default=5)
    parser.add_argument("--strategy", default="uncertain", help=f"one of {', '.join(STRATEGIES)}")
    parser.add_argument("--promote", default="better", help="better, always or never")
    parser.add_argument("--min-labels", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = vars(parser.parse_args(argv))
    db, registry = args.pop("db"), args.pop("registry")
    settings = LoopSettings(**args)
    if "://" not in db and not Path(db).is_file():
        raise ValueError(f"{db}: no such label database; `plumbline label` makes one")
    store = LabelStore(open_database(db))
    report = run_loop(store, Registry(registry), settings)
    for name in ("held_out", "gold"):
        if found := report[name]:
            old = f", {found['old']['mean']:.3f} before (p = {found['p']:.2g})" if found["old"] else ""
            print(f"{name}: {found['new']['mean']:.3f} of {found['pairs']} pairs right{old}")
    print(
        f"{report['version']}: {'in use' if report['promoted'] else 'kept, not in use'}; {report['reordered']} items reordered"
    )
    print(json.dumps(report))
    return 0
