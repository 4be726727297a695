"""A knowledge base: a folder of text, Markdown or JSONL files, found again by words (BM25) and by meaning (embeddings).

Both rankings are fused by reciprocal rank (Cormack et al. 2009, k = 60). Passages are runs of whole sentences with their offsets, so
that a citation is always a piece of the document, word for word. An index is one JSON file and one array; adding or changing
a document embeds its passages only.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from plumbline.rows import file_rows, read_text
from plumbline.safety.embedder.embedding import EMBEDDER_ID, load_embedder
from plumbline.safety.verifier.claims import sentence_spans
from plumbline.safety.verifier.vetoes import stems

Embed = Callable[[Sequence[str]], np.ndarray]  # texts -> (B, D), rows of length 1
_PASSAGE_CHARS = 420
_RRF_K = 60
_K1, _B = 1.2, 0.75  # BM25 (Robertson and Zaragoza 2009)
TABLES = (".jsonl", ".jsonl.gz", ".ndjson", ".csv", ".tsv", ".parquet")
SUFFIXES = (".txt", ".md", *TABLES)


@dataclass(frozen=True, slots=True)
class Document:
    """A text with a name. `sha256` is of its UTF-8."""

    doc_id: str
    text: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True, slots=True)
class Passage:
    """Characters [start, end) of a document."""

    document: Document
    start: int
    end: int

    @property
    def text(self) -> str:
        return self.document.text[self.start : self.end]


@dataclass(frozen=True, slots=True)
class Hit:
    """A passage and how near it is: fused rank score, cosine in [-1, 1], share of the query's words in it, in [0, 1]."""

    passage: Passage
    score: float
    cosine: float
    coverage: float


class KnowledgeBase:
    """Passages of documents, searchable.

    Args:
        embed: None takes the bundled embedder.
        vectors: by document hash, of an earlier index; what is missing is embedded now.
    """

    def __init__(
        self,
        documents: Iterable[Document],
        *,
        embed: Embed | None = None,
        vectors: dict[str, np.ndarray] | None = None,
    ) -> None:
        self.embed = embed or load_embedder().embed
        self.documents = {document.doc_id: document for document in documents}
        if not self.documents:
            raise ValueError("a knowledge base needs at least one document")
        self.passages: list[Passage] = []
        spans_of: dict[str, list[Passage]] = {}
        for document in self.documents.values():
            spans_of[document.sha256] = passages(document)
            self.passages += passages(document)
        known = dict(vectors or {})
        fresh = {sha: found for sha, found in spans_of.items() if sha not in known or len(known[sha]) != len(found)}
        embedded = np.asarray(self.embed([p.text for found in fresh.values() for p in found])) if fresh else None
        at = 0
        for sha, found in fresh.items():
            assert embedded is not None
            known[sha] = embedded[at : at + len(found)]
            at += len(found)
        self.num_embedded = at  # passages that were embedded now
        self.vectors = {sha: known[sha] for sha in spans_of}
        self._matrix = np.concatenate([self.vectors[d.sha256] for d in self.documents.values()])
        self._count_words()

    def _count_words(self) -> None:
        lengths, self._postings = [], defaultdict(list)
        for at, passage in enumerate(self.passages):
            words = Counter(stems(passage.text))
            lengths.append(sum(words.values()))
            for word, count in words.items():
                self._postings[word].append((at, count))
        mean = max(1.0, float(np.mean(lengths)))
        self._norm = _K1 * (1 - _B + _B * np.array(lengths) / mean)
        n = len(self.passages)
        self._idf = {w: math.log(1 + (n - len(p) + 0.5) / (len(p) + 0.5)) for w, p in self._postings.items()}

    def bm25(self, query: str) -> np.ndarray:
        """(passages,) scores, 0 where no word is shared."""
        scores = np.zeros(len(self.passages))
        for word in set(stems(query)):
            for at, count in self._postings.get(word, ()):
                scores[at] += self._idf[word] * count * (_K1 + 1) / (count + self._norm[at])
        return scores

    def search(self, queries: Sequence[str], top: int = 5) -> list[list[Hit]]:
        """The `top` passages of each query, best first."""
        cosines_QP = np.asarray(self.embed(list(queries))) @ self._matrix.T if queries else np.zeros((0, 0))
        return [self._fused(query, cosines_P, top) for query, cosines_P in zip(queries, cosines_QP, strict=True)]

    def _fused(self, query: str, cosines_P: np.ndarray, top: int) -> list[Hit]:
        words_P = self.bm25(query)
        fused: defaultdict[int, float] = defaultdict(float)
        for scores in (words_P, cosines_P):
            best = np.argsort(-scores, kind="stable")[: 4 * top]
            for rank, at in enumerate(best.tolist()):
                if scores[at] > 0:
                    fused[at] += 1 / (_RRF_K + 1 + rank)
        wanted = set(stems(query))
        order = sorted(fused, key=lambda at: (-fused[at], at))[:top]
        return [
            Hit(
                self.passages[at],
                fused[at],
                float(cosines_P[at]),
                len(wanted & set(stems(self.passages[at].text))) / max(1, len(wanted)),
            )
            for at in order
        ]

    def save(self, folder: str | Path) -> None:
        """Writes `documents.json` and `vectors.npz`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        record = {"embedder": EMBEDDER_ID, "documents": {d.doc_id: d.text for d in self.documents.values()}}
        (folder / "documents.json").write_text(json.dumps(record), encoding="utf-8")
        np.savez(folder / "vectors.npz", **{sha: v.astype(np.float16) for sha, v in self.vectors.items()})  # type: ignore[arg-type]

    @classmethod
    def load(cls, folder: str | Path, *, embed: Embed | None = None) -> KnowledgeBase:
        """An index as saved; ValueError with the path for anything else."""
        texts, vectors = _read_index(Path(folder))
        return cls([Document(name, text) for name, text in texts.items()], embed=embed, vectors=vectors)


def index_folder(folder: str | Path, index: str | Path | None = None, *, embed: Embed | None = None) -> KnowledgeBase:
    """The knowledge base of a folder, or of one file. With `index`, what is unchanged there is not embedded anew, and it is updated."""
    documents = read_documents(folder)
    vectors = None
    if index is not None and (Path(index) / "documents.json").is_file():
        vectors = _read_index(Path(index))[1]
    base = KnowledgeBase(documents, embed=embed, vectors=vectors)
    if index is not None:
        base.save(index)
    return base


def read_documents(path: str | Path) -> list[Document]:
    """Every .txt, .md and table of rows below a folder (or the one file). A row has "text" (or "fact"), and "id" or "doc_id".

    Raises:
        ValueError: with file and line for what cannot be read, or when there is nothing to read.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder; name one with {', '.join(SUFFIXES)} files")
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.name.lower().endswith(SUFFIXES))
    documents: list[Document] = []
    for file in files:
        name = file.name if path.is_file() else file.relative_to(path).as_posix()
        if file.name.lower().endswith(TABLES):
            documents += _rows(file, name)
        elif (text := read_text(file)).strip():
            documents.append(Document(name, text))
    if not documents:
        raise ValueError(f"{path}: no text in any {', '.join(SUFFIXES)} file")
    twice = [name for name, count in Counter(d.doc_id for d in documents).items() if count > 1]
    if twice:
        raise ValueError(f"{path}: document id {twice[0]!r} occurs twice; ids must be unique")
    return documents


def _rows(file: Path, name: str) -> list[Document]:
    documents = []
    for place, row in file_rows(file):
        body = row.get("text", row.get("fact"))
        if not isinstance(body, str):
            raise ValueError(f'{place}: no "text"; each row has "text" and optionally "id"')
        documents.append(Document(str(row.get("id", row.get("doc_id", f"{name}#{place.rpartition(':')[2]}"))), body))
    return documents


def _read_index(folder: Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    try:
        record = json.loads((folder / "documents.json").read_text(encoding="utf-8"))
        if record["embedder"] != EMBEDDER_ID:
            raise ValueError(f"made with embedder {record['embedder']!r}, this is {EMBEDDER_ID!r}")
        with np.load(folder / "vectors.npz", allow_pickle=False) as file:
            return record["documents"], {sha: file[sha].astype(np.float32) for sha in file.files}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} is no index ({error}); delete the folder and index again") from error


def passages(document: Document) -> list[Passage]:
    """Runs of whole sentences of about 420 characters; each begins with the last sentence of the one before.

    Blank lines end a passage: what stands in another paragraph or under another heading is another matter.
    """
    found: list[Passage] = []
    for block in re.finditer(r"(?:(?!\n\s*\n).)+", document.text, re.DOTALL):
        spans = [(block.start() + a, block.start() + b) for a, b in sentence_spans(block[0])]
        first = 0
        while first < len(spans):
            last = first
            while last + 1 < len(spans) and spans[last + 1][1] - spans[first][0] <= _PASSAGE_CHARS:
                last += 1
            found.append(Passage(document, spans[first][0], spans[last][1]))
            if last + 1 == len(spans):
                break
            first = max(last, first + 1)
    return found or [Passage(document, 0, len(document.text))]
