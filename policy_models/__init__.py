"""The policy: a Mixture-of-Experts language model, made from a dense one, that transformers, TRL and PEFT can use.

Importing the package registers the model with transformers' Auto classes, so that `AutoModelForCausalLM` and its
siblings load a saved policy, and the layout of its checkpoints: one 2-D tensor per expert, as Qwen3-MoE has them.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)

from plumbline.lazy import exports
from plumbline.policy_models.configuration import MoEPolicyConfig
from plumbline.policy_models.kernels import dispatch  # noqa: F401  # registers its back ends; imports no triton
from plumbline.policy_models.modeling import (
    MoEPolicyForCausalLM,
    MoEPolicyForSequenceClassification,
    MoEPolicyModel,
)

AutoConfig.register(MoEPolicyConfig.model_type, MoEPolicyConfig)
AutoModel.register(MoEPolicyConfig, MoEPolicyModel)
AutoModelForCausalLM.register(MoEPolicyConfig, MoEPolicyForCausalLM)
AutoModelForSequenceClassification.register(MoEPolicyConfig, MoEPolicyForSequenceClassification)
register_checkpoint_conversion_mapping(
    MoEPolicyConfig.model_type, get_checkpoint_conversion_mapping("qwen2_moe"), overwrite=True
)

__all__, __getattr__, __dir__ = exports(
    __name__,
    {
        "MoEPolicyConfig": "configuration",
        "MoEPolicyForCausalLM": "modeling",
        "MoEPolicyForSequenceClassification": "modeling",
        "MoEPolicyModel": "modeling",
        "load_policy": "loading",
        "load_scalar_model": "loading",
        "load_tokenizer": "loading",
        "model_summary": "loading",
        "resolve_model_source": "loading",
        "upcycle": "upcycling",
    },
)
