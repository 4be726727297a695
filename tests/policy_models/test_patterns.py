"""Attention patterns and the head gate: against a loop over queries, and exact where they should change nothing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plumbline.policy_models import MoEPolicyConfig
from plumbline.policy_models.patterns import Selector, sight

IDS = torch.randint(3, 97, (3, 11), generator=torch.Generator().manual_seed(5))
SPARSE = {"attention_pattern": "sparse", "attention_window": 3, "attention_globals": 2}
STRIDED = {"attention_pattern": "local_global", "attention_window": 3, "attention_stride": 4}
PATTERNS = pytest.mark.parametrize("options", [SPARSE, STRIDED], ids=["sparse", "local_global"])


def logits_of(model, ids=IDS, **kwargs):
    with torch.no_grad():
        return model(ids, **kwargs).logits


def same_weights(policy, **options):
    """A dense policy, and one with the options that has its weights and new ones of its own."""
    dense, other = policy(), policy(**options)
    left = other.load_state_dict(dense.state_dict(), strict=False)
    assert not left.unexpected_keys
    return dense, other


# the gate


def test_a_new_gate_changes_nothing_and_learns(policy):
    dense, gated = same_weights(policy, attention_gate=True)
    assert torch.equal(logits_of(gated), logits_of(dense))
    gated(IDS, labels=IDS).loss.backward()
    assert all(layer.self_attn.g_proj.weight.grad.abs().sum() > 0 for layer in gated.model.layers)


def test_the_gate_scales_each_head_by_hand(policy):
    model = policy(attention_gate=True, moe_layers=[0], num_hidden_layers=1)
    attention, x = model.model.layers[0].self_attn, torch.randn(1, 5, 32)
    positions = model.model.rotary_emb(x, torch.arange(5)[None])
    with torch.no_grad():
        attention.o_proj.weight.copy_(torch.eye(32))
        plain = attention(x, positions, None)[0].unflatten(-1, (4, 8))
        attention.g_proj.bias.copy_(torch.tensor([-50.0, 0.0, 50.0, 1.0]))
        gated = attention(x, positions, None)[0].unflatten(-1, (4, 8))
    want = plain * torch.tensor([0.0, 1.0, 2.0, 2 * torch.tensor(1.0).sigmoid()])[:, None]
    torch.testing.assert_close(gated, want)


# masks


def masks_by_loop(options, keep, past_length):
    """near and far of one row, from the words of the module's docstring."""
    position = [sum(keep[:j]) for j in range(len(keep))]
    near = torch.zeros(len(keep), len(keep), dtype=torch.bool)
    far = near.clone()
    for i in range(len(keep)):
        for j in range(i + 1):
            if not keep[j]:
                continue
            seen = position[i] - position[j] < options["attention_window"]
            if options["attention_pattern"] == "local_global":
                stride = options["attention_stride"]
                seen = seen or position[i] % stride == 0 or position[j] % stride == 0
            (near if seen else far)[i, j] = True
    return near[past_length:], far[past_length:]


@settings(max_examples=60, deadline=None)
@given(
    pattern=st.sampled_from(["sparse", "local_global"]),
    window=st.integers(1, 9),
    stride=st.integers(1, 9),
    keep=st.lists(st.booleans(), min_size=1, max_size=12),
    data=st.data(),
)
def test_masks_equal_the_loop(pattern, window, stride, keep, data):
    options = {"attention_pattern": pattern, "attention_window": window, "attention_stride": stride}
    past_length = data.draw(st.integers(0, len(keep) - 1))
    mask = torch.tensor([keep]).long()
    position = (mask.cumsum(-1) - mask)[:, past_length:]
    seen = sight(MoEPolicyConfig(**options), mask, position, 1, past_length)
    near, far = masks_by_loop(options, keep, past_length)
    assert torch.equal(seen.near[0, 0], near) and torch.equal(seen.far[0, 0], far)


@PATTERNS
def test_a_window_that_covers_is_dense_attention(policy, options):
    dense, wide = same_weights(policy, **(options | {"attention_window": 11}))
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    got, want = (logits_of(model, attention_mask=mask)[mask.bool()] for model in (wide, dense))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    _, narrow = same_weights(policy, **options)
    assert not torch.allclose(logits_of(narrow, attention_mask=mask)[mask.bool()], want, atol=1e-2)


def sparse_by_loop(attention, x, position_embeddings):
    """One row, one query and head at a time."""
    from plumbline.policy_models.layers import rotate

    config, selector, length = attention.config, attention.selector, x.shape[1]
    query, key, value = (
        p(x)[0].unflatten(-1, (-1, config.head_dim)).transpose(0, 1)
        for p in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    query, key = (rotate(part[None], *position_embeddings)[0] for part in (query, key))
    out = torch.zeros(length, config.num_attention_heads, config.head_dim)
    index_key, index_query = selector.key(x)[0], selector.query(x)[0].unflatten(-1, (-1, config.head_dim))
    weight, part = selector.head_weight(x)[0], selector.fusion(x)[0].sigmoid()
    for i in range(length):
        score = (index_query[i] @ index_key.T).relu().mul(weight[i, :, None]).sum(0) / config.head_dim**0.5
        near = list(range(max(0, i - config.attention_window + 1), i + 1))
        candidates = sorted(range(near[0]), key=lambda j: -score[j].item())[: config.attention_globals]
        for h in range(config.num_attention_heads):
            kv = h // (config.num_attention_heads // config.num_key_value_heads)
            logit = key[kv] @ query[h, i] / config.head_dim**0.5
            local = logit[near].softmax(0) @ value[kv, near]
            out[i, h] = local
            if candidates:
                chosen = (logit + score)[candidates].softmax(0) @ value[kv, candidates]
                out[i, h] = (1 - part[i, h]) * local + part[i, h] * chosen
    return attention.o_proj(out.flatten(1))[None]


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "packed"])
def test_sparse_attention_equals_the_loop_with_gradients(policy, implementation):
    model = policy(**SPARSE)
    model.set_attn_implementation(implementation)
    attention = model.model.layers[1].self_attn
    with torch.no_grad():
        for parameter in attention.selector.parameters():
            parameter.normal_(std=0.5)
    x = torch.randn(1, 9, 32, requires_grad=True)
    positions = model.model.rotary_emb(x, torch.arange(9)[None])
    seen = sight(model.config, None, torch.arange(9)[None], 1, 0)
    results = []
    for out in (attention(x, positions, seen)[0], sparse_by_loop(attention, x, positions)):
        results.append((out, *torch.autograd.grad(out.square().sum(), (x, *attention.parameters()))))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-4)


def test_the_selector_learns_from_the_loss_to_find_a_token():
    """A far token decides the answer; its score rises under the gradient of the attention output alone."""
    torch.manual_seed(1)  # a draw in which relu is alive for this one query
    config = MoEPolicyConfig(hidden_size=16, num_attention_heads=1, num_key_value_heads=1, **SPARSE)
    selector = Selector(config)
    x, far = torch.randn(1, 8, 16), torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    far[..., 7, :5] = True
    value = torch.zeros(8)
    first = selector(x, selector.key(x), far)[0][0, 0, 7]
    value[first.argmax()] = 1.0
    optimizer = torch.optim.Adam(selector.parameters(), lr=0.02)
    found = []
    for _ in range(60):
        mask, _ = selector(x, selector.key(x), far)
        found.append((mask[0, 0, 7].softmax(-1) * value).sum())
        (-found[-1]).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (mask[0, 0, 7] > -1e30).sum() == 2  # two globals, whatever it likes
    assert found[0] < 0.8 < 0.9 < found[-1]


def test_of_equal_scores_the_earliest_are_chosen():
    """Else the choice would depend on the length of the cache: relu makes many scores exactly zero."""
    config = MoEPolicyConfig(hidden_size=16, num_attention_heads=1, num_key_value_heads=1, **SPARSE)
    selector, far = Selector(config), torch.ones(1, 1, 1, 40, dtype=torch.bool)
    far[..., :3] = False
    with torch.no_grad():
        selector.query.weight.zero_()
    mask, _ = selector(torch.randn(1, 1, 16), torch.randn(1, 40, 16), far)
    assert (mask[0, 0, 0] == 0).nonzero()[:, 0].tolist() == [3, 4]


# in the model


@PATTERNS
def test_cache_padding_and_generation(policy, options):
    model = policy(attention_gate=True, **options)
    mask = torch.ones_like(IDS)
    mask[1, :5] = 0
    want = logits_of(model, attention_mask=mask)
    with torch.no_grad():
        first = model(IDS[:, :6], attention_mask=mask[:, :6], use_cache=True)
        rest = model(IDS[:, 6:], attention_mask=mask, past_key_values=first.past_key_values)
    got = torch.cat((first.logits, rest.logits), 1)
    torch.testing.assert_close(got[mask.bool()], want[mask.bool()], atol=1e-5, rtol=1e-5)
    alone = logits_of(model, IDS[1:2, 5:])
    torch.testing.assert_close(alone, want[1:2, 5:], atol=1e-5, rtol=1e-5)
    wish = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "attention_mask": mask}
    assert torch.equal(model.generate(IDS * mask, **wish), model.generate(IDS * mask, use_cache=False, **wish))


@PATTERNS
def test_packed_sequences_do_not_see_each_other(policy, options):
    model = policy(**options)
    packed, positions = IDS[:2].reshape(1, -1), torch.arange(11).repeat(2)[None]
    got = logits_of(model, packed, position_ids=positions).view(2, 11, -1)
    torch.testing.assert_close(got, logits_of(model, IDS[:2]), atol=1e-5, rtol=1e-5)


@PATTERNS
def test_every_weight_learns_with_checkpointing_too_and_is_saved(policy, options, tmp_path):
    grads = []
    for checkpointing in (False, True):
        model = policy(attention_gate=True, **options).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(IDS, labels=IDS).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert all(grad.abs().sum() > 0 for grad in grads[0].values())
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, atol=1e-6, rtol=1e-5, msg=name)
    model.eval().save_pretrained(tmp_path)
    assert torch.equal(logits_of(type(model).from_pretrained(tmp_path)), logits_of(model))


@PATTERNS
def test_what_cannot_take_the_masks_is_refused(policy, options):
    model = policy(**options)
    with pytest.raises(ValueError, match="2-D attention_mask"):
        model(IDS, attention_mask=torch.ones(3, 1, 11, 11, dtype=torch.bool))
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="use eager, sdpa or packed"):
        model(IDS)
