"""PPO checklist, G: mixture-of-experts policies."""

import pytest
import torch


@pytest.mark.parametrize("name", ["moe", "mixtral"])
def test_G1_no_auxiliary_loss_reaches_the_gradient(make_ppo, rolled_out, name):
    """Raising the coefficient of the load-balancing loss changes no gradient."""
    got = []
    for coefficient in (0.0, 10.0):
        ppo = make_ppo(name, lora=False, critic="head")
        ppo.actors.lm.config.router_aux_loss_coef = coefficient
        batch, scored = rolled_out(ppo)
        keep, advantage, returns, _ = ppo.advantages(batch, scored)
        ppo._accumulate(batch, list(range(len(batch))), keep, advantage, returns, keep.sum().double(), True, {})
        got.append([p.grad.clone() for p in ppo.groups[0] if p.grad is not None])
    assert len(got[0]) == len(got[1]) and all(torch.equal(a, b) for a, b in zip(*got, strict=True))


@pytest.mark.parametrize("name", ["moe", "mixtral"])
def test_G3_rollout_and_training_route_alike(make_ppo, rolled_out, name):
    ppo = make_ppo(name, perturb=0.02)
    measured = ppo.advantages(*rolled_out(ppo))[3]
    assert measured["rollout/logp_mismatch"] < 1e-4  # fp32, one engine: a token routed elsewhere would show


def test_G4_lora_reaches_experts_only_when_asked_and_never_the_router(make_ppo):
    def adapted(**options):
        ppo = make_ppo("moe", **options)
        names = [n for n, p in ppo.actors._peft.named_parameters() if p.requires_grad and ".policy" in n]
        return sum("experts" in n for n in names), sum("gate.weight" in n or "router" in n for n in names)

    assert adapted() == (0, 0)
    experts, router = adapted(lora_experts=True)
    assert experts > 0 and router == 0
