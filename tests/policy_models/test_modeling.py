import math

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from plumbline.policy_models import MoEPolicyForCausalLM, MoEPolicyForSequenceClassification, MoEPolicyModel
from plumbline.policy_models.balance import load_balancing_loss, router_z_loss
from plumbline.policy_models.experts import DEFAULT_EXPERTS

IDS = torch.randint(3, 97, (3, 11), generator=torch.Generator().manual_seed(5))


def logits_of(model, ids=IDS, **kwargs):
    with torch.no_grad():
        return model(ids, **kwargs).logits


# back ends


def test_the_default_back_end_is_ours_and_can_be_switched(policy):
    model = policy()
    assert model.config._experts_implementation == DEFAULT_EXPERTS
    want = logits_of(model)
    for name in ("eager", "grouped_mm"):
        model.set_experts_implementation(name)
        assert model.config._experts_implementation == name
        torch.testing.assert_close(logits_of(model), want, atol=1e-6, rtol=1e-6)


def test_attention_back_ends_agree(policy):
    model = policy(attention_bias=True, qk_norm=True)
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    kept = mask.bool()
    want = logits_of(model, attention_mask=mask)[kept]
    model.set_attn_implementation("eager")
    torch.testing.assert_close(logits_of(model, attention_mask=mask)[kept], want, atol=1e-5, rtol=1e-5)


# saving


def test_saved_and_loaded_to_the_bit(policy, tmp_path):
    model = policy()
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        keys = set(file.keys())
    # one tensor an expert, as other readers of Mixture-of-Experts checkpoints want them
    assert {"model.layers.0.mlp.gate.weight", "model.layers.2.mlp.experts.3.up_proj.weight"} <= keys
    assert not any("gate_up_proj" in key for key in keys)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(again, MoEPolicyForCausalLM) and again.config._experts_implementation == DEFAULT_EXPERTS
    weights = again.state_dict()
    assert all(torch.equal(value, weights.pop(name)) for name, value in model.state_dict().items()) and not weights
    assert torch.equal(logits_of(again), logits_of(model))
    assert torch.equal(
        again.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=6, do_sample=False),
        model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=6, do_sample=False),
    )
    assert isinstance(AutoModel.from_pretrained(tmp_path), MoEPolicyModel)
    scorer = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1)
    assert isinstance(scorer, MoEPolicyForSequenceClassification)
    assert torch.equal(scorer.model.layers[2].mlp.experts.down_proj, model.model.layers[2].mlp.experts.down_proj)


def test_from_pretrained_takes_the_back_end(policy, tmp_path):
    policy().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager")
    assert loaded.config._experts_implementation == "eager"


def test_rotary_frequencies_stay_fp32(policy, tmp_path):
    model = policy()
    want = model.model.rotary_emb.inv_freq.clone()
    model.to(torch.bfloat16)
    assert model.dtype == torch.bfloat16 and torch.equal(model.model.rotary_emb.inv_freq, want)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(loaded.model.rotary_emb.inv_freq, want)
    assert torch.equal(logits_of(loaded), logits_of(model))


# padding, positions, cache


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_never_matters(policy, side):
    model = policy()
    want = logits_of(model, IDS[:1])
    pads = torch.zeros(1, 4, dtype=torch.long)
    mask = torch.ones(1, 15, dtype=torch.long)
    if side == "left":
        ids, kept, mask[:, :4] = torch.cat((pads, IDS[:1]), 1), slice(4, None), 0
    else:
        ids, kept, mask[:, 11:] = torch.cat((IDS[:1], pads), 1), slice(0, 11), 0
    batch = torch.cat((ids, IDS[1:2, :1].expand(1, 15)))  # a second row, so that rows share the experts' GEMMs
    masks = torch.cat((mask, torch.ones_like(mask)))
    got = logits_of(model, batch, attention_mask=masks)[:1, kept]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_positions_follow_the_mask_or_are_given(policy):
    model = policy()
    mask = torch.ones_like(IDS)
    mask[:, :3] = 0
    given = (mask.cumsum(-1) - mask).clamp_min(0)
    derived = logits_of(model, attention_mask=mask)
    assert torch.equal(logits_of(model, attention_mask=mask, position_ids=given), derived)
    shifted = logits_of(model, attention_mask=mask, position_ids=given * 2)
    assert not torch.allclose(shifted[:, 3:], derived[:, 3:])


def test_packed_sequences_do_not_see_each_other(policy):
    model = policy()
    packed = IDS[:2].reshape(1, -1)
    positions = torch.arange(11).repeat(2)[None]
    got = logits_of(model, packed, position_ids=positions).view(2, 11, -1)
    torch.testing.assert_close(got, logits_of(model, IDS[:2]), atol=1e-5, rtol=1e-5)


def test_cache_gives_the_same_logits(policy):
    model = policy()
    mask = torch.ones_like(IDS)
    mask[1, :5] = 0
    want = logits_of(model, attention_mask=mask)
    with torch.no_grad():
        first = model(IDS[:, :6], attention_mask=mask[:, :6], use_cache=True)
        rest = model(IDS[:, 6:], attention_mask=mask, past_key_values=first.past_key_values)
    got = torch.cat((first.logits, rest.logits), 1)
    torch.testing.assert_close(got[mask.bool()], want[mask.bool()], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("use_cache", [True, False])
def test_generate_left_padded_equals_one_by_one(policy, use_cache):
    model = policy()
    mask = torch.ones_like(IDS)
    mask[0, :4], mask[2, :7] = 0, 0
    options = {"max_new_tokens": 8, "do_sample": False, "use_cache": use_cache, "eos_token_id": None}
    together = model.generate(IDS * mask, attention_mask=mask, **options)[:, 11:]
    for row, keep in enumerate(mask.bool()):
        ids = IDS[row : row + 1, keep]
        alone = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[:, ids.shape[1] :]
        assert torch.equal(alone[0], together[row])


def test_logits_to_keep(policy):
    model = policy()
    full = logits_of(model)
    keep = torch.zeros_like(IDS, dtype=torch.bool)
    keep[0, 3], keep[2, 7:] = True, True
    rows = torch.tensor([[0, 10], [2, 3], [5, 5]])
    for wanted, want in [
        (2, full[:, -2:]),
        (torch.tensor([1, 4]), full[:, [1, 4]]),
        (rows, torch.take_along_dim(full, rows[..., None], 1)),
        (keep, full[keep]),
    ]:
        torch.testing.assert_close(logits_of(model, logits_to_keep=wanted), want, atol=1e-6, rtol=1e-6)
    with pytest.raises(ValueError, match="labels need logits at every position"):
        model(IDS, labels=IDS, logits_to_keep=2)


# losses


def test_loss_is_cross_entropy_plus_the_auxiliary_loss(policy):
    model = policy(router_aux_loss_coef=0.1, router_z_loss_coef=0.03)
    labels = IDS.clone()
    labels[:, :4] = -100
    plain = model(IDS, labels=labels)
    want = F.cross_entropy(plain.logits[:, 3:-1].flatten(0, 1), labels[:, 4:].flatten())
    torch.testing.assert_close(plain.loss, want)
    assert plain.aux_loss is None and plain.router_logits is None

    with_aux = model(IDS, labels=labels, output_router_logits=True)
    logits = with_aux.router_logits
    assert [tuple(layer.shape) for layer in logits] == [(33, 4), (33, 4)]
    chosen = [layer.topk(2).indices for layer in logits]
    charge = 0.1 * load_balancing_loss(logits, chosen) + 0.03 * router_z_loss(logits)
    torch.testing.assert_close(with_aux.loss, want + charge)
    torch.testing.assert_close(0.1 * with_aux.aux_loss, charge)  # what TRL's trainers add by themselves
    assert model(IDS, output_router_logits=True).loss is None


def test_auxiliary_loss_leaves_padding_out(policy):
    model = policy(router_z_loss_coef=0.0)
    want = model(IDS[:1], output_router_logits=True).aux_loss
    ids = torch.cat((IDS[:1], torch.zeros(1, 30, dtype=torch.long)), 1)
    mask = (torch.arange(41) < 11).long()[None]
    torch.testing.assert_close(model(ids, attention_mask=mask, output_router_logits=True).aux_loss, want)
    assert not torch.allclose(model(ids, output_router_logits=True).aux_loss, want)


def test_micro_batches_add_up_to_the_batch(policy):
    """With `num_items_in_batch`, gradient accumulation charges the auxiliary loss once, not once a micro-batch."""
    model = policy(router_aux_loss_coef=0.5, output_router_logits=True)
    labels = IDS.clone()
    labels[0, :8] = -100
    num_items = (labels[:, 1:] != -100).sum()
    losses = [model(IDS[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=num_items) for i in range(3)]
    share = [(labels[i, 1:] != -100).sum() / num_items for i in range(3)]
    no_aux = [model(IDS[i : i + 1], labels=labels[i : i + 1], output_router_logits=False) for i in range(3)]
    want = sum(s * (p.loss + 0.5 * a.aux_loss) for s, p, a in zip(share, no_aux, losses, strict=True))
    torch.testing.assert_close(sum(out.loss for out in losses), want)


def test_gradient_reaches_every_weight(policy):
    model = policy()
    model(IDS, labels=IDS, output_router_logits=True).loss.backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert idle == []


def test_gradient_checkpointing_changes_nothing(policy):
    grads = []
    for checkpointing in (False, True):
        model = policy().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(IDS, labels=IDS, output_router_logits=True).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, atol=1e-7, rtol=1e-6, msg=name)


def test_reentrant_checkpointing_is_refused_where_it_would_drop_the_router_losses(policy):
    model = policy().train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    model(IDS, labels=IDS).loss.backward()
    with pytest.raises(ValueError, match="use_reentrant"):
        model(IDS, labels=IDS, output_router_logits=True)
    with torch.no_grad():
        assert model.eval()(IDS, output_router_logits=True).aux_loss > 0


def test_bf16_autocast_trains_from_fp32_weights(policy):
    model = policy().train()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(IDS, labels=IDS, output_router_logits=True)
    assert out.router_logits[0].dtype == torch.float32
    out.loss.backward()
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


# scalar head


@pytest.fixture
def scorer(config):
    torch.manual_seed(0)
    return MoEPolicyForSequenceClassification(config(num_labels=1)).eval()


def test_score_reads_the_last_kept_token(scorer):
    with torch.no_grad():
        want = scorer(IDS[:1]).logits
        hidden = scorer.model(IDS[:1]).last_hidden_state
        torch.testing.assert_close(want, F.linear(hidden[:, -1], scorer.score.weight))
        pads = torch.zeros(1, 4, dtype=torch.long)
        for ids in (torch.cat((pads, IDS[:1]), 1), torch.cat((IDS[:1], pads), 1)):
            masked = scorer(ids, attention_mask=(ids != 0).long()).logits
            torch.testing.assert_close(masked, want, atol=1e-5, rtol=1e-5)
        # the mask, not the pad id, says what is kept: a pad token inside the text is text
        ids = torch.cat((IDS[:1], pads[:, :1]), 1)
        asked = scorer(ids, attention_mask=torch.ones_like(ids)).logits
        torch.testing.assert_close(asked, F.linear(scorer.model(ids).last_hidden_state[:, -1], scorer.score.weight))
        # without a mask, trailing pads are told by their id
        torch.testing.assert_close(scorer(torch.cat((IDS[:1], pads), 1)).logits, want, atol=1e-5, rtol=1e-5)


def test_a_row_without_tokens_scores_nan(scorer):
    mask = torch.ones_like(IDS)
    mask[1] = 0
    with torch.no_grad():
        scores = scorer(IDS, attention_mask=mask).logits
    assert scores[:, 0].isnan().tolist() == [False, True, False]


def test_score_is_fp32_with_bf16_weights(scorer):
    scorer.to(torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        scores = scorer(IDS).logits
    assert scores.dtype == torch.float32 and not torch.equal(scores, scores.bfloat16().float())


def test_new_head_is_drawn_as_promised(config):
    head = MoEPolicyForSequenceClassification(config(hidden_size=1024, num_labels=8)).score.weight
    assert head.std().item() == pytest.approx(1 / math.sqrt(1025), rel=0.05) and abs(head.mean().item()) < 2e-3


def test_scorer_returns_auxiliary_loss(scorer):
    out = scorer(IDS, output_router_logits=True)
    assert len(out.router_logits) == 2 and out.aux_loss > 0


# what callers get wrong


def test_exactly_one_input(policy):
    with pytest.raises(ValueError, match="exactly one"):
        policy()()
    model = policy()
    embeds = model.get_input_embeddings()(IDS)
    with pytest.raises(ValueError, match="exactly one"):
        model(IDS, inputs_embeds=embeds)
    torch.testing.assert_close(logits_of(model, None, inputs_embeds=embeds), logits_of(model))


def test_resized_embeddings_keep_the_old_logits_and_stay_tied(policy):
    model = policy()
    want = logits_of(model)
    model.resize_token_embeddings(105)
    got = logits_of(model)
    assert got.shape[-1] == model.config.vocab_size == 105
    torch.testing.assert_close(got[..., :97], want)
    assert model.lm_head.weight is model.model.embed_tokens.weight
