"""Configuration of the Mixture-of-Experts policy: a Llama-like decoder in which chosen layers have experts.

The defaults have the sizes of SmolLM2-135M with four experts a layer. Field names follow transformers' Qwen3-MoE where
the two mean the same thing, so that tools which read configs (TRL, PEFT, vLLM-type loaders) find what they look for.
"""

from typing import Any, ClassVar

from transformers import PreTrainedConfig

ROUTER_NAMES = ["softmax", "sigmoid", "capacity", "progressive", "grouped"]  # router.py: `register_router` adds one


class MoEPolicyConfig(PreTrainedConfig):
    """Sizes and routing of a `MoEPolicyModel`.

    Args:
        attention_bias: a bias on the query, key and value projections (Qwen2 and Llama with `attention_bias`).
        attention_output_bias: a bias on the output projection (Llama with `attention_bias`).
        qk_norm: RMS norm over each head of queries and keys before the rotation (Qwen3).
        attention_gate: each head's output times 2 sigmoid(g(x)), 1 at first (after arXiv:2505.06708).
        attention_pattern: "full", "sparse" or "local_global"; see policy_models/patterns.py.
        attention_window: positions, its own included, that a token sees under the other two patterns.
        attention_globals: tokens outside the window that "sparse" chooses for each query.
        attention_index_heads: heads of the scorer that chooses them.
        attention_stride: every position that is a multiple of it is global under "local_global".
        num_experts: experts in each layer that has experts.
        num_experts_per_tok: experts that each token goes through, 1 to `num_experts`.
        moe_layers: indices of the layers with experts; None is all. The others keep a dense MLP of `intermediate_size`.
        moe_intermediate_size: inner width of one expert; None takes `intermediate_size`.
        norm_topk_prob: divide the weights of the chosen experts by their sum, so that they add up to 1. Upcycling
            preserves the function of the dense model only with this on.
        routed_scaling_factor: what the weights of the chosen experts are multiplied by after that. Fine-grained experts
            (slices of an MLP) take the number of slices, which upcycling sets.
        shared_expert_intermediate_size: inner width of a shared expert that serves every token; 0 is none.
        router: "softmax", "sigmoid", "capacity", "progressive" or "grouped", see docs/policy_model.md; or one of `register_router`.
        router_bias_update_rate: step of the bias of "sigmoid" after each optimizer step.
        router_capacity_factor: capacity of "capacity" over the even load, at least 1.
        router_candidates: experts that the first stage of "progressive" hands to the second; None is twice
            `num_experts_per_tok`.
        router_refine_size: inner width of the second stage of "progressive".
        expert_groups: for "grouped", number of experts of each group: [4, 2, 2] for general, code, mathematics, say.
        groups_per_tok: groups that "grouped" lets a token's experts come from.
        router_aux_loss_coef: weight of the load-balancing loss (Switch Transformer, arXiv:2101.03961, eq. 4); None is
            0 for "sigmoid", whose bias balances, and 0.001 for the others.
        router_load_penalty_coef: weight of sum_e relu(load_e - router_capacity_factor)^2 beside it.
        router_z_loss_coef: weight of the router z-loss (ST-MoE, arXiv:2202.08906, eq. 5).
        output_router_logits: return router logits and the auxiliary loss with every forward pass, and add that loss
            to `loss` when labels are given. TRL's trainers switch this on by themselves.

    Raises:
        ValueError: for sizes that clash.
    """

    model_type = "moe_policy"
    # Trainer.evaluate gathers every output that is not listed here.
    keys_to_ignore_at_inference = ["past_key_values", "router_logits", "aux_loss"]
    attribute_map = {"num_local_experts": "num_experts"}
    auto_map: ClassVar[dict[str, str]] = {}  # TRL reads it of every model class that is not transformers' own

    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.k_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
        "layers.*.mlp.experts.down_proj": "rowwise",
        "layers.*.mlp.experts": "moe_tp_experts",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_ep_plan: ClassVar[dict[str, Any]] = {
        "layers.*.mlp.experts.gate_up_proj": "grouped_gemm",
        "layers.*.mlp.experts.down_proj": "grouped_gemm",
        "layers.*.mlp.experts": "ep_dispatch_experts",
    }

    vocab_size: int = 49152
    hidden_size: int = 576
    intermediate_size: int = 1536
    num_hidden_layers: int = 30
    num_attention_heads: int = 9
    num_key_value_heads: int = 3
    head_dim: int = None  # type: ignore[assignment]  # this and two below: resolved in __post_init__
    hidden_act: str = "silu"
    max_position_embeddings: int = 8192
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    tie_word_embeddings: bool = True
    rope_parameters: dict | None = None
    attention_bias: bool = False
    attention_output_bias: bool = False
    attention_dropout: float = 0.0
    qk_norm: bool = False
    attention_gate: bool = False
    attention_pattern: str = "full"
    attention_window: int = 256
    attention_globals: int = 64
    attention_index_heads: int = 2
    attention_stride: int = 128
    num_experts: int = 4
    num_experts_per_tok: int = 2
    moe_layers: list[int] = None  # type: ignore[assignment]
    moe_intermediate_size: int = None  # type: ignore[assignment]
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    shared_expert_intermediate_size: int = 0
    router: str = "softmax"
    router_bias_update_rate: float = 1e-3
    router_capacity_factor: float = 1.25
    router_candidates: int = None  # type: ignore[assignment]
    router_refine_size: int = 16
    expert_groups: list[int] | None = None
    groups_per_tok: int = 1
    router_aux_loss_coef: float = None  # type: ignore[assignment]
    router_load_penalty_coef: float = 0.0
    router_z_loss_coef: float = 1e-3
    output_router_logits: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size={self.hidden_size!r} does not split into "
                    f"num_attention_heads={self.num_attention_heads!r}; change one or set head_dim"
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.moe_intermediate_size is None:
            self.moe_intermediate_size = self.intermediate_size
        if self.moe_layers is None:
            self.moe_layers = list(range(self.num_hidden_layers))
        self.moe_layers = sorted(self.moe_layers)
        if self.router_candidates is None:
            self.router_candidates = min(2 * self.num_experts_per_tok, self.num_experts)
        if self.router_aux_loss_coef is None:
            self.router_aux_loss_coef = 0.0 if self.router == "sigmoid" else 1e-3
        self._check_sizes()
        self._check_router()
        super().__post_init__(**kwargs)

    def _check_sizes(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "moe_intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "num_experts",
            "attention_window",
            "attention_globals",
            "attention_index_heads",
            "attention_stride",
            "router_refine_size",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads!r} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads!r}; "
                "each key/value head serves the same number of query heads"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"head_dim={self.head_dim!r} is odd; rotary embeddings turn pairs of values, so use an even one"
            )
        if self.attention_pattern not in ("full", "sparse", "local_global"):
            raise ValueError(f"attention_pattern={self.attention_pattern!r} is not one of full, sparse, local_global")
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok!r} must lie between 1 and "
                f"num_experts={self.num_experts!r}"
            )
        if not self.moe_layers:
            raise ValueError("moe_layers=[] leaves no layer with experts; name at least one, or use the dense model")
        if len(set(self.moe_layers)) != len(self.moe_layers):
            raise ValueError(f"moe_layers={self.moe_layers!r} names a layer twice")
        if self.moe_layers[0] < 0 or self.moe_layers[-1] >= self.num_hidden_layers:
            raise ValueError(
                f"moe_layers={self.moe_layers!r} must lie between 0 and the last layer, {self.num_hidden_layers - 1}"
            )
        for name in ("router_aux_loss_coef", "router_z_loss_coef", "router_load_penalty_coef"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative; 0 turns the loss off")

    def _check_router(self) -> None:
        if self.router not in ROUTER_NAMES:
            raise ValueError(f"router={self.router!r} is not one of {', '.join(ROUTER_NAMES)}")
        if self.routed_scaling_factor <= 0:
            raise ValueError(f"routed_scaling_factor={self.routed_scaling_factor!r} must be positive")
        if self.shared_expert_intermediate_size < 0:
            raise ValueError(
                f"shared_expert_intermediate_size={self.shared_expert_intermediate_size!r} must not be negative; "
                "0 is no shared expert"
            )
        if self.router_bias_update_rate < 0:
            raise ValueError(
                f"router_bias_update_rate={self.router_bias_update_rate!r} must not be negative; 0 freezes the bias"
            )
        if self.router_capacity_factor < 1:
            raise ValueError(
                f"router_capacity_factor={self.router_capacity_factor!r} leaves slots without room; give at least 1"
            )
        if not self.num_experts_per_tok <= self.router_candidates <= self.num_experts:
            raise ValueError(
                f"router_candidates={self.router_candidates!r} must lie between "
                f"num_experts_per_tok={self.num_experts_per_tok!r} and num_experts={self.num_experts!r}"
            )
        if (self.router == "grouped") != (self.expert_groups is not None):
            raise ValueError(
                f"expert_groups={self.expert_groups!r} goes with router='grouped' and only with it, not "
                f"router={self.router!r}"
            )
        if self.expert_groups is not None:
            sizes = sorted(self.expert_groups)
            if sum(sizes) != self.num_experts or sizes[0] < 1:
                raise ValueError(
                    f"expert_groups={self.expert_groups!r} must be sizes of at least 1, "
                    f"num_experts={self.num_experts!r} in all"
                )
            if not 1 <= self.groups_per_tok <= len(sizes):
                raise ValueError(
                    f"groups_per_tok={self.groups_per_tok!r} must lie between 1 and the {len(sizes)} groups"
                )
            if sum(sizes[: self.groups_per_tok]) < self.num_experts_per_tok:
                raise ValueError(
                    f"the smallest {self.groups_per_tok} groups of {self.expert_groups} have fewer experts than "
                    f"num_experts_per_tok={self.num_experts_per_tok!r}; raise groups_per_tok or make the groups larger"
                )
