"""The rollout engine: answers to many prompts at once, with the log-probability of every token drawn.

Prompts are sorted by length and run in batches; rows that have finished leave the batch. Sampling is from the whole
softmax at one temperature, so that a log-probability of the policy is the log-probability of the sample.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

_LEAVE_SHARE = 0.25  # finished rows leave once they are this share of the batch: each time costs a copy of the cache


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One sampled answer.

    ids        its tokens, up to and including the stop token if there was one
    logp       natural log-probability of each, under the sampling temperature (at temperature 0: under temperature 1)
    finished   True when a stop token ended it, False when it ran into the limit
    """

    ids: list[int]
    logp: list[float]
    finished: bool


def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    pad_id: int,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    batch_size: int = 64,
) -> list[Answer]:
    """Samples one answer a prompt; temperature 0 takes the likeliest token. Answers come in the order of the prompts.

    Raises ValueError for an empty prompt, no stop ids, or a temperature below 0.
    """
    if not stop_ids:
        raise ValueError("stop_ids is empty: give the ids that end an answer, such as the tokenizer's eos_token_id")
    if temperature < 0:
        raise ValueError(f"temperature={temperature}: must be at least 0 (0 takes the likeliest token)")
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {row} has no tokens; apply the chat template first, or drop it")
    answers: list[Answer | None] = [None] * len(prompts)
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for rows in _batches_by_length(prompts, batch_size):
                batch = _generate_batch(
                    model, [prompts[r] for r in rows], max_new_tokens, set(stop_ids), pad_id, temperature, generator
                )
                for row, answer in zip(rows, batch, strict=True):
                    answers[row] = answer
    finally:
        model.train(was_training)
    return [answer for answer in answers if answer is not None]


def _batches_by_length(prompts: Sequence[Sequence[int]], batch_size: int) -> Iterator[list[int]]:
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def _generate_batch(
    model: PreTrainedModel,
    prompts: list[Sequence[int]],
    max_new_tokens: int,
    stop_ids: set[int],
    pad_id: int,
    temperature: float,
    generator: torch.Generator | None,
) -> list[Answer]:
    device = model.device
    width = max(len(prompt) for prompt in prompts)
    ids_BP = torch.full((len(prompts), width), pad_id, device=device)
    keep_BP = torch.zeros_like(ids_BP)
    for row, prompt in enumerate(prompts):
        ids_BP[row, width - len(prompt) :] = torch.tensor(list(prompt), device=device)
        keep_BP[row, width - len(prompt) :] = 1
    stop = torch.tensor(sorted(stop_ids), device=device)

    active_B = torch.arange(len(prompts), device=device)  # which prompt each row of the batch belongs to
    done_B = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    tokens: list[list[int]] = [[] for _ in prompts]
    logps: list[list[float]] = [[] for _ in prompts]
    finished = [False] * len(prompts)
    cache = DynamicCache(config=model.config)
    next_ids, position = ids_BP, (keep_BP.cumsum(1) - keep_BP)

    for _ in range(max_new_tokens):
        logits_BV = model(
            input_ids=next_ids,
            attention_mask=keep_BP,
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        token_B, logp_B = sample(logits_BV, temperature, generator)
        ended_B = torch.isin(token_B, stop)
        for row, token, logp, done, ended in zip(
            active_B.tolist(), token_B.tolist(), logp_B.tolist(), done_B.tolist(), ended_B.tolist(), strict=True
        ):
            if not done:
                tokens[row].append(token)
                logps[row].append(logp)
                finished[row] = ended
        done_B = done_B | ended_B
        if done_B.all():
            break
        position = position[:, -1:] + 1
        keep_BP = torch.cat([keep_BP, torch.ones_like(keep_BP[:, :1])], dim=1)
        if done_B.float().mean() >= _LEAVE_SHARE:
            stay = (~done_B).nonzero()[:, 0]
            cache.batch_select_indices(stay)
            active_B, token_B, position, keep_BP = active_B[stay], token_B[stay], position[stay], keep_BP[stay]
            done_B = done_B[stay]
        next_ids = token_B[:, None]
    return [
        Answer(ids=ids, logp=logp, finished=end) for ids, logp, end in zip(tokens, logps, finished, strict=True)
    ]


def sample(logits_BV: Tensor, temperature: float, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """One token a row from softmax(logits / temperature) by inverting its cumulative sum, and its log-probability.

    One uniform number a row instead of one a word, which is what `torch.multinomial` draws: a fifth of a decode step at
    a vocabulary of 49,152. Both outputs have shape (B,).
    """
    logp_BV = (logits_BV.float() / (temperature or 1.0)).log_softmax(dim=-1)
    if temperature == 0:
        logp_B, token_B = logp_BV.max(dim=-1)
        return token_B, logp_B
    cumulative_BV = logp_BV.exp().cumsum(dim=-1)
    uniform_B1 = torch.rand(len(logits_BV), 1, generator=generator, device=logits_BV.device)
    # scaled by the last entry, which rounding leaves a little off 1, and clamped: the draw is always a word
    target_B1 = uniform_B1 * cumulative_BV[:, -1:]
    token_B = torch.searchsorted(cumulative_BV, target_B1, right=True).clamp(max=logits_BV.shape[-1] - 1)[:, 0]
    return token_B, logp_BV.gather(-1, token_B[:, None])[:, 0]
