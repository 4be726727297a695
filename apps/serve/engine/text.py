"""Tokens into text as they are drawn: characters that take several tokens, texts that end an answer."""

import codecs
from collections.abc import Collection, Sequence
from typing import Any

from plumbline.safety.constrained.rows import token_bytes


class Vocabulary:
    """What each token adds to an answer, for one tokenizer. Special tokens add nothing."""

    def __init__(self, tokenizer: Any) -> None:
        self.bytes = token_bytes(tokenizer)
        pieces = tokenizer.convert_ids_to_tokens(list(range(len(self.bytes))))
        special = set(tokenizer.all_special_ids)
        self.special = {id_: str(pieces[id_]) for id_ in special if id_ < len(pieces)}
        decoder = str(getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", ""))
        self.strips_first_blank = "ByteLevel" not in decoder and "Strip" in decoder

    def text_of(self, id_: int) -> tuple[str, bytes]:
        """A token by itself, as log-probabilities show it."""
        data = self.bytes[id_] if id_ < len(self.bytes) else b""
        return data.decode("utf-8", "replace") if data else self.special.get(id_, ""), data


class AnswerText:
    """The text of one answer, up to the first of its stop texts.

    `feed` and `end` return what follows the text returned so far. Text that could be the beginning of a stop text is kept
    back until it is known to be none; `stopped` is True once one was found, and then nothing more comes.

    Args:
        shown: special tokens that are part of the text, such as the marks of tool calls.
    """

    def __init__(self, vocabulary: Vocabulary, stop: Sequence[str] = (), shown: Collection[str] = ()) -> None:
        self.vocabulary, self.stop = vocabulary, [text for text in stop if text]
        self.shown = {id_: text for id_, text in vocabulary.special.items() if text in shown}
        self.stopped = False
        self.length = 0  # characters decoded, kept back or not
        self.cut = -1  # where the stop text begins, once it was found
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self._first = vocabulary.strips_first_blank

    def feed(self, token: int) -> str:
        """What may be shown after one more token."""
        if token in self.shown:
            return self._take(self._decoder.decode(b"", final=True) + self.shown[token])
        data = self.vocabulary.bytes[token] if token < len(self.vocabulary.bytes) else b""
        return self._take(self._decoder.decode(data))

    def end(self) -> str:
        """The rest of an answer that ended without a stop text."""
        text = self._take(self._decoder.decode(b"", final=True))
        if self.stopped:
            return text
        held, self._held = self._held, ""
        return text + held

    def _take(self, new: str) -> str:
        if self.stopped:
            return ""
        if self._first and new:
            new, self._first = new.removeprefix(" "), False
        self.length += len(new)
        self._held += new
        before = self.length - len(self._held)
        found = min((at for text in self.stop if (at := self._held.find(text)) >= 0), default=None)
        if found is not None:
            text, self._held = self._held[:found], ""
            self.cut, self.stopped = before + found, True
            return text
        at = len(self._held) - max((self._overlap(text) for text in self.stop), default=0)
        text, self._held = self._held[:at], self._held[at:]
        return text

    def _overlap(self, stop: str) -> int:
        """Characters at the end of what is held that begin a stop text."""
        for length in range(min(len(stop) - 1, len(self._held)), 0, -1):
            if self._held.endswith(stop[:length]):
                return length
        return 0
