"""LoRA on experts at a cost that follows the tokens.

PEFT adapts a stacked 3-D parameter (`target_parameters`) by adding B A to the whole stack at every forward: for 128
experts of 2048 x 768 that is 600 MB written for however few tokens. `split_expert_adapters` leaves the product apart,

    y = W_e x + scaling * B_e (A_e x)         two small grouped products of rank r beside the large one

and changes nothing else of PEFT: names, layout, initialisation, merging and saving of adapters stay its own, so that an
adapter folder written here loads anywhere that PEFT runs.

E experts, R rank, X input width, Y output width.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch.nn.functional as F
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from plumbline.policy_models.experts import DEFAULT_EXPERTS
from plumbline.policy_models.kernels import TRITON_EXPERTS
from plumbline.policy_models.kernels.dispatch import AUTO_EXPERTS

_OURS = (DEFAULT_EXPERTS, TRITON_EXPERTS, AUTO_EXPERTS)  # the back ends that read `split_lora`


def split_expert_adapters(model: nn.Module) -> int:
    """Makes PEFT's adapters on experts split; returns how many stacked weights that concerns. Calling again is harmless.

    Call it after `get_peft_model`; adapters that are added later are split too. Under another back end than ours
    (`eager` or transformers' `grouped_mm`) PEFT's own way stays in force.
    """
    wrappers = [module for module in model.modules() if isinstance(module, ParamWrapper) and _is_ours(module)]
    for wrapper in wrappers:
        wrapper.get_base_layer().split_lora = {}  # type: ignore[assignment]
        wrapper._activate_lora = MethodType(_activate_split, wrapper)  # type: ignore[method-assign]
    return len(wrappers)


def _is_ours(wrapper: ParamWrapper) -> bool:
    """Whether the parameter is that of experts in the layout (E, out, in)."""
    experts = wrapper.get_base_layer()
    return "_is_expert_parallel" in vars(experts) and not experts.is_transposed and wrapper.get_param().dim() == 3


@contextmanager
def _activate_split(wrapper: ParamWrapper, active_adapters: Sequence[str]) -> Iterator[None]:
    """In the place of `ParamWrapper._activate_lora`: leaves the factors where our back ends look for them."""
    experts: Any = wrapper.get_base_layer()
    if experts.config._experts_implementation not in _OURS:
        with ParamWrapper._activate_lora(wrapper, list(active_adapters)):
            yield
        return
    experts.split_lora[wrapper.parameter_name] = [
        _factors(wrapper, name) for name in active_adapters if name in wrapper.lora_A
    ]
    try:
        yield
    finally:
        del experts.split_lora[wrapper.parameter_name]


def _factors(wrapper: ParamWrapper, name: str) -> tuple[Tensor, Tensor, float]:
    """(A (E, R, X), B (E, Y, R), scaling) of an adapter, from PEFT's (E * R, X) and (Y, R * E).

    The rank is filled up with zeros to a multiple of 8: grouped products want rows of whole 16 bytes.
    """
    num_experts = wrapper.num_experts
    lora_a: Any = wrapper.lora_A[name].weight
    lora_b: Any = wrapper.lora_B[name].weight
    a_ERX = lora_a.unflatten(0, (num_experts, -1))
    b_EYR = lora_b.unflatten(1, (-1, num_experts)).permute(2, 0, 1)
    missing = -a_ERX.shape[1] % 8
    a_ERX, b_EYR = F.pad(a_ERX, (0, 0, 0, missing)), F.pad(b_EYR, (0, missing))
    return a_ERX.contiguous(), b_EYR.contiguous(), wrapper.scaling[name]
