import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from plumbline.policy_models import load_policy, load_tokenizer, upcycle
from plumbline.policy_models.router import record_routes
from plumbline.policy_models.upcycling import _layer_indices, kl_from_dense

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
DENSE = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "llama with biases, untied, scaled rope": (
        LlamaForCausalLM,
        LlamaConfig(
            **SIZES,
            attention_bias=True,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        ),
    ),
    "mistral": (MistralForCausalLM, MistralConfig(**SIZES, sliding_window=None, head_dim=12)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SIZES)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SIZES, head_dim=16)),
}
IDS = torch.randint(3, 97, (2, 40), generator=torch.Generator().manual_seed(5))


def make_dense(name, **changes):
    torch.manual_seed(0)
    model_class, config = DENSE[name]
    dense = model_class(config.__class__(**{**config.to_dict(), **changes})).eval()
    with torch.no_grad():  # biases and norms start at 0 and 1, where leaving them out would not show
        for parameter in dense.parameters():
            if parameter.dim() == 1:
                parameter += torch.randn_like(parameter) * 0.2
    return dense


@pytest.mark.parametrize("name", DENSE)
def test_logits_equal_those_of_the_dense_model(name):
    dense = make_dense(name)
    for options in ({}, {"num_experts": 6, "num_experts_per_tok": 3, "moe_layers": 2}, {"moe_layers": [1]}):
        moe = upcycle(dense, **options)
        with torch.no_grad():
            want, got = dense(IDS).logits, moe(IDS).logits
        assert (got - want).abs().max() <= 2e-6 * want.abs().max()


def test_logits_equal_to_the_bit_in_bf16():
    dense = make_dense("llama").to(torch.bfloat16)
    dense.model.rotary_emb = make_dense("llama").model.rotary_emb  # .to() rounded its frequencies
    moe = upcycle(dense)
    assert moe.dtype == torch.bfloat16
    with torch.no_grad():
        assert torch.equal(moe(IDS).logits, dense(IDS).logits)


def test_dense_is_left_alone_and_shares_nothing():
    dense = make_dense("llama")
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    moe = upcycle(dense)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())
    assert moe.lm_head.weight is moe.model.embed_tokens.weight


def test_seed_decides_the_router_and_spares_the_global_state():
    dense = make_dense("llama")
    state = torch.get_rng_state()
    first, again, other = (upcycle(dense, seed=seed).model.layers[1].mlp.gate.weight for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert upcycle(dense, router_std=0.5).model.layers[0].mlp.gate.weight.std().item() == pytest.approx(0.5, rel=0.2)


def test_router_has_no_gradient_while_experts_are_equal():
    """As the docstring says; the auxiliary losses do move it."""
    moe = upcycle(make_dense("llama"))
    moe(IDS, labels=IDS).loss.backward()
    gate = moe.model.layers[1].mlp.gate.weight
    assert gate.grad.abs().max() < 1e-7 < moe.model.layers[1].mlp.experts.down_proj.grad.abs().max()
    moe(IDS, labels=IDS, output_router_logits=True).loss.backward()
    assert gate.grad.abs().max() > 1e-5


@pytest.mark.parametrize(
    "moe_layers, want",
    [
        ("all", [0, 1, 2, 3, 4, 5, 6]),
        (1, [0, 1, 2, 3, 4, 5, 6]),
        (3, [0, 3, 6]),
        (2, [0, 2, 4, 6]),
        (4, [2, 6]),
        ([5, 0], [0, 5]),
    ],
)
def test_layers_that_get_experts(moe_layers, want):
    assert _layer_indices(moe_layers, 7) == want


REFUSED = [
    ({"moe_layers": "some"}, "must be"),
    ({"moe_layers": 0}, "as a step"),
    ({"moe_layers": 4}, "as a step"),
    ({"moe_layers": [3]}, "between 0 and"),
    ({"num_experts_per_tok": 5}, "between 1 and"),
    ({"router_std": 0.0}, "must be positive"),
    ({"granularity": 3}, "divide num_experts=4"),
    ({"granularity": 2, "num_experts_per_tok": 1}, "divide num_experts_per_tok=1"),
    ({"granularity": 2, "router": "capacity"}, "router softmax or sigmoid"),
    ({"noise": -0.1}, "not be negative"),
]


@pytest.mark.parametrize("options, message", REFUSED)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        upcycle(make_dense("llama"), **options)


def test_models_that_would_change_are_refused():
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50))
    for dense, message in [
        (gpt2, "GPT2LMHeadModel .* cannot be upcycled; give a causal language model of type llama"),
        (make_dense("llama").model, "LlamaModel"),
        (make_dense("llama", mlp_bias=True), "mlp_bias"),
        (make_dense("mistral", sliding_window=16), "sliding_window=16"),
    ]:
        with pytest.raises(ValueError, match=message):
            upcycle(dense)


WAYS = {
    "slices": {"num_experts": 12, "num_experts_per_tok": 8, "granularity": 4},
    "slices, sigmoid": {"num_experts": 6, "num_experts_per_tok": 2, "granularity": 2, "router": "sigmoid"},
    "shared": {"shared_expert": True},
    "shared slices": {"shared_expert": True, "granularity": 2},
    "sigmoid": {"router": "sigmoid"},
    "progressive": {"router": "progressive"},
    "capacity": {"router": "capacity"},
    "grouped": {"router": "grouped", "expert_groups": [2, 2]},
    "head gate, window": {"attention_gate": True, "attention_pattern": "local_global"},
    "sparse, window": {"attention_pattern": "sparse"},
}


@pytest.mark.filterwarnings("ignore:router 'capacity'")
@pytest.mark.parametrize("family", sorted(DENSE))
@pytest.mark.parametrize("way", WAYS)
def test_every_way_preserves_the_function(family, way):
    dense = make_dense(family)
    moe = upcycle(dense, **({"moe_layers": [0, 2]} | WAYS[way]))
    assert kl_from_dense(dense, moe, IDS) < 1e-6
    with torch.no_grad():
        torch.testing.assert_close(moe(IDS).logits, dense(IDS).logits, atol=2e-5, rtol=2e-5)


def test_a_token_gets_every_slice_once():
    moe = upcycle(make_dense("llama"), num_experts=12, num_experts_per_tok=8, granularity=4)
    with record_routes(moe) as routes, torch.no_grad():
        moe(IDS)
    assert all(sorted(e % 4 for e in row) == [0, 0, 1, 1, 2, 2, 3, 3] for row in routes[0].tolist())


def test_noise_costs_what_it_says():
    dense = make_dense("llama")
    costs = [kl_from_dense(dense, upcycle(dense, noise=noise), IDS) for noise in (0.0, 0.01, 0.1)]
    assert abs(costs[0]) < 1e-6 < costs[1] < costs[2]
    experts = upcycle(dense, noise=0.1).model.layers[0].mlp.experts.down_proj
    spread = (experts[0] - experts[1]).std() / experts[0].std()
    assert spread.item() == pytest.approx(0.1 * 2**0.5, rel=0.1)


@pytest.mark.slow
def test_real_weights_keep_their_function():
    source = "bundled:smollm2-135m-instruct"
    try:
        tokenizer = load_tokenizer(source)
    except ValueError as error:
        pytest.skip(str(error))
    dense = load_policy(source, dtype=torch.float32)
    ids = tokenizer("Rome began as a village on the Tiber; 753 BC is the date that tradition gives.").input_ids
    with torch.no_grad():
        want = dense(torch.tensor([ids])).logits
        got = upcycle(dense, moe_layers=3)(torch.tensor([ids])).logits
    assert (got - want).abs().max() < 1e-5 * want.abs().max()
    assert torch.equal(got.argmax(-1), want.argmax(-1))
