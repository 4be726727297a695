"""Whether what comes in now is still what came in before: scores by PSI, meaning by MMD, against a reference window.

PSI (population stability index) compares the scores of each scanner in ten bins of the reference; by the usual rule of thumb below 0.1
is steady and from 0.25 on drifted. MMD (Gretton et al. 2012, JMLR 13) compares embeddings under an RBF kernel with
the median distance as its width; its p-value comes from a permutation test, so it holds for small windows too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from plumbline.rows import read_rows
from plumbline.safety.embedder.embedding import load_embedder
from plumbline.safety.findings import ScanItem
from plumbline.safety.scanning import Scanning

MOST = 1000  # texts a window that the MMD looks at: its cost grows with their square


@dataclass(frozen=True, kw_only=True)
class Drift:
    """psi by scanner and for "blocked" and "length"; mmd is the biased squared MMD, p its permutation p-value."""

    psi: dict[str, float]
    mmd: float
    p: float
    permutations: int
    reference: int
    window: int

    @property
    def drifted(self) -> bool:
        """A score's PSI reached 0.25, or the embeddings differ at the 1% level."""
        return self.p < 0.01 or any(value >= 0.25 for value in self.psi.values())

    def as_dict(self) -> dict[str, Any]:
        return {**{f"psi_{name}": round(value, 4) for name, value in self.psi.items()}, "mmd": round(self.mmd, 6), "p": self.p,
                "reference": self.reference, "window": self.window, "drifted": self.drifted}  # fmt: skip


def compare(
    reference: Sequence[str], window: Sequence[str], *, policy: str = "default", permutations: int = 500
) -> Drift:
    """Drift of `window` against `reference`; each needs 20 texts or more."""
    for name, texts in (("reference", reference), ("window", window)):
        if len(texts) < 20:
            raise ValueError(f"the {name} window has {len(texts)} texts; below 20 nothing can be said about drift")
    scanning = Scanning(policy)
    before, now = _scores(scanning, reference), _scores(scanning, window)
    embedder = load_embedder()
    x, y = embedder.embed(list(reference)[:MOST]), embedder.embed(list(window)[:MOST])
    value, p = mmd(x, y, permutations=permutations)
    return Drift(
        psi={name: psi(before[name], now[name]) for name in before}, mmd=value, p=p, permutations=permutations,
        reference=len(reference), window=len(window),
    )  # fmt: skip


def psi(reference: np.ndarray, window: np.ndarray, bins: int = 10) -> float:
    """Population stability index over the quantile bins of the reference; half a row is added to each bin, so it stays finite."""
    edges = np.unique(np.quantile(reference, np.linspace(0, 1, bins + 1)[1:-1]))
    a = np.bincount(np.searchsorted(edges, reference, side="left"), minlength=len(edges) + 1) + 0.5
    b = np.bincount(np.searchsorted(edges, window, side="left"), minlength=len(edges) + 1) + 0.5
    a, b = a / a.sum(), b / b.sum()
    return float(((a - b) * np.log(a / b)).sum())


def mmd(x: np.ndarray, y: np.ndarray, *, permutations: int = 500, seed: int = 0) -> tuple[float, float]:
    """Squared MMD of (N, D) and (M, D) samples, biased estimate, and the p-value of "one distribution"."""
    both = np.concatenate([x, y])
    square = ((both[:, None] - both[None]) ** 2).sum(-1) if len(both) <= 200 else _squared_distances(both)
    off = square[~np.eye(len(both), dtype=bool)]
    kernel = np.exp(-square / max(float(np.median(off)), 1e-12))
    signs = np.concatenate([np.full(len(x), 1 / len(x)), np.full(len(y), -1 / len(y))])
    value = float(signs @ kernel @ signs)
    rng = np.random.default_rng(seed)
    shuffled = np.stack([rng.permutation(signs) for _ in range(permutations)])
    null = ((shuffled @ kernel) * shuffled).sum(1)
    return value, float((1 + (null >= value - 1e-12).sum()) / (1 + permutations))


def _squared_distances(x: np.ndarray) -> np.ndarray:
    norms = (x**2).sum(1)
    return np.maximum(norms[:, None] + norms[None] - 2 * x @ x.T, 0)


def _scores(scanning: Scanning, texts: Sequence[str]) -> dict[str, np.ndarray]:
    """The highest score of each scanner on each text, whether it is blocked, and its length."""
    verdicts = [scanning.check_batch([ScanItem(text=text)])[0] for text in texts]
    scores = {
        entry.name: np.array(
            [max((f.score for f in v.findings if f.scanner == entry.name), default=0.0) for v in verdicts]
        )
        for entry, _ in scanning.scanners
    }
    scores["blocked"] = np.array([float(v.blocked) for v in verdicts])
    scores["length"] = np.array([float(len(text)) for text in texts])
    return scores


def read_texts(path: Path) -> list[str]:
    """The field `text` of each row of a file; ValueError with the line that has none."""
    texts = []
    for place, row in read_rows(path):
        if not isinstance(row.get("text"), str):
            raise ValueError(f"{place}: needs a JSON object with a field 'text' (found {sorted(row)})")
        texts.append(row["text"])
    return texts
