"""Routing: which experts a token goes to. Five routers behind one interface, chosen by `config.router`.

    router(x_TD, keep_T) -> logits (T, E) fp32, weights (T, K) fp32, expert indices (T, K)

They differ in what an expert scores, in how K of them are chosen from the scores, and in what is learned from the load
between two optimizer steps (`end_step`). An index of E is a slot that no expert serves: the shared expert does.

Always in fp32, also with bf16 weights and under autocast: in bf16 near-ties flip between two passes over the same
tokens, and rollout and training then disagree about the experts.

T flat tokens, D width, E experts, K experts a token, G groups of experts.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers import initialization as init

from plumbline.policy_models.configuration import ROUTER_NAMES, MoEPolicyConfig


class Router(nn.Module):
    """Softmax over all experts, then the K most likely (Switch Transformer, arXiv:2101.03961; Mixtral).

    Subclasses change `logits`, `scores`, `choose` and `end_step`.

    Attributes:
        window_E: slots that kept tokens asked of each expert since the last `end_step`; None while nobody trains.
        replay_TK: experts to use instead of the own choice, -1 where the own choice stands.
        recorded_TK: int16 copy of the experts used last, while `records` is on.
    """

    top_k_of: str | None = "softmax"  # what a plain top K is taken of; None where the choice is more than that

    def __init__(self, config: MoEPolicyConfig) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        self.top_k = config.num_experts_per_tok
        self.renormalise = config.norm_topk_prob
        self.scale = config.routed_scaling_factor
        # A bare parameter: an nn.Linear would be caught by LoRA on "all-linear" and by 4-bit conversion.
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.window_E: Tensor | None = None
        self.replay_TK: Tensor | None = None
        self.recorded_TK: Tensor | None = None
        self.records = False

    def forward(
        self, x_TD: Tensor, keep_T: Tensor | None = None, *, fused: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns logits (T, E), weights (T, K) >= 0 and expert indices (T, K) in 0 to E.

        Args:
            keep_T: True where a token counts for the load; padding is routed like any other token.
            fused: one kernel chooses (kernels/router.py), where this router's choice is a plain top K.
        """
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = self.logits(x_TD.float())
            if fused and self.top_k_of is not None and self.replay_TK is None:
                weights_TK, indices_TK = self._fused(logits_TE)
                self._count(indices_TK, keep_T)
                self._record(indices_TK)
                return logits_TE, weights_TK, indices_TK
            scores_TE = self.scores(logits_TE)
            with torch.no_grad():
                indices_TK = self._replayed(self.choose(scores_TE, keep_T))
            served_TK = indices_TK < self.num_experts
            weights_TK = scores_TE.gather(-1, indices_TK.clamp(max=self.num_experts - 1)) * served_TK
            if self.renormalise:  # each slot that no expert serves takes its 1/K of the weight with it
                total_T1 = weights_TK.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
                weights_TK = weights_TK / total_T1 * served_TK.float().mean(-1, keepdim=True)
        self._record(indices_TK)
        return logits_TE, weights_TK * self.scale, indices_TK

    def init_weights(self, std: float) -> None:
        """A new router's weights and buffers."""
        init.normal_(self.weight, std=std)

    def logits(self, x_TD: Tensor) -> Tensor:
        """What an expert is worth to a token, (T, E); the losses read it."""
        return F.linear(x_TD, self.weight.float())

    def scores(self, logits_TE: Tensor) -> Tensor:
        """What the weights are made of, (T, E) in [0, 1]."""
        return logits_TE.softmax(dim=-1)

    def choose(self, scores_TE: Tensor, keep_T: Tensor | None) -> Tensor:
        """Experts of each token (T, K), best first. Counts the load."""
        indices_TK = scores_TE.topk(self.top_k, dim=-1).indices
        self._count(indices_TK, keep_T)
        return indices_TK

    @torch.no_grad()
    def end_step(self) -> None:
        """After an optimizer step: learns from the load of the window, which then starts anew."""
        if self.window_E is None:
            return
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.window_E)
        if self.window_E.sum() > 0:
            self.learn_load(self.window_E / self.window_E.sum())
        self.window_E.zero_()

    def learn_load(self, share_E: Tensor) -> None:
        """Takes each expert's part of the slots, summing to 1 over experts and ranks. Nothing to learn here."""

    def _fused(self, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        from plumbline.policy_models.kernels.router import route_top_k

        bias_E, sigmoid = getattr(self, "e_score_correction_bias", None), self.top_k_of == "sigmoid"
        return route_top_k(
            logits_TE, bias_E, self.top_k, sigmoid=sigmoid, renormalise=self.renormalise, scale=self.scale
        )

    def _record(self, indices_TK: Tensor) -> None:
        if self.records:
            self.recorded_TK = indices_TK.to(torch.int16)

    def _count(self, indices_TK: Tensor, keep_T: Tensor | None) -> None:
        # A recomputed forward (gradient checkpointing) counts twice, which leaves the shares as they are.
        if self.window_E is None or not self.training:
            return
        weight_TK = torch.ones_like(indices_TK, dtype=torch.float32)
        if keep_T is not None:
            weight_TK *= keep_T[:, None]
        self.window_E = self.window_E.to(indices_TK.device).index_add(0, indices_TK.flatten(), weight_TK.flatten())

    def _replayed(self, own_TK: Tensor) -> Tensor:
        if self.replay_TK is None:
            return own_TK
        if self.replay_TK.shape != own_TK.shape:
            raise ValueError(
                f"routes of shape {tuple(self.replay_TK.shape)} cannot be replayed over {tuple(own_TK.shape)}; "
                "replay the very batch they were recorded on, or reorder them with its tokens"
            )
        given_TK = self.replay_TK.to(own_TK.device, own_TK.dtype)
        return torch.where(given_TK < 0, own_TK, given_TK)

    def _apply(self, fn: Any, recurse: bool = True) -> "Router":
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():  # .to(bfloat16) would round away steps of 1e-3: keep the move alone
            moved = self._buffers[name]
            if moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self

    def extra_repr(self) -> str:
        num_experts, hidden_size = self.weight.shape
        return f"hidden_size={hidden_size}, num_experts={num_experts}, top_k={self.top_k}"


class SigmoidRouter(Router):
    """Sigmoid scores, and a bias that steers the choice alone: balance without a loss (DeepSeek-V3, arXiv:2412.19437, 2.1.2).

    choice: top K of s_e + b_e.  weight: s_e.  After each step b_e += rate * sign(1/E - load_e).
    The bias is part of the checkpoint. PPO never calls `end_step`, so that it stands still there.
    """

    top_k_of = "sigmoid"
    e_score_correction_bias: Tensor  # DeepSeek's name

    def __init__(self, config: MoEPolicyConfig) -> None:
        super().__init__(config)
        self.rate = config.router_bias_update_rate
        self.register_buffer("e_score_correction_bias", torch.zeros(config.num_experts, dtype=torch.float32))
        self._warned = False

    def init_weights(self, std: float) -> None:
        super().init_weights(std)
        init.zeros_(self.e_score_correction_bias)

    def scores(self, logits_TE: Tensor) -> Tensor:
        return logits_TE.sigmoid()

    def choose(self, scores_TE: Tensor, keep_T: Tensor | None) -> Tensor:
        return super().choose(scores_TE + self.e_score_correction_bias, keep_T)

    def _count(self, indices_TK: Tensor, keep_T: Tensor | None) -> None:
        if self.training and self.rate and self.window_E is None and not self._warned:
            self._warned = True
            warnings.warn(
                "router 'sigmoid' trains without its bias: nothing balances the experts. Add RouterBalance() to the "
                "trainer's callbacks, or set router_bias_update_rate to 0",
                stacklevel=2,
            )
        super()._count(indices_TK, keep_T)

    def learn_load(self, share_E: Tensor) -> None:
        self.e_score_correction_bias += self.rate * torch.sign(1 / self.num_experts - share_E)


class CapacityRouter(Router):
    """Softmax scores with a capacity an expert that follows its load; what overflows goes to the next choice.

    C_e = ceil(factor * T * K * (1/E + load_e) / 2), load_e a running mean of the demand: capacity sums to at least
    factor * T * K. Tokens go down their choices in rounds; an expert takes those that score it highest. With a shared
    expert 2 K choices are tried and then the shared expert serves the slot; without one all are, and a slot that finds
    no room still goes to its best choice, above capacity: nothing is lost.

    A token's experts depend on its batch mates here, and so do log-probabilities. Hence only in training mode:
    evaluation, rollouts and PPO, whose policy stays in evaluation mode, are dropless.

    Attributes:
        rerouted: part of the kept slots that did not get one of the token's K best experts, in the last pass.
        overflowed: part of the kept slots that found no room at all.
    """

    top_k_of = None
    load_E: Tensor  # noqa: N815

    def __init__(self, config: MoEPolicyConfig) -> None:
        super().__init__(config)
        self.factor = config.router_capacity_factor
        self.has_shared = config.shared_expert_intermediate_size > 0
        even_E = torch.full((config.num_experts,), 1 / config.num_experts, dtype=torch.float32)
        self.register_buffer("load_E", even_E)
        self.rerouted = self.overflowed = torch.zeros(())
        warnings.warn(
            "router 'capacity' makes log-probabilities in training mode depend on the other tokens of the batch; "
            "evaluation mode is dropless",
            stacklevel=2,
        )

    def init_weights(self, std: float) -> None:
        super().init_weights(std)
        init.constant_(self.load_E, 1 / self.num_experts)

    def capacity(self, num_tokens: int) -> Tensor:
        """Slots that each expert takes from a batch of `num_tokens`, (E,)."""
        share_E = (1 / self.num_experts + self.load_E) / 2
        return (self.factor * num_tokens * self.top_k * share_E - 1e-4).ceil().long()

    def choose(self, scores_TE: Tensor, keep_T: Tensor | None) -> Tensor:
        best_TK = super().choose(scores_TE, keep_T)
        if not self.training:
            return best_TK
        tries = min(2 * self.top_k, self.num_experts) if self.has_shared else self.num_experts
        indices_TK = place(scores_TE, self.capacity(len(scores_TE)), self.top_k, tries)
        lost_TK = indices_TK == self.num_experts
        keep_T1 = torch.ones_like(lost_TK[:, :1]) if keep_T is None else keep_T[:, None].bool()
        num_slots = (keep_T1.sum() * self.top_k).clamp_min(1)
        moved_TK = (indices_TK[..., None] != best_TK[:, None]).all(-1)
        self.rerouted, self.overflowed = ((part & keep_T1).sum() / num_slots for part in (moved_TK, lost_TK))
        if not self.has_shared:
            free_TE = scores_TE.scatter(-1, indices_TK.clamp(max=self.num_experts - 1), -1.0)
            spare_TK = free_TE.topk(self.top_k, dim=-1).indices
            nth_TK = (lost_TK.cumsum(-1) - 1).clamp_min(0)
            indices_TK = torch.where(lost_TK, spare_TK.gather(-1, nth_TK), indices_TK)
        return indices_TK

    def learn_load(self, share_E: Tensor) -> None:
        self.load_E.lerp_(share_E, 0.1)


def place(scores_TE: Tensor, capacity_E: Tensor, top_k: int, tries: int) -> Tensor:
    """Experts (T, K) such that expert e has at most `capacity_E[e]` tokens; E where a slot found no room.

    In round r every token that has fewer than K experts asks its r-th choice, which takes those with the highest scores.
    """
    num_tokens, num_experts = scores_TE.shape
    choice_TE = scores_TE.argsort(dim=-1, descending=True, stable=True)
    room_E = capacity_E.clone()
    placed_TK = torch.full((num_tokens, top_k), num_experts, device=scores_TE.device)
    count_T = torch.zeros(num_tokens, dtype=torch.long, device=scores_TE.device)
    position_T = torch.arange(num_tokens, device=scores_TE.device)
    for r in range(tries):
        expert_T = torch.where(count_T < top_k, choice_TE[:, r], num_experts)  # E: asks nobody
        score_T = scores_TE.gather(-1, choice_TE[:, r, None])[:, 0]
        by_score_T = score_T.argsort(descending=True, stable=True)
        order_T = by_score_T[expert_T[by_score_T].argsort(stable=True)]  # by expert, then by score
        asked_E = torch.bincount(expert_T, minlength=num_experts + 1)
        before_T = (asked_E.cumsum(0) - asked_E)[expert_T[order_T]]
        room_T = F.pad(room_E, (0, 1))[expert_T[order_T]]
        taken_T = torch.empty_like(order_T, dtype=torch.bool).scatter(0, order_T, position_T - before_T < room_T)
        placed_TK[position_T[taken_T], count_T[taken_T]] = expert_T[taken_T]
        room_E = room_E - torch.bincount(expert_T[taken_T], minlength=num_experts)
        count_T = count_T + taken_T
    return placed_TK


class ProgressiveRouter(Router):
    """Two stages: a linear router names candidates, a small network refines their scores and picks K of them.

    coarse_e = w_e x;  C candidates = top C of coarse;  refined_e = coarse_e + v_e silu(A x) for candidates. V starts at
    zero, so that a new router is the softmax router. Experts that are no candidates keep their coarse logit, for the
    losses, but cannot be chosen.
    """

    top_k_of = None

    def __init__(self, config: MoEPolicyConfig) -> None:
        super().__init__(config)
        self.num_candidates = config.router_candidates
        self.reduce = nn.Parameter(torch.empty(config.router_refine_size, config.hidden_size))
        self.refine = nn.Parameter(torch.empty(config.num_experts, config.router_refine_size))
        self._candidate_TE: Tensor | None = None  # from `logits` to `choose` of one pass

    def init_weights(self, std: float) -> None:
        super().init_weights(std)
        init.normal_(self.reduce, std=std)
        init.zeros_(self.refine)

    def logits(self, x_TD: Tensor) -> Tensor:
        coarse_TE = super().logits(x_TD)
        refinement_TE = F.linear(F.silu(F.linear(x_TD, self.reduce.float())), self.refine.float())
        candidates = coarse_TE.topk(self.num_candidates, dim=-1).indices
        self._candidate_TE = torch.zeros_like(coarse_TE, dtype=torch.bool).scatter(-1, candidates, True)
        return coarse_TE + refinement_TE * self._candidate_TE

    def choose(self, scores_TE: Tensor, keep_T: Tensor | None) -> Tensor:
        candidate_TE, self._candidate_TE = self._candidate_TE, None
        assert candidate_TE is not None
        return super().choose(scores_TE.masked_fill(~candidate_TE, -1.0), keep_T)


class GroupedRouter(Router):
    """Groups first (a granularity, a task, a domain), then experts inside the chosen groups.

    p(e) = p(g) p(e | g), both softmax; the token's best `groups_per_tok` groups are kept, and of their experts the K
    with the highest p(e). Group-limited choice as in DeepSeek-V2 (arXiv:2405.04434, 2.2.2), with a router of its own
    for the groups. The logit of an expert is its group's logit + log p(e | g), so that softmax(logits) = p(e).
    """

    top_k_of = None

    def __init__(self, config: MoEPolicyConfig) -> None:
        super().__init__(config)
        self.groups_per_tok = config.groups_per_tok
        assert config.expert_groups is not None
        self.sizes = list(config.expert_groups)
        self.group_weight = nn.Parameter(torch.empty(len(self.sizes), config.hidden_size))

    def init_weights(self, std: float) -> None:
        super().init_weights(std)
        init.normal_(self.group_weight, std=std)

    def logits(self, x_TD: Tensor) -> Tensor:
        group_TG = F.linear(x_TD, self.group_weight.float())
        inside = [part.log_softmax(-1) for part in super().logits(x_TD).split(self.sizes, dim=-1)]
        return torch.cat([group_TG[:, g, None] + part for g, part in enumerate(inside)], dim=-1)

    def choose(self, scores_TE: Tensor, keep_T: Tensor | None) -> Tensor:
        mass_TG = torch.stack([part.sum(-1) for part in scores_TE.split(self.sizes, dim=-1)], dim=-1)
        kept_TG = torch.zeros_like(mass_TG, dtype=torch.bool)
        kept_TG.scatter_(-1, mass_TG.topk(self.groups_per_tok, dim=-1).indices, True)
        sizes = torch.tensor(self.sizes, device=scores_TE.device)
        return super().choose(scores_TE.masked_fill(~kept_TG.repeat_interleave(sizes, dim=-1), -1.0), keep_T)


ROUTERS: dict[str, type[Router]] = {
    "softmax": Router,
    "sigmoid": SigmoidRouter,
    "capacity": CapacityRouter,
    "progressive": ProgressiveRouter,
    "grouped": GroupedRouter,
}


def register_router(name: str, router: type[Router]) -> None:
    """Lets `router=name` of a config mean this class, in this process: import its module before such a model is loaded.

    ValueError for a name that is taken by another class.
    """
    if ROUTERS.get(name, router) is not router:
        raise ValueError(f"router {name!r} is {ROUTERS[name].__name__} already; choose another name")
    ROUTERS[name] = router
    if name not in ROUTER_NAMES:
        ROUTER_NAMES.append(name)


def routers(model: nn.Module) -> list[Router]:
    """The routers of a model, first layer first."""
    return [module for module in model.modules() if isinstance(module, Router)]


def freeze_routers(model: nn.Module) -> int:
    """Takes the routers out of training; returns how many parameters that were."""
    frozen = [parameter for router in routers(model) for parameter in router.parameters()]
    for parameter in frozen:
        parameter.requires_grad_(False)
    return sum(parameter.numel() for parameter in frozen)


@contextmanager
def record_routes(model: nn.Module) -> Iterator[list[Tensor]]:
    """Inside, every forward pass leaves the experts it used in the list: int16 (T, K) a layer, of the last pass.

    A pass that gradient checkpointing repeats writes the same again, so that nothing is counted twice.
    """
    routes: list[Tensor] = []
    watched = routers(model)
    handles = []

    def note(_module: nn.Module, _args: Any, _out: Any) -> None:
        routes[:] = [router.recorded_TK for router in watched if router.recorded_TK is not None]

    for router in watched:
        router.records, router.recorded_TK = True, None
        handles.append(router.register_forward_hook(note))
    try:
        yield routes
    finally:
        for router, handle in zip(watched, handles, strict=True):
            router.records, router.recorded_TK = False, None
            handle.remove()


@contextmanager
def replay_routes(model: nn.Module, routes: Sequence[Tensor]) -> Iterator[None]:
    """Inside, tokens go to recorded experts (Rollout Routing Replay, arXiv:2510.11370).

    Weights and losses come from the live logits, so that routers still learn. Keep it open over the backward pass too
    when gradient checkpointing is on, which routes again there.

    Args:
        routes: one (T, K) tensor a layer with experts, over the same flat tokens; -1 leaves the choice to the router.
    """
    watched = routers(model)
    if len(routes) != len(watched):
        raise ValueError(f"{len(routes)} layers of routes for {len(watched)} layers with experts; record on this model")
    for router, route_TK in zip(watched, routes, strict=True):
        router.replay_TK = route_TK
    try:
        yield
    finally:
        for router in watched:
            router.replay_TK = None


class RouterBalance(TrainerCallback):
    """Lets routers learn from the load of each optimizer step, and aux losses see all its micro-batches and ranks."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        for router in routers(model):
            router.window_E = torch.zeros(router.num_experts, device=router.weight.device)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        for router in routers(model):
            router.end_step()

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        for router in routers(model):
            router.window_E = None
