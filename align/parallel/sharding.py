"""Full fine-tuning of models that no single device holds: layers sharded over the ranks by FSDP2 (Zhao et al. 2023, arXiv:2304.11277).

Every decoder layer is gathered when it runs and given back after it; gradients are added up and scattered in its backward, and
the optimizer sees its shard alone. Embedding, final norm, LM head and value head stay whole on every rank: the head is used outside
the decoder, often shares the embedding's weight, and is a small share of a model that needs sharding.

A gather waits for all ranks, so that all must run as many forwards. Where they cannot (each draws answers of its own lengths),
`whole` keeps a model gathered, and forwards inside it wait for no one.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, parse_flag_from_env
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


def asks_for_shards(accelerator: Accelerator) -> bool:
    """Whether accelerate was told to shard by FSDP2.

    On a CPU accelerate has no such type, and what its launcher puts into the environment decides.
    Raises ValueError for FSDP1 and DeepSpeed.
    """
    kind = accelerator.distributed_type
    on_cpu = kind == DistributedType.MULTI_CPU and parse_flag_from_env("ACCELERATE_USE_FSDP")
    if not on_cpu and kind in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        return False
    version = os.environ.get("FSDP_VERSION", "1")
    if not (on_cpu or kind == DistributedType.FSDP) or version != "2":
        raise ValueError(
            f"PPO does not run under {'FSDP' if on_cpu else kind.value} (FSDP_VERSION={version}): shard with FSDP2 "
            "(configs/accelerate/fsdp2.yaml), or let every process hold the whole model (configs/accelerate/ddp.yaml)"
        )
    return True


def mesh_of(accelerator: Accelerator) -> DeviceMesh | None:
    """All ranks in a row, (ranks,), where layers are to be sharded, else None. Raises what `asks_for_shards` does."""
    if not asks_for_shards(accelerator):
        return None
    return init_device_mesh(accelerator.device.type, (accelerator.num_processes,))


def shard(model: PreTrainedModel, mesh: DeviceMesh, device: torch.device, dtype: torch.dtype | None) -> None:
    """Shards the decoder layers of `model` in place; what is left goes to `device` as it is.

    Args:
        dtype: that gathered weights have, None for the type they are stored in. Gradients are added up in fp32.
    """
    layers = [module for module in model.base_model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no layers that can be sharded; launch with configs/accelerate/ddp.yaml"
        )
    inside = {parameter for layer in layers for parameter in layer.parameters()}
    outside = {parameter for parameter in model.parameters() if parameter not in inside}
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    # not the model around them: fully_shard changes the class of a module, and by its class transformers knows a model's outputs
    for layer in layers:
        sharded = fully_shard(layer, mesh=mesh, mp_policy=precision, reshard_after_forward=True)
        # a loss is a sum over tokens of all ranks already: gradients are added up, not averaged
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)
    for parameter in outside:
        parameter.data = parameter.data.to(device)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)


@contextmanager
def whole(model: nn.Module | None) -> Iterator[None]:
    """Keeps all layers gathered: for generation, and for forwards that ranks do not make alike. Nothing to do without shards or model.

    All ranks enter and leave together. Backward passes do not belong inside.
    """
    modules = [] if model is None else [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in modules:
            module.set_reshard_after_forward(True, recurse=False)
            module.reshard()


def is_shard(tensor: Tensor) -> bool:
    """Whether this rank holds a part of the tensor only."""
    return isinstance(tensor, DTensor)


def by_sharding(parameters: Sequence[nn.Parameter]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(sharded, whole on every rank): no fused kernel takes the two together."""
    return [p for p in parameters if is_shard(p)], [p for p in parameters if not is_shard(p)]
