"""Published preference formats, one row of each by hand; what is left out is counted, what is wrong is named."""

import gzip
import json
from collections import Counter

import pytest

from plumbline.align.data.formats import cost_pairs, parse_row, read_pairs, read_training_pairs


def parse(row):
    counts = Counter()
    return parse_row("data:1", row, "data", counts), counts


def said(pair):
    return [m["content"] for m in pair.prompt], pair.chosen[-1]["content"], pair.rejected[-1]["content"]


USER = {"role": "user", "content": "Why?"}
ROWS = {
    "texts": {"prompt": "Why?", "chosen": "Because.", "rejected": "No."},
    "messages": {
        "prompt": [USER],
        "chosen": [{"role": "assistant", "content": "Because."}],
        "rejected": [{"role": "assistant", "content": "No."}],
    },
    "prompt inside the answers too": {
        "prompt": "Why?",
        "chosen": [USER, {"role": "assistant", "content": "Because."}],
        "rejected": [USER, {"role": "assistant", "content": "No."}],
    },
    "prompt inside the answers only": {
        "chosen": [USER, {"role": "assistant", "content": "Because."}],
        "rejected": [USER, {"role": "assistant", "content": "No."}],
    },
    "two transcripts": {
        "chosen": "\n\nHuman: Why?\n\nAssistant: Because.",
        "rejected": "\n\nHuman: Why?\n\nAssistant: No.",
    },
    "autoj": {"prompt": "Why?", "response 1": "No.", "response 2": "Because.", "label": 1, "scenario": "s"},
    "llmbar": {"input": "Why?", "output_1": "Because.", "output_2": "No.", "label": 1},
    "tulu": {"prompt": "Why?", "completion_a": "No.", "completion_b": "Because.", "preference": "b-is-slightly-better"},
    "pku": {"prompt": "Why?", "response_0": "No.", "response_1": "Because.", "better_response_id": 1},
    "rmb": {
        "conversation_input": [USER],
        "chosen": {"llm_name": "x", "answer": "Because."},
        "reject": {"llm_name": "y", "answer": "No."},
    },
    "sharegpt": {
        "conversations": [{"from": "human", "value": "Why?"}],
        "chosen": {"from": "gpt", "value": "Because."},
        "rejected": {"from": "gpt", "value": "No."},
    },
}


@pytest.mark.parametrize("name", ROWS)
def test_each_format_gives_the_same_pair(name):
    pair, counts = parse(ROWS[name])
    assert said(pair) == (["Why?"], "Because.", "No.") and not counts
    assert pair.p_chosen == 1.0 and pair.prompt[0]["role"] == "user" and pair.chosen[-1]["role"] == "assistant"


def test_transcripts_of_several_turns_split_after_the_last_shared_user_turn():
    start = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Why?"
    pair, _ = parse(
        {"chosen": start + "\n\nAssistant: The sky is blue.", "rejected": start + "\n\nAssistant: The sky is green."}
    )
    assert [m["role"] for m in pair.prompt] == ["user", "assistant", "user"]
    assert said(pair)[1:] == ("The sky is blue.", "The sky is green.")


def test_votes_of_several_people_become_a_share():
    row = {"instruction": "Add.", "input": "1 + 1", "response1": "3", "response2": 2}
    pair, _ = parse(row | {"annotator1": 2, "annotator2": 2, "annotator3": 1})
    assert said(pair) == (["Add.\n\n1 + 1"], "2", "3")
    assert pair.p_chosen == pytest.approx(2 / 3) and pair.tags["agreement"] == "0.67 of 3"
    tie, _ = parse(row | {"annotator1": 2, "annotator2": 1, "annotator3": 0})
    assert tie.p_chosen == 0.5


def test_soft_labels_below_a_half_swap_the_answers_with_their_harm():
    row = ROWS["texts"] | {"p_chosen": 0.2, "chosen_harmful": True, "rejected_harmful": False}
    pair, _ = parse(row)
    assert said(pair)[1:] == ("No.", "Because.") and pair.p_chosen == 0.8 and pair.harm == (False, True)
    with pytest.raises(ValueError, match=r"p_chosen=1.5 must be a number from 0 to 1"):
        parse(ROWS["texts"] | {"p_chosen": 1.5})


@pytest.mark.parametrize(
    "row, why",
    [
        ({"text": "x"}, "rows without two answers"),
        (ROWS["tulu"] | {"preference": "unsure"}, "rows without a verdict"),
        (ROWS["texts"] | {"rejected": "Because. "}, "pairs with one text twice"),
        (ROWS["texts"] | {"rejected": " "}, "pairs with an empty answer"),
        ({"chosen": [USER], "rejected": [USER]}, "pairs with an empty answer"),
    ],
)
def test_rows_without_a_pair_are_counted(row, why):
    pair, counts = parse(row)
    assert pair is None and counts == {why: 1}


def test_what_breaks_its_own_format_is_named():
    with pytest.raises(ValueError, match=r"data:1: field 'prompt' is missing"):
        parse({"chosen": "The sky is blue.", "rejected": "The sky is green."})
    with pytest.raises(ValueError, match=r"data:1: margin=-1 must be"):
        parse(ROWS["texts"] | {"margin": -1})
    with pytest.raises(ValueError, match="needs a role and a content"):
        parse(ROWS["texts"] | {"prompt": [{"role": "user"}]})


def test_a_folder_of_files_of_all_kinds(tmp_path):
    (tmp_path / "sub").mkdir()
    with gzip.open(tmp_path / "sub" / "a.jsonl.gz", "wt") as out:
        out.write(json.dumps(ROWS["autoj"]) + "\n" + json.dumps(ROWS["autoj"] | {"label": 2}) + "\n")
    (tmp_path / "b.json").write_text(json.dumps([ROWS["llmbar"]]))
    (tmp_path / "c.jsonl").write_text('{"critique": "not a pair"}\n')
    pairs, report = read_pairs(tmp_path)
    assert [p.source for p in pairs] == [f"{tmp_path.name}/b", "sub/a", "sub/a"]
    assert (report.pairs, report.ties, dict(report.left_out)) == (3, 1, {"rows without two answers": 1})
    assert len(read_pairs(f"{tmp_path / 'b.json'},{tmp_path / 'sub'}")[0]) == 3
    with pytest.raises(ValueError, match="no preference pairs found"):
        read_pairs(tmp_path / "c.jsonl")
    with pytest.raises(ValueError, match="no such file or folder, and no hub id"):
        read_pairs(tmp_path / "nowhere.jsonl")


def test_training_reads_its_own_form_strictly_and_others_loosely(tmp_path, capsys):
    own = tmp_path / "own.jsonl"
    own.write_text(json.dumps(ROWS["texts"] | {"p_chosen": 0.5}) + "\n")
    assert read_training_pairs(own)[0].p_chosen == 0.5
    own.write_text(json.dumps(ROWS["texts"] | {"rejected": "Because."}) + "\n")
    with pytest.raises(ValueError, match=r"own\.jsonl:1: chosen and rejected are the same text"):
        read_training_pairs(own)
    other = tmp_path / "hh.jsonl"
    other.write_text(json.dumps(ROWS["two transcripts"]) + "\n")
    assert said(read_training_pairs(other)[0])[1] == "Because."
    assert "1 pairs (0 ties)" in capsys.readouterr().out


def test_cost_pairs_put_the_more_harmful_answer_first():
    row = {"prompt": "p", "response_0": "a", "response_1": "b", "better_response_id": 1}
    pairs = [
        parse(row | {"is_response_0_safe": safe, "is_response_1_safe": other})[0]
        for safe, other in ((True, False), (False, True), (False, False))
    ]
    costs = cost_pairs([*pairs, parse(ROWS["texts"])[0]])
    assert [(said(p)[1], p.p_chosen, p.harm) for p in costs] == [
        ("b", 1.0, (True, False)),
        ("a", 1.0, (True, False)),
        ("b", 0.5, (True, True)),
    ]
    with pytest.raises(ValueError, match="none of 1 pairs says whether its answers are harmful"):
        cost_pairs([parse(ROWS["texts"])[0]])
