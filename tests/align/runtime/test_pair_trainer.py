"""Training on pairs: the losses by hand, shared rows against two rows, the order of rows, TRL's trainer as reference."""

import math

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from trl import RewardConfig, RewardTrainer

from plumbline.align.data.mixture import DomainMixture
from plumbline.align.runtime.launch import trainer_defaults
from plumbline.align.runtime.pair_trainer import (
    LikeLengths,
    PairCollator,
    PairTrainer,
    common_start,
    harm_sign_loss,
    preference_loss,
    shares_rows,
)
from plumbline.policy_models.loading import load_scalar_model, load_tokenizer

PAIRS = [  # ids of chosen and rejected; the first two share a prompt of 3 and 1, the third shares nothing
    ([5, 6, 7, 8, 9, 10], [5, 6, 7, 11]),
    ([5, 9], [5, 8, 7, 6, 5, 4, 3]),
    ([12, 13, 14], [15, 16]),
    ([5, 6, 7], [5, 6, 7, 7]),  # one is the start of the other
]


def rows(**columns):
    base = {"chosen_ids": [list(a) for a, _ in PAIRS], "rejected_ids": [list(b) for _, b in PAIRS]}
    return Dataset.from_dict(base | columns)


def trainer(tmp_path, source="bundled:tiny-moe", cls=PairTrainer, data=None, attention="packed", **options):
    known = {k: v for k, v in options.items() if k in ("label_smoothing", "mixture")}
    config = {k: v for k, v in options.items() if k not in known}
    args = RewardConfig(
        output_dir=str(tmp_path),
        **trainer_defaults()
        | {"bf16": False, "per_device_train_batch_size": 4, "max_steps": 1, "disable_dropout": True}
        | config,
    )
    return cls(
        model=load_scalar_model(source, attn_implementation=attention),
        args=args,
        train_dataset=rows() if data is None else data,
        processing_class=load_tokenizer(source),
        **known,
    )


def test_preference_loss_by_hand():
    gap = torch.tensor([1.0])
    zero = torch.zeros(1)
    s = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    assert preference_loss(gap, zero).item() == pytest.approx(-math.log(s(1.0)), abs=1e-6)
    assert preference_loss(gap, zero, margin_B=0.5).item() == pytest.approx(-math.log(s(0.5)), abs=1e-6)
    soft = -0.7 * math.log(s(1.0)) - 0.3 * math.log(s(-1.0))
    assert preference_loss(gap, zero, p_chosen_B=torch.tensor([0.7])).item() == pytest.approx(soft, abs=1e-6)
    smooth = -0.9 * math.log(s(1.0)) - 0.1 * math.log(s(-1.0))
    assert preference_loss(gap, zero, label_smoothing=0.1).item() == pytest.approx(smooth, abs=1e-6)


def test_a_tie_pulls_scores_together_and_smoothing_leaves_it_a_tie():
    for smoothing in (0.0, 0.2):
        chosen = torch.tensor([2.0], requires_grad=True)
        loss = preference_loss(chosen, torch.zeros(1), p_chosen_B=torch.tensor([0.5]), label_smoothing=smoothing)
        assert torch.autograd.grad(loss, chosen)[0].item() == pytest.approx(1 / (1 + math.exp(-2.0)) - 0.5, abs=1e-6)


def test_harm_sign_loss_counts_labelled_answers_only():
    loss = harm_sign_loss(
        torch.tensor([2.0, 9.0]), torch.tensor([-1.0, 9.0]), torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 0.0])
    )
    want = (math.log1p(math.exp(-2.0)) + math.log1p(math.exp(-1.0))) / 2
    assert loss.item() == pytest.approx(want, abs=1e-6)
    assert harm_sign_loss(torch.ones(1), torch.ones(1), torch.zeros(1), torch.zeros(1)).item() == 0.0


def test_common_start_leaves_a_token_of_each():
    assert [common_start(a, b) for a, b in PAIRS] == [3, 1, 0, 2]


@pytest.mark.parametrize("attention", ["packed", "sdpa"])
@pytest.mark.parametrize("source", ["bundled:tiny-moe", "bundled:tiny-llama"])
def test_shared_rows_score_as_two_rows_do(tmp_path, source, attention):
    run = trainer(tmp_path, source, attention=attention)
    assert run.shared
    pad_id = run.processing_class.pad_token_id
    examples = [{"chosen_ids": a, "rejected_ids": b} for a, b in PAIRS]
    one = run.scores(run.model, PairCollator(pad_id=pad_id, shared=True)(examples))
    run.shared = False
    two = run.scores(run.model, PairCollator(pad_id=pad_id, shared=False)(examples))
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)
    assert len({round(score, 4) for side in one for score in side.tolist()}) == 8


def test_loss_and_gradient_equal_those_of_trl(tmp_path):
    losses, grads = [], []
    margins = rows(margin=[0.0, 0.5, 1.0, 0.25])
    for cls in (PairTrainer, RewardTrainer):
        run = trainer(tmp_path, cls=cls, data=margins, center_rewards_coefficient=0.1)
        run.create_optimizer()
        batch = next(iter(run.get_train_dataloader()))
        loss = run.compute_loss(run.model, batch)
        loss.backward()
        losses.append(loss.item())
        grads.append(torch.cat([p.grad.flatten() for p in run.model.parameters() if p.grad is not None]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-5)


def test_soft_labels_and_smoothing_reach_the_loss(tmp_path):
    plain = trainer(tmp_path, data=rows(p_chosen=[1.0] * 4))
    soft = trainer(tmp_path, data=rows(p_chosen=[0.0] * 4))
    batches = [next(iter(run.get_train_dataloader())) for run in (plain, soft)]
    chosen, rejected = plain.scores(plain.model, batches[0])
    assert plain.compute_loss(plain.model, batches[0]).item() == pytest.approx(
        preference_loss(chosen, rejected).item(), rel=1e-5
    )
    assert soft.compute_loss(soft.model, batches[1]).item() == pytest.approx(
        preference_loss(rejected, chosen).item(), rel=1e-5
    )
    smoothed = trainer(tmp_path, label_smoothing=0.2)
    batch = next(iter(smoothed.get_train_dataloader()))
    want = preference_loss(*smoothed.scores(smoothed.model, batch), label_smoothing=0.2)
    assert smoothed.compute_loss(smoothed.model, batch).item() == pytest.approx(want.item(), rel=1e-6)


def test_sliding_windows_and_unknown_backbones_keep_two_rows():
    model = load_scalar_model("bundled:tiny-llama")
    assert shares_rows(model)
    model.config.sliding_window = 8
    assert not shares_rows(model)
    model.config.sliding_window = None
    for other in ("flash_attention_2", "eager"):  # eager adds its mask to the scores: True would be 1
        model.config._attn_implementation = other
        assert not shares_rows(model)


@given(st.lists(st.integers(1, 500), max_size=300), st.integers(1, 9), st.integers(0, 3))
@settings(max_examples=50, deadline=None)
def test_like_lengths_draws_every_row_once(lengths, batch_size, epoch):
    sampler = LikeLengths(lengths, batch_size, seed=1)
    sampler.set_epoch(epoch)
    order = list(sampler)
    assert sorted(order) == list(range(len(lengths))) and order == list(sampler)


def test_like_lengths_pads_little_and_changes_with_the_epoch():
    lengths = torch.randint(20, 400, (400,)).tolist()
    sampler = LikeLengths(lengths, 8, seed=0)
    first = list(sampler)
    padded = sum(8 * max(lengths[row] for row in first[at : at + 8]) for at in range(0, 400, 8))
    assert padded < 1.1 * sum(lengths)  # in random order: about 1.7 times
    widths = [max(lengths[row] for row in first[at : at + 8]) for at in range(0, 400, 8)]
    assert widths != sorted(widths) and widths != sorted(widths, reverse=True)
    sampler.set_epoch(1)
    assert list(sampler) != first


def test_domains_that_lag_behind_get_more_rows():
    mixture = DomainMixture(["easy"] * 30 + ["hard"] * 10, rate=1.0)
    rng = torch.Generator().manual_seed(0)
    drawn = mixture.draw(40, rng)
    assert mixture.shares == {"easy": 0.75, "hard": 0.25} and len(drawn) == 40  # as in the data: no loss was seen
    domain_B = torch.tensor([0, 0, 1])
    mixture.observe(domain_B, torch.tensor([0.6, 0.8, 0.7]))
    for _ in range(40):  # one falls to 0.2, the other stays
        mixture.observe(domain_B, torch.tensor([0.2, 0.2, 0.7]))
    before = mixture.shares["hard"]
    more = mixture.draw(400, rng)
    assert mixture.shares["hard"] > before and sum(mixture.shares.values()) == pytest.approx(1.0)
    assert sum(row >= 30 for row in more) > 100 and set(more) == set(range(40))
    with pytest.raises(ValueError, match="rate=0"):
        DomainMixture(["a"], rate=0)


def test_training_feeds_the_mixture_and_logs_its_shares(tmp_path):
    mixture = DomainMixture(["a", "a", "b", "b"])
    run = trainer(tmp_path, data=rows(domain=[0.0, 0.0, 1.0, 1.0]), mixture=mixture, max_steps=3, logging_steps=1)
    run.train()
    assert set(mixture.loss) <= {"a", "b"} and mixture.loss
    assert any("mixture/a" in entry for entry in run.state.log_history)
