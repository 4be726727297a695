"""Sparse upcycling: a dense checkpoint becomes a Mixture-of-Experts policy that computes the same function.

Each chosen layer gets copies of its MLP as experts (Komatsuzaki et al., arXiv:2212.05055). With the weights of the
chosen experts renormalised to sum to 1, K copies weighted by them are the one MLP they were copied from, whatever the
router says. Nothing else about the model changes, so the logits are equal up to rounding.

Two other ways keep the function too. Fine-grained experts are slices of the MLP (virtual groups, arXiv:2410.07524): the
router has equal rows for the slices of one copy, so that a token gets whole copies, and weights are multiplied by the
number of slices. And a shared expert that is the MLP, beside routed copies that start silent (their `down_proj` is 0).

Noise separates the copies at once and costs function: `kl_from_dense` says how much. Re-initialising part of them
(arXiv:2502.19261) needs a healing pre-train that this project has no tokens for.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from plumbline.policy_models.configuration import MoEPolicyConfig
from plumbline.policy_models.modeling import MoEPolicyForCausalLM

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
    granularity: int = 1,
    shared_expert: bool = False,
    noise: float = 0.0,
    router_std: float = 0.02,
    seed: int = 0,
    **config_options: Any,
) -> MoEPolicyForCausalLM:
    """A Mixture-of-Experts policy with the function, the dtype and the device of `dense`.

    The logits agree to about 3e-6 of their scale in fp32. While the experts of a layer are identical, its router gets
    no gradient from the language-model loss: every choice gives the same answer. The experts separate because they
    are trained on different tokens; until then only the auxiliary losses move the router.

    Args:
        dense: a causal language model of one of the architectures in `SUPPORTED`. Not changed.
        num_experts: experts in each chosen layer, at least 1; slices of all copies with `granularity`.
        num_experts_per_tok: experts a token goes through, 1 to `num_experts`.
        moe_layers: "all", the indices of the layers to convert, or n for every n-th layer counted from the last one
            (the last always gets experts; n = 1 is "all").
        granularity: slices that each copy of the MLP is cut into. Divides `num_experts`, `num_experts_per_tok` and the
            MLP's width. Training unties the slices of a copy, and then a token may get parts of several.
        shared_expert: the MLP stays as a shared expert, and routed copies start silent.
        noise: standard deviation of what is added to the experts' weights, over that of the weights; 0 keeps the
            function.
        router_std: standard deviation of the router's weights, positive: with equal logits the same experts would
            take every token.
        seed: of the router's weights and the noise. The global random state is left alone.
        config_options: other fields of `MoEPolicyConfig`, such as `router`, `expert_groups` or `attention_gate`. An
            attention pattern preserves the function for what its window covers.

    Raises:
        ValueError: for an architecture or a setting that cannot be converted with the function preserved.
    """
    if router_std <= 0:
        raise ValueError(f"{router_std=} must be positive: with equal logits the same experts take every token")
    if noise < 0:
        raise ValueError(f"{noise=} must not be negative; 0 keeps the function of the dense model")
    _check_source(dense)
    width = dense.config.intermediate_size
    for name, size in (
        ("num_experts", num_experts),
        ("num_experts_per_tok", num_experts_per_tok),
        ("MLP width", width),
    ):
        if granularity < 1 or size % granularity:
            raise ValueError(f"{granularity=} must be at least 1 and divide {name}={size}: slices come in whole copies")
    if granularity > 1 and config_options.get("router", "softmax") not in ("softmax", "sigmoid"):
        raise ValueError(f"{granularity=} needs router softmax or sigmoid: the others may pick parts of a copy")
    config = _moe_config(
        dense,
        num_experts=num_experts,
        num_experts_per_tok=num_experts_per_tok,
        moe_layers=_layer_indices(moe_layers, dense.config.num_hidden_layers),
        moe_intermediate_size=width // granularity,
        routed_scaling_factor=float(granularity),
        shared_expert_intermediate_size=width if shared_expert else 0,
        **config_options,
    )
    with no_init_weights():  # every weight is set below; `strict` says if one is not
        moe = MoEPolicyForCausalLM._from_config(config, dtype=dense.dtype)
    moe.to(dense.device)
    rng = torch.Generator().manual_seed(seed)
    weights = _moe_weights(dense, config, granularity, noise, router_std, rng)
    weights |= _new_weights(moe, weights, router_std, rng)
    moe.load_state_dict(weights, strict=True)
    moe.tie_weights()
    moe.generation_config = dense.generation_config
    return moe.train(dense.training)


@torch.no_grad()
def kl_from_dense(dense: PreTrainedModel, moe: PreTrainedModel, ids: Tensor) -> float:
    """Mean over the tokens of `ids` (B, S) of KL(dense || moe) in nats: what upcycling cost. 0 is the same function."""
    want, got = (F.log_softmax(model(ids).logits.float(), dim=-1) for model in (dense, moe))
    return F.kl_div(got, want, log_target=True, reduction="none").sum(-1).mean().item()


def _check_source(dense: PreTrainedModel) -> None:
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


def _moe_config(dense: PreTrainedModel, **options: Any) -> MoEPolicyConfig:
    source = dense.config
    bias = bool(getattr(source, "attention_bias", False)) or source.model_type == "qwen2"
    return MoEPolicyConfig(
        **{name: getattr(source, name) for name in _COPIED_FIELDS},
        head_dim=getattr(source, "head_dim", None),  # type: ignore[arg-type]
        attention_bias=bias,
        attention_output_bias=bias and source.model_type != "qwen2",
        qk_norm=source.model_type == "qwen3",
        norm_topk_prob=True,
        dtype=dense.dtype,
        **options,
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
def _moe_weights(
    dense: PreTrainedModel,
    config: MoEPolicyConfig,
    granularity: int,
    noise: float,
    router_std: float,
    rng: torch.Generator,
) -> dict[str, Tensor]:
    """What comes from `dense`, and the routers. Stacks one layer's experts at a time; the rest are references."""
    weights = dict(dense.state_dict())
    num_copies = config.num_experts // granularity
    for layer in config.moe_layers:
        mlp = f"model.layers.{layer}.mlp"
        gate, up, down = (weights.pop(f"{mlp}.{name}_proj.weight") for name in ("gate", "up", "down"))
        if config.shared_expert_intermediate_size:
            for name, weight in (("gate", gate), ("up", up), ("down", down)):
                weights[f"{mlp}.shared_expert.{name}_proj.weight"] = weight
        # expert copy * granularity + slice
        sliced = [torch.cat(part) for part in zip(gate.chunk(granularity), up.chunk(granularity), strict=True)]
        gate_up = _copies(torch.stack(sliced), num_copies)
        downs = _copies(torch.stack(down.chunk(granularity, dim=1)), num_copies)
        if config.shared_expert_intermediate_size:
            downs = torch.zeros_like(downs)
        weights[f"{mlp}.experts.gate_up_proj"] = _noisy(gate_up, noise, rng)
        weights[f"{mlp}.experts.down_proj"] = _noisy(downs, noise, rng)
        router = torch.randn(num_copies, config.hidden_size, generator=rng) * router_std
        weights[f"{mlp}.gate.weight"] = router.repeat_interleave(granularity, dim=0).to(down)
    return weights


def _copies(slices: Tensor, count: int) -> Tensor:
    # whole copies as a view: one layer's experts exist once until the model takes them
    return slices.expand(count, -1, -1) if len(slices) == 1 else slices.repeat(count, 1, 1)


def _noisy(weight: Tensor, noise: float, rng: torch.Generator) -> Tensor:
    if noise == 0:
        return weight
    drawn = torch.randn(weight.shape, generator=rng).to(weight.device)
    return (weight.float() + noise * weight.float().std() * drawn).to(weight.dtype)


# New parts that are the identity at zero.
_STARTS_AT_ZERO = ("gate.refine", "e_score_correction_bias", "shared_expert_gate", "g_proj", "selector.fusion")


def _new_weights(
    moe: MoEPolicyForCausalLM, known: dict[str, Tensor], std: float, rng: torch.Generator
) -> dict[str, Tensor]:
    """Of everything that a dense model has no counterpart for."""
    new = {}
    for name, weight in moe.state_dict().items():
        if name in known or name == "lm_head.weight":  # the head is tied where `dense` does not list it
            continue
        if any(part in name for part in _STARTS_AT_ZERO):
            new[name] = torch.zeros_like(weight)
        elif name.endswith("load_E"):
            new[name] = torch.full_like(weight, 1 / len(weight))
        else:
            new[name] = (torch.randn(weight.shape, generator=rng) * std).to(weight)
    return new
