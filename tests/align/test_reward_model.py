"""The stage around the trainer: rows for it, its report, and its settings; launching it is in tests/test_launch.py."""

import json

import numpy as np
import pytest
from trl import RewardConfig

from plumbline.align.data.rows import PreferencePair, read_preferences
from plumbline.align.reward_model import RewardModelSettings, accuracy_report, pair_rows, train
from plumbline.align.runtime.launch import trainer_defaults
from plumbline.paths import HOME
from plumbline.policy_models.loading import load_tokenizer
from plumbline.rows import data_source


def pair(n=0, **fields):
    text = {"chosen": "Because it is so.", "rejected": "No."}
    made = {name: [{"role": "assistant", "content": text[name]}] for name in text}
    return PreferencePair(prompt=[{"role": "user", "content": f"Why {n}?"}], **{**made, **fields})


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("bundled:tiny-moe")


def test_rows_hold_tokens_and_only_columns_that_say_something(tokenizer):
    settings = RewardModelSettings()
    (row,), too_long = pair_rows([pair()], tokenizer, settings, 512)
    assert set(row) == {"chosen_ids", "rejected_ids"} and too_long == 0
    assert tokenizer.decode(row["chosen_ids"]).count("Because it is so.") == 1
    rows, _ = pair_rows(
        [pair(), pair(1, p_chosen=0.5, margin=2.0)], tokenizer, RewardModelSettings(use_margins=True), None
    )
    assert [(r["p_chosen"], r["margin"]) for r in rows] == [(1.0, 0.0), (0.5, 2.0)]
    rows, _ = pair_rows([pair(harm=(True, False))], tokenizer, RewardModelSettings(target="cost"), None)
    assert (rows[0]["chosen_harm"], rows[0]["rejected_harm"]) == (1.0, -1.0)


def test_pairs_that_do_not_fit_are_counted_and_never_all(tokenizer, capsys):
    long = pair(1, chosen=[{"role": "assistant", "content": "x" * 400}])
    rows, too_long = pair_rows([pair(), long], tokenizer, RewardModelSettings(), 200)
    assert (len(rows), too_long) == (1, 1) and "1 of 2 pairs are longer" in capsys.readouterr().out
    with pytest.raises(ValueError, match="all 1 pairs are longer than max_length=200"):
        pair_rows([long], tokenizer, RewardModelSettings(), 200)


def test_report_has_what_the_figures_and_people_read():
    pairs = [pair(n, tags={"kind": "a" if n % 2 else "b"}) for n in range(20)]
    chosen = np.array([1.0] * 15 + [-2.0] * 4 + [np.nan])
    report = accuracy_report(pairs, chosen, np.zeros(20))
    assert report["accuracy"]["mean"] == pytest.approx(15 / 19) and report["unscored"] == 1
    assert report["length_baseline"]["mean"] == 1.0  # the chosen answer is the longer one throughout
    assert set(report["by_kind"]) == {"a", "b"} and report["by_kind"]["a"]["accuracy"]["n"] == 9
    assert (
        report["confident_mistakes"][0]["prompt"].startswith("Why")
        and report["confident_mistakes"][0]["margin"] == -2.0
    )
    assert all(len(row) == 3 for row in report["calibration"]) and "ece" in report
    few = accuracy_report(pairs[:2], chosen[:2], np.zeros(2))
    assert few["calibration"] == [] and "2 different prompts" in few["calibration_note"]
    with pytest.raises(ValueError, match="no held-out pair could be scored"):
        accuracy_report(pairs[:1], np.array([np.nan]), np.zeros(1))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"label_smoothing": 0.5}, "label_smoothing=0.5"),
        ({"mix_by_loss": -1.0}, "mix_by_loss=-1.0"),
        ({"report_pairs": 0}, "report_pairs=0"),
        ({"target": "harm"}, "target='harm': must be preference or cost"),
    ],
)
def test_settings_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        RewardModelSettings(**options)


def test_sources_are_paths_from_anywhere_or_hub_ids(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    starter = HOME / "data/starter/preferences.jsonl"
    assert data_source("data/starter/preferences.jsonl,owner/name") == f"{starter},owner/name"
    with pytest.raises(ValueError, match="nowhere.jsonl: no such file"):
        data_source("owner/name,nowhere.jsonl")


def test_soft_labels_in_our_own_form(tmp_path):
    row = {"prompt": "p", "chosen": "a", "rejected": "b"}
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps(row | {"p_chosen": 0.75, "chosen_harmful": False, "rejected_harmful": True}) + "\n")
    (read,) = read_preferences(file)
    assert read.p_chosen == 0.75 and read.harm == (False, True)
    for bad in ({"p_chosen": 0.2}, {"chosen_harmful": "no"}):
        file.write_text(json.dumps(row | bad) + "\n")
        with pytest.raises(ValueError, match=r"pairs\.jsonl:1: "):
            read_preferences(file)


def test_a_cost_model_is_trained_from_labels_of_harm(tmp_path):
    rows = [
        {
            "prompt": f"Say {n}",
            "chosen": "fine words",
            "rejected": "vile words",
            "chosen_harmful": False,
            "rejected_harmful": True,
        }
        for n in range(12)
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = RewardModelSettings(
        train_file=str(file),
        target="cost",
        holdout_every=3,
        dtype="float32",
        lora_r=4,
        mix_by_loss=0.5,
        report_pairs=2,
    )
    args = RewardConfig(
        output_dir=str(tmp_path / "run"),
        **trainer_defaults() | {"bf16": False, "max_steps": 8, "learning_rate": 0.02, "per_device_train_batch_size": 4},
    )
    run = train(settings, args)
    report = json.loads((run / "report.json").read_text())
    assert report["accuracy"]["mean"] == 1.0 and report["leaked_prompts"] == 0  # the vile answer costs more
    assert report["accuracy"]["n"] <= 2
    assert (run / "report.png").is_file() and (run / "model" / "reward_scaling.json").is_file()
