"""Trains the classifier heads in safety/weights from the starter data and, where given, public sets.

    python -m plumbline.safety.training.train_heads --data DIR --out safety/weights

Per head: out-of-fold scores (5 folds, grouped so that the rows of one prompt or template stay together) give the dev
figures and the calibration; then the weights are fitted on every row. Rows nearer than cosine 0.9 to a test prompt
are dropped first. Nothing is chosen on the tests: the threshold of every figure is 0.5 of the calibrated probability.

Prints a table and, as the last line, one JSON object with every figure.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from plumbline.paths import STARTER
from plumbline.safety.classifier import SHIPPED, Head, HeadCard, fit_platt
from plumbline.safety.embedder.embedding import EMBEDDER_ID, Embedder, load_embedder
from plumbline.safety.text.worst_piece import sentences
from plumbline.safety.training import head_data, identity_sentences
from plumbline.safety.training.head_data import Example
from plumbline.safety.verifier import refusal

FOLDS = 5
NEAR = 0.9  # cosine from which a training row counts as a copy of a test prompt
STD_FLOOR = 0.02  # a feature that hardly occurs in training must not explode when it does occur
HEADS = ("harm", "injection", "refusal", "toxicity")
HARM_TESTS = (
    ("strongreject", "recall"),
    ("malicious_instruct", "recall"),
    ("dolly", "fpr"),
    ("alpaca_eval", "fpr"),
    ("mitre_benign_held_out", "fpr"),
)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a head is fitted. `hidden` 0 is logistic regression; several seeds are averaged, as one wider layer."""

    hidden: int
    epochs: int
    dropout: float = 0.2
    lr: float = 2e-3
    weight_decay: float = 0.3
    batch: int = 128
    seeds: tuple[int, ...] = (0,)
    weight_of: Callable[[Example], float] = lambda example: 1.0


def harm_weight(example: Example) -> float:
    """Twins are rarer in training than in the questions that decide whether a guard is usable."""
    return {"starter_twin": 4.0, "twin_word": 4.0, "twin_role": 4.0, "starter": 2.0}.get(example.source, 1.0)


def refusal_weight(example: Example) -> float:
    if example.source == "starter":
        return 4.0 if example.label else 2.0
    return {"stock": 2.0, "lookalike": 3.0}.get(example.source, 1.0)


def toxicity_weight(example: Example) -> float:
    """Tone towards the reader is what the reward is about; tweets are many, and mostly about one word list."""
    return {"tone": 4.0, "starter": 0.5, "tweets": 0.4, "identity": 1.0}.get(example.source, 1.0)


def injection_weight(example: Example) -> float:
    """The written rows and the templates are few among everyday prompts, and their look-alikes are what decides."""
    return {"scene": 5.0, "technique": 5.0, "gptfuzz": 3.0, "giskard": 3.0, "sysprompt_extraction": 3.0}.get(
        example.source, 1.0
    )


RECIPES = {
    "harm": Recipe(hidden=64, epochs=60, seeds=(0, 1, 2), weight_of=harm_weight),
    "injection": Recipe(hidden=64, epochs=30, dropout=0.3, seeds=(0, 1), weight_of=injection_weight),
    "harm_kind": Recipe(hidden=0, epochs=60, dropout=0.3),
    "refusal": Recipe(hidden=32, epochs=20, dropout=0.6, weight_of=refusal_weight),
    "toxicity": Recipe(hidden=64, epochs=20, seeds=(0, 1), weight_of=toxicity_weight),
}


# ------------------------------------------------------------------------------------------------------------ fitting


def fit(name: str, labels: tuple[str, ...], features: str, x: np.ndarray, y: np.ndarray, w: np.ndarray) -> Head:
    """An uncalibrated head: weighted cross-entropy by AdamW with a one-cycle rate; averaged over the recipe's seeds.

    x (N, D) features; y (N,) class indices, or 0/1 with one label; w (N,) row weights.
    """
    recipe = RECIPES[name]
    mean, std = x.mean(0), np.maximum(x.std(0), STD_FLOOR)
    inputs = torch.tensor((x - mean) / std, dtype=torch.float32)
    target = torch.tensor(y, dtype=torch.long)
    weight = torch.tensor(w / w.mean(), dtype=torch.float32)
    nets = [_fit_net(recipe, inputs, target, weight, len(labels), seed) for seed in recipe.seeds]
    tensors = {"mean": mean.astype(np.float32), "std": std.astype(np.float32)}
    if recipe.hidden:
        tensors["w1"] = np.concatenate([net[1].weight.detach().numpy().T for net in nets], axis=1)  # type: ignore[operator]
        tensors["b1"] = np.concatenate([net[1].bias.detach().numpy() for net in nets])  # type: ignore[operator]
        tensors["w2"] = np.concatenate([net[4].weight.detach().numpy().T for net in nets], axis=0) / len(nets)  # type: ignore[operator]
        tensors["b2"] = np.mean([net[4].bias.detach().numpy() for net in nets], axis=0)  # type: ignore[operator]
    else:
        tensors["w"] = np.mean([net[1].weight.detach().numpy().T for net in nets], axis=0)  # type: ignore[operator]
        tensors["b"] = np.mean([net[1].bias.detach().numpy() for net in nets], axis=0)  # type: ignore[operator]
    return Head(HeadCard(name=name, labels=labels, features=features), tensors)


def _fit_net(
    recipe: Recipe, inputs: torch.Tensor, target: torch.Tensor, weight: torch.Tensor, labels: int, seed: int
) -> nn.Sequential:
    rng = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        width = recipe.hidden or labels
        layers: list[nn.Module] = [nn.Dropout(recipe.dropout), nn.Linear(inputs.shape[1], width)]
        if recipe.hidden:
            layers += [nn.Tanh(), nn.Dropout(recipe.dropout), nn.Linear(width, labels)]
        net = nn.Sequential(*layers)
        optimizer = torch.optim.AdamW(net.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
        batches = max(1, len(inputs) // recipe.batch)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, total_steps=recipe.epochs * batches)
        for _ in range(recipe.epochs):
            order = torch.randperm(len(inputs), generator=rng)
            for rows in order.tensor_split(batches):
                out = net(inputs[rows])
                if labels == 1:
                    loss = nn.functional.binary_cross_entropy_with_logits(
                        out[:, 0], target[rows].float(), reduction="none"
                    )
                else:
                    loss = nn.functional.cross_entropy(out, target[rows], reduction="none")
                optimizer.zero_grad()
                (loss * weight[rows]).mean().backward()
                optimizer.step()
                schedule.step()
    return net.eval()


def cross_fit(
    name: str, labels: tuple[str, ...], features: str, x: np.ndarray, y: np.ndarray, w: np.ndarray, group: Sequence[str]
) -> np.ndarray:
    """(N, C) logits of each row by a head that saw neither the row nor its group."""
    fold = np.array([zlib.crc32(key.encode()) % FOLDS for key in group])
    logits = np.zeros((len(y), len(labels)))
    for k in range(FOLDS):
        inside = fold == k
        if inside.any():
            logits[inside] = fit(name, labels, features, x[~inside], y[~inside], w[~inside]).logits(x[inside])
    return logits


def train_binary(
    name: str, features: str, examples: Sequence[Example], x: np.ndarray, dev: Callable[[Example], bool]
) -> tuple[Head, dict[str, Any]]:
    """A calibrated head and its dev figures; `dev` picks the rows that calibration and dev figures are taken on."""
    y = np.array([example.label for example in examples])
    w = np.array([RECIPES[name].weight_of(example) for example in examples])
    logits = cross_fit(name, (name,), features, x, y, w, [example.group for example in examples])[:, 0]
    chosen = np.array([dev(example) for example in examples])
    scale, shift = fit_platt(logits[chosen], y[chosen])
    head = fit(name, (name,), features, x, y, w)
    p = 1 / (1 + np.exp(-(scale * logits[chosen] + shift)))
    figures = {
        "dev_rows": int(chosen.sum()),
        "dev_auroc": auroc(p, y[chosen]),
        "dev_recall": rate(p[y[chosen] == 1]),
        "dev_fpr": rate(p[y[chosen] == 0]),
        "dev_ece": calibration_error(p, y[chosen]),
        "rows": dict(sorted(Counter(f"{e.source}:{e.label}" for e in examples).items())),
    }
    return Head(replace(head.card, scale=scale, shift=shift, data_hash=data_hash(examples)), head.weights), figures


def data_hash(examples: Sequence[Example]) -> str:
    rows = sorted(json.dumps([e.prompt, e.text, e.label, e.category]) for e in examples)
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


def without_copies(
    examples: Sequence[Example], x: np.ndarray, tests: np.ndarray
) -> tuple[list[Example], np.ndarray, dict[str, int]]:
    """Leaves out examples whose embedding is within NEAR of a test embedding; also says how many a source lost."""
    nearest = (x @ tests.T).max(1) if len(tests) else np.zeros(len(x))
    keep = nearest < NEAR
    dropped = Counter(e.source for e, kept in zip(examples, keep, strict=True) if not kept)
    return [e for e, kept in zip(examples, keep, strict=True) if kept], x[keep], dict(sorted(dropped.items()))


# ------------------------------------------------------------------------------------------------------------ measures


def auroc(scores: np.ndarray, labels: np.ndarray) -> float:
    """P(a positive scores above a negative), ties one half; nan without both."""
    scores, labels = np.asarray(scores, dtype=np.float64), np.asarray(labels)
    positives, negatives = int((labels == 1).sum()), int((labels == 0).sum())
    if not positives or not negatives:
        return float("nan")
    _, where, count = np.unique(scores, return_inverse=True, return_counts=True)
    rank = (np.cumsum(count) - (count - 1) / 2)[where]  # mean rank of ties, from 1
    return float((rank[labels == 1].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def rate(p: np.ndarray) -> float:
    """Share above 0.5; nan of nothing."""
    return float((np.asarray(p) > 0.5).mean()) if len(p) else float("nan")


def f1(p: np.ndarray, y: np.ndarray) -> float:
    hit, said = float(((p > 0.5) & (y == 1)).sum()), float((p > 0.5).sum())
    return 2 * hit / (said + float((y == 1).sum())) if hit else 0.0


def calibration_error(p: np.ndarray, y: np.ndarray, bins: int = 10) -> float:
    """Expected calibration error over equal-width bins (Guo et al. 2017)."""
    at = np.minimum((np.asarray(p) * bins).astype(int), bins - 1)
    gaps = [abs(p[at == b].mean() - y[at == b].mean()) * (at == b).mean() for b in range(bins) if (at == b).any()]
    return float(sum(gaps))


def identity_gap(predict: Callable[[list[str]], np.ndarray]) -> float:
    """Mean over TEST sentences and pairs of groups of |p(sentence with one) - p(sentence with the other)|."""
    groups = identity_sentences.GROUPS + identity_sentences.UNSEEN_GROUPS
    gaps = []
    for template in identity_sentences.TEST:
        p = predict([template.format(group) for group in groups])
        gaps += [abs(a - b) for a, b in combinations(p.tolist(), 2)]
    return float(np.mean(gaps))


# ------------------------------------------------------------------------------------------------------------ the heads


class Trainer:
    """Holds what all heads share: the embedder, the rows of the starter data, the public folder, the tests."""

    def __init__(self, embedder: Embedder, starter: Path, data: Path | None) -> None:
        self.embedder = embedder
        self.starter = head_data.read_starter(starter)
        self.data = data or Path("/nonexistent")
        self.tests = head_data.read_tests(self.data)
        evaluation = starter / "eval.jsonl"
        self.evaluation = head_data.read_jsonl(evaluation) if evaluation.is_file() else []

    def p(self, head: Head, examples: Sequence[Example]) -> np.ndarray:
        if not examples:
            return np.zeros(0)
        return head.predict(self.embedder.embed([example.text for example in examples]))

    def harm(self) -> tuple[list[Head], dict[str, Any]]:
        examples = head_data.starter_harm(self.starter) + list(head_data.public_harm(self.data))
        x = self.embedder.embed([example.text for example in examples])
        held_out = [e.text for name in ("strongreject", "malicious_instruct", "xstest") for e in self.tests[name]]
        held_out += [head_data.text_of(row, "prompt") for row in self.evaluation]
        examples, x, dropped = without_copies(examples, x, self.embedder.embed(held_out))
        own = lambda e: e.source.startswith(("starter", "twin"))  # noqa: E731  the hard negatives are the starter's
        head, figures = train_binary("harm", EMBEDDER_ID, examples, x, own)
        figures |= {"dropped_as_copies": dropped, "tests": self.harm_tests(head)}
        figures["left_out"] = self.leave_one_out(examples, x)

        kinds = sorted({e.category for e in examples if e.category})
        known = np.array([bool(e.category) for e in examples])
        y = np.array([kinds.index(e.category) if e.category else 0 for e in examples])[known]
        group = [e.group for e in examples if e.category]
        x, w = x[known], np.ones(int(known.sum()))
        logits = cross_fit("harm_kind", tuple(kinds), EMBEDDER_ID, x, y, w, group)
        kind = fit("harm_kind", tuple(kinds), EMBEDDER_ID, x, y, w)
        figures["kind_dev_accuracy"] = float((logits.argmax(1) == y).mean())
        scale = _temperature(logits, y)
        card = replace(kind.card, scale=scale, data_hash=head.card.data_hash)
        return [head, Head(card, kind.weights)], figures

    def harm_tests(self, head: Head) -> dict[str, float]:
        figures = {
            f"{name}_{what}": rate(self.p(head, self.tests[name])) for name, what in HARM_TESTS if self.tests[name]
        }
        if rows := self.tests["xstest"]:
            p, y = self.p(head, rows), np.array([e.label for e in rows])
            figures |= {
                "xstest_unsafe_recall": rate(p[y == 1]),
                "xstest_safe_fpr": rate(p[y == 0]),
                "xstest_auroc": auroc(p, y),
                "xstest_ece": calibration_error(p, y),
            }
        if self.evaluation:
            rows = [
                Example(
                    text=head_data.text_of(r, "prompt"),
                    label=int(r["kind"] == "harmful"),
                    source="",
                    category=r["kind"],
                )
                for r in self.evaluation
            ]
            p, kind = self.p(head, rows), np.array([e.category for e in rows])
            figures |= {
                "starter_eval_harmful_recall": rate(p[kind == "harmful"]),
                "starter_eval_twin_fpr": rate(p[kind == "twin"]),
                "starter_eval_ordinary_fpr": rate(p[kind == "ordinary"]),
                "starter_eval_auroc_twins": auroc(p[kind != "ordinary"], (kind == "harmful")[kind != "ordinary"] * 1),
            }
        return figures

    def leave_one_out(self, examples: Sequence[Example], x: np.ndarray) -> dict[str, dict[str, float]]:
        """For each public set of harmful prompts: recall on it, and AUROC against unseen twins, when it is not trained on."""
        y, source = np.array([e.label for e in examples]), np.array([e.source for e in examples])
        w = np.array([RECIPES["harm"].weight_of(e) for e in examples])
        unseen = np.array([e.source == "starter_twin" and zlib.crc32(e.group.encode()) % FOLDS == 0 for e in examples])
        figures = {}
        for name in sorted(set(source[(y == 1) & (source != "starter")])):
            train = (source != name) & ~unseen
            p = fit("harm", ("harm",), EMBEDDER_ID, x[train], y[train], w[train]).predict(x)
            out = source == name
            both = np.concatenate([p[out], p[unseen]]), np.concatenate([np.ones(out.sum()), np.zeros(unseen.sum())])
            figures[str(name)] = {"recall": rate(p[out]), "auroc_twins": auroc(*both), "twin_fpr": rate(p[unseen])}
        for name in ("twin_word", "twin_role"):  # a whole recipe of twins unseen
            out = source == name
            if out.any():
                p = fit("harm", ("harm",), EMBEDDER_ID, x[~out], y[~out], w[~out]).predict(x[out])
                figures[name] = {"twin_fpr": rate(p)}
        return figures

    def injection(self) -> tuple[list[Head], dict[str, Any]]:
        examples = head_data.starter_injection(self.starter) + list(head_data.public_injection(self.data))
        x = self.embedder.embed([example.text for example in examples])
        held_out = [
            e.text for name in ("jailbreaks_in_the_wild", "cyberseceval_injection", "bipia") for e in self.tests[name]
        ]
        examples, x, dropped = without_copies(examples, x, self.embedder.embed(held_out))
        own = lambda e: e.source in {"scene", "technique", "starter"}  # noqa: E731
        head, figures = train_binary("injection", EMBEDDER_ID, examples, x, own)
        y, source = np.array([e.label for e in examples]), np.array([e.source for e in examples])
        w = np.array([RECIPES["injection"].weight_of(e) for e in examples])
        left_out = {}
        for name in sorted(set(source[y == 1])):  # a recipe is left out with its look-alikes
            out = source == name
            p = fit("injection", ("injection",), EMBEDDER_ID, x[~out], y[~out], w[~out]).predict(x[out])
            left_out[str(name)] = {"recall": rate(p[y[out] == 1]), "look_alike_fpr": rate(p[y[out] == 0])}
        tests = {}
        for name, what in (("jailbreaks_in_the_wild", "recall"), ("cyberseceval_injection", "recall"), ("bipia", "recall"),
                           ("dolly", "fpr"), ("alpaca_eval", "fpr"), ("xstest", "fpr"), ("mitre_benign_held_out", "fpr")):  # fmt: skip
            if self.tests[name]:
                tests[f"{name}_{what}"] = rate(self.p(head, self.tests[name]))
        return [head], figures | {"dropped_as_copies": dropped, "left_out": left_out, "tests": tests}

    def refusal(self) -> tuple[list[Head], dict[str, Any]]:
        examples = head_data.starter_refusals(self.starter) + list(head_data.written_refusals(self.starter))
        examples += list(head_data.refusals_of_a_small_model(self.starter))
        examples += list(head_data.public_answers(self.data))

        def features(rows: Sequence[Example]) -> np.ndarray:
            return refusal.refusal_features(self.embedder, [e.prompt for e in rows], [e.text for e in rows])

        dev = lambda e: e.source in {"starter", "stock", "lookalike", "decline", "opened", "own"}  # noqa: E731
        head, figures = train_binary("refusal", refusal.FEATURES, examples, features(examples), dev)
        if rows := self.tests["xstest_completions"]:
            p, y = head.predict(features(rows)), np.array([e.label for e in rows])
            label = np.array([e.category for e in rows])
            figures["tests"] = {
                "xstest_completions_f1": f1(p, y),
                "xstest_completions_auroc": auroc(p, y),
                "full_refusal_recall": rate(p[label == "2_full_refusal"]),
                "partial_refusal_recall": rate(p[label == "3_partial_refusal"]),
                "compliance_fpr": rate(p[y == 0]),
            }
        return [head], figures

    def toxicity(self) -> tuple[list[Head], dict[str, Any]]:
        examples = list(head_data.starter_toxicity(self.starter)) + list(head_data.public_toxicity(self.data))
        x = self.embedder.embed([example.text for example in examples])
        head, figures = train_binary(
            "toxicity", EMBEDDER_ID, examples, x, lambda e: e.source in {"tone", "starter", "identity"}
        )
        tests: dict[str, float] = {
            "identity_gap": identity_gap(lambda texts: head.predict(self.embedder.embed(texts))),
        }
        if answers := [e.text for e in head_data.public_answers(self.data)]:  # not trained on here
            pieces = [[text, *(text[s.start : s.end] for s in sentences(text))] for text in answers]
            worst = [head.predict(self.embedder.embed(parts)).max() for parts in pieces]
            tests["public_answers_flagged"] = rate(np.array(worst))
        for name in ("hatecheck", "openai_moderation"):
            rows = self.tests[name]
            if rows:
                p, y = self.p(head, rows), np.array([e.label for e in rows])
                tests |= {
                    f"{name}_auroc": auroc(p, y),
                    f"{name}_recall": rate(p[y == 1]),
                    f"{name}_fpr": rate(p[y == 0]),
                }
        if rows := self.tests["openai_moderation"]:
            tests["openai_moderation_hate_auroc"] = auroc(p, np.array([int(e.category == "hate") for e in rows]))
        figures["tests"] = tests
        return [head], figures


def _temperature(logits: np.ndarray, y: np.ndarray) -> float:
    """The scale of the logits, on a grid of 5% steps from 0.1 to 4.7, under which the labels are likeliest."""

    def loss(scale: float) -> float:
        z = scale * logits
        top = z.max(1, keepdims=True)
        return float((np.log(np.exp(z - top).sum(1)) + top[:, 0] - z[np.arange(len(y)), y]).mean())

    return min((0.1 * 1.05**step for step in range(80)), key=loss)


# ------------------------------------------------------------------------------------------------------------ command


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description="Train the classifier heads of safety/weights.")
    parser.add_argument("--starter", type=Path, default=STARTER, help="folder of the starter data")
    parser.add_argument("--data", type=Path, help="folder of public sets as <set>/<file>.jsonl.gz (optional)")
    parser.add_argument("--out", type=Path, default=SHIPPED, help="folder for <head>.safetensors")
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=None, help="default: all")
    parser.add_argument(
        "--threads", type=int, default=1, help="CPU threads; results are reproducible for a fixed number"
    )
    options = parser.parse_args(arguments)
    if options.data is not None and not options.data.is_dir():
        raise SystemExit(f"--data {options.data} is not a folder; leave it out to train on the starter data alone")
    torch.set_num_threads(options.threads)
    trainer = Trainer(load_embedder(options.threads), options.starter, options.data)
    options.out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"data": "starter only" if options.data is None else "starter and public sets"}
    for name in options.heads or HEADS:
        heads, figures = getattr(trainer, name)()
        report[name] = figures
        for head in heads:
            head = Head(replace(head.card, details=figures), head.weights)
            head.save(options.out / f"{head.card.name}.safetensors")
        print(f"\n{name}")
        for key, value in figures.items():
            for label, number in value.items() if isinstance(value, dict) else [("", value)]:
                shown = f"{number:.3f}" if isinstance(number, float) else str(number)
                print(f"  {key:18s} {label:32s} {shown}", flush=True)
    print(json.dumps(report))
    return report


if __name__ == "__main__":
    main()
