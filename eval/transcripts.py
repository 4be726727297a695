"""Answers of a model to evaluation samples, scored: the rows that every comparison and report starts from."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from plumbline.eval.samples import Sample
from plumbline.policy_models.chat import encode_prompts, sample_answers
from plumbline.policy_models.logprobs import answer_logprobs, pack_rows, token_budget_batches
from plumbline.reward import CompositeReward


def transcribe(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
    *,
    reward: CompositeReward,
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> list[dict[str, Any]]:
    """One row a sample: what was asked, the answer as text and tokens, and its reward by part.

    The same seed gives each prompt the same random draws for every target, so that targets compare pairwise. `logp` is
    the log-probability of the answer as it was drawn, in nats; `total` is None where the reward has no opinion.
    """
    prompts = [[{"role": "user", "content": sample.input}] for sample in samples]
    answers, texts = sample_answers(
        model,
        tokenizer,
        encode_prompts(tokenizer, prompts),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        generator=torch.Generator(model.device).manual_seed(seed),
    )
    scored = reward([sample.input for sample in samples], texts)
    rows = []
    for at, (sample, answer, text) in enumerate(zip(samples, answers, texts, strict=True)):
        rows.append(
            {
                "id": sample.id,
                "prompt": sample.input,
                "kind": sample.kind,
                "category": sample.category,
                "pair": sample.pair,
                "answer": text,
                "answer_ids": answer.ids,
                "answer_tokens": len(answer.ids),
                "finished": answer.finished,
                "logp": sum(answer.logp),
                "total": scored.total[at],
                "raw": {name: part[at] for name, part in scored.parts.raw.items()},
                "scaled": {name: part[at] for name, part in scored.parts.scaled.items()},
                "weighted": {name: part[at] for name, part in scored.parts.weighted.items()},
            }
        )
    return rows


@torch.inference_mode()
def add_kl(
    rows: Sequence[dict[str, Any]],
    start: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    temperature: float,
    tokens_per_batch: int = 4096,
) -> None:
    """Sets `kl` of each row: log-probability of its answer as drawn less that under `start`, in nats per answer.

    Its mean over answers estimates KL(target || start); a single one may be negative.
    """
    prompts = [[{"role": "user", "content": row["prompt"]}] for row in rows]
    prompt_ids = encode_prompts(tokenizer, prompts)
    width = max(len(row["answer_ids"]) for row in rows)
    answer_ids = torch.full((len(rows), width), tokenizer.pad_token_id, device=start.device)
    keep = torch.zeros(len(rows), width, dtype=torch.bool, device=start.device)
    for at, row in enumerate(rows):
        answer_ids[at, : len(row["answer_ids"])] = torch.tensor(row["answer_ids"], device=start.device)
        keep[at, : len(row["answer_ids"])] = True
    lengths = [len(ids) for ids in prompt_ids], keep.sum(dim=1).tolist()
    for group in token_budget_batches(*lengths, tokens_per_batch):
        packed = pack_rows(prompt_ids, answer_ids, keep, group, tokenizer.pad_token_id)
        logp_BR, _ = answer_logprobs(start, packed, temperature=temperature)
        for at, logp in zip(group, logp_BR.sum(dim=1).tolist(), strict=True):
            rows[at]["kl"] = rows[at]["logp"] - logp
