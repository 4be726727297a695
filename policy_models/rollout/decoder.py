"""A decoder for Llama-like models that only ever decodes: weights laid out for it, one preallocated cache, no autograd.

What it does that `model.forward` with a growing cache does not:

- q|k|v and gate|up are one GEMM each. On an x86 CPU, weights are packed once into oneDNN's blocked layout, which
  a plain `F.linear` does anew at every call. LoRA stays beside the base weight, unmerged: merging a small delta into
  bf16 rounds it away.
- Prompts of one length run as one block without padding, so that a prompt pays for its own tokens only.
- All rows write the same column of the cache: a row that enters puts its prompt right before that column, wherever
  the others are. So rows come and go without a copy of the cache, and rows of one length need no mask.

Packed weights are copies. They are kept between calls and checked against the weights at each call by a checksum over
every byte: fine-tuning, merging or loading between two calls is always seen. Everywhere else the model's own tensors
are read in place.

T flat tokens, B rows, D width, V vocabulary, H query heads, G key/value heads, C width of a head, S columns of the
cache, N rows that enter, E experts, K experts a token, R LoRA rank.
"""

import math
import platform
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from transformers import PreTrainedModel

from plumbline.policy_models.attention import PACKED

ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "MoEPolicyForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
)
_FIXED_ROPE = ("default", "linear", "llama3", "yarn")  # angles that do not depend on the length of the batch
# Of transformers, which do nothing while decoding, and of FSDP2, which gather weights; where they are not, their type says so.
_IDLE_HOOKS = ("output_capturing_hook", "make_inputs_require_grads", "_pre_forward", "_post_forward")
_ATTENTION_PARTS = {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"}
_PREFILL_TOKENS = 1024  # tokens of one prefill pass; more only pushes the activations out of the CPU's cache
_LAYOUT_ROWS = 64  # batch that the packed layout is chosen for
# Rows to which packed weights are at least as fast as plain ones: bf16 on a Xeon with AMX, fp32 on an EPYC without.
_PACKED_ROWS = {torch.bfloat16: math.inf, torch.float32: 128}


class Decoder:
    """Weights and cache for up to `num_rows` sequences of at most `num_positions` tokens each.

    `prefill` fills rows and `step` adds a token to each; both return the logits of what comes next, which the caller
    samples from. Sequences that are over are given up with `release`; `keep` narrows the batch to the rows in use.

    Args:
        model: one that `supports_fast_path` has nothing against.
        spare_columns: columns of the cache beyond `num_positions`, for rows that enter while others are under way:
            the cache is moved to the front each time the spare ones have been used up.
        dtype: of weights, activations and cache.
    """

    def __init__(
        self, model: PreTrainedModel, *, num_rows: int, num_positions: int, spare_columns: int, dtype: torch.dtype
    ) -> None:
        model = _unwrapped(model)
        config: Any = model.config
        self.device = model.device
        self.dtype = dtype
        self.num_rows = num_rows
        self.column = 0  # next to be written, by all rows

        attention = model.model.layers[0].self_attn
        self._head_dim = attention.head_dim
        self._num_heads = config.num_attention_heads
        self._num_kv_heads = config.num_key_value_heads
        self._scale = attention.scaling
        self._embedding = model.model.embed_tokens.weight
        self._layers = [_Layer(layer, dtype) for layer in model.model.layers]
        self._norm = _Norm(model.model.norm)
        self._head = _Linears([model.lm_head], dtype)
        self._cos_SC, self._sin_SC = _rotary_tables(model, num_positions, dtype)

        shape = (num_rows, self._num_kv_heads, num_positions + spare_columns, self._head_dim)
        # zeros, not empty: columns that no one has written are masked, but 0 * NaN would still be NaN
        self._keys = [torch.zeros(shape, dtype=dtype, device=self.device) for _ in self._layers]
        self._values = [torch.zeros(shape, dtype=dtype, device=self.device) for _ in self._layers]
        self._start_B = torch.zeros(num_rows, dtype=torch.long, device=self.device)  # first column of each row
        self._first = 0  # the smallest start
        self._idle: set[int] = set()  # rows that were given up
        self._mask_B11S: Tensor | None = None
        self._rows_changed = True

    def prefill(self, prompts: Sequence[Sequence[int]], rows: Sequence[int]) -> Tensor:
        """Puts prompt i into row `rows[i]` and returns logits (N, V). Prompts come longest first, none longer than
        what the cache has room for before `column`, which the first call sets to the longest prompt.
        """
        if self.column == 0:
            self.column = len(prompts[0])
        self._idle.difference_update(rows)
        logits = [self._prefill(prompts[part], rows[part]) for part in _parts(prompts)]
        self._rows_changed = True
        return torch.cat(logits)

    def step(self, token_B: Tensor) -> Tensor:
        """Appends one token to every row and returns logits (B, V)."""
        if self._rows_changed:
            self._see_rows()
        if self.column == self._keys[0].shape[2]:
            self._move_to_front()
        position_B = self.column - self._start_B
        cos_B1C, sin_B1C = self._cos_SC[position_B, None], self._sin_SC[position_B, None]
        seen = slice(self._first, self.column + 1)
        mask = None if self._mask_B11S is None else self._mask_B11S[..., seen]

        x_BD = self._embedding[token_B].to(self.dtype)
        for layer, keys, values in zip(self._layers, self._keys, self._values, strict=True):
            qk, v_BGC = self._project(layer, x_BD, cos_B1C, sin_B1C)
            keys[: self.num_rows, :, self.column] = qk[:, self._num_heads :]
            values[: self.num_rows, :, self.column] = v_BGC
            out_BH1C = F.scaled_dot_product_attention(
                qk[:, : self._num_heads, None],
                keys[: self.num_rows, :, seen],
                values[: self.num_rows, :, seen],
                attn_mask=mask,
                scale=self._scale,
                enable_gqa=True,
            )
            x_BD = layer.finish(out_BH1C.reshape(self.num_rows, -1), x_BD)
        self.column += 1
        return self._head(self._norm(x_BD))

    def release(self, rows: Sequence[int]) -> None:
        """Gives up rows. Until they are filled again or left out by `keep` they still go through `step`, idly."""
        self._idle.update(rows)
        self._rows_changed = True

    def keep(self, rows: Sequence[int]) -> list[int]:
        """Narrows the batch to `rows` (ascending), moving as few as possible.

        Returns which old row each new row is.
        """
        count = len(rows)
        staying = {row for row in rows if row < count}
        holes = [row for row in range(count) if row not in staying]
        movers = [row for row in rows if row >= count]
        if holes:
            columns = slice(int(self._start_B[movers].min()), self.column)
            for cache in (*self._keys, *self._values):
                cache[holes, :, columns] = cache[movers, :, columns]
        origin = list(range(count))
        for hole, mover in zip(holes, movers, strict=True):
            origin[hole] = mover
        self._start_B = self._start_B[origin]
        self.num_rows = count
        self._idle.clear()
        self._rows_changed = True
        return origin

    def _prefill(self, prompts: Sequence[Sequence[int]], rows: Sequence[int]) -> Tensor:
        lengths = [len(prompt) for prompt in prompts]
        assert max(lengths) <= self.column
        ids_T = torch.tensor([token for prompt in prompts for token in prompt], device=self.device)
        position_T = torch.cat([torch.arange(length) for length in lengths]).to(self.device)
        cos_T1C, sin_T1C = self._cos_SC[position_T, None], self._sin_SC[position_T, None]
        row_N = torch.tensor(list(rows), device=self.device)
        self._start_B[row_N] = self.column - torch.tensor(lengths, device=self.device)
        blocks = list(_blocks_of_one_length(lengths))

        x_TD = self._embedding[ids_T].to(self.dtype)
        for layer, keys, values in zip(self._layers, self._keys, self._values, strict=True):
            qk, v_TGC = self._project(layer, x_TD, cos_T1C, sin_T1C)
            out_THC = torch.empty_like(qk[:, : self._num_heads])
            for who, tokens, length in blocks:
                query, key, value = (
                    part[tokens].unflatten(0, (-1, length)).transpose(1, 2)  # (rows of the block, heads, length, C)
                    for part in (qk[:, : self._num_heads], qk[:, self._num_heads :], v_TGC)
                )
                columns = slice(self.column - length, self.column)
                keys[row_N[who], :, columns] = key
                values[row_N[who], :, columns] = value
                out = F.scaled_dot_product_attention(
                    query, key, value, is_causal=True, scale=self._scale, enable_gqa=True
                )
                out_THC[tokens] = out.transpose(1, 2).flatten(0, 1)
            x_TD = layer.finish(out_THC.flatten(1), x_TD)
        last_N = torch.tensor(lengths, device=self.device).cumsum(0) - 1
        return self._head(self._norm(x_TD[last_N]))

    def _project(self, layer: "_Layer", x_TD: Tensor, cos_T1C: Tensor, sin_T1C: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys, normed and rotated, as (T, H + G, C), and values (T, G, C)."""
        qkv = layer.qkv(layer.attention_norm(x_TD)).unflatten(-1, (-1, self._head_dim))
        qk = qkv[:, : self._num_heads + self._num_kv_heads]
        if layer.qk_norm is not None:
            qk = layer.qk_norm(qk)
        return torch.addcmul(qk * cos_T1C, qk.roll(self._head_dim // 2, -1), sin_T1C), qkv[:, -self._num_kv_heads :]

    def _see_rows(self) -> None:
        """After rows came, went or moved: which columns are seen at all, and which by whom."""
        starts = [start for row, start in enumerate(self._start_B.tolist()) if row not in self._idle]
        self._first = min(starts)
        self._start_B[list(self._idle)] = self._first  # they see something, and nothing that others do not
        self._mask_B11S = None
        if max(starts) > self._first:
            column_S = torch.arange(self._keys[0].shape[2], device=self.device)
            hidden_BS = column_S < self._start_B[:, None]
            zeros_BS = torch.zeros(hidden_BS.shape, dtype=self.dtype, device=self.device)
            self._mask_B11S = zeros_BS.masked_fill_(hidden_BS, -torch.inf)[:, None, None]
        self._rows_changed = False

    def _move_to_front(self) -> None:
        first = self._first
        assert first > 0, "a row has outgrown num_positions"
        for cache in (*self._keys, *self._values):
            used = cache[: self.num_rows]
            used[:, :, : self.column - first] = used[:, :, first : self.column].clone()
        self._start_B -= first
        self.column -= first
        self._see_rows()


class _Layer:
    def __init__(self, layer: Any, dtype: torch.dtype) -> None:
        attention = layer.self_attn
        self.attention_norm = _Norm(layer.input_layernorm)
        self.qkv = _Linears([attention.q_proj, attention.k_proj, attention.v_proj], dtype)
        self.qk_norm = _HeadNorm(attention, dtype) if hasattr(attention, "q_norm") else None
        self.attention_out = _Linears([attention.o_proj], dtype)
        self.mlp_norm = _Norm(layer.post_attention_layernorm)
        self.mlp = _mlp(layer.mlp, dtype)

    def finish(self, attended_TD: Tensor, x_TD: Tensor) -> Tensor:
        """Everything after the attention: output projection, MLP, both residuals."""
        x_TD = self.attention_out(attended_TD, add=x_TD)
        return self.mlp(self.mlp_norm(x_TD), x_TD)


class _Norm:
    """RMS norm over the last dimension, in fp32 (arXiv:1910.07467)."""

    def __init__(self, norm: Any) -> None:
        self.weight = norm.weight.detach().float()
        self.eps = _eps(norm)

    def __call__(self, x_TD: Tensor) -> Tensor:
        # By hand: torch's CPU rms_norm is a chain of out-of-place steps, 1.3 to 2.7 times slower than this one.
        x32_TD = x_TD.to(torch.float32, copy=True)
        norm_T1 = torch.linalg.vector_norm(x32_TD, dim=-1, keepdim=True)
        scale_T1 = norm_T1.square_().div_(x_TD.shape[-1]).add_(self.eps).rsqrt_()
        return x32_TD.mul_(scale_T1).mul_(self.weight).to(x_TD.dtype)


class _HeadNorm:
    """The RMS norms of query and key heads (Qwen3) in one."""

    def __init__(self, attention: Any, dtype: torch.dtype) -> None:
        counts = [attention.q_proj.out_features, attention.k_proj.out_features]
        weights = [attention.q_norm.weight.detach(), attention.k_norm.weight.detach()]
        self.weight_HC = torch.cat(
            [w.to(dtype).expand(n // attention.head_dim, -1) for w, n in zip(weights, counts, strict=True)]
        )
        self.eps = _eps(attention.q_norm)

    def __call__(self, qk: Tensor) -> Tensor:
        return F.rms_norm(qk, qk.shape[-1:], None, self.eps) * self.weight_HC


class _Linears:
    """Linear layers that read one input, as one GEMM; their outputs come side by side.

    LoRA adds (x A^T) B^T with the A of all layers stacked and B block-diagonal, scaling folded in.
    """

    def __init__(self, linears: Sequence[nn.Module], dtype: torch.dtype) -> None:
        bases = [_base_linear(linear) for linear in linears]
        weights = [base.weight.detach() for base in bases]
        biases = [base.bias for base in bases]
        self.bias: Tensor | None = None
        if any(bias is not None for bias in biases):
            self.bias = torch.cat(
                [w.new_zeros(len(w)) if b is None else b.detach() for w, b in zip(weights, biases, strict=True)]
            ).to(dtype)
        self.packed = _pack(bases[0], weights, dtype) if _packing_pays(weights[0], dtype) else None
        self.packed_rows = 0 if self.packed is None else _PACKED_ROWS[dtype]
        self.weights = [] if self.packed_rows == math.inf else [weight.to(dtype) for weight in weights]
        self.lora = _stacked_lora(linears, dtype)

    def __call__(self, x_TD: Tensor, add: Tensor | None = None) -> Tensor:
        """All outputs (T, sum of widths), plus `add` if given."""
        if self.packed is not None and len(x_TD) <= self.packed_rows:
            y = _packed_linear(x_TD, self.packed, self.bias, add)
        else:
            parts = [F.linear(x_TD, weight) for weight in self.weights]
            y = torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]
            y = y if self.bias is None else y + self.bias
            y = y if add is None else y + add
        if self.lora is not None:
            a_RD, b_RO = self.lora
            y.addmm_(F.linear(x_TD, a_RD), b_RO)
        return y


def _stacked_lora(linears: Sequence[nn.Module], dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """(A, B^T) over the active adapters of all the layers, (R, D) and (R, outputs side by side)."""
    a_parts, b_parts = [], []
    widths = [_base_linear(linear).out_features for linear in linears]
    for at, linear in enumerate(linears):
        for a_RD, b_OR, scaling in _active_lora(linear):
            before, after = sum(widths[:at]), sum(widths[at + 1 :])
            a_parts.append(a_RD)
            b_parts.append(F.pad(b_OR.float().T * scaling, (before, after)))
    if not a_parts:
        return None
    return torch.cat(a_parts).to(dtype), torch.cat(b_parts).to(dtype)


def _active_lora(linear: Any) -> Iterator[tuple[Tensor, Tensor, float]]:
    if type(linear) is nn.Linear or linear.disable_adapters or linear.merged:
        return
    for name in linear.active_adapters:
        if name in linear.lora_A:
            a_RD, b_OR = linear.lora_A[name].weight, linear.lora_B[name].weight
            yield a_RD.detach(), b_OR.detach(), linear.scaling[name]


def _mlp(mlp: Any, dtype: torch.dtype) -> Callable[[Tensor, Tensor], Tensor]:
    if not hasattr(mlp, "experts"):
        return _DenseMLP(mlp, dtype)
    plain = isinstance(getattr(mlp.experts, "gate_up_proj", None), nn.Parameter) and not hasattr(mlp, "shared_expert")
    if plain and _packing_pays(mlp.experts.gate_up_proj, dtype):
        return _PackedExperts(mlp, dtype)
    return _ModuleMLP(mlp, dtype)


class _DenseMLP:
    """down(act(gate(x)) * up(x)) + residual (arXiv:2002.05202)."""

    def __init__(self, mlp: Any, dtype: torch.dtype) -> None:
        self.gate_up = _Linears([mlp.gate_proj, mlp.up_proj], dtype)
        self.down = _Linears([mlp.down_proj], dtype)
        self.act = mlp.act_fn

    def __call__(self, x_TD: Tensor, residual_TD: Tensor) -> Tensor:
        gate, up = self.gate_up(x_TD).chunk(2, dim=-1)
        return self.down(self.act(gate) * up, add=residual_TD)


class _PackedExperts:
    """The same arithmetic as `grouped_experts_forward`, a packed GEMM an expert. The router is called as it is."""

    def __init__(self, mlp: Any, dtype: torch.dtype) -> None:
        experts = mlp.experts
        self.router = mlp.gate
        self.act = experts.act_fn
        self.gate_up = [_pack(experts, [w], dtype, ("up", e)) for e, w in enumerate(experts.gate_up_proj.detach())]
        self.down = [_pack(experts, [w], dtype, ("down", e)) for e, w in enumerate(experts.down_proj.detach())]

    def __call__(self, x_TD: Tensor, residual_TD: Tensor) -> Tensor:
        _, weights_TK, indices_TK = self.router(x_TD)
        top_k = indices_TK.shape[1]
        slots = indices_TK.flatten()
        perm = slots.argsort(stable=True)
        counts = slots.bincount(minlength=len(self.down)).tolist()
        parts = []
        for expert, x_ND in enumerate(x_TD[perm // top_k].split(counts)):
            if len(x_ND):
                gate, up = _packed_linear(x_ND, self.gate_up[expert]).chunk(2, dim=-1)
                parts.append(_packed_linear(self.act(gate) * up, self.down[expert]))
        y_ND = torch.cat(parts)
        y_TKD = torch.empty_like(y_ND).index_copy_(0, perm, y_ND).unflatten(0, (-1, top_k))
        return residual_TD + (y_TKD * weights_TK[..., None]).sum(1).to(x_TD.dtype)


class _ModuleMLP:
    """The module itself, where there is nothing to gain or adapters sit on its experts."""

    def __init__(self, mlp: nn.Module, dtype: torch.dtype) -> None:
        self.mlp = mlp
        self.dtype = dtype
        self.needs_cast = any(p.dtype != dtype for p in mlp.parameters())

    def __call__(self, x_TD: Tensor, residual_TD: Tensor) -> Tensor:
        with torch.autocast(x_TD.device.type, dtype=self.dtype, enabled=self.needs_cast):
            return residual_TD + self.mlp(x_TD[None])[0].to(x_TD.dtype)


# Packed copies by the module that owns the first weight: {slot: (fingerprint, packed)}.
_PACKED: WeakKeyDictionary[nn.Module, dict[Any, tuple[Any, Tensor]]] = WeakKeyDictionary()


def _packing_pays(weight: Tensor, dtype: torch.dtype) -> bool:
    return bool(
        weight.device.type == "cpu"
        and dtype in _PACKED_ROWS
        and platform.machine() in ("x86_64", "AMD64")
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and (dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def _pack(owner: nn.Module, weights: Sequence[Tensor], dtype: torch.dtype, slot: Any = None) -> Tensor:
    """The weights, stacked, in oneDNN's layout: the copy made earlier if no byte has changed since."""
    copies = _PACKED.setdefault(owner, {})
    fingerprint = [dtype, *map(_fingerprint, weights)]
    known = copies.get(slot)
    if known is None or known[0] != fingerprint:
        stacked = torch.cat([weight.to(dtype) for weight in weights])
        known = copies[slot] = fingerprint, _reorder(stacked)
    return known[1]


def _reorder(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight, _LAYOUT_ROWS)


def _fingerprint(weight: Tensor) -> tuple[Any, ...]:
    """Changes with any byte. `_version` alone would miss writes through `.data`, which PEFT and DeepSpeed do."""
    bits = weight.contiguous().view(-1)
    bits = bits.view(torch.int64 if bits.nbytes % 8 == 0 and bits.data_ptr() % 8 == 0 else torch.int16)
    version = None if weight.is_inference() else weight._version
    return weight.data_ptr(), weight.shape, version, int(bits.sum(dtype=torch.int64))


def _packed_linear(x_TD: Tensor, packed: Tensor, bias: Tensor | None = None, add: Tensor | None = None) -> Tensor:
    if add is None:
        return torch.ops.mkldnn._linear_pointwise(x_TD, packed, bias, "none", [], "")
    return torch.ops.mkldnn._linear_pointwise.binary(x_TD, add, packed, bias, "add")


def _rotary_tables(model: Any, num_positions: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin, (positions, C), the sign of the half turn in sin: rotating is x * cos + roll(x) * sin."""
    position_ids = torch.arange(num_positions, device=model.device)[None]
    like = torch.empty(0, dtype=dtype, device=model.device)
    cos_SC, sin_SC = (table[0].clone() for table in model.model.rotary_emb(like, position_ids=position_ids))
    sin_SC[:, : sin_SC.shape[1] // 2].neg_()
    return cos_SC, sin_SC


def _parts(prompts: Sequence[Sequence[int]]) -> Iterator[slice]:
    """Consecutive prompts of together at most `_PREFILL_TOKENS` tokens (a longer one goes alone)."""
    start, tokens = 0, 0
    for at, prompt in enumerate(prompts):
        if at > start and tokens + len(prompt) > _PREFILL_TOKENS:
            yield slice(start, at)
            start, tokens = at, 0
        tokens += len(prompt)
    yield slice(start, len(prompts))


def _blocks_of_one_length(lengths: Sequence[int]) -> Iterator[tuple[slice, slice, int]]:
    """(prompts, flat tokens, length) of each run of equal lengths."""
    prompt, token = 0, 0
    for length, run in groupby(lengths):
        count = len(list(run))
        yield slice(prompt, prompt + count), slice(token, token + count * length), length
        prompt, token = prompt + count, token + count * length


def compute_dtype(model: Any) -> torch.dtype:
    """What a forward pass would compute in here: the autocast type where autocast is on, else that of the weights."""
    if torch.is_autocast_enabled(model.device.type):
        return torch.get_autocast_dtype(model.device.type)
    return model.get_input_embeddings().weight.dtype


def supports_fast_path(model: nn.Module, num_positions: int = 0) -> str | None:
    """None where `Decoder` computes what `model.forward` does, else the reason why it might not.

    Args:
        num_positions: tokens of the longest prompt and its answer; sliding windows matter from some number on.
    """
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        return "prompt-learning adapters put tokens before the prompt"
    model = _unwrapped(model)
    if type(model).__name__ not in ARCHITECTURES:
        return f"{type(model).__name__} is not one of {', '.join(ARCHITECTURES)}"
    return _config_problem(model.config, num_positions) or _modules_problem(model)


def _config_problem(config: Any, num_positions: int) -> str | None:
    rope_type = (config.rope_parameters or {}).get("rope_type", "default")
    if rope_type not in _FIXED_ROPE:
        return f"rope_type {rope_type!r} depends on the length of the sequence"
    window = getattr(config, "sliding_window", None)
    slides = "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
    if window is not None and slides and num_positions > window:
        return f"{num_positions} positions do not fit the sliding window of {window}"
    if getattr(config, "attention_pattern", "full") != "full":
        return f"attention pattern {config.attention_pattern!r} has masks of its own"
    attention = config._attn_implementation
    if attention not in ("eager", "sdpa", PACKED) and "flash" not in attention:
        return f"attention implementation {attention!r} may not be plain causal attention"
    return None


def _modules_problem(model: Any) -> str | None:
    for name, module in model.named_modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if any(getattr(hook, "__name__", "") not in _IDLE_HOOKS for hook in hooks):
            return f"{name or 'the model'} has a forward hook"
        if "forward" in vars(module):
            return f"the forward of {name or 'the model'} was replaced (mixed precision of accelerate: unwrap it first)"
    if len({parameter.device for parameter in model.parameters()}) > 1:
        return "the parameters are on several devices"
    for name, parameter in model.named_parameters():
        if parameter.dim() and 0 in parameter.stride() and parameter.numel() > 1:
            return f"{name} is packed in few bits"
        if type(parameter) is not nn.Parameter or not parameter.is_floating_point():
            return f"{name} is a {type(parameter).__name__} of {parameter.dtype}: sharded or quantised"
    if type(model.model.embed_tokens) is not nn.Embedding:
        return f"embed_tokens is a {type(model.model.embed_tokens).__name__}"
    linears, norms = [("lm_head", model.lm_head)], [model.model.norm]
    for layer in model.model.layers:
        parts = dict(layer.self_attn.named_children())
        if parts.keys() - _ATTENTION_PARTS:
            return f"the attention has {', '.join(parts.keys() - _ATTENTION_PARTS)}"
        linears += [(name, part) for name, part in parts.items() if name.endswith("_proj")]
        linears += [(name, part) for name, part in layer.mlp.named_children() if name.endswith("_proj")]
        norms += [layer.input_layernorm, layer.post_attention_layernorm]
        norms += [part for name, part in parts.items() if name.endswith("_norm")]
    if any("weight" not in norm._parameters for norm in norms):
        return "a norm has an adapter"
    return next((f"{name} {problem}" for name, part in linears if (problem := _linear_problem(part))), None)


def _linear_problem(linear: nn.Module) -> str | None:
    if type(linear) is nn.Linear:
        return None
    if type(linear) is not LoraLinear or type(linear.base_layer) is not nn.Linear:
        return f"is a {type(linear).__name__}, not a linear layer with or without LoRA"
    if linear.lora_variant or linear.fan_in_fan_out or any(linear.lora_bias.values()):
        return "has a variant of LoRA"
    if linear.disable_adapters and linear.merged:
        return "has an adapter that is merged and switched off at once"
    return None


def _unwrapped(model: Any) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _base_linear(linear: Any) -> Any:
    return linear.base_layer if isinstance(linear, LoraLinear) else linear


def _eps(norm: Any) -> float:
    return norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
