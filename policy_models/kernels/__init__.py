"""Triton kernels of the policy, registered with transformers as `experts_implementation="policy_triton"`.

With that back end the choice of experts and the log-probabilities of answers run in kernels too (`kernels_serve`);
`policy_auto` (dispatch.py) measures whether our experts or torch's grouped_mm are faster for a layer.

reference.py is the specification of each, in plain torch. Nothing here imports triton before a kernel is asked for:
without it the model runs on `policy_grouped_mm`. On a CPU the kernels run under TRITON_INTERPRET=1 only, far too slowly
for anything but tests.

No GPU was at hand when these were written: they are held to their specification in the interpreter and compiled ahead
of time for sm_80 and sm_90; `benchmarks/bench_gpu.py` checks and times them on a GPU. Hence they are not the default.
"""

import importlib.util
import os
from typing import Any

from torch import Tensor
from transformers.integrations.moe import ExpertsInterface

from plumbline.policy_models.experts import grouped_experts_forward

TRITON_EXPERTS = "policy_triton"


def kernels_run_on(device_type: str) -> str | None:
    """None where the kernels can run, else why they cannot."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device_type == "cuda" or (device_type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return None
    return f"no kernels for {device_type!r}: they need a CUDA device, or TRITON_INTERPRET=1 for tests on a CPU"


def triton_experts_forward(experts: Any, x_TD: Tensor, indices_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """As `grouped_experts_forward`, by our kernels; by it where they cannot run or the experts have adapters."""
    if kernels_run_on(x_TD.device.type) is not None or hasattr(experts, "split_lora"):
        return grouped_experts_forward(experts, x_TD, indices_TK, weights_TK)
    from plumbline.policy_models.kernels.experts import routed_swiglu_experts

    return routed_swiglu_experts(experts, x_TD, indices_TK, weights_TK)


def kernels_serve(config: Any, device_type: str) -> bool:
    """Whether a model with this config runs on our kernels: routing and log-probabilities then do, like its experts."""
    chosen = getattr(config, "_experts_implementation", None) == TRITON_EXPERTS
    return chosen and kernels_run_on(device_type) is None


ExpertsInterface.register(TRITON_EXPERTS, triton_experts_forward)
