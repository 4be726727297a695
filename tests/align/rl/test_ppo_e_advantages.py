"""PPO checklist, E: GAE, returns, whitening, the critic and its loss."""

import dataclasses

import pytest
import torch

import plumbline.align.ppo
from plumbline.align.rl.advantages import gae, whiten
from plumbline.align.rl.losses import clipped_value_loss

T, F = True, False


def naive_gae(reward, value, gamma, lam):
    """A_t = sum_k (gamma lam)^k delta_{t+k} of one answer, each sum from scratch, fp64."""
    reward, value = reward.double().tolist(), value.double().tolist()
    n = len(reward)
    delta = [reward[t] + gamma * (value[t + 1] if t + 1 < n else 0.0) - value[t] for t in range(n)]
    return [sum((gamma * lam) ** k * delta[t + k] for k in range(n - t)) for t in range(n)]


# E1


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (1.0, 1.0), (0.9, 0.8), (0.99, 0.0), (0.0, 0.95)])
def test_E1_gae_equals_the_naive_sum(gamma, lam):
    generator = torch.Generator().manual_seed(3)
    lengths = [7, 1, 4, 0]
    keep = torch.arange(7) < torch.tensor(lengths)[:, None]
    reward, value = (torch.randn(4, 7, generator=generator).double() for _ in range(2))
    advantage, returns = gae(reward, value, keep, gamma=gamma, lam=lam)  # pads hold noise here, on purpose
    for row, n in enumerate(lengths):
        want = naive_gae(reward[row, :n], value[row, :n], gamma, lam)
        torch.testing.assert_close(advantage[row, :n], torch.tensor(want, dtype=torch.float64), rtol=1e-12, atol=1e-12)
        assert (advantage[row, n:] == 0).all() and (returns[row, n:] == 0).all()


def test_E1_by_hand():
    reward, value = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.25, 0.75]])
    advantage, returns = gae(reward, value, torch.ones(1, 3, dtype=torch.bool), gamma=1.0, lam=0.5)
    # deltas -0.25, 0.5, 0.25; nothing follows the last token, finished or cut off
    assert advantage.tolist() == [[-0.25 + 0.5 * 0.5 + 0.25 * 0.25, 0.5 + 0.5 * 0.25, 0.25]]
    assert returns.tolist() == [[0.5625, 0.875, 1.0]]


def test_E1_with_lam_1_the_return_is_the_sum_of_what_follows():
    generator = torch.Generator().manual_seed(4)
    reward, value = (torch.randn(3, 6, generator=generator).double() for _ in range(2))
    _, returns = gae(reward, value, torch.ones(3, 6, dtype=torch.bool), gamma=1.0, lam=1.0)
    torch.testing.assert_close(returns, reward.flip(1).cumsum(1).flip(1), rtol=1e-12, atol=1e-12)


# E2


@pytest.mark.parametrize("seed", range(5))
def test_E2_gaps_inside_an_answer_are_stepped_over(seed):
    """An answer with unkept positions inside gives what the answer without them gives."""
    generator = torch.Generator().manual_seed(seed)
    reward, value = (torch.randn(4, 9, generator=generator).double() for _ in range(2))
    keep = torch.rand(4, 9, generator=generator) < 0.6
    advantage, returns = gae(reward, value, keep, gamma=0.97, lam=0.9)
    for row in range(4):
        want = naive_gae(reward[row][keep[row]], value[row][keep[row]], 0.97, 0.9)
        torch.testing.assert_close(
            advantage[row][keep[row]], torch.tensor(want, dtype=torch.float64), rtol=1e-12, atol=1e-12
        )
    assert (advantage[~keep] == 0).all() and (returns[~keep] == 0).all()


def test_E2_by_hand():
    reward, value = torch.tensor([[1.0, 99.0, 2.0]]), torch.tensor([[0.5, 77.0, 0.25]])
    advantage, returns = gae(reward, value, torch.tensor([[T, F, T]]), gamma=1.0, lam=1.0)
    assert advantage.tolist() == [[2.5, 0.0, 1.75]] and returns.tolist() == [[3.0, 0.0, 2.0]]


# E3, E4


def test_E3_returns_come_from_the_unwhitened_advantages(make_ppo, rolled_out, score_of):
    ppo = make_ppo("llama", perturb=0.1, kl_coef=0.0, lam=1.0)
    batch, _ = rolled_out(ppo)
    totals = [5.0, -3.0, 8.0, 0.0, 1.0, -9.0, 4.0, 2.0]
    keep, white, returns, _ = ppo.advantages(batch, score_of(totals))
    assert returns[:, 0].tolist() == pytest.approx(totals, abs=1e-5)
    raw = (returns - batch.old_value).masked_fill(~keep, 0.0)
    torch.testing.assert_close(white, whiten(raw, keep), atol=1e-5, rtol=1e-5)
    assert white[keep].mean().abs() < 1e-6 and white[keep].std(correction=0) == pytest.approx(1.0, abs=1e-5)


def test_E4_whitening_of_two_ranks_equals_one(world):
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(6, 5, generator=generator) + torch.arange(6)[:, None]  # the halves have other means
    keep = torch.rand(6, 5, generator=generator) < 0.7
    two = world(2)
    parts = [slice(0, 2), slice(2, 6)]  # and other numbers of rows
    halves = two.run(lambda rank: whiten(x[parts[rank]], keep[parts[rank]], all_reduce=lambda t: two.add_up(rank, t)))
    together = whiten(x, keep)
    torch.testing.assert_close(torch.cat(halves), together, atol=1e-6, rtol=1e-6)
    alone = torch.cat([whiten(x[part], keep[part]) for part in parts])
    assert (alone - together).abs().max() > 0.1  # per rank, it would depend on how many ranks there are


def test_E4_advantages_of_two_ranks_equal_one(make_ppo, rolled_out, take_rows, score_of, world):
    options = {"perturb": 0.1, "kl_coef": 0.1}
    alone = make_ppo("llama", **options)
    batch, _ = rolled_out(alone)
    totals = [5.0, -3.0, None, 0.0, 1.0, -9.0, 4.0, 2.0]
    want = alone.advantages(batch, score_of(totals))
    two = world(2)
    ranks = [make_ppo("llama", rank=rank, **options) for rank in two.ranks]
    rows = [[0, 1, 2], [3, 4, 5, 6, 7]]
    got = two.run(
        lambda rank: ranks[rank].advantages(take_rows(batch, rows[rank]), score_of([totals[r] for r in rows[rank]]))
    )
    for part in range(3):
        torch.testing.assert_close(torch.cat([one[part] for one in got]), want[part], atol=1e-5, rtol=1e-5)
    same = [name for name in want[3] if name != "rollout/answer_tokens_max"]
    for name in same:
        assert got[0][3][name] == got[1][3][name] == pytest.approx(want[3][name], rel=1e-5, abs=1e-6), name


# E6


VALUE_CASES = [  # value, old value, return, loss by hand at clip = 0.2, gradient of the value
    (1.1, 1.0, 2.0, 0.5 * 0.81, -0.9),  # within the band: plain squared error
    (1.5, 1.0, 2.0, 0.5 * 0.64, 0.0),  # moved too far towards the return: held at 1.2, no gradient
    (0.5, 1.0, 2.0, 0.5 * 2.25, -1.5),  # moved away: the free term is worse and pulls back
    (2.5, 1.0, 1.1, 0.5 * 1.96, 1.4),  # far beyond the return: free again
]


@pytest.mark.parametrize("value, old, ret, want, slope", VALUE_CASES)
def test_E6_clipped_value_loss_by_hand(value, old, ret, want, slope):
    value = torch.tensor([[value, 50.0]], dtype=torch.float64, requires_grad=True)
    old, ret = torch.tensor([[old, -7.0]]).double(), torch.tensor([[ret, 3.0]]).double()
    loss, sums = clipped_value_loss(value, old, ret, torch.tensor([[T, F]]), clip=0.2, num_tokens=1.0)
    loss.backward()
    assert loss.item() == pytest.approx(want, rel=1e-6)
    assert value.grad[0, 0].item() == pytest.approx(slope, rel=1e-6, abs=1e-12)
    assert value.grad[0, 1] == 0  # padding has no gradient
    assert sums["value/clip_fraction"] == (1.0 if slope == 0.0 else 0.0)


def test_E6_loss_is_a_sum_over_num_tokens():
    value, old, ret = torch.randn(3, 2, 4).double()
    keep = torch.rand(2, 4) < 0.7
    one, _ = clipped_value_loss(value, old, ret, keep, clip=0.5, num_tokens=1.0)
    seven, _ = clipped_value_loss(value, old, ret, keep, clip=0.5, num_tokens=torch.tensor(7.0))
    assert one.item() == pytest.approx(7 * seven.item(), rel=1e-12)


def test_E6_padding_that_is_not_finite_reaches_neither_loss_nor_gradient():
    keep = torch.tensor([[T, F]])
    value = torch.tensor([[0.5, 2.0]], requires_grad=True)
    old, ret = torch.tensor([[0.4, float("nan")]]), torch.tensor([[1.0, float("inf")]])
    loss, sums = clipped_value_loss(value, old, ret, keep, clip=0.2, num_tokens=1.0)
    loss.backward()
    assert loss.item() == pytest.approx(0.125) and value.grad.tolist() == [[-0.5, 0.0]]
    assert sums["value/clip_fraction"] == 0


# E7


@pytest.mark.parametrize("options", [{"critic": "own"}, {"critic": "head"}, {"lora": False, "critic": "own"}])
def test_E7_critic_starts_at_0(make_ppo, rolled_out, options):
    batch, _ = rolled_out(make_ppo("moe", **options))
    assert (batch.old_value == 0).all()


@pytest.mark.parametrize("options", [{"critic": "own"}, {"critic": "head"}, {"lora": False, "critic": "own"}])
def test_E7_critic_warmup_leaves_the_policy_bit_identical(make_ppo, one_step, options):
    ppo = make_ppo("moe", critic_warmup_steps=1, ppo_epochs=2, minibatches=2, steps=3, **options)
    policy, critic = ([p.detach().clone() for p in group] for group in ppo.groups)
    warm = one_step(ppo, 0)
    assert all(torch.equal(a, b) for a, b in zip(policy, ppo.groups[0], strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(critic, ppo.groups[1], strict=True))
    assert warm.updated["policy/grad_norm"] == 0 < warm.updated["value/grad_norm"]
    one_step(ppo, 1)
    assert any(not torch.equal(a, b) for a, b in zip(policy, ppo.groups[0], strict=True))


def test_E7_critic_learns_the_return(make_ppo, one_step, share):
    """A score that never changes: after some steps of the critic alone, values are near it."""
    ppo = make_ppo(
        "llama", components=[(share(letters="", scale=0.0), 1.0)], critic_warmup_steps=99, steps=20, kl_coef=0.0,
        missing_eos_penalty=0.0, ppo_epochs=2, value_clip=5.0,
    )  # fmt: skip
    ppo.reward.components["share"] = lambda prompts, answers: [2.0] * len(answers)
    errors = [float((s.batch.old_value - 2.0)[s.keep].abs().mean()) for s in (one_step(ppo, i) for i in range(8))]
    assert errors[0] == 2.0 and errors[-1] < 0.7


# E8


def test_E8_explained_variance_by_hand(make_ppo, rolled_out, score_of):
    ppo = make_ppo("llama", perturb=0.1, kl_coef=0.1)
    batch, _ = rolled_out(ppo)
    keep, _, returns, measured = ppo.advantages(batch, score_of([1.0, None, 3.0, -1.0, 0.0, 0.5, 2.0, -2.0]))
    kept, value = returns[keep].double(), batch.old_value[keep].double()
    want = 1 - (kept - value).var(correction=0) / kept.var(correction=0)
    assert measured["val/explained_variance"] == pytest.approx(float(want), abs=1e-4)


def test_E8_a_perfect_critic_explains_everything(make_ppo, rolled_out, score_of):
    ppo = make_ppo("llama", kl_coef=0.0, lam=1.0)
    batch, _ = rolled_out(ppo)
    totals = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
    perfect = dataclasses.replace(batch, old_value=torch.tensor(totals)[:, None].expand(batch.keep.shape).clone())
    assert ppo.advantages(perfect, score_of(totals))[3]["val/explained_variance"] == pytest.approx(1.0, abs=1e-5)


# E9


def gradients(ppo, one_minibatch):
    batch, keep, advantage, returns = one_minibatch
    ppo._accumulate(batch, list(range(len(batch))), keep, advantage, returns, keep.sum().double(), True, {})
    return [[None if p.grad is None else p.grad.clone() for p in group] for group in ppo.groups]


@pytest.mark.parametrize("options", [{}, {"critic": "head"}, {"lora": False}], ids=["own", "head", "full"])
def test_E9_critic_does_not_touch_the_gradients_of_the_policy(make_ppo, rolled_out, monkeypatch, options):
    with_critic, without = make_ppo("moe", perturb=0.05, **options), make_ppo("moe", perturb=0.05, **options)
    batch, scored = rolled_out(with_critic)
    minibatch = (batch, *with_critic.advantages(batch, scored)[:3])
    policy, critic = gradients(with_critic, minibatch)
    real = plumbline.align.ppo.clipped_value_loss

    def no_value_loss(*args, **kwargs):
        loss, sums = real(*args, **kwargs)
        return 0.0 * loss, sums

    monkeypatch.setattr(plumbline.align.ppo, "clipped_value_loss", no_value_loss)
    alone, silent = gradients(without, minibatch)
    assert any(g is not None and g.abs().max() > 0 for g in critic)
    assert all(g is None or g.abs().max() == 0 for g in silent)
    assert any(g is not None and g.abs().max() > 0 for g in policy)
    for a, b in zip(policy, alone, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_E9_the_two_groups_share_no_parameter_and_the_rest_is_frozen(make_ppo, one_step):
    for options in ({}, {"critic": "head"}, {"lora": False}, {"lora": False, "critic": "head"}):
        ppo = make_ppo("moe", **options)
        policy, critic = ({id(p) for p in group} for group in ppo.groups)
        assert policy and critic and not policy & critic
        frozen = {
            name: p.detach().clone() for name, p in ppo.actors.lm.named_parameters() if id(p) not in policy | critic
        }
        assert bool(frozen) == ppo.settings.lora
        one_step(ppo)
        for name, parameter in ppo.actors.lm.named_parameters():
            if name in frozen:
                assert torch.equal(parameter, frozen[name]), name
