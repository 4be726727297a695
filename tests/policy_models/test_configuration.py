import pytest
from transformers import AutoConfig

from plumbline.policy_models import MoEPolicyConfig

CLASHES = [
    ({"hidden_size": 30}, "hidden_size=30 does not split"),
    ({"num_attention_heads": 4, "num_key_value_heads": 3}, "not a multiple"),
    ({"head_dim": 7}, "odd"),
    ({"num_experts_per_tok": 5}, "between 1 and"),
    ({"num_experts_per_tok": 0}, "between 1 and"),
    ({"num_experts": 0}, "num_experts=0 must be at least 1"),
    ({"moe_intermediate_size": 0}, "moe_intermediate_size=0"),
    ({"moe_layers": []}, "leaves no layer with experts"),
    ({"moe_layers": [0, 3]}, "between 0 and"),
    ({"moe_layers": [-1]}, "between 0 and"),
    ({"moe_layers": [1, 1]}, "twice"),
    ({"router_aux_loss_coef": -0.1}, "not be negative"),
    ({"router_z_loss_coef": -1.0}, "not be negative"),
]


@pytest.mark.parametrize("overrides, message", CLASHES)
def test_clashing_sizes_are_refused(config, overrides, message):
    with pytest.raises(ValueError, match=message):
        config(**overrides)


def test_sizes_left_out_follow_the_others(config):
    made = config(moe_layers=None, num_key_value_heads=None)
    assert made.moe_layers == [0, 1, 2]
    assert made.num_key_value_heads == made.num_attention_heads == 4
    assert (made.head_dim, made.moe_intermediate_size) == (8, 48)


def test_survives_saving(config, tmp_path):
    made = config(moe_layers=[2, 0], qk_norm=True, num_experts=6, rope_parameters={"rope_theta": 5e4})
    made.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(again, MoEPolicyConfig)
    assert again.to_diff_dict() | {"_name_or_path": ""} == made.to_diff_dict() | {"_name_or_path": ""}
    assert again.moe_layers == [0, 2] and again.num_local_experts == 6
