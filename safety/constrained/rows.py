"""Processors under transformers' `generate`, state by row, and the bytes of every token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from plumbline.policy_models.rollout.generation import DecodeRow, Processor

S = TypeVar("S")


class ForTransformers(LogitsProcessor):
    """Runs processors inside `model.generate(logits_processor=LogitsProcessorList([ForTransformers(...)]))`.

    Args:
        attention_mask: (B, P) of the prompts, padded on either side. One object serves one call of `generate`.
        stop_ids: every id that ends an answer, all of `generation_config.eos_token_id`. Rows that have ended are left alone.
        rows_per_prompt: `num_beams` or `num_return_sequences`.

    Put it first, before temperature and top-k: processors read and write raw logits.

    Raises:
        ValueError: when `generate` runs with other rows than those of `attention_mask`.
    """

    supports_continuous_batching = False

    def __init__(
        self,
        processors: Sequence[Processor],
        attention_mask: Tensor,
        stop_ids: Sequence[int],
        rows_per_prompt: int = 1,
    ) -> None:
        self.processors, self.stop_ids, self.rows_per_prompt = list(processors), frozenset(stop_ids), rows_per_prompt
        self.keep = attention_mask.bool().tolist()
        self.width = attention_mask.shape[1]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if len(input_ids) != len(self.keep) * self.rows_per_prompt:
            raise ValueError(
                f"{len(input_ids)} rows for {len(self.keep)} prompts and rows_per_prompt={self.rows_per_prompt}; "
                "set it to num_beams or num_return_sequences"
            )
        rows, at = [], []
        for row, ids in enumerate(input_ids.tolist()):
            answer = ids[self.width :]
            if self.stop_ids.isdisjoint(answer):
                keep = self.keep[row // self.rows_per_prompt]
                prompt = [token for token, kept in zip(ids, keep, strict=False) if kept]
                rows.append(DecodeRow(row, prompt, answer))
                at.append(row)
        changed = scores[at]
        for processor in self.processors if rows else ():
            changed = processor(rows, changed)
        return scores.index_copy(0, torch.tensor(at, device=scores.device), changed.to(scores.dtype))


def continued(processor: Processor, given: Sequence[int]) -> Processor:
    """The same processor for prompts whose last `given[row]` tokens are the beginning of the answer."""

    def moved(row: DecodeRow) -> DecodeRow:
        cut = len(row.prompt) - given[row.row]
        return DecodeRow(row.row, row.prompt[:cut], [*row.prompt[cut:], *row.answer])

    return lambda rows, logits: processor([moved(row) for row in rows], logits)


class StateByRow(Generic[S]):
    """The state after a row's answer: the last one of that row moved on, or made anew if the answer is another one.

    `advance` returns the state after one more token and may change the one it is given.
    """

    def __init__(self, start: Callable[[], S], advance: Callable[[S, int], S]) -> None:
        self._start, self._advance = start, advance
        self._rows: dict[int, tuple[list[int], S]] = {}

    def at(self, row: DecodeRow) -> S:
        answer = list(row.answer)
        seen, state = self._rows.get(row.row, ([], None))
        if state is None or answer[: len(seen)] != seen:
            seen, state = [], self._start()
        for token in answer[len(seen) :]:
            state = self._advance(state, token)
        self._rows[row.row] = answer, state
        return state


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> list[bytes]:
    """What each id adds to the decoded text, as UTF-8 that may begin or end inside a character; b"" for special tokens.

    Knows byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM) and SentencePiece pieces (U+2581 for a space, <0x0A> for a byte).
    """
    size = len(tokenizer)
    pieces = list(tokenizer.convert_ids_to_tokens(list(range(size))))
    special = set(tokenizer.all_special_ids)
    added = {id_: str(token) for id_, token in tokenizer.added_tokens_decoder.items()}
    byte_of = _byte_level_alphabet()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    byte_level = "ByteLevel" in str(getattr(backend, "decoder", ""))
    table = []
    for id_, piece in enumerate(pieces):
        if id_ in special or piece is None:
            table.append(b"")
        elif id_ in added:
            table.append(added[id_].encode())
        elif byte_level:
            table.append(bytes(byte_of[ch] for ch in piece if ch in byte_of))
        elif len(piece) == 6 and piece.startswith("<0x"):
            table.append(bytes.fromhex(piece[3:5]))
        else:
            table.append(piece.replace("\u2581", " ").encode("utf-8", "replace"))
    return table


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte -> the byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}
