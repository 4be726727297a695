"""The first words of an answer, given or forbidden, against a tiny model and by hand."""

import math

import pytest
import torch

from plumbline.policy_models.loading import load_for_answers
from plumbline.policy_models.rollout.generation import DecodeRow, generate
from plumbline.safety.constrained.openings import Openings


def test_logits_by_hand():
    guide = Openings(begin={0: [2, 1]}, avoid={1: [0, 3]})
    rows = [DecodeRow(0, [9], []), DecodeRow(1, [9], []), DecodeRow(2, [9], [])]
    first = guide(rows, torch.zeros(3, 4))
    ban = -math.inf
    assert first.tolist() == [[ban, ban, 0, ban], [ban, 0, 0, ban], [0, 0, 0, 0]]
    later = guide([DecodeRow(0, [9], [2, 1]), DecodeRow(1, [9], [1])], torch.zeros(2, 4))
    assert later.tolist() == [[0] * 4] * 2  # the opening is said, the first token is past


def test_answers_begin_as_told_whatever_the_place_in_the_batch():
    model = load_for_answers("bundled:tiny-moe", dtype=torch.float32)
    prompts = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
    asked = {"max_new_tokens": 6, "stop_ids": [0], "pad_id": 0, "temperature": 0.0}
    free = generate(model, prompts, **asked)
    guide = Openings(begin={2: [40, 41, 42]}, avoid={0: [free[0].ids[0]]})
    guided = generate(model, prompts, processors=[guide], batch_size=2, **asked)
    assert guided[2].ids[:3] == [40, 41, 42]
    assert guided[0].ids[0] != free[0].ids[0]
    assert guided[1].ids == free[1].ids


@pytest.mark.parametrize(
    "options, message",
    [
        ({"begin": {0: []}}, "row 0 is to begin with no tokens"),
        ({"begin": {3: [1]}, "avoid": {3: [1]}}, "token 1 and to avoid"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Openings(**options)
