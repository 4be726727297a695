"""Prompts to answers, and answers to the tensors that a PPO update reads.

B answers, P prompt positions, R answer positions, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from plumbline.align.data.rows import Messages, last_user_text
from plumbline.policy_models.chat import TemplateRefusalError, encode, takes_system
from plumbline.policy_models.logprobs import Trunk, token_budget_batches


@dataclass(frozen=True, kw_only=True)
class RolloutBatch:
    """One rollout, in the order in which prompts were drawn. Tensors are on the training device.

    prompt_ids   B lists of token ids, chat template applied, no padding
    answer_ids   (B, R) right-padded; the stop token, where there is one, is the last kept
    keep         (B, R) True on answer tokens, the stop token included
    old_logp     (B, R) log-probability under the policy that drew the tokens, by the training forward unless asked else
    ref_logp     (B, R) the same under the reference
    old_value    (B, R) the critic's value before each token; (B, R, 2), of rewards and of costs, under a constraint
    sample_logp  (B, R) as the rollout engine computed it while drawing; for the mismatch metric only
    ref_states   (B, R, D) the reference's hidden states before each token, if the critic is a head on them
    trunk        states below the first adapter, where there is such a layer
    prompts      last user turn, text;  answers  text without the stop token
    finished     (B,) True where a stop token ended the answer
    """

    prompt_ids: list[list[int]]
    answer_ids: Tensor
    keep: Tensor
    old_logp: Tensor
    ref_logp: Tensor
    old_value: Tensor
    sample_logp: Tensor
    ref_states: Tensor | None
    prompts: list[str]
    answers: list[str]
    finished: Tensor
    trunk: Trunk | None = None

    def __len__(self) -> int:
        return len(self.prompt_ids)

    def answer_lengths(self) -> list[int]:
        """Kept tokens of each answer."""
        return self.keep.sum(dim=1).tolist()


def drop_long_prompts(
    prompts: list[Messages], ids: list[list[int]], limit: int, *, what: str = "rollouts"
) -> tuple[list[Messages], list[list[int]]]:
    """Leaves out prompts of more than `limit` tokens (never cut: a cut prompt asks something else), and says how many."""
    kept = [(p, i) for p, i in zip(prompts, ids, strict=True) if len(i) <= limit]
    lengths = [len(i) for i in ids]
    if not kept:
        raise ValueError(
            f"max_prompt_tokens={limit}: all {len(prompts)} prompts are longer; raise the limit: the shortest has "
            f"{min(lengths)} tokens, {max(lengths)} would keep all"
        )
    if len(kept) < len(prompts):
        print(
            f"{what}: {len(prompts) - len(kept)} of {len(prompts)} prompts are longer than max_prompt_tokens={limit} "
            f"tokens: left out; {max(lengths)} would keep all"
        )
    return [p for p, _ in kept], [i for _, i in kept]


def encode_fitting(
    tokenizer: PreTrainedTokenizerBase, prompts: list[Messages], limit: int, *, what: str
) -> tuple[list[Messages], list[list[int]]]:
    """(prompts, their ids) of those that the chat template takes and that have at most `limit` tokens; says what is left out.

    ValueError when none is left.
    """
    taken, ids, refusal = [], [], ""
    for prompt in prompts:
        try:
            ids.append(encode(tokenizer, prompt, open_turn=True))
            taken.append(prompt)
        except TemplateRefusalError as error:
            refusal = refusal or str(error)
    if not taken:
        raise ValueError(f"none of {len(prompts)} prompts is taken: {refusal}")
    if refusal:
        print(f"{what}: {len(prompts) - len(taken)} of {len(prompts)} prompts are left out: {refusal}")
    folded = sum(prompt[0]["role"] == "system" for prompt in taken)
    if folded and not takes_system(tokenizer):
        print(
            f"{what}: the chat template takes no system role: in {folded} prompts its text opens the user's first turn"
        )
    return drop_long_prompts(taken, ids, limit, what=what)


def pad_answers(rows: Sequence[Sequence[float]], *, fill: float, dtype: torch.dtype) -> Tensor:
    """Right-pads rows to the longest (at least one column). Shape (B, R)."""
    width = max([len(row) for row in rows] + [1])
    padded = torch.full((len(rows), width), fill, dtype=dtype)
    for row, values in enumerate(rows):
        padded[row, : len(values)] = torch.tensor(values, dtype=dtype)
    return padded


def texts_of(prompts: Sequence[Messages]) -> list[str]:
    """The last user turn of each prompt, which is what reports show; rewards are given the whole prompts."""
    return [last_user_text(prompt) for prompt in prompts]


def micro_batches(
    prompt_ids: Sequence[Sequence[int]], keep: Tensor, rows: Sequence[int], budget: int
) -> Iterator[list[int]]:
    """Groups of the given rows whose packed form holds at most `budget` tokens."""
    prompt_lengths = [len(prompt_ids[row]) for row in rows]
    for group in token_budget_batches(prompt_lengths, keep[list(rows)].sum(dim=1).tolist(), budget):
        yield [rows[at] for at in group]
