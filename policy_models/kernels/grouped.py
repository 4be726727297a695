"""Kernels of the expert layer: grouped products over rows in expert order, with what surrounds them fused in.

A program computes one tile: rows of one expert times a block of columns. Which expert a tile belongs to is computed on
the device, for an upper bound of tiles that the host knows (N / BLOCK_M + E), so that nothing waits for a count. Rows
are never padded. All sums are fp32, and none uses atomics: a rerun gives the same bits.

Tile sizes were chosen from registers and spills of an ahead-of-time compile for sm_80 and sm_90, not from timings.

T tokens, D width, F inner width, E experts, K experts a token, N = T * K rows. Legend of the specification:
reference.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from plumbline.policy_models.kernels.interpreter import patch_interpreter

patch_interpreter()

# Under the interpreter a step costs milliseconds whatever its size, but tiny tiles still meet the edges of tiny tests.
_SMALL = triton.knobs.runtime.interpret
TILE_ROWS = 16 if _SMALL else 64
TILE = {"BLOCK_M": TILE_ROWS, "BLOCK_N": 16 if _SMALL else 128, "BLOCK_K": 16 if _SMALL else 64}
OUTER_TILE = {"BLOCK_M": 16 if _SMALL else 128, "BLOCK_N": 16 if _SMALL else 128, "BLOCK_K": 16 if _SMALL else 64}
BACKWARD_TILE = TILE | {"BLOCK_N": 16 if _SMALL else 64}  # at 128 columns its epilogue spills registers
LAUNCH = {"num_warps": 8, "num_stages": 3}


@triton.jit
def tiles_kernel(ends_ptr, expert_ptr, row_ptr, E, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr):
    """One program a tile: finds its expert among all."""
    tile = tl.program_id(0)
    e = tl.arange(0, BLOCK_E)
    end = tl.load(ends_ptr + e, mask=e < E, other=0)
    start = tl.load(ends_ptr + e - 1, mask=(e > 0) & (e < E), other=0)
    count = tl.where(e < E, (end - start + BLOCK_M - 1) // BLOCK_M, 0)
    after = tl.cumsum(count, 0)
    first = after - count
    mine = (first <= tile) & (tile < after)
    tl.store(expert_ptr + tile, tl.max(tl.where(mine, e, -1), 0))
    tl.store(row_ptr + tile, tl.sum(tl.where(mine, start + (tile - first) * BLOCK_M, 0), 0))


@triton.jit
def up_swiglu_kernel(
    x_ptr,  # (T, D)
    w_ptr,  # (E, 2F, D)
    z_ptr,  # (N, 2F), for the backward
    act_ptr,  # (N, F)
    slot_ptr,
    ends_ptr,
    expert_ptr,
    row_ptr,
    D,
    F,
    TOP_K,
    SAVE_Z: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """z = x[token] W^T for the gate and the up half at once; act = silu(gate) * up."""
    expert = tl.load(expert_ptr + tl.program_id(0))
    if expert < 0:
        return
    row = tl.load(row_ptr + tl.program_id(0)) + tl.arange(0, BLOCK_M)
    row_ok = row < tl.load(ends_ptr + expert)
    token = (tl.load(slot_ptr + row, mask=row_ok, other=0) // TOP_K).to(tl.int64)  # 64-bit: token * D passes 2**31
    col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    col_ok = col < F
    w_e = w_ptr + expert.to(tl.int64) * 2 * F * D
    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, D, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + token[:, None] * D + k[None, :], mask=row_ok[:, None] & (k < D)[None, :], other=0.0)
        w_at = col[None, :] * D + k[:, None]
        w_ok = col_ok[None, :] & (k < D)[:, None]
        gate = tl.dot(x, tl.load(w_e + w_at, mask=w_ok, other=0.0), gate, input_precision="ieee")
        up = tl.dot(x, tl.load(w_e + F * D + w_at, mask=w_ok, other=0.0), up, input_precision="ieee")
    ok = row_ok[:, None] & col_ok[None, :]
    row64 = row.to(tl.int64)
    if SAVE_Z:
        z_at = z_ptr + row64[:, None] * 2 * F + col[None, :]
        tl.store(z_at, gate.to(z_ptr.dtype.element_ty), mask=ok)
        tl.store(z_at + F, up.to(z_ptr.dtype.element_ty), mask=ok)
    act = gate * tl.sigmoid(gate) * up
    tl.store(act_ptr + row64[:, None] * F + col[None, :], act.to(act_ptr.dtype.element_ty), mask=ok)


@triton.jit
def grouped_linear_kernel(
    x_ptr,  # (N, KK)
    w_ptr,  # (E, MM, KK) or transposed: the strides say
    y_ptr,  # (N, MM)
    ends_ptr,
    expert_ptr,
    row_ptr,
    KK,
    MM,
    w_stride_m,
    w_stride_k,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y[row] = W[expert of row] x[row]: the down-projection, and the gradient with respect to the rows of x."""
    expert = tl.load(expert_ptr + tl.program_id(0))
    if expert < 0:
        return
    row = tl.load(row_ptr + tl.program_id(0)) + tl.arange(0, BLOCK_M)
    row_ok = row < tl.load(ends_ptr + expert)
    row64 = row.to(tl.int64)
    col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    col_ok = col < MM
    w_e = w_ptr + expert.to(tl.int64) * MM * KK
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, KK, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + row64[:, None] * KK + k[None, :], mask=row_ok[:, None] & (k < KK)[None, :], other=0.0)
        w_at = col[None, :] * w_stride_m + k[:, None] * w_stride_k
        w = tl.load(w_e + w_at, mask=col_ok[None, :] & (k < KK)[:, None], other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
    y_at = y_ptr + row64[:, None] * MM + col[None, :]
    tl.store(y_at, acc.to(y_ptr.dtype.element_ty), mask=row_ok[:, None] & col_ok[None, :])


@triton.jit
def combine_kernel(
    y_ptr,  # (N, D)
    row_ptr,  # (T * K,) row of each slot, -1: none
    weight_ptr,  # (T * K,) fp32
    out_ptr,  # (T, D)
    D,
    TOP_K,
    WEIGHTED: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out[t] = sum over k of w y[row], in a fixed order."""
    token = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for k in range(0, TOP_K):
        row = tl.load(row_ptr + token * TOP_K + k).to(tl.int64)
        y = tl.load(y_ptr + row * D + col, mask=col < tl.where(row < 0, 0, D), other=0.0).to(tl.float32)
        if WEIGHTED:
            y = y * tl.load(weight_ptr + token * TOP_K + k)
        acc += y
    tl.store(out_ptr + token * D + col, acc.to(out_ptr.dtype.element_ty), mask=col < D)


@triton.jit
def swiglu_backward_kernel(
    dout_ptr,  # (T, D)
    w_ptr,  # (E, D, F)
    z_ptr,  # (N, 2F)
    weight_ptr,  # (T * K,) fp32
    dz_ptr,  # (N, 2F)
    act_ptr,  # (N, F): w * act, the left side of the gradient of W
    dweight_ptr,  # (column blocks, N): partial sums of <dact, act>
    slot_ptr,
    ends_ptr,
    expert_ptr,
    row_ptr,
    D,
    F,
    N,
    TOP_K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """From dout to dz, without the outputs of the experts: the gradient of w_k is <dout W, act>."""
    expert = tl.load(expert_ptr + tl.program_id(0))
    if expert < 0:
        return
    row = tl.load(row_ptr + tl.program_id(0)) + tl.arange(0, BLOCK_M)
    row_ok = row < tl.load(ends_ptr + expert)
    slot = tl.load(slot_ptr + row, mask=row_ok, other=0)
    token = (slot // TOP_K).to(tl.int64)
    col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    col_ok = col < F
    w_e = w_ptr + expert.to(tl.int64) * D * F
    dact = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, D, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        dout = tl.load(dout_ptr + token[:, None] * D + k[None, :], mask=row_ok[:, None] & (k < D)[None, :], other=0.0)
        w = tl.load(w_e + k[:, None] * F + col[None, :], mask=(k < D)[:, None] & col_ok[None, :], other=0.0)
        dact = tl.dot(dout, w, dact, input_precision="ieee")
    ok = row_ok[:, None] & col_ok[None, :]
    row64 = row.to(tl.int64)
    z_at = row64[:, None] * 2 * F + col[None, :]
    gate = tl.load(z_ptr + z_at, mask=ok, other=0.0).to(tl.float32)
    up = tl.load(z_ptr + z_at + F, mask=ok, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + slot, mask=row_ok, other=0.0)[:, None]
    sig = tl.sigmoid(gate)
    silu = gate * sig
    partial = tl.sum(tl.where(ok, dact * silu * up, 0.0), 1)
    tl.store(dweight_ptr + tl.program_id(1).to(tl.int64) * N + row64, partial, mask=row_ok)
    act_at = act_ptr + row64[:, None] * F + col[None, :]
    tl.store(act_at, (weight * silu * up).to(act_ptr.dtype.element_ty), mask=ok)
    dact = dact * weight
    dgate = dact * up * sig * (1 + gate * (1 - sig))
    tl.store(dz_ptr + z_at, dgate.to(dz_ptr.dtype.element_ty), mask=ok)
    tl.store(dz_ptr + z_at + F, (dact * silu).to(dz_ptr.dtype.element_ty), mask=ok)


@triton.jit
def grouped_outer_kernel(
    left_ptr,  # (N, MM), or (T, MM) where gathered
    right_ptr,  # (N, NN), or (T, NN) where gathered
    out_ptr,  # (E, MM, NN)
    slot_ptr,
    ends_ptr,
    MM,
    NN,
    TOP_K,
    GATHER_LEFT: tl.constexpr,
    GATHER_RIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """left^T right over the rows of one expert: the gradients of its weights, zeros where it has no row."""
    expert = tl.program_id(0)
    begin = tl.where(expert > 0, tl.load(ends_ptr + tl.maximum(expert - 1, 0)), 0)
    end = tl.load(ends_ptr + expert)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(begin, end, BLOCK_K):
        row = start + tl.arange(0, BLOCK_K)
        row_ok = row < end
        own = row.to(tl.int64)
        token = (tl.load(slot_ptr + row, mask=row_ok, other=0) // TOP_K).to(tl.int64)
        left_row = token if GATHER_LEFT else own
        right_row = token if GATHER_RIGHT else own
        left_at = left_ptr + left_row[None, :] * MM + m[:, None]
        left = tl.load(left_at, mask=row_ok[None, :] & (m < MM)[:, None], other=0.0)
        right_at = right_ptr + right_row[:, None] * NN + n[None, :]
        right = tl.load(right_at, mask=row_ok[:, None] & (n < NN)[None, :], other=0.0)
        acc = tl.dot(left, right, acc, input_precision="ieee")
    out_at = out_ptr + expert.to(tl.int64) * MM * NN + m[:, None].to(tl.int64) * NN + n[None, :]
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=(m < MM)[:, None] & (n < NN)[None, :])


class Rows:
    """Rows in expert order and their tiles: everything on the device, nothing waits for a count."""

    def __init__(self, indices_TK: Tensor, num_experts: int) -> None:
        self.top_k = indices_TK.shape[1]
        self.num_experts = num_experts
        sorted_N, slot_N = indices_TK.flatten().sort(stable=True)
        expert_E = torch.arange(num_experts, device=sorted_N.device, dtype=sorted_N.dtype)
        self.ends = torch.searchsorted(sorted_N, expert_E, right=True, out_int32=True)
        self.num_rows = slot_N.numel()
        order_N = torch.arange(self.num_rows, device=slot_N.device, dtype=torch.int32)
        order_N = torch.where(sorted_N < num_experts, order_N, -1)
        self.row_of_slot = torch.empty_like(order_N).scatter_(0, slot_N, order_N)
        self.slot = slot_N.to(torch.int32)
        self.num_tiles = triton.cdiv(self.num_rows, TILE_ROWS) + num_experts
        self.tile_expert = torch.empty(self.num_tiles, dtype=torch.int32, device=slot_N.device)
        self.tile_row = torch.empty_like(self.tile_expert)
        tiles_kernel[(self.num_tiles,)](
            self.ends,
            self.tile_expert,
            self.tile_row,
            num_experts,
            BLOCK_M=TILE_ROWS,
            BLOCK_E=triton.next_power_of_2(num_experts),
        )

    def up_swiglu(self, x_TD: Tensor, gate_up: Tensor, *, keep_z: bool = True) -> tuple[Tensor, Tensor]:
        """(z (N, 2F), or (0, 2F) without `keep_z`; silu(gate) * up (N, F)); rows without an expert are left unwritten."""
        inner = gate_up.shape[1] // 2
        z = x_TD.new_empty(self.num_rows if keep_z else 0, 2 * inner)
        act = x_TD.new_empty(self.num_rows, inner)
        grid = (self.num_tiles, triton.cdiv(inner, TILE["BLOCK_N"]))
        tiles = (self.slot, self.ends, self.tile_expert, self.tile_row)
        width = x_TD.shape[1]
        up_swiglu_kernel[grid](x_TD, gate_up, z, act, *tiles, width, inner, self.top_k, SAVE_Z=keep_z, **TILE, **LAUNCH)
        return z, act

    def linear(self, x_NK: Tensor, weight: Tensor, *, transposed: bool = False) -> Tensor:
        """weight[expert] x for each row, or weight[expert]^T x; rows without an expert are left unwritten."""
        rows, cols = weight.shape[1:]
        num_out, num_in = (cols, rows) if transposed else (rows, cols)
        stride_out, stride_in = (1, cols) if transposed else (cols, 1)
        y = x_NK.new_empty(self.num_rows, num_out)
        grid = (self.num_tiles, triton.cdiv(num_out, TILE["BLOCK_N"]))
        tiles = (self.ends, self.tile_expert, self.tile_row)
        grouped_linear_kernel[grid](x_NK, weight, y, *tiles, num_in, num_out, stride_out, stride_in, **TILE, **LAUNCH)
        return y

    def combine(self, y_ND: Tensor, weights_TK: Tensor | None) -> Tensor:
        """Rows summed over the slots of each token (T, D), with weights or plainly."""
        width = y_ND.shape[1]
        out = y_ND.new_empty(self.num_rows // self.top_k, width)
        block = min(triton.next_power_of_2(width), 1024)
        weights = self.row_of_slot if weights_TK is None else weights_TK
        combine_kernel[(len(out), triton.cdiv(width, block))](
            y_ND, self.row_of_slot, weights, out, width, self.top_k, WEIGHTED=weights_TK is not None, BLOCK_D=block
        )
        return out

    def swiglu_backward(
        self, dout_TD: Tensor, down: Tensor, z_N2F: Tensor, weights_TK: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dz (N, 2F), weight * act (N, F), dweights (T, K) fp32)."""
        width, inner = down.shape[1:]
        num_blocks = triton.cdiv(inner, BACKWARD_TILE["BLOCK_N"])
        dz, act = torch.empty_like(z_N2F), z_N2F.new_empty(self.num_rows, inner)
        partial = torch.zeros(num_blocks, self.num_rows, dtype=torch.float32, device=z_N2F.device)
        tiles = (self.slot, self.ends, self.tile_expert, self.tile_row)
        swiglu_backward_kernel[(self.num_tiles, num_blocks)](
            *(dout_TD, down, z_N2F, weights_TK, dz, act, partial, *tiles, width, inner, self.num_rows, self.top_k),
            **BACKWARD_TILE,
            **LAUNCH,
        )
        dweights = torch.empty_like(weights_TK).flatten().scatter_(0, self.slot.long(), partial.sum(0))
        return dz, act, dweights.view_as(weights_TK)

    def outer(self, left: Tensor, right: Tensor, *, gather_left: bool = False, gather_right: bool = False) -> Tensor:
        """left^T right over each expert's rows, (E, M, N); a gathered side has a row a token."""
        out = left.new_empty(self.num_experts, left.shape[1], right.shape[1])
        grid = (
            self.num_experts,
            *(triton.cdiv(n, OUTER_TILE[f"BLOCK_{b}"]) for b, n in zip("MN", out.shape[1:], strict=True)),
        )
        grouped_outer_kernel[grid](
            *(left, right, out, self.slot, self.ends, left.shape[1], right.shape[1], self.top_k),
            GATHER_LEFT=gather_left,
            GATHER_RIGHT=gather_right,
            **OUTER_TILE,
            **LAUNCH,
        )
        return out
