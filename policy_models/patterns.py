"""Who sees whom: the masks of the attention patterns, and the selector of the sparse one.

"local_global": position i sees j <= i where i - j < window, or where i or j is a multiple of the stride: strided global
positions as in arXiv:1904.10509, which see and are seen by all as in arXiv:2004.05150.

"sparse": two branches, fused by a gate a head. The local one sees the window; the global one the `num_globals` tokens
outside it that a small scorer likes best: Native Sparse Attention (arXiv:2502.11089) without its compressed branch,
with the scorer of DeepSeek-V3.2. Departs from the latter in how the scorer learns: a chosen token's score is added to
its attention logit, so that the language-model loss trains it; no distillation from dense attention is needed.

Positions are those of the rotary embedding, so that padding on either side never moves a window. Masks are dense: the
patterns bound what is seen, and make no product smaller.

B rows, S queries, L keys, J heads of the scorer, C head width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from plumbline.policy_models.configuration import MoEPolicyConfig
from plumbline.policy_models.layers import ZeroLinear


@dataclass(frozen=True)
class Sight:
    """What each query may see, (B, 1, S, L) bool.

    Attributes:
        near: inside the pattern's own mask.
        far: visible to causal attention, but outside `near`.
    """

    near: Tensor
    far: Tensor

    def widened(self, num_keys: int) -> "Sight":
        """For a cache that was allocated longer than what it holds."""
        missing = num_keys - self.near.shape[-1]
        if missing == 0:
            return self
        return Sight(*(nn.functional.pad(part, (0, missing)) for part in (self.near, self.far)))


def sight(
    config: MoEPolicyConfig, attention_mask: Tensor | None, position_BS: Tensor, batch_size: int, past_length: int
) -> Sight:
    """The masks of `config.attention_pattern`.

    Args:
        attention_mask: (B, L) with 0 at padding, or None. Without it and without a cache, positions that start again
            separate packed sequences, as in transformers.
        position_BS: positions of the queries; (1, S) serves all rows.
        past_length: keys in the cache.
    """
    position_BS = position_BS.expand(batch_size, -1)
    num_queries = position_BS.shape[1]
    num_keys = past_length + num_queries
    column_L = torch.arange(num_keys, device=position_BS.device)
    causal = (column_L <= column_L[past_length:, None]).expand(batch_size, -1, -1)  # (B, S, L)
    if attention_mask is not None:
        if attention_mask.dim() != 2:
            raise ValueError(
                f"attention_pattern={config.attention_pattern!r} needs a 2-D attention_mask, not a ready one"
            )
        keep_BL = attention_mask.bool()
        causal = causal & keep_BL[:, None]
    if past_length == 0:
        key_position_BL = position_BS
        if attention_mask is None:
            sequence_BL = (position_BS.diff(dim=-1, prepend=position_BS[:, :1] - 1) != 1).cumsum(-1)
            causal = causal & (sequence_BL[:, :, None] == sequence_BL[:, None])
    elif attention_mask is not None:
        key_position_BL = keep_BL.long().cumsum(-1) - keep_BL.long()
    else:
        key_position_BL = column_L.expand(batch_size, -1)

    distance_BSL = position_BS[:, :, None] - key_position_BL[:, None]
    near = causal & (distance_BSL < config.attention_window)
    if config.attention_pattern == "local_global":
        query_is_global = position_BS % config.attention_stride == 0
        key_is_global = key_position_BL % config.attention_stride == 0
        near = near | (causal & (query_is_global[:, :, None] | key_is_global[:, None]))
    return Sight(near[:, None], (causal & ~near)[:, None])


class Selector(nn.Module):
    """Scores far tokens by content: I(t, s) = sum_j w_j(t) relu(q_j(t) . k(s)) / sqrt(C) (DeepSeek-V3.2, eq. 1)."""

    def __init__(self, config: MoEPolicyConfig) -> None:
        super().__init__()
        self.num_globals = config.attention_globals
        self.head_dim = config.head_dim
        self.query = nn.Linear(config.hidden_size, config.attention_index_heads * config.head_dim, bias=False)
        self.key = nn.Linear(config.hidden_size, config.head_dim, bias=False)
        self.head_weight = nn.Linear(config.hidden_size, config.attention_index_heads, bias=False)
        self.fusion = ZeroLinear(config.hidden_size, config.num_attention_heads)  # starts even: sigmoid(0) = 1/2

    def forward(self, x_BSD: Tensor, key_BLC: Tensor, far: Tensor) -> tuple[Tensor, Tensor]:
        """Additive mask (B, 1, S, L) fp32 of the global branch, and its part (B, S, H) in the output, 0 to 1.

        The mask is the score at chosen tokens and the lowest finite number elsewhere. Where nothing is far, the part
        is 0: a window that covers the sequence is dense attention, to the bit.
        """
        query_BSJC = self.query(x_BSD).unflatten(-1, (-1, self.head_dim))
        dots_BSJL = torch.einsum("bsjc,blc->bsjl", query_BSJC, key_BLC).relu().float()
        weight_BSJ = self.head_weight(x_BSD).float() * self.head_dim**-0.5
        score = torch.einsum("bsjl,bsj->bsl", dots_BSJL, weight_BSJ)[:, None]
        lowest = torch.finfo(score.dtype).min
        with torch.no_grad():
            # A stable sort, not topk: of equal scores (relu gives many zeros) the earliest, however long the cache is.
            best = score.masked_fill(~far, -torch.inf).argsort(dim=-1, descending=True, stable=True)
            chosen = torch.zeros_like(far).scatter(-1, best[..., : self.num_globals], True) & far
        part_BSH = self.fusion(x_BSD).sigmoid() * far.any(-1)[:, 0, :, None]
        return score.masked_fill(~chosen, lowest), part_BSH
