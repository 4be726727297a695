"""`experts_implementation="policy_auto"`: the faster of torch's grouped_mm and our kernels, measured on the layer's own sizes.

One choice a device, type and layer size, made at the first pass and kept for the process, whatever the number of tokens:
a rollout and its update must run the same arithmetic, or routes flip between them.
"""

import logging
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.moe import ExpertsInterface

from plumbline.policy_models.experts import gemm_dtype, grouped_experts_forward
from plumbline.policy_models.kernels import kernels_run_on, triton_experts_forward

AUTO_EXPERTS = "policy_auto"
_TOKENS, _TURNS = 4096, 5

logger = logging.getLogger(__name__)
_faster: dict[tuple, Any] = {}


def auto_experts_forward(experts: Any, x_TD: Tensor, indices_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """As `grouped_experts_forward`, by the faster back end; by it where the kernels cannot run."""
    forward = grouped_experts_forward
    if x_TD.is_cuda and kernels_run_on("cuda") is None:
        forward = _chosen(experts, indices_TK.shape[1])
    return forward(experts, x_TD, indices_TK, weights_TK)


def _chosen(experts: Any, top_k: int) -> Any:
    weight = experts.down_proj
    key = (weight.device, gemm_dtype(weight), tuple(weight.shape), top_k)
    if key not in _faster:
        if torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "policy_auto measures at its first pass and cannot inside torch.compile or a CUDA graph: run one pass "
                "before, or name policy_triton or policy_grouped_mm"
            )
        _faster[key] = pick_faster(experts, top_k)
    return _faster[key]


def pick_faster(experts: Any, top_k: int, tokens: int = _TOKENS) -> Any:
    """Times forward and backward of both on random tokens and even routes; the random state is left alone."""
    weight = experts.down_proj
    rng = torch.Generator(weight.device).manual_seed(0)
    num_experts, width, _ = weight.shape
    x_TD = torch.randn(tokens, width, device=weight.device, generator=rng).to(gemm_dtype(weight))
    scores_TE = torch.rand(tokens, num_experts, device=weight.device, generator=rng)
    weights_TK, indices_TK = scores_TE.topk(top_k, dim=-1)
    seconds = {}
    for forward in (grouped_experts_forward, triton_experts_forward):
        times = [_seconds(forward, experts, x_TD, indices_TK, weights_TK) for _ in range(_TURNS)]
        seconds[forward] = sorted(times[2:])[len(times[2:]) // 2]  # two of them to warm up
    best = min(seconds, key=seconds.__getitem__)
    figures = ", ".join(f"{forward.__name__} {1e3 * spent:.2f} ms" for forward, spent in seconds.items())
    logger.info("experts of %s, top %d: %s", tuple(weight.shape), top_k, figures)
    return best


def _seconds(forward: Any, experts: Any, x_TD: Tensor, indices_TK: Tensor, weights_TK: Tensor) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.enable_grad():
        x_TD = x_TD.detach().requires_grad_()
        leaves = [x_TD, *(weight for weight in experts.parameters() if weight.requires_grad)]
        begin.record()
        out_TD = forward(experts, x_TD, indices_TK, weights_TK)
        torch.autograd.grad(out_TD, leaves, torch.ones_like(out_TD))
        end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


ExpertsInterface.register(AUTO_EXPERTS, auto_experts_forward)
