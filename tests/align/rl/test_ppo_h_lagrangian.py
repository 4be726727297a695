"""PPO checklist, H: safety as a constraint."""

import math

import pytest
import torch

from plumbline.align.rl.advantages import gae, whiten
from plumbline.align.rl.lagrangian import Lagrangian


def test_H1_multiplier_golden_values():
    """log(value) += lr * value * (cost - limit)."""
    multiplier = Lagrangian(2.0, limit=0.1, lr=0.5)
    multiplier.update(0.3)
    assert multiplier.value == pytest.approx(2.0 * math.exp(0.5 * 2.0 * 0.2))
    multiplier.update(0.1)  # at the limit nothing moves
    assert multiplier.value == pytest.approx(2.0 * math.exp(0.2))


def test_H1_multiplier_grows_while_the_cost_is_above_and_decays_to_0_below():
    multiplier = Lagrangian(1.0, limit=0.0, lr=0.5, maximum=5.0)
    values = [multiplier.value]
    for _ in range(20):
        multiplier.update(0.5)
        values.append(multiplier.value)
    assert values == sorted(values) and values[-1] == 5.0
    for _ in range(4000):
        multiplier.update(-0.5)
    assert 0 < multiplier.value < 0.01


def test_H1_one_wild_cost_moves_it_by_a_factor_of_e_at_most():
    multiplier = Lagrangian(1.0, limit=0.0, maximum=100.0)
    multiplier.update(1e9)
    assert multiplier.value == pytest.approx(math.e)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"value": 0.0, "limit": 0.0}, "multiplier_start"),
        ({"value": 11.0, "limit": 0.0}, "multiplier_max"),
        ({"value": 1.0, "limit": 0.0, "lr": 0.0}, "multiplier_lr"),
        ({"value": 1.0, "limit": math.nan}, "cost_limit"),
    ],
)
def test_H1_settings_that_cannot_work_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Lagrangian(**values)


@pytest.mark.parametrize("value", [0.01, 1.0, 9.0])
def test_H2_kl_counts_once_whatever_the_multiplier(value):
    """The KL is charged to rewards and added to costs: with nothing else in either, combined it is -coef * KL."""
    kl = torch.rand(3, 5, generator=torch.Generator().manual_seed(0))
    keep, zeros = torch.ones(3, 5, dtype=torch.bool), torch.zeros(3, 5)
    reward_adv, _ = gae(-0.05 * kl, zeros, keep, gamma=1.0, lam=1.0)
    cost_adv, _ = gae(0.05 * kl, zeros, keep, gamma=1.0, lam=1.0)
    together = Lagrangian(value, limit=0.0).combine(reward_adv, cost_adv)
    torch.testing.assert_close(together, reward_adv)


class Cost:
    """1 where the answer holds a letter of `bad`, else 0: a toy charge in [0, 1]."""

    name = "cost"

    def __init__(self, bad="abcdefghijklm"):
        self.bad = bad

    def __call__(self, prompts, answers):
        return [float(sum(c in self.bad for c in text)) / max(len(text), 1) for text in answers]


@pytest.fixture
def constrained(make_ppo, share):
    def make(**options):
        return make_ppo(
            components=[(share(), 1.0), (Cost(), -1.0)], cost_component="cost", fit=True, rollouts_per_step=8, **options
        )

    return make


def test_H3_reward_and_cost_have_values_and_returns_of_their_own(constrained, rolled_out):
    ppo = constrained(kl_coef=0.0, lam=1.0)
    batch, scored = rolled_out(ppo)
    assert batch.old_value.shape == (*batch.keep.shape, 2)
    keep, white, returns, measured = ppo.advantages(batch, scored)
    first_R = returns[:, 0]  # with gamma = lam = 1 and values 0, the return is the score, at every token
    without = [t - w for t, w in zip(scored.total, scored.parts.weighted["cost"], strict=True)]
    torch.testing.assert_close(first_R[:, 0], torch.tensor(without), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(first_R[:, 1], torch.tensor(scored.parts.scaled["cost"]), atol=1e-5, rtol=1e-5)
    plain = (returns[..., 0] - ppo.lagrangian.value * returns[..., 1]) / (1 + ppo.lagrangian.value)
    torch.testing.assert_close(white, whiten(plain.masked_fill(~keep, 0.0), keep), atol=1e-4, rtol=1e-4)
    raw = scored.parts.raw["cost"]
    assert measured["lagrangian/cost"] == pytest.approx(sum(raw) / len(raw))


def test_H3_a_cost_of_positive_weight_is_negated(make_ppo, share, length, rolled_out):
    """Safety has a positive weight: its cost is the negated score, and a limit of -0.9 asks for a mean of 0.9."""
    ppo = make_ppo(components=[(share(), 1.0), (length(), 1.0)], cost_component="share", fit=True)
    batch, scored = rolled_out(ppo)
    measured = ppo.advantages(batch, scored)[3]
    raw = scored.parts.raw["share"]
    assert measured["lagrangian/cost"] == pytest.approx(-sum(raw) / len(raw))


def test_H3_a_row_without_a_cost_takes_no_part(make_ppo, share, length, rolled_out):
    ppo = make_ppo(components=[(length(), 1.0), (share(skip=frozenset({1})), -1.0)], cost_component="share")
    batch, scored = rolled_out(ppo)
    keep = ppo.advantages(batch, scored)[0]
    assert not keep[1].any() and keep[0].any()


def test_H4_multiplier_moves_once_a_rollout_whatever_the_layout(constrained, tmp_path):
    from plumbline.align.runtime.tracking import Metrics

    values = []
    for layout in ({}, {"ppo_epochs": 3, "minibatches": 4}, {"tokens_per_micro_batch": 130}):
        ppo = constrained(policy_lr=0.0, critic_lr=0.0, cost_limit=0.05, **layout)
        for step in range(2):
            ppo.step(step, Metrics(tmp_path, enabled=False))
        values.append(ppo.lagrangian.value)
    assert values[0] == pytest.approx(values[1]) == pytest.approx(values[2]) and values[0] != 1.0


def test_H5_multiplier_is_saved_and_restored(constrained):
    ppo, other = constrained(), constrained()
    ppo.lagrangian.update(3.0)
    other.restore(ppo.state())
    assert other.lagrangian.value == ppo.lagrangian.value != 1.0


def test_H6_unknown_component_is_refused(make_ppo, share):
    with pytest.raises(ValueError, match="cost_component='toxicity' is no part of the reward"):
        make_ppo(components=[(share(), 1.0)], cost_component="toxicity")


def test_H7_the_constraint_brings_the_cost_down(settings, share, read_metrics):
    """Reward: share of letters. Cost: share of letters a to m. The policy learns to use the others."""
    from plumbline.align.ppo import train
    from plumbline.reward import CompositeReward

    run = train(
        settings(
            steps=14,
            rollouts_per_step=32,
            minibatches=2,
            policy_lr=3e-2,
            cost_component="cost",
            cost_limit=0.1,
            multiplier_lr=0.5,
            kl_coef=0.0,
            seed=1,
        ),
        reward=CompositeReward([(share(), 1.0), (Cost(), -1.0)]),
    )
    rows = read_metrics(run)[:-1]
    early = sum(row["lagrangian/cost"] for row in rows[:3]) / 3
    late = sum(row["lagrangian/cost"] for row in rows[-3:]) / 3
    assert late < early


def test_H6_pid_by_hand_and_across_a_checkpoint():
    multiplier = Lagrangian(1.0, limit=0.2, lr=0.5, control="pid", gain=2.0, damping=1.0, maximum=4.0)
    multiplier.update(0.4, unit=0.1)  # e = 2: integral 2, no rise known yet
    assert multiplier.value == pytest.approx(4.0)  # 2 * 2 + 2, held
    multiplier.update(0.2, unit=0.1)  # e = 0: the push lets go at once, the integral stays
    assert multiplier.value == pytest.approx(2.0)
    again = Lagrangian(1.0, limit=0.2, lr=0.5, control="pid", gain=2.0, damping=1.0, maximum=4.0)
    again.load_state_dict(multiplier.state_dict())
    for one in (multiplier, again):
        one.update(0.25, unit=0.1)  # e = 0.5: 1 + 2.25 + 0.5
        assert one.value == pytest.approx(3.75)
    multiplier.update(-9.0, unit=0.1)
    assert multiplier.value == 0.0 and multiplier.integral == 0.0  # met: no push, and none stored up


@pytest.mark.parametrize(
    "options, message",
    [
        ({"control": "pi"}, "multiplier_control='pi': must be one of log, pid"),
        ({"gain": -1.0}, "multiplier_gain=-1.0: must be at least 0"),
        ({"damping": float("nan")}, "multiplier_damping=nan: must be at least 0"),
    ],
)
def test_H6_refuses_what_it_cannot_use(options, message):
    with pytest.raises(ValueError, match=message):
        Lagrangian(1.0, limit=0.0, **options)
