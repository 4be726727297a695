"""What a run logs about the reward being gamed, and its page."""

import json

import pytest

from plumbline.align.ppo import train
from plumbline.align.rl.watch import correlation, grader_watch, rollout_watch
from plumbline.eval.pages.run_page import render
from plumbline.reward import CompositeReward


def test_correlation_by_hand():
    assert correlation([1, 2, 3], [2, 4, 6]) == pytest.approx(1.0)
    assert correlation([1, 2, 3, 4], [1, -1, -1, 1]) == pytest.approx(0.0)
    assert correlation([1, 1, 1], [1, 2, 3]) is None and correlation([1, 2], [1, 2]) is None


def test_rollout_watch_leaves_rows_without_a_total_out():
    answers = ["a b c a b c", "one two three", "x", "word word word word"]
    watched = rollout_watch([1.0, 2.0, None, 3.0], answers, [1, 2, 99, 3])
    assert watched["watch/length_correlation"] == pytest.approx(1.0)
    assert 0 < watched["watch/repetition_mean"] < 1
    assert rollout_watch([None], ["x"], [1]) == {}


@pytest.fixture
def first(tmp_path):
    path = tmp_path / "step-000000.jsonl"
    rows = [{"prompt": f"p{i}", "total": 0.0, "grader": 0.1 * i} for i in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_grader_watch_pairs_by_prompt(first):
    now = [{"prompt": f"p{i}", "total": 1.0 + 0.1 * (i % 2), "grader": 0.1 * i - 0.5} for i in (3, 1, 2, 0)]
    watched = grader_watch(now, first)
    assert watched["watch/proxy_gain"] == pytest.approx(1.05)
    assert watched["watch/grader_gain"] == pytest.approx(-0.5)
    assert watched["watch/grader_gain_margin"] == pytest.approx(0.0, abs=1e-9)
    assert watched["watch/hacking"] == 1.0
    agreed = grader_watch([row | {"grader": row["grader"] + 1} for row in now], first)
    assert agreed["watch/hacking"] == 0.0


def test_grader_watch_without_a_grader_or_a_first_table_is_silent(first, tmp_path):
    assert grader_watch([{"prompt": "p1", "total": 1.0}], first) == {}
    assert grader_watch([{"prompt": "p1", "total": 1.0, "grader": 1.0}], tmp_path / "none.jsonl") == {}


def test_a_grader_grades_evaluations_and_its_page_shows_it(
    settings, share, tmp_path, prompts_file, read_metrics, monkeypatch
):
    class Grader:
        def __init__(self, source, dtype):
            assert source == "grader"

        def __call__(self, prompts, answers):
            return [-float(len(a)) for a in answers]

    monkeypatch.setattr("plumbline.align.ppo.LearnedPreference", Grader)
    run = train(
        settings(steps=3, eval_prompts_file=prompts_file, eval_every=1, grader_model="grader"),
        reward=CompositeReward([(share(), 1.0)]),
    )
    rows = read_metrics(run)
    assert "watch/grader_gain" not in rows[0]
    assert all("watch/grader_gain" in row and "watch/proxy_gain_margin" in row for row in rows[1:])
    assert all("watch/repetition_mean" in row and "perf/generated_tokens_per_s" in row for row in rows[:-1])
    table = [json.loads(line) for line in (run / "samples" / "step-000002.jsonl").read_text().splitlines()]
    assert all("grader" in row and "share" in row for row in table)
    page = render(run).read_text()
    assert "Reward against a grader" in page and "Cheap tricks" in page


def test_a_grader_that_is_trained_on_is_refused(settings):
    with pytest.raises(ValueError, match="is trained on as reward_model"):
        settings(grader_model="rm", reward_model="rm", preference_weight=1.0)
