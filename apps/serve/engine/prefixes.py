"""Keys and values of prompts and answers that came by, for requests that begin like them.

A system prompt that all requests share, and the turns before the last of a conversation, are read once. Bounded by tokens;
what was used longest ago goes first.
"""

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from plumbline.policy_models.rollout.joining import Adapter, Prefix

SHORTEST = 16  # tokens: below, copying is not worth it


class PrefixCache:
    """Prefixes of at most `max_tokens` tokens together; 0 keeps none. For one thread."""

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.tokens = 0
        self.hits = 0  # tokens that did not have to be read
        self._kept: OrderedDict[int, tuple[np.ndarray, Prefix]] = OrderedDict()

    def find(self, ids: Sequence[int], adapter: Adapter) -> tuple[Prefix | None, int]:
        """The prefix that shares most tokens with a prompt, and how many: at least one of the prompt is left to read."""
        wanted = np.asarray(ids[:-1])
        best, shared = None, SHORTEST - 1
        for key, (known, prefix) in self._kept.items():
            if prefix.adapter != adapter:
                continue
            length = min(len(known), len(wanted))
            if length <= shared:
                continue
            differ = np.flatnonzero(known[:length] != wanted[:length])
            same = int(differ[0]) if len(differ) else length
            if same > shared:
                best, shared = key, same
        if best is None:
            return None, 0
        self._kept.move_to_end(best)
        self.hits += shared
        return self._kept[best][1], shared

    def add(self, prefix: Prefix | None) -> None:
        """Keeps a prefix, in the place of those that it begins with."""
        if prefix is None or not SHORTEST <= len(prefix.ids) <= self.max_tokens:
            return
        ids = np.asarray(prefix.ids)
        for key, (known, other) in list(self._kept.items()):
            if other.adapter == prefix.adapter:
                length = min(len(known), len(ids))
                if np.array_equal(known[:length], ids[:length]):
                    if len(known) >= len(ids):
                        self._kept.move_to_end(key)
                        return
                    self._drop(key)
        self._kept[id(prefix)] = ids, prefix
        self.tokens += len(ids)
        while self.tokens > self.max_tokens:
            self._drop(next(iter(self._kept)))

    def _drop(self, key: int) -> None:
        ids, _ = self._kept.pop(key)
        self.tokens -= len(ids)
