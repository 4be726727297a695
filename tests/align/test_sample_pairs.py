"""Pairs from a model's own answers: the best and the worst by the reward, and a run as a user would start it."""

import json
import math

import pytest

from plumbline.align.data.rows import read_preferences
from plumbline.align.sample_pairs import PairSettings, best_and_worst, sample_pairs
from plumbline.reward import CompositeReward, Scaling


class Length:
    """Longer is better; no opinion on an answer with an exclamation mark."""

    name = "length"

    def __call__(self, prompts, answers):
        return [None if "!" in answer else float(len(answer)) for answer in answers]


def settings(**changes):
    return PairSettings(**{"rollouts_per_step": 4, "minibatches": 1, "answers_per_prompt": 2, **changes})


def prompts(*texts):
    return [[{"role": "user", "content": text}] for text in texts]


def test_best_and_worst_of_each_prompt_by_hand():
    rows = best_and_worst(
        prompts("a", "a", "a", "a", "b", "b", "b", "b"),
        ["one", "two", "three", "four", "five", "six", " ", "eight"],
        [1.0, 3.0, None, 0.0, 2.0, 2.25, -9.0, 2.5],
        settings(answers_per_prompt=4, min_margin=0.5),
    )
    assert [(r["prompt"][0]["content"], r["chosen"], r["rejected"], r["margin"]) for r in rows] == [
        ("a", "two", "four", 3.0),
        ("b", "eight", "five", 0.5),  # the blank answer, which is worst, takes no part
    ]


@pytest.mark.parametrize(
    "answers, totals",
    [(["x", "y"], [1.0, 1.4]), (["x", "x "], [1.0, 9.0]), (["x", "y"], [None, 1.0]), (["", "y"], [0.0, 1.0])],
    ids=["too near", "the same text", "one without a reward", "one blank"],
)
def test_no_pair_without_a_difference(answers, totals):
    assert best_and_worst(prompts("a", "a"), answers, totals, settings(min_margin=0.5)) == []


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"answers_per_prompt": 1}, "answers_per_prompt=1: must be at least 2"),
        ({"pair_prompts": 0}, "pair_prompts=0: must be at least 1"),
        ({"min_margin": -1.0}, "min_margin=-1.0: must be at least 0"),
        ({"min_margin": math.nan}, "min_margin=nan: must be at least 0"),
    ],
)
def test_settings_that_make_no_pairs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        settings(**changes)


def test_a_run_leaves_pairs_that_the_stages_read_and_a_scaling(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"Say {n}"}) + "\n" for n in range(5)), encoding="utf-8")
    options = {"prompts_file": str(file), "pair_prompts": 4, "max_new_tokens": 8, "min_margin": 0.0, "dtype": "float32"}
    runs = [
        sample_pairs(settings(output_dir=str(tmp_path / name), **options), reward=CompositeReward([(Length(), 1.0)]))
        for name in ("one", "two")
    ]
    pairs = read_preferences(runs[0] / "pairs.jsonl")
    assert pairs and all(len(p.chosen[0]["content"]) >= len(p.rejected[0]["content"]) for p in pairs)
    assert len({p.prompt[0]["content"] for p in pairs}) == len(pairs) <= 4
    assert Scaling.load(runs[0] / "scaling.json").count["length"] > 4
    assert (runs[0] / "pairs.jsonl").read_bytes() == (runs[1] / "pairs.jsonl").read_bytes()


def test_a_reward_that_sees_no_difference_is_an_error(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "Say"}\n', encoding="utf-8")
    options = {"prompts_file": str(file), "output_dir": str(tmp_path / "run"), "min_margin": 1e9, "max_new_tokens": 4}
    with pytest.raises(ValueError, match="no prompt has two answers whose rewards differ by min_margin"):
        sample_pairs(settings(dtype="float32", **options), reward=CompositeReward([(Length(), 1.0)]))
