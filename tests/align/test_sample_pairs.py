"""Pairs from a model's own answers: the best and the worst by the reward, and a run as a user would start it."""

import json
import math

import pytest

from plumbline.align.data.rows import read_preferences
from plumbline.align.sample_pairs import Candidate, PairSettings, openings_of, pairs_of, sample_pairs
from plumbline.reward import CompositeReward, Scaling


class Length:
    """Longer is better; no opinion on an answer with an exclamation mark."""

    name = "length"

    def __call__(self, prompts, answers):
        return [None if "!" in answer else float(len(answer)) for answer in answers]


def settings(**changes):
    return PairSettings(**{"rollouts_per_step": 4, "minibatches": 1, "answers_per_prompt": 2, **changes})


def candidates(*rows):
    return [Candidate(text=text, declines=declines, total=total, made=made) for text, declines, total, made in rows]


def test_a_decline_beats_compliance_where_harm_was_asked_for_and_the_drawn_come_before_the_made():
    have = candidates(
        ("no, kindly", True, 1.0, False),
        ("no", True, 0.0, False),
        ("sure", False, 5.0, False),
        ("ok", False, 9.0, True),
    )
    behaviour, quality = pairs_of(have, "harmful", settings(min_margin=0.5))
    assert (behaviour["chosen"], behaviour["rejected"], behaviour["made"]) == ("no, kindly", "sure", False)
    assert behaviour["margin"] == 0.0  # the reward would have it the other way round
    assert (quality["chosen"], quality["rejected"], quality["margin"]) == ("no, kindly", "no", 1.0)


def test_an_answer_beats_a_decline_on_a_twin():
    have = candidates(("here", False, 1.0, False), ("no", True, 4.0, True), ("there", False, 1.2, False))
    (pair,) = pairs_of(have, "twin", settings(min_margin=0.5))
    assert (pair["chosen"], pair["rejected"], pair["by"], pair["made"]) == ("there", "no", "behaviour", True)


def test_a_prompt_without_a_kind_gets_the_best_over_the_worst_of_all():
    have = candidates(("one", True, 1.0, False), ("two", False, 3.0, False), (" ", False, -9.0, False))
    have += candidates(("three", False, None, False))
    (pair,) = pairs_of(have, None, settings(min_margin=0.5))
    assert (pair["chosen"], pair["rejected"], pair["by"]) == (
        "two",
        "one",
        "quality",
    )  # blank and unscored take no part


@pytest.mark.parametrize(
    "rows",
    [
        [("x", False, 1.0, False), ("y", False, 1.4, False)],
        [("x", False, 1.0, False), ("x ", False, 9.0, False)],
        [("x", False, None, False), ("y", False, 1.0, False)],
        [("", False, 0.0, False), ("y", False, 9.0, False)],
    ],
    ids=["too near", "the same text", "one without a reward", "one blank"],
)
def test_no_pair_without_a_difference(rows):
    assert pairs_of(candidates(*rows), "ordinary", settings(min_margin=0.5)) == []


def test_openings_are_first_sentences():
    assert openings_of(["No. Sorry.", "No. Never!", "Well then", "Hm! No."]) == {"No.": 2, "Hm!": 1}


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


def test_missing_behaviour_is_made_by_the_opening_and_counted(tmp_path):
    """A judge that calls an answer with an even number of letters a decline stands for the refusal head."""
    rows = [{"prompt": f"Say {n}", "kind": ("harmful", "twin")[n % 2]} for n in range(8)]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    run = sample_pairs(
        settings(
            prompts_file=str(file), pair_prompts=8, prompt_shares="harmful=0.5,twin=0.5", max_new_tokens=8,
            output_dir=str(tmp_path / "run"), dtype="float32", min_margin=0.0,
        ),
        reward=CompositeReward([(Length(), 1.0)]),
        declined=lambda _, answers: [float(len(answer) % 2 == 0) for answer in answers],
    )  # fmt: skip
    report = json.loads((run / "report.json").read_text())
    pairs = [json.loads(line) for line in (run / "pairs.jsonl").read_text().splitlines()]
    assert report["prompts"] == 8 and sum(
        sum(n[by] for by in ("behaviour", "quality")) for n in report["pairs"].values()
    ) == len(pairs)
    for pair in pairs:
        if pair["by"] == "behaviour":
            right = 0 if pair["kind"] == "harmful" else 1
            assert len(pair["chosen"]) % 2 == right != len(pair["rejected"]) % 2


def test_shares_name_kinds_that_the_file_has(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "Hi", "kind": "ordinary"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="no prompt of kind 'twin'; its rows say ordinary"):
        sample_pairs(settings(prompts_file=str(file), prompt_shares="twin=1", output_dir=str(tmp_path / "run")))
