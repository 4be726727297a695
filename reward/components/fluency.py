"""How well formed an answer is, under a small language model that is not being trained.

    fluency = min(mean log-probability of the answer's tokens, CEILING) - repetition - degenerate

in nats a token. The answer stands after the opening of an assistant turn and nothing else: conditioned on its prompt, the
score would measure relevance a second time.

What the terms are for. A language model finds bland, predictable text likeliest of all, so nothing is paid above
CEILING, the value of ordinary good answers (their words shuffled: about -7.3). It also finds repetition likely once it
has begun, hence the repetition charge: the share of token 3-grams seen before in the answer. `degenerate` charges for
text without letters or digits, for long runs of one token, and for words of Latin letters with look-alikes among them. The
charges count tokens and Unicode classes, so they need no word list.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import torch

from plumbline.reward.components.reading import mixed_share

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CEILING = -4.5  # nats a token: median of data/starter's chosen answers under SmolLM2-135M-Instruct (bland text: -2)
FLOOR = -10.0  # about log(1 / vocabulary): random tokens
REPETITION_WEIGHT = 8.0
REPETITION_FREE = 0.05  # share of repeated 3-grams that ordinary text has
DEGENERATE_WEIGHT = 6.0
WORDLIKE_FREE = 0.3
MIXED_FREE = 0.05


class Fluency:
    """Scores in [-36, CEILING], ordinary answers within 1 of CEILING. A blank answer gets FLOOR.

    Args:
        model, tokenizer: a causal language model, used in evaluation mode and never changed.
        ceiling: nats a token above which nothing is gained; fit it again for another model (`typical_logp`).
        token_budget: padded tokens a forward pass.
    """

    min_std = 0.5  # good answers lie at the ceiling: the little that differs among them must not count for much

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        ceiling: float = CEILING,
        token_budget: int = 2048,
        name: str = "fluency",
    ) -> None:
        self.name, self.ceiling, self.token_budget = name, ceiling, token_budget
        self.model, self.tokenizer = model.eval(), tokenizer
        self._prefix = _prefix_ids(tokenizer)

    @classmethod
    def load(cls, source: str = "bundled:smollm2-135m-instruct", *, dtype: torch.dtype | None = None) -> Fluency:
        """From any source that `plumbline.policy_models.loading.load_policy` takes, on the GPU if there is one; None is its fast type."""
        from plumbline.policy_models.loading import load_for_answers, load_tokenizer

        return cls(load_for_answers(source, dtype=dtype), load_tokenizer(source))

    def __call__(self, prompts: Sequence[str], answers: Sequence[str]) -> list[float | None]:
        texts = list(dict.fromkeys(answers))  # the prompt is not read, so an answer given twice has one score
        ids = self._ids(texts)
        scores: dict[str, float] = {}
        for text, tokens, logp in zip(texts, ids, self._mean_logp(ids), strict=True):
            charge = repetition_charge(tokens) + degenerate_charge(text, tokens)
            scores[text] = min(max(logp, FLOOR), self.ceiling) - charge if text.strip() else FLOOR
        return [scores[answer] for answer in answers]

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
        """Mean log-probability of each row's tokens after the opened turn; 0 for an empty row."""
        from plumbline.policy_models.logprobs import token_budget_batches, token_logprobs

        means = [0.0] * len(ids)
        device = next(self.model.parameters()).device
        start = len(self._prefix)
        for rows in token_budget_batches([start] * len(ids), [len(row) for row in ids], self.token_budget):
            width = max(len(ids[row]) for row in rows)
            if width == 0:
                continue
            # Padded on the right: a causal model never looks there, so no mask is needed.
            input_BT = torch.zeros(len(rows), start + width, dtype=torch.long, device=device)
            keep_BT = torch.zeros_like(input_BT, dtype=torch.bool)
            for at, row in enumerate(rows):
                end = start + len(ids[row])
                input_BT[at, :end] = torch.tensor([*self._prefix, *ids[row]], dtype=torch.long)
                keep_BT[at, start:end] = True
            predicts_BT = keep_BT.roll(-1, dims=1)  # the position before a token predicts it; position 0 keeps nothing
            logits_NV = self.model(input_ids=input_BT, logits_to_keep=predicts_BT, use_cache=False).logits
            logp_N, _ = token_logprobs(logits_NV, input_BT[keep_BT])
            sums_BT = torch.zeros_like(input_BT, dtype=torch.float32).masked_scatter(keep_BT, logp_N)
            for row, total in zip(rows, sums_BT.sum(dim=1).tolist(), strict=True):
                means[row] = total / max(1, len(ids[row]))
        return means


def repetition_charge(tokens: Sequence[int]) -> float:
    """Nats for 3-grams of tokens that came before in the answer, beyond the share that ordinary text has."""
    count = len(tokens) - 2
    if count < 1:
        return 0.0
    distinct = len({tuple(tokens[i : i + 3]) for i in range(count)})
    return REPETITION_WEIGHT * max(0.0, 1 - distinct / count - REPETITION_FREE)


def degenerate_charge(text: str, tokens: Sequence[int]) -> float:
    """Nats for text that is hardly text: few letters or digits, one token over and over, disguised words.

    The share of letters, digits and the marks that combine with them, among characters that are not blank, may fall to
    0.3 (code, sums) free of charge; a run of up to four equal tokens is free, and so is one word in twenty that mixes
    scripts ("NF-\u03baB"). At most 3 * DEGENERATE_WEIGHT.
    """
    solid = [char for char in text if not char.isspace()]
    wordlike = sum(unicodedata.category(char)[0] in "LMN" for char in solid)  # letters, combining marks, numbers
    share = wordlike / len(solid) if solid else 0.0
    run = max((len(list(group)) for _, group in groupby(tokens)), default=0)
    few = max(0.0, WORDLIKE_FREE - share) / WORDLIKE_FREE
    mixed = max(0.0, mixed_share(text) - MIXED_FREE)
    return DEGENERATE_WEIGHT * (few + min(1.0, max(0, run - 4) / 8) + mixed)


def _prefix_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The opening of an assistant turn, which the chat template appends to a conversation as generation prompt."""
    if tokenizer.chat_template is None:
        return list(tokenizer("\n")["input_ids"])
    turn = [{"role": "user", "content": "x"}]
    before, opened = (
        list(tokenizer.apply_chat_template(turn, add_generation_prompt=more, return_dict=True)["input_ids"])  # type: ignore[arg-type, call-overload, index]
        for more in (False, True)
    )
    return opened[len(before) :] or opened  # some templates open no turn
