"""Every kernel against its specification: on the CPU in triton's interpreter, on a GPU where there is one."""

import pytest
import torch

pytest.importorskip("triton")

from plumbline.policy_models.kernels import TRITON_EXPERTS, dispatch, kernels_run_on, reference
from plumbline.policy_models.logprobs import answer_logprobs, pack_rows
from plumbline.policy_models.modeling import MoEPolicyExperts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if kernels_run_on(DEVICE) is not None:
    pytest.skip(kernels_run_on(DEVICE), allow_module_level=True)

from plumbline.policy_models.kernels import experts as ours  # noqa: E402
from plumbline.policy_models.kernels import grouped  # noqa: E402
from plumbline.policy_models.kernels.logprob import linear_logprob  # noqa: E402
from plumbline.policy_models.kernels.router import route_top_k  # noqa: E402

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
    for forward in (lambda *args: ours.moe(*args, True)[0], reference.moe):
        leaves = [part.clone().requires_grad_() for part in (x, gate_up, down, weights)]
        out = forward(*leaves[:3], indices, leaves[3])
        results.append((out, *torch.autograd.grad(out, leaves, dout)))
    for label, got, want in zip(("out", "x", "gate_up", "down", "weights"), *results, strict=True):
        close(got, want, msg=lambda text, label=label: f"{label}: {text}")


def test_layer_in_bf16():
    """No further from the exact result than the plain products in bf16 are."""
    x, gate_up, down, indices, weights = routed("mixed, several tiles an expert")
    low = [part.bfloat16() for part in (x, gate_up, down)]
    want = reference.moe(*(part.float() for part in low), indices, weights)
    got, _ = ours.moe(*low, indices, weights, True)
    assert got.dtype == torch.bfloat16
    ours_error, plain_error = ((found.float() - want).norm() for found in (got, reference.moe(*low, indices, weights)))
    assert ours_error < 1.2 * plain_error < 0.02 * want.norm()


def test_a_rerun_gives_the_same_bits():
    args = routed("mixed, several tiles an expert")
    assert torch.equal(ours.moe(*args, True)[0], ours.moe(*args, True)[0])


def test_nothing_is_kept_for_a_backward_that_will_not_come():
    args = routed("mixed, several tiles an expert")
    (out, z), (want, _) = ours.moe(*args, False), ours.moe(*args, True)
    assert torch.equal(out, want) and z.numel() == 0


def test_unwritten_rows_never_leak(monkeypatch):
    """Memory that kernels do not write holds NaN here; nothing of it reaches a result."""

    def poisoned(self, *shape, **kwargs):
        dtype = kwargs.get("dtype", self.dtype)
        poison = torch.nan if dtype.is_floating_point else -7
        return torch.full(shape, poison, dtype=dtype, device=self.device)

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    x, gate_up, down, indices, weights = routed("slots served elsewhere")
    leaves = [part.requires_grad_() for part in (x, gate_up, down, weights)]
    out, _ = ours.moe(*leaves[:3], indices, leaves[3], True)
    grads = torch.autograd.grad(out.sum(), leaves)
    assert all(part.isfinite().all() for part in (out, *grads))


def test_custom_ops_keep_their_promises():
    """Fake shapes and autograd registration, as torch.compile and checkpointing rely on them."""
    x, gate_up, down, indices, weights = routed("one token")
    leaves = [part.requires_grad_() for part in (x, gate_up, down)]
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(ours.moe, (*leaves, indices, weights, True), test_utils=checks)


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
    """A backward in chunks, and logits of hundreds, where exp would overflow and a logsumexp of them has no digits to spare.

    Whole numbers, so that the logits are exact in any order of adding, and neighbours in pairs, so that softmax has a choice.
    """
    monkeypatch.setattr("plumbline.policy_models.kernels.logprob.CHUNK_ROWS", 4)
    hidden, weight = (torch.randint(-16, 17, (rows, WIDTH), device=DEVICE).float() for rows in (10, 40))
    weight[1::2] = weight[::2]
    weight[1::2, 3] += 1
    ids = torch.arange(10, device=DEVICE)
    leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logp, entropy = linear_logprob(*leaves, ids)
    got = (logp, entropy, *torch.autograd.grad(logp.sum() + entropy.sum(), leaves))
    leaves = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logp_TV = (leaves[0] @ leaves[1].T).log_softmax(-1)
    logp, entropy = logp_TV[ids, ids], -(logp_TV.exp() * logp_TV).sum(-1)
    assert logp_TV.min() < -500 and entropy.max() > 0.5
    want = (logp, entropy, *torch.autograd.grad(logp.sum() + entropy.sum(), leaves))
    for one, exact in zip(got, want, strict=True):
        close(one.double(), exact, atol=4e-6, rtol=5e-7)


@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize("renormalise, scale", [(True, 1.0), (True, 2.5), (False, 1.0)])
@pytest.mark.parametrize("tokens, num_experts, top_k, biased", [(1, 3, 1, False), (9, 5, 3, True), (4, 40, 8, True)])
def test_choice_of_experts_and_its_gradient(tokens, num_experts, top_k, biased, sigmoid, renormalise, scale):
    logits, dweights = tensor(tokens, num_experts, scale=2.0), tensor(tokens, top_k)
    bias = tensor(num_experts) if biased else None
    results = []
    for function in (route_top_k, reference.route_top_k):
        leaf = logits.clone().requires_grad_()
        weights, indices = function(leaf, bias, top_k, sigmoid=sigmoid, renormalise=renormalise, scale=scale)
        results.append((weights, indices, *torch.autograd.grad(weights, leaf, dweights)))
    for got, want in zip(*results, strict=True):
        close(got, want)


def test_equal_scores_go_to_the_lower_index_and_huge_logits_stay_finite():
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [800.0, -800.0, 800.0, 0.0]], device=DEVICE)
    weights, indices = route_top_k(logits, None, 2, sigmoid=False, renormalise=True)
    assert indices.tolist() == [[0, 1], [0, 2]] and weights.tolist() == [[0.5, 0.5], [0.5, 0.5]]


@pytest.mark.parametrize("router", ["softmax", "sigmoid", "grouped"])
def test_a_model_on_the_kernels_equals_the_default(policy, router):
    """Kernels for routing and experts, in a whole model with its losses, against the default back end."""
    options = {"expert_groups": [2, 2], "groups_per_tok": 2} if router == "grouped" else {}
    options |= {"num_hidden_layers": 1, "moe_layers": [0], "router_bias_update_rate": 0.0}
    model = policy(router=router, **options).to(DEVICE).train()
    ids = torch.randint(3, 97, (2, 3), device=DEVICE)
    results = []
    for name in ("policy_grouped_mm", TRITON_EXPERTS):
        model.set_experts_implementation(name)
        out = model(ids, labels=ids, output_router_logits=True)
        results.append((out.logits, *torch.autograd.grad(out.loss, [*model.parameters()])))
    for got, want in zip(*results, strict=True):
        close(got, want, atol=1e-4, rtol=1e-4)


def test_log_probabilities_of_answers_on_the_kernels(policy):
    """`answer_logprobs` as PPO calls it: equal with and without logits, in values, states and gradients."""
    model = policy(num_hidden_layers=1, moe_layers=[0]).to(DEVICE)
    answers = torch.tensor([[5, 6, 2], [7, 2, 0]], device=DEVICE)
    keep = torch.tensor([[True, True, True], [True, True, False]], device=DEVICE)
    pack = pack_rows([[3, 4], [8]], answers, keep, [0, 1], 0)
    results = []
    for name in ("policy_grouped_mm", TRITON_EXPERTS):
        model.set_experts_implementation(name)
        states: list[torch.Tensor] = []
        logp, entropy = answer_logprobs(model, pack, temperature=0.7, states_out=states)
        results.append((logp, entropy, states[0], *torch.autograd.grad(logp.sum(), [*model.parameters()])))
    for got, want in zip(*results, strict=True):
        close(got, want, atol=1e-4, rtol=1e-4)


def test_the_dispatcher_takes_what_was_faster(config, monkeypatch):
    made = config()
    made._experts_implementation = dispatch.AUTO_EXPERTS
    experts = MoEPolicyExperts(made).to(DEVICE)
    for weight in experts.parameters():
        torch.nn.init.normal_(weight)
    slow = []
    monkeypatch.setattr(dispatch, "_seconds", lambda forward, *_: 2.0 if forward in slow else 1.0)
    for other in (dispatch.grouped_experts_forward, dispatch.triton_experts_forward):
        slow[:] = [other]
        state = torch.get_rng_state()
        assert dispatch.pick_faster(experts, 2, tokens=8) is not other
        assert torch.equal(torch.get_rng_state(), state)
    out = experts(tensor(3, 32), torch.tensor([[0, 1]] * 3, device=DEVICE), torch.ones(3, 2, device=DEVICE))
    assert out.shape == (3, 32) and out.isfinite().all()


def test_frozen_weights_cost_no_gradient(monkeypatch):
    """As under adapters: the other gradients are the same and the products of the weights' gradients do not run."""
    x, gate_up, down, indices, weights = routed("an expert without tokens")
    want = torch.autograd.grad(
        ours.moe(x.requires_grad_(), gate_up.requires_grad_(), down, indices, weights, True)[0].sum(), x
    )
    monkeypatch.setattr(grouped.Rows, "outer", None)
    got = torch.autograd.grad(ours.moe(x, gate_up.detach(), down, indices, weights, True)[0].sum(), x)
    assert torch.equal(*got, *want)
    hidden, head, ids = tensor(5, WIDTH).requires_grad_(), tensor(33, WIDTH), torch.arange(5, device=DEVICE)
    (got,) = torch.autograd.grad(linear_logprob(hidden, head, ids)[0].sum(), hidden)
    (want,) = torch.autograd.grad(reference.linear_logprob(hidden, head, ids)[0].sum(), hidden)
    close(got, want)
