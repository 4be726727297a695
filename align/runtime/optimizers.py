"""Optimizers of a PPO run, and clipping of a gradient against the size of its weight."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from plumbline.align.parallel.sharding import by_sharding, is_shard

OPTIMIZERS = ("adamw", "adamw_8bit")
_EPS = 1e-5  # Huang et al. 2024, arXiv:2403.17031: 1e-8 lets the first steps of a small gradient be as large as any


def build_optimizer(name: str, groups: Sequence[tuple[list[nn.Parameter], float]]) -> torch.optim.Optimizer:
    """AdamW without weight decay over (parameters, learning rate) groups; empty groups are left out.

    `adamw_8bit` keeps both moments in 8 bits (Dettmers et al. 2021, arXiv:2110.02861).
    ImportError, naming the extra, where bitsandbytes is missing.
    """
    parameters = [{"params": part, "lr": lr} for group, lr in groups for part in by_sharding(group) if part]
    if name == "adamw":
        return torch.optim.AdamW(parameters, eps=_EPS, weight_decay=0.0, fused=True)  # one pass over memory, not eight
    return _eight_bit()(parameters, eps=_EPS, weight_decay=0.0)


def _eight_bit() -> Callable[..., Any]:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ImportError("optimizer=adamw_8bit needs bitsandbytes: pip install 'plumbline-rlhf[quant]'") from error
    return AdamW8bit


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
    """Scales all gradients so that their norm together is at most `max_norm`; returns what it was. Shards count with all ranks' parts."""
    sharded, plain = by_sharding(parameters)
    if not sharded:
        return nn.utils.clip_grad_norm_(plain, max_norm)
    parts = [[p.grad for p in part if p.grad is not None] for part in (sharded, plain)]
    norms = [nn.utils.get_total_norm(grads) for grads in parts if grads]
    norm = torch.stack([one.full_tensor() if is_shard(one) else one for one in norms]).norm()  # type: ignore[attr-defined]
    for part in (sharded, plain):
        nn.utils.clip_grads_with_norm_(part, max_norm, norm)
    return norm


@torch.no_grad()
def clip_adaptively(parameters: Sequence[nn.Parameter], ratio: float, *, eps: float = 1e-3) -> None:
    """Scales every gradient row down to a norm of at most `ratio` times its weight row's (Brock et al. 2021, eq. 3).

    Rows are over the first dimension; a vector is one row. A weight row counts as at least `eps` long, so that weights
    that start at 0, as LoRA's B does, can move. (arXiv:2102.06171)
    """
    for parameter in parameters:
        if parameter.grad is not None:
            bound = ratio * _row_norms(parameter.detach()).clamp(min=eps)
            norm = _row_norms(parameter.grad)
            parameter.grad.mul_(torch.where(norm > bound, bound / norm.clamp(min=1e-12), 1.0).to(parameter.grad.dtype))


def _row_norms(x: Tensor) -> Tensor:
    """Norms over all but the first dimension, shaped to multiply x."""
    x = x.float()
    return x.norm() if x.dim() < 2 else x.flatten(1).norm(dim=1).view(-1, *[1] * (x.dim() - 1))


def add_up_gradients(parameters: Sequence[nn.Parameter], all_reduce: Callable[[Tensor], Tensor]) -> None:
    """Sums gradients over ranks in one exchange; a parameter that saw no token on this rank counts as 0.

    Gradients of shards are left out: FSDP2 has added them up.
    """
    _, parameters = by_sharding(parameters)
    if not parameters:
        return
    flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).reshape(-1).float() for p in parameters])
    flat = all_reduce(flat)
    for parameter, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = grad.view_as(parameter).to(parameter.dtype)


class FallingRate:
    """Share of the rate after so many optimizer steps: linear from 1 to 0 at `total`.

    A run that is resumed for another number of steps falls from where it was to 0 at the new end: it never rises again.
    """

    def __init__(self, total: int) -> None:
        self.total, self.start, self.share = total, 0, 1.0

    def __call__(self, done: int) -> float:
        left = 1.0 - (done - self.start) / max(self.total - self.start, 1)
        return max(0.0, self.share * left)

    def state_dict(self) -> dict[str, float]:
        """Where it falls from, and to."""
        return {"total": self.total, "start": self.start, "share": self.share}

    def go_on(self, state: dict[str, float] | None, *, at: int) -> None:
        """Takes up a stored fall after `at` steps, towards its own total. None (of older checkpoints): as if unbroken."""
        if state is None:
            return
        stored = FallingRate(int(state["total"]))
        stored.start, stored.share = int(state["start"]), float(state["share"])
        if stored.total == self.total:
            self.start, self.share = stored.start, stored.share
        else:
            self.start, self.share = at, stored(at)
