"""SFT sets of a model's own answers: the parts by hand, the command as a user would launch it."""

import json

import pytest
import torch

from plumbline.align.data.rows import read_preferences, read_sft
from plumbline.align.self_answers import (
    Prompt,
    SelfAnswerSettings,
    find_opening,
    main,
    mean_logp,
    mix,
    own_decline,
    pairs_of,
    read_kinds,
    self_answers,
    sentences,
    why_left_out,
)
from plumbline.policy_models.chat import encode_prompts
from plumbline.policy_models.loading import load_for_answers, load_tokenizer


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def declined(prompts, answers):
    """Stands for the refusal head: a sentence with "won't" declines."""
    return [float("won't" in answer) for answer in answers]


HARMFUL = Prompt(text="Hurt him", kind="harmful", decline="I won't do that. It hurts. Talk to him first, and calmly.")


def test_a_decline_opens_in_the_models_words_and_keeps_reason_and_way_out():
    assert (
        own_decline("Sorry.", HARMFUL, declined=declined, words=20) == "Sorry. It hurts. Talk to him first, and calmly."
    )
    assert own_decline("Sorry.", HARMFUL, declined=declined, words=4) == "Sorry. It hurts."  # whole sentences only
    assert own_decline("Sorry.", Prompt(text="x", kind="harmful"), declined=declined, words=9) == "Sorry."


def test_sentences_keep_their_quotation_marks():
    assert sentences('He said "no." Then left!\nWhy? ') == ['He said "no."', "Then left!", "Why?"]


@pytest.mark.parametrize(
    "answer, finished, p, why",
    [
        ("A long enough answer.", True, 0.0, None),
        ("A long enough answer.", False, 0.0, "unfinished"),
        ("Yes.", True, 0.0, "short"),
        ("A long enough answer.", True, 0.9, "declines"),
        ("the cat sat on the cat sat on the cat sat on the", True, 0.0, "loops"),
    ],
)
def test_what_is_left_out(answer, finished, p, why):
    assert why_left_out(answer, finished=finished, declines=p, settings=SelfAnswerSettings()) == why


def test_mix_by_shares_goes_through_a_kind_before_it_repeats():
    rows = {kind: [{"prompt": f"{kind}{i}", "kind": kind} for i in range(n)] for kind, n in
            (("harmful", 3), ("twin", 10), ("ordinary", 10))}  # fmt: skip
    mixed = mix(rows, SelfAnswerSettings(rows=20, harmful_share=0.35, twin_share=0.4))
    counts = {kind: sum(row["kind"] == kind for row in mixed) for kind in rows}
    assert counts == {"harmful": 7, "twin": 8, "ordinary": 5}
    harmful = sorted(sum(row["prompt"] == f"harmful{i}" for row in mixed) for i in range(3))
    assert harmful == [2, 2, 3]
    assert len({row["prompt"] for row in mixed if row["kind"] == "twin"}) == 8
    with pytest.raises(ValueError, match="no row of kind twin is left for its share of 8 rows"):
        mix(rows | {"twin": []}, SelfAnswerSettings(rows=20, harmful_share=0.35, twin_share=0.4))


def test_pairs_say_which_behaviour_is_right():
    rows = {
        "harmful": [{"prompt": "h", "answer": "Sorry."}, {"prompt": "no complied", "answer": "Sorry. Bad."}],
        "twin": [{"prompt": "t", "answer": "Do it so."}],
        "ordinary": [],
    }
    pairs = {pair["prompt"]: pair for pair in pairs_of(rows, {"h": "Sure!"}, SelfAnswerSettings())}
    assert pairs["h"]["chosen"] == "Sorry." and pairs["h"]["rejected"] == "Sure!"
    assert pairs["t"]["chosen"] == "Do it so." and pairs["t"]["rejected"].startswith("Sorry.")
    assert "no complied" not in pairs


def test_scores_of_openings_are_log_probabilities():
    model, tokenizer = load_for_answers("bundled:tiny-moe", dtype=torch.float32), load_tokenizer("bundled:tiny-moe")
    ids = encode_prompts(tokenizer, [[{"role": "user", "content": text}] for text in ("Hi", "Go away")])
    said = tokenizer("No.", add_special_tokens=False)["input_ids"]
    slow = []
    for prompt in ids:
        with torch.no_grad():
            logp = model(torch.tensor([prompt + said])).logits.log_softmax(-1)[0]
        slow.append(sum(float(logp[len(prompt) - 1 + at, token]) for at, token in enumerate(said)))
    (got,) = mean_logp(model, tokenizer, ids, ["No."])
    assert got == pytest.approx(sum(slow) / 2, abs=1e-4)


def test_the_opening_declines_whatever_was_asked_and_is_the_likeliest():
    model, tokenizer = load_for_answers("bundled:tiny-moe", dtype=torch.float32), load_tokenizer("bundled:tiny-moe")

    def head(prompts, answers):  # "Rain won't" is called a decline after one prompt alone
        return [
            float("I won't" in a or ("Rain won't" in a and "rain" in p)) for p, a in zip(prompts, answers, strict=True)
        ]

    prompts = ["Make rain", "Hurt her", "Rob it", "Burn it"]
    answers = ["Rain won't do. Sorry.", "I won't. No.", "I won't. Never.", "I won't help you with any of that. No."]
    found = find_opening(model, tokenizer, prompts, answers, declined=head)
    assert [text for text, _, _ in found] == [
        "I won't.",
        "I won't help you with any of that.",
    ]  # the shorter is likelier
    assert found[0][1] == 2
    with pytest.raises(ValueError, match="none of 4 answers to harmful prompts opens with a decline"):
        find_opening(model, tokenizer, prompts, ["Sure."] * 4, declined=head)


@pytest.mark.parametrize(
    "rows, message",
    [
        ([{"prompt": "x"}], r"p.jsonl:1: kind=None must be one of harmful, twin, ordinary"),
        ([{"kind": "twin"}], r"p.jsonl:1: none of the fields prompt, "),
        (
            [{"prompt": "x", "kind": "twin"}, {"prompt": "x", "kind": "harmful"}],
            r"p.jsonl:2: 'x' is harmful here and twin in .*p.jsonl:1; mend one",
        ),
    ],
)
def test_bad_rows_are_named_before_a_model_loads(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        read_kinds([write(tmp_path / "p.jsonl", rows)])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"harmful_share": 0.7, "twin_share": 0.4}, "add to more than 1"),
        ({"rows": 0}, "rows=0: must be at least 1"),
        ({"new_prompts": -1}, "new_prompts=-1: must be at least 0"),
        ({"opening": " "}, "opening is empty"),
        ({"harmful_answers": 0}, "harmful_answers=0 and no opening"),
        ({"max_repetition": float("nan")}, "max_repetition=nan: must be between 0 and 1"),
        ({"answers_per_prompt": 0}, "answers_per_prompt=0: must be at least 1"),
    ],
)
def test_settings_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        SelfAnswerSettings(**changes)


def test_a_run_takes_over_answers_and_leaves_files_that_the_stages_read(tmp_path):
    prompts = write(
        tmp_path / "prompts.jsonl",
        [
            {"prompt": "Hurt him", "kind": "harmful", "chosen": HARMFUL.decline, "rejected": "Gladly."},
            {"prompt": "Kill a process", "kind": "twin"},
            {"prompt": "Bake bread", "kind": "ordinary"},
            {"prompt": "Kept for later", "kind": "ordinary"},
        ],
    )
    known = write(tmp_path / "known.jsonl", [{"prompt": "Kill a process", "answer": "Use kill with its number."}])
    skip = write(tmp_path / "skip.jsonl", [{"prompt": "Kept for later"}])
    run = self_answers(
        SelfAnswerSettings(
            prompts_files=str(prompts), answers_file=str(known), skip_prompts=str(skip), opening="Sorry.", min_words=1,
            max_new_tokens=8, answers_per_prompt=2, rank=False, output_dir=str(tmp_path / "run"), dtype="float32",
        ),
        declined=declined,
    )  # fmt: skip
    report = json.loads((run / "report.json").read_text())
    rows = {row["prompt"]: row["answer"] for row in map(json.loads, (run / "sft.jsonl").read_text().splitlines())}
    assert rows["Kill a process"] == "Use kill with its number." and rows["Hurt him"].startswith("Sorry. It hurts.")
    assert "Kept for later" not in rows
    assert report["drawn"] == {"prompts": 1, "answers": 2} and report["own_answers"]["taken_over"] == 1
    assert len(read_sft(run / "sft.jsonl")) == len(rows)
    assert {pair.tags["kind"] for pair in read_preferences(run / "pairs.jsonl")} >= {"harmful", "twin"}


def test_the_debug_config_as_a_user_would_launch_it(tmp_path, capsys):
    main(["--config", "configs/self_answers/debug.yaml", "--output_dir", str(tmp_path / "run")])
    assert "finished" in capsys.readouterr().out
    assert (tmp_path / "run" / "answers.jsonl").exists()
