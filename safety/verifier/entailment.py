"""Does a passage support a claim? One interface, three tiers.

- `Embedded`: a small head on overlap and embedding features, trained here on the starter facts, says whether a passage covers a claim;
  rules alone say that it contradicts it. It compares wording; it does not read. docs/fact_check.md says what it cannot do, and
  reports carry its `quality`, "embedded".
- `HubEntailment`: FactCG, MiniCheck or any NLI model by hub id or folder, `quality` "production".

Scores are (n, 3): P(supported), P(not enough), P(refuted). A model with two outcomes says nothing about refutation: column 3 is 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from plumbline.safety.classifier import SHIPPED, Head
from plumbline.safety.embedder.embedding import EMBEDDER_ID, load_embedder
from plumbline.safety.verifier.claims import sentence_spans
from plumbline.safety.verifier.vetoes import name_clashes, names, stems, unmatched_numbers, vetoes

FEATURES = f"{EMBEDDER_ID}:claim-passage-v2"
NAMES = (
    "words of the claim in the passage",
    "in its best sentence",
    "word pairs of the claim in the passage",
    "cosine with the passage",
    "cosine with its best sentence",
    "numbers missing",
    "names missing",
    "words of the claim in the passage, squared",
)


class EntailmentModel(Protocol):
    """`name` and `quality` go into reports."""

    name: str
    quality: str

    def score(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """(passage, claim) pairs -> (n, 3) of P(supported), P(not enough), P(refuted)."""
        ...


class Embedded:
    """The shipped head on the bundled embedder. Where a number, date, name or negation clashes, what would be support is refutation.

    The head is not asked about refutation: trained on near copies with one word changed, it takes every near copy for one.
    """

    name, quality = "embedded", "embedded"

    def __init__(self, head: Head | None = None, embed: Callable[[Sequence[str]], np.ndarray] | None = None) -> None:
        self.head = head or Head.load(SHIPPED / "entailment.safetensors", features=FEATURES)
        self.embed = embed or load_embedder().embed

    def score(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        if not pairs:
            return np.zeros((0, 3))
        covers = self.head.predict(features(pairs, self.embed))
        clash = np.array([bool(vetoes(c, p) or name_clashes(c, p)) for p, c in pairs])
        return np.stack([np.where(clash, 0, covers), 1 - covers, np.where(clash, covers, 0)], axis=1)


def features(pairs: Sequence[tuple[str, str]], embed: Callable[[Sequence[str]], np.ndarray]) -> np.ndarray:
    """(n, 8) float32, see NAMES."""
    sentences = [[passage[a:b] for a, b in sentence_spans(passage)] or [passage] for passage, _ in pairs]
    texts = list(dict.fromkeys(text for (p, c), found in zip(pairs, sentences, strict=True) for text in (p, c, *found)))
    vector = dict(zip(texts, np.asarray(embed(texts)), strict=True))
    rows = []
    for (passage, claim), found in zip(pairs, sentences, strict=True):
        words, pairs_of_words = set(stems(claim)), _bigrams(claim)
        there = set(stems(passage))
        covered = len(words & there) / max(1, len(words))
        numbers, named = unmatched_numbers(claim, passage), names(claim)
        rows.append(
            [
                covered,
                max(len(words & set(stems(sentence))) / max(1, len(words)) for sentence in found),
                len(pairs_of_words & _bigrams(passage)) / max(1, len(pairs_of_words)),
                vector[claim] @ vector[passage],
                max(vector[claim] @ vector[sentence] for sentence in found),
                min(2, len(numbers)),
                min(2, sum(not set(stems(name)) & there for name in named)),
                covered**2,
            ]
        )
    return np.array(rows, dtype=np.float32).reshape(len(pairs), len(NAMES))


def _bigrams(text: str) -> set[tuple[str, str]]:
    words = stems(text)
    return set(zip(words, words[1:], strict=False))


class HubEntailment:
    """A trained fact checker by hub id or folder. `style` is guessed from the id and the config where it is None.

    factcg     yaxili96/FactCG-DeBERTa-v3-Large: its prompt around passage and claim, two labels
    minicheck  lytang/MiniCheck-Flan-T5-Large, -RoBERTa-Large, -DeBERTa-v3-Large: passage, end token, claim as one text; the T5
               says "0" or "1", the others have two labels
    nli        any model whose labels are named entailment, neutral, contradiction: passage and claim as a pair
    pair       any other model of two labels, the second of which is "supported"

    Passages longer than the model's limit raise: cut, they would be other passages.
    """

    quality = "production"

    def __init__(self, model_id: str, *, style: str | None = None, batch_size: int = 16) -> None:
        from transformers import (
            AutoConfig,
            AutoModelForSeq2SeqLM,
            AutoModelForSequenceClassification,
            AutoTokenizer,
        )

        config = AutoConfig.from_pretrained(model_id, trust_remote_code=False)
        self.name, self.batch_size = model_id, batch_size
        labels = {index: str(label).lower() for index, label in config.id2label.items()}
        self.style = style or _style(model_id, config, labels)
        if self.style not in ("factcg", "minicheck", "pair", "nli"):
            raise ValueError(f"style={self.style!r} must be one of factcg, minicheck, pair, nli")
        if self.style == "nli":
            try:
                order = ("entail", "neutral", "contradict")
                self._columns = [next(i for i, text in labels.items() if want in text) for want in order]
            except StopIteration:
                raise ValueError(f"{model_id}: labels {list(labels.values())} are not those of an NLI model") from None
        elif not config.is_encoder_decoder and config.num_labels != 2:
            raise ValueError(f"{model_id}: style {self.style!r} needs two labels, it has {config.num_labels}")
        self.tokenizer = AutoTokenizer.from_pretrained(model_id, trust_remote_code=False)
        kind: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForSequenceClassification
        self.model = kind.from_pretrained(model_id, trust_remote_code=False).eval()

    def score(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        parts = [self._batch(pairs[at : at + self.batch_size]) for at in range(0, len(pairs), self.batch_size)]
        return np.concatenate(parts) if parts else np.zeros((0, 3))

    def _batch(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        import torch

        if self.style == "factcg":
            texts: list[Any] = [[FACTCG_PROMPT.format(passage=passage, claim=claim) for passage, claim in pairs]]
        elif self.style == "minicheck":
            opening = "predict: " if self.model.config.is_encoder_decoder else ""
            texts = [[f"{opening}{passage}{self.tokenizer.eos_token}{claim}" for passage, claim in pairs]]
        else:
            texts = [[passage for passage, _ in pairs], [claim for _, claim in pairs]]
        inputs = self.tokenizer(*texts, padding=True, return_tensors="pt").to(self.model.device)
        limit = getattr(self.model.config, "max_position_embeddings", None)
        if limit and inputs["input_ids"].shape[1] > limit:
            raise ValueError(f"{self.name} reads {limit} tokens, a pair has {inputs['input_ids'].shape[1]}")
        with torch.inference_mode():
            if self.model.config.is_encoder_decoder:
                start = torch.full((len(pairs), 1), self.model.config.decoder_start_token_id, device=self.model.device)
                logits = self.model(**inputs, decoder_input_ids=start).logits[:, 0]
                zero_one = [
                    self.tokenizer.encode(text)[0] for text in ("0", "1")
                ]  # their first pieces, 3 and 209 in T5
                supported = logits[:, zero_one].softmax(-1)[:, 1]
            else:
                probability = self.model(**inputs).logits.float().softmax(-1)
                if self.style == "nli":
                    return probability[:, self._columns].cpu().numpy()
                supported = probability[:, 1]
        p = supported.float().cpu().numpy()
        return np.stack([p, 1 - p, np.zeros_like(p)], axis=1)


FACTCG_PROMPT = (
    '{passage}\n\nChoose your answer: based on the paragraph above can we conclude that "{claim}"?\n\nOPTIONS:\n- Yes\n- No\n'
    "I think the answer is "
)


def _style(model_id: str, config: Any, labels: dict[int, str]) -> str:
    for known in ("factcg", "minicheck"):
        if known in model_id.lower():
            return known
    if config.is_encoder_decoder:
        return "minicheck"
    return "nli" if any("entail" in label for label in labels.values()) and len(labels) == 3 else "pair"


@lru_cache(maxsize=2)
def load_entailment(model_id: str | None = None) -> EntailmentModel:
    """The shipped embedded tier, or a hub id; loaded once."""
    return Embedded() if model_id is None else HubEntailment(model_id)
