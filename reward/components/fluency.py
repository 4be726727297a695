"""How well formed an answer is, under a small language model that is not being trained.

    fluency = min(mean log-probability of the answer's tokens, CEILING) - repetition - degenerate

in nats a token. The answer stands after a fixed neutral turn, never after its own prompt: conditioned on the prompt, the score would
measure relevance a second time.

What the terms are for. A language model finds bland, predictable text likeliest of all, so nothing is paid above
CEILING, the value of ordinary good answers. It also finds repetition likely once it has begun, hence the
repetition charge: the share of token 3-grams seen before in the answer. `degenerate` charges for text without letters or
digits and for long runs of one token. The charges count tokens and Unicode classes, so they need no word list.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NEUTRAL_TURN = "Please write something."
CEILING = -2.6  # nats a token: the median of the chosen answers in data/starter under SmolLM2-135M-Instruct
FLOOR = -10.0  # about log(1 / vocabulary): random tokens
REPETITION_WEIGHT = 8.0
REPETITION_FREE = 0.05  # share of repeated 3-grams that ordinary text has
DEGENERATE_WEIGHT = 6.0
WORDLIKE_FREE = 0.3


class Fluency:
    """Scores in about [-24, CEILING], ordinary answers within 1 of CEILING. A blank answer gets FLOOR.

    Args:
        model, tokenizer: a causal language model, used in evaluation mode and never changed.
        ceiling: nats a token above which nothing is gained; fit it again for another model (`typical_logp`).
        token_budget: padded tokens a forward pass.
    """

    min_std = 0.25

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        ceiling: float = CEILING,
        token_budget: int = 4096,
        name: str = "fluency",
    ) -> None:
        self.name, self.ceiling, self.token_budget = name, ceiling, token_budget
        self.model, self.tokenizer = model.eval(), tokenizer
        self._prefix = _prefix_ids(tokenizer)

    @classmethod
    def load(cls, source: str = "bundled:smollm2-135m-instruct", *, dtype: torch.dtype = torch.bfloat16) -> Fluency:
        """From any source that `policy_models.loading.load_policy` takes."""
        from policy_models.loading import load_policy, load_tokenizer

        return cls(load_policy(source, dtype=dtype), load_tokenizer(source))

    def __call__(self, prompts: Sequence[str], answers: Sequence[str]) -> list[float | None]:
        ids = self._ids(answers)
        scores: list[float | None] = []
        for answer, tokens, logp in zip(answers, ids, self._mean_logp(ids), strict=True):
            if not answer.strip():
                scores.append(FLOOR)
                continue
            charge = repetition_charge(tokens) + degenerate_charge(answer, tokens)
            scores.append(min(max(logp, FLOOR), self.ceiling) - charge)
        return scores

    def typical_logp(self, answers: Sequence[str]) -> float:
        """Median of the mean log-probability of the given answers: the ceiling for this model, if they are good ones."""
        values = sorted(self._mean_logp(self._ids([answer for answer in answers if answer.strip()])))
        if not values:
            raise ValueError("no answer that is not blank; the ceiling needs a hundred good answers or more")
        return values[len(values) // 2]

    def _ids(self, answers: Sequence[str]) -> list[list[int]]:
        if not answers:
            return []
        return self.tokenizer(list(answers), add_special_tokens=False)["input_ids"]

    @torch.inference_mode()
    def _mean_logp(self, ids: Sequence[Sequence[int]]) -> list[float]:
        """Mean log-probability of each row's tokens after the neutral turn; 0 for an empty row."""
        from policy_models.logprobs import answer_logprobs, pack_rows, token_budget_batches

        means = [0.0] * len(ids)
        width = max((len(row) for row in ids), default=0)
        if width == 0:
            return means
        device = next(self.model.parameters()).device
        answer_ids = torch.zeros(len(ids), width, dtype=torch.long, device=device)
        keep = torch.zeros(len(ids), width, dtype=torch.bool, device=device)
        for row, tokens in enumerate(ids):
            answer_ids[row, : len(tokens)] = torch.tensor(list(tokens), dtype=torch.long)
            keep[row, : len(tokens)] = True
        prompts = [self._prefix] * len(ids)
        pad_id = self.tokenizer.pad_token_id or 0
        for rows in token_budget_batches([len(self._prefix)] * len(ids), [len(row) for row in ids], self.token_budget):
            packed = pack_rows(prompts, answer_ids, keep, rows, pad_id)
            logp_BR, _ = answer_logprobs(self.model, packed, temperature=1.0)
            for row, logp_R in zip(rows, logp_BR.sum(dim=1).tolist(), strict=True):
                means[row] = logp_R / max(1, len(ids[row]))
        return means


def repetition_charge(tokens: Sequence[int]) -> float:
    """Nats for 3-grams of tokens that came before in the answer, beyond the share that ordinary text has."""
    count = len(tokens) - 2
    if count < 1:
        return 0.0
    distinct = len({tuple(tokens[i : i + 3]) for i in range(count)})
    return REPETITION_WEIGHT * max(0.0, 1 - distinct / count - REPETITION_FREE)


def degenerate_charge(text: str, tokens: Sequence[int]) -> float:
    """Nats for text that is hardly text: few letters or digits, or one token over and over.

    The share of letters, digits and the marks that combine with them, among characters that are not blank, may fall to
    0.3 (code, sums) free of charge; a run of up to four equal tokens is free. At most 2 * DEGENERATE_WEIGHT.
    """
    solid = [char for char in text if not char.isspace()]
    wordlike = sum(unicodedata.category(char)[0] in "LMN" for char in solid)  # letters, combining marks, numbers
    share = wordlike / len(solid) if solid else 0.0
    run = max((len(list(group)) for _, group in groupby(tokens)), default=0)
    return DEGENERATE_WEIGHT * (max(0.0, WORDLIKE_FREE - share) / WORDLIKE_FREE + min(1.0, max(0, run - 4) / 8))


def _prefix_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if tokenizer.chat_template is None:
        return tokenizer("\n")["input_ids"]
    messages = [{"role": "user", "content": NEUTRAL_TURN}]
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    return list(encoded["input_ids"])  # type: ignore[arg-type, call-overload, index]
