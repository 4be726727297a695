"""The choice of experts in one launch: scores, top K, renormalised weights; and the way back to the logits.

A program has one token. K rounds take the largest score that is left, the lower index where two are equal. Under the
softmax scores are p = softmax(z), under the sigmoid s = sigmoid(z), and a bias counts for the choice alone.

    w_k = scale * s_k / sum of the chosen s         (or scale * s_k, not renormalised)
    d s_k = (scale g_k - sum_j g_j w_j) / sum s     d z = p (d s - <d s, p>)  or  d s * s (1 - s)

T tokens, E experts, K experts a token.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from plumbline.policy_models.kernels.interpreter import patch_interpreter

patch_interpreter()


@triton.jit
def _scores(z, e, E, SIGMOID: tl.constexpr):
    if SIGMOID:
        return tl.where(e < E, 1 / (1 + tl.exp(-z)), 0.0)
    z = tl.where(e < E, z, -float("inf"))
    p = tl.exp(z - tl.max(z, 0))
    return p / tl.sum(p, 0)


@triton.jit
def top_k_kernel(
    z_ptr,  # (T, E) fp32
    bias_ptr,  # (E,) fp32; not read without BIAS
    weight_ptr,  # (T, K) fp32
    index_ptr,  # (T, K) int64
    E,
    K,
    scale,
    SIGMOID: tl.constexpr,
    BIAS: tl.constexpr,
    RENORMALISE: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BLOCK_E)
    s = _scores(tl.load(z_ptr + token * E + e, mask=e < E, other=0.0), e, E, SIGMOID)
    left = s
    if BIAS:
        left += tl.load(bias_ptr + e, mask=e < E, other=0.0)
    left = tl.where(e < E, left, -float("inf"))
    total = 0.0
    for k in range(0, K):
        best = tl.min(tl.where(left == tl.max(left, 0), e, BLOCK_E), 0)
        own = tl.sum(tl.where(e == best, s, 0.0), 0)
        tl.store(index_ptr + token * K + k, best.to(tl.int64))
        tl.store(weight_ptr + token * K + k, own * scale)
        total += own
        left = tl.where(e == best, -float("inf"), left)
    if RENORMALISE:
        for k in range(0, K):
            chosen = tl.load(index_ptr + token * K + k)
            own = tl.sum(tl.where(e == chosen, s, 0.0), 0)
            tl.store(weight_ptr + token * K + k, own * scale / tl.maximum(total, 1.1754944e-38))


@triton.jit
def top_k_backward_kernel(
    z_ptr,
    weight_ptr,
    index_ptr,
    dweight_ptr,
    dz_ptr,
    E,
    K,
    scale,
    SIGMOID: tl.constexpr,
    RENORMALISE: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BLOCK_E)
    s = _scores(tl.load(z_ptr + token * E + e, mask=e < E, other=0.0), e, E, SIGMOID)
    grad = tl.zeros((BLOCK_E,), tl.float32)
    chosen = tl.zeros((BLOCK_E,), tl.float32)
    mean = 0.0
    for k in range(0, K):
        index = tl.load(index_ptr + token * K + k)
        g = tl.load(dweight_ptr + token * K + k)
        mean += g * tl.load(weight_ptr + token * K + k)
        grad += tl.where(e == index, g, 0.0)
        chosen += tl.where(e == index, 1.0, 0.0)
    ds = grad * scale
    if RENORMALISE:
        total = tl.maximum(tl.sum(chosen * s, 0), 1.1754944e-38)
        ds = chosen * (ds - mean) / total
    if SIGMOID:
        dz = ds * s * (1 - s)
    else:
        dz = s * (ds - tl.sum(ds * s, 0))
    tl.store(dz_ptr + token * E + e, dz, mask=e < E)


def _blocks(num_experts: int) -> dict[str, int]:
    return {"BLOCK_E": max(triton.next_power_of_2(num_experts), 16), "num_warps": 1}


@torch.library.custom_op("plumbline::route_top_k", mutates_args=())
def _op(
    logits: Tensor, bias: Tensor | None, top_k: int, sigmoid: bool, renormalise: bool, scale: float
) -> tuple[Tensor, Tensor]:
    num_tokens, num_experts = logits.shape
    weights = logits.new_empty(num_tokens, top_k)
    indices = torch.empty(num_tokens, top_k, dtype=torch.int64, device=logits.device)
    if num_tokens:
        top_k_kernel[(num_tokens,)](
            *(logits, logits if bias is None else bias, weights, indices, num_experts, top_k, scale),
            SIGMOID=sigmoid,
            BIAS=bias is not None,
            RENORMALISE=renormalise,
            **_blocks(num_experts),
        )
    return weights, indices


@_op.register_fake
def _(
    logits: Tensor, bias: Tensor | None, top_k: int, sigmoid: bool, renormalise: bool, scale: float
) -> tuple[Tensor, Tensor]:
    shape = (len(logits), top_k)
    return logits.new_empty(shape), logits.new_empty(shape, dtype=torch.int64)


@torch.library.custom_op("plumbline::route_top_k_backward", mutates_args=())
def _backward_op(
    logits: Tensor, weights: Tensor, indices: Tensor, dweights: Tensor, sigmoid: bool, renormalise: bool, scale: float
) -> Tensor:
    dlogits = torch.empty_like(logits)
    if len(logits):
        top_k_backward_kernel[(len(logits),)](
            *(logits, weights, indices, dweights, dlogits, logits.shape[1], weights.shape[1], scale),
            SIGMOID=sigmoid,
            RENORMALISE=renormalise,
            **_blocks(logits.shape[1]),
        )
    return dlogits


@_backward_op.register_fake
def _(
    logits: Tensor, weights: Tensor, indices: Tensor, dweights: Tensor, sigmoid: bool, renormalise: bool, scale: float
) -> Tensor:
    return torch.empty_like(logits)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    logits, _, _, *ctx.options = inputs
    ctx.save_for_backward(logits, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, dweights: Tensor, _dindices: Tensor) -> tuple:
    return _backward_op(*ctx.saved_tensors, dweights.contiguous(), *ctx.options), None, None, None, None, None


_op.register_autograd(_backward, setup_context=_save)


def route_top_k(
    logits_TE: Tensor, bias_E: Tensor | None, top_k: int, *, sigmoid: bool, renormalise: bool, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(weights (T, K) fp32, expert indices (T, K) int64, best first) of fp32 logits; gradients flow through the weights."""
    return _op(logits_TE.contiguous(), bias_E, top_k, sigmoid, renormalise, scale)
