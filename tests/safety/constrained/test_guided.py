"""SafeDecoding, reference contrast and best-of-n: the maths by hand, the second logits against plain forwards."""

import math

import pytest
import torch

from plumbline.policy_models.rollout.generation import DecodeRow, generate
from plumbline.safety.constrained.best_of import blockwise_best_of_n
from plumbline.safety.constrained.guided import (
    OtherAdapter,
    ReferenceContrast,
    SafeDecoding,
    kl_divergence,
    only_adapter,
    safe_mixture,
)

PROMPTS = [[5, 6, 7, 8, 9, 10], [11, 12], [13], [14, 15, 16]]
OPTIONS = {"max_new_tokens": 8, "stop_ids": [97], "pad_id": 0, "temperature": 0}


def direct(model, adapter, ids):
    with torch.inference_mode(), only_adapter(model, adapter):
        return model(input_ids=torch.tensor([ids])).logits[0, -1]


def test_safe_mixture_by_hand():
    base = torch.tensor([[0.5, 0.3, 0.1, 0.1]]).log()
    expert = torch.tensor([[0.1, 0.3, 0.5, 0.1]]).log()
    # the two tokens that rank highest in both: 1 (ranks 1, 1), then 0 (0, 2) and 2 (2, 0) tie at 2
    mixed = safe_mixture(base, expert, alpha=1.0, common=1).exp()
    torch.testing.assert_close(mixed, torch.tensor([[0.0, 0.3, 0.0, 0.0]]))
    mixed = safe_mixture(base, expert, alpha=2.0, common=3).exp()
    torch.testing.assert_close(mixed, torch.tensor([[0.0, 0.3, 0.9, 0.0]]))  # 0.5 + 2 * (0.1 - 0.5) < 0
    # alpha 3 leaves nothing of token 0 alone: the expert decides
    torch.testing.assert_close(
        safe_mixture(torch.tensor([[0.9, 0.1]]).log(), torch.tensor([[0.5, 0.5]]).log(), alpha=3.0, common=1).exp(),
        torch.tensor([[0.5, 0.0]]),
    )


def test_what_the_base_forbids_stays_forbidden():
    base = torch.tensor([[0.0, -math.inf, 1.0]])
    mixed = safe_mixture(base, torch.tensor([[0.0, 9.0, 0.0]]), alpha=3.0, common=3)
    assert mixed[0, 1] == -math.inf and mixed.max() > -math.inf
    contrast = ReferenceContrast(Fixed(torch.tensor([[0.0, 9.0, 0.0]])), dial=0.5)
    out = contrast([DecodeRow(0, [1], [])], base)
    assert out[0, 1] == -math.inf and out[0, [0, 2]].isfinite().all()


class Fixed:
    def __init__(self, logits):
        self.given = logits

    def logits(self, rows):
        return self.given[: len(rows)]


def test_kl_by_hand():
    p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.25, 0.75]])
    want = 0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75)
    assert kl_divergence(p.log(), q.log()).item() == pytest.approx(want)


@pytest.mark.parametrize("adapter", ["expert", "policy", None])
def test_other_logits_follow_the_rows_of_continuous_batching(adapted, adapter):
    """Every row and step of a run with two rows at a time, against one plain forward each."""
    other, seen = OtherAdapter(adapted, adapter, pad_id=0), []

    def watch(rows, logits):
        seen.extend((row, logit) for row, logit in zip(rows, other.logits(rows), strict=True))
        return logits

    watched = generate(adapted, PROMPTS, **OPTIONS, batch_size=2, processors=[watch])
    assert len(seen) == len(PROMPTS) * 8
    for row, logit in seen:
        torch.testing.assert_close(logit, direct(adapted, adapter, [*row.prompt, *row.answer]), rtol=1e-3, atol=1e-3)
    assert watched == generate(adapted, PROMPTS, **OPTIONS, batch_size=2)  # and the run was not disturbed


def test_only_adapter_puts_everything_back(adapted):
    ids = [5, 6, 7]
    grads = [p.requires_grad for p in adapted.parameters()]
    before, policy = adapted(input_ids=torch.tensor([ids])).logits[0, -1], direct(adapted, "policy", ids)
    assert not torch.equal(policy, direct(adapted, "expert", ids))
    assert not torch.equal(policy, direct(adapted, None, ids))
    with adapted.disable_adapter():
        base = adapted(input_ids=torch.tensor([ids])).logits[0, -1]
        torch.testing.assert_close(direct(adapted, "policy", ids), policy)
        torch.testing.assert_close(adapted(input_ids=torch.tensor([ids])).logits[0, -1], base)
    torch.testing.assert_close(adapted(input_ids=torch.tensor([ids])).logits[0, -1], before)
    assert grads == [p.requires_grad for p in adapted.parameters()]


def test_safe_decoding_touches_the_first_tokens_only(adapted):
    safe = SafeDecoding(OtherAdapter(adapted, "expert", pad_id=0), first_tokens=2)
    answers = generate(adapted, PROMPTS, **OPTIONS, batch_size=3, processors=[safe])
    for row, (prompt, answer) in enumerate(zip(PROMPTS, answers, strict=True)):
        for n in range(2):
            ids = [*prompt, *answer.ids[:n]]
            mixed = safe_mixture(
                direct(adapted, "policy", ids)[None], direct(adapted, "expert", ids)[None], alpha=3.0, common=5
            )
            assert answer.ids[n] == mixed.argmax().item()
        rest = generate(adapted, [[*prompt, *answer.ids[:2]]], **{**OPTIONS, "max_new_tokens": 6})[0]
        assert rest.ids == answer.ids[2:]
        assert len(safe.divergence[row]) == 2 and min(safe.divergence[row]) > 0


def test_no_op_settings_leave_greedy_answers_as_they_are(adapted):
    free = generate(adapted, PROMPTS, **OPTIONS)
    for processor in (
        SafeDecoding(OtherAdapter(adapted, "expert", pad_id=0), alpha=0.0),
        ReferenceContrast(OtherAdapter(adapted, None, pad_id=0), dial=1.0),
    ):
        assert generate(adapted, PROMPTS, **OPTIONS, processors=[processor]) == free


def test_the_dial_goes_from_the_reference_through_the_policy_and_beyond(adapted):
    def run(dial):
        contrast = ReferenceContrast(OtherAdapter(adapted, None, pad_id=0), dial=dial)
        return [a.ids for a in generate(adapted, PROMPTS, **OPTIONS, processors=[contrast])]

    with only_adapter(adapted, None):
        reference = [a.ids for a in generate(adapted, PROMPTS, **OPTIONS)]
    assert run(0.0) == reference
    assert run(1.0) == [a.ids for a in generate(adapted, PROMPTS, **OPTIONS)] != reference
    assert run(3.0) != run(1.0)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda m: OtherAdapter(m, "none", 0), "no adapter 'none'"),
        (lambda m: OtherAdapter(torch.nn.Linear(1, 1), None, 0), "no adapters"),
        (lambda m: SafeDecoding(None, alpha=-1), "alpha"),
        (lambda m: ReferenceContrast(None, dial=math.nan), "dial"),
    ],
)
def test_settings_that_make_no_sense_are_refused(adapted, make, message):
    with pytest.raises(ValueError, match=message):
        make(adapted)


def test_best_of_blocks_takes_the_candidate_with_the_highest_score(tiny):
    model, tokenizer = tiny
    calls = []

    def count_e(prompts, answers):
        calls.append(list(zip(prompts, answers, strict=True)))
        return [None if i % 3 == 0 else float(a.count("e")) for i, a in enumerate(answers)]

    options = {"candidates": 3, "block_tokens": 8, "max_new_tokens": 20, "generator": torch.Generator().manual_seed(0)}
    answers = blockwise_best_of_n(model, tokenizer, ["one", "two"], count_e, **options)
    for answer, prompt in zip(answers, ["one", "two"], strict=True):
        assert answer.finished or len(answer.ids) == 20
        assert answer.text == tokenizer.decode(answer.ids, skip_special_tokens=True)
        for scores in answer.scores:
            assert scores[0] is None and max(s for s in scores[1:] if s is not None) >= 0
        assert (prompt, answer.text) in calls[len(answer.scores) - 1]


def test_best_of_blocks_runs_processors_over_the_whole_answer(tiny):
    model, tokenizer = tiny
    seen = set()

    def watch(rows, logits):
        seen.update(len(row.answer) for row in rows)
        return logits

    blockwise_best_of_n(
        model,
        tokenizer,
        ["one"],
        lambda p, a: [0.0] * len(a),
        candidates=2,
        block_tokens=4,
        max_new_tokens=12,
        processors=[watch],
    )
    assert seen >= {0, 4} and max(seen) <= 11


def test_an_expert_learns_and_can_be_switched(tiny):
    from plumbline.align.safety_expert import DECLINE, expert_prompts, expert_rows, train_expert

    model, tokenizer = tiny
    harmful, harmless = expert_prompts()
    assert len(harmful) == len(harmless) > 100
    rows = expert_rows(model, tokenizer, harmful[:2], harmless[:2])
    assert [prompt for prompt, _ in rows] == [*harmful[:2], *harmless[:2]]
    assert rows[0][1] == rows[1][1] == DECLINE and rows[2][1] != DECLINE
    peft, losses = train_expert(model, tokenizer, rows, steps=12, rows_per_step=4, learning_rate=1e-2)
    assert losses[-1] < losses[0] - 0.1
    expert = OtherAdapter(peft, "expert", tokenizer.pad_token_id)
    row = DecodeRow(0, tokenizer.encode("Hello"), [])
    assert not torch.equal(expert.logits([row]), OtherAdapter(peft, None, 0).logits([row]))
    with pytest.raises(ValueError, match="steps=0"):
        train_expert(model, tokenizer, rows, steps=0)
