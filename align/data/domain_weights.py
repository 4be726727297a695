"""Quality filtering, level 3: how good a row is, how many rows of which domain, and a mixture that follows the losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from plumbline.reward.tuning import embedding_features, fit_logistic

Embed = Callable[[Sequence[str]], NDArray[Any]]


class QualityScore:
    """How much people would like an answer: a linear model on embeddings, fitted on preference pairs (chosen > rejected)."""

    def __init__(self, embed: Embed, weight_F: NDArray[Any]) -> None:
        self.embed, self.weight_F = embed, weight_F

    @classmethod
    def fit(
        cls, embed: Embed, prompts: Sequence[str], chosen: Sequence[str], rejected: Sequence[str], *, l2: float = 0.03
    ) -> QualityScore:
        """From pairs; a few hundred give a rough order, which is all that balancing asks for."""
        difference = embedding_features(embed, prompts, chosen) - embedding_features(embed, prompts, rejected)
        return cls(embed, fit_logistic(difference, l2=l2))

    def __call__(self, prompts: Sequence[str], answers: Sequence[str]) -> NDArray[Any]:
        """(N,) scores; only their order means something."""
        return embedding_features(self.embed, prompts, answers) @ self.weight_F


def difficulty(prompts: Sequence[str], answers: Sequence[str], levels: int = 3) -> NDArray[Any]:
    """(N,) level from 0: by quantiles of the words of prompt and answer, a long request with a long answer being harder."""
    words = np.array(
        [np.log1p(len(p.split())) + np.log1p(len(a.split())) for p, a in zip(prompts, answers, strict=True)]
    )
    return np.searchsorted(np.quantile(words, np.arange(1, levels) / levels), words, side="right")


def balance(
    domain: Sequence[Any], level: Sequence[Any], quality: Sequence[float], *, keep: int, evenness: float = 0.5
) -> list[int]:
    """Rows to keep, at most `keep`: cells of domain and difficulty share them, the best rows of each cell first.

    evenness: 0 keeps the proportions of the data, 1 gives every cell the same, between them n^(1 - evenness). What a small
    cell cannot fill goes to the others.
    """
    if keep < 1 or not 0 <= evenness <= 1:
        raise ValueError(f"{keep=} must be at least 1 and {evenness=} in [0, 1]")
    cells: dict[tuple[Any, Any], list[int]] = {}
    for row, cell in enumerate(zip(domain, level, strict=True)):
        cells.setdefault(cell, []).append(row)
    for rows in cells.values():
        rows.sort(key=lambda row: -quality[row])
    quota = dict.fromkeys(cells, 0)
    left = min(keep, len(domain))
    while left:
        open_cells = [cell for cell, rows in cells.items() if quota[cell] < len(rows)]
        share = np.array([len(cells[cell]) ** (1 - evenness) for cell in open_cells])
        want = left * share / share.sum()
        given = np.minimum(np.floor(want), [len(cells[cell]) - quota[cell] for cell in open_cells]).astype(int)
        if not given.any():  # fewer left than cells: the largest remainders get one each
            given[np.argsort(-want, kind="stable")[:left]] = 1
        for cell, more in zip(open_cells, given.tolist(), strict=True):
            quota[cell] += more
        left -= int(given.sum())
    return sorted(row for cell, rows in cells.items() for row in rows[: quota[cell]])


def update_mixture(
    weights: Mapping[str, float],
    loss: Mapping[str, float],
    target: Mapping[str, float],
    *,
    rate: float = 1.0,
    floor: float = 0.02,
) -> dict[str, float]:
    """Shares of domains for the next stretch of training, more of what lags behind: w exp(rate * max(loss - target, 0)).

    After DoReMi (Xie et al. 2023, arXiv:2305.10429, algorithm 1), with the target in the place of the loss of its reference
    model: what the domain can reach, or reached before. Each domain keeps at least `floor` / number of domains.
    """
    if not weights or weights.keys() != loss.keys() or weights.keys() != target.keys():
        raise ValueError(f"domains differ: weights {sorted(weights)}, loss {sorted(loss)}, target {sorted(target)}")
    names = list(weights)
    excess = np.array([max(loss[n] - target[n], 0.0) for n in names])
    if not np.isfinite(excess).all() or min(weights.values()) <= 0:
        raise ValueError(f"losses must be finite and weights above 0: {dict(loss)}, {dict(weights)}")
    grown = np.array([weights[n] for n in names]) * np.exp(rate * (excess - excess.max()))
    shares = (1 - floor) * grown / grown.sum() + floor / len(names)
    return dict(zip(names, shares.tolist(), strict=True))
