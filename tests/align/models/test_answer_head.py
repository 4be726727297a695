"""The CPU head of the TRL stages: TRL's own numbers and gradients, from the labelled positions alone."""

import pytest
import torch
from trl.trainer.utils import add_fused_lm_head

from plumbline.align.models.answer_head import score_answers_only
from plumbline.policy_models.loading import load_policy

FIELDS = ("loss", "log_probs", "entropy", "mean_logits", "is_top1", "label_mask", "aux_loss")


@pytest.fixture(params=["bundled:tiny-moe", "bundled:tiny-llama"])
def model(request):
    model = load_policy(request.param, dtype=torch.float32)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    return model


def batch(model, *, labelled: bool = True):
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 200, (3, 17), generator=draw)
    labels = ids.clone()
    labels[0, :9], labels[1, :4], labels[2, 6:] = -100, -100, -100
    if not labelled:
        labels[:] = -100
    routed = {"output_router_logits": True} if hasattr(model.config, "num_experts") else {}
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids), **routed}


def outputs_and_gradient(model, inputs):
    model.zero_grad()
    out = model(**inputs, fused_lm_head=True)
    out.loss.backward()
    return out, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("extra", [{}, {"num_items_in_batch": torch.tensor(50)}])
def test_outputs_and_gradients_equal_those_of_trl(model, extra):
    inputs = batch(model) | extra
    theirs, their_gradient = outputs_and_gradient(model, inputs)
    score_answers_only(model)
    ours, our_gradient = outputs_and_gradient(model, inputs)
    for name in FIELDS:
        mine, other = getattr(ours, name), getattr(theirs, name)
        assert (mine is None) == (other is None), name
        if mine is not None:
            torch.testing.assert_close(
                mine.float(), other.float(), rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )
    torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-4, atol=1e-6)


def test_head_reads_labelled_positions_only(model):
    score_answers_only(model)
    rows = []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _m, args: rows.append(args[0].shape[0]))
    inputs = batch(model)
    model(**inputs, fused_lm_head=True)
    hook.remove()
    assert rows == [int((inputs["labels"][:, 1:] != -100).sum())]


def test_a_batch_without_labels_still_has_a_graph(model):
    score_answers_only(model)
    out = model(**batch(model, labelled=False), fused_lm_head=True)
    out.log_probs.sum().backward()
    assert out.log_probs.abs().sum() == 0


def test_plain_forward_and_generation_are_left_alone(model):
    ids = batch(model)["input_ids"]
    before = model(input_ids=ids).logits
    score_answers_only(model)
    torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=0, atol=0)


def test_models_that_change_their_logits_keep_the_head_of_trl(model):
    model.config.logit_scale = 0.5
    trl_forward = model.forward
    score_answers_only(model)
    assert model.forward == trl_forward
