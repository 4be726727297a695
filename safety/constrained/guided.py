"""Two distributions of one model: SafeDecoding with a safety expert, and contrast with the reference.

Both ask for a second set of logits from the same weights under other adapters, so neither needs a second model in memory.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from plumbline.policy_models.rollout.generation import DecodeRow
from plumbline.policy_models.rollout.joining import only_adapter


class OtherAdapter:
    """Next-token logits of a PEFT model with another adapter switched on, or with none.

    A cache follows the rows: one token a row costs one token, and whenever other rows come in, all of them are read anew.

    Args:
        adapter: name of a loaded adapter; None switches all of them off, which is the reference of a policy under LoRA.
    """

    def __init__(self, model: Any, adapter: str | None, pad_id: int) -> None:
        known = sorted(getattr(model, "peft_config", {}))
        if adapter is not None and adapter not in known:
            raise ValueError(f"the model has no adapter {adapter!r}, only {known}; load it with model.load_adapter")
        if not known:
            raise ValueError("the model has no adapters: both distributions would be the same; load a PEFT model")
        self.model, self.adapter, self.pad_id = model, adapter, pad_id
        self._rows: dict[int, list[int]] = {}  # row -> prompt and answer in the cache, in the order of the cache
        self._cache: DynamicCache | None = None
        self._keep_BS = torch.empty(0)

    @torch.inference_mode()
    def logits(self, rows: Sequence[DecodeRow]) -> Tensor:
        """(B, V) for what follows prompt and answer of each row."""
        texts = {row.row: [*row.prompt, *row.answer] for row in rows}
        with only_adapter(self.model, self.adapter):
            if self._cache is not None and all(texts[r][:-1] == self._rows.get(r) for r in texts):
                return self._step(texts)
            return self._read(texts)

    def _read(self, texts: dict[int, list[int]]) -> Tensor:
        device = self.model.device
        width = max(map(len, texts.values()))
        ids_BS = torch.full((len(texts), width), self.pad_id, device=device)
        keep_BS = torch.zeros_like(ids_BS)
        for at, ids in enumerate(texts.values()):
            ids_BS[at, width - len(ids) :] = torch.tensor(ids, device=device)
            keep_BS[at, width - len(ids) :] = 1
        self._cache = DynamicCache(config=self.model.config)
        return self._forward(texts, ids_BS, keep_BS, (keep_BS.cumsum(1) - 1).clamp(min=0))

    def _step(self, texts: dict[int, list[int]]) -> Tensor:
        assert self._cache is not None
        order = list(self._rows)
        if list(texts) != order:
            stay = torch.tensor([order.index(row) for row in texts], device=self._keep_BS.device)
            self._cache.batch_select_indices(stay)
            self._keep_BS = self._keep_BS[stay]
        ids_B1 = torch.tensor([[ids[-1]] for ids in texts.values()], device=self.model.device)
        keep_BS = torch.cat([self._keep_BS, torch.ones_like(ids_B1)], dim=1)
        return self._forward(texts, ids_B1, keep_BS, keep_BS.sum(1, keepdim=True) - 1)

    def _forward(self, texts: dict[int, list[int]], ids: Tensor, keep_BS: Tensor, position: Tensor) -> Tensor:
        self._rows, self._keep_BS = texts, keep_BS
        out = self.model(
            input_ids=ids,
            attention_mask=keep_BS,
            position_ids=position,
            past_key_values=self._cache,
            use_cache=True,
            # An index, not 1: of the slice (B, 1, D) that 1 leaves, torch copies the head's weights once a row.
            logits_to_keep=torch.tensor([-1], device=ids.device),
        )
        return out.logits[:, -1]


class SafeDecoding:
    """Leans the first tokens towards a safety expert (Xu et al. 2024, arXiv:2402.08983).

    What an answer opens with decides most of what follows, so the expert is asked for the first tokens only. It is a small
    adapter that `plumbline.align.safety_expert` trains. Only tokens that the base ranks high too are taken: an expert that declines in
    words which the base would never open with changes nothing, or for the worse.

    Args:
        alpha: how far to go from the base (0) to the expert (1) and beyond; the paper takes 3.
        first_tokens: of each answer, as many as a decline takes to be one; the paper takes 2, "I'm sorry," is 4.
        common: tokens to choose from: those that both rank highest.

    `divergence` holds, by row, KL(expert || base) in nats for each of these tokens: where the expert wants to refuse and the
    base does not, it is high, a signal of risk for free. It is of the last call of `generate` that began the row.
    """

    def __init__(self, expert: OtherAdapter, *, alpha: float = 3.0, first_tokens: int = 4, common: int = 5) -> None:
        if alpha < 0 or first_tokens < 1 or common < 1:
            raise ValueError(f"{alpha=} must be at least 0, {first_tokens=} and {common=} at least 1")
        self.expert, self.alpha, self.first_tokens, self.common = expert, alpha, first_tokens, common
        self.divergence: defaultdict[int, list[float]] = defaultdict(list)

    def __call__(self, rows: Sequence[DecodeRow], logits_BV: Tensor) -> Tensor:
        at = [place for place, row in enumerate(rows) if len(row.answer) < self.first_tokens]
        if not at or self.alpha == 0:
            return logits_BV
        base_BV = logits_BV[at].float()
        expert_BV = self.expert.logits([rows[place] for place in at]).float()
        kl_B = kl_divergence(expert_BV, base_BV).tolist()
        for place, kl in zip(at, kl_B, strict=True):
            row = rows[place]
            self.divergence[row.row] = [*self.divergence[row.row][: len(row.answer)], kl]
        mixed_BV = safe_mixture(base_BV, expert_BV, alpha=self.alpha, common=self.common)
        return logits_BV.index_copy(0, torch.tensor(at, device=logits_BV.device), mixed_BV.to(logits_BV.dtype))


def safe_mixture(base_BV: Tensor, expert_BV: Tensor, *, alpha: float, common: int) -> Tensor:
    """log of max(0, p + alpha * (p_expert - p)) over the `common` tokens that both rank highest, -inf elsewhere.

    A row where nothing is left (all of them far likelier in the base) takes the expert over the same tokens. Tokens that
    the base forbids stay forbidden.
    """
    expert_BV = expert_BV.masked_fill(base_BV == -math.inf, -math.inf)
    worst_rank_BV = torch.maximum(_ranks(base_BV), _ranks(expert_BV))
    last_B1 = worst_rank_BV.topk(min(common, base_BV.shape[1]), largest=False).values[:, -1:]
    base_p, expert_p = base_BV.softmax(-1), expert_BV.softmax(-1)
    mixed = (base_p + alpha * (expert_p - base_p)).clamp(min=0) * (worst_rank_BV <= last_B1)
    empty_B1 = mixed.sum(-1, keepdim=True) <= 0
    return torch.where(empty_B1, expert_p * (worst_rank_BV <= last_B1), mixed).log()


def _ranks(logits_BV: Tensor) -> Tensor:
    """0 for the likeliest token of a row."""
    order_BV = logits_BV.argsort(dim=-1, descending=True, stable=True)
    return torch.empty_like(order_BV).scatter_(
        1, order_BV, torch.arange(logits_BV.shape[1], device=logits_BV.device).expand_as(order_BV)
    )


class ReferenceContrast:
    """Decoding-time realignment (Liu et al. 2024, arXiv:2402.02992): p ~ p_ref * (p / p_ref) ** dial.

    Args:
        reference: the same model with its adapters off (or another adapter).
        dial: 0 the reference, 1 the model as it is (nothing is computed then), above 1 further than it was trained to go.
    """

    def __init__(self, reference: OtherAdapter, *, dial: float) -> None:
        if not math.isfinite(dial) or dial < 0:
            raise ValueError(f"{dial=} must be a finite number of at least 0")
        self.reference, self.dial = reference, dial

    def __call__(self, rows: Sequence[DecodeRow], logits_BV: Tensor) -> Tensor:
        if self.dial == 1:
            return logits_BV
        ref_BV = self.reference.logits(rows).float().log_softmax(-1)
        logp_BV = logits_BV.float().log_softmax(-1)
        mixed_BV = ref_BV + self.dial * (logp_BV - ref_BV)
        return mixed_BV.masked_fill(logits_BV == -math.inf, -math.inf).to(logits_BV.dtype)


def kl_divergence(p_logits_BV: Tensor, q_logits_BV: Tensor) -> Tensor:
    """KL(p || q) in nats, (B,), over the tokens that q allows."""
    allowed = q_logits_BV != -math.inf
    p_BV = p_logits_BV.masked_fill(~allowed, -math.inf).log_softmax(-1)
    gap_BV = torch.where(allowed, p_BV - q_logits_BV.log_softmax(-1), 0.0)
    return (p_BV.exp() * gap_BV).sum(-1)
