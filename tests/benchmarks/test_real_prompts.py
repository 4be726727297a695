"""benchmarks/real_prompts.py: whoever trains, is trained on or grades has prompts of its own."""

import json

import pytest

from benchmarks.bench_constraint import gains
from benchmarks.real_prompts import SETS, split_prompts
from plumbline.align.data.rows import last_user_text, read_preferences


def test_no_prompt_is_in_two_parts(tmp_path):
    for number, name in enumerate(SETS):
        rows = [
            {"prompt": f"question {n} of {name}", "chosen": f"good {n}", "rejected": f"bad {n}"}
            for n in range(number, 200)
        ]
        (tmp_path / name).mkdir()
        (tmp_path / name / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    split_prompts(tmp_path, tmp_path / "out", 1000)

    prompts = {
        part: {json.loads(line)["prompt"] for line in (tmp_path / f"out/{part}.jsonl").read_text().splitlines()}
        for part in ("train", "eval")
    }
    pairs = {
        part: {last_user_text(pair.prompt) for pair in read_preferences(tmp_path / f"out/{part}.jsonl")}
        for part in ("grader", "reward_model")
    }
    assert all(prompts.values()) and all(pairs.values())
    assert pairs["reward_model"] == prompts["train"]  # the learned part may know what the policy trains on
    assert not prompts["train"] & prompts["eval"]
    assert not pairs["grader"] & (prompts["train"] | prompts["eval"])


def test_gains_of_a_constrained_run_by_hand(tmp_path):
    """`all parts` counts the constrained part as well, and a part without an opinion somewhere is left out."""
    (tmp_path / "samples").mkdir()
    rows = {
        "000000": [{"prompt": p, "fluency": 0.0, "safety": 1.0, "preference": None} for p in "abc"],
        "000012": [{"prompt": p, "fluency": 0.5, "safety": 2.0, "preference": 1.0} for p in "abc"],
    }
    for step, table in rows.items():
        (tmp_path / f"samples/step-{step}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    metrics = [
        *({"step": n, "reward/safety_raw_mean": n / 10, "lagrangian/multiplier": 1.0 + n} for n in range(4)),
        {"step": 4, "eval/kl_per_answer": 3.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))

    found = gains(tmp_path)

    assert {name: gain["mean"] for name, gain in found["gain"].items()} == {
        "all parts": 1.5, "fluency": 0.5, "safety": 1.0,
    }  # fmt: skip
    assert found["prompts"] == 3 and found["kl_per_answer"] == 3.0
    assert found["safety_raw_last_steps"] == pytest.approx(0.2) and found["multiplier"] == [1.0, 2.0, 3.0, 4.0]
