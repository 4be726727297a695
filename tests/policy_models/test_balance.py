import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plumbline.policy_models.balance import load_balancing_loss, load_penalty, router_load, router_z_loss


def test_load_balancing_loss_by_hand():
    # two tokens, three experts, one each; mean probabilities 0.6, 0.225, 0.175
    probs = torch.tensor([[0.5, 0.25, 0.25], [0.7, 0.2, 0.1]])
    loss = load_balancing_loss([probs.log()], [torch.tensor([[0], [0]])])
    torch.testing.assert_close(loss, torch.tensor(3 * 1.0 * 0.6))  # E * f_0 * P_0
    split = load_balancing_loss([probs.log()], [torch.tensor([[0], [1]])])
    torch.testing.assert_close(split, torch.tensor(3 * (0.5 * 0.6 + 0.5 * 0.225)))


@pytest.mark.parametrize("num_experts, top_k", [(4, 1), (4, 2), (8, 3)])
def test_even_routing_gives_top_k(num_experts, top_k):
    logits = torch.zeros(num_experts, num_experts)
    indices = (torch.arange(num_experts)[:, None] + torch.arange(top_k)) % num_experts  # every expert top_k times
    loss = load_balancing_loss([logits, logits], [indices, indices])
    torch.testing.assert_close(loss, torch.tensor(float(top_k)))


def test_opposite_collapses_in_two_layers_do_not_cancel():
    """The pooled form would call this balanced."""
    to_first = torch.tensor([[20.0, 0.0]]).expand(10, -1)
    layers = [to_first, to_first.flip(-1)]
    loss = load_balancing_loss(layers, [layer.argmax(-1, keepdim=True) for layer in layers])
    torch.testing.assert_close(loss, torch.tensor(2.0))  # E, the worst


def test_z_loss_by_hand():
    logits = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]])  # logsumexp log 2 and log 4
    torch.testing.assert_close(router_z_loss([logits]), torch.tensor((math.log(2) ** 2 + math.log(4) ** 2) / 2))
    kept = router_z_loss([logits, logits], torch.tensor([False, True]))
    torch.testing.assert_close(kept, torch.tensor(math.log(4) ** 2))


def test_load_by_hand():
    logits = torch.log(torch.tensor([[0.5, 0.5, 1e-9, 1e-9], [0.5, 0.5, 1e-9, 1e-9], [1e-9, 1e-9, 0.5, 0.5]]))
    indices = torch.tensor([[0, 1], [0, 1], [2, 3]])
    load = router_load([logits], [indices], torch.tensor([True, True, False]))
    torch.testing.assert_close(load.share_LE, torch.tensor([[0.5, 0.5, 0.0, 0.0]]))
    assert load.max_violation_L.tolist() == [1.0] and load.num_dead_L.tolist() == [2]
    torch.testing.assert_close(load.entropy_L, torch.tensor([math.log(2)]), atol=1e-6, rtol=0)
    metrics = load.metrics()
    assert metrics["router/dead_experts"] == 2.0 and metrics["router/worst_max_violation"] == 1.0


def test_losses_drive_the_logits_towards_balance():
    logits = torch.tensor([[2.0, 0.0], [2.0, 0.0]], requires_grad=True)
    load_balancing_loss([logits], [torch.tensor([[0], [0]])]).backward()
    assert (logits.grad[:, 0] > 0).all() and (logits.grad[:, 1] < 0).all()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), num_kept=st.integers(1, 12), num_pads=st.integers(0, 9), top_k=st.integers(1, 4))
def test_padding_never_counts(seed, num_kept, num_pads, top_k):
    """Losses and figures over kept tokens equal those of a batch that never had the padding."""
    rng = torch.Generator().manual_seed(seed)
    layers = [torch.randn(num_kept + num_pads, 4, generator=rng) * 3 for _ in range(2)]
    keep = torch.zeros(num_kept + num_pads, dtype=torch.bool)
    keep[torch.randperm(len(keep), generator=rng)[:num_kept]] = True
    chosen = [layer.topk(top_k).indices for layer in layers]
    alone, chosen_alone = [layer[keep] for layer in layers], [index[keep] for index in chosen]
    torch.testing.assert_close(load_balancing_loss(layers, chosen, keep), load_balancing_loss(alone, chosen_alone))
    torch.testing.assert_close(router_z_loss(layers, keep), router_z_loss(alone))
    assert router_load(layers, chosen, keep).metrics() == pytest.approx(
        router_load(alone, chosen_alone).metrics(), abs=1e-5
    )


def test_losses_are_fp32_under_autocast():
    logits = [torch.randn(50, 4) for _ in range(2)]
    chosen, keep = [layer.topk(2).indices for layer in logits], torch.rand(50) < 0.7
    want = load_balancing_loss(logits, chosen, keep), router_z_loss(logits, keep)
    with torch.autocast("cpu", torch.bfloat16):
        got = load_balancing_loss(logits, chosen, keep), router_z_loss(logits, keep)
    assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))


def test_nothing_kept_is_no_loss():
    logits, nothing = torch.randn(3, 4), torch.zeros(3, dtype=torch.bool)
    assert load_balancing_loss([logits], [logits.topk(2).indices], nothing) == 0
    assert router_z_loss([logits], nothing) == 0


def test_keep_of_another_length_is_refused():
    with pytest.raises(ValueError, match="saw 3 tokens"):
        router_z_loss([torch.randn(3, 4)], torch.ones(1, 4, dtype=torch.bool))


def test_load_penalty_by_hand():
    """Loads over even of 1.5, 0.5: above 1.2 only the first is charged, (1.5 - 1.2)^2."""
    logits = torch.zeros(4, 2, requires_grad=True)
    indices = torch.tensor([[0], [0], [0], [1]])
    loss = load_penalty([logits], [indices], capacity=1.2)
    torch.testing.assert_close(loss, torch.tensor(0.09))
    loss.backward()
    assert (logits.grad[:, 0] > 0).all()  # pushes away from the busy expert
    assert load_penalty([logits], [indices], capacity=1.5) == 0


def test_window_counts_over_micro_batches():
    """One micro-batch on expert 0, the next on expert 1: even over the window, so the loss says so."""
    first, second = torch.tensor([[9.0, -9.0]]).expand(5, -1), torch.tensor([[-9.0, 9.0]]).expand(5, -1)
    chosen = second.argmax(-1, keepdim=True)
    torch.testing.assert_close(load_balancing_loss([second], [chosen]), torch.tensor(2.0))
    window = [torch.tensor([5.0, 5.0])]
    torch.testing.assert_close(load_balancing_loss([second], [chosen], None, window), torch.tensor(1.0))
    assert first.shape == second.shape


def test_slots_that_no_expert_serves_are_left_out():
    load = router_load([torch.zeros(2, 2)], [torch.tensor([[0, 2], [1, 2]])])
    assert load.share_LE.tolist() == [[0.25, 0.25]]
