"""benchmarks/real_prompts.py: whoever trains, is trained on or grades has prompts of its own."""

import json

from align.preferences import last_user_text, read_preferences
from benchmarks.real_prompts import SETS, split_prompts


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
