"""Log-probabilities of answers: the forward that training, the reference, the critic and evaluation share.

Layout: prompts left-padded, answers right-padded, one sequence [prompt, answer]; positions are the exclusive cumulative
sum of the kept tokens, so padding never shifts them. Masks come from lengths, never from comparing ids with the pad id.

B answers, P prompt positions, R answer positions, V vocabulary, D width, N = rows of a flat batch. Everything after the
logits is fp32.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from plumbline.policy_models.experts import gemm_dtype
from plumbline.policy_models.kernels import kernels_serve
from plumbline.policy_models.rollout.trunk import upper_layers

_CHUNK_ROWS = 256  # rows of fp32 logits held at a time: 50 MB at a vocabulary of 49,152
_CHUNK_LOGITS_CPU = 2**18  # and on a CPU: they stay in its cache between the passes


class _TokenLogprobs(torch.autograd.Function):
    """log-softmax at one id a row and the entropy of the row, without an fp32 copy of all logits.

    The backward recomputes each chunk from the logits as they came: d logp_n / d z = (1_id - p) / T. The entropy is for
    logging only and passes no gradient.
    """

    @staticmethod
    def forward(ctx, logits_NV: Tensor, ids_N: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        logp, entropy, lse = [], [], []
        rows = _chunk_rows(logits_NV)
        for z_NV, id_N in zip(logits_NV.split(rows), ids_N.split(rows), strict=True):
            z_NV = z_NV.to(torch.float32, copy=True)
            if temperature != 1:
                z_NV /= temperature
            top_N1 = z_NV.amax(dim=-1, keepdim=True)
            z_NV -= top_N1
            logp_N = z_NV.gather(-1, id_N[:, None])[:, 0]
            weight_NV = z_NV.exp()
            total_N = weight_NV.sum(dim=-1)
            entropy.append(total_N.log() - weight_NV.mul_(z_NV).sum(dim=-1) / total_N)
            logp.append(logp_N - total_N.log())
            lse.append(total_N.log() + top_N1[:, 0])
        empty = logits_NV.new_zeros(0, dtype=torch.float32)
        lse_N = torch.cat(lse) if lse else empty
        ctx.save_for_backward(logits_NV, ids_N, lse_N)
        ctx.temperature = temperature
        entropy_N = torch.cat(entropy) if entropy else empty
        ctx.mark_non_differentiable(entropy_N)
        return (torch.cat(logp) if logp else empty), entropy_N

    @staticmethod
    def backward(ctx, grad_N: Tensor, _entropy_grad: Tensor):
        logits_NV, ids_N, lse_N = ctx.saved_tensors
        grad_NV = torch.empty_like(logits_NV)
        step = _chunk_rows(logits_NV)
        for start in range(0, len(ids_N), step):
            rows = slice(start, start + step)
            p_NV = logits_NV[rows].to(torch.float32, copy=True)
            if ctx.temperature != 1:
                p_NV /= ctx.temperature
            p_NV.sub_(lse_N[rows, None]).exp_()
            g_N1 = (grad_N[rows] / ctx.temperature)[:, None]
            p_NV.mul_(-g_N1).scatter_add_(-1, ids_N[rows, None], g_N1)
            grad_NV[rows] = p_NV.to(grad_NV.dtype)
        return grad_NV, None, None


def _chunk_rows(logits_NV: Tensor) -> int:
    return _CHUNK_ROWS if logits_NV.is_cuda else max(1, _CHUNK_LOGITS_CPU // logits_NV.shape[1])


def token_logprobs(logits_NV: Tensor, ids_N: Tensor, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """(log-probability of each id, entropy of each row), fp32, of softmax(logits / temperature). Both have shape (N,).

    Gradients flow to the logits through the log-probabilities only.
    """
    return _TokenLogprobs.apply(logits_NV, ids_N, temperature)


def token_budget_batches(
    prompt_lengths: Sequence[int], answer_lengths: Sequence[int], budget: int
) -> Iterator[list[int]]:
    """Row indices in groups of like length, each at most `budget` tokens as packed, padding included.

    A group is as wide as its longest prompt and its longest answer together; a row above the budget goes alone.
    """
    batch: list[int] = []
    prompt_width = answer_width = 0
    for row in sorted(range(len(prompt_lengths)), key=lambda r: prompt_lengths[r] + answer_lengths[r]):
        wider_prompt = max(prompt_width, prompt_lengths[row])
        wider_answer = max(answer_width, answer_lengths[row])
        if batch and (len(batch) + 1) * (wider_prompt + wider_answer) > budget:
            yield batch
            batch = []
            wider_prompt, wider_answer = prompt_lengths[row], answer_lengths[row]
        batch.append(row)
        prompt_width, answer_width = wider_prompt, wider_answer
    if batch:
        yield batch


@dataclass(frozen=True, kw_only=True)
class PackedRows:
    """Some rows as one padded input. `keep` and `answer_ids` are cut to the longest answer among them, R here."""

    input_ids: Tensor  # (B, P + R)
    attention_mask: Tensor  # (B, P + R)
    position_ids: Tensor  # (B, P + R)
    answer_ids: Tensor  # (B, R)
    keep: Tensor  # (B, R)
    trunk: Tensor | None = None  # (B, P + R, D) states after the first `trunk_layers` layers, in place of the ids
    trunk_layers: int = 0

    def inputs(self) -> dict[str, Tensor]:
        """Keyword arguments of a forward."""
        ids = {"input_ids": self.input_ids} if self.trunk is None else {"inputs_embeds": self.trunk}
        return ids | {"attention_mask": self.attention_mask, "position_ids": self.position_ids}

    def predicts(self) -> Tensor:
        """(B, P + R) True at the positions whose logits predict a kept answer token: one before it."""
        R = self.keep.shape[1]
        mask = torch.zeros_like(self.attention_mask, dtype=torch.bool)
        mask[:, -R - 1 : -1] = self.keep
        return mask


@dataclass(frozen=True, kw_only=True)
class Trunk:
    """States of each row's tokens after the first `num_layers` layers: (prompt + answer tokens, D), no padding."""

    states: list[Tensor]
    num_layers: int


def pack_rows(
    prompt_ids: Sequence[Sequence[int]],
    answer_ids: Tensor,
    keep: Tensor,
    rows: Sequence[int],
    pad_id: int,
    trunk: "Trunk | None" = None,
) -> PackedRows:
    """[left-padded prompt, right-padded answer] for the given rows, no wider than they need."""
    device = answer_ids.device
    keep_BR = keep[list(rows)]
    width = max(int(keep_BR.sum(dim=1).max()), 1)
    keep_BR, answer_BR = keep_BR[:, :width], answer_ids[list(rows)][:, :width]
    prompt_width = max(len(prompt_ids[row]) for row in rows)
    prompt_BP = torch.full((len(rows), prompt_width), pad_id, device=device)
    prompt_keep_BP = torch.zeros_like(prompt_BP)
    for at, row in enumerate(rows):
        ids = torch.tensor(list(prompt_ids[row]), device=device)
        prompt_BP[at, prompt_width - len(ids) :] = ids
        prompt_keep_BP[at, prompt_width - len(ids) :] = 1
    mask = torch.cat([prompt_keep_BP, keep_BR.long()], dim=1)
    states = None
    if trunk is not None:
        states = trunk.states[0].new_zeros(*mask.shape, trunk.states[0].shape[-1])
        for at, row in enumerate(rows):
            start = prompt_width - len(prompt_ids[row])
            part = trunk.states[row][: mask.shape[1] - start]
            states[at, start : start + len(part)] = part
    return PackedRows(
        input_ids=torch.cat([prompt_BP, answer_BR.masked_fill(~keep_BR, pad_id)], dim=1),
        attention_mask=mask,
        position_ids=mask.cumsum(dim=1) - mask,
        answer_ids=answer_BR,
        keep=keep_BR,
        trunk=states,
        trunk_layers=0 if trunk is None else trunk.num_layers,
    )


def answer_logprobs(
    model: PreTrainedModel, packed: PackedRows, *, temperature: float, states_out: list[Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """(log-probabilities, entropies) of the answer tokens, both (B, R) fp32 and 0 where not kept.

    The LM head runs on the positions that predict a kept token and on no other: position t is read from the logits at
    t - 1. With `states_out`, the final hidden states at those positions, (B, R, D) fp32, are appended to it: what a
    value head reads, at no extra cost.

    Where the model runs on our kernels, log-probabilities come straight from the hidden states and no logits exist.
    """
    if _fused(model):
        return _fused_logprobs(model, packed, temperature, states_out)
    hook = None
    if states_out is not None:
        hook = model.get_output_embeddings().register_forward_pre_hook(
            lambda _head, inputs: states_out.append(_scatter(inputs[0].float(), packed.keep))
        )
    try:
        # a bool mask, not "the last R + 1": a slice of the states is not contiguous, and on the CPU a linear layer of a
        # non-contiguous 3-D input copies its whole weight once a row (3.7 s instead of 0.13 s for 480 positions)
        with upper_layers(model, packed.trunk_layers):
            logits_NV = model(**packed.inputs(), logits_to_keep=packed.predicts(), use_cache=False).logits
    finally:
        if hook is not None:
            hook.remove()
    logp_N, entropy_N = token_logprobs(logits_NV, packed.answer_ids[packed.keep], temperature=temperature)
    return _scatter(logp_N, packed.keep), _scatter(entropy_N, packed.keep)


def _fused(model: PreTrainedModel) -> bool:
    head = model.get_output_embeddings()
    plain = type(head) is nn.Linear and head.bias is None and not head._forward_hooks
    return plain and kernels_serve(model.config, model.device.type)


def _fused_logprobs(
    model: PreTrainedModel, packed: PackedRows, temperature: float, states_out: list[Tensor] | None
) -> tuple[Tensor, Tensor]:
    from plumbline.policy_models.kernels.logprob import linear_logprob

    with upper_layers(model, packed.trunk_layers):
        states = model.base_model(**packed.inputs(), use_cache=False).last_hidden_state
    states_ND, weight_VD = states[packed.predicts()], model.get_output_embeddings().weight
    if states_out is not None:
        states_out.append(_scatter(states_ND.float(), packed.keep))
    dtype = gemm_dtype(weight_VD)
    logp_N, entropy_N = linear_logprob(
        states_ND.to(dtype), weight_VD.to(dtype), packed.answer_ids[packed.keep], temperature=temperature
    )
    return _scatter(logp_N, packed.keep), _scatter(entropy_N.detach(), packed.keep)


def answer_states(model: PreTrainedModel, packed: PackedRows) -> Tensor:
    """Final hidden states at the positions that predict a kept token, (B, R, D) fp32, 0 where not kept."""
    with upper_layers(model, packed.trunk_layers):
        states = model.base_model(**packed.inputs(), use_cache=False).last_hidden_state
    return _scatter(states[packed.predicts()].float(), packed.keep)


def _scatter(flat_N: Tensor, keep_BR: Tensor) -> Tensor:
    """Rows of a flat batch back to (B, R, ...), 0 where not kept; differentiable."""
    out = flat_N.new_zeros(*keep_BR.shape, *flat_N.shape[1:])
    return out.index_put((keep_BR.nonzero(as_tuple=True)), flat_N)
