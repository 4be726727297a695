"""Log-probability and entropy straight from hidden states: the (tokens, vocabulary) matrix never exists.

Forward: each program walks its part of the vocabulary tile by tile with a running maximum (online softmax,
arXiv:1805.02867) and leaves four numbers a row, which are then joined. Backward: one chunk of rows at a time, the
gradient of its logits is recomputed by a kernel and multiplied by torch.

    d logits = (g (1_id - p) - h p (log p + H)) / temperature     g, h: gradients of log-probability and entropy H

T tokens, D width, V vocabulary.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from plumbline.policy_models.kernels.interpreter import patch_interpreter

patch_interpreter()

_SMALL = triton.knobs.runtime.interpret
TILE = {"BLOCK_M": 16 if _SMALL else 64, "BLOCK_N": 16 if _SMALL else 128, "BLOCK_K": 16 if _SMALL else 64}
LAUNCH = {"num_warps": 8, "num_stages": 3}
SPLITS = 2 if _SMALL else 8  # parts of the vocabulary that run at once
# Rows of bf16 gradients held in the backward: 50 MB at a vocabulary of 49,152. Whole tiles, so that a row has its place in a
# tile, and with it the rounding of its logits, from the forward.
CHUNK_ROWS = 512


@triton.jit
def _logits_tile(
    h_ptr,
    w_ptr,
    row,
    col,
    T,
    V,
    D,
    inverse_temperature,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    row64, col64 = row.to(tl.int64), col.to(tl.int64)
    for start in range(0, D, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        h = tl.load(h_ptr + row64[:, None] * D + k[None, :], mask=(row < T)[:, None] & (k < D)[None, :], other=0.0)
        w = tl.load(w_ptr + col64[None, :] * D + k[:, None], mask=(col < V)[None, :] & (k < D)[:, None], other=0.0)
        acc = tl.dot(h, w, acc, input_precision="ieee")
    return acc * inverse_temperature


@triton.jit
def logprob_kernel(
    h_ptr,  # (T, D)
    w_ptr,  # (V, D)
    id_ptr,  # (T,)
    max_ptr,  # these four: (SPLITS, T) fp32
    sum_ptr,
    weighted_ptr,
    own_ptr,
    T,
    V,
    D,
    inverse_temperature,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Over one part of the vocabulary: max z, sum e^(z - max), sum (z - max) e^(z - max), and z of the id or 0."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    token = tl.load(id_ptr + row, mask=row < T, other=-1)
    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    weighted = tl.zeros((BLOCK_M,), tl.float32)
    own = tl.zeros((BLOCK_M,), tl.float32)
    part = tl.cdiv(tl.cdiv(V, BLOCK_N), SPLITS) * BLOCK_N
    begin = tl.program_id(1) * part
    for first in range(begin, tl.minimum(begin + part, V), BLOCK_N):
        col = first + tl.arange(0, BLOCK_N)
        z = _logits_tile(h_ptr, w_ptr, row, col, T, V, D, inverse_temperature, BLOCK_M, BLOCK_N, BLOCK_K)
        col_ok = (col < V)[None, :]
        own += tl.sum(tl.where(col[None, :] == token[:, None], z, 0.0), 1)
        new_top = tl.maximum(top, tl.max(tl.where(col_ok, z, -float("inf")), 1))
        scale = tl.exp(top - new_top)
        lower = tl.where(total > 0, top - new_top, 0.0)  # not -inf before the first tile
        away = tl.where(col_ok, z - new_top[:, None], 0.0)
        e = tl.where(col_ok, tl.exp(away), 0.0)
        weighted = (weighted + lower * total) * scale + tl.sum(e * away, 1)
        total = total * scale + tl.sum(e, 1)
        top = new_top
    at = tl.program_id(1) * T + row
    tl.store(max_ptr + at, top, mask=row < T)
    tl.store(sum_ptr + at, total, mask=row < T)
    tl.store(weighted_ptr + at, weighted, mask=row < T)
    tl.store(own_ptr + at, own, mask=row < T)


@triton.jit
def logits_grad_kernel(
    h_ptr,
    w_ptr,
    id_ptr,
    top_ptr,
    log_sum_ptr,
    entropy_ptr,
    dlogp_ptr,
    dentropy_ptr,
    dz_ptr,  # (T, V)
    T,
    V,
    D,
    inverse_temperature,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Gradient of one tile of logits. z - top is exact where p is near 1; z - (top + log_sum) would lose digits to a large top."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    z = _logits_tile(h_ptr, w_ptr, row, col, T, V, D, inverse_temperature, BLOCK_M, BLOCK_N, BLOCK_K)
    row_ok = row < T
    token = tl.load(id_ptr + row, mask=row_ok, other=-1)
    top = tl.load(top_ptr + row, mask=row_ok, other=0.0)[:, None]
    logp = z - top - tl.load(log_sum_ptr + row, mask=row_ok, other=0.0)[:, None]
    p = tl.exp(logp)
    g = tl.load(dlogp_ptr + row, mask=row_ok, other=0.0)[:, None]
    h = tl.load(dentropy_ptr + row, mask=row_ok, other=0.0)[:, None]
    entropy = tl.load(entropy_ptr + row, mask=row_ok, other=0.0)[:, None]
    hit = tl.where(col[None, :] == token[:, None], 1.0, 0.0)
    dz = (g * (hit - p) - h * p * (logp + entropy)) * inverse_temperature
    at = dz_ptr + row.to(tl.int64)[:, None] * V + col[None, :]
    tl.store(at, dz.to(dz_ptr.dtype.element_ty), mask=row_ok[:, None] & (col < V)[None, :])


@torch.library.custom_op("plumbline::linear_logprob", mutates_args=())
def _op(hidden: Tensor, weight: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(log-probability, entropy, largest logit, log sum e^(z - largest)), each (T,) fp32."""
    (num_tokens, width), vocab = hidden.shape, len(weight)
    parts = torch.empty(4, SPLITS, num_tokens, dtype=torch.float32, device=hidden.device)
    if num_tokens:
        logprob_kernel[(triton.cdiv(num_tokens, TILE["BLOCK_M"]), SPLITS)](
            *(hidden, weight, ids, *parts, num_tokens, vocab, width, 1 / temperature), SPLITS=SPLITS, **TILE, **LAUNCH
        )
    part_top, total, weighted, own = parts
    top = part_top.amax(0)
    lower = part_top - top
    log_sum = (lower.exp() * total).sum(0).log()
    # sum of p (log_sum - (z - top)), part by part: differences of near numbers, where sums over p z would lose digits
    entropy = torch.where(total > 0, (lower - log_sum).exp() * ((log_sum - lower) * total - weighted), 0.0).sum(0)
    return own.sum(0) - top - log_sum, entropy, top, log_sum


@_op.register_fake
def _(hidden: Tensor, weight: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logp, entropy, top, log_sum = (hidden.new_empty(len(hidden), dtype=torch.float32) for _ in range(4))
    return logp, entropy, top, log_sum


@torch.library.custom_op("plumbline::linear_logprob_backward", mutates_args=())
def _backward_op(
    hidden: Tensor, weight: Tensor, ids: Tensor, top: Tensor, log_sum: Tensor, entropy: Tensor,
    dlogp: Tensor, dentropy: Tensor, temperature: float, frozen: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of hidden and weight; with `frozen` the latter is empty."""
    vocab, width = weight.shape
    dhidden = torch.empty_like(hidden)
    dweight = weight.new_zeros(0 if frozen else weight.shape, dtype=torch.float32)
    per_row = (hidden, ids, top, log_sum, entropy, dlogp, dentropy)
    for start in range(0, len(hidden), CHUNK_ROWS):
        rows = tuple(part[start : start + CHUNK_ROWS] for part in per_row)
        chunk = rows[0]
        dz = chunk.new_empty(len(chunk), vocab)
        grid = (triton.cdiv(len(chunk), TILE["BLOCK_M"]), triton.cdiv(vocab, TILE["BLOCK_N"]))
        logits_grad_kernel[grid](
            *(chunk, weight, *rows[1:], dz, len(chunk), vocab, width, 1 / temperature), **TILE, **LAUNCH
        )
        dhidden[start : start + CHUNK_ROWS] = dz @ weight
        if not frozen:
            dweight += dz.T @ chunk
    return dhidden, dweight.to(weight.dtype)


@_backward_op.register_fake
def _(
    hidden: Tensor, weight: Tensor, ids: Tensor, top: Tensor, log_sum: Tensor, entropy: Tensor,
    dlogp: Tensor, dentropy: Tensor, temperature: float, frozen: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(hidden), weight.new_empty(0 if frozen else weight.shape)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    hidden, weight, ids, ctx.temperature = inputs
    _, entropy, top, log_sum = output
    ctx.save_for_backward(hidden, weight, ids, top, log_sum, entropy)


def _backward(ctx: Any, dlogp: Tensor, dentropy: Tensor, _dtop: Tensor, _dlog_sum: Tensor) -> tuple:
    frozen = not ctx.needs_input_grad[1]
    grads = (dlogp.contiguous(), dentropy.contiguous())
    dhidden, dweight = _backward_op(*ctx.saved_tensors, *grads, ctx.temperature, frozen)
    return dhidden, None if frozen else dweight, None, None


_op.register_autograd(_backward, setup_context=_save)


def linear_logprob(
    hidden_TD: Tensor, weight_VD: Tensor, ids_T: Tensor, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(log-probability of each id, entropy), fp32 (T,), of softmax(hidden weight^T / temperature).

    Gradients flow through both. hidden and weight have one dtype; ids lie in 0 to V - 1.
    """
    if temperature <= 0:
        raise ValueError(f"{temperature=} must be positive")
    logp_T, entropy_T, _, _ = _op(hidden_TD.contiguous(), weight_VD.contiguous(), ids_T, temperature)
    return logp_T, entropy_T
