"""Advantages against the answers to the same prompt: by hand, and in the loop without a critic."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plumbline.align.ppo import train
from plumbline.align.rl.advantages import group_advantages
from plumbline.reward import CompositeReward

ALL = torch.ones(4, dtype=torch.bool)


def test_rloo_by_hand():
    got = group_advantages(torch.tensor([1.0, 3.0, 2.0, 2.0]), ALL, 2, kind="rloo")
    torch.testing.assert_close(got, torch.tensor([-2.0, 2.0, 0.0, 0.0]))


def test_grpo_by_hand():
    score = torch.tensor([1.0, 2.0, 3.0, 2.0])
    got = group_advantages(score, ALL, 4, kind="grpo")
    torch.testing.assert_close(got, (score - 2.0) / (score.std() + 1e-4))


def test_rows_without_a_score_are_no_part_of_their_group():
    scored = torch.tensor([True, True, False, True])
    got = group_advantages(torch.tensor([1.0, 3.0, 99.0, 2.0]), scored, 4, kind="rloo")
    torch.testing.assert_close(got, torch.tensor([1 - 2.5, 3 - 1.5, 0.0, 2 - 2.0]))


def test_a_row_alone_in_its_group_gets_0():
    scored = torch.tensor([True, False, False, False])
    for kind in ("grpo", "rloo"):
        assert not group_advantages(torch.tensor([5.0, 0.0, 0.0, 0.0]), scored, 2, kind=kind).any()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-5, 5, width=32), min_size=6, max_size=6), st.floats(-10, 10, width=32))
def test_a_constant_for_a_whole_group_changes_nothing_and_a_group_sums_to_0(scores, shift):
    score, keep = torch.tensor(scores), torch.ones(6, dtype=torch.bool)
    for kind in ("grpo", "rloo"):
        plain = group_advantages(score, keep, 3, kind=kind)
        moved = group_advantages(score.double() + shift, keep, 3, kind=kind)
        torch.testing.assert_close(plain.double(), moved, atol=1e-3, rtol=1e-3)
        assert plain.view(2, 3).sum(dim=1).abs().max() < 1e-3


GROUPED = {"answers_per_prompt": 4, "rollouts_per_step": 8}


@pytest.mark.parametrize("kind", ["grpo", "rloo", "gdpo"])
def test_no_critic_is_built_and_a_prompt_comes_several_times(make_ppo, one_step, kind):
    ppo = make_ppo(advantage=kind, **GROUPED, fit=True)
    rows = ppo.prompts_of_step(0)
    assert rows[:4] == [rows[0]] * 4 and rows[4:] == [rows[4]] * 4 and rows[0] != rows[4]
    assert ppo.groups[1] == [] and len(ppo.optimizer.param_groups) == 1
    out = one_step(ppo)
    assert len({tuple(ids) for ids in out.batch.answer_ids.tolist()}) > 2  # answers to one prompt differ
    per_row = [out.advantage[row][out.keep[row]] for row in range(8)]
    assert all(torch.equal(a, a[:1].expand_as(a)) for a in per_row)
    assert "value/loss" not in out.updated and "loss/value_avg" not in out.updated


def test_gdpo_does_not_let_a_wide_component_drown_another(make_ppo, rolled_out, share, length):
    """One raw component times 100, unscaled: the advantages of gdpo stay, those of grpo do not."""
    got = {}
    for kind in ("gdpo", "grpo"):
        for scale in (1.0, 100.0):
            ppo = make_ppo(
                components=[(share(scale=scale), 1.0), (length(), 1.0)], advantage=kind, kl_coef=0.0, **GROUPED
            )
            got[kind, scale] = ppo.advantages(*rolled_out(ppo))[1]
    torch.testing.assert_close(got["gdpo", 1.0], got["gdpo", 100.0], atol=2e-2, rtol=2e-2)
    assert (got["grpo", 1.0] - got["grpo", 100.0]).abs().max() > 0.1


@pytest.mark.parametrize(
    "values, message",
    [
        ({"advantage": "grpo"}, "answers_per_prompt to 2"),
        ({"advantage": "best"}, "must be one of gae"),
        ({"answers_per_prompt": 3, "rollouts_per_step": 8}, "multiple"),
        ({"advantage": "rloo", **GROUPED, "cost_component": "safety"}, "needs a critic"),
    ],
)
def test_settings_that_clash_are_refused(settings, values, message):
    with pytest.raises(ValueError, match=message):
        settings(**values)


@pytest.mark.parametrize("kind", ["grpo", "rloo", "gdpo"])
def test_reward_rises_without_a_critic(settings, share, read_metrics, kind):
    run = train(
        settings(
            steps=8, rollouts_per_step=32, answers_per_prompt=4, advantage=kind, policy_lr=3e-2, kl_coef=0.0, seed=1
        ),
        reward=CompositeReward([(share(), 1.0)]),
    )
    scores = [row["objective/scores"] for row in read_metrics(run)[:-1]]
    assert sum(scores[-2:]) / 2 > scores[0] + 0.5
