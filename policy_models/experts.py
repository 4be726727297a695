"""The default back end of the expert layers: sort slots by expert, two grouped GEMMs, put the rows back.

Registered with transformers as `policy_grouped_mm`. Two differences from transformers' own `grouped_mm`:

- Under autocast the GEMMs run in the autocast type, as `nn.Linear` does. torch's `grouped_mm` ignores autocast, so
  that fp32 master weights would mean fp32 GEMMs, 4 to 6 times slower than bf16 on a CPU with AMX.
- The two row gathers have gathers as their backward, instead of an index-add with repeated rows.

And since the name is our own, `generate` does not swap it for `batched_mm` while decoding on a GPU: log-probabilities
of a rollout and of the training pass come from the same arithmetic.

T tokens, D width, F inner width, E experts, K experts a token, N = T * K slots.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers.integrations.moe import ExpertsInterface

DEFAULT_EXPERTS = "policy_grouped_mm"

_grouped_mm = getattr(F, "grouped_mm", None) or torch._grouped_mm  # public since torch 2.10


class _GatherSlots(torch.autograd.Function):
    """x_TD -> the row of each slot in expert order, (N, D). `perm_N` sorts the slots, `inverse_N` undoes it."""

    @staticmethod
    def forward(ctx, x_TD: Tensor, perm_N: Tensor, inverse_N: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(inverse_N)
        ctx.top_k = top_k
        return x_TD[perm_N // top_k]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_ND: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse_N,) = ctx.saved_tensors
        grad_TKD = grad_ND[inverse_N].unflatten(0, (-1, ctx.top_k))
        return grad_TKD.sum(1), None, None, None


class _RestoreOrder(torch.autograd.Function):
    """Rows in expert order -> rows in slot order."""

    @staticmethod
    def forward(ctx, y_ND: Tensor, perm_N: Tensor, inverse_N: Tensor) -> Tensor:
        ctx.save_for_backward(perm_N)
        return y_ND[inverse_N]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_ND: Tensor) -> tuple[Tensor, None, None]:
        (perm_N,) = ctx.saved_tensors
        return grad_ND[perm_N], None, None


def grouped_experts_forward(experts: Any, x_TD: Tensor, indices_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Every token through its K experts, weighted and summed in fp32.

    Args:
        experts: holds `gate_up_proj` (E, 2F, D), `down_proj` (E, D, F), `num_experts` and `_apply_gate`, without
            biases and not transposed: any experts class of transformers of that kind.
        x_TD: tokens, any float type; the result has the same.
        indices_TK: experts of each token. Under expert parallelism an index of E marks a slot that another rank
            serves: it costs no GEMM and adds zero.
        weights_TK: what each expert's answer counts.
    """
    if experts.has_bias or experts.is_transposed or not experts.has_gate or experts.has_post_expert_norm:
        raise ValueError(f"{DEFAULT_EXPERTS} does not serve {type(experts).__name__}; use grouped_mm")
    num_tokens, top_k = indices_TK.shape
    dtype = _gemm_dtype(experts.gate_up_proj)

    # 1. Order slots by expert. Stable, so that a rerun sums in the same order.
    sorted_N, perm_N = indices_TK.flatten().sort(stable=True)
    inverse_N = torch.empty_like(perm_N).scatter_(0, perm_N, torch.arange(perm_N.numel(), device=perm_N.device))
    # End of each expert's rows, without a count that would wait for the GPU.
    expert_E = torch.arange(experts.num_experts, device=sorted_N.device, dtype=sorted_N.dtype)
    ends_E = torch.searchsorted(sorted_N, expert_E, right=True, out_int32=True)

    # 2. SwiGLU experts. Rows past the last end are never written by the GEMMs, hence the fills.
    foreign_N1 = (sorted_N >= experts.num_experts)[:, None] if experts._is_expert_parallel else None
    x_ND = _fill(_GatherSlots.apply(x_TD.to(dtype), perm_N, inverse_N, top_k), foreign_N1)
    gate_up_N2F = _grouped_mm(x_ND, experts.gate_up_proj.to(dtype).transpose(-2, -1), offs=ends_E)
    act_NF = experts._apply_gate(_fill(gate_up_N2F, foreign_N1))
    y_ND = _grouped_mm(act_NF, experts.down_proj.to(dtype).transpose(-2, -1), offs=ends_E)

    # 3. Back to token order, weighted sum over K.
    y_TKD = _RestoreOrder.apply(_fill(y_ND, foreign_N1), perm_N, inverse_N).unflatten(0, (num_tokens, top_k))
    return (y_TKD * weights_TK[..., None]).sum(1).to(x_TD.dtype)


def _gemm_dtype(weight: Tensor) -> torch.dtype:
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def _fill(rows_ND: Tensor, foreign_N1: Tensor | None) -> Tensor:
    return rows_ND if foreign_N1 is None else rows_ND.masked_fill(foreign_N1, 0.0)


ExpertsInterface.register(DEFAULT_EXPERTS, grouped_experts_forward)
