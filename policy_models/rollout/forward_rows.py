"""What `JoiningDecoder` offers, through `model.forward`, for causal language models that it does not know.

Each sequence has a cache of its own and takes its steps alone: slower, and the reference that `JoiningDecoder` is tested
against. No prefixes are reused, since not every cache can be cut.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from plumbline.policy_models.rollout.joining import Adapter, Prefix, Staged, only_adapter


class ForwardRows:
    """Up to `max_rows` sequences of at most `num_positions` tokens each."""

    def __init__(self, model: PreTrainedModel, *, max_rows: int, num_positions: int) -> None:
        self.model, self.max_rows, self.num_positions = model, max_rows, num_positions
        self.device = model.device
        self._rows: list[tuple[DynamicCache, Adapter]] = []

    @property
    def num_rows(self) -> int:
        """Sequences that take steps."""
        return len(self._rows)

    def stage(
        self, ids: Sequence[int], adapter: Adapter = None, prefix: Prefix | None = None, shared: int = 0
    ) -> Staged:
        """A prompt to be read, all of it: prefixes are not used here."""
        assert prefix is None and not shared and 0 < len(ids) <= self.num_positions
        return Staged(list(ids), adapter, of=DynamicCache(config=self.model.config))

    def extend(self, work: Sequence[tuple[Staged, int]]) -> list[Tensor | None]:
        """Reads the next n tokens of each; logits (V,) after the last token of those that are then done, else None."""
        logits: list[Tensor | None] = []
        for staged, n in work:
            row_V = self._forward(staged.ids[staged.done : staged.done + n], staged.of, staged.adapter)
            staged.done += n
            logits.append(row_V if staged.done == len(staged.ids) else None)
        return logits

    def prefix_of(self, staged: Staged) -> None:
        """Nothing is left for others."""

    def admit(self, staged: Sequence[Staged]) -> None:
        """Gives each prompt a row; one that enters twice is read again, since a cache grows with its sequence."""
        for one in staged:
            if any(one.of is cache for cache, _ in self._rows):
                again = self.stage(one.ids, one.adapter)
                self.extend([(again, len(again.ids))])
                one = again
            self._rows.append((one.of, one.adapter))

    def step(self, token_B: Tensor) -> Tensor:
        """Appends one token to every row and returns logits (B, V)."""
        rows = zip(token_B.tolist(), self._rows, strict=True)
        return torch.stack([self._forward([token], cache, adapter) for token, (cache, adapter) in rows])

    def keep(self, rows: Sequence[int]) -> list[int]:
        """Narrows the batch to `rows`; returns which old row each new row is."""
        self._rows = [self._rows[row] for row in rows]
        return list(rows)

    def copy_row(self, row: int, ids: Sequence[int]) -> None:
        """Nothing is left for others."""

    def _forward(self, ids: Sequence[int], cache: DynamicCache, adapter: Adapter) -> Tensor:
        ids_1S = torch.tensor([list(ids)], device=self.device)
        with only_adapter(self.model, adapter):
            out = self.model(input_ids=ids_1S, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[0, -1]
