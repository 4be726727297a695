"""The expert back ends against a double loop over tokens and slots."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from plumbline.policy_models.experts import DEFAULT_EXPERTS, grouped_experts_forward, order_slots
from plumbline.policy_models.modeling import MoEPolicyExperts


def make_experts(config, implementation="eager", dtype=torch.float32):
    made = config(num_experts=4, hidden_size=16, intermediate_size=24)
    made._experts_implementation = implementation
    experts = MoEPolicyExperts(made)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in experts.parameters():
            weight.copy_(torch.randn_like(weight) * 0.3)
    return experts.to(dtype)


def double_loop(experts, x, indices, weights):
    rows = []
    for token in range(x.shape[0]):
        row = torch.zeros(x.shape[1])
        for slot in range(indices.shape[1]):
            expert = indices[token, slot]
            gate, up = (experts.gate_up_proj[expert] @ x[token]).chunk(2)
            row = row + weights[token, slot] * (experts.down_proj[expert] @ (F.silu(gate) * up))
        rows.append(row)
    return torch.stack(rows)


ROUTES = {  # token count, indices: why it is there
    "mixed": (7, None),
    "one token": (1, None),
    "an expert with no token": (5, [[0, 1], [3, 1], [1, 0], [0, 3], [3, 0]]),
    "all tokens on the same experts": (6, [[2, 0]] * 6),
    "top 1": (5, [[3], [0], [0], [1], [3]]),
}


@pytest.mark.parametrize("implementation", ["eager", DEFAULT_EXPERTS, "grouped_mm"])
@pytest.mark.parametrize("route", ROUTES)
def test_output_and_gradients_equal_the_double_loop(config, implementation, route):
    num_tokens, indices = ROUTES[route]
    if indices is None:
        indices = [torch.randperm(4)[:2].tolist() for _ in range(num_tokens)]
    indices = torch.tensor(indices)
    results = []
    for forward in (make_experts(config, implementation), double_loop):
        experts = make_experts(config) if forward is double_loop else forward
        torch.manual_seed(2)
        x = torch.randn(num_tokens, 16, requires_grad=True)
        weights = torch.rand(indices.shape, requires_grad=True)
        args = (x, indices, weights)
        out = forward(experts, *args) if forward is double_loop else forward(*args)
        grads = torch.autograd.grad(out.square().sum(), (x, weights, *experts.parameters()))
        results.append((out, *grads))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_gradient_of_an_idle_expert_is_zero_not_garbage(config):
    experts = make_experts(config, DEFAULT_EXPERTS)
    out = experts(torch.randn(3, 16), torch.tensor([[0, 1], [1, 0], [0, 1]]), torch.full((3, 2), 0.5))
    out.sum().backward()
    for weight in experts.parameters():
        assert (weight.grad[2:] == 0).all() and (weight.grad[:2] != 0).any()


@pytest.mark.parametrize("implementation", ["eager", DEFAULT_EXPERTS])
def test_autocast_really_computes_in_bf16(config, implementation):
    """fp32 weights under autocast give what bf16 weights give, to the bit, and fp32 gradients."""
    indices, weights = torch.tensor([[0, 1], [2, 3], [1, 3]]), torch.rand(3, 2)
    x = torch.randn(3, 16)
    experts = make_experts(config, implementation)
    with torch.autocast("cpu", torch.bfloat16):
        out = experts(x, indices, weights)
    in_bf16 = make_experts(config, implementation, torch.bfloat16)(x.bfloat16(), indices, weights)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.bfloat16(), in_bf16, atol=0, rtol=0)
    assert not torch.equal(out, experts(x, indices, weights))  # fp32 differs: the cast is real
    out.sum().backward()
    assert experts.gate_up_proj.grad.dtype == torch.float32


@pytest.mark.parametrize("implementation", ["eager", DEFAULT_EXPERTS])
def test_slots_of_another_rank_add_nothing(config, implementation):
    """Expert parallelism marks a slot served elsewhere with index E; its row must not leak, not even NaN."""
    experts = make_experts(config, implementation)
    experts._is_expert_parallel = True
    x = torch.randn(4, 16, requires_grad=True)
    indices = torch.tensor([[0, 4], [4, 4], [2, 1], [4, 3]])
    weights = torch.rand(4, 2)
    out = experts(x, indices, weights)
    here = indices < 4
    want = double_loop(experts, x, indices.clamp(max=3), weights * here)
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert grad.isfinite().all() and (grad[1] == 0).all()


def test_same_input_same_bits(config):
    experts = make_experts(config, DEFAULT_EXPERTS)
    x, indices, weights = torch.randn(9, 16), torch.randint(0, 4, (9, 2)), torch.rand(9, 2)
    assert torch.equal(experts(x, indices, weights), experts(x, indices, weights))


def test_other_expert_layouts_are_refused(config):
    experts = make_experts(config)
    experts.has_bias = True
    with pytest.raises(ValueError, match="does not serve MoEPolicyExperts"):
        grouped_experts_forward(experts, torch.randn(1, 16), torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1))


@given(st.integers(1, 6), st.integers(1, 3), st.lists(st.integers(0, 6), min_size=1, max_size=700))
@settings(max_examples=60, deadline=None)
def test_rows_of_an_expert_are_its_slots_and_filling(num_experts, top_k, drawn):
    """By property: every slot has one row, inside its expert's range; ranges have shared lengths; foreign slots last."""
    drawn = drawn[: len(drawn) // top_k * top_k] or [0] * top_k
    indices = torch.tensor(drawn).clamp(max=num_experts).view(-1, top_k)
    slot_M, row_N, ends_E = order_slots(indices, num_experts)
    assert slot_M[row_N].tolist() == list(range(indices.numel()))
    starts = [0, *ends_E.tolist()[:-1]]
    for expert, (start, end) in enumerate(zip(starts, ends_E.tolist(), strict=True)):
        slots = (indices.flatten() == expert).nonzero()[:, 0]
        assert row_N[slots].tolist() == list(range(start, start + len(slots)))  # stable
        assert 0 <= end - start - len(slots) < (8 if len(slots) <= 64 else 16)
        assert (end - start) % 8 == 0
    foreign = (indices.flatten() == num_experts).sum()
    assert len(slot_M) == ends_E[-1] + foreign


def test_experts_of_like_load_share_their_length():
    """A new length is a new kernel to compile: few lengths, and little filling where there are many rows."""
    counts = range(1, 1025)
    lengths = [int(order_slots(torch.zeros(n, 1, dtype=torch.long), 1)[2]) for n in counts]
    assert len(set(lengths)) == 36
    assert all(filled - n <= max(n // 8, 15) for n, filled in zip(counts, lengths, strict=True))
