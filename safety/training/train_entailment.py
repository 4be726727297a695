"""`python -m plumbline.safety.training.train_entailment`: fits the embedded entailment head on pairs made from data/starter/facts.jsonl.

From every fact: the fact itself, its clauses and the question with its answer as supported claims; other facts of the topic, half a fact
with an addition, and a number or name exchanged as unsupported ones. All made by rules from facts written for this project: the
head learns how much wording must agree, nothing about the world. Contradiction is left to the rules.

A fifth of the facts is held out for the figures in the card. Ends with a line of JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
from pathlib import Path

import numpy as np

from plumbline.paths import STARTER
from plumbline.rows import file_rows
from plumbline.safety.classifier import SHIPPED, Head, HeadCard, sigmoid
from plumbline.safety.embedder.embedding import load_embedder
from plumbline.safety.verifier.entailment import FEATURES, features
from plumbline.safety.verifier.vetoes import names, quantities

FACTS = STARTER / "facts.jsonl"
Row = tuple[str, str, int]  # passage, claim, 1 if supported


def pairs_of(facts: list[dict], seed: int = 0) -> list[Row]:
    """Labelled (passage, claim, label) rows; some passages carry a neighbour, as retrieved ones do."""
    rng = random.Random(seed)
    rows: list[Row] = []
    all_names = {
        fact["topic"]: sorted({n for f in facts if f["topic"] == fact["topic"] for n in names(f["fact"])})
        for fact in facts
    }
    for fact in facts:
        same_topic = [other for other in facts if other["topic"] == fact["topic"] and other is not fact]
        others = rng.sample(same_topic, min(3, len(same_topic)))
        for passage in (fact["fact"], " ".join([fact["fact"], *(o["fact"] for o in others[:1])])):
            true = [
                fact["fact"],
                *clauses(fact["fact"]),
                f"{fact['question']} {fact['answer']}",
                shuffled(fact["fact"]),
            ]
            rows += [(passage, claim, 1) for claim in true]
            rows += [
                (passage, wrong, 0) for claim in true[:3] for wrong in corrupted(claim, all_names[fact["topic"]], rng)
            ]
            rows += [
                (passage, claim, 0) for other in others[1:] for claim in (other["fact"], *clauses(other["fact"])[:1])
            ]
            # half of the fact and an addition that the passage does not have
            rows += [
                (passage, f"{clause.rstrip('.')} {extra}", 0)
                for clause in clauses(fact["fact"])[:1]
                for extra in rng.sample(ADDITIONS, 2)
            ]
    return rows


ADDITIONS = [
    "and attracts many visitors every summer.",
    "because of a decision by its government.",
    "and was paid for by a wealthy merchant.",
    "although most historians disagree about the cause.",
    "and is celebrated with a yearly festival.",
    "which made its inventor very rich.",
]


def clauses(sentence: str) -> list[str]:
    """Beginnings of a sentence that stand without the rest."""
    parts = re.split(r", (?=with|which|who|whose|and|in|where)|; | and (?=\w+s |\w+ed )", sentence)
    return [parts[0].rstrip(".") + "."] if len(parts) > 1 and len(parts[0].split()) >= 4 else []


def shuffled(sentence: str) -> str:
    """The same said from the other end: "A is in B." -> "In B, A is." where there is a last phrase to move."""
    found = re.match(r"([^,]+?) ((?:in|on|at|by|from|between) (?:[^,;.]+))\.$", sentence)
    return (
        f"{found[2][0].upper()}{found[2][1:]}, {found[1][0].lower() if found[1].split()[0] in ('The', 'A') else found[1][0]}{found[1][1:]}."
        if found
        else sentence
    )


def corrupted(claim: str, pool: list[str], rng: random.Random) -> list[str]:
    """The claim with one number or one name changed."""
    wrong = []
    for quantity in quantities(claim)[:1]:
        if digits := re.search(r"\d[\d,]*(?:\.\d+)?", quantity.text):
            value = float(digits[0].replace(",", ""))
            value = (
                value + rng.choice([-40, -7, 3, 12, 60])
                if quantity.kind in ("year", "date")
                else value * rng.choice([0.5, 0.8, 1.3, 2])
            )
            number = f"{value:,.0f}" if "," in digits[0] else f"{value:.0f}"
            if number != digits[0]:
                wrong.append(claim[: quantity.start] + quantity.text.replace(digits[0], number) + claim[quantity.end :])
    used = names(claim)
    choices = [name for name in pool if not set(name.split()) & set(" ".join(used).split())]
    if used and choices:
        wrong.append(claim.replace(used[-1], rng.choice(choices)))
    return wrong


def fit(rows: list[Row], details: dict | None = None) -> Head:
    """Logistic regression on standardised features, classes weighing the same, every weight on its side of zero (`SIGNS`)."""
    x = features([(passage, claim) for passage, claim, _ in rows], load_embedder().embed).astype(np.float64)
    y = np.array([label for *_, label in rows])
    mean, std = x.mean(0), x.std(0) + 1e-6
    w, b = signed_logistic((x - mean) / std, y, np.array(SIGNS))
    digest = hashlib.sha256("\n".join(sorted(f"{p}\t{c}\t{label}" for p, c, label in rows)).encode()).hexdigest()
    card = HeadCard(
        name="entailment", labels=("supported",), features=FEATURES, data_hash=digest, details=details or {}
    )
    return Head(card, {"mean": mean, "std": std, "w": w[:, None], "b": np.array([b])})


# More shared words or a nearer meaning never speak against support, a missing number or name never for it. Without this the
# unsupported near copies among the training pairs teach that shared words speak against support.
SIGNS = [1, 1, 1, 1, 1, -1, -1, 1]


def signed_logistic(x: np.ndarray, y: np.ndarray, signs: np.ndarray, *, l2: float = 1e-3) -> tuple[np.ndarray, float]:
    """Weights (D,) with sign(w) in {0, signs}, and the bias, by projected gradient; both classes have half of the weight."""
    share = np.where(y == 1, 0.5 / (y == 1).sum(), 0.5 / (y == 0).sum())
    step = 4.0 / (np.linalg.norm(x * np.sqrt(share)[:, None], 2) ** 2 + 1 + 4 * l2)  # 1 / the curvature at most
    w, b = np.zeros(x.shape[1]), 0.0
    for _ in range(20_000):
        residual = share * (sigmoid(x @ w + b) - y)
        new = w - step * (x.T @ residual + l2 * w)
        new = np.where(new * signs > 0, new, 0.0)
        b -= step * residual.sum()
        if np.abs(new - w).max() < 1e-9:
            break
        w = new
    return w, b


def recalls(head: Head, rows: list[Row]) -> dict[str, float]:
    """Share of each label that the head gets right at 0.5."""
    yes = head.predict(features([(p, c) for p, c, _ in rows], load_embedder().embed)) >= 0.5
    y = np.array([label for *_, label in rows])
    return {"recall supported": float(yes[y == 1].mean()), "recall unsupported": float((~yes[y == 0]).mean())}


def main() -> None:
    """Fits on four fifths for the figures, then on all facts for the head that ships."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=SHIPPED / "entailment.safetensors")
    args = parser.parse_args()
    facts = [row for _, row in file_rows(FACTS)]
    random.Random(0).shuffle(facts)
    cut = len(facts) // 5
    held_out = recalls(fit(pairs_of(facts[cut:])), pairs_of(facts[:cut], seed=1))
    rows = pairs_of(facts)
    supported = sum(label for *_, label in rows)
    counts = {"starter facts:supported": supported, "starter facts:unsupported": len(rows) - supported}
    fit(rows, {"tests": {f"held-out facts, {k}": v for k, v in held_out.items()}, "rows": counts}).save(args.out)
    print(json.dumps({**{k: round(v, 3) for k, v in held_out.items()}, **counts}))


if __name__ == "__main__":
    main()
