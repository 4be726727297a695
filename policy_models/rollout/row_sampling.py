"""The next token of rows that each sample in their own way: temperature, top-k and top-p a row.

B rows, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from plumbline.policy_models.rollout.generation import sample

_LIKELIEST = 1024  # tokens that top-p looks at first: nearly always enough, and a sort of a whole vocabulary is slow


@dataclass(frozen=True, kw_only=True)
class RowSampling:
    """How one row draws. temperature 0 takes the likeliest token; top_k 0 and top_p 1 leave all tokens in."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature={self.temperature} must be a finite number of at least 0")
        if self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"top_k={self.top_k} must be at least 0, top_p={self.top_p} above 0 and at most 1")


def sample_rows(logits_BV: Tensor, how: Sequence[RowSampling], uniform_B: Tensor) -> Tensor:
    """One token a row (B,), from one uniform number in [0, 1) a row.

    As in transformers: the temperature first, then the top_k likeliest, then of these the fewest that hold top_p of the
    mass. A row's token depends on that row alone. Logits that are NaN give an arbitrary token.
    """
    greedy = [at for at, one in enumerate(how) if one.temperature == 0]
    if len(greedy) == len(how):
        return logits_BV.argmax(dim=-1)
    token_B = torch.empty(len(how), dtype=torch.long, device=logits_BV.device)
    if greedy:
        token_B[greedy] = logits_BV[greedy].argmax(dim=-1)
    drawn = [at for at, one in enumerate(how) if one.temperature > 0]
    scaled = logits_BV[drawn].float()
    scaled /= torch.tensor([how[at].temperature for at in drawn], device=scaled.device)[:, None]
    for place, at in enumerate(drawn):
        if how[at].top_k or how[at].top_p < 1:
            scaled[place] = _likeliest(scaled[place], how[at].top_k, how[at].top_p)
    token_B[drawn] = sample(scaled, 1.0, uniform_B[drawn])[0]
    return token_B


def _likeliest(logits_V: Tensor, top_k: int, top_p: float) -> Tensor:
    """The logits with -inf outside of what top-k and then top-p leave."""
    vocab = logits_V.shape[0]
    count = min(top_k or _LIKELIEST, vocab)
    values, ids = logits_V.topk(count)
    if top_p < 1:
        total = torch.logsumexp(values if top_k else logits_V, 0)
        mass = (values - total).exp()
        before = mass.cumsum(0) - mass
        if not top_k and count < vocab and float(before[-1]) < top_p:
            values, ids = logits_V.sort(descending=True)
            mass = (values - total).exp()
            before = mass.cumsum(0) - mass
        values, ids = values[before < top_p], ids[before < top_p]
    return torch.full_like(logits_V, -math.inf).scatter_(0, ids, values)


def log_probabilities(logits_V: Tensor, token: int, top: int) -> tuple[float, list[tuple[int, float]]]:
    """Natural log-probability of a token at temperature 1, and the `top` likeliest tokens with theirs."""
    logp_V = logits_V.float().log_softmax(-1)
    values, ids = logp_V.topk(min(top, len(logp_V)))
    return float(logp_V[token]), list(zip(ids.tolist(), values.tolist(), strict=True))
