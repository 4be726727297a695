"""eval-reward and the reward commands, as a user runs them, on a handful of pairs and without the language model."""

import json
from importlib.metadata import PackageNotFoundError, distribution

import numpy as np
import pytest

from plumbline.align.data.rows import split_pairs
from plumbline.apps.commands import eval_reward
from plumbline.apps.commands import reward as reward_tools
from plumbline.safety.embedder.embedding import WHEELS


def _wheels_present():
    try:
        return all(distribution(name) for name in WHEELS)
    except PackageNotFoundError:
        return False


pytestmark = pytest.mark.skipif(not _wheels_present(), reason=f"wheels {list(WHEELS)} are not installed")


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory):
    """12 prompts; the chosen answer is about the prompt, the rejected one is the answer to another."""
    topics = "tea bread rain chess yoga moss kites soap clay jam ferns owls".split()
    rows = []
    for n, topic in enumerate(topics):
        other = topics[(n + 5) % len(topics)]
        rows.append(
            {
                "prompt": f"Tell me one thing about {topic}.",
                "chosen": f"{topic.capitalize()} has been known to people for thousands of years.",
                "rejected": f"I have read much about {other} in books, and {other} is what I like.",
            }
        )
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def evaluate(folder, *flags):
    """The last line of eval-reward without the language model, and its report."""
    eval_reward.main([*flags, "--fluency", "false", "--dtype", "float32", "--output_dir", str(folder)])
    return json.loads((folder / "report.json").read_text())


def test_eval_reward_makes_the_table_for_any_pairs(pairs_file, tmp_path, capsys):
    flags = ["--data", str(pairs_file), "--model", "bundled:tiny-moe", "--group", "pair"]
    report = evaluate(tmp_path, *flags)
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    assert set(result["scorers"]) == {"length", "embedding + linear", "composite", "reward model"}
    assert all(one["accuracy"]["n"] == 12 for one in result["scorers"].values())
    assert result["scorers"]["composite"]["accuracy"]["mean"] > 0.8
    assert result["scorers"]["length"]["group"]["n"] == 12
    assert result["differences"]["reward model less length, pair"]["pairs"] == 12
    assert report["fitted_on"] == 0 and (tmp_path / "report.png").stat().st_size > 1000
    assert "| % of pairs ranked right | pairs | length |" in out and "| at equal lengths | 12 |" in out


def test_eval_reward_measures_the_prompts_that_training_held_out(pairs_file, tmp_path):
    held_out = split_pairs(eval_reward.read_pairs(pairs_file)[0], 2)[1]
    report = evaluate(tmp_path, "--data", str(pairs_file), "--holdout_every", "2", "--composite", "false")
    assert report["pairs"] == len(held_out) and report["fitted_on"] == 12 - len(held_out)


def test_prompts_that_were_fitted_on_are_left_out(pairs_file, tmp_path):
    train = tmp_path / "train.jsonl"
    train.write_text("\n".join(pairs_file.read_text().splitlines()[:6]))
    report = evaluate(tmp_path, "--data", str(pairs_file), "--train_file", str(train))
    assert (report["pairs"], report["fitted_on"], report["leaked"]) == (6, 6, 6)


def test_eval_reward_takes_several_models_and_few_pairs_a_prompt(pairs_file, tmp_path):
    settings = eval_reward.EvalRewardSettings(data="x", model="runs/a/model,runs/b")
    assert settings.models == {"reward model a": "runs/a/model", "reward model b": "runs/b"}
    pairs = eval_reward.read_pairs(pairs_file)[0]
    assert eval_reward.first_of_prompt([*pairs, *pairs, *pairs], 2) == [*pairs, *pairs]
    assert eval_reward.first_of_prompt(pairs, None) == pairs
    first = pairs[0]
    long = max(len(first.chosen[0]["content"]), len(first.rejected[0]["content"]))
    assert eval_reward.chars(first) == len(first.prompt[0]["content"]) + long


def test_eval_reward_stops_before_models_load(pairs_file, tmp_path, monkeypatch):
    monkeypatch.setattr(eval_reward, "default_composite", lambda **_: pytest.fail("a model was loaded"))
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join(pairs_file.read_text().splitlines()[:3]))
    with pytest.raises(ValueError, match="3 different prompts for 5 folds"):
        eval_reward.main(["--data", str(few)])
    with pytest.raises(ValueError, match="--data is missing"):
        eval_reward.main([])
    with pytest.raises(ValueError, match="no such file"):
        eval_reward.main(["--data", str(tmp_path / "nowhere.jsonl")])
    for flags, why in (
        (["--holdout_every", "1"], "holdout_every=1"),
        (["--holdout_every", "2", "--train_file", "x"], "both say what to fit on"),
        (["--per_prompt", "0"], "per_prompt=0"),
    ):
        with pytest.raises(ValueError, match=why):
            eval_reward.main(["--data", str(few), *flags])


def test_samples_are_whole_prompts_and_the_same_each_time():
    pairs = eval_reward.read_pairs(eval_reward.Path(reward_tools.STARTER / "preferences.jsonl"))[0]
    sample = eval_reward.sample_by_prompt(pairs, 50)
    assert len(sample) == 50 and sample == eval_reward.sample_by_prompt(pairs, 50)
    assert eval_reward.sample_by_prompt(pairs, None) == pairs


def test_tune_writes_weights_that_explain_reads(pairs_file, tmp_path, capsys):
    weights = tmp_path / "w.json"
    reward_tools.main(["tune", "--data", str(pairs_file), "--output", str(weights), "--fluency", "false"])
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["weights"]["relevance"] > 0 >= said["weights"]["toxicity"]
    flags = [
        "--prompt",
        "Why is the sky blue?",
        "--answer",
        "Air scatters blue light more than red.",
        "--answer2",
        "Because.",
    ]
    reward_tools.main(["explain", *flags, "--weights", str(weights), "--fluency", "false"])
    out = capsys.readouterr().out
    first, second = json.loads(out.splitlines()[-1])["total"]
    assert first > second and "relevance" in out and "fluency" not in out


@pytest.mark.parametrize(
    ("flags", "missing"),
    [
        (["--answer", "a"], "--prompt"),
        (["--prompt", "p"], "--answer"),
        (["--prompt", "p", "--answer2", "b"], "--answer"),
    ],
)
def test_explain_asks_for_what_is_missing_before_a_model_loads(flags, missing, monkeypatch):
    monkeypatch.setattr(reward_tools.CompositeSettings, "build", lambda _self: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match=f"{missing} is missing"):
        reward_tools.main(["explain", *flags])


def test_attack_on_a_users_reward_fails_a_bad_one(tmp_path, monkeypatch, capsys):
    (tmp_path / "plumbline_test_rewards.py").write_text(
        "def by_length(prompts, answers):\n    return [len(a) for a in answers]\n"
    )
    monkeypatch.chdir(tmp_path)
    assert reward_tools.main(["attack", "--reward", "plumbline_test_rewards:by_length", "--limit", "5"]) == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["beaten"]["very_long"] == 0
    with pytest.raises(ValueError, match="must be module:name"):
        reward_tools.main(["attack", "--reward", "nonsense"])
    with pytest.raises(ValueError, match="usage: plumbline reward"):
        reward_tools.main(["praise"])


def test_identity_gap_by_hand(monkeypatch):
    monkeypatch.setattr(reward_tools.identity_sentences, "GROUPS", ("red",))
    monkeypatch.setattr(reward_tools.identity_sentences, "UNSEEN_GROUPS", ("blue",))
    assert reward_tools.identity_gap(lambda texts: np.array(["red" in t for t in texts], dtype=float).tolist()) == 1.0
    assert reward_tools.identity_gap(lambda texts: [0.3] * len(texts)) == 0.0


@pytest.mark.slow
def test_attack_fails_where_a_good_answer_loses_too_often(capsys):
    status = reward_tools.main(["attack", "--limit", "4"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["prompts"] == 4 and set(result["beaten"].values()) <= {0, 1, 2, 3, 4}
    assert status == int(result["all_beaten"] < 0.95 * 4)
