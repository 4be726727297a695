"""Banned phrases, by what the tokens spell and not by which tokens they are.

A word can be spelled by many sequences of tokens, so banning ids bans nothing. Here a token is forbidden when the decoded
text with it would hold a phrase in any spelling (`plumbline.safety.constrained.spellings`).

How it stays fast: the tokens that spell a phrase on their own are found once. At a step, only tokens that end a match
which began before them are looked for, down a trie of the vocabulary for as long as such a match is under way. The answer
depends on the reading state alone and is kept by state.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from plumbline.policy_models.rollout.generation import DecodeRow
from plumbline.safety.constrained.rows import StateByRow
from plumbline.safety.constrained.spellings import Phrases, State

_STATES_KEPT = 4096


class BannedPhrases:
    """Processor: no answer ever spells a banned phrase; its last token, where the answer is cut, included.

    Args:
        phrases: what to look for, with the allowed longer words.
        vocabulary: UTF-8 of each id (`token_bytes`); b"" for tokens that decode to nothing, which are left alone.
        stop_ids: forbidden while the text would end in an unfinished exception ("ass" of "assist").
        max_new_tokens: the limit of the answer. Close to it such unfinished words are not begun. None: the answer may be
            cut inside one; `Phrases.find` then says where.
    """

    def __init__(
        self,
        phrases: Phrases,
        vocabulary: Sequence[bytes],
        stop_ids: Sequence[int],
        max_new_tokens: int | None = None,
    ) -> None:
        self.phrases, self.vocabulary = phrases, list(vocabulary)
        self.stop_ids = sorted(set(stop_ids))
        self.max_new_tokens = math.inf if max_new_tokens is None else max_new_tokens
        self._order = sorted((id_ for id_, text in enumerate(vocabulary) if text), key=lambda id_: vocabulary[id_])
        self._sorted = [vocabulary[id_] for id_ in self._order]
        self._kept: OrderedDict[tuple[State, bool], Tensor] = OrderedDict()
        self._alone = {close: self._find(phrases.neutral, close, alone=None) for close in (False, True)}
        self._states = StateByRow(lambda: phrases.start, self._read)

    def __call__(self, rows: Sequence[DecodeRow], logits_BV: Tensor) -> Tensor:
        logits_BV = logits_BV.clone()
        for at, row in enumerate(rows):
            close = len(row.answer) + self.phrases.longest + 1 >= self.max_new_tokens
            ids = self.forbidden(self._states.at(row), close)
            logits_BV[at].index_fill_(0, ids.to(logits_BV.device), -math.inf)
        return logits_BV

    def forbidden(self, state: State, close: bool = False) -> Tensor:
        """Ids that may not follow; `close`: the limit is near, so nothing is begun that could be cut inside."""
        key = state, close
        if key not in self._kept:
            ids = self._find(state, close, self._alone[close])
            if self.phrases.ends_badly(state):
                ids = ids | set(self.stop_ids)
            self._kept[key] = torch.tensor(sorted(ids), dtype=torch.long)
            if len(self._kept) > _STATES_KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]

    def _read(self, state: State, token: int) -> State:
        """The state after a token. One that was forbidden (the caller's own) is read over: the next phrase still counts."""
        for byte in self.vocabulary[token]:
            state = self.phrases.feed(state, byte) or self.phrases.start
        return state

    def _find(self, state: State, close: bool, alone: set[int] | None) -> set[int]:
        """Ids that are forbidden after `state`. `alone`: those forbidden where no match is under way, None to find these."""
        ids = set(alone or ())
        phrases, texts, order = self.phrases, self._sorted, self._order
        # (state, state if no match had been under way, tokens [low, high) that share their first `depth` bytes)
        stack: list[tuple[State, State | None, int, int, int]] = [(state, phrases.neutral, 0, len(order), 0)]
        while stack:
            at, neutral, low, high, depth = stack.pop()
            while low < high and len(texts[low]) == depth:  # a token that ends here
                excepted = at.owed > state.owed > 0  # goes on with the exception that was begun before
                bad = close and not excepted and phrases.ends_badly(at)
                (ids.add if bad else ids.discard)(order[low])
                low += 1
            while low < high:
                byte = texts[low][depth]
                end = bisect_left(texts, texts[low][:depth] + bytes([byte + 1]), low, high) if byte < 255 else high
                after = phrases.feed(at, byte)
                after_neutral = None if neutral is None else phrases.feed(neutral, byte)
                if after is None:
                    ids.update(order[low:end])
                elif alone is None or after != after_neutral:  # equal states go on alike: `alone` is right below here
                    stack.append((after, after_neutral, low, end, depth + 1))
                low = end
        return ids
