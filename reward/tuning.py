"""Weights of a composite from labelled pairs, and the linear baseline on embeddings: both logistic on differences.

    P(chosen preferred) = s(w . (x_chosen - x_rejected)),   w = argmin mean log-loss + l2/2 |w|^2

For the composite x are the scaled parts and each weight keeps its sign (more toxicity never pays). For the baseline x is
made of MiniLM embeddings of prompt and answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[Any]


def fit_logistic(
    differences: Array, *, l2: float, signs: Sequence[int] | None = None, weight: Array | None = None
) -> Array:
    """(F,) weights for (N, F) differences of chosen less rejected, by Newton's method.

    signs: +1 keeps a weight >= 0, -1 keeps it <= 0, 0 leaves it free. A weight that would cross stays at 0 (active set:
    it comes back when the gradient asks for it). weight: (N,) how much each pair counts.
    """
    x_NF = np.asarray(differences, dtype=np.float64)
    if x_NF.ndim != 2 or not len(x_NF) or not np.isfinite(x_NF).all():
        raise ValueError(f"differences of shape {x_NF.shape} must be finite rows, at least one")
    count_N = np.ones(len(x_NF)) if weight is None else np.asarray(weight, dtype=np.float64)
    sign_F = np.zeros(x_NF.shape[1]) if signs is None else np.asarray(signs, dtype=np.float64)
    w_F = np.zeros(x_NF.shape[1])

    def loss(w: Array) -> float:
        return float((count_N * np.logaddexp(0, -x_NF @ w)).sum() / count_N.sum() + l2 / 2 * w @ w)

    for _ in range(100):
        p_N = 1 / (1 + np.exp(np.clip(x_NF @ w_F, -500, 500)))  # P(rejected preferred)
        gradient_F = -x_NF.T @ (count_N * p_N) / count_N.sum() + l2 * w_F
        held = (sign_F != 0) & (w_F == 0) & (gradient_F * sign_F >= 0)
        free = ~held
        if not free.any() or np.abs(gradient_F[free]).max() < 1e-8:
            break
        x_free = x_NF[:, free]
        curve = (x_free * (count_N * p_N * (1 - p_N))[:, None]).T @ x_free / count_N.sum()
        step_F = np.zeros_like(w_F)
        step_F[free] = np.linalg.solve(curve + (l2 + 1e-9) * np.eye(int(free.sum())), gradient_F[free])
        size, before = 1.0, loss(w_F)
        while True:  # halve until the loss falls
            tried = w_F - size * step_F
            tried = np.where(tried * sign_F < 0, 0.0, tried)
            if loss(tried) <= before or size < 1e-6:
                break
            size /= 2
        if np.abs(tried - w_F).max() < 1e-10:
            break
        w_F = tried
    return w_F


def tune_weights(
    differences: Mapping[str, ArrayLike], signs: Mapping[str, int], *, l2: float = 0.01
) -> dict[str, float]:
    """Weights by component name from (N,) scaled differences by name; as large as makes their mean size 1.

    Only ratios of weights matter to a ranking; PPO's other settings expect a reward whose parts weigh about 1. A part that
    does not help gets 0.
    """
    names = list(differences)
    x_NF = np.stack([np.asarray(differences[name], dtype=np.float64) for name in names], axis=1)
    w_F = fit_logistic(x_NF, l2=l2, signs=[signs[name] for name in names])
    total = np.abs(w_F).sum()
    if total == 0:
        raise ValueError("no part agrees with the labels: every weight came out 0; look at `plumbline reward explain`")
    return {name: float(w) for name, w in zip(names, w_F * len(names) / total, strict=True)}


def embedding_features(
    embed: Callable[[Sequence[str]], Array], prompts: Sequence[str], answers: Sequence[str]
) -> Array:
    """(N, 2 D): the answer, and prompt times answer by element."""
    answer_ND, prompt_ND = embed(answers), embed(prompts)
    return np.concatenate([answer_ND, prompt_ND * answer_ND * np.sqrt(answer_ND.shape[1])], axis=1)


def out_of_fold(differences: Array, fold_N: Array, *, l2: float, signs: Sequence[int] | None = None) -> Array:
    """(N,) margins of each pair under weights fitted on the other folds."""
    x_NF = np.asarray(differences, dtype=np.float64)
    margin_N = np.zeros(len(x_NF))
    for fold in np.unique(fold_N):
        inside = fold_N == fold
        margin_N[inside] = x_NF[inside] @ fit_logistic(x_NF[~inside], l2=l2, signs=signs)
    return margin_N
