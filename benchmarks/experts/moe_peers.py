"""Other people's expert layers as back ends of transformers' experts, where they are installed; for bench_moe.py."""

import importlib.util
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface


def liger(experts: Any, x_TD: Tensor, indices_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """liger-kernel from 0.8."""
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    return LigerFusedMoEFunction.apply(x_TD, experts.gate_up_proj, experts.down_proj, indices_TK.int(), weights_TK)


def scattermoe(experts: Any, x_TD: Tensor, indices_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """github.com/shawntan/scattermoe, not on the package index."""
    from scattermoe.parallel_experts import flatten_sort_count, parallel_linear

    order = flatten_sort_count(indices_TK, num_experts=experts.num_experts)
    up, down = (weight.permute(0, 2, 1) for weight in (experts.gate_up_proj, experts.down_proj))
    z_N2F = parallel_linear(x_TD, up, indices_TK.shape[1], *order, grouped_out=True)
    act_NF = experts._apply_gate(z_N2F)
    return parallel_linear(act_NF, down, 1, *order, grouped_in=True, gates=weights_TK.to(x_TD.dtype))


def peers() -> list[str]:
    """Registers what can run here, on a GPU; returns the names."""
    ExpertsInterface.register("compiled_grouped_mm", torch.compile(ALL_EXPERTS_FUNCTIONS["grouped_mm"]))
    names = ["compiled_grouped_mm"]
    for name, package, forward in (("liger", "liger_kernel", liger), ("scattermoe", "scattermoe", scattermoe)):
        if importlib.util.find_spec(package) is not None:
            ExpertsInterface.register(name, forward)
            names.append(name)
    if importlib.util.find_spec("kernels") is not None:
        names.append("sonicmoe")  # transformers' own, from the hub's kernels
    return names
