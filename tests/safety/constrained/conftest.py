"""A tiny model with two adapters, and a tokenizer, in a temporary cache."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB = 97


@pytest.fixture
def plain():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def adapted(plain):
    """With adapters "policy" (active) and "expert", both far from zero."""
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(plain, lora, adapter_name="policy")
    model.add_adapter("expert", lora)
    model.set_adapter("policy")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.15)
    return model.eval()


@pytest.fixture(scope="session")
def _cache(tmp_path_factory):
    return tmp_path_factory.mktemp("plumbline-cache")


@pytest.fixture
def tiny(_cache, monkeypatch):
    """(model, tokenizer) of bundled:tiny-llama."""
    from plumbline.policy_models.loading import load_policy, load_tokenizer

    monkeypatch.setenv("PLUMBLINE_CACHE", str(_cache))
    return load_policy("bundled:tiny-llama"), load_tokenizer("bundled:tiny-llama")
