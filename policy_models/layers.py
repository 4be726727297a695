"""The plain parts of the policy: norm, rotary positions, attention written out, dense MLP, heads, outputs, positions.

B batch, S positions, D width, H query heads, C width of a head.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_outputs import MoeModelOutputWithPast, SequenceClassifierOutputWithPast
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from plumbline.policy_models.configuration import MoEPolicyConfig


class MoEPolicyRMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in fp32 (arXiv:1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


class MoEPolicyRotaryEmbedding(LlamaRotaryEmbedding):
    """Llama's rotary angles (every `rope_type` of transformers), whose frequencies no cast can touch."""

    def _apply(self, fn: Callable, recurse: bool = True) -> "MoEPolicyRotaryEmbedding":
        kept = self.inv_freq, self.original_inv_freq
        super()._apply(fn, recurse)
        if self.inv_freq.dtype != torch.float32:  # .to(bfloat16), .half(): keep the move, undo the rounding
            for buffer, freq in zip(("inv_freq", "original_inv_freq"), kept, strict=True):
                setattr(self, buffer, freq.to(self.inv_freq.device))
        return self


def rotate(x_BHSC: Tensor, cos_BSC: Tensor, sin_BSC: Tensor) -> Tensor:
    """Turn the pairs (x[c], x[c + C/2]) by their angles (RoPE, arXiv:2104.09864, in Llama's half-split order)."""
    first, second = x_BHSC.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return x_BHSC * cos_BSC[:, None] + turned * sin_BSC[:, None]


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, Tensor]:
    """The specification of the attention back ends: (B, H, S, C) queries, additive mask -> (B, S, H, C), weights."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = query @ key.transpose(-2, -1) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class MoEPolicyMLP(nn.Module):
    """Dense SwiGLU MLP (arXiv:2002.05202): layers without experts, and the shared expert."""

    def __init__(self, config: MoEPolicyConfig, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.down_proj = nn.Linear(inner, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x_BSD)) * self.up_proj(x_BSD))


class ZeroLinear(nn.Linear):
    """A linear layer that starts at zero. A class of its own, since transformers draws weights module by module."""


class ScalarHead(nn.Linear):
    """A linear layer without bias that computes in fp32 whatever its weights and autocast are."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.float())


def scalar_head_std(hidden_size: int) -> float:
    """Standard deviation of a new reward head's weights: 1 / sqrt(D + 1) (Stiennon et al., arXiv:2009.01325)."""
    return 1 / math.sqrt(hidden_size + 1)


@dataclass
class MoEPolicyModelOutput(MoeModelOutputWithPast):
    """Hidden states, and a tuple of (T, E) logits and (T, K) indices a layer with experts when asked for."""

    router_indices: tuple[Tensor, ...] | None = None


@dataclass
class MoESequenceClassifierOutput(SequenceClassifierOutputWithPast):
    """Scores (B, num_labels) as `logits`, with the router's figures when they were asked for."""

    aux_loss: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None


def count_positions(attention_mask: Tensor | None, inputs_embeds: Tensor, past_length: int) -> Tensor:
    """(B, S) positions: the number of kept tokens before each, or a plain count without a 2-D mask."""
    length = inputs_embeds.shape[1]
    if attention_mask is not None and attention_mask.dim() == 2:
        kept = attention_mask.long()
        return (kept.cumsum(-1) - kept)[:, -length:]
    return (torch.arange(length, device=inputs_embeds.device) + past_length)[None]


def kept_tokens(attention_mask: Tensor | None, hidden_BSD: Tensor) -> Tensor | None:
    """(B, S) bool of the tokens that are no padding; None where no 2-D mask says."""
    if attention_mask is None or attention_mask.dim() != 2:
        return None
    return attention_mask[:, -hidden_BSD.shape[1] :].to(hidden_BSD.device).bool()  # a cache's mask covers the past too


def last_kept(
    hidden_BSD: Tensor, input_ids: Tensor | None, attention_mask: Tensor | None, pad_token_id: int | None
) -> tuple[Tensor, Tensor]:
    """Index (B,) of the last kept position, and whether (B,) there is one."""
    batch_size, length = hidden_BSD.shape[:2]
    if attention_mask is not None and attention_mask.dim() == 2:
        keep_BS = attention_mask[:, -length:].to(hidden_BSD.device).bool()
    elif input_ids is not None and pad_token_id is not None:
        keep_BS = (input_ids != pad_token_id).to(hidden_BSD.device)
    else:
        keep_BS = torch.ones(batch_size, length, dtype=torch.bool, device=hidden_BSD.device)
    position_S = torch.arange(length, device=hidden_BSD.device)
    return (position_S * keep_BS).argmax(-1), keep_BS.any(-1)
