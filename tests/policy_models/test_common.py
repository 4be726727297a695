"""What transformers asks of every model class of its own (tests/test_modeling_common.py, generation/test_utils.py).

That suite does not come with the wheel; these are its checks that apply to a decoder, on every kind of our model. What
test_modeling.py already holds (packing, padding, gradient checkpointing of the plain model) is not repeated.
"""

import inspect

import pytest
import torch
from transformers import AutoModelForCausalLM, StaticCache

from plumbline.policy_models import MoEPolicyForCausalLM, MoEPolicyForSequenceClassification, MoEPolicyModel

KINDS = {
    "softmax": {},
    "full house": {"router": "sigmoid", "shared_expert_intermediate_size": 16, "attention_gate": True, "qk_norm": True},
    "progressive": {"router": "progressive"},
    "grouped": {"router": "grouped", "expert_groups": [2, 2], "groups_per_tok": 2},
    "sparse": {"attention_pattern": "sparse", "attention_window": 3, "attention_globals": 2},
    "local_global": {"attention_pattern": "local_global", "attention_window": 3, "attention_stride": 4},
    "untied": {"tie_word_embeddings": False, "attention_bias": True},
}
CLASSES = [MoEPolicyModel, MoEPolicyForCausalLM, MoEPolicyForSequenceClassification]
IDS = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(7))
WISH = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "attention_mask": torch.ones_like(IDS)}

pytestmark = [
    pytest.mark.filterwarnings("ignore:router 'sigmoid' trains without"),
    pytest.mark.parametrize("kind", KINDS),
]


@pytest.fixture
def model(policy, kind):
    return policy(**KINDS[kind])


def logits_of(model, ids=IDS, **kwargs):
    with torch.no_grad():
        return model(ids, **kwargs).logits


def test_two_passes_agree_and_save_load_keeps_them(model, tmp_path):
    want = logits_of(model)
    assert torch.equal(logits_of(model), want)
    model.save_pretrained(tmp_path)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert torch.equal(logits_of(again), want)


@pytest.mark.parametrize("model_class", CLASSES)
def test_every_weight_is_initialised(config, kind, model_class):
    """On the meta device first, then drawn: what `from_pretrained` does with weights that a checkpoint lacks."""
    made = config(**KINDS[kind])
    with torch.device("meta"):
        model = model_class(made)
    model.to_empty(device="cpu")
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data.fill_(torch.nan)
        tensor._is_hf_initialized = False
    for module in model.modules():
        module._is_hf_initialized = False
    model.init_weights()
    left = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.isnan().any()]
    assert not left


def test_the_base_model_loads_into_the_others_and_back(model, config, kind, tmp_path):
    model.save_pretrained(tmp_path)
    base = MoEPolicyModel.from_pretrained(tmp_path)
    base.save_pretrained(tmp_path / "base")
    head = MoEPolicyForCausalLM.from_pretrained(tmp_path / "base")
    assert torch.equal(head.model.embed_tokens.weight, model.model.embed_tokens.weight)
    if head.config.tie_word_embeddings:
        assert torch.equal(logits_of(head), logits_of(model))


def test_other_shapes_are_refused_or_drawn_anew(model, kind, tmp_path):
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="size mismatch|mismatched"):
        AutoModelForCausalLM.from_pretrained(tmp_path, vocab_size=101)
    other = AutoModelForCausalLM.from_pretrained(tmp_path, vocab_size=101, ignore_mismatched_sizes=True)
    assert logits_of(other).shape[-1] == 101


@pytest.mark.parametrize("model_class", CLASSES)
def test_signature_starts_with_ids(kind, model_class):
    assert list(inspect.signature(model_class.forward).parameters)[1:3] == ["input_ids", "attention_mask"]


def test_tuples_hold_what_dicts_hold(model):
    wish = {"output_hidden_states": True, "output_router_logits": True, "use_cache": False}
    with torch.no_grad():
        named, plain = model(IDS, **wish), model(IDS, return_dict=False, **wish)
    assert isinstance(plain, tuple) and len(plain) == len(named.to_tuple())
    assert torch.equal(plain[1], named.logits) or torch.equal(plain[0], named.logits)


def test_hidden_states_and_attentions_come_out_and_keep_gradients(model):
    model.set_attn_implementation("eager")
    out = model(IDS, output_hidden_states=True, output_attentions=True)
    layers = model.config.num_hidden_layers
    assert len(out.hidden_states) == layers + 1 and len(out.attentions) == layers
    assert out.hidden_states[0].shape == (2, 9, 32) and out.attentions[0].shape == (2, 4, 9, 9)
    torch.testing.assert_close(out.attentions[0].sum(-1), torch.ones(2, 4, 9))
    out.hidden_states[0].retain_grad()
    out.attentions[0].retain_grad()
    out.logits.flatten()[0].backward()
    assert out.hidden_states[0].grad is not None and out.attentions[0].grad is not None


def test_embeddings_do_for_ids(model):
    embeds = model.get_input_embeddings()(IDS)
    with torch.no_grad():
        assert torch.equal(model(inputs_embeds=embeds).logits, logits_of(model))
    wish = {name: value for name, value in WISH.items()}
    want = model.generate(IDS, **wish)[:, IDS.shape[1] :]
    assert torch.equal(model.generate(inputs_embeds=embeds, **wish), want)


def test_a_row_does_not_depend_on_its_batch(model):
    together = logits_of(model)
    for row in range(2):
        torch.testing.assert_close(logits_of(model, IDS[row : row + 1])[0], together[row], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "packed"])
def test_attention_implementations_agree_with_eager(model, implementation):
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    results = []
    for name in ("eager", implementation):
        model.set_attn_implementation(name)
        assert model.config._attn_implementation == name
        logits = model(IDS, attention_mask=mask).logits[mask.bool()]
        results.append((logits, *torch.autograd.grad(logits.square().mean(), [*model.parameters()], allow_unused=True)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_expert_implementations_agree_with_the_default(model, implementation):
    want = logits_of(model)
    model.set_experts_implementation(implementation)
    torch.testing.assert_close(logits_of(model), want, atol=1e-5, rtol=1e-5)


def test_embeddings_grow_and_shrink(model):
    want = logits_of(model)
    model.resize_token_embeddings(107)
    assert model.config.vocab_size == 107 and model.get_output_embeddings().weight.shape[0] == 107
    torch.testing.assert_close(logits_of(model)[..., :97], want)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == model.config.tie_word_embeddings
    model.resize_token_embeddings(97)
    torch.testing.assert_close(logits_of(model), want)
    model(IDS, labels=IDS).loss.backward()


def test_training_reaches_every_weight_with_and_without_checkpointing(model):
    model.train()
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        loss = model(IDS, labels=IDS, output_router_logits=True).loss
        grads.append(torch.autograd.grad(loss, [*model.parameters()]))
    for (name, _), got, want in zip(model.named_parameters(), *reversed(grads), strict=True):
        assert got.abs().sum() > 0 or "reduce" in name, name  # what `refine` = 0 hides at first
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-4, msg=name)


# generation


def greedy_by_hand(model, ids, steps):
    """The slow path: the whole sequence anew for each token."""
    for _ in range(steps):
        ids = torch.cat((ids, logits_of(model, ids, use_cache=False)[:, -1:].argmax(-1)), dim=1)
    return ids


def test_greedy_equals_the_slow_path_token_for_token(model):
    want = greedy_by_hand(model, IDS, 5)
    assert torch.equal(model.generate(IDS, **WISH), want)
    assert torch.equal(model.generate(IDS, **WISH, use_cache=False), want)


def test_left_padding_changes_no_token(model):
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    got = model.generate(IDS * mask, **(WISH | {"attention_mask": mask}))
    assert torch.equal(got[:1, 4:], greedy_by_hand(model, IDS[:1, 4:], 5))
    assert torch.equal(got[1:], greedy_by_hand(model, IDS[1:], 5))


def test_a_static_cache_gives_the_same(model):
    cache = StaticCache(config=model.config, max_cache_len=20)
    with torch.no_grad():
        first = model(IDS, past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(first, logits_of(model), atol=1e-5, rtol=1e-5)
    got = model.generate(IDS, **WISH, cache_implementation="static", disable_compile=True)
    assert torch.equal(got, greedy_by_hand(model, IDS, 5))


def test_generation_goes_on_from_a_cache(model):
    first = model.generate(IDS, **(WISH | {"max_new_tokens": 2}), return_dict_in_generate=True)
    mask = torch.ones_like(first.sequences)
    wish = WISH | {"max_new_tokens": 3, "attention_mask": mask}
    rest = model.generate(first.sequences, past_key_values=first.past_key_values, **wish)
    assert torch.equal(rest, greedy_by_hand(model, IDS, 5))


@pytest.mark.parametrize("extra", [{"num_beams": 3}, {"do_sample": True, "top_k": 0}, {"repetition_penalty": 1.3}])
def test_other_ways_to_decode_run_with_and_without_cache(model, extra):
    results = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        results.append(model.generate(IDS, **(WISH | extra), use_cache=use_cache))
    assert torch.equal(*results) and results[0].shape == (2, 14)
