"""Gradients added up over ranks as thin matrices: less to send over a slow network.

PowerSGD with error feedback and a warm start (Vogels et al. 2019, arXiv:1905.13727, algorithms 1 and 2), for sums in
place of means: the loss is already divided by the tokens of all ranks.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

AllReduce = Callable[[Tensor], Tensor]


class PowerSGD:
    """Sums the gradients of matrices over ranks at a rank of at most `rank`; what that leaves out is sent later.

    Matrices that two thin ones would not make smaller, and vectors, are summed exactly. Every rank holds the same
    right factors and its own errors, so each saves its own state.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.factors: dict[int, Tensor] = {}  # (columns, rank) by place of the parameter
        self.errors: dict[int, Tensor] = {}  # (rows, columns)

    @torch.no_grad()
    def add_up(self, parameters: Sequence[nn.Parameter], all_reduce: AllReduce) -> None:
        """Replaces each gradient by (nearly) its sum over ranks; a missing one counts as 0.

        The same parameters in the same order at every call. `all_reduce` sums a tensor over ranks.
        """
        grads = [(p.grad if p.grad is not None else torch.zeros_like(p)).float() for p in parameters]
        thin = [at for at, grad in enumerate(grads) if self._pays(grad)]
        sent = {at: grads[at].flatten(1) + self.errors.get(at, 0.0) for at in thin}
        left = {at: sent[at] @ self._factor(at, sent[at]) for at in thin}
        whole = {at: grad for at, grad in enumerate(grads) if at not in sent}
        left, whole = _together(all_reduce, left, whole)
        left = {at: torch.linalg.qr(product)[0] for at, product in left.items()}  # the same on every rank
        own = {at: sent[at].T @ left[at] for at in thin}
        self.errors = {at: sent[at] - left[at] @ own[at].T for at in thin}
        (self.factors,) = _together(all_reduce, own)
        for at, parameter in enumerate(parameters):
            total = left[at] @ self.factors[at].T if at in sent else whole[at]
            parameter.grad = total.view_as(parameter).to(parameter.dtype)

    def _pays(self, grad: Tensor) -> bool:
        if grad.dim() < 2:
            return False
        rows, columns = grad.shape[0], grad[0].numel()
        return self.rank * (rows + columns) < rows * columns

    def _factor(self, at: int, matrix: Tensor) -> Tensor:
        """The right factor of the last call, which follows the gradient's leading directions; at first, noise."""
        if at not in self.factors:
            noise = torch.Generator().manual_seed(at)  # on the CPU: alike on every rank and device
            self.factors[at] = torch.randn(matrix.shape[1], self.rank, generator=noise).to(matrix.device)
        return self.factors[at]

    def state_dict(self) -> dict[str, Any]:
        """Factors and this rank's errors."""
        return {"factors": self.factors, "errors": self.errors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up what `state_dict` gave."""
        self.factors, self.errors = dict(state["factors"]), dict(state["errors"])


def _together(all_reduce: AllReduce, *groups: dict[int, Tensor]) -> list[dict[int, Tensor]]:
    """Each group with its tensors summed over ranks, all in one exchange."""
    tensors = [tensor for group in groups for tensor in group.values()]
    if not tensors:
        return [dict(group) for group in groups]
    flat = all_reduce(torch.cat([tensor.reshape(-1) for tensor in tensors]))
    parts = iter(flat.split([tensor.numel() for tensor in tensors]))
    return [{at: next(parts).view_as(tensor) for at, tensor in group.items()} for group in groups]
