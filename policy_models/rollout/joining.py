"""A decoder that sequences join and leave between two steps, each under the adapter that it asks for.

`Decoder` fills whole prompts into rows of its cache. Here a prompt is read beside the cache, in as many chunks as its reader
likes, while other rows go on decoding (`stage`, `extend`); only then does it take a row (`admit`). What is staged may
start from the keys and values of a prefix that was read before. Rows are kept dense: who leaves makes room for the last one
(`keep`), so that a step costs what its sequences cost and not what the cache could hold.

Adapters share the base weights. A step runs all rows through the base together, and each adapter adds its product to its
own rows only.

T flat tokens, B rows, V vocabulary, G key/value heads, H query heads, C width of a head, D width, R LoRA rank.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from plumbline.policy_models.rollout.decoder import Decoder, _DenseMLP, _Linears, _stacked_lora, _unwrapped

Adapter = str | None  # None: the base model
_PAD_TO = 16  # tokens read at a time, filled up: on a CPU oneDNN compiles a product anew for every number of rows


@dataclass(eq=False)
class Prefix:
    """Keys and values, (G, len(ids), C) a layer, of tokens that were read under one adapter."""

    ids: list[int]
    adapter: Adapter
    keys: list[Tensor]
    values: list[Tensor]


@dataclass(eq=False)
class Staged:
    """A prompt that is being read: `done` of its tokens have keys and values. `of` is the decoder's own."""

    ids: list[int]
    adapter: Adapter
    done: int = 0
    reused: int = 0  # of `done`, those that came from a prefix
    of: Any = field(default=None, repr=False)


class JoiningDecoder(Decoder):
    """Weights and cache for up to `max_rows` sequences of at most `num_positions` tokens, none of them there yet.

    Args:
        model: one that `supports_fast_path` has nothing against, with all its adapters loaded.
        adapters: names of those that rows may ask for.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        max_rows: int,
        num_positions: int,
        dtype: torch.dtype,
        adapters: Sequence[str] = (),
    ) -> None:
        spare = max(64, num_positions // 4)
        with only_adapter(model, None):
            super().__init__(
                model, num_rows=max_rows, num_positions=num_positions, spare_columns=spare, dtype=dtype
            )  # fmt: skip
        self.max_rows, self.num_positions = max_rows, num_positions
        self._groups = _Groups()
        _split_by_adapter(self, _unwrapped(model), adapters, self._groups)
        self.num_rows = 0
        self._start_B = self._start_B[:0]
        self._adapters: list[Adapter] = []  # by row

    # -------------------------------------------------------------------------------------------------- beside the cache

    def stage(
        self, ids: Sequence[int], adapter: Adapter = None, prefix: Prefix | None = None, shared: int = 0
    ) -> Staged:
        """A prompt to be read. Its first `shared` tokens are those of `prefix` and are copied; at least one is left to read."""
        assert 0 <= shared < len(ids) <= self.num_positions
        shape = (self._num_kv_heads, len(ids), self._head_dim)
        room = [[torch.empty(shape, dtype=self.dtype, device=self.device) for _ in self._layers] for _ in range(2)]
        staged = Staged(list(ids), adapter, done=shared, reused=shared, of=room)
        if prefix is not None and shared:
            assert prefix.adapter == adapter
            for mine, theirs in zip(room, (prefix.keys, prefix.values), strict=True):
                for to, source in zip(mine, theirs, strict=True):
                    to[:, :shared] = source[:, :shared]
        return staged

    def extend(self, work: Sequence[tuple[Staged, int]]) -> list[Tensor | None]:
        """Reads the next n tokens of each; logits (V,) after the last token of those that are then done, else None."""
        spans = [(staged, slice(staged.done, staged.done + n)) for staged, n in work]
        padding = -sum(n for _, n in work) % _PAD_TO
        ids = [token for staged, span in spans for token in staged.ids[span]] + [0] * padding
        ids_T = torch.tensor(ids, device=self.device)
        positions = [torch.arange(span.start, span.stop) for _, span in spans]
        position_T = torch.cat([*positions, torch.zeros(padding, dtype=torch.long)]).to(self.device)
        cos_T1C, sin_T1C = self._cos_SC[position_T, None], self._sin_SC[position_T, None]
        ends = torch.tensor([n for _, n in work]).cumsum(0).tolist()
        tokens = [slice(end - n, end) for end, (_, n) in zip(ends, work, strict=True)]
        adapters = [s.adapter for s, n in work for _ in range(n)]
        self._groups.set(adapters + adapters[-1:] * padding, self.device)

        x_TD = self._embedding[ids_T].to(self.dtype)
        for at, layer in enumerate(self._layers):
            qk, v_TGC = self._project(layer, x_TD, cos_T1C, sin_T1C)
            out_THC = torch.zeros_like(qk[:, : self._num_heads])
            for (staged, span), mine in zip(spans, tokens, strict=True):
                keys, values = (store[at] for store in staged.of)
                keys[:, span] = qk[mine, self._num_heads :].transpose(0, 1)
                values[:, span] = v_TGC[mine].transpose(0, 1)
                query = qk[mine, : self._num_heads].transpose(0, 1)[None]
                out = self._attend_chunk(query, keys[None, :, : span.stop], values[None, :, : span.stop], span.start)
                out_THC[mine] = out[0].transpose(0, 1)
            x_TD = layer.finish(out_THC.flatten(1), x_TD)
        for staged, span in spans:
            staged.done = span.stop
        over = [place for place, (staged, _) in enumerate(work) if staged.done == len(staged.ids)]
        logits: list[Tensor | None] = [None] * len(work)
        if over:
            self._groups.set([work[place][0].adapter for place in over], self.device)
            last = torch.tensor([ends[place] - 1 for place in over], device=self.device)
            for place, row_V in zip(over, self._head(self._norm(x_TD[last])), strict=True):
                logits[place] = row_V
        return logits

    def _attend_chunk(self, query: Tensor, keys: Tensor, values: Tensor, before: int) -> Tensor:
        """A chunk looks at the `before` tokens ahead of it and, causally, at itself."""
        length = query.shape[2]
        mask = None
        if before and length > 1:
            mask = torch.ones(length, before + length, dtype=torch.bool, device=self.device).tril(before)
        causal = mask is None and length > 1
        return F.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, is_causal=causal, scale=self._scale, enable_gqa=True
        )

    def prefix_of(self, staged: Staged) -> Prefix:
        """What a staged prompt, read to its end, leaves for others. Shares its memory; nothing writes there any more."""
        keys, values = staged.of
        return Prefix(staged.ids, staged.adapter, keys, values)

    # ------------------------------------------------------------------------------------------------------------- rows

    def admit(self, staged: Sequence[Staged]) -> None:
        """Gives each prompt, read to its end, a row behind those in use. The same prompt may enter several times."""
        assert self.num_rows + len(staged) <= self.max_rows
        if not staged:
            return
        longest = max(len(one.ids) for one in staged)
        if self.num_rows == 0:
            self.column = longest
        elif longest > self.column:
            self._move_right(longest - self.column)
        rows = range(self.num_rows, self.num_rows + len(staged))
        starts = torch.tensor([self.column - len(one.ids) for one in staged], device=self.device)
        self._start_B = torch.cat([self._start_B, starts])
        for row, one in zip(rows, staged, strict=True):
            columns = slice(self.column - len(one.ids), self.column)
            for cache, source in zip((self._keys, self._values), one.of, strict=True):
                for layer, read in zip(cache, source, strict=True):
                    layer[row, :, columns] = read
        self._adapters += [one.adapter for one in staged]
        self.num_rows += len(staged)
        self._rows_changed = True

    def step(self, token_B: Tensor) -> Tensor:
        """Appends one token to every row and returns logits (B, V)."""
        self._groups.set(self._adapters, self.device)
        return super().step(token_B)

    def keep(self, rows: Sequence[int]) -> list[int]:
        """Narrows the batch to `rows` (ascending); returns which old row each new row is."""
        origin = super().keep(rows)
        self._adapters = [self._adapters[row] for row in origin]
        return origin

    def copy_row(self, row: int, ids: Sequence[int]) -> Prefix:
        """A copy of the keys and values of a row's first tokens, which are `ids`."""
        start = int(self._start_B[row])
        columns = slice(start, start + len(ids))
        assert columns.stop <= self.column
        keys, values = ([layer[row, :, columns].clone() for layer in cache] for cache in (self._keys, self._values))
        return Prefix(list(ids), self._adapters[row], keys, values)

    def _move_right(self, by: int) -> None:
        """Makes room for a prompt that is longer than everything before the column."""
        first = int(self._start_B.min())
        for cache in (*self._keys, *self._values):
            used = cache[: self.num_rows]
            used[:, :, first + by : self.column + by] = used[:, :, first : self.column].clone()
        self._start_B = self._start_B + by
        self.column += by


# Adapters by row


class _Groups:
    """Which of the rows at hand are whose: [(adapter, their places, or None for all of them)]."""

    def __init__(self) -> None:
        self.now: list[tuple[Adapter, Tensor | None]] = [(None, None)]

    def set(self, adapters: Sequence[Adapter], device: torch.device) -> None:
        names = list(dict.fromkeys(adapters))
        if len(names) <= 1:
            self.now = [(name, None) for name in names]
            return
        self.now = [
            (name, torch.tensor([at for at, other in enumerate(adapters) if other == name], device=device))
            for name in names
        ]


class _RowLinears:
    """`_Linears`, and on the rows of each adapter its product x A^T B^T."""

    def __init__(self, base: _Linears, loras: dict[str, tuple[Tensor, Tensor]], groups: _Groups) -> None:
        self.base, self.loras, self.groups = base, loras, groups

    def __call__(self, x_TD: Tensor, add: Tensor | None = None) -> Tensor:
        y = self.base(x_TD, add)
        for name, places in self.groups.now:
            if name is None or name not in self.loras:
                continue
            a_RD, b_RO = self.loras[name]
            if places is None:
                y.addmm_(F.linear(x_TD, a_RD), b_RO)
            else:
                y.index_add_(0, places, F.linear(x_TD[places], a_RD) @ b_RO)
        return y


class _RowModule:
    """An MLP with adapters inside it (on experts or the router): called once a group, with that adapter on."""

    def __init__(self, call: Callable[[Tensor, Tensor], Tensor], mlp: nn.Module, groups: _Groups) -> None:
        self.call, self.mlp, self.groups = call, mlp, groups

    def __call__(self, x_TD: Tensor, residual_TD: Tensor) -> Tensor:
        if len(self.groups.now) == 1:
            with only_adapter(self.mlp, self.groups.now[0][0]):
                return self.call(x_TD, residual_TD)
        out_TD = torch.empty_like(residual_TD)
        for name, places in self.groups.now:
            with only_adapter(self.mlp, name):
                out_TD[places] = self.call(x_TD[places], residual_TD[places])
        return out_TD


def _split_by_adapter(decoder: Any, model: Any, adapters: Sequence[str], groups: _Groups) -> None:
    """Puts the adapters beside the base weights that the decoder has laid out."""

    def by_row(base: _Linears, linears: Sequence[nn.Module]) -> Any:
        loras = {}
        for name in adapters:
            with only_adapter(nn.ModuleList(linears), name):
                lora = _stacked_lora(linears, decoder.dtype)
            if lora is not None:
                loras[name] = lora
        return _RowLinears(base, loras, groups) if loras else base

    for layer, module in zip(decoder._layers, model.model.layers, strict=True):
        attention, mlp = module.self_attn, module.mlp
        layer.qkv = by_row(layer.qkv, [attention.q_proj, attention.k_proj, attention.v_proj])
        layer.attention_out = by_row(layer.attention_out, [attention.o_proj])
        if isinstance(layer.mlp, _DenseMLP):
            layer.mlp.gate_up = by_row(layer.mlp.gate_up, [mlp.gate_proj, mlp.up_proj])
            layer.mlp.down = by_row(layer.mlp.down, [mlp.down_proj])
        elif any(isinstance(part, BaseTunerLayer) for part in mlp.modules()):
            layer.mlp = _RowModule(layer.mlp, mlp, groups)
    decoder._head = by_row(decoder._head, [model.lm_head])


@contextmanager
def only_adapter(model: nn.Module, adapter: Adapter) -> Iterator[None]:
    """One adapter on in every layer that has it, or all off; every layer is put back as it was.

    PEFT's own `set_adapter` also changes which weights require gradients, and `disable_adapter` switches all back on after
    itself: neither can be used in the midst of somebody else's decoding.
    """
    layers: list[Any] = [m for m in model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    before = [(layer._active_adapter, layer._disable_adapters) for layer in layers]
    try:
        for layer in layers:
            if adapter is not None:
                layer._active_adapter = [adapter]
            layer._disable_adapters = adapter is None
        yield
    finally:
        for layer, (active, disabled) in zip(layers, before, strict=True):
            layer._active_adapter, layer._disable_adapters = active, disabled
