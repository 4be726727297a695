"""The policy model under transformers' own common model tests. Not collected here: run.py copies it into their tree."""

import unittest

import torch
from transformers.models.auto import modeling_auto

from plumbline.policy_models import (
    MoEPolicyConfig,
    MoEPolicyForCausalLM,
    MoEPolicyForSequenceClassification,
    MoEPolicyModel,
)

from ...test_modeling_common import ModelTesterMixin, ids_tensor  # type: ignore[import-not-found]

# By these lists the suite knows which classes have a loss; models that live in transformers are in them.
modeling_auto.MODEL_MAPPING_NAMES["moe_policy"] = "MoEPolicyModel"
modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["moe_policy"] = "MoEPolicyForCausalLM"
modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES["moe_policy"] = "MoEPolicyForSequenceClassification"

PLAN = {"qk_norm": True, "moe_layers": [1]}  # a dense layer beside an expert one: every entry of the plan has a use
KINDS = {
    "Softmax": PLAN,
    "SigmoidSharedGate": {"router": "sigmoid", "shared_expert_intermediate_size": 16, "attention_gate": True},
    "Progressive": {"router": "progressive"},
    "Grouped": {"router": "grouped", "expert_groups": [2, 2], "groups_per_tok": 2},
    "Sparse": {"attention_pattern": "sparse", "attention_window": 3, "attention_globals": 2},
    "LocalGlobal": {"attention_pattern": "local_global", "attention_window": 3, "attention_stride": 4},
}


class PolicyTester:
    """What the suite asks of a model tester: sizes, a config and inputs."""

    batch_size, seq_length, hidden_size, num_hidden_layers, num_attention_heads, vocab_size = 13, 7, 32, 2, 4, 99
    is_training = True

    def __init__(self, options: dict) -> None:
        self.options = options

    def get_config(self) -> MoEPolicyConfig:
        return MoEPolicyConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=48,
            moe_intermediate_size=16,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=2,
            num_experts=4,
            num_experts_per_tok=2,
            max_position_embeddings=512,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            **self.options,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[MoEPolicyConfig, dict]:
        ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.tril(torch.ones_like(ids))}


class PolicySuite(ModelTesterMixin):
    """Every common test, for the options of a subclass."""

    options: dict = {}
    all_model_classes = (MoEPolicyModel, MoEPolicyForCausalLM, MoEPolicyForSequenceClassification)
    all_generative_model_classes = (MoEPolicyForCausalLM,)
    pipeline_model_mapping = {"text-generation": MoEPolicyForCausalLM}

    def setUp(self) -> None:
        self.model_tester = PolicyTester(self.options)

    def test_generation_tester_mixin_inheritance(self) -> None:
        self.skipTest("the generation tests are not in the source package; test_common.py has their checks")

    def test_keep_in_fp32_modules_exist(self) -> None:
        self.skipTest("the list names the buffers of all routers, a model has those of one")

    def test_tp_plan_matches_params(self) -> None:
        if self.options != PLAN:
            self.skipTest("the plan names every part that a config can switch on; checked where all of them are on")
        super().test_tp_plan_matches_params()


for kind, options in KINDS.items():
    globals()[f"Test{kind}"] = type(f"Test{kind}", (PolicySuite, unittest.TestCase), {"options": options})
