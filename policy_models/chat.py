"""Conversations in, answers out: chat template, stop tokens, decoding to text around the rollout engine."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from plumbline.policy_models.rollout.generation import Answer, generate

Messages = list[dict[str, str]]


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Messages]) -> list[list[int]]:
    """Chat template with the turn of the assistant opened, one list of ids a prompt."""
    encoded: Any = tokenizer.apply_chat_template(list(prompts), add_generation_prompt=True, return_dict=True)
    return [list(ids) for ids in encoded["input_ids"]]


def sample_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    generator: torch.Generator | None,
    batch_size: int = 64,
) -> tuple[list[Answer], list[str]]:
    """Answers as tokens and as text (special tokens left out)."""
    answers = generate(
        model,
        prompt_ids,
        max_new_tokens=max_new_tokens,
        stop_ids=stop_ids(model, tokenizer),
        pad_id=tokenizer.pad_token_id,
        temperature=temperature,
        generator=generator,
        batch_size=batch_size,
    )
    return answers, tokenizer.batch_decode([a.ids for a in answers], skip_special_tokens=True)


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every id that ends an answer: the generation settings' and the tokenizer's."""
    ends = model.generation_config.eos_token_id if model.generation_config else None
    ids = {ends} if isinstance(ends, int) else set(ends or [])
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    if not ids:
        raise ValueError("neither generation_config nor the tokenizer has an eos token: answers could never end")
    return sorted(ids)
