"""Processors in our engine and under transformers: identity, independent rows, left padding, several stop ids, beams."""

import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LogitsProcessorList

from plumbline.policy_models.rollout.generation import DecodeRow, generate
from plumbline.policy_models.rollout.streaming import stream
from plumbline.safety.constrained.rows import ForTransformers, StateByRow, continued, token_bytes

NEVER = [97]
PROMPTS = [[5, 6, 7, 8, 9, 10], [11, 12], [13], [14, 15, 16], [17, 18, 19, 20]]
OPTIONS = {"max_new_tokens": 12, "stop_ids": NEVER, "pad_id": 0}


def nothing(rows, logits):
    return logits


def odd_after_even(rows, logits):
    """A rule that depends on the answer: tokens of the parity of its length are forbidden."""
    logits = logits.clone()
    for at, row in enumerate(rows):
        logits[at, len(row.answer) % 2 :: 2] = -math.inf
    return logits


def slow_model():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3)
    return GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_processor_that_does_nothing_changes_no_bit(plain, temperature):
    for model in (plain, slow_model()):
        plain_answers, processed = (
            generate(
                model,
                PROMPTS,
                **OPTIONS,
                temperature=temperature,
                batch_size=3,
                generator=torch.Generator().manual_seed(1),
                processors=processors,
            )
            for processors in ((), [nothing])
        )
        assert plain_answers == processed


def test_rows_come_and_go_without_touching_each_other(plain):
    together = generate(plain, PROMPTS, **OPTIONS, temperature=0, batch_size=2, processors=[odd_after_even])
    for prompt, answer in zip(PROMPTS, together, strict=True):
        alone = generate(plain, [prompt], **OPTIONS, temperature=0, processors=[odd_after_even])[0]
        assert alone.ids == answer.ids and all(
            token % 2 == (at + 1) % 2 for at, token in enumerate(answer.ids)
        )  # fmt: skip


def test_the_rows_that_a_processor_sees(plain):
    seen = []

    def watch(rows, logits):
        seen.extend((row.row, tuple(row.prompt), tuple(row.answer)) for row in rows)
        return logits

    answers = generate(plain, PROMPTS, **OPTIONS, temperature=0, batch_size=2, processors=[watch])
    want = [
        (i, tuple(p), tuple(a.ids[:n]))
        for i, (p, a) in enumerate(zip(PROMPTS, answers, strict=True))
        for n in range(12)
    ]
    assert sorted(seen) == sorted(want)


def test_log_probabilities_are_those_of_the_changed_distribution(plain):
    only = lambda rows, logits: torch.full_like(logits, -math.inf).index_fill(1, torch.tensor([42]), 0.0)  # noqa: E731
    answer = generate(plain, [[5, 6]], **OPTIONS, temperature=1.0, processors=[only])[0]
    assert answer.ids == [42] * 12 and answer.logp == [0.0] * 12


def test_no_token_left_is_an_error(plain):
    with pytest.raises(RuntimeError, match="prompt 0 no token"):
        generate(plain, [[5]], **OPTIONS, processors=[lambda rows, logits: logits.fill_(-math.inf)])


def transformers_answers(model, processors, stop=(), **options):
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in PROMPTS])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in PROMPTS])
    beams = options.get("num_beams", 1)
    wrapped = LogitsProcessorList([ForTransformers(processors, mask, stop, rows_per_prompt=beams)])
    out = model.generate(
        ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=12,
        logits_processor=wrapped,
        eos_token_id=list(stop) or None,
        pad_token_id=0,
        **options,
    )
    return out[:, width:].tolist()


def test_the_same_tokens_in_our_engine_and_under_transformers(plain):
    ours = generate(plain, PROMPTS, **OPTIONS, temperature=0, processors=[odd_after_even])
    assert transformers_answers(plain, [odd_after_even]) == [answer.ids for answer in ours]
    assert transformers_answers(plain, [nothing]) == transformers_answers(plain, [])


def test_several_stop_ids_end_rows_at_different_times(plain):
    free = [answer.ids for answer in generate(plain, PROMPTS, **OPTIONS, temperature=0)]
    stop = sorted({free[0][2], free[1][5]})
    ours = generate(plain, PROMPTS, **{**OPTIONS, "stop_ids": stop}, temperature=0, processors=[nothing])
    seen = []

    def watch(rows, logits):
        seen.extend(row.answer for row in rows)
        return logits

    theirs = transformers_answers(plain, [watch], stop)
    assert [ids[: len(a.ids)] for ids, a in zip(theirs, ours, strict=True)] == [a.ids for a in ours]
    assert any(a.finished for a in ours) and not any(set(stop) & set(answer) for answer in seen)


def test_beams_are_followed_through_their_reordering(plain):
    for ids in transformers_answers(plain, [odd_after_even], num_beams=3):
        assert all(token % 2 == (at + 1) % 2 for at, token in enumerate(ids))


def test_another_number_of_rows_is_refused(plain):
    wrapped = ForTransformers([nothing], torch.ones(2, 3), [])
    with pytest.raises(ValueError, match="rows_per_prompt=1"):
        wrapped(torch.ones(4, 3, dtype=torch.long), torch.zeros(4, 97))


def test_state_by_row_is_the_state_of_the_answer_whatever_came_before():
    states = StateByRow(tuple, lambda state, token: (*state, token))
    for answer in ([], [1], [1, 2, 3], [1, 2], [7], [7, 8]):
        assert states.at(DecodeRow(0, [], answer)) == tuple(answer)


def test_continued_moves_what_was_given_from_the_prompt_to_the_answer():
    seen = []
    continued(lambda rows, logits: seen.extend(rows) or logits, [2, 0])(
        [DecodeRow(0, [1, 2, 3], [4]), DecodeRow(1, [5], [])], torch.zeros(2, 4)
    )
    assert seen == [DecodeRow(0, [1], [2, 3, 4]), DecodeRow(1, [5], [])]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_stream_is_what_generate_draws(plain, temperature):
    for model in (plain, slow_model()):
        options = {"temperature": temperature, "processors": [odd_after_even], "max_new_tokens": 12}
        want = generate(
            model, [[5, 6, 7]], stop_ids=[41, 43], pad_id=0, generator=torch.Generator().manual_seed(0), **options
        )[0]
        model.train()
        got = list(stream(model, [5, 6, 7], stop_ids=[41, 43], generator=torch.Generator().manual_seed(0), **options))
        assert got == [token for token in want.ids if token not in (41, 43)]
        assert model.training


def test_token_bytes_spell_what_decode_gives(tiny):
    _, tokenizer = tiny
    table = token_bytes(tokenizer)
    for text in ("Hello, world! 12\n", "na\u00efve \u7206 \U0001f600", "  two  spaces"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert b"".join(table[id_] for id_ in ids).decode() == text
    assert all(table[id_] == b"" for id_ in tokenizer.all_special_ids)
