"""Larger models in the places of the embedded ones: any text classifier of transformers, from a folder or the hub.

    toxic = HubClassifier("s-nlp/roberta_toxicity_classifier", label="toxic")
    near = HubClassifier("cross-encoder/ms-marco-MiniLM-L6-v2", reads="pair", name="relevance")
    CompositeReward([(near, 1.0), (Safety(), 1.0), (Toxicity(scanner=toxic), -1.0)])

One object serves as a component (prompts, answers) and, by `risk`, as the scanner that `Toxicity(scanner=...)` and
`Safety(harm=...)` ask. Fluency takes a larger model by `Fluency.load(source)`, the learned preference by its path.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

READS = ("answer", "pair")


class HubClassifier:
    """Probability of one label, in [0, 1]; of a long text, the highest of its windows. A blank answer has 0.

    Args:
        source: folder or hub id of a sequence-classification model; not read if model and tokenizer are passed.
        label: name or number of the label; may be left out where the model has one label (its logit, by a sigmoid).
        reads: "answer", or "pair" for models that take the prompt and the answer, such as cross-encoders.
        batch_size: windows a forward pass.
    """

    def __init__(
        self,
        source: str | None = None,
        *,
        label: str | int | None = None,
        reads: str = "answer",
        name: str = "toxicity",
        model: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        batch_size: int = 16,
    ) -> None:
        if reads not in READS:
            raise ValueError(f"{reads=} must be one of {READS}")
        if source is None and (model is None or tokenizer is None):
            raise ValueError("HubClassifier needs a source, or both a model and a tokenizer")
        if model is None or tokenizer is None:
            from transformers import AutoModelForSequenceClassification, AutoTokenizer

            from plumbline.policy_models.loading import resolve_model_source

            path = resolve_model_source(str(source))
            model = model or AutoModelForSequenceClassification.from_pretrained(path, trust_remote_code=False)
            tokenizer = tokenizer or AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        self.name, self.reads, self.batch_size = name, reads, batch_size
        self.model, self.tokenizer = model.eval(), tokenizer
        self.column = _column(model.config, label)
        positions = getattr(model.config, "max_position_embeddings", None) or 512
        self._length = min(int(positions), int(tokenizer.model_max_length), 512)

    def __call__(self, prompts: Sequence[str], answers: Sequence[str]) -> list[float | None]:
        return list(self._worst(list(answers), list(prompts) if self.reads == "pair" else None))

    def risk(self, texts: Sequence[str]) -> list[float]:
        """The same of texts that stand alone. ValueError for a model that reads pairs."""
        if self.reads == "pair":
            raise ValueError(f"{self.name}: a model of pairs has no risk of a text alone; use reads='answer'")
        return self._worst(list(texts), None)

    @torch.inference_mode()
    def _worst(self, texts: list[str], prompts: list[str] | None) -> list[float]:
        rows = [row for row, text in enumerate(texts) if text.strip()]
        scores = [0.0] * len(texts)
        if not rows:
            return scores
        first = [texts[row] for row in rows] if prompts is None else [prompts[row] for row in rows]
        second = None if prompts is None else [texts[row] for row in rows]
        windows = self.tokenizer(
            first,
            second,
            truncation=True if second is None else "only_second",
            max_length=self._length,
            stride=self._length // 8,
            return_overflowing_tokens=True,
        )
        of_row = windows.pop("overflow_to_sample_mapping")
        for start in range(0, len(of_row), self.batch_size):
            stop = start + self.batch_size
            rest = {key: value[start:stop] for key, value in windows.items()}
            batch = self.tokenizer.pad(rest, return_tensors="pt").to(self.model.device)
            for at, p in zip(of_row[start:stop], self._probability(self.model(**batch).logits), strict=True):
                scores[rows[at]] = max(scores[rows[at]], p)
        return scores

    def _probability(self, logits_BL: torch.Tensor) -> list[float]:
        logits_BL = logits_BL.float()
        alone = logits_BL.shape[1] == 1 or self.model.config.problem_type == "multi_label_classification"
        p_BL = logits_BL.sigmoid() if alone else logits_BL.softmax(-1)
        return p_BL[:, self.column].tolist()


def _column(config: object, label: str | int | None) -> int:
    """The number of the label. ValueError with the model's labels for one that it does not have."""
    names = {int(at): str(name) for at, name in config.id2label.items()}  # type: ignore[attr-defined]
    if label is None and len(names) == 1:
        return 0
    for at, name in names.items():
        if label == at or (isinstance(label, str) and label.lower() == name.lower()):
            return at
    raise ValueError(f"{label=}: the model's labels are {names}; name one of them")
