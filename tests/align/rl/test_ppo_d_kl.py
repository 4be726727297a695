"""PPO checklist, D: KL estimators, their units, and the controller."""

import dataclasses

import pytest
import torch

from plumbline.align.ppo import PPOSettings, train
from plumbline.align.rl.kl_control import ESTIMATORS, KLController, kl_estimate
from plumbline.reward import CompositeReward

# D1: estimators


def two_distributions(words=50):
    generator = torch.Generator().manual_seed(1)
    policy = torch.randn(words, generator=generator, dtype=torch.float64)
    ref = policy + 0.5 * torch.randn(words, generator=generator, dtype=torch.float64)
    return policy.log_softmax(-1), ref.log_softmax(-1)


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_D1_mean_over_samples_is_the_exact_kl(kind):
    policy, ref = two_distributions()
    exact = (policy.exp() * (policy - ref)).sum()
    drawn = torch.multinomial(policy.exp(), 40_000, replacement=True, generator=torch.Generator().manual_seed(2))
    estimates = kl_estimate(policy[drawn], ref[drawn], kind)
    three_sigma = 3 * estimates.std() / len(drawn) ** 0.5
    assert (estimates.mean() - exact).abs() < three_sigma < 0.1 * exact


def test_D1_by_hand():
    logp, ref = torch.tensor([0.0, -1.0, -2.0]), torch.tensor([-1.0, -1.0, 0.0])  # l = 1, 0, -2
    assert kl_estimate(logp, ref, "k1").tolist() == [1.0, 0.0, -2.0]
    assert kl_estimate(logp, ref, "k2").tolist() == [0.5, 0.0, 2.0]
    want = torch.tensor([torch.e**-1 - 1 + 1, 0.0, torch.e**2 - 1 - 2])
    torch.testing.assert_close(kl_estimate(logp, ref, "k3"), want, rtol=1e-6, atol=0)


def test_D1_signs_and_bounds():
    logp, ref = -torch.rand(1000) * 30, -torch.rand(1000) * 30
    assert (kl_estimate(logp, ref, "k1") < 0).any()
    assert (kl_estimate(logp, ref, "k2") >= 0).all()
    k3 = kl_estimate(logp, ref, "k3")
    assert (k3 >= 0).all() and k3.max() == 10.0
    far = torch.tensor([1e4, -1e4])
    assert kl_estimate(far, torch.zeros(2), "k1").tolist() == [20.0, -20.0]
    assert kl_estimate(far, torch.zeros(2), "k2").tolist() == [200.0, 200.0]
    assert kl_estimate(-far, torch.zeros(2), "k3").tolist() == [10.0, 10.0]


def test_D1_k3_keeps_its_digits_near_0():
    """k3 = l^2/2 there; exp(-l) - 1 + l taken literally is rounding noise at 1e-4 in fp32."""
    log_ratio = torch.tensor([1e-3, -1e-3, 1e-2])
    want = log_ratio.double().square() / 2 - log_ratio.double() ** 3 / 6
    torch.testing.assert_close(kl_estimate(log_ratio, torch.zeros(3), "k3").double(), want, rtol=1e-3, atol=1e-10)


def test_D1_unknown_estimator_is_refused():
    assert ESTIMATORS == ("k1", "k2", "k3")
    with pytest.raises(ValueError, match="kl_estimator='k4': must be one of k1, k2, k3"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "k4")
    with pytest.raises(ValueError, match="kl_estimator='k4': must be one of k1, k2, k3"):
        PPOSettings(kl_estimator="k4")


# D2: gradients


def test_D2_only_k2_has_the_gradient_of_the_kl():
    """Expected gradients over a softmax of 7: k2 gives KL(pi||ref), k3 gives KL(ref||pi), k1 gives 0."""
    logits = torch.randn(7, dtype=torch.float64, requires_grad=True)
    ref = torch.randn(7, dtype=torch.float64).log_softmax(-1)

    def gradient(make):
        (grad,) = torch.autograd.grad(make(logits.log_softmax(-1)), logits)
        return grad

    def expected(kind):
        return gradient(lambda logp: (logp.exp().detach() * kl_estimate(logp, ref, kind)).sum())

    forward = gradient(lambda logp: (logp.exp() * (logp - ref)).sum())
    reverse = gradient(lambda logp: (ref.exp() * (ref - logp)).sum())
    assert (forward - reverse).abs().max() > 0.01
    torch.testing.assert_close(expected("k2"), forward)
    torch.testing.assert_close(expected("k3"), reverse)
    torch.testing.assert_close(expected("k1"), torch.zeros_like(forward))


def test_D2_the_charge_is_a_constant_of_the_update(make_ppo, rolled_out, score_of):
    """The KL enters through the reward alone: nothing that an update reads carries a gradient."""
    ppo = make_ppo("llama", perturb=0.05)
    batch, _ = rolled_out(ppo)
    keep, advantage, returns, _ = ppo.advantages(batch, score_of([0.0] * len(batch)))
    for tensor in (batch.old_logp, batch.ref_logp, batch.old_value, advantage, returns):
        assert not tensor.requires_grad


@pytest.mark.parametrize("kind", ESTIMATORS)
def test_D2_settings_choose_the_estimator_of_the_reward(make_ppo, rolled_out, score_of, kind):
    ppo = make_ppo("llama", perturb=0.1, kl_estimator=kind, kl_coef=0.5, lam=1.0)
    batch, _ = rolled_out(ppo)
    _, _, returns, measured = ppo.advantages(batch, score_of([0.0] * len(batch)))
    charge = kl_estimate(batch.old_logp, batch.ref_logp, kind).masked_fill(~batch.keep, 0.0).sum(dim=1)
    torch.testing.assert_close(returns[:, 0], -0.5 * charge, atol=1e-5, rtol=1e-4)
    k1 = (batch.old_logp - batch.ref_logp)[batch.keep].sum() / len(batch)
    assert measured["objective/kl"] == pytest.approx(float(k1), rel=1e-5)  # reported as k1 whatever is charged


# D3, D4: the controller


GOLDEN = [  # KL per answer, answers, coefficient after: 0.2 * (1 + clip(KL / 6 - 1, -0.2, 0.2) * n / 10000)
    (6.0, 64, 0.2),  # on target
    (6.6, 1000, 0.202),  # 10% above
    (5.4, 1000, 0.198),  # 10% below
    (60.0, 1000, 0.204),  # held at 20% above
    (-3.0, 1000, 0.196),  # a negative estimate is held at 20% below
]


@pytest.mark.parametrize("kl, answers, want", GOLDEN)
def test_D3_adaptive_controller_golden_values(kl, answers, want):
    controller = KLController(0.2, target=6.0, horizon=10_000)
    controller.update(kl, answers)
    assert controller.coef == pytest.approx(want, rel=1e-12)


def test_D3_without_a_target_the_coefficient_is_fixed():
    controller = KLController(0.05)
    for _ in range(3):
        controller.update(100.0, 64)
    assert controller.coef == 0.05


def test_D3_the_run_hands_the_measured_kl_and_all_answers_to_the_controller(settings, share, read_metrics, monkeypatch):
    """Once a rollout, after its updates; the coefficient of a row is the one that its rewards were made with."""
    seen = []
    real = KLController.update

    def spy(self, kl_per_answer, num_answers):
        seen.append((kl_per_answer, num_answers))
        real(self, kl_per_answer, num_answers)

    monkeypatch.setattr(KLController, "update", spy)
    options = {"steps": 3, "kl_coef": 0.2, "kl_target": 2.0, "kl_horizon": 100.0, "policy_lr": 3e-2, "minibatches": 2}
    run = train(settings(**options), reward=CompositeReward([(share(), 1.0)]))
    rows = read_metrics(run)[:3]
    assert seen == [(pytest.approx(row["objective/kl"], abs=1e-6), 8) for row in rows]
    controller = KLController(0.2, 2.0, 100.0)
    for row, (kl, answers) in zip(rows, seen, strict=True):
        assert row["kl_coef"] == pytest.approx(controller.coef, abs=1e-6)
        real(controller, kl, answers)
    assert len({row["kl_coef"] for row in rows}) > 1


def test_D4_target_is_per_answer_and_says_so(make_ppo, rolled_out, score_of):
    helps = {f.name: f.metadata["help"] for f in dataclasses.fields(PPOSettings)}
    assert "per answer" in helps["kl_target"] and "answers" in helps["kl_horizon"]
    ppo = make_ppo("llama", perturb=0.1)
    batch, _ = rolled_out(ppo)
    per_token = (batch.old_logp - batch.ref_logp)[batch.keep]
    measured = ppo.advantages(batch, score_of([0.0] * len(batch)))[3]
    assert measured["objective/kl"] == pytest.approx(float(per_token.sum()) / len(batch), rel=1e-5)
    assert measured["objective/kl"] != pytest.approx(float(per_token.mean()), rel=0.1)


# D5: one coefficient on all ranks


def test_D5_two_ranks_agree_with_one(make_ppo, rolled_out, take_rows, score_of, world):
    def kl_and_coef(ppo, batch):
        _, _, _, measured = ppo.advantages(batch, score_of([0.0] * len(batch)))
        ppo.kl.update(measured["objective/kl"], ppo.settings.rollouts_per_step)
        return measured["objective/kl"], ppo.kl.coef

    options = {"perturb": 0.1, "kl_target": 0.5, "kl_coef": 0.2}
    alone = make_ppo("llama", **options)
    batch, _ = rolled_out(alone)
    halves = [take_rows(batch, list(range(4))), take_rows(batch, list(range(4, 8)))]
    two = world(2)
    ranks = [make_ppo("llama", rank=rank, **options) for rank in two.ranks]
    results = two.run(lambda rank: kl_and_coef(ranks[rank], halves[rank]))
    assert results[0] == results[1]
    assert results[0] == pytest.approx(kl_and_coef(alone, batch), rel=1e-6)
    own = [(half.old_logp - half.ref_logp)[half.keep].sum().item() / 4 for half in halves]
    assert own[0] != pytest.approx(own[1], rel=0.05)  # each rank alone would have adapted otherwise


# D6: saved, restored, validated


def test_D6_coefficient_is_saved_and_restored():
    controller = KLController(0.2, target=6.0)
    controller.update(12.0, 500)
    other = KLController(0.2, target=6.0)
    other.load_state_dict(controller.state_dict())
    assert other.coef == controller.coef != 0.2


@pytest.mark.parametrize(
    "values, message",
    [
        ({"kl_coef": -0.1}, "kl_coef=-0.1: must be at least 0"),
        ({"kl_target": 0.0}, "kl_target=0.0: must be above 0; leave it out for a fixed coefficient"),
        ({"kl_target": -1.0}, "kl_target=-1.0: must be above 0"),
        ({"kl_horizon": 0.0}, "kl_horizon=0.0: must be above 0"),
    ],
)
def test_D6_settings_that_cannot_work_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        PPOSettings(**values)
