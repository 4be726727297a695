"""Weights in 4 or 8 bits, experts included, and products in int8 on a CPU.

    "4bit"   NF4 (QLoRA, arXiv:2305.14314): blocks of 64 values share a scale; 0.56 bytes a weight
    "8bit"   a scale a row, 127 steps either way; 1 byte a weight
    "int8"   stored as "8bit", and each token's activations rounded to 127 steps too: the product is one of integers.
             For inference on a CPU. Integer sums are exact, so that a row's result never depends on its batch.

Linear layers and experts are packed; embeddings, LM head, routers, norms and scalar heads are not. bitsandbytes packs
`nn.Linear` alone and leaves the stacked experts, most of the weights, as they were, without a word.

A packed weight stays a parameter of its shape, type and device, which PEFT reads, but holds no memory: a single NaN,
so that code which reads it by mistake cannot go unnoticed. Train adapters on top: "4bit" and "8bit" are differentiable
in their input, and a backward unpacks again instead of keeping what the forward unpacked.

E experts, X input width, Y output width, M rows in expert order.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from plumbline.policy_models.experts import grouped_mm
from plumbline.policy_models.kernels import TRITON_EXPERTS
from plumbline.policy_models.layers import ScalarHead

SCHEMES = ("4bit", "8bit", "int8")
_BLOCK = 64
# Quantiles of a normal distribution, 0 among them (arXiv:2305.14314, appendix E).
_NF4 = torch.tensor(
    (-1.0, -0.69619280, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0)
    + (0.07958030, 0.16093020, 0.24611230, 0.33791524, 0.44070983, 0.56261700, 0.72295684, 1.0)
)


class Packed(nn.Module):
    """A weight (..., Y, X) in few bits. Calling it with a type gives the weight back, rounded."""

    codes: Tensor
    scales: Tensor

    def __init__(self, weight: Tensor, scheme: str) -> None:
        super().__init__()
        self.scheme, self.shape = scheme, weight.shape
        codes, scales = (_to_nf4 if scheme == "4bit" else _to_int8)(weight.detach().float())
        self.register_buffer("codes", codes, persistent=False)
        self.register_buffer("scales", scales, persistent=False)

    @torch.no_grad()
    def forward(self, dtype: torch.dtype) -> Tensor:
        if self.scheme != "4bit":
            return (self.codes * self.scales).to(dtype)
        pairs = torch.stack((self.codes >> 4, self.codes & 15), dim=-1).flatten(-2).long()
        return (_NF4.to(pairs.device)[pairs] * self.scales).to(dtype).flatten()[: self.shape.numel()].view(self.shape)

    def linear(self, rows_MX: Tensor) -> Tensor:
        """rows W^T, (..., Y)."""
        if self.scheme == "int8":
            return _int8_product(rows_MX, self.codes, self.scales)
        return _FrozenProduct.apply(rows_MX, self, lambda rows, weight: F.linear(rows, weight))

    def grouped(self, rows_MX: Tensor, ends_E: Tensor) -> Tensor:
        """Each row times the matrix of its expert, (M, Y); rows past the last end are left unwritten."""
        if self.scheme != "int8":
            return _FrozenProduct.apply(
                rows_MX, self, lambda rows, weight: grouped_mm(rows, weight.transpose(-2, -1), offs=ends_E)
            )
        out_MY, start = rows_MX.new_empty(len(rows_MX), self.shape[1]), 0
        for expert, end in enumerate(ends_E.tolist()):
            if end > start:
                rows = rows_MX[start:end]
                out_MY[start:end] = _int8_product(rows, self.codes[expert], self.scales[expert])
            start = end
        return out_MY

    def extra_repr(self) -> str:
        return f"{self.scheme}, shape={tuple(self.shape)}"


class _FrozenProduct(torch.autograd.Function):
    """product(rows, weight), whose backward unpacks the weight again."""

    @staticmethod
    def forward(ctx, rows_MX: Tensor, packed: Packed, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        ctx.packed, ctx.product, ctx.dtype = packed, product, rows_MX.dtype
        return product(rows_MX, packed(rows_MX.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_MY: Tensor) -> tuple[Tensor, None, None]:
        weight = ctx.packed(ctx.dtype)
        return ctx.product(grad_MY.contiguous(), weight.transpose(-2, -1).contiguous()), None, None


class QuantisedLinear(nn.Linear):
    """A linear layer whose weight is packed; made from one by `quantise`."""

    weight_packed: Packed

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        out = self.weight_packed.linear(x.to(dtype))
        return out if self.bias is None else out + self.bias.to(dtype)


def quantise(model: PreTrainedModel, scheme: str) -> PreTrainedModel:
    """Packs the linear layers and experts of `model` in place, and freezes every weight of it; returns it.

    The dense weights are let go one by one: the peak is the model as it came and one packed layer. The model can no
    longer be saved (save the one it came from, and the adapter).

    Raises:
        ValueError: for an unknown scheme, experts whose back end would not read packed weights, or "int8" off the CPU.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"quantise={scheme!r} is not one of {', '.join(SCHEMES)}")
    if scheme == "int8" and model.device.type != "cpu":
        raise ValueError(f"quantise='int8' is for a CPU and the model is on {model.device}; take 8bit")
    experts = [module for module in model.modules() if "_is_expert_parallel" in vars(module)]
    backend = getattr(model.config, "_experts_implementation", None)
    if experts and not str(backend).startswith("policy_"):
        raise ValueError(f"experts_implementation={backend!r} cannot read packed experts; use policy_grouped_mm")
    if experts and scheme == "int8" and backend == TRITON_EXPERTS:
        raise ValueError(f"quantise='int8' and experts_implementation={backend!r} clash; use policy_grouped_mm")
    model.requires_grad_(False)
    head = model.get_output_embeddings()
    for module in list(model.modules()):
        if isinstance(module, nn.Linear) and module is not head and not isinstance(module, ScalarHead):
            _pack(module, "weight", scheme)
            module.__class__ = QuantisedLinear
    for module in experts:
        for name in ("gate_up_proj", "down_proj"):
            _pack(module, name, scheme)
    vars(model)["save_pretrained"] = _refuse_to_save
    return model


def _pack(module: nn.Module, name: str, scheme: str) -> None:
    weight: Tensor = getattr(module, name)
    module.add_module(f"{name}_packed", Packed(weight, scheme))
    hollow = weight.new_full((1,), torch.nan).expand(weight.shape)
    setattr(module, name, nn.Parameter(hollow, requires_grad=False))


def _refuse_to_save(*_args: Any, **_kwargs: Any) -> None:
    raise ValueError("a quantised model cannot be saved: save its adapter, or quantise after loading")


def _to_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(two codes a byte (blocks, 32), largest magnitude of each block (blocks, 1))."""
    values = F.pad(weight.flatten(), (0, -weight.numel() % _BLOCK)).view(-1, _BLOCK)
    scales = values.abs().amax(-1, keepdim=True)
    between = ((_NF4[1:] + _NF4[:-1]) / 2).to(weight.device)
    codes = torch.bucketize(values / scales.clamp_min(torch.finfo(torch.float32).tiny), between).to(torch.uint8)
    return codes[:, ::2] << 4 | codes[:, 1::2], scales


def _to_int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(codes (..., X) in -127 to 127, scale of each row (..., 1))."""
    scales = rows.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / 127
    return (rows / scales).round().to(torch.int8), scales


def _int8_product(rows_MX: Tensor, codes_YX: Tensor, scales_Y1: Tensor) -> Tensor:
    if torch.is_grad_enabled() and rows_MX.requires_grad:
        raise RuntimeError("int8 products have no gradient: train on 8bit or 4bit, or run under torch.no_grad()")
    codes, scales = _to_int8(rows_MX.flatten(0, -2).float())
    sums = torch._int_mm(codes, codes_YX.T).float() * scales * scales_Y1.T
    return sums.to(rows_MX.dtype).view(*rows_MX.shape[:-1], -1)
