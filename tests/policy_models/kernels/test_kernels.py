"""Every kernel against its specification: on the CPU in triton's interpreter, on a GPU where there is one."""

import pytest
import torch

pytest.importorskip("triton")

from policy_models.kernels import TRITON_EXPERTS, kernels_run_on, reference
from policy_models.modeling import MoEPolicyExperts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if kernels_run_on(DEVICE) is not None:
    pytest.skip(kernels_run_on(DEVICE), allow_module_level=True)

from policy_models.kernels import experts as ours  # noqa: E402
from policy_models.kernels import grouped  # noqa: E402
from policy_models.kernels.logprob import linear_logprob  # noqa: E402

WIDTH, INNER, NUM_EXPERTS = 19, 21, 4  # odd, and more than one tile of the interpreter

ROUTES = {
    "mixed, several tiles an expert": [[i % 4, (i * i + 1 + i % 4) % 4] for i in range(41)],
    "one token": [[2, 0]],
    "an expert without tokens": [[0, 1], [3, 1], [1, 0], [0, 3], [3, 0]],
    "all on the same experts": [[2, 0]] * 18,
    "top 1": [[3], [0], [0], [1], [3]],
    "slots served elsewhere": [[4, 1], [4, 4], [0, 4], [2, 3]],
}
ROUTES["mixed, several tiles an expert"] = [
    [a, b if b != a else (a + 1) % 4] for a, b in ROUTES["mixed, several tiles an expert"]
]


def tensor(*shape, scale=0.5, dtype=torch.float32):
    return (torch.randn(*shape) * scale).to(DEVICE, dtype)


def routed(name):
    indices = torch.tensor(ROUTES[name], device=DEVICE)
    x, gate_up = tensor(len(indices), WIDTH), tensor(NUM_EXPERTS, 2 * INNER, WIDTH)
    return x, gate_up, tensor(NUM_EXPERTS, WIDTH, INNER), indices, torch.rand(indices.shape, device=DEVICE)


def close(got, want, **tolerance):
    torch.testing.assert_close(got, want, **({"atol": 1e-5, "rtol": 1e-5} | tolerance))


@pytest.mark.parametrize("name", ROUTES)
def test_metadata(name):
    indices = torch.tensor(ROUTES[name], device=DEVICE)
    rows = grouped.Rows(indices, NUM_EXPERTS)
    slot, row_of_slot, ends = (part.to(DEVICE) for part in reference.order_slots(indices, NUM_EXPERTS))
    assert torch.equal(rows.slot, slot) and torch.equal(rows.row_of_slot, row_of_slot) and torch.equal(rows.ends, ends)
    want = reference.tiles(ends, rows.num_tiles, grouped.TILE_ROWS)
    assert rows.tile_expert.tolist() == want[0].tolist()
    assert rows.tile_row.tolist() == want[1].tolist()


@pytest.mark.parametrize("name", ROUTES)
def test_each_kernel_equals_its_specification(name):
    x, gate_up, down, indices, weights = routed(name)
    rows, top_k = grouped.Rows(indices, NUM_EXPERTS), indices.shape[1]
    served = int(rows.ends[-1])
    z, act = rows.up_swiglu(x, gate_up)
    want_z, want_act = reference.up_swiglu(x, gate_up, rows.slot, rows.ends, top_k)
    close(z[:served], want_z[:served])
    close(act[:served], want_act[:served])
    y = rows.linear(act, down)
    want_y = reference.grouped_linear(want_act, down, rows.ends)
    close(y[:served], want_y[:served])
    dact = rows.linear(y, down, transposed=True)
    close(dact[:served], reference.grouped_linear(want_y, down.mT, rows.ends)[:served])
    close(rows.combine(y, weights), reference.combine(want_y, rows.row_of_slot, weights))
    ones = torch.ones_like(weights)
    close(rows.combine(y, None), reference.combine(want_y, rows.row_of_slot, ones))
    tokens = x[rows.slot.long() // top_k]
    close(rows.outer(x, want_act, gather_left=True), reference.grouped_outer(tokens, want_act, rows.ends))
    close(rows.outer(want_z, x, gather_right=True), reference.grouped_outer(want_z, tokens, rows.ends))


@pytest.mark.parametrize("name", ROUTES)
def test_layer_and_every_gradient(name):
    x, gate_up, down, indices, weights = routed(name)
    dout = tensor(len(x), WIDTH)
    results = []
    for forward in (lambda *args: ours.moe(*args)[0], reference.moe):
        leaves = [part.clone().requires_grad_() for part in (x, gate_up, down, weights)]
        out = forward(*leaves[:3], indices, leaves[3])
        results.append((out, *torch.autograd.grad(out, leaves, dout)))
    for label, got, want in zip(("out", "x", "gate_up", "down", "weights"), *results, strict=True):
        close(got, want, msg=lambda text, label=label: f"{label}: {text}")


def test_layer_in_bf16():
    x, gate_up, down, indices, weights = routed("mixed, several tiles an expert")
    low = [part.bfloat16() for part in (x, gate_up, down)]
    want = reference.moe(*(part.float() for part in low), indices, weights)
    got, _ = ours.moe(*low, indices, weights)
    assert got.dtype == torch.bfloat16
    error = (got.float() - want).norm() / want.norm()
    assert error < 8e-3


def test_a_rerun_gives_the_same_bits():
    args = routed("mixed, several tiles an expert")
    assert torch.equal(ours.moe(*args)[0], ours.moe(*args)[0])


def test_unwritten_rows_never_leak(monkeypatch):
    """Memory that kernels do not write holds NaN here; nothing of it reaches a result."""

    def poisoned(self, *shape, **kwargs):
        return torch.full(shape, torch.nan, dtype=kwargs.get("dtype", self.dtype), device=self.device)

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    x, gate_up, down, indices, weights = routed("slots served elsewhere")
    leaves = [part.requires_grad_() for part in (x, gate_up, down, weights)]
    out, _ = ours.moe(*leaves[:3], indices, leaves[3])
    grads = torch.autograd.grad(out.sum(), leaves)
    assert all(part.isfinite().all() for part in (out, *grads))


def test_custom_ops_keep_their_promises():
    """Fake shapes and autograd registration, as torch.compile and checkpointing rely on them."""
    x, gate_up, down, indices, weights = routed("one token")
    leaves = [part.requires_grad_() for part in (x, gate_up, down)]
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(ours.moe, (*leaves, indices, weights), test_utils=checks)


@pytest.mark.parametrize("implementation", ["eager", "policy_grouped_mm"])
def test_registered_back_end_equals_the_others(config, implementation):
    made = config(num_experts=NUM_EXPERTS, hidden_size=16, intermediate_size=24)
    results = []
    for name in (TRITON_EXPERTS, implementation):
        made._experts_implementation = name
        torch.manual_seed(1)
        experts = MoEPolicyExperts(made).to(DEVICE)
        for weight in experts.parameters():
            torch.nn.init.normal_(weight, std=0.3)
        x = tensor(7, 16).requires_grad_()
        indices = torch.stack([torch.randperm(4)[:2] for _ in range(7)]).to(DEVICE)
        weights = torch.rand(7, 2, device=DEVICE, requires_grad=True)
        out = experts(x, indices, weights)
        results.append((out, *torch.autograd.grad(out.square().sum(), (x, weights, *experts.parameters()))))
    for got, want in zip(*results, strict=True):
        close(got, want)


def test_another_activation_is_refused(config):
    made = config(hidden_act="gelu")
    made._experts_implementation = TRITON_EXPERTS
    experts = MoEPolicyExperts(made).to(DEVICE)
    with pytest.raises(ValueError, match="use policy_grouped_mm"):
        experts(tensor(1, 32), torch.zeros(1, 1, dtype=torch.long, device=DEVICE), torch.ones(1, 1, device=DEVICE))


@pytest.mark.parametrize("tokens, vocab, temperature", [(1, 5, 1.0), (19, 70, 0.7), (5, 33, 2.0)])
def test_linear_logprob_and_every_gradient(tokens, vocab, temperature):
    hidden, weight = tensor(tokens, WIDTH), tensor(vocab, WIDTH)
    ids = torch.randint(0, vocab, (tokens,), device=DEVICE)
    ids[0] = vocab - 1
    results = []
    for function in (linear_logprob, reference.linear_logprob):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logp, entropy = function(*leaves, ids, temperature=temperature)
        loss = (logp * torch.linspace(-1, 1, tokens, device=DEVICE)).sum() - 0.3 * entropy.square().sum()
        results.append((logp, entropy, *torch.autograd.grad(loss, leaves)))
    for got, want in zip(*results, strict=True):
        close(got, want)


def test_linear_logprob_over_several_chunks_and_far_logits(monkeypatch):
    """A backward in chunks, and logits of hundreds, where exp would overflow."""
    monkeypatch.setattr("policy_models.kernels.logprob.CHUNK_ROWS", 4)
    hidden, weight = tensor(10, WIDTH, scale=8.0), tensor(40, WIDTH, scale=8.0)
    ids = torch.arange(10, device=DEVICE)
    grads = []
    for function in (linear_logprob, reference.linear_logprob):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logp, entropy = function(*leaves, ids)
        assert logp.isfinite().all() and entropy.isfinite().all()
        grads.append((logp, entropy, *torch.autograd.grad(logp.sum() + entropy.sum(), leaves)))
    for got, want in zip(*grads, strict=True):
        close(got, want, atol=2e-3, rtol=1e-4)
