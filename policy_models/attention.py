"""An attention back end for training on the CPU: `attn_implementation="packed"`.

torch's fused CPU attention has a slow bf16 backward: at 8 rows x 9 heads x 120 tokens it takes 71 ms of CPU time a
layer where two batched products take 15 ms. Here the query heads that share a key head are packed into one product, so
grouped keys and values are never repeated. Forward without gradients, and long sequences (whose score matrix would not
fit the cache), go to torch's attention.

B rows, H query heads, KV key heads, G = H / KV, S queries, L keys, D head width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from plumbline.policy_models.devices import default_device

PACKED = "packed"
_MAX_SCORES = 512 * 512  # S * L above which the score matrix costs more than the fused kernel


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, None]:
    """softmax(q k^T * scaling + mask) v with fp32 softmax.

    query (B, H, S, D), key and value (B, KV, L, D), attention_mask (B or 1, 1, S, L), bool (True: look at it) or
    additive, or None for causal. Returns ((B, S, H, D), None).
    """
    B, H, S, D = query.shape
    KV, L = key.shape[1], key.shape[2]
    learns = query.requires_grad or key.requires_grad or value.requires_grad
    if not learns or query.is_cuda or dropout or S * L > _MAX_SCORES:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    G = H // KV
    scale = D**-0.5 if scaling is None else scaling
    scores = (query.reshape(B, KV, G * S, D) * scale) @ key.transpose(2, 3)
    scores = scores.view(B, KV, G, S, L)
    if attention_mask is None:
        attention_mask = torch.ones(S, L, dtype=torch.bool, device=query.device).tril(L - S)[None, None]
    if attention_mask.dtype == torch.bool:
        # the lowest finite value, not -inf: a row of padding that may look at nothing stays finite
        scores = scores.masked_fill(~attention_mask[:, :, None], torch.finfo(scores.dtype).min)
    else:
        scores = scores + attention_mask[:, :, None]
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
    out = weights.view(B, KV, G * S, L) @ value
    return out.view(B, H, S, D).transpose(1, 2).contiguous(), None


def default_attention() -> str:
    """`packed` where training runs on the CPU, torch's attention on a GPU."""
    return PACKED if default_device().type == "cpu" else "sdpa"


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)  # without this, transformers would drop the padding mask silently
