"""The routers: by hand, and each by the property it exists for."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from plumbline.policy_models import MoEPolicyConfig
from plumbline.policy_models.configuration import ROUTER_NAMES
from plumbline.policy_models.router import (
    ROUTERS,
    RouterBalance,
    freeze_routers,
    place,
    record_routes,
    register_router,
    replay_routes,
    routers,
)

IDS = torch.randint(3, 97, (3, 11), generator=torch.Generator().manual_seed(5))
GROUPS = [4, 2, 2]
OPTIONS = {
    "softmax": {},
    "sigmoid": {},
    "capacity": {},
    "progressive": {},
    "grouped": {"expert_groups": GROUPS, "groups_per_tok": 2},
}

pytestmark = pytest.mark.filterwarnings("ignore:router 'capacity'", "ignore:router 'sigmoid'")


def make_router(kind="softmax", *, width=8, num_experts=8, top_k=2, std=1.0, **options):
    torch.manual_seed(0)
    options = OPTIONS[kind] | options
    config = MoEPolicyConfig(
        router=kind,
        num_experts=num_experts,
        num_experts_per_tok=top_k,
        hidden_size=width,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=2,
        **options,
    )
    router = ROUTERS[kind](config)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.normal_(std=std)
    return router


def skewed(num_tokens, width=8, seed=1):
    """Tokens with a direction in common: a fresh router sends most of them to the same experts."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(num_tokens, width, generator=rng) * 0.5 + torch.randn(width, generator=rng)


def share(indices, num_experts=8):
    return torch.bincount(indices.flatten(), minlength=num_experts)[:num_experts] / indices.numel()


def test_softmax_by_hand():
    logits = torch.tensor([math.log(4), 0.0, math.log(3)])  # probabilities 4/8, 1/8, 3/8
    for renormalise, want in ((True, [4 / 7, 3 / 7]), (False, [4 / 8, 3 / 8])):
        router = make_router(num_experts=3, width=2, norm_topk_prob=renormalise)
        router.weight.data = torch.stack([logits, torch.zeros(3)], dim=1)
        got, weights, indices = router(torch.tensor([[1.0, 0.0]]))
        torch.testing.assert_close(got, logits[None])
        assert indices.tolist() == [[0, 2]]
        torch.testing.assert_close(weights, torch.tensor([want]))


def test_sigmoid_by_hand():
    """The bias moves the choice from expert 2 to expert 1 and leaves the weights alone."""
    router = make_router("sigmoid", num_experts=3, width=2)
    router.weight.data = torch.tensor([[2.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    x = torch.tensor([[1.0, 0.0]])
    assert router(x)[2].tolist() == [[0, 2]]
    router.e_score_correction_bias[1] = 0.5  # sigmoid(0) + 0.5 = 1.0 > sigmoid(2) = 0.88
    _, weights, indices = router(x)
    assert indices.tolist() == [[1, 0]]
    first, second = 0.5, 1 / (1 + math.exp(-2))
    torch.testing.assert_close(weights, torch.tensor([[first, second]]) / (first + second))


def test_grouped_by_hand():
    """Expert 0 is the likeliest of all but sits in the group that comes second."""
    router = make_router("grouped", num_experts=4, width=2, expert_groups=[2, 2], groups_per_tok=1)
    router.group_weight.data = torch.tensor([[0.0, 0.0], [math.log(1.5), 0.0]])  # p(g) 0.4, 0.6
    router.weight.data = torch.tensor([[5.0, 0.0], [-5.0, 0.0], [0.0, 0.0], [math.log(2), 0.0]])  # p(e | b) 1/3, 2/3
    logits, weights, indices = router(torch.tensor([[1.0, 0.0]]))
    assert logits.argmax() != 2 and indices.tolist() == [[3, 2]]
    torch.testing.assert_close(logits.softmax(-1)[0, 2:], torch.tensor([0.2, 0.4]))
    torch.testing.assert_close(weights, torch.tensor([[2 / 3, 1 / 3]]))


@settings(max_examples=25, deadline=None)
@given(kind=st.sampled_from(sorted(ROUTERS)), seed=st.integers(0, 1000), tokens=st.integers(1, 20), train=st.booleans())
def test_every_router_keeps_the_contract(kind, seed, tokens, train):
    """K different experts a token, weights that sum to the scaling factor, fp32 from bf16, gradients to every weight."""
    router = make_router(kind, top_k=3, routed_scaling_factor=2.0).train(train).to(torch.bfloat16)
    x = torch.randn(tokens, 8, generator=torch.Generator().manual_seed(seed)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        logits, weights, indices = router(x)
    assert logits.dtype == weights.dtype == torch.float32 and logits.shape == (tokens, 8)
    assert all(len(set(row)) == 3 and max(row) < 8 for row in indices.tolist())
    torch.testing.assert_close(weights.sum(-1), torch.full((tokens,), 2.0))
    (weights * torch.arange(3)).sum().backward()
    assert all(parameter.grad is not None for parameter in router.parameters())


@pytest.mark.parametrize("kind", ["softmax", "progressive", "capacity"])
def test_new_two_stage_and_dropless_routers_are_the_softmax_router(kind):
    want, got = make_router("softmax"), make_router(kind).eval()
    got.weight.data = want.weight.data
    if kind == "progressive":
        got.refine.data.zero_()
    x = torch.randn(30, 8)
    for ours, theirs in zip(got(x), want(x), strict=True):
        torch.testing.assert_close(ours, theirs)


# what each exists for


def test_the_bias_balances_a_skewed_load_without_a_loss():
    router, x = make_router("sigmoid", router_bias_update_rate=0.02).train(), skewed(400)
    router.window_E = torch.zeros(8)
    before = share(router(x)[2])
    weight = router.weight.clone()
    for _ in range(100):
        router(x)
        router.end_step()
    after = share(router(x)[2])
    assert before.max() > 0.2 and before.min() < 0.02  # 1/8 is even
    assert after.max() < 0.16 and after.min() > 0.09
    assert torch.equal(router.weight, weight)


def test_the_bias_stands_still_without_end_step_and_in_evaluation():
    router, x = make_router("sigmoid").train(), skewed(50)
    for _ in range(3):
        router(x)
    router.end_step()  # nobody opened a window
    router.window_E = torch.zeros(8)
    router.eval()(x)
    router.end_step()
    assert (router.e_score_correction_bias == 0).all()


def test_the_bias_survives_a_cast_to_bf16():
    router = make_router("sigmoid")
    router.e_score_correction_bias += 1.001
    assert router.to(torch.bfloat16).e_score_correction_bias.tolist() == [pytest.approx(1.001)] * 8


def test_sigmoid_without_its_trainer_warns():
    with pytest.warns(UserWarning, match="RouterBalance"):
        make_router("sigmoid").train()(torch.randn(2, 8))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    tokens=st.integers(1, 40),
    top_k=st.integers(1, 3),
    slack=st.floats(0.5, 2.0),
    data=st.data(),
)
def test_capacity_is_respected_and_slots_go_down_their_choices(seed, tokens, top_k, slack, data):
    scores = torch.rand(tokens, 5, generator=torch.Generator().manual_seed(seed))
    capacity = torch.tensor([data.draw(st.integers(0, math.ceil(slack * tokens))) for _ in range(5)])
    tries = data.draw(st.integers(top_k, 5))
    placed = place(scores, capacity, top_k, tries)
    load = torch.bincount(placed.flatten(), minlength=6)[:5]
    assert (load <= capacity).all()
    for token, row in enumerate(placed.tolist()):
        used = [e for e in row if e < 5]
        assert len(set(used)) == len(used)
        choices = scores[token].argsort(descending=True).tolist()[:tries]
        assert set(used) <= set(choices)
        if len(used) < top_k:  # without a place only where every expert tried is full
            assert all(load[e] == capacity[e] for e in choices if e not in used)
    assert torch.equal(place(scores, torch.full((5,), tokens), top_k, tries), scores.topk(top_k).indices)


def test_capacity_takes_the_highest_scores():
    scores = torch.tensor([[0.6, 0.3, 0.1], [0.9, 0.05, 0.05], [0.7, 0.1, 0.2]])
    placed = place(scores, torch.tensor([1, 1, 1]), 1, 3)
    assert placed.tolist() == [[1], [0], [2]]


def test_capacity_evens_the_load_follows_it_and_loses_nothing():
    router, x = make_router("capacity", router_capacity_factor=1.0).train(), skewed(64)
    router.window_E = torch.zeros(8)
    demand = share(router.eval()(x)[2])
    even = router.train()(x)[2]
    assert share(even).max() <= demand.max() and share(even).max() < 0.16
    assert router.rerouted > 0.2 and (even < 8).all()
    first = router.capacity(64)
    assert first.tolist() == [16] * 8
    for _ in range(30):
        router(x)
        router.end_step()
    followed = router.capacity(64)
    busiest = demand.argmax()
    assert followed[busiest] > 16 and followed.sum() >= 128 and followed.min() >= 8
    assert router(x)[2].eq(busiest).sum() == followed[busiest]


def test_dropless_in_evaluation():
    """Outside training the choice of a token does not depend on its batch mates."""
    router, x = make_router("capacity", router_capacity_factor=1.0), skewed(64)
    together = router.eval()(x)[2]
    assert torch.equal(together, torch.cat([router(row[None])[2] for row in x]))
    assert not torch.equal(router.train()(x)[2], together)


def test_what_overflows_goes_to_the_shared_expert(policy):
    """A slot without room keeps its weight: the shared expert gets it, in every back end."""
    options = {"router": "capacity", "shared_expert_intermediate_size": 16, "router_capacity_factor": 1.0}
    model = policy(num_experts_per_tok=1, **options).train()
    moe = model.model.layers[0].mlp
    with torch.no_grad():
        moe.gate.weight[0] += 1.0
        moe.shared_expert_gate.normal_()
    x = torch.randn(1, 40, 32) + 0.5
    outs = []
    for name in ("eager", "policy_grouped_mm", "grouped_mm"):
        model.set_experts_implementation(name)
        outs.append(moe(x))
    _, weights, indices = moe.gate(x[0])
    lost = (indices == 4).float()
    assert moe.gate.overflowed == lost.mean() > 0 and (weights[indices == 4] == 0).all()
    shared = moe.shared_expert(x[0]) * (2 * (x[0] @ moe.shared_expert_gate.T).sigmoid() + lost)
    model.set_experts_implementation("eager")
    torch.testing.assert_close(outs[0][0], moe.experts(x[0], indices, weights) + shared)
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0])


def test_capacity_says_that_batch_mates_matter():
    with pytest.warns(UserWarning, match="depend on the other tokens of the batch"):
        make_router("capacity")


def test_refinement_learns_routes_that_no_linear_router_can():
    """Exclusive-or of two features: half of it is wrong for any linear router; the second stage gets all of it."""
    x = torch.tensor([[a, b, 1.0] for a in (-1.0, 1.0) for b in (-1.0, 1.0)])
    expert = torch.tensor([0, 1, 1, 0])
    right = {}
    for kind in ("softmax", "progressive"):
        router = make_router(kind, width=3, num_experts=2, top_k=1, std=0.5)
        optimizer = torch.optim.Adam(router.parameters(), lr=0.05)
        for _ in range(200):
            F.cross_entropy(router(x)[0], expert).backward()
            optimizer.step()
            optimizer.zero_grad()
        right[kind] = (router(x)[2][:, 0] == expert).sum().item()
    assert right == {"softmax": right["softmax"], "progressive": 4} and right["softmax"] <= 3


def test_the_second_stage_chooses_among_candidates_only():
    router, x = make_router("progressive", router_candidates=3), torch.randn(200, 8)
    candidates = (x @ router.weight.T).topk(3).indices
    chosen = router(x)[2]
    assert (chosen[..., None] == candidates[:, None]).any(-1).all()
    assert not torch.equal(chosen, candidates[:, :2])  # the refinement is at work


def test_a_token_stays_within_its_groups():
    router, x = make_router("grouped", top_k=3, groups_per_tok=2), torch.randn(200, 8)
    logits, _, chosen = router(x)
    group_of = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2])
    mass = torch.stack([logits.softmax(-1)[:, group_of == g].sum(-1) for g in range(3)], dim=-1)
    torch.testing.assert_close(mass, (x @ router.group_weight.T).softmax(-1))
    best = mass.topk(2).indices
    assert (group_of[chosen][..., None] == best[:, None]).any(-1).all()
    assert len(set(map(tuple, best.sort().values.tolist()))) == 3  # all pairs of groups occur


# in the model


@pytest.mark.parametrize("kind", ROUTERS)
@pytest.mark.parametrize("shared", [0, 16])
def test_models_with_every_router_train_save_and_load(policy, kind, shared, tmp_path):
    model = policy(router=kind, num_experts=8, shared_expert_intermediate_size=shared, **OPTIONS[kind]).train()
    model(IDS, labels=IDS, output_router_logits=True).loss.backward()
    idle = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert all(n.endswith("gate.reduce") for n in idle)  # behind a zero matrix at first
    model.eval().save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("kind", ROUTERS)
def test_generation_is_the_same_with_and_without_cache(policy, kind):
    model = policy(router=kind, num_experts=8, shared_expert_intermediate_size=16, **OPTIONS[kind])
    mask = torch.ones_like(IDS)
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(IDS, **options), model.generate(IDS, use_cache=False, **options))


def test_balance_callback_counts_kept_tokens_over_micro_batches(policy):
    model = policy(router="sigmoid").train()
    callback = RouterBalance()
    callback.on_train_begin(None, None, None, model=model)
    mask = torch.ones_like(IDS)
    mask[:, :4] = 0
    for _ in range(2):
        model(IDS, attention_mask=mask)
    assert [router.window_E.sum().item() for router in routers(model)] == [2 * 2 * 21] * 2
    loads = [router.window_E / router.window_E.sum() for router in routers(model)]
    callback.on_optimizer_step(None, None, None, model=model)
    for router, load in zip(routers(model), loads, strict=True):
        assert torch.equal(router.e_score_correction_bias, 1e-3 * torch.sign(0.25 - load))
        assert router.window_E.sum() == 0
    callback.on_train_end(None, None, None, model=model)
    assert all(router.window_E is None for router in routers(model))


def test_replay_sends_tokens_where_they_went_and_routers_still_learn(policy):
    model = policy()
    with record_routes(model) as routes:
        want = model(IDS).logits
    assert [tuple(route.shape) for route in routes] == [(33, 2), (33, 2)] and routes[0].dtype == torch.int16
    with torch.no_grad():
        for router in routers(model):
            router.weight.add_(torch.randn_like(router.weight))
    with record_routes(model) as moved, torch.no_grad():
        model(IDS)
    assert not torch.equal(moved[0], routes[0])
    with replay_routes(model, routes), record_routes(model) as replayed:
        got = model(IDS).logits
    assert all(torch.equal(a, b) for a, b in zip(replayed, routes, strict=True))
    assert not torch.allclose(got, want)  # weights come from the live logits
    got.sum().backward()
    assert all(router.weight.grad.abs().sum() > 0 for router in routers(model))
    # -1: the router's own choice
    with replay_routes(model, [torch.full_like(r, -1) for r in routes]), record_routes(model) as own:
        model(IDS)
    assert torch.equal(own[0], moved[0])


def test_replay_of_another_batch_is_refused(policy):
    model = policy()
    with record_routes(model) as routes:
        model(IDS)
    with pytest.raises(ValueError, match="1 layers of routes for 2"), replay_routes(model, routes[:1]):
        pass
    with pytest.raises(ValueError, match="cannot be replayed"), replay_routes(model, routes):
        model(IDS[:1])


def test_frozen_routers_do_not_learn(policy):
    model = policy(router="progressive")
    assert freeze_routers(model) == 2 * (4 * 32 + 16 * 32 + 4 * 16)
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is None for router in routers(model) for p in router.parameters())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"router": "hash"}, "not one of softmax"),
        ({"router_capacity_factor": 0.5}, "without room"),
        ({"router_candidates": 1}, "router_candidates"),
        ({"router": "grouped"}, "expert_groups"),
        ({"expert_groups": [2, 2]}, "only with it"),
        ({"router": "grouped", "expert_groups": [3]}, "4 in all"),
        ({"router": "grouped", "expert_groups": [3, 1]}, "fewer experts"),
        ({"routed_scaling_factor": 0.0}, "positive"),
    ],
)
def test_settings_that_clash_are_refused(config, options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)


def test_a_router_of_somebody_elses_has_a_name():
    class Mine(ROUTERS["softmax"]):
        pass

    with pytest.raises(ValueError, match="router='mine' is not one of softmax"):
        MoEPolicyConfig(router="mine")
    with pytest.raises(ValueError, match="router 'sigmoid' is SigmoidRouter already; choose another name"):
        register_router("sigmoid", Mine)
    register_router("mine", Mine)
    try:
        register_router("mine", Mine)  # a module that is imported twice
        assert MoEPolicyConfig(router="mine").router == "mine" and ROUTER_NAMES.count("mine") == 1
    finally:
        ROUTER_NAMES.remove("mine")
        del ROUTERS["mine"]
