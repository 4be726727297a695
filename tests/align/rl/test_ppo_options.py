"""Choices of the loop beyond the checklist: optimizers, clipping, early stop, checkpointing, shared layers, precision."""

import json

import pytest
import torch
from torch import nn

from plumbline.align.ppo import train
from plumbline.align.rl.losses import kl_loss
from plumbline.align.runtime.optimizers import add_up_gradients, build_optimizer, clip_adaptively
from plumbline.align.runtime.tracking import Metrics
from plumbline.policy_models.rollout.trunk import frozen_layers
from plumbline.reward import CompositeReward


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2", "mixtral", "moe"])
@pytest.mark.parametrize("lora", [True, False])
def test_every_family_trains_for_3_steps(settings, share, read_metrics, name, lora):
    run = train(settings(name, steps=3, lora=lora, ppo_epochs=2), reward=CompositeReward([(share(), 1.0)]))
    rows = read_metrics(run)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert all(row["policy/grad_norm"] > 0 for row in rows[:3])


@pytest.mark.parametrize("options", [{"lora": True}, {"lora": False}, {"lora": False, "weights": "bfloat16"}])
def test_bf16_computes_and_values_stay_float32(make_ppo, one_step, options):
    ppo = make_ppo(dtype="bfloat16", policy_lr=1e-3, **options)
    out = one_step(ppo)
    assert out.batch.old_value.dtype == out.batch.old_logp.dtype == torch.float32
    assert out.updated["policy/grad_norm"] > 0
    trained = {p.dtype for p in ppo.actors.policy_parameters()}
    assert trained == {torch.bfloat16 if options.get("weights") else torch.float32}


@pytest.mark.parametrize("lora", [True, False])
def test_fp16_scales_the_loss_and_leaves_out_steps_that_overflow(make_ppo, one_step, lora):
    """The first scale is too large for any gradient: weights stay, the scale is halved, and the next step trains."""
    ppo = make_ppo(dtype="float16", policy_lr=1e-3, lora=lora, minibatches=1, ppo_epochs=1)
    assert ppo.actors.lm.get_input_embeddings().weight.dtype == (torch.float16 if lora else torch.float32)
    ppo.scaler.load_state_dict(ppo.scaler.state_dict() | {"scale": 2.0**120})
    before = [p.detach().clone() for p in ppo.actors.policy_parameters()]
    overflowed = one_step(ppo)
    assert overflowed.updated["policy/loss_scale"] == 2.0**119
    assert all(torch.equal(a, b) for a, b in zip(before, ppo.actors.policy_parameters(), strict=True))
    ppo.scaler.load_state_dict(ppo.scaler.state_dict() | {"scale": 2.0**10})
    trained = one_step(ppo)
    assert 0 < trained.updated["policy/grad_norm"] < 100  # of the gradient itself, not of the scaled one
    assert not all(torch.equal(a, b) for a, b in zip(before, ppo.actors.policy_parameters(), strict=True))
    assert {p.dtype for p in ppo.actors.policy_parameters()} == {torch.float32}


def test_fp16_stops_when_no_scale_is_small_enough(make_ppo, one_step, monkeypatch):
    ppo = make_ppo(dtype="float16")
    ppo.scaler.load_state_dict(ppo.scaler.state_dict() | {"scale": 1.0})
    monkeypatch.setattr("plumbline.align.ppo.clipped_policy_loss", lambda logp, *_, **__: (logp.sum() * torch.inf, {}))
    with pytest.raises(FloatingPointError, match="gradient norm"):
        one_step(ppo)


def test_old_logp_of_the_rollout_is_what_was_drawn(make_ppo, rolled_out):
    batch, _ = rolled_out(make_ppo(old_logp="rollout"))
    assert torch.equal(batch.old_logp, batch.sample_logp)
    plain, _ = rolled_out(make_ppo())
    torch.testing.assert_close(plain.old_logp, batch.old_logp, atol=1e-4, rtol=1e-4)  # fp32: the same model


# layers below the first adapter


def test_frozen_layers_are_those_below_the_first_adapter(make_ppo):
    assert frozen_layers(make_ppo("llama", lora_top_layers=1).actors.lm) == 1
    assert frozen_layers(make_ppo("moe", lora_top_layers=1).actors.lm) == 1
    assert frozen_layers(make_ppo("llama").actors.lm) == 0
    assert frozen_layers(make_ppo("gpt2", lora_top_layers=1).actors.lm) == 0  # adds positions to its embeddings
    assert frozen_layers(make_ppo("llama", lora=False).actors.lm) == 0


@pytest.mark.parametrize("name", ["llama", "qwen2", "moe"])
@pytest.mark.parametrize("critic", ["own", "head"])
def test_running_the_lower_layers_once_changes_nothing(make_ppo, rolled_out, name, critic, monkeypatch):
    """Log-probabilities, values and gradients with and without the shared lower layers."""
    got = []
    for shared in (True, False):
        ppo = make_ppo(name, lora_top_layers=1, critic=critic, perturb=0.05, tokens_per_micro_batch=200)
        if not shared:
            monkeypatch.setattr(type(ppo.actors), "trunk", lambda *_: None)
        batch, scored = rolled_out(ppo)
        assert (batch.trunk is not None) == shared
        keep, advantage, returns, _ = ppo.advantages(batch, scored)
        ppo._accumulate(batch, list(range(len(batch))), keep, advantage, returns, keep.sum().double(), True, {})
        grads = [p.grad for group in ppo.groups for p in group]
        got.append([batch.old_logp, batch.ref_logp, batch.old_value, *grads])
    for a, b in zip(*got, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_gradient_checkpointing_changes_no_gradient_and_runs_layers_again(make_ppo, rolled_out):
    got, calls = [], []
    for checkpointing in (False, True):
        ppo = make_ppo("llama", gradient_checkpointing=checkpointing, perturb=0.05)
        batch, scored = rolled_out(ppo)
        keep, advantage, returns, _ = ppo.advantages(batch, scored)
        count = [0]
        layer = ppo.actors.lm.model.layers[0].mlp
        hook = layer.register_forward_pre_hook(lambda *_, count=count: count.__setitem__(0, count[0] + 1))
        ppo._accumulate(batch, list(range(len(batch))), keep, advantage, returns, keep.sum().double(), True, {})
        hook.remove()
        got.append([p.grad for group in ppo.groups for p in group])
        calls.append(count[0])
        assert not any(module.training for module in ppo.actors.lm.modules())
    assert calls[1] == 2 * calls[0]
    for a, b in zip(*got, strict=True):
        torch.testing.assert_close(a, b)


# optimizer


def test_adaptive_clipping_by_hand():
    weight = nn.Parameter(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    weight.grad = torch.tensor([[0.0, 1.0], [3.0, 4.0]])
    clip_adaptively([weight], 0.1, eps=1e-3)
    torch.testing.assert_close(weight.grad, torch.tensor([[0.0, 0.5], [0.6e-4, 0.8e-4]]))
    clip_adaptively([weight], 10.0)  # within the bound nothing moves
    torch.testing.assert_close(weight.grad[0], torch.tensor([0.0, 0.5]))


def test_adaptive_clipping_in_the_loop(make_ppo, one_step):
    free = one_step(make_ppo()).updated["policy/grad_norm"]
    held = one_step(make_ppo(adaptive_clip=1e-4)).updated["policy/grad_norm"]
    assert 0 < held < free


def test_gradients_of_a_parameter_without_tokens_count_as_0():
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    a.grad = torch.tensor([1.0, 2.0])
    add_up_gradients([a, b], lambda flat: 2 * flat)
    torch.testing.assert_close(a.grad, torch.tensor([2.0, 4.0]))
    torch.testing.assert_close(b.grad, torch.zeros(3))


def test_unknown_optimizer_and_missing_extra(settings, monkeypatch):
    with pytest.raises(ValueError, match="optimizer='lamb': must be one of adamw, adamw_8bit"):
        settings(optimizer="lamb")
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes.optim", None)
    with pytest.raises(ImportError, match=r"plumbline-rlhf\[quant\]"):
        build_optimizer("adamw_8bit", [([nn.Parameter(torch.ones(2))], 1e-3)])


# early stop


def test_target_kl_stops_the_epochs_and_the_rate_still_falls_with_the_rollouts(make_ppo, one_step):
    ppo = make_ppo(target_kl=1e-6, ppo_epochs=4, minibatches=2, steps=2)
    out = one_step(ppo)
    assert out.updated["policy/optimizer_steps"] < 8
    assert ppo.scheduler.last_epoch == 8
    assert one_step(make_ppo(target_kl=1e6, ppo_epochs=2)).updated["policy/optimizer_steps"] == 2


def test_target_kl_stops_all_ranks_together(make_ppo, world, tmp_path):
    ranks = world(2)
    ppos = [make_ppo(rank=r, target_kl=1e-5, ppo_epochs=6, minibatches=1, rollouts_per_step=16) for r in ranks.ranks]

    def work(rank):
        return ppos[rank].step(0, Metrics(tmp_path, enabled=False))["policy/optimizer_steps"]

    taken = ranks.run(work)
    assert taken[0] == taken[1] < 6


# KL in the loss


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl_loss_has_the_value_of_its_estimator_and_the_gradient_of_the_kl(kind):
    """Over all of a vocabulary of 7, weighted by the policy: the gradient is that of the exact KL."""
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(7, generator=rng, dtype=torch.float64).requires_grad_()
    ref = torch.randn(7, generator=rng, dtype=torch.float64).log_softmax(-1)
    logp = logits.log_softmax(-1)
    (exact,) = torch.autograd.grad((logp.exp() * (logp - ref)).sum(), logits, retain_graph=True)
    keep = torch.ones(1, 1, dtype=torch.bool)
    parts = [
        torch.autograd.grad(
            kl_loss(logp[w].view(1, 1), ref[w].view(1, 1), keep, kind=kind, num_tokens=1.0), logits, retain_graph=True
        )[0]
        * logp[w].exp().detach()
        for w in range(7)
    ]
    torch.testing.assert_close(sum(parts), exact)


def test_kl_in_the_loss_leaves_the_reward_alone(make_ppo, rolled_out, one_step, share):
    ppo = make_ppo(kl_in="loss", kl_coef=0.5, perturb=0.05)
    out = one_step(ppo)
    assert out.measured["objective/non_score_reward"] == 0.0
    assert out.updated["policy/kl_loss"] != 0.0


# one set of weights for the reward model too


def test_reward_adapter_on_the_policys_weights_scores_as_the_merged_model(tiny, make_ppo, tmp_path):
    from peft import LoraConfig, get_peft_model

    from plumbline.policy_models.loading import load_scalar_model, load_tokenizer
    from plumbline.reward.learned import LearnedPreference

    scalar = load_scalar_model(tiny("llama"), dtype=torch.float32)
    peft = get_peft_model(scalar, LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS"))
    noise = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name or "score" in name:
                parameter += 0.2 * torch.randn(parameter.shape, generator=noise)
    peft.eval()
    peft.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "reward_scaling.json").write_text(json.dumps({"mean": 0.5, "std": 2.0}))
    tokenizer = load_tokenizer(tiny("llama"))
    prompts, answers = ["Hi", "Name a tree."], ["a birch", "oak, ash and thorn"]
    with torch.no_grad():
        want = LearnedPreference(model=peft, tokenizer=tokenizer)(prompts, answers)

    ppo = make_ppo(perturb=0.05)
    before = {n: p.clone() for n, p in ppo.actors.state_dict()["adapters"].items()}
    shared = ppo.actors.reward_model(tmp_path / "adapter")
    got = LearnedPreference(str(tmp_path / "adapter"), model=shared, tokenizer=tokenizer)(prompts, answers)
    torch.testing.assert_close(torch.tensor(got), (torch.tensor(want) - 0.5) / 2.0, atol=1e-4, rtol=1e-4)
    after = ppo.actors.state_dict()["adapters"]
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    assert all(p.requires_grad for p in ppo.actors.policy_parameters())


def test_reward_adapter_of_another_start_is_refused(tiny, make_ppo, tmp_path):
    from peft import LoraConfig, get_peft_model

    from plumbline.policy_models.loading import load_scalar_model

    scalar = load_scalar_model(tiny("qwen2"), dtype=torch.float32)
    get_peft_model(scalar, LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS")).save_pretrained(
        tmp_path / "adapter"
    )
    with pytest.raises(ValueError, match="train the reward model on this start"):
        make_ppo("llama").actors.reward_model(tmp_path / "adapter")
