"""Small classifier heads on frozen features: logistic regression, or one hidden layer.

A head is one safetensors file: the weights, and beside them (in the same file) the labels, the calibration and where the
weights came from. Calibration is Platt's (1999) for one label and a temperature (Guo et al. 2017) for several, fitted
on rows that the weights did not see.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

SHIPPED = Path(__file__).parent / "weights"


@dataclass(frozen=True, kw_only=True)
class HeadCard:
    """What is known about a head.

    labels       one label: the head gives its probability; several: a distribution over them
    features     what the head expects; a head is refused where other features are made
    scale, shift logit -> scale * logit + shift before the sigmoid or softmax (shift 0 for several labels)
    data_hash    SHA-256 over the sorted training rows, so that a changed data set is seen
    details      counts, sources and held-out results, for people
    """

    name: str
    labels: tuple[str, ...]
    features: str
    scale: float = 1.0
    shift: float = 0.0
    data_hash: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)


class Head:
    """Features (B, D) to probabilities.

    weights: "mean", "std" (D,) standardise the features; then either "w" (D, C), "b" (C,), or "w1" (D, H), "b1" (H,),
    "w2" (H, C), "b2" (C,) with a tanh between. Matrices are rounded to float16 here, not when saving, so that a head
    before and after a round trip through its file is the same head.
    """

    def __init__(self, card: HeadCard, weights: Mapping[str, np.ndarray]) -> None:
        self.card = card
        # In C order: safetensors writes the bytes of a transposed array as they lie, and so another matrix.
        rounded = {name: value.astype(np.float16) if value.ndim == 2 else value for name, value in weights.items()}
        self.weights = {name: np.ascontiguousarray(value, dtype=np.float32) for name, value in rounded.items()}
        hidden = set(self.weights) == {"mean", "std", "w1", "b1", "w2", "b2"}
        if not hidden and set(self.weights) != {"mean", "std", "w", "b"}:
            raise ValueError(
                f"head {card.name!r} has tensors {sorted(self.weights)}; see plumbline.safety.classifier.Head"
            )
        last = self.weights["b2" if hidden else "b"]
        if last.shape != (len(card.labels),):
            raise ValueError(f"head {card.name!r}: {last.shape[0]} outputs for {len(card.labels)} labels")
        self._wide = {
            name: value.astype(np.float64) for name, value in self.weights.items()
        }  # what `logits` computes with
        self.version = hashlib.sha256(b"".join(self.weights[name].tobytes() for name in sorted(weights))).hexdigest()[
            :12
        ]

    def logits(self, features: np.ndarray) -> np.ndarray:
        """(B, D) -> calibrated logits (B, C) float64."""
        w = self._wide
        features = np.asarray(features)
        if features.ndim != 2 or features.shape[1] != w["mean"].shape[0]:
            raise ValueError(
                f"head {self.card.name!r} takes features of shape (B, {w['mean'].shape[0]}), got {features.shape}"
            )
        x = (features.astype(np.float64) - w["mean"]) / w["std"]
        raw = x @ w["w"] + w["b"] if "w" in w else np.tanh(x @ w["w1"] + w["b1"]) @ w["w2"] + w["b2"]
        return self.card.scale * raw + self.card.shift

    def predict(self, features: np.ndarray) -> np.ndarray:
        """(B, D) -> probabilities: (B,) for one label, (B, C) rows adding to 1 for several."""
        logits = self.logits(features)
        if len(self.card.labels) == 1:
            return sigmoid(logits[:, 0])
        logits -= logits.max(1, keepdims=True)
        return np.exp(logits) / np.exp(logits).sum(1, keepdims=True)

    def save(self, path: str | Path) -> None:
        """One safetensors file; the card is its metadata."""
        tensors = {name: value.astype(np.float16) if value.ndim == 2 else value for name, value in self.weights.items()}
        save_file(tensors, str(path), metadata={"card": json.dumps(asdict(self.card), sort_keys=True)})

    @classmethod
    def load(cls, path: str | Path, *, features: str | None = None) -> Head:
        """Raises FileNotFoundError or ValueError with the path; ValueError also if the head wants other features."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(
                f"no head at {path}; train it with: python -m plumbline.safety.training.train_heads --out {path.parent}"
            )
        try:
            with safe_open(str(path), framework="numpy") as file:
                fields = json.loads((file.metadata() or {})["card"])
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{path} is not a head file ({error}); train it again with plumbline.safety.training.train_heads"
            ) from error
        card = HeadCard(**{**fields, "labels": tuple(fields["labels"])})
        if features is not None and card.features != features:
            raise ValueError(f"{path} was fitted on features {card.features!r}, not {features!r}; train it again")
        return cls(card, weights)


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)) without overflow."""
    return np.where(x >= 0, 1 / (1 + np.exp(-np.abs(x))), np.exp(-np.abs(x)) / (1 + np.exp(-np.abs(x))))


def fit_platt(logits: Sequence[float], labels: Sequence[int], *, steps: int = 100) -> tuple[float, float]:
    """Platt scaling: (scale, shift) that maximise the likelihood of 0/1 labels under sigmoid(scale * logit + shift).

    Newton's method with Platt's smoothed targets, which keep separable data from an infinite scale.
    """
    z, y = np.asarray(logits, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    positives, negatives = y.sum(), (1 - y).sum()
    if min(positives, negatives) < 1:
        raise ValueError(f"calibration needs both labels, got {positives:.0f} positive and {negatives:.0f} negative")
    target = np.where(y == 1, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    theta = np.array([1.0, 0.0])
    design = np.stack([z, np.ones_like(z)], axis=1)

    def loss(at: np.ndarray) -> float:
        x = design @ at
        return float((np.logaddexp(0, x) - target * x).sum())

    for _ in range(steps):
        p = sigmoid(design @ theta)
        gradient = design.T @ (p - target)
        hessian = design.T @ (design * (p * (1 - p))[:, None]) + 1e-9 * np.eye(2)
        step, size = np.linalg.solve(hessian, gradient), 1.0
        while loss(theta - size * step) > loss(theta) and size > 1e-6:
            size /= 2
        theta = theta - size * step
        if np.abs(size * step).max() < 1e-10:
            break
    return float(theta[0]), float(theta[1])
