"""Packed weights: small, near the dense ones, experts not forgotten, trainable on top, exact in their own arithmetic."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

import plumbline.align.sft
from plumbline.policy_models import load_policy, model_summary
from plumbline.policy_models.compression.quantise import Packed, QuantisedLinear, quantise
from plumbline.policy_models.lora import split_expert_adapters
from plumbline.policy_models.rollout.decoder import supports_fast_path

CONFIGS = Path(__file__).parents[3] / "configs"
IDS = torch.randint(3, 97, (3, 11), generator=torch.Generator().manual_seed(5))
BYTES = {"4bit": 0.5 + 4 / 64, "8bit": 1.0, "int8": 1.0}


def logits_of(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


def big(policy, **options):
    """Rows wide enough for a scale a row to weigh little."""
    return policy(hidden_size=64, intermediate_size=128, head_dim=16, **options)


@pytest.mark.parametrize("scheme", BYTES)
def test_bytes_are_those_of_the_scheme_experts_included(policy, scheme):
    """Counted, since a loader that skips stacked experts looks right and saves nothing."""
    dense = big(policy)
    kept = sum(p.numel() * 4 for n, p in dense.named_parameters() if "embed" in n or "norm" in n or "mlp.gate.w" in n)
    packed_weights = sum(p.numel() for p in dense.parameters()) - kept // 4
    model = quantise(big(policy), scheme)
    held = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in [*model.parameters(), *model.buffers()]
    }
    rows = sum(t.numel() for n, t in model.named_buffers() if n.endswith("scales")) if scheme != "4bit" else 0
    hollow = sum(4 for m in model.modules() if isinstance(m, Packed))
    rotary = sum(b.numel() * 4 for n, b in model.named_buffers() if "inv_freq" in n)
    assert sum(held.values()) == kept + BYTES[scheme] * packed_weights + 4 * rows + hollow + rotary
    experts = sum(m.shape.numel() for n, m in model.named_modules() if isinstance(m, Packed) and ".experts." in n)
    assert experts == sum(p.numel() for n, p in dense.named_parameters() if ".experts." in n)
    assert f"quantised {packed_weights / 1e6:.1f}M ({scheme}" in model_summary(model)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(sorted(BYTES)), st.integers(1, 5), st.integers(1, 70), st.integers(0, 99))
def test_error_stays_below_half_a_step(scheme, rows, cols, seed):
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))
    got = Packed(weight, scheme)(torch.float32)
    largest = weight.abs().max() if scheme == "4bit" else weight.abs().amax(-1, keepdim=True)
    half_step = largest * (0.3039 / 2 if scheme == "4bit" else 0.5 / 127)  # 0.3039: the widest gap of the NF4 table
    assert ((got - weight).abs() <= half_step * 1.0001).all()
    assert torch.equal(Packed(torch.zeros(2, 3), scheme)(torch.float32), torch.zeros(2, 3))


@pytest.mark.parametrize("scheme, limit", [("4bit", 0.4), ("8bit", 0.02), ("int8", 0.03)])
@pytest.mark.parametrize("options", [{}, {"router": "sigmoid", "shared_expert_intermediate_size": 32}])
def test_a_packed_model_computes_nearly_the_same(policy, scheme, limit, options):
    """One layer with all experts chosen: else a route may flip, and the error is that of another expert."""
    options |= {"num_experts_per_tok": 4, "num_hidden_layers": 1, "moe_layers": [0]}
    want, got = logits_of(big(policy, **options)), logits_of(quantise(big(policy, **options), scheme))
    assert (got - want).norm() < limit * want.norm()
    assert not torch.equal(got, want)


def test_int8_gives_a_row_the_same_result_in_any_batch(policy):
    model = quantise(big(policy), "int8")
    layer = next(m for m in model.modules() if isinstance(m, QuantisedLinear))
    rows = torch.randn(40, layer.in_features)
    with torch.no_grad():
        assert torch.equal(layer(rows)[7:8], layer(rows[7:8]))


@pytest.mark.parametrize("scheme", ["4bit", "8bit"])
def test_adapters_train_on_packed_experts(policy, scheme):
    """Gradients equal those on a model whose dense weights are the rounded ones."""
    packed = quantise(big(policy), scheme)
    rounded = big(policy)
    with torch.no_grad():
        for name, module in packed.named_modules():
            if isinstance(module, Packed):
                rounded.get_parameter(name.removesuffix("_packed")).copy_(module(torch.float32))
    grads = []
    for model in (packed, rounded):
        torch.manual_seed(0)
        targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        adapted = get_peft_model(
            model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], target_parameters=targets)
        )
        assert split_expert_adapters(adapted) == 4
        trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
        assert sum("experts" in name for name in trained) == 8
        with torch.no_grad():
            for name, parameter in trained.items():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
        adapted(IDS, labels=IDS).loss.backward()
        grads.append({name: parameter.grad for name, parameter in trained.items()})
    for name, grad in grads[0].items():
        assert grad.abs().sum() > 0
        torch.testing.assert_close(grad, grads[1][name], atol=1e-5, rtol=1e-3, msg=name)


def test_what_would_go_wrong_is_refused(policy, tmp_path):
    with pytest.raises(ValueError, match="not one of 4bit, 8bit, int8"):
        quantise(policy(), "3bit")
    other = policy()
    other.set_experts_implementation("eager")
    with pytest.raises(ValueError, match="use policy_grouped_mm"):
        quantise(other, "4bit")
    model = quantise(policy(), "int8")
    with pytest.raises(ValueError, match="cannot be saved"):
        model.save_pretrained(tmp_path)
    layer = next(m for m in model.modules() if isinstance(m, QuantisedLinear))
    with pytest.raises(RuntimeError, match="no gradient"):
        layer(torch.randn(2, layer.in_features, requires_grad=True))
    model.set_experts_implementation("eager")  # reads what is no longer there
    assert logits_of(model).isnan().all()
    assert "packed" in supports_fast_path(quantise(policy(), "8bit"))


def test_loading_and_generating(cache):
    model = load_policy("bundled:tiny-moe", quantise="8bit")
    ids = torch.randint(3, 259, (2, 5))
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    assert out.shape[1] <= 9
    assert load_policy("bundled:tiny-llama", quantise="4bit").model.layers[0].mlp.up_proj.weight.isnan().all()


def test_a_stage_trains_adapters_on_packed_weights(cache, tmp_path, capsys):
    """As a user launches it; the saved model is dense, with the adapters merged into the weights it came from."""
    options = [
        "--lora",
        "true",
        "--quantise",
        "4bit",
        "--lora_experts",
        "true",
        "--max_steps",
        "2",
        "--output_dir",
        str(tmp_path),
    ]
    plumbline.align.sft.main(["--config", str(CONFIGS / "sft" / "debug.yaml"), *options])
    assert "quantised" in capsys.readouterr().out
    trained, start = load_policy(str(tmp_path / "model")), load_policy("bundled:tiny-moe")
    for name, before in start.named_parameters():
        moved = not torch.equal(trained.get_parameter(name), before)
        assert moved == name.endswith(("proj.weight", "gate_up_proj", "down_proj")), name


def test_full_training_of_packed_weights_is_refused():
    with pytest.raises(ValueError, match="cannot be trained; set lora: true"):
        plumbline.align.sft.SFTSettings(quantise="4bit", lora=False)
    with pytest.raises(ValueError, match="int8 has no gradient"):
        plumbline.align.sft.SFTSettings(quantise="int8")
