"""How an answer begins: with given words, or not with them.

The shallowest of guides. A model decides to decline in its first tokens and then goes on as it began (Qi et al. 2024,
arXiv:2406.05946), so the other behaviour is had from the same model by taking these few tokens out of its hands.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from plumbline.policy_models.rollout.generation import DecodeRow


class Openings:
    """Processor: rows in `begin` start with the given tokens, rows in `avoid` with another token than any of theirs.

    Args:
        begin: token ids by the place of the prompt in the list given to `generate`.
        avoid: token ids that may not come first, by the same.

    ValueError for a row with an empty opening, and for one that is asked to begin with what it must avoid.
    """

    def __init__(
        self, *, begin: Mapping[int, Sequence[int]] | None = None, avoid: Mapping[int, Sequence[int]] | None = None
    ) -> None:
        self.begin = {row: list(ids) for row, ids in (begin or {}).items()}
        self.avoid = {row: list(ids) for row, ids in (avoid or {}).items()}
        for row, ids in self.begin.items():
            if not ids:
                raise ValueError(f"row {row} is to begin with no tokens; leave it out")
            if ids[0] in self.avoid.get(row, []):
                raise ValueError(f"row {row} is to begin with token {ids[0]} and to avoid it; drop one of the two")

    def __call__(self, rows: Sequence[DecodeRow], logits_BV: Tensor) -> Tensor:
        logits_BV = logits_BV.clone()
        for at, row in enumerate(rows):
            opening, place = self.begin.get(row.row, []), len(row.answer)
            if place < len(opening):
                kept = logits_BV[at, opening[place]].clone()
                logits_BV[at] = -math.inf
                logits_BV[at, opening[place]] = kept
            elif place == 0 and (ids := self.avoid.get(row.row)):
                logits_BV[at, torch.tensor(ids, device=logits_BV.device)] = -math.inf
        return logits_BV
