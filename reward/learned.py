"""A trained preference model as one component of the reward.

The model reads the conversation (prompt, answer) in its chat template and gives one number, by Bradley-Terry the log-odds
of being preferred up to a constant. `reward_scaling.json` beside the checkpoint ({"mean": m, "std": s}, written when the
model was trained) makes it (number - m) / s, so that training answers have mean 0 and spread 1.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from plumbline.messages import Messages
from plumbline.reward.contracts import Prompt, ask

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SCALING_FILE = "reward_scaling.json"


class LearnedPreference:
    """Scores of a sequence-classification model with one label.

    Args:
        model_path: a source that `plumbline.policy_models.loading.load_scalar_model` takes; read only for what is not passed.
            Such a model goes to the GPU if there is one.
        model, tokenizer: an already loaded pair, for instance adapters on weights shared with the policy.
        token_budget: padded tokens a forward pass.

    A conversation longer than the model's positions gets None: cut, it would be another conversation. So does one that
    the chat template refuses. A prompt is a text or messages: the whole conversation is read, as in training.
    """

    reads_conversations = True

    def __init__(
        self,
        model_path: str | None = None,
        *,
        model: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        dtype: torch.dtype = torch.float32,
        token_budget: int = 4096,
        name: str = "preference",
    ) -> None:
        if model_path is None and (model is None or tokenizer is None):
            raise ValueError("LearnedPreference needs a model_path, or both a model and a tokenizer")
        self.name, self.token_budget = name, token_budget
        self.mean, self.std = read_scaling(model_path)
        if model is None or tokenizer is None:
            from plumbline.policy_models.devices import default_device
            from plumbline.policy_models.loading import load_scalar_model, load_tokenizer

            model = model or load_scalar_model(str(model_path), dtype=dtype, device=default_device())
            tokenizer = tokenizer or load_tokenizer(str(model_path))
        if model.config.num_labels != 1:
            raise ValueError(
                f"a preference model has one label, {model_path or 'this model'} has {model.config.num_labels}"
            )
        self.model, self.tokenizer = model, tokenizer

    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float | None]:
        asked = [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in prompts]
        return self.score_conversations(
            [[*p, {"role": "assistant", "content": answer}] for p, answer in zip(asked, answers, strict=True)]
        )

    def score_conversations(
        self, conversations: Sequence[Messages], tools: Sequence[list[Any] | None] | None = None
    ) -> list[float | None]:
        """Scores of whole conversations, messages that end with the answer; `tools` as they were offered in each."""
        training = self.model.training  # weights may be shared with a policy that is being trained
        self.model.eval()
        try:
            offered = tools or [None] * len(conversations)
            return self._scores([self._ids(m, t) for m, t in zip(conversations, offered, strict=True)])
        finally:
            self.model.train(training)

    @torch.inference_mode()
    def _scores(self, ids: Sequence[list[int] | None]) -> list[float | None]:
        from plumbline.policy_models.loading import last_token_scores
        from plumbline.policy_models.logprobs import token_budget_batches

        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or math.inf
        known = [tokens or [] for tokens in ids]
        fits = [row for row, tokens in enumerate(known) if 0 < len(tokens) <= limit]
        device = next(self.model.parameters()).device
        scores: list[float | None] = [None] * len(ids)
        padded = [_rounded_up(len(known[row])) for row in fits]
        for batch in token_budget_batches(padded, [0] * len(fits), self.token_budget):
            rows = [fits[at] for at in batch]
            width = min(max(padded[at] for at in batch), limit)
            input_ids = torch.full(
                (len(rows), int(width)), self.tokenizer.pad_token_id, dtype=torch.long, device=device
            )
            keep = torch.zeros_like(input_ids)
            for at, row in enumerate(rows):  # padded on the right: positions then need no care
                input_ids[at, : len(known[row])] = torch.tensor(known[row], dtype=torch.long)
                keep[at, : len(known[row])] = 1
            logits = last_token_scores(self.model, input_ids, keep)
            for row, logit in zip(rows, logits.tolist(), strict=True):
                scores[row] = (logit - self.mean) / self.std
        return scores

    def _ids(self, messages: Messages, tools: list[Any] | None) -> list[int] | None:
        from plumbline.policy_models.chat import TemplateRefusalError, encode

        try:
            return encode(self.tokenizer, messages, tools=tools)
        except TemplateRefusalError:
            return None


class PreferenceEnsemble:
    """Several preference models as one cautious component: mean - caution * standard deviation of their scores.

    Models that agree on what they were trained on disagree where a policy drifts to what none has seen; charging for the
    spread makes such answers worth less (Coste et al. 2023, arXiv:2310.02743, uncertainty-weighted optimisation).

    Args:
        members: two or more components, such as LearnedPreference of runs with different seeds.
        caution: at least 0; 0 is the mean.

    A row on which any member has no opinion gets None: the spread of the others would understate the doubt.
    """

    def __init__(
        self, members: Sequence[Callable[..., list[float | None]]], *, caution: float = 1.0, name: str = "preference"
    ) -> None:
        if len(members) < 2 or not (caution >= 0 and math.isfinite(caution)):
            raise ValueError(
                f"{len(members)} members, {caution=}: needs at least 2 members and a caution of at least 0"
            )
        self.members, self.caution, self.name = list(members), caution, name

    reads_conversations = True

    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float | None]:
        return [
            None if mean is None or spread is None else mean - self.caution * spread
            for mean, spread in self.mean_and_spread(prompts, answers)
        ]

    def mean_and_spread(
        self, prompts: Sequence[Prompt], answers: Sequence[str]
    ) -> list[tuple[float, float] | tuple[None, None]]:
        """(mean, population standard deviation) over the members, a row."""
        rows: list[tuple[float, float] | tuple[None, None]] = []
        for scores in zip(*(ask(member, prompts, answers) for member in self.members), strict=True):
            known = [score for score in scores if score is not None]
            if len(known) < len(scores):
                rows.append((None, None))
            else:
                rows.append((statistics.fmean(known), statistics.pstdev(known)))
        return rows


def _rounded_up(length: int, multiple: int = 32) -> int:
    """Widths come in few sizes: a CPU compiles a kernel for each new one."""
    return -(-length // multiple) * multiple


def read_scaling(model_path: str | None) -> tuple[float, float]:
    """(mean, std) of the file beside a local checkpoint; (0, 1) where there is none."""
    path = Path(model_path or "") / SCALING_FILE
    if model_path is None or not path.is_file():
        return 0.0, 1.0
    fields = json.loads(path.read_text(encoding="utf-8"))
    mean, std = fields.get("mean"), fields.get("std")
    for value in (mean, std):
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{path}: mean={mean!r}, std={std!r}; both must be finite numbers")
    if std <= 0:
        raise ValueError(f"{path}: std={std} must be above 0; train the reward model again")
    return float(mean), float(std)
