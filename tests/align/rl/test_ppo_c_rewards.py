"""PPO checklist, C: rewards, from components to tokens."""

import json

import numpy as np
import pytest
import torch

from plumbline.align import reward_model
from plumbline.align.data.rows import read_preferences, split_pairs
from plumbline.align.rl.advantages import last_kept, token_rewards, whiten
from plumbline.align.rl.evaluation import evaluate
from plumbline.align.rl.signals import over_ranks
from plumbline.align.runtime.tracking import Metrics
from plumbline.policy_models.loading import load_scalar_model
from plumbline.reward import CompositeReward, default_composite, statistics
from plumbline.reward.learned import LearnedPreference

T, F = True, False


# C1: the score is on the last kept token


def test_C1_score_is_on_the_last_kept_token_by_hand():
    keep = torch.tensor([[T, T, F], [T, T, T], [T, F, F], [F, F, F], [T, F, T]])
    kl = torch.tensor([[1.0, 2.0, 9.0]]).repeat(5, 1)
    reward = token_rewards(torch.tensor([10.0, 20.0, 30.0, 40.0, 50.0]), kl, keep, kl_coef=0.5)
    want = [
        [-0.5, 9.0, 0.0],  # -0.5 * 2 + 10; the pad's KL is not charged
        [-0.5, -1.0, 15.5],
        [29.5, 0.0, 0.0],
        [0.0, 0.0, 0.0],  # no token: no reward, not even at position 0
        [-0.5, 0.0, 45.5],  # a gap inside the answer
    ]
    assert reward.tolist() == want


def test_C1_last_kept_by_hand():
    assert last_kept(torch.tensor([[T, T, F], [F, F, F], [T, F, T]])).tolist() == [1, 0, 2]


def test_C1_score_index_in_a_rollout(make_ppo, rolled_out, score_of):
    """gamma = lam = 0 makes an advantage the token's reward less its value: the score shows where it was put."""
    ppo = make_ppo("llama", gamma=0.0, lam=0.0, kl_coef=0.0, rollouts_per_step=16, max_new_tokens=3)
    batch, _ = rolled_out(ppo)
    assert batch.finished.any() and not batch.finished.all()
    keep, _, returns, _ = ppo.advantages(batch, score_of([3.0] * len(batch)))
    for row in range(len(batch)):
        last = int(keep[row].nonzero()[-1])
        assert returns[row].nonzero()[:, 0].tolist() == [last]
        assert returns[row, last] == 3.0


# C2: the charge is for the KL of the policy that drew the tokens


@pytest.mark.parametrize("coef", [0.0, 0.3])
def test_C2_charge_is_coefficient_times_kl_at_rollout(make_ppo, rolled_out, score_of, coef):
    ppo = make_ppo("llama", perturb=0.1, kl_coef=coef)
    batch, _ = rolled_out(ppo)
    kl = (batch.old_logp - batch.ref_logp)[batch.keep].sum().item() / len(batch)
    assert abs(kl) > 1e-3
    _, _, _, measured = ppo.advantages(batch, score_of([1.0] * len(batch)))
    assert measured["objective/kl"] == pytest.approx(kl, rel=1e-5)
    assert measured["objective/non_score_reward"] == pytest.approx(-coef * kl, rel=1e-4, abs=1e-7)
    assert measured["objective/rlhf_reward"] == pytest.approx(1.0 - coef * kl, rel=1e-5)


def test_C2_coefficient_is_constant_during_the_updates(make_ppo, one_step):
    ppo = make_ppo("llama", ppo_epochs=3, minibatches=2, kl_coef=0.2, kl_target=1.0)
    one_step(ppo)
    assert ppo.kl.coef == 0.2


# C3, C4: penalty, then clip, then the KL charge


def test_C3_missing_stop_token_is_charged_once(make_ppo, rolled_out, score_of):
    ppo = make_ppo("llama", missing_eos_penalty=1.5, kl_coef=0.0, rollouts_per_step=16, max_new_tokens=3, lam=1.0)
    batch, _ = rolled_out(ppo)
    assert batch.finished.any() and not batch.finished.all()
    _, _, returns, measured = ppo.advantages(batch, score_of([2.0] * len(batch)))
    assert returns[:, 0].tolist() == [2.0 if done else 0.5 for done in batch.finished.tolist()]
    share = batch.finished.float().mean().item()
    assert measured["rollout/finished_share"] == share
    assert measured["objective/scores"] == pytest.approx(2.0 - 1.5 * (1 - share), rel=1e-6)


def test_C3_any_configured_stop_token_counts(make_ppo, rolled_out):
    """Answers here end with ids of generation_config, nearly never with the tokenizer's own eos token."""
    ppo = make_ppo("llama", rollouts_per_step=16, max_new_tokens=8)
    batch, _ = rolled_out(ppo)
    last = [ids[keep].tolist()[-1] for ids, keep in zip(batch.answer_ids, batch.keep, strict=True)]
    stops = set(ppo.actors.lm.generation_config.eos_token_id)
    assert batch.finished.tolist() == [token in stops for token in last]
    assert any(token != ppo.tokenizer.eos_token_id for token, done in zip(last, batch.finished, strict=True) if done)


def test_C4_score_is_clipped_after_the_penalty_and_before_the_kl_charge(make_ppo, rolled_out, score_of):
    ppo = make_ppo("llama", perturb=0.1, missing_eos_penalty=4.0, score_clip=10.0, kl_coef=0.5, lam=1.0)
    batch, _ = rolled_out(ppo)
    assert not batch.finished.all()
    totals = [50.0, -50.0, 12.0, 3.0] * 2
    _, _, returns, _ = ppo.advantages(batch, score_of(totals))
    kl = (batch.old_logp - batch.ref_logp).masked_fill(~batch.keep, 0.0).sum(dim=1)
    for row, total in enumerate(totals):
        score = total - (0.0 if batch.finished[row] else 4.0)
        want = max(-10.0, min(10.0, score)) - 0.5 * float(kl[row])
        assert returns[row, 0].item() == pytest.approx(want, abs=1e-4)


# C5: whitening


@pytest.mark.parametrize("shift_mean", [True, False])
def test_C5_whitening_equals_numpy(shift_mean):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(6, 9, generator=generator) * 3 + 5
    keep = torch.rand(6, 9, generator=generator) < 0.6
    kept = x[keep].double().numpy()
    want = (kept - kept.mean()) / np.sqrt(kept.var() + 1e-8) + (0 if shift_mean else kept.mean())
    white = whiten(x.masked_fill(~keep, float("nan")), keep, shift_mean=shift_mean)
    np.testing.assert_allclose(white[keep].numpy(), want, rtol=1e-6, atol=1e-6)
    assert (white[~keep] == 0).all()


def test_C5_whitening_of_a_constant_and_of_nothing():
    x = torch.full((2, 3), 7.0)
    assert (whiten(x, torch.ones(2, 3, dtype=torch.bool)) == 0).all()
    assert (whiten(x, torch.zeros(2, 3, dtype=torch.bool)) == 0).all()


# C6: the score of a reward model is centred when it leaves the stage


def test_C6_mean_score_of_the_training_answers_is_0_after_loading(tiny, tmp_path):
    """One step of the stage: the checkpoint carries the mean and spread of its scores, and they are used."""
    pairs = [{"prompt": f"Say {n}.", "chosen": f"{n}, gladly.", "rejected": "no" * n} for n in range(1, 13)]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    reward_model.main(
        ["--model", tiny("llama"), "--train_file", str(data), "--output_dir", str(tmp_path / "rm")]
        + [
            "--dtype",
            "float32",
            "--bf16",
            "false",
            "--max_steps",
            "1",
            "--lora_r",
            "2",
            "--holdout_every",
            "2",
            "--per_device_train_batch_size",
            "4",
        ]
    )
    trained_on, _ = split_pairs(read_preferences(data), 2)
    scores = np.concatenate(reward_model.score_pairs(LearnedPreference(str(tmp_path / "rm" / "model")), trained_on))
    assert scores.mean() == pytest.approx(0.0, abs=1e-4) and scores.std() == pytest.approx(1.0, abs=1e-4)
    raw = json.loads((tmp_path / "rm" / "model" / "reward_scaling.json").read_text())
    assert abs(raw["mean"]) > 1e-3  # there was something to centre


# C7: the head of a reward model


def test_C7_reward_head_starts_normal_with_variance_1_over_width_plus_1(tiny):
    heads = [load_scalar_model(tiny("moe"), seed=seed).score for seed in range(8)]
    assert all(head.bias is None for head in heads)
    weights = torch.cat([head.weight.detach().flatten() for head in heads])
    width = heads[0].in_features
    assert weights.numel() == 8 * width
    std = (1 / (width + 1)) ** 0.5
    # 4 standard errors: of a mean std / sqrt(n), of a standard deviation std / sqrt(2n)
    assert weights.mean().abs() < 4 * std / weights.numel() ** 0.5
    assert abs(weights.std() / std - 1) < 4 / (2 * weights.numel()) ** 0.5


# C8: the total is the weighted sum, in the update, in the log and in the table


@pytest.fixture
def two_parts(share, length):
    return [(share(), 2.0), (length(), -0.5)]


def test_C8_weights_enter_the_return_and_the_log_alike(make_ppo, rolled_out, two_parts):
    ppo = make_ppo("llama", components=two_parts, fit=True, kl_coef=0.0, lam=1.0)
    batch, scored = rolled_out(ppo)
    _, _, returns, measured = ppo.advantages(batch, scored)
    scaling = ppo.reward.scaling
    for row, (prompt, answer) in enumerate(zip(batch.prompts, batch.answers, strict=True)):
        by_hand = sum(
            weight
            * max(-10.0, min(10.0, (part([prompt], [answer])[0] - scaling.mean[part.name]) / scaling.std[part.name]))
            for part, weight in two_parts
        )
        assert scored.total[row] == pytest.approx(by_hand, rel=1e-9)
        assert returns[row, 0].item() == pytest.approx(max(-10.0, min(10.0, by_hand)), rel=1e-5)
    logged = statistics(scored)
    assert logged["reward/total_mean"] == pytest.approx(
        logged["reward/share_weighted_mean"] + logged["reward/length_weighted_mean"], rel=1e-9
    )
    if max(abs(total) for total in scored.total) <= 10:
        assert measured["objective/scores"] == pytest.approx(logged["reward/total_mean"], rel=1e-5)


def test_C8_the_log_is_of_all_ranks(two_parts, world):
    """Two ranks with half of the rows each log what one rank with all of them logs."""
    score = CompositeReward(two_parts)
    prompts, answers = [f"prompt {i}" for i in range(6)], ["a" * n for n in (1, 2, 0, 4, 3, 7)]
    score.fit(prompts, answers)
    two = world(2)

    def logged(rank):
        mine = score(prompts[3 * rank : 3 * rank + 3], answers[3 * rank : 3 * rank + 3])
        return statistics(over_ranks(mine, two.ranks[rank]))

    assert two.run(logged) == [pytest.approx(statistics(score(prompts, answers)))] * 2


def test_C8_every_row_of_the_sample_table_adds_up(make_ppo, two_parts, prompts_file, tmp_path):
    ppo = make_ppo("llama", components=two_parts, fit=True, eval_prompts_file=prompts_file)
    measured = evaluate(ppo, 0, Metrics(tmp_path, enabled=False))
    rows = [json.loads(line) for line in (tmp_path / "run" / "samples" / "step-000000.jsonl").read_text().splitlines()]
    assert len(rows) == 8
    for row in rows:
        assert row["total"] == pytest.approx(row["share"] + row["length"], abs=2e-6)  # written to 6 digits
    assert measured["eval/reward_mean"] == pytest.approx(sum(row["total"] for row in rows) / 8, abs=2e-6)
    parts = measured["eval/share_weighted_mean"] + measured["eval/length_weighted_mean"]
    assert measured["eval/reward_mean"] == pytest.approx(parts, abs=2e-6)


# C9: a component's unit does not matter


def test_C9_a_component_times_100_changes_no_advantage(make_ppo, rolled_out, share, length):
    results = []
    for scale in (1.0, 100.0):
        ppo = make_ppo("llama", components=[(share(scale=scale), 1.0), (length(), 0.2)], fit=True)
        _, advantage, returns, _ = ppo.advantages(*rolled_out(ppo))
        results.append((advantage, returns))
    assert results[0][0].abs().max() > 0.1
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-5)


# C10: no opinion


def test_C10_none_is_left_out_and_not_0(share, length):
    reward = CompositeReward([(share(skip=frozenset({1})), 1.0), (length(), 1.0)])
    scored = reward(["p"] * 3, ["ab1", "ab1", "ab1"])
    assert scored.total[1] == 3.0  # length alone
    assert scored.total[0] == pytest.approx(3.0 + 2 / 3)
    assert scored.parts.weighted["share"][1] is None
    assert statistics(scored)["reward/share_none_fraction"] == pytest.approx(1 / 3)


def test_C10_row_without_a_total_is_dropped_from_the_update(make_ppo, rolled_out, take_rows, score_of):
    """The same weights as from a rollout that never had the row, whatever stands in it."""
    totals = [1.0, None, -2.0, 0.5, None, 3.0, 0.0, 1.5]
    known = [row for row, total in enumerate(totals) if total is not None]
    # 2 minibatches of 4 of 8 rows would not be 2 of 6: one minibatch, so that both runs take the same optimizer steps
    full, short = (make_ppo("llama", perturb=0.05, ppo_epochs=2) for _ in range(2))
    batch, _ = rolled_out(full)
    keep, advantage, returns, measured = full.advantages(batch, score_of(totals))
    part = take_rows(batch, known)
    want = short.advantages(part, score_of([totals[row] for row in known]))
    assert measured["rollout/dropped_rows"] == 2
    assert not keep[1].any() and not keep[4].any()
    torch.testing.assert_close(advantage[known], want[1], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(returns[known], want[2])
    updated = full.update(0, batch, keep, advantage, returns)
    assert updated == pytest.approx(short.update(0, part, *want[:3]), rel=1e-4, abs=1e-6)
    for a, b in zip(full.groups[0] + full.groups[1], short.groups[0] + short.groups[1], strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def test_C10_row_without_a_total_is_in_no_score_metric(make_ppo, rolled_out, take_rows, score_of):
    totals = [1.0, None, -2.0, 0.5, None, 3.0, 0.0, 1.5]
    known = [row for row, total in enumerate(totals) if total is not None]
    ppo = make_ppo("llama", perturb=0.05, missing_eos_penalty=1.0)
    batch, _ = rolled_out(ppo)
    measured = ppo.advantages(batch, score_of(totals))[3]
    want = ppo.advantages(take_rows(batch, known), score_of([totals[row] for row in known]))[3]
    for name in ("objective/scores", "objective/rlhf_reward", "objective/non_score_reward", "val/explained_variance"):
        assert measured[name] == pytest.approx(want[name], rel=1e-5, abs=1e-6), name


def test_C10_rollout_without_any_total_does_not_stop_the_run(make_ppo, rolled_out, score_of):
    ppo = make_ppo("llama", perturb=0.05)
    before = [parameter.detach().clone() for parameter in ppo.groups[0]]
    batch, _ = rolled_out(ppo)
    keep, advantage, returns, measured = ppo.advantages(batch, score_of([None] * len(batch)))
    updated = ppo.update(0, batch, keep, advantage, returns)
    assert measured["rollout/dropped_rows"] == len(batch)
    assert all(np.isfinite(value) for value in [*measured.values(), *updated.values()])
    assert all(torch.equal(a, b) for a, b in zip(before, ppo.groups[0], strict=True))


# C11: signs and shares


def test_C11_toxicity_is_the_only_charge_and_safety_another_classifier():
    composite = default_composite(alpha=0.0, beta=0.5, gamma=2.0, delta=3.0)
    assert composite.weights == {"relevance": 0.5, "safety": 2.0, "toxicity": -3.0}
    assert type(composite.components["safety"]) is not type(composite.components["toxicity"])
    assert composite.required == ["safety"]


def test_C11_shares_of_variance_add_to_1(share, length):
    scored = CompositeReward([(share(), 5.0), (length(), -0.3)])(["p"] * 4, ["ab1", "1", "abcd", "a1 2!"])
    logged = statistics(scored)
    shares = [logged["reward/share_variance_share"], logged["reward/length_variance_share"]]
    assert sum(shares) == pytest.approx(1.0)
    assert shares[0] > 0.5
