"""Does it pay to choose what people label? Each strategy of `plumbline label-loop` against random order, at equal labels.

    python benchmarks/rewards/bench_active.py                                   # a world of words, and the starter pairs
    python benchmarks/rewards/bench_active.py --data FOLDER_OR_FILE             # pairs that people judged (align/data/formats.py)

Simulated annotators label through the real store and loop: claim, submit, `run_loop`, reorder, again. They say the truth
with probability 1 - noise. After each round the loop's model is asked about pairs that are not in the queue; these share no
prompt with it. A fifth of the queue stays a random slice under every strategy, as in the app.

The reward model is logistic regression: on word counts in the world of words, whose truth is linear in them, and on the
first 96 principal components of MiniLM embeddings of prompt and answer for texts. Seeds change pool, order, noise and
draws, the same for every strategy, so differences are taken within a seed. Prints a table a world, and one line of JSON.
"""

import argparse
import json
import math
import random
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from plumbline.align.data.formats import read_pairs  # noqa: E402
from plumbline.align.data.rows import last_user_text, read_preferences, split_pairs  # noqa: E402
from plumbline.apps.label.loop import STRATEGIES, LoopSettings, Scorer, run_loop  # noqa: E402
from plumbline.apps.label.store.answers import Answer  # noqa: E402
from plumbline.apps.label.store.database import SQLiteDatabase  # noqa: E402
from plumbline.apps.label.store.items import NewItem, NewResponse  # noqa: E402
from plumbline.apps.label.store.store import LabelStore  # noqa: E402
from plumbline.apps.registry import Registry  # noqa: E402
from plumbline.paths import STARTER  # noqa: E402
from plumbline.reward.tuning import embedding_features, fit_logistic  # noqa: E402

Features = Callable[[Sequence[str], Sequence[str]], np.ndarray]  # prompts, answers -> (N, F)
COMPONENTS = 96
T_95 = {n: t for n, t in zip(range(2, 31), (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201,
        2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052,
        2.048, 2.045), strict=True)}  # fmt: skip  # seeds -> Student's t of a two-sided 95% interval


@dataclass(frozen=True, kw_only=True)
class World:
    """Pairs with a known better answer, and what a reward model sees of a text."""

    name: str
    pairs: list[tuple[str, str, str]]  # prompt, better, worse
    features: Features
    l2: float


def world_of_words(number: int = 1600, seed: int = 0) -> World:
    """Answers are six of 40 words; what an answer is worth is the sum of its words' hidden worths."""
    rng = np.random.default_rng(seed)
    worth = rng.normal(size=40)
    words = [f"w{n:02d}" for n in range(len(worth))]

    def counts(prompts: Sequence[str], answers: Sequence[str]) -> np.ndarray:
        return np.array([[answer.split().count(word) for word in words] for answer in answers], dtype=float)

    pairs = []
    for n in range(number):
        drawn = rng.integers(0, len(words), (2, 6))
        order = np.argsort(-worth[drawn].sum(1))
        better, worse = (" ".join(words[w] for w in drawn[at]) for at in order)
        if better != worse:
            pairs.append((f"question {n}", better, worse))
    return World(name="words", pairs=pairs, features=counts, l2=0.01)


def world_of_texts(source: str | Path, name: str) -> World:
    """Pairs that people judged, ties left out, one a prompt; the features of all answers are made once."""
    from plumbline.safety.embedder.embedding import load_embedder

    pairs: dict[str, tuple[str, str, str]] = {}
    for pair in read_pairs(source)[0]:
        better, worse = pair.chosen[-1]["content"].strip(), pair.rejected[-1]["content"].strip()
        prompt = "\n\n".join(message["content"] for message in pair.prompt).strip()
        if pair.p_chosen > 0.5 and better and worse and better != worse:
            pairs.setdefault(prompt, (prompt, better, worse))
    keys = [(prompt, answer) for prompt, *answers in pairs.values() for answer in answers]
    x_NF = embedding_features(load_embedder().embed, [prompt for prompt, _ in keys], [answer for _, answer in keys])
    x_NF = x_NF - x_NF.mean(0)
    axes_FK = np.linalg.eigh(x_NF.T @ x_NF)[1][:, -COMPONENTS:]  # no label was looked at
    rows = dict(zip(keys, x_NF @ axes_FK, strict=True))

    def features(prompts: Sequence[str], answers: Sequence[str]) -> np.ndarray:
        return np.stack([rows[key] for key in zip(prompts, answers, strict=True)])

    return World(name=name, pairs=list(pairs.values()), features=features, l2=0.03)


def learn(
    world: World, strategy: str, seed: int, *, rounds: int, labels: int, noise: float, held_out: int
) -> list[float]:
    """Accuracy on `held_out` pairs outside the queue after each round of `labels` labels."""
    rng = random.Random(seed)
    pairs = rng.sample(world.pairs, len(world.pairs))
    test, pool = pairs[:held_out], pairs[held_out:]
    better = {(prompt, text) for prompt, text, _ in pool}

    def train(file: Path, run: Path, settings: LoopSettings) -> Path:
        some = split_pairs(read_preferences(file), settings.holdout_every)[0]
        prompts = [last_user_text(pair.prompt) for pair in some]
        sides = ([getattr(pair, side)[-1]["content"] for pair in some] for side in ("chosen", "rejected"))
        chosen, rejected = (world.features(prompts, texts) for texts in sides)
        (run / "model").mkdir(exist_ok=True)
        np.savez(run / "model" / "weights.npz", fit_logistic(chosen - rejected, l2=world.l2))
        return run / "model"

    def load(path: Path) -> Scorer:
        weight_F = np.load(path / "weights.npz")["arr_0"]
        return lambda prompts, answers: [float(score) for score in world.features(prompts, answers) @ weight_F]

    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None  # what is measured is not the disk
    accuracies = []
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        store = LabelStore(SQLiteDatabase(Path(folder) / "labels.db"), seed=seed)
        store.change_settings(None, {"target_labels": 1, "repeat_share": 0.0})
        account = store.add_account("annotator", "a simulated password", "annotator")
        store.add_items(
            NewItem(prompt=[{"role": "user", "content": prompt}], responses=[NewResponse(text=a), NewResponse(text=b)])
            for prompt, a, b in pool
        )
        settings = LoopSettings(runs=Path(folder), strategy=strategy, promote="always", min_labels=1, seed=seed)
        for number in range(rounds):
            for _ in range(labels):
                task = store.claim(account.id)
                if task is None:
                    raise ValueError(f"{world.name}: {len(pool)} pairs are too few for {rounds} x {labels} labels")
                first = (task["prompt"][0]["content"], task["answers"][0]["text"]) in better
                said = first == (rng.random() >= noise)
                answer = Answer(outcome="prefer", winner=0 if said else 1, strength=2)
                store.submit(account.id, task["assignment"], f"request-{task['assignment']}", answer)
            run_loop(store, Registry(Path(folder) / "registry"), settings, train=train, load=load)
            scorer = load(Path(folder) / f"round-{number + 1}" / "model")
            prompts = [prompt for prompt, _, _ in test]
            good, bad = (np.array(scorer(prompts, [row[at] for row in test])) for at in (1, 2))
            accuracies.append(float(np.mean(good > bad)))
        store.database.close()
    return accuracies


def interval(values: Sequence[float]) -> tuple[float, float]:
    """(mean, half-width of its 95% interval) over seeds."""
    half = T_95[len(values)] * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return float(np.mean(values)), half


def measure(
    world: World, *, seeds: int, rounds: int, labels: int, noise: float, strategies: Sequence[str] = STRATEGIES
) -> dict[str, Any]:
    """All strategies on one world; differences to `random` are within a seed, averaged over the rounds after the first."""
    held_out = len(world.pairs) // 4
    found = {
        name: np.array([
            learn(world, name, seed, rounds=rounds, labels=labels, noise=noise, held_out=held_out)
            for seed in range(seeds)
        ])
        for name in strategies
    }  # fmt: skip
    rows = {}
    for name, runs_SR in found.items():
        gain = None if name == "random" else interval((runs_SR - found["random"])[:, 1:].mean(1).tolist())
        rows[name] = {"accuracy": [interval(runs_SR[:, at].tolist()) for at in range(rounds)], "gain": gain}
    return {"world": world.name, "pairs": len(world.pairs), "labels": [labels * (n + 1) for n in range(rounds)],
            "seeds": seeds, "noise": noise, "strategies": rows}  # fmt: skip


def table(result: dict[str, Any]) -> str:
    """The result as a Markdown table."""
    lines = [
        f"{result['world']}: {result['pairs']} pairs, annotators wrong {result['noise']:.0%} of the time,"
        f" {result['seeds']} seeds; held-out accuracy after that many labels, mean and 95% interval over seeds",
        "",
        "| strategy | " + " | ".join(str(n) for n in result["labels"]) + " | against random, rounds 2 on |",
        "|---" * (len(result["labels"]) + 2) + "|",
    ]
    for name, row in result["strategies"].items():
        cells = [f"{100 * mean:.1f} ± {100 * half:.1f}" for mean, half in row["accuracy"]]
        gain = "" if row["gain"] is None else f"{100 * row['gain'][0]:+.1f} ± {100 * row['gain'][1]:.1f}"
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {gain} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", help="judged pairs: a file, a folder or a hub id; default: words and the starter pairs"
    )
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--labels", type=int, default=50, help="a round")
    parser.add_argument("--noise", type=float, default=0.15, help="share of labels that are wrong")
    args = parser.parse_args()
    if args.seeds not in T_95:
        parser.error(f"--seeds {args.seeds}: 2 to 30")
    if args.rounds < 2 or args.labels < 10 or not 0 <= args.noise < 0.5:
        parser.error("--rounds 2 and more, --labels 10 and more, --noise from 0 to below 0.5")
    if args.data:
        worlds = [world_of_texts(args.data, Path(args.data).name)]
    else:
        worlds = [world_of_words(), world_of_texts(STARTER / "preferences.jsonl", "starter pairs")]
    sizes = {"seeds": args.seeds, "rounds": args.rounds, "labels": args.labels, "noise": args.noise}
    results = []
    for world in worlds:
        results.append(measure(world, **sizes))
        print(table(results[-1]), flush=True)
        print()
    print(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
