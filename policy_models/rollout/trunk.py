"""Layers below the first adapter, run once.

With adapters on the upper layers only, everything below computes the same for policy, reference and critic, before and
after every update. Its output for the tokens of a rollout is kept, and every later forward starts from there.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from plumbline.policy_models.rollout.decoder import ARCHITECTURES


def frozen_layers(model: PreTrainedModel) -> int:
    """Number of layers at the bottom that hold neither an adapter nor a trained weight.

    0 for architectures whose `forward` does more to its embeddings than to hand them to the layers, or whose layers
    differ in their attention mask: those cannot be entered half-way.
    """
    if type(model).__name__ not in ARCHITECTURES:
        return 0
    config: Any = model.config
    if len(set(getattr(config, "layer_types", None) or ["full_attention"])) > 1:
        return 0
    if model.get_input_embeddings().weight.requires_grad:
        return 0
    layers: Any = model.base_model.layers
    for at, layer in enumerate(layers):
        if any("lora_" in name or parameter.requires_grad for name, parameter in layer.named_parameters()):
            return at
    return 0  # nothing is trained at all


@contextmanager
def upper_layers(model: PreTrainedModel, first: int) -> Iterator[None]:
    """Inside, a forward of `inputs_embeds` starts at layer `first`; 0 changes nothing, for any model."""
    if first == 0:
        yield
        return
    with _layers(model, slice(first, None)):
        yield


@torch.no_grad()
def trunk_states(model: PreTrainedModel, num_layers: int, **inputs: Tensor) -> Tensor:
    """Hidden states after the first `num_layers` layers, (B, S, D); inputs as for the model."""
    backbone: Any = model.base_model
    norm = backbone.norm
    backbone.norm = nn.Identity()
    try:
        with _layers(model, slice(0, num_layers)):
            return backbone(use_cache=False, **inputs).last_hidden_state
    finally:
        backbone.norm = norm


@contextmanager
def _layers(model: PreTrainedModel, part: slice) -> Iterator[None]:
    backbone: Any = model.base_model
    layers = backbone.layers
    backbone.layers = layers[part]
    try:
        yield
    finally:
        backbone.layers = layers
