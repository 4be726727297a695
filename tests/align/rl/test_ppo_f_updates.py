"""PPO checklist, F: the policy loss and what an optimizer step is."""

import math

import pytest
import torch

import plumbline.align.ppo
from plumbline.align.ppo import PPOSettings, micro_batches, train
from plumbline.align.rl.losses import clipped_policy_loss, masked_mean
from plumbline.policy_models.logprobs import pack_rows, token_budget_batches
from plumbline.reward import CompositeReward

T, F = True, False

# F1

POLICY_CASES = [  # ratio, advantage, loss by hand at clip = 0.2, gradient of the log-probability
    (1.0, 2.0, -2.0, -2.0),  # nothing moved
    (1.1, 1.0, -1.1, -1.1),  # within the band
    (math.e, 1.0, -1.2, 0.0),  # good and already likelier: gain held at 1 + clip
    (1 / math.e, 1.0, -1 / math.e, -1 / math.e),  # good but now rarer: the free term still pulls
    (1 / math.e, -1.0, 0.8, 0.0),  # bad and already rarer: held at 1 - clip
    (math.e, -1.0, math.e, math.e),  # bad and now likelier: free, and it pushes back
]


@pytest.mark.parametrize("ratio, adv, want, slope", POLICY_CASES)
def test_F1_clipped_policy_loss_by_hand(ratio, adv, want, slope):
    old, keep = torch.tensor([[-0.5, -2.0]]).double(), torch.tensor([[T, F]])
    new = (old + math.log(ratio)).masked_fill(~keep, float("nan")).requires_grad_()
    advantage = torch.tensor([[adv, float("nan")]]).double()
    loss, sums = clipped_policy_loss(new, old, advantage, keep, clip=0.2, num_tokens=1.0)
    (grad,) = torch.autograd.grad(loss, new)
    assert loss.item() == pytest.approx(want, rel=1e-9)
    assert grad[0, 0].item() == pytest.approx(slope, rel=1e-9, abs=1e-12)
    assert grad[0, 1] == 0  # padding reaches neither loss nor gradient
    assert sums["policy/clip_fraction"] == (1.0 if slope == 0.0 else 0.0)
    assert sums["policy/ratio"].item() == pytest.approx(ratio, rel=1e-9)
    assert sums["policy/approx_kl"].item() == pytest.approx(ratio - 1 - math.log(ratio), rel=1e-6, abs=1e-12)


def test_F1_log_ratio_is_held_at_20():
    """A ratio cannot overflow; beyond the bound there is no gradient."""
    new = torch.tensor([[90.0, -90.0]], requires_grad=True)
    keep = torch.ones(1, 2, dtype=torch.bool)
    loss, _ = clipped_policy_loss(new, torch.zeros(1, 2), -torch.ones(1, 2), keep, clip=0.2, num_tokens=2.0)
    assert loss.item() == pytest.approx((math.exp(20) + 0.8) / 2, rel=1e-6)
    assert torch.autograd.grad(loss, new)[0].tolist() == [[0.0, 0.0]]


def test_F1_at_ratio_1_the_gradient_is_that_of_the_plain_policy_gradient():
    new = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    adv, keep = torch.randn(3, 4).double(), torch.rand(3, 4) < 0.7
    loss, _ = clipped_policy_loss(new, new.detach(), adv, keep, clip=0.2, num_tokens=keep.sum())
    (grad,) = torch.autograd.grad(loss, new)
    torch.testing.assert_close(grad, (-adv / keep.sum()).masked_fill(~keep, 0.0))


# F2: a loss is a sum over tokens / all tokens of the optimizer step


def minibatch_gradients(ppo, minibatch, groups, num_tokens=None):
    """Gradients of one optimizer step made of several calls, and the sums for the log."""
    batch, keep, advantage, returns = minibatch
    num_tokens = keep.sum().double() if num_tokens is None else num_tokens
    for parameter in ppo.groups[0] + ppo.groups[1]:
        parameter.grad = None
    sums = {}
    for rows in groups:
        ppo._accumulate(batch, rows, keep, advantage, returns, num_tokens, True, sums)
    grads = [p.grad.clone() for p in ppo.groups[0] + ppo.groups[1]]
    return grads, {name: float(value) for name, value in sums.items()}


def close(grads, others):
    """Equal to 1e-6 of the largest gradient of each parameter, in fp32."""
    for a, b in zip(grads, others, strict=True):
        assert (a - b).abs().max() <= 2e-6 * a.abs().max() + 1e-9


@pytest.fixture
def minibatch(make_ppo, rolled_out, score_of):
    """minibatch(ppo): a rollout with answers of different lengths, one row without a score, and its advantages."""

    def make(ppo):
        batch, _ = rolled_out(ppo)
        assert len(set(batch.answer_lengths())) > 2  # equal lengths would hide a mean of means
        totals = [1.0, -2.0, None, 0.5, 3.0, 0.0, -1.5, 2.0]
        return (batch, *ppo.advantages(batch, score_of(totals))[:3])

    return make


@pytest.mark.parametrize("name, options", [("llama", {}), ("moe", {"critic": "head"}), ("gpt2", {"lora": False})])
def test_F2_accumulation_invariance(make_ppo, minibatch, name, options):
    """1 micro-batch of 8, 2 of 4 and 8 of 1 add up to the same gradients and the same log."""
    ppo = make_ppo(name, perturb=0.05, max_new_tokens=8, **options)
    part = minibatch(ppo)
    widest = max(len(p) for p in part[0].prompt_ids) + 8
    counts, results = [], []
    for budget in (8 * widest, 4 * widest, 1):
        ppo.settings.tokens_per_micro_batch = budget
        counts.append(len(list(micro_batches(part[0].prompt_ids, part[0].keep, range(8), budget))))
        results.append(minibatch_gradients(ppo, part, [list(range(8))]))
    assert counts[0] == 1 < counts[1] < counts[2] == 8
    for grads, sums in results[1:]:
        close(results[0][0], grads)
        # log-probabilities near -4 are rounded by 2e-7, ratios with them, and the loss is what cancels of terms near 1
        assert sums == pytest.approx(results[0][1], rel=1e-5, abs=4e-6)


def test_F2_without_the_global_count_the_split_would_matter(make_ppo, minibatch):
    """The test above has teeth: a mean of means over the same micro-batches is another gradient."""
    ppo = make_ppo("llama", perturb=0.05, max_new_tokens=8)
    part = minibatch(ppo)
    whole, _ = minibatch_gradients(ppo, part, [list(range(8))])
    keep = part[1]
    means = [torch.zeros_like(g) for g in whole]
    for row in range(8):
        if keep[row].any():
            grads, _ = minibatch_gradients(ppo, part, [[row]], num_tokens=keep[row].sum().double())
            means = [m + g / 7 for m, g in zip(means, grads, strict=True)]
    assert max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(whole, means, strict=True)) > 0.05


def test_F2_rows_of_two_ranks_add_up_to_one(make_ppo, minibatch, take_rows, world):
    """Two ranks with half of the rows each end with the weights of one rank with all of them."""
    options = {"perturb": 0.05, "ppo_epochs": 2, "max_new_tokens": 8, "rollouts_per_step": 8}
    alone = make_ppo("moe", **options)
    part = minibatch(alone)
    two = world(2)
    ranks = [make_ppo("moe", rank=rank, **options) for rank in two.ranks]
    rows = [[0, 1, 2, 3], [4, 5, 6, 7]]

    def update(rank):
        batch, keep, advantage, returns = part
        r = rows[rank]
        return ranks[rank].update(0, take_rows(batch, r), keep[r], advantage[r], returns[r])

    logs = two.run(update)
    want = alone.update(0, *part)
    assert logs[0] == logs[1] == pytest.approx(want, rel=1e-4, abs=1e-6)
    for a, b, c in zip(*(ppo.groups[0] + ppo.groups[1] for ppo in (alone, *ranks)), strict=True):
        assert torch.equal(b, c)  # ranks agree to the bit
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def test_F2_a_rank_without_a_token_joins_in(make_ppo, minibatch, take_rows, world):
    """All of one rank's rows have no score: it adds nothing, waits for nobody, and ends with the same weights."""
    options = {"perturb": 0.05, "max_new_tokens": 8}
    alone = make_ppo("llama", **options)
    batch, keep, advantage, returns = minibatch(alone)
    keep[4:] = False
    two = world(2)
    ranks = [make_ppo("llama", rank=rank, **options) for rank in two.ranks]
    rows = [[0, 1, 2, 3], [4, 5, 6, 7]]
    two.run(
        lambda rank: ranks[rank].update(
            0, take_rows(batch, rows[rank]), keep[rows[rank]], advantage[rows[rank]], returns[rows[rank]]
        )
    )
    alone.update(0, batch, keep, advantage, returns)
    for a, b, c in zip(*(ppo.groups[0] + ppo.groups[1] for ppo in (alone, *ranks)), strict=True):
        assert torch.equal(b, c)
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("seed", range(10))
def test_F2_micro_batches_hold_every_row_once_and_keep_to_the_budget(seed):
    """The budget counts what the forward is given: prompt, answer and padding of both."""
    generator = torch.Generator().manual_seed(seed)
    n = 20
    prompts = [[3] * k for k in torch.randint(1, 60, (n,), generator=generator).tolist()]
    answer_lengths = torch.randint(1, 60, (n,), generator=generator)
    keep = torch.arange(60) < answer_lengths[:, None]
    budget = 400
    groups = list(token_budget_batches([len(p) for p in prompts], answer_lengths.tolist(), budget))
    assert sorted(row for group in groups for row in group) == list(range(n))
    for group in groups:
        pack = pack_rows(prompts, torch.zeros(n, 60, dtype=torch.long), keep, group, 0)
        assert len(group) == 1 or pack.input_ids.numel() <= budget
    assert len(groups) < n / 2  # rows of like length do share a forward
    some = [3, 11, 7]
    assert sorted(row for group in micro_batches(prompts, keep, some, budget) for row in group) == sorted(some)


def test_F2_a_row_above_the_budget_goes_alone():
    assert list(token_budget_batches([5, 100, 5], [1, 1, 2], 20)) == [[0, 2], [1]]
    assert list(token_budget_batches([], [], 20)) == []


# F3


def test_F3_rows_without_a_kept_token_do_not_count():
    logp, old, adv = torch.randn(3, 4, 5)
    keep = torch.rand(4, 5) < 0.6
    keep[2] = False
    some = [0, 1, 3]
    whole, sums = clipped_policy_loss(logp, old, adv, keep, clip=0.2, num_tokens=keep.sum())
    part, part_sums = clipped_policy_loss(logp[some], old[some], adv[some], keep[some], clip=0.2, num_tokens=keep.sum())
    torch.testing.assert_close(whole, part)
    torch.testing.assert_close(sums, part_sums)


def test_F3_masked_mean():
    x = torch.tensor([[1.0, float("nan")], [5.0, float("inf")]])
    assert masked_mean(x, torch.tensor([[T, F], [T, F]])) == 3.0
    assert masked_mean(x, torch.zeros(2, 2, dtype=torch.bool)) == 0.0


# F4, F5


@pytest.fixture
def spied(monkeypatch):
    """Rows of every minibatch, learning rates at every optimizer step, gradient norms that the optimizer sees."""
    seen = {"rows": [], "lr": [], "norms": []}
    accumulate = plumbline.align.ppo.PPO._accumulate

    def spy(self, batch, rows, *args):
        seen["rows"].append(list(rows))
        return accumulate(self, batch, rows, *args)

    monkeypatch.setattr(plumbline.align.ppo.PPO, "_accumulate", spy)
    step = torch.optim.AdamW.step

    def spy_step(self, *args, **kwargs):
        seen["lr"].append([group["lr"] for group in self.param_groups])
        norms = [
            torch.cat([p.grad.flatten() for p in group["params"] if p.grad is not None]).norm().item()
            for group in self.param_groups
        ]
        seen["norms"].append(norms)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy_step)
    return seen


def test_F4_every_row_once_a_pass_in_a_new_order(make_ppo, one_step, spied):
    ppo = make_ppo("llama", rollouts_per_step=8, minibatches=4, ppo_epochs=3)
    one_step(ppo, 0)
    assert len(spied["rows"]) == 3 * 4 and all(len(rows) == 2 for rows in spied["rows"])
    passes = [sum(spied["rows"][4 * e : 4 * e + 4], []) for e in range(3)]
    assert all(sorted(order) == list(range(8)) for order in passes)
    assert len({tuple(order) for order in passes}) == 3
    spied["rows"].clear()
    one_step(ppo, 1)
    assert sum(spied["rows"][:4], []) != passes[0]


def test_F4_remainders_are_refused(make_ppo, world):
    with pytest.raises(ValueError, match="rollouts_per_step=10 does not split into minibatches=4"):
        PPOSettings(rollouts_per_step=10, minibatches=4)
    with pytest.raises(ValueError, match="rollouts_per_step=8 does not split into 3 processes x 2 minibatches"):
        make_ppo(rollouts_per_step=8, minibatches=2, rank=world(3).ranks[0])


def test_F4_prompts_are_used_up_before_any_comes_again(make_ppo):
    """8 prompts, 6 a step: every window of 8 draws that starts a pass holds each prompt once; passes are shuffled."""
    ppo = make_ppo("llama", rollouts_per_step=6)
    drawn = sum((ppo.prompts_of_step(step) for step in range(8)), [])
    passes = [drawn[start : start + 8] for start in range(0, 48, 8)]
    assert all(sorted(one) == list(range(8)) for one in passes)
    assert len({tuple(one) for one in passes}) > 1
    more = make_ppo("llama", rollouts_per_step=24)  # more rows a step than prompts
    assert sorted(more.prompts_of_step(3)) == sorted(list(range(8)) * 3)


def test_F4_ranks_share_the_prompts_of_a_step(make_ppo, world):
    alone = make_ppo("llama", rollouts_per_step=6)
    ranks = [make_ppo("llama", rollouts_per_step=6, rank=rank) for rank in world(2).ranks]
    for step in range(4):
        assert ranks[0].prompts_of_step(step) + ranks[1].prompts_of_step(step) == alone.prompts_of_step(step)


def test_F5_one_optimizer_step_a_minibatch_and_a_linear_rate(make_ppo, one_step, spied):
    ppo = make_ppo("llama", steps=2, ppo_epochs=2, minibatches=2, policy_lr=8e-3, critic_lr=4e-3)
    one_step(ppo, 0)
    one_step(ppo, 1)
    assert len(spied["rows"]) == 8
    want = [[8e-3 * (1 - k / 8), 4e-3 * (1 - k / 8)] for k in range(8)]
    assert spied["lr"] == [pytest.approx(rates) for rates in want]
    assert ppo.scheduler.get_last_lr() == [0.0, 0.0]


# F6


def test_F6_gradients_are_clipped_within_the_loop(make_ppo, one_step, spied):
    ppo = make_ppo("llama", perturb=0.05, minibatches=2, max_grad_norm=1e-3)
    step = one_step(ppo)
    assert len(spied["norms"]) == 2
    for policy, critic in spied["norms"]:
        assert policy == pytest.approx(1e-3, rel=1e-2) and critic == pytest.approx(1e-3, rel=1e-2)
    assert step.updated["policy/grad_norm"] > 1e-2  # the log has the norm before clipping


@pytest.mark.parametrize("group", [0, 1], ids=["policy", "critic"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_F6_a_gradient_that_is_not_finite_stops_the_run_and_keeps_the_batch(
    make_ppo, rolled_out, policy_tensors, tmp_path, group, poison
):
    ppo = make_ppo("llama", perturb=0.05)
    batch, scored = rolled_out(ppo)
    parts = ppo.advantages(batch, scored)[:3]
    with torch.no_grad():
        ppo.groups[group][-1].view(-1)[0] = poison
    before = policy_tensors(ppo)
    with pytest.raises(FloatingPointError, match="gradient norm.*the run stops here.*lower learning rate"):
        ppo.update(0, batch, *parts)
    kept = torch.load(tmp_path / "run" / "non_finite_batch.pt", weights_only=True)
    assert sorted(map(tuple, kept["prompt_ids"])) == sorted(map(tuple, batch.prompt_ids))
    assert kept["answer_ids"].shape == batch.answer_ids.shape
    after = policy_tensors(ppo)
    assert all(
        torch.equal(
            a,
            after[name],
        )
        or a.isnan().any()
        for name, a in before.items()
    )  # no step was taken


@pytest.mark.parametrize("what", ["score", "advantage"])
def test_F6_an_advantage_that_is_not_finite_stops_the_run(make_ppo, rolled_out, score_of, what):
    ppo = make_ppo("llama", perturb=0.05)
    batch, _ = rolled_out(ppo)
    totals = [0.5, 1.0] * 4
    if what == "score":
        totals[3] = float("nan")
    keep, advantage, returns, _ = ppo.advantages(batch, score_of(totals))
    if what == "advantage":
        advantage[2, 0] = float("inf")
    with pytest.raises(FloatingPointError):
        ppo.update(0, batch, keep, advantage, returns)


# F7, F8


@pytest.mark.parametrize("options", [{}, {"critic": "head"}, {"lora": False}], ids=["own", "head", "full"])
def test_F7_policy_and_critic_have_rates_of_their_own(make_ppo, options):
    ppo = make_ppo("moe", policy_lr=1e-4, critic_lr=9e-4, **options)
    policy, critic = ppo.optimizer.param_groups
    assert (policy["lr"], critic["lr"]) == (1e-4, 9e-4)
    assert [len(policy["params"]), len(critic["params"])] == [len(group) for group in ppo.groups]
    assert policy["weight_decay"] == critic["weight_decay"] == 0.0 and policy["eps"] == 1e-5
    if not ppo.settings.lora:  # every weight is trained, each by one optimizer group
        assert len(ppo.groups[0]) == len([p for p in ppo.actors.lm.parameters() if p.requires_grad])
    else:
        assert all("lora" in n for n, p in ppo.actors.lm.named_parameters() if id(p) in {id(q) for q in ppo.groups[0]})


def test_F8_logged_ratio_kl_and_clip_fraction_are_means_over_kept_tokens(make_ppo, rolled_out, score_of):
    """By hand, from the log-probabilities before and after one optimizer step at a rate of 0."""
    ppo = make_ppo("llama", policy_lr=0.0, perturb=0.05)
    batch, _ = rolled_out(ppo)
    keep, advantage, returns, _ = ppo.advantages(batch, score_of([1.0, None, -1.0, 0.5, 2.0, 0.0, 1.0, -2.0]))
    shift = torch.where(torch.arange(keep.shape[1]) % 2 == 0, 0.5, -0.1)  # a fifth and more are clipped on one side
    batch.old_logp.copy_(batch.old_logp - shift)
    updated = ppo.update(0, batch, keep, advantage, returns)
    log_ratio = shift.expand(keep.shape)[keep].double()
    ratio, adv = log_ratio.exp(), advantage[keep].double()
    clipped = ((ratio > 1.2) & (adv > 0)) | ((ratio < 0.8) & (adv < 0))
    loss = torch.maximum(-adv * ratio, -adv * ratio.clamp(0.8, 1.2)).mean()
    assert updated["policy/ratio"] == pytest.approx(float(ratio.mean()), rel=1e-4)
    assert updated["policy/approx_kl"] == pytest.approx(float((ratio - 1 - log_ratio).mean()), rel=1e-3)
    assert updated["policy/clip_fraction"] == pytest.approx(float(clipped.double().mean()), abs=1e-6)
    assert updated["policy/loss"] == pytest.approx(float(loss), rel=1e-3, abs=1e-5)


# F10


TOY_RUNS = [  # passes, steps and settings: a random model needs large steps to learn anything in seconds
    (1, 12, {"lora": False, "policy_lr": 1e-2}),
    (4, 8, {"lora": False, "policy_lr": 1e-2}),  # more passes, fewer rollouts: where a wrong old_logp shows
    (1, 14, {"lora": True, "policy_lr": 2e-2}),
]


@pytest.mark.parametrize("ppo_epochs, steps, options", TOY_RUNS, ids=["full-K1", "full-K4", "lora-K1"])
def test_F10_reward_rises_on_a_toy_task(settings, share, read_metrics, ppo_epochs, steps, options):
    """Write ASCII: a third of a random model's characters are; after a few rollouts clearly more."""
    run = train(
        settings(
            steps=steps,
            rollouts_per_step=32,
            minibatches=2,
            ppo_epochs=ppo_epochs,
            max_new_tokens=4,
            kl_coef=0.0,
            critic="head",
            eval_every=0,
            **options,
        ),
        reward=CompositeReward([(share(letters="".join(map(chr, range(32, 127)))), 1.0)]),
    )
    scores = [row["reward/share_raw_mean"] for row in read_metrics(run)[:-1]]
    first, last = sum(scores[:3]) / 3, sum(scores[-3:]) / 3
    assert last > first + 0.15, scores


# F11


def test_F11_ranks_sample_differently_from_equal_weights(make_ppo, world, policy_tensors):
    ranks = [make_ppo("llama", rank=rank, rollouts_per_step=16) for rank in world(2).ranks]
    first, second = (policy_tensors(ppo) for ppo in ranks)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    prompts = [ranks[0].prompt_ids[0]] * 8
    drawn = [[tuple(a.ids) for a in ppo.sample(prompts, ppo.sampling)[0]] for ppo in ranks]
    assert drawn[0] != drawn[1]
    assert [ppo.sampling.initial_seed() for ppo in ranks] == [0, 100_003]


def test_F11_a_seed_fixes_the_run_and_another_changes_it(settings, share, tmp_path):
    def weights(seed, folder):
        run = train(
            settings(seed=seed, steps=1, output_dir=str(tmp_path / folder)), reward=CompositeReward([(share(), 1.0)])
        )
        return (run / "model" / "adapter_model.safetensors").read_bytes()

    assert weights(1, "a") == weights(1, "b")
    assert weights(2, "c") != weights(1, "a")


# F12


def test_F12_truncated_answers_are_charged_and_still_train_both_losses(make_ppo, rolled_out, score_of):
    ppo = make_ppo("llama", missing_eos_penalty=2.0, kl_coef=0.0, lam=1.0, rollouts_per_step=16, max_new_tokens=3)
    batch, _ = rolled_out(ppo)
    cut = ~batch.finished
    assert cut.any() and batch.finished.any()
    keep, advantage, returns, _ = ppo.advantages(batch, score_of([1.0] * 16))
    assert torch.equal(keep, batch.keep)
    assert (returns[cut][keep[cut]] == -1.0).all() and (returns[~cut][keep[~cut]] == 1.0).all()
    assert (advantage[cut][keep[cut]] < 0).all()
