"""PPO checklist, B: log-probabilities and sampling."""

import copy
import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, MixtralConfig, OPTConfig, PhimoeConfig

import plumbline.align.ppo
from plumbline.align.models.actors import Actors
from plumbline.align.models.start import ModelSettings
from plumbline.align.ppo import PPOSettings, train
from plumbline.align.runtime.launch import parse_settings
from plumbline.policy_models.chat import sample_answers
from plumbline.policy_models.loading import load_policy, load_tokenizer
from plumbline.policy_models.logprobs import answer_logprobs, pack_rows, token_logprobs
from plumbline.policy_models.rollout.generation import generate
from plumbline.reward import CompositeReward


@pytest.fixture
def ratios(monkeypatch):
    """Largest |ratio - 1| over kept tokens of every policy loss that is computed, in order."""
    seen = []
    real = plumbline.align.ppo.clipped_policy_loss

    def spy(logp, old_logp, adv, keep, **options):
        seen.append(float(((logp - old_logp).exp() - 1).detach().abs().masked_fill(~keep, 0.0).max()))
        return real(logp, old_logp, adv, keep, **options)

    monkeypatch.setattr(plumbline.align.ppo, "clipped_policy_loss", spy)
    return seen


# B1: one temperature for sampling and for every log-probability


def test_B1_temperature_divides_policy_and_reference(make_ppo):
    ppo = make_ppo("llama", temperature=0.7, perturb=0.05)
    prompts, ids = [[5, 6, 7], [9]], torch.tensor([[11, 12], [13, 14]])
    policy, reference, _, _ = ppo.log_probabilities(prompts, ids, torch.ones_like(ids, dtype=torch.bool))
    for got, actor in ((policy, ppo.actors.policy()), (reference, ppo.actors.reference())):
        with torch.no_grad(), actor as model:
            logits = model(torch.tensor([prompts[0] + ids[0].tolist()])).logits[0]
        want = (logits[2:4] / 0.7).log_softmax(-1).gather(-1, ids[0, :, None])[:, 0]
        torch.testing.assert_close(got[0], want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_B1_ratio_is_1_at_step_0_at_any_temperature(make_ppo, one_step, ratios, temperature):
    ppo = make_ppo("llama", temperature=temperature, perturb=0.05)
    step = one_step(ppo)
    assert max(ratios) < 1e-5
    batch = step.batch  # and the tokens were drawn at that temperature too
    torch.testing.assert_close(batch.sample_logp[batch.keep], batch.old_logp[batch.keep], atol=5e-5, rtol=1e-5)


# B2, B3: the whole softmax, whatever a generation config says


@pytest.mark.parametrize("name", ["top_p", "top_k", "repetition_penalty"])
def test_B2_filters_are_no_setting(name):
    with pytest.raises(ValueError, match=rf"unknown setting '--{name}'"):
        parse_settings((PPOSettings,), [f"--{name}", "1"])


def test_B2_engine_draws_from_the_whole_softmax(tiny):
    """4,000 first tokens of one prompt: counts fit the probabilities of the training forward (chi-squared, 4 sigma)."""
    model, num_draws, temperature = load_policy(tiny("gpt2")), 4000, 1.5
    answers = generate(
        model,
        [[5, 6, 7]] * num_draws,
        max_new_tokens=1,
        stop_ids=[2],
        pad_id=0,
        temperature=temperature,
        generator=torch.Generator().manual_seed(0),
        batch_size=1000,
    )
    with torch.no_grad():
        p = (model(torch.tensor([[5, 6, 7]])).logits[0, -1].double() / temperature).softmax(-1)
    counts = torch.bincount(torch.tensor([answer.ids[0] for answer in answers]), minlength=259).double()
    order = p.argsort(descending=True)
    common = order[p[order] * num_draws >= 5]
    rest = order[len(common) :]
    observed = torch.cat([counts[common], counts[rest].sum()[None]])
    expected = torch.cat([p[common], p[rest].sum()[None]]) * num_draws
    chi2, dof = float(((observed - expected).square() / expected).sum()), len(observed) - 1
    assert dof > 50 and counts[rest].sum() > 0  # the tail is drawn too
    assert abs(chi2 - dof) < 4 * (2 * dof) ** 0.5


def test_B3_generation_config_does_not_change_what_is_drawn(tiny):
    def draw(**config):
        model, tokenizer = load_policy(tiny("llama")), load_tokenizer(tiny("llama"))
        for name, value in config.items():
            setattr(model.generation_config, name, value)
        generator = torch.Generator().manual_seed(4)
        prompts = [[5, 6, 7], [9, 10]] * 4
        answers, _ = sample_answers(model, tokenizer, prompts, max_new_tokens=8, temperature=1.0, generator=generator)
        return [answer.ids for answer in answers]

    plain = draw()
    assert len({tuple(ids) for ids in plain}) > 4
    assert draw(do_sample=False, top_k=1, top_p=0.1, temperature=0.1, repetition_penalty=9.0, max_length=9) == plain


# B4: old log-probabilities are those of the update's forward


@pytest.mark.parametrize(
    "name, options",
    [
        ("gpt2", {}),
        ("mixtral", {}),
        ("moe", {"critic": "head"}),
        ("moe", {"lora_experts": True}),
        ("llama", {"lora_top_layers": 1}),
        ("llama", {"lora": False, "policy_lr": 1e-3}),
        ("moe", {"lora": False, "critic": "head", "policy_lr": 1e-3}),
    ],
)
def test_B4_ratio_is_1_in_the_first_pass(make_ppo, one_step, ratios, name, options):
    """Also with other micro-batches in the update than in the rollout: minibatches are packed anew."""
    ppo = make_ppo(name, perturb=0.02, rollouts_per_step=8, minibatches=1, tokens_per_micro_batch=200, **options)
    step = one_step(ppo)
    assert len(ratios) > 1  # several micro-batches, one optimizer step
    assert max(ratios) < 1e-5
    assert step.updated["policy/clip_fraction"] == 0
    assert abs(step.updated["policy/approx_kl"]) < 1e-9


def test_B4_ratio_moves_in_the_second_pass(make_ppo, one_step, ratios):
    """The test above has teeth: after one optimizer step, the ratio is no longer 1."""
    one_step(make_ppo("llama", ppo_epochs=2))
    assert ratios[0] < 1e-5 < 1e-3 < ratios[-1]


# B5: two forwards agree in train mode


NOISY = {
    "gpt2": GPT2Config(
        vocab_size=50, n_positions=32, n_embd=16, n_layer=1, n_head=2, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5
    ),
    "mixtral": MixtralConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, attention_dropout=0.5, router_jitter_noise=0.5,
    ),
    "phimoe": PhimoeConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        router_jitter_noise=0.5, input_jitter_noise=0.5, attention_dropout=0.5,
    ),
    "opt": OPTConfig(
        vocab_size=50, hidden_size=16, word_embed_proj_dim=16, ffn_dim=16, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=32, dropout=0.5, attention_dropout=0.5,
    ),
}  # fmt: skip


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("name", sorted(NOISY))
def test_B5_no_dropout_and_no_router_jitter(name, lora):
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(NOISY[name]), dtype=torch.float32)
    ids, keep = torch.randint(3, 50, (3, 5)), torch.ones(3, 5, dtype=torch.bool)
    packed = pack_rows([[3, 4], [5], [6, 7, 8]], ids, keep, range(3), 0)
    model.train()
    first, second = (answer_logprobs(model, packed, temperature=1.0)[0] for _ in range(2))
    assert not torch.equal(first, second)  # as it comes, the model is noisy

    adapters = ModelSettings(lora_r=2, lora_targets="q_proj,v_proj" if name == "phimoe" else "all-linear")
    actors = Actors(model, lora=adapters.lora_config(model) if lora else None, critic="own")
    for actor in (actors.policy, actors.reference):
        with torch.no_grad(), actor() as lm:
            assert torch.equal(*(answer_logprobs(lm, packed, temperature=1.0)[0] for _ in range(2)))
    with torch.no_grad():
        actors.value_head.out.weight += 1.0
        assert torch.equal(actors.values(packed), actors.values(packed))


def test_B5_lora_has_no_dropout(make_ppo):
    ppo = make_ppo("llama")
    assert ppo.settings.lora_config(ppo.actors.lm).lora_dropout == 0.0


# B6, B7: integration


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_B6_learning_rate_0_keeps_ratio_1_and_kl_0(settings, share, read_metrics, ratios, lora):
    run = train(
        settings(lora=lora, policy_lr=0.0, critic_lr=1e-2, steps=2, ppo_epochs=2, minibatches=2),
        reward=CompositeReward([(share(), 1.0)]),
    )
    rows = read_metrics(run)
    assert len(ratios) == 2 * 2 * 2 and max(ratios) < 1e-5
    assert [row["objective/kl"] for row in rows[:-1]] == [0.0, 0.0]
    assert [row["val/ratio"] for row in rows[:-1]] == [1.0, 1.0]
    assert [row["policy/clipfrac_avg"] for row in rows[:-1]] == [0.0, 0.0]
    assert all(row["policy/grad_norm"] > 0 for row in rows[:-1])  # there was something to learn


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "moe"])
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_B7_kl_is_0_at_the_first_step(make_ppo, rolled_out, name, lora):
    ppo = make_ppo(name, lora=lora)
    batch, scored = rolled_out(ppo)
    _, _, _, measured = ppo.advantages(batch, scored)
    assert abs(measured["objective/kl"]) < 1e-5
    assert (batch.old_logp - batch.ref_logp).abs().max() < 1e-5


def test_B7_kl_grows_once_the_policy_moves(make_ppo, rolled_out):
    ppo = make_ppo("llama", perturb=0.1, max_new_tokens=16, rollouts_per_step=32)
    _, _, _, measured = ppo.advantages(*rolled_out(ppo))
    assert measured["objective/kl"] > 0.05


# B8: padding reaches no metric


@pytest.fixture
def widen():
    """widen(batch, columns) -> the same rollout with columns of padding, filled with what must not be read."""

    def pad(batch, columns):
        def grow(x, fill):
            return torch.nn.functional.pad(x, (0, columns), value=fill)

        return dataclasses.replace(
            batch,
            answer_ids=grow(batch.answer_ids, 17),
            keep=grow(batch.keep, False),
            old_logp=grow(batch.old_logp, float("nan")),
            ref_logp=grow(batch.ref_logp, 33.0),
            old_value=grow(batch.old_value, 1e4),
            sample_logp=grow(batch.sample_logp, float("nan")),
        )

    return pad


def test_B8_metrics_do_not_change_with_padding(make_ppo, rolled_out, widen):
    plain, padded = make_ppo("moe", perturb=0.05, ppo_epochs=2), make_ppo("moe", perturb=0.05, ppo_epochs=2)
    batch, scored = rolled_out(plain)
    wide = widen(batch, 5)
    keep, advantage, returns, measured = plain.advantages(batch, scored)
    wide_keep, wide_advantage, wide_returns, wide_measured = padded.advantages(wide, scored)
    assert wide_measured == pytest.approx(measured, rel=1e-6, abs=1e-7)  # the order of a sum, nothing more
    width = keep.shape[1]
    assert torch.equal(wide_advantage[:, :width], advantage) and (wide_advantage[:, width:] == 0).all()
    assert torch.equal(wide_returns[:, :width], returns)
    updated = plain.update(0, batch, keep, advantage, returns)
    assert padded.update(0, wide, wide_keep, wide_advantage, wide_returns) == updated
    for a, b in zip(plain.groups[0] + plain.groups[1], padded.groups[0] + padded.groups[1], strict=True):
        assert torch.equal(a, b)


def test_B8_entropy_is_the_mean_over_kept_tokens_of_the_scaled_softmax(make_ppo, rolled_out):
    """Worked by hand on the update's first pass; never negative, as a padded sum would make it."""
    ppo = make_ppo("llama", perturb=0.05, temperature=0.7)
    batch, scored = rolled_out(ppo)
    entropies = []
    with torch.no_grad(), ppo.actors.policy() as model:
        for row, prompt in enumerate(batch.prompt_ids):
            answer = batch.answer_ids[row][batch.keep[row]].tolist()
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1] / 0.7
            logp = logits.log_softmax(-1)
            entropies += (-(logp.exp() * logp).sum(-1)).tolist()
    updated = ppo.update(0, batch, *ppo.advantages(batch, scored)[:3])
    assert updated["policy/entropy"] == pytest.approx(sum(entropies) / len(entropies), rel=1e-5)
    assert updated["policy/entropy"] > 0


@pytest.mark.parametrize("rows", [1, 255, 256, 257])  # around the chunk, and two chunks
def test_B8_token_logprobs_equal_autograd(rows):
    logits = torch.randn(rows, 19).double().float().requires_grad_()
    ids = torch.randint(0, 19, (rows,))
    weight = torch.randn(rows)
    logp, entropy = token_logprobs(logits, ids, temperature=0.7)
    plain = (logits / 0.7).log_softmax(-1)
    want = plain.gather(-1, ids[:, None])[:, 0]
    torch.testing.assert_close(logp, want, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(entropy, -(plain.exp() * plain).sum(-1), atol=1e-5, rtol=1e-5)
    (grad,) = torch.autograd.grad((weight * logp).sum(), logits)
    (want_grad,) = torch.autograd.grad((weight * want).sum(), logits)
    torch.testing.assert_close(grad, want_grad, atol=1e-6, rtol=1e-5)
    assert not entropy.requires_grad


def test_B8_token_logprobs_of_nothing():
    logits = torch.zeros(0, 7, requires_grad=True)
    logp, entropy = token_logprobs(logits, torch.zeros(0, dtype=torch.long))
    logp.sum().backward()
    assert logp.shape == entropy.shape == (0,) and logits.grad.shape == (0, 7)
