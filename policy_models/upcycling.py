"""Sparse upcycling: a dense checkpoint becomes a Mixture-of-Experts policy that computes the same function.

Each chosen layer gets copies of its MLP as experts (Komatsuzaki et al., arXiv:2212.05055). With the weights of the
chosen experts renormalised to sum to 1, K copies weighted by them are the one MLP they were copied from, whatever the
router says. Nothing else about the model changes, so the logits are equal up to rounding.

Noise on the copies, or re-initialising part of them, would separate the experts at once but needs a healing pre-train
that this project has no tokens for.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from .configuration import MoEPolicyConfig
from .modeling import MoEPolicyForCausalLM

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")

_COPIED_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "tie_word_embeddings",
    "rope_parameters",
    "attention_dropout",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)


def upcycle(
    dense: PreTrainedModel,
    *,
    num_experts: int = 4,
    num_experts_per_tok: int = 2,
    moe_layers: str | int | Sequence[int] = "all",
    router_std: float = 0.02,
    seed: int = 0,
) -> MoEPolicyForCausalLM:
    """A Mixture-of-Experts policy with the function, the dtype and the device of `dense`.

    The logits agree to about 3e-6 of their scale in fp32. While the experts of a layer are identical, its router gets
    no gradient from the language-model loss: every choice gives the same answer. The experts separate because they
    are trained on different tokens; until then only the auxiliary losses move the router.

    Args:
        dense: a causal language model of one of the architectures in `SUPPORTED`. Not changed.
        num_experts: experts in each chosen layer, at least 1.
        num_experts_per_tok: experts a token goes through, 1 to `num_experts`.
        moe_layers: "all", the indices of the layers to convert, or n for every n-th layer counted from the last one
            (the last always gets experts; n = 1 is "all").
        router_std: standard deviation of the router's weights, positive: with equal logits the same experts would
            take every token.
        seed: of the router's weights. The global random state is left alone.

    Raises:
        ValueError: for an architecture or a setting that cannot be converted with the function preserved.
    """
    if router_std <= 0:
        raise ValueError(f"{router_std=} must be positive: with equal logits the same experts take every token")
    config = _moe_config(dense, num_experts=num_experts, num_experts_per_tok=num_experts_per_tok, moe_layers=moe_layers)
    with no_init_weights():  # every weight is set below; `strict` says if one is not
        moe = MoEPolicyForCausalLM._from_config(config, dtype=dense.dtype)
    moe.to(dense.device)
    moe.load_state_dict(_moe_weights(dense, config, router_std, seed), strict=True)
    moe.tie_weights()
    moe.generation_config = dense.generation_config
    return moe.train(dense.training)


def _moe_config(
    dense: PreTrainedModel, *, num_experts: int, num_experts_per_tok: int, moe_layers: str | int | Sequence[int]
) -> MoEPolicyConfig:
    source = dense.config
    if source.model_type not in SUPPORTED or not hasattr(dense, "lm_head"):
        raise ValueError(
            f"{type(dense).__name__} (model_type {source.model_type!r}) cannot be upcycled; "
            f"give a causal language model of type {', '.join(SUPPORTED)}"
        )
    if getattr(source, "mlp_bias", False):
        raise ValueError("mlp_bias=True cannot be upcycled: experts have no bias; use a model without MLP biases")
    window = getattr(source, "sliding_window", None)
    if window is not None:
        raise ValueError(
            f"sliding_window={window} cannot be upcycled: the policy attends to the whole context. If yours never "
            "exceeds the window, set dense.config.sliding_window = None first; the function is then the same"
        )
    bias = bool(getattr(source, "attention_bias", False)) or source.model_type == "qwen2"
    return MoEPolicyConfig(
        **{name: getattr(source, name) for name in _COPIED_FIELDS},
        head_dim=getattr(source, "head_dim", None),  # type: ignore[arg-type]
        attention_bias=bias,
        attention_output_bias=bias and source.model_type != "qwen2",
        qk_norm=source.model_type == "qwen3",
        num_experts=num_experts,
        num_experts_per_tok=num_experts_per_tok,
        moe_layers=_layer_indices(moe_layers, source.num_hidden_layers),
        moe_intermediate_size=source.intermediate_size,
        norm_topk_prob=True,
        dtype=dense.dtype,
    )


def _layer_indices(moe_layers: str | int | Sequence[int], num_layers: int) -> list[int]:
    if moe_layers == "all":
        return list(range(num_layers))
    if isinstance(moe_layers, str):
        raise ValueError(f'{moe_layers=} must be "all", a step, or a list of layer indices')
    if isinstance(moe_layers, int):
        if not 1 <= moe_layers <= num_layers:
            raise ValueError(f"{moe_layers=} as a step must lie between 1 and the {num_layers} layers of the model")
        return list(range(num_layers - 1, -1, -moe_layers))[::-1]
    return sorted(moe_layers)


@torch.no_grad()
def _moe_weights(dense: PreTrainedModel, config: MoEPolicyConfig, router_std: float, seed: int) -> dict[str, Tensor]:
    """The state dict of the policy. Stacks one layer's experts at a time; the rest are references to `dense`."""
    weights = dict(dense.state_dict())
    rng = torch.Generator().manual_seed(seed)
    for layer in config.moe_layers:
        mlp = f"model.layers.{layer}.mlp"
        gate, up, down = (weights.pop(f"{mlp}.{name}_proj.weight") for name in ("gate", "up", "down"))
        weights[f"{mlp}.experts.gate_up_proj"] = torch.cat((gate, up)).expand(config.num_experts, -1, -1)
        weights[f"{mlp}.experts.down_proj"] = down.expand(config.num_experts, -1, -1)
        router = torch.randn(config.num_experts, config.hidden_size, generator=rng) * router_std
        weights[f"{mlp}.gate.weight"] = router.to(down)
    return weights
