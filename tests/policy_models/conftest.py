"""Tiny models for the tests of the policy; bundled models are built into a temporary cache."""

import pytest
import torch

from plumbline.policy_models import MoEPolicyConfig, MoEPolicyForCausalLM

TINY = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "moe_layers": [0, 2],
    "initializer_range": 0.2,  # large enough for logits and routes to differ between tokens
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture(scope="session")
def session_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("plumbline-cache")


@pytest.fixture
def cache(session_cache, monkeypatch):
    """A cache folder that lasts for the session, so that a tiny model is built once; never the user's."""
    monkeypatch.setenv("PLUMBLINE_CACHE", str(session_cache))
    return session_cache


@pytest.fixture
def config():
    """Makes a tiny config; keyword arguments override."""
    return lambda **overrides: MoEPolicyConfig(**{**TINY, **overrides})


@pytest.fixture
def policy(config):
    """Makes a tiny policy in evaluation mode, the same each time."""

    def make(**overrides):
        torch.manual_seed(0)
        return MoEPolicyForCausalLM(config(**overrides)).eval()

    return make
