"""The LM head of TRL's trainers, on answer positions only, where a CPU trains.

TRL scores the labelled positions alone on a GPU with Triton. On a CPU it scores every position, prompts and padding
included, in fp32 tiles that are computed again in the backward: half of a DPO step at a vocabulary of 49,152.
"""

import types
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from trl.trainer.utils import FusedCausalLMOutput

from plumbline.policy_models.logprobs import token_logprobs

# What a model may do to its logits after the head; TRL's own head knows these, ours leaves such models to it.
_LOGIT_CHANGES = ("final_logit_softcapping", "logit_scale", "logits_scaling", "output_multiplier", "lm_head_multiplier")


def score_answers_only(model: nn.Module) -> None:
    """Replaces the head that an SFTTrainer or DPOTrainer has put on `model`; call it once the trainer is built.

    The same numbers come back: log_probs, entropy, mean_logits and is_top1, each (rows, positions - 1) and 0 where the
    label is -100. On a GPU, and for models that change their logits after the head, nothing is replaced.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    config = base.config.get_text_config()
    if next(base.parameters()).device.type != "cpu" or any(getattr(config, name, None) for name in _LOGIT_CHANGES):
        return
    trl_forward = base.forward

    def forward(self: PreTrainedModel, *args, fused_lm_head: bool = False, **kwargs):
        if not fused_lm_head or kwargs.get("shift_labels") is not None:
            return trl_forward(*args, fused_lm_head=fused_lm_head, **kwargs)
        labels, num_items = kwargs.pop("labels"), kwargs.pop("num_items_in_batch", None)
        kwargs["use_cache"] = False
        outputs = self.base_model(*args, **kwargs)
        states = outputs.last_hidden_state[:, :-1]
        mask, ids = labels[:, 1:] != -100, labels[:, 1:]
        head = self.get_output_embeddings()
        logits_NV = head(states[mask])
        logp_N, entropy_N = token_logprobs(logits_NV, ids[mask])
        with torch.no_grad():
            largest_N = logits_NV.argmax(dim=-1)
            mean_N = logits_NV.mean(dim=-1, dtype=torch.float32)

        def spread(values_N: torch.Tensor) -> torch.Tensor:
            # masked_scatter keeps the graph connected when no position is labelled
            return values_N.new_zeros(mask.shape).masked_scatter(mask, values_N)

        log_probs, aux_loss = spread(logp_N), None
        loss = -log_probs.sum() / (mask.sum().clamp(min=1) if num_items is None else num_items)
        if kwargs.get("output_router_logits"):
            aux_loss = load_balancing_loss_func(
                outputs.router_logits, config.num_experts, config.num_experts_per_tok, kwargs.get("attention_mask")
            )
            loss = loss + config.router_aux_loss_coef * aux_loss
        return FusedCausalLMOutput(
            loss=loss,
            log_probs=log_probs,
            entropy=spread(entropy_N),
            mean_logits=spread(mean_N),
            is_top1=spread(largest_N == ids[mask]),
            label_mask=mask,
            aux_loss=aux_loss,  # type: ignore[arg-type]
        )

    base.forward = types.MethodType(forward, base)
