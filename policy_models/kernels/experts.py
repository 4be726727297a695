"""The expert layer on our kernels, as torch custom ops: autograd, checkpointing and torch.compile take them as they are.

Saved for the backward: the input, z (N, 2F), weights and indices; never the outputs of the experts. The backward is dz
and d weights from dout and z, then the gradients of both matrices, then that of the input.
"""

from typing import Any

import torch
from torch import Tensor

from plumbline.policy_models.experts import expert_weight, gemm_dtype
from plumbline.policy_models.kernels.grouped import Rows


@torch.library.custom_op("plumbline::moe", mutates_args=())
def moe(
    x: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor, keep_z: bool
) -> tuple[Tensor, Tensor]:
    """(sum of weighted SwiGLU experts (T, D), z (N, 2F)); x (T, D), gate_up (E, 2F, D), down (E, D, F), all one dtype,
    indices (T, K), weights (T, K) fp32. An index of E adds nothing. z is undefined on the rows of such slots, and has no
    rows at all without `keep_z`, which a backward needs.
    """
    rows = Rows(indices, len(gate_up))
    z, act = rows.up_swiglu(x, gate_up, keep_z=keep_z)
    return rows.combine(rows.linear(act, down), weights), z


@moe.register_fake
def _(
    x: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor, keep_z: bool
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(indices.numel() if keep_z else 0, gate_up.shape[1])


@torch.library.custom_op("plumbline::moe_backward", mutates_args=())
def moe_backward(
    dout: Tensor, x: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor, z: Tensor, frozen: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, gate_up, down and weights; with `frozen` those of gate_up and down are empty."""
    rows = Rows(indices, len(gate_up))
    dz, act, dweights = rows.swiglu_backward(dout, down, z, weights)
    ddown, dgate_up = x.new_empty(0), x.new_empty(0)
    if not frozen:
        ddown = rows.outer(dout, act, gather_left=True)
        dgate_up = rows.outer(dz, x, gather_right=True)
    dx = rows.combine(rows.linear(dz, gate_up, transposed=True), None)
    return dx, dgate_up, ddown, dweights


@moe_backward.register_fake
def _(
    dout: Tensor, x: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor, z: Tensor, frozen: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dgate_up, ddown = (x.new_empty(0 if frozen else weight.shape) for weight in (gate_up, down))
    return torch.empty_like(x), dgate_up, ddown, torch.empty_like(weights)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs[:5], output[1])
    ctx.set_materialize_grads(False)  # z has no gradient: not even zeros


def _backward(ctx: Any, dout: Tensor, _dz: Tensor) -> tuple:
    x, gate_up, down, indices, weights, z = ctx.saved_tensors
    frozen = not (ctx.needs_input_grad[1] or ctx.needs_input_grad[2])
    dx, dgate_up, ddown, dweights = moe_backward(dout.contiguous(), x, gate_up, down, indices, weights, z, frozen)
    return dx, None if frozen else dgate_up, None if frozen else ddown, None, dweights, None


moe.register_autograd(_backward, setup_context=_save)


def routed_swiglu_experts(experts: Any, x_TD: Tensor, indices_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Arguments as for `plumbline.policy_models.experts.grouped_experts_forward`.

    Raises:
        ValueError: for experts with biases, another layout or another activation than silu.
    """
    plain = not (experts.has_bias or experts.is_transposed or experts.has_post_expert_norm) and experts.has_gate
    name = type(experts.act_fn).__name__
    if not plain or name not in ("SiLU", "SiLUActivation"):
        raise ValueError(f"policy_triton does not serve {type(experts).__name__} with {name}; use policy_grouped_mm")
    dtype = gemm_dtype(experts.gate_up_proj)
    weights = [expert_weight(experts, name, dtype).contiguous() for name in ("gate_up_proj", "down_proj")]
    learns = any(tensor.requires_grad for tensor in (x_TD, weights_TK, *weights))
    out_TD, _ = moe(
        x_TD.to(dtype).contiguous(),
        *weights,
        indices_TK,
        weights_TK.float().contiguous(),
        learns and torch.is_grad_enabled(),
    )
    return out_TD.to(x_TD.dtype)
