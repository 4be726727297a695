"""The Mixture-of-Experts policy: a Llama-like decoder whose MLPs are, in chosen layers, routed experts.

One file on purpose: transformers decides whether the experts and the attention of a model can be switched by looking
for `@use_experts_implementation` and `ALL_ATTENTION_FUNCTIONS.get_interface(` in the source file of the model class.
In another file, `from_pretrained` would silently load the eager experts.

Departs from Llama in transformers:

- Positions that are not given follow the attention mask, so that left padding never moves a prompt.
- The rotary frequencies stay fp32 through `.to(torch.bfloat16)`, which costs up to 1.0 in a logit otherwise.
- The scalar head computes in fp32: in bf16 two scores near 3 that differ by 0.01 are equal.

B batch, S positions, D width, H query heads, G key/value heads, C width of a head, T flat tokens, K experts a token.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.integrations.moe import use_experts_implementation
from transformers.masking_utils import create_causal_mask, create_masks_for_generate
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel, slice_logits_to_keep
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from plumbline.policy_models.attention import PACKED
from plumbline.policy_models.balance import load_balancing_loss, load_penalty, router_z_loss
from plumbline.policy_models.configuration import MoEPolicyConfig
from plumbline.policy_models.experts import DEFAULT_EXPERTS
from plumbline.policy_models.kernels import kernels_serve
from plumbline.policy_models.layers import (
    MoEPolicyMLP,
    MoEPolicyModelOutput,
    MoEPolicyRMSNorm,
    MoEPolicyRotaryEmbedding,
    MoESequenceClassifierOutput,
    ScalarHead,
    ZeroLinear,
    count_positions,
    eager_attention,
    kept_tokens,
    last_kept,
    rotate,
    scalar_head_std,
)
from plumbline.policy_models.patterns import Selector, Sight, sight
from plumbline.policy_models.router import ROUTERS, Router, routers


class MoEPolicyAttention(nn.Module):
    """Causal grouped-query attention with rotary positions; optionally sparse (patterns.py), and gated by head."""

    def __init__(self, config: MoEPolicyConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads  # read by sdpa
        self.scaling = config.head_dim**-0.5
        self.is_causal = True
        width, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(width, config.num_attention_heads * config.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * config.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * config.head_dim, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * config.head_dim, width, bias=config.attention_output_bias)
        if config.qk_norm:
            self.q_norm = MoEPolicyRMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = MoEPolicyRMSNorm(config.head_dim, config.rms_norm_eps)
        if config.attention_gate:
            self.g_proj = ZeroLinear(width, config.num_attention_heads)
        if config.attention_pattern == "sparse":
            self.selector = Selector(config)

    def forward(
        self,
        x_BSD: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | Sight | None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        heads = (*x_BSD.shape[:-1], -1, self.head_dim)
        query, key, value = (proj(x_BSD).view(heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.config.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # (B, heads, S, C)
        query, key = rotate(query, *position_embeddings), rotate(key, *position_embeddings)
        sparse = self.config.attention_pattern == "sparse"
        if sparse:  # the selector's key is cached as one more key head
            index_key = self.selector.key(x_BSD)[:, None]
            key, value = torch.cat((key, index_key), 1), torch.cat((value, torch.zeros_like(index_key)), 1)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        if sparse:
            index_key, key, value = key[:, -1], key[:, :-1], value[:, :-1]
        if isinstance(attention_mask, Sight):
            seen = attention_mask.widened(key.shape[2])
            attention_mask = seen.near
            if self.config._attn_implementation == "eager":
                attention_mask = torch.zeros_like(seen.near, dtype=query.dtype)
                attention_mask = attention_mask.masked_fill(~seen.near, torch.finfo(query.dtype).min)

        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        out_BSHC, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        if sparse:
            mask, part_BSH = self.selector(x_BSD, index_key, seen.far)
            far_BSHC, _ = eager_attention(self, query, key, value, mask, self.scaling)
            out_BSHC = torch.lerp(out_BSHC, far_BSHC, part_BSH[..., None].to(out_BSHC.dtype))
        if self.config.attention_gate:
            out_BSHC = out_BSHC * (2 * self.g_proj(x_BSD).sigmoid())[..., None]
        return self.o_proj(out_BSHC.flatten(2)), weights


@use_experts_implementation
class MoEPolicyExperts(nn.Module):
    """SwiGLU experts as two stacked tensors; `forward` is the eager specification of every back end."""

    def __init__(self, config: MoEPolicyConfig) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        width, inner = config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * inner, width))  # gate rows, then up rows
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, width, inner))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x_TD: Tensor, indices_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Every token through its K experts, weighted and summed in fp32. An index of E adds nothing."""
        out_TD = torch.zeros_like(x_TD, dtype=torch.float32)
        # unbind, not [e]: the backward of an index writes a zero gradient of all experts for each expert.
        for expert, (gate_up, down) in enumerate(zip(self.gate_up_proj.unbind(), self.down_proj.unbind(), strict=True)):
            token_N, slot_N = torch.where(indices_TK == expert)
            gate_NF, up_NF = F.linear(x_TD[token_N].to(gate_up.dtype), gate_up).chunk(2, dim=-1)
            y_ND = F.linear(self.act_fn(gate_NF) * up_NF, down).float()
            out_TD = out_TD.index_add(0, token_N, y_ND * weights_TK[token_N, slot_N, None])
        return out_TD.to(x_TD.dtype)


class MoEPolicyMoE(nn.Module):
    """Router and experts in the place of one MLP, with an optional shared expert that serves every token."""

    def __init__(self, config: MoEPolicyConfig) -> None:
        super().__init__()
        # `gate`, `experts`, `shared_expert` are the names in checkpoints of Qwen2-MoE and Qwen3-MoE and their readers.
        self.config = config  # of the model, which names the back end; `experts` may be wrapped by PEFT
        self.gate = ROUTERS[config.router](config)
        self.experts = MoEPolicyExperts(config)
        self.has_shared = config.shared_expert_intermediate_size > 0
        if self.has_shared:
            self.shared_expert = MoEPolicyMLP(config, config.shared_expert_intermediate_size)
            self.shared_expert_gate = nn.Parameter(torch.empty(1, config.hidden_size))
            if config.router == "capacity":
                self.experts._is_expert_parallel = True  # type: ignore[assignment]  # every back end skips slots of index E under this flag

    def forward(self, x_BSD: Tensor, keep_BS: Tensor | None = None) -> Tensor:
        """sum_k w_k expert_k(x) + (2 sigmoid(g x) + part of slots that overflowed) shared(x)."""
        x_TD = x_BSD.flatten(0, 1)
        fused = kernels_serve(self.config, x_TD.device.type)
        _, weights_TK, indices_TK = self.gate(x_TD, None if keep_BS is None else keep_BS.flatten(), fused=fused)
        out_TD = self.experts(x_TD, indices_TK, weights_TK)
        if self.has_shared:
            lost_T1 = (indices_TK == self.experts.num_experts).float().mean(-1, keepdim=True)
            with torch.autocast(x_TD.device.type, enabled=False):
                weight_T1 = 2 * F.linear(x_TD.float(), self.shared_expert_gate.float()).sigmoid() + lost_T1
            out_TD = out_TD + (weight_T1 * self.shared_expert(x_TD)).to(out_TD.dtype)
        return out_TD.view_as(x_BSD)


class MoEPolicyDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: MoEPolicyConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = MoEPolicyAttention(config, layer_idx)
        self.has_experts = layer_idx in config.moe_layers
        self.mlp = MoEPolicyMoE(config) if self.has_experts else MoEPolicyMLP(config, config.intermediate_size)
        self.input_layernorm = MoEPolicyRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = MoEPolicyRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, keep_BS: Tensor | None = None, **kwargs) -> Tensor:
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        normed = self.post_attention_layernorm(hidden_states)
        return hidden_states + (self.mlp(normed, keep_BS) if self.has_experts else self.mlp(normed))


class MoEPolicyPreTrainedModel(PreTrainedModel):
    config: MoEPolicyConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MoEPolicyDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _keep_in_fp32_modules_strict = ["e_score_correction_bias", "load_E"]  # steps of 1e-3 drown in bf16
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # Each becomes a flag `output_<name>` of the base model's forward.
    _can_record_outputs = {
        "router_logits": OutputRecorder(Router, index=0),
        "router_indices": OutputRecorder(Router, index=2),
        "hidden_states": MoEPolicyDecoderLayer,
        "attentions": MoEPolicyAttention,
    }

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        return super().get_correct_experts_implementation(requested_experts or DEFAULT_EXPERTS)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, MoEPolicyExperts):
            init.normal_(module.gate_up_proj, std=std)
            init.normal_(module.down_proj, std=std)
        elif isinstance(module, Router):
            module.init_weights(std)
        elif isinstance(module, MoEPolicyMoE) and module.has_shared:
            init.zeros_(module.shared_expert_gate)
        elif isinstance(module, ZeroLinear):
            init.zeros_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, ScalarHead):
            init.normal_(module.weight, std=scalar_head_std(module.in_features))


class MoEPolicyModel(MoEPolicyPreTrainedModel):
    """Embeddings, decoder layers, last norm. `forward` returns hidden states (B, S, D)."""

    def __init__(self, config: MoEPolicyConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(MoEPolicyDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = MoEPolicyRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = MoEPolicyRotaryEmbedding(config)  # type: ignore[arg-type]  # reads the same fields
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> MoEPolicyModelOutput:
        """
        Args:
            attention_mask: (B, S so far) with 0 at padding on either side, or a ready 4-D mask.
            position_ids: (B, S); None counts the kept tokens before each position. Without a mask, positions that
                start again at 0 separate packed sequences.

        `output_router_logits=True` and `output_router_indices=True` fill those fields of the output.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if position_ids is None:
            past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = count_positions(attention_mask, inputs_embeds, past_length)

        causal_mask: Any  # a Tensor or what else the attention back end takes; a Sight; or None
        if self.config.attention_pattern == "full":
            causal_mask = create_causal_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
            )
        else:
            self._check_takes_masks()
            past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
            causal_mask = sight(self.config, attention_mask, position_ids, len(inputs_embeds), int(past_length))
        # After the mask: with a cache, even an empty one, transformers no longer looks for packed sequences.
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids=position_ids)
        hidden_states = inputs_embeds
        keep_BS = kept_tokens(attention_mask, inputs_embeds)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                keep_BS=keep_BS,
                attention_mask=causal_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                **kwargs,
            )
        return MoEPolicyModelOutput(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)

    def _check_takes_masks(self) -> None:
        implementation = self.config._attn_implementation
        if implementation not in ("eager", "sdpa", PACKED):
            raise ValueError(
                f"attention_pattern={self.config.attention_pattern!r} needs a mask that {implementation!r} does not "
                f"take; use eager, sdpa or {PACKED}"
            )

    def router_aux_loss(self, outputs: MoEPolicyModelOutput, attention_mask: Tensor | None) -> Tensor:
        """Load-balancing loss, z-loss and load penalty, scaled so that `router_aux_loss_coef` times it is the charge.

        Trainers that read `outputs.aux_loss` (TRL's GRPO) multiply it by that coefficient themselves; with the
        coefficient at 0 no one would add the others, and they are left out. TRL's SFT and DPO call the base model alone
        and take transformers' form, pooled over layers and without z-loss, from `router_logits`. Padding does not
        count, if `attention_mask` is 2-D.
        """
        logits, indices = outputs.router_logits, outputs.router_indices
        assert logits and indices and outputs.last_hidden_state is not None
        learning = routers(self)
        if torch.is_grad_enabled() and learning[0].weight.requires_grad and not logits[0].requires_grad:
            raise ValueError(
                "reentrant gradient checkpointing cuts the router losses off from the routers; "
                'use gradient_checkpointing_kwargs={"use_reentrant": False}'
            )
        keep_BS = kept_tokens(attention_mask, outputs.last_hidden_state)
        window = [router.window_E for router in learning if router.window_E is not None] if self.training else []
        loss = load_balancing_loss(logits, indices, keep_BS, window or None)
        coef = self.config.router_aux_loss_coef
        if coef and self.config.router_z_loss_coef:
            loss = loss + self.config.router_z_loss_coef / coef * router_z_loss(logits, keep_BS)
        if coef and self.config.router_load_penalty_coef:
            penalty = load_penalty(logits, indices, keep_BS, capacity=self.config.router_capacity_factor)
            loss = loss + self.config.router_load_penalty_coef / coef * penalty
        return loss


class MoEPolicyForCausalLM(MoEPolicyPreTrainedModel, GenerationMixin):
    """The policy: `MoEPolicyModel` and a language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: MoEPolicyConfig) -> None:
        super().__init__(config)
        self.model = MoEPolicyModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @staticmethod
    def create_masks_for_generate(config: MoEPolicyConfig, attention_mask: Tensor | None, **kwargs) -> Tensor | None:
        """What `generate` hands on with a static cache: attention patterns want the plain mask."""
        if config.attention_pattern != "full":
            return attention_mask
        return create_masks_for_generate(config=config, attention_mask=attention_mask, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs,
    ) -> MoeCausalLMOutputWithPast:
        """
        Args:
            labels: (B, S) token ids, -100 where a token is not predicted; shifted inside.
            output_router_logits: return `router_logits` and `aux_loss`, and add `router_aux_loss_coef * aux_loss` to
                `loss` when there is one; None asks the config.
            logits_to_keep: positions that get logits: the last n (0 is all), a 1-D or (B, n) index, or a (B, S) bool
                mask, whose logits come flat. Not together with labels.
            num_items_in_batch: predicted tokens in the whole optimizer step. The loss is then the sum over this
                micro-batch divided by that number, and the auxiliary loss counts by the same share.
        """
        if labels is not None and (isinstance(logits_to_keep, Tensor) or logits_to_keep != 0):
            raise ValueError(f"labels need logits at every position, but {logits_to_keep=}; leave one of them out")
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=output_router_logits,
            output_router_indices=output_router_logits,
            **kwargs,
        )
        # contiguous: on the CPU a linear layer of a strided 3-D input copies its whole weight once a row
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep).contiguous())
        aux_loss = self.model.router_aux_loss(outputs, attention_mask) if output_router_logits else None

        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits, labels, self.config.vocab_size, num_items_in_batch=num_items_in_batch, **kwargs
            )
            if aux_loss is not None:
                share: float | Tensor = 1.0
                if num_items_in_batch is not None:  # else gradient accumulation would add the full charge each time
                    share = (labels[:, 1:] != -100).sum() / num_items_in_batch
                loss = loss + share * self.config.router_aux_loss_coef * aux_loss.to(loss.device)

        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits if output_router_logits else None,
        )


class MoEPolicyForSequenceClassification(MoEPolicyPreTrainedModel):
    """`MoEPolicyModel` and a linear head `score` on the last kept token, for reward and cost models."""

    def __init__(self, config: MoEPolicyConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels or 1
        self.model = MoEPolicyModel(config)
        self.score = ScalarHead(config.hidden_size, self.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        **kwargs,
    ) -> MoESequenceClassifierOutput:
        """Scores of the last kept token: the last 1 of `attention_mask`, else the last token that is not
        `pad_token_id`, else the last. Padding may be on either side. A row with no kept token scores NaN.
        """
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=output_router_logits,
            output_router_indices=output_router_logits,
            **kwargs,
        )
        hidden_BSD = outputs.last_hidden_state
        last_B, found_B = last_kept(hidden_BSD, input_ids, attention_mask, self.config.pad_token_id)
        scores = self.score(hidden_BSD[torch.arange(hidden_BSD.shape[0], device=hidden_BSD.device), last_B])
        scores = scores.masked_fill(~found_B[:, None], torch.nan)

        aux_loss = self.model.router_aux_loss(outputs, attention_mask) if output_router_logits else None
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=scores, labels=labels, pooled_logits=scores, config=self.config)
            if aux_loss is not None:
                loss = loss + self.config.router_aux_loss_coef * aux_loss.to(loss.device)
        return MoESequenceClassifierOutput(
            loss=loss,
            logits=scores,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            aux_loss=aux_loss,
            router_logits=outputs.router_logits if output_router_logits else None,
        )
