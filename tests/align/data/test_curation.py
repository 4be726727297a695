"""Filters, each hit beside a harmless look-alike; duplicates and paraphrases; the command on a small file."""

import json

import numpy as np
import pytest

pytest.importorskip("datasketch", reason="the extra `curate` is not installed")
pytest.importorskip("py3langid", reason="the extra `curate` is not installed")

from plumbline.align.data.curation import CurationRules, Row, curate, garbage, unusual_letters  # noqa: E402
from plumbline.align.data.duplicates import like_pairs, paraphrases, row_vectors  # noqa: E402
from plumbline.apps.commands.curate import main, texts  # noqa: E402

EGG = Row(
    "How long should I boil an egg for a soft yolk?", "Six minutes in boiling water, then a minute in cold water."
)
BIKE = Row(
    "My bicycle chain keeps falling off. Why?", "It is often worn or too long. Measure it, and check the derailleur."
)


def rules_of(rows, **options):
    return [drop and drop.rule for drop in curate(rows, CurationRules(**options)).drops]


@pytest.mark.parametrize(
    "text",
    [
        "xkqj zzvt pqwk hjkl mnbv qwrt zxcv sdfg wrtp",
        "%$#@!! ^&*()_+ ~~~ {}|:<>? $$$$$ ///// -----",
        "the cat the cat the cat the cat the cat the cat the cat the cat the cat the cat the cat",
        "<div><p><span>&nbsp;</span></p></div><br/><br/><a href='x'>x</a><i>y</i><b>z</b>",
        "\ufffd\ufffd\ufffd\ufffd broken text that was read with the wrong encoding",
    ],
)
def test_garbage_is_found(text):
    assert garbage(text)


@pytest.mark.parametrize(
    "text",
    [
        "42",
        "for i in range(10):\n    print(i * xs[i])\n    total += w[i] ** 2",
        "Wir treffen uns morgen um neun Uhr am Bahnhof und fahren dann gemeinsam weiter.",
        "Шесть минут в кипящей воде, затем минута в холодной воде.",
        "The acronyms are HTTP, HTML and NASA; the rhythm of strengths stays.",
        "3.5 km = 2.17 miles; 4x - 7 = 21, so x = 7.",
        "See https://example.org/a/very/long/path/that/goes/on/and/on/and/on/for/ever.html",
    ],
)
def test_ordinary_text_is_no_garbage(text):
    assert garbage(text) is None


def test_letters_in_random_order_are_unusual_among_ordinary_rows():
    words = "the water boils when a pan is left on the stove for several minutes while people wait and talk".split()
    rows = [Row(f"Question {n}?", " ".join(words[n % 7 :] + words[: n % 7])) for n in range(250)]
    shuffled = Row("Question?", " ".join(word[::-1] for word in rows[0].answer.split()))
    found = [number for number, _ in unusual_letters([*rows, shuffled], range(251))]
    assert found == [250]
    assert not list(unusual_letters([*rows[:100], shuffled], range(101)))  # too few rows to know what is usual


def test_empty_and_overlong_rows():
    assert rules_of([Row("", "x"), Row("Why?", " ... "), Row("Why?", "word " * 20)], max_chars=50) == [
        "empty",
        "empty",
        "too long",
    ]


def test_other_languages_go_and_translations_stay():
    german = Row(
        "Wie lange muss ein Ei kochen, damit es weich bleibt?", "Sechs Minuten in kochendem Wasser genügen dafür."
    )
    translation = Row("Translate into German: I would like to boil an egg.", "Ich möchte gerne ein Ei kochen.")
    assert rules_of([EGG, german, translation]) == [None, "language", None]
    assert rules_of([EGG, german], languages=()) == [None, None]
    assert rules_of([EGG, german], languages=("en", "de")) == [None, None]


def test_duplicates_name_the_row_that_stays():
    shouted = Row(EGG.prompt.upper(), f"{EGG.answer}!!")
    nearly = Row(EGG.prompt, EGG.answer.replace("Six", "About six"))
    drops = curate([BIKE, EGG, shouted, nearly], CurationRules(near_duplicate=0.6)).drops
    assert [drop and (drop.rule, drop.kept_row) for drop in drops] == [
        None,
        None,
        ("exact duplicate", 1),
        ("near duplicate", 1),
    ]
    other = Row(EGG.prompt, "Put it into a pan of water, bring that to a boil, switch off and wait for four minutes.")
    assert rules_of([EGG, other]) == [None, None]  # one question, two answers
    assert rules_of([Row("2 + 3?", "5"), Row("2 + 4?", "6")]) == [None, None]


def test_personal_data_is_counted_and_dropped_when_asked():
    rows = [
        EGG,
        Row("Write to whom?", "To jane.roe@mailbox.org, please."),
        Row("Which?", "someone@example.com is a placeholder."),
    ]
    assert curate(rows, CurationRules()).personal == [1]
    assert rules_of(rows, drop_personal=True) == [None, "personal data", None]


VECTORS = {"a": (1.0, 0.0), "b": (0.99, 0.14), "c": (0.96, 0.28), "x": (0.0, 1.0)}


def embed(texts):
    """The vector of a text's first letter."""
    return np.array([VECTORS[t[0]] for t in texts], dtype=np.float32)


def test_paraphrases_need_like_prompts_and_like_answers():
    rows = [Row("a", "a"), Row("b", "b"), Row("b", "x"), Row("x", "b")]
    found = list(paraphrases(rows, range(4), [(1, 0), (2, 0), (3, 0)], (0.9, 0.9), embed))
    assert [(row, other, rule) for row, other, rule, _ in found] == [(1, 0, "paraphrase")]
    assert list(paraphrases(rows, range(4), [], (0.9, 0.9), embed)) == []


def test_like_pairs_are_within_clusters_and_nearest_first():
    vectors = embed(["a", "b", "c", "x", "a"])
    assert list(like_pairs(vectors, np.array([0, 0, 0, 0, 1]))) == [(1, 0), (2, 1), (2, 0)]
    assert list(like_pairs(vectors, np.zeros(5, dtype=int), most=1)) == [(1, 0), (2, 1), (4, 0)]


def test_row_vectors_go_by_what_rare_words_mean():
    meaning = {
        "cat": (1, 0, 0),
        "kitten": (0.9, 0.4, 0),
        "train": (0, 0, 1),
        "the": (0.5, 0.5, 0.5),
        "of": (0.4, 0.6, 0.4),
    }
    asked = []

    def words(texts):
        asked.extend(texts)
        return np.array([meaning[text] for text in texts], dtype=np.float32)

    filler = " ".join(["the", "of"] * 40)
    vectors = row_vectors([f"the cat {filler}", f"{filler} of kitten", f"The train {filler}"], words).astype(float)
    assert sorted(asked) == sorted(meaning)  # each word once, whatever the case, and no text
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(3), abs=1e-3)
    assert vectors[0] @ vectors[1] > 0.5 > vectors[0] @ vectors[2]


def test_a_chain_of_paraphrases_keeps_what_is_near_dropped_rows_only():
    result = curate([Row(w, w) for w in "xabc"], CurationRules(languages=(), paraphrase=(0.98, 0.98)), embed=embed)
    assert [drop and drop.kept_row for drop in result.drops] == [None, None, 1, None]  # c is near b only, which went
    assert result.cluster.tolist() == [0, 0, 0, 0]


def test_rules_are_checked():
    with pytest.raises(ValueError, match="must be in"):
        CurationRules(near_duplicate=0.0)


@pytest.mark.parametrize(
    "row, want",
    [
        ({"instruction": "Add.", "input": "1 1", "output": "2"}, [("Add.\n\n1 1", "2")]),
        ({"prompt": "p", "answer": "a"}, [("p", "a")]),
        ({"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}]}, [("p", "a")]),
        (
            {"instruction": "p", "instances": [{"input": "", "output": "a"}, {"input": "i", "output": "b"}]},
            [("p", "a"), ("p\n\ni", "b")],
        ),
    ],
)
def test_rows_of_the_usual_sets(row, want):
    assert texts("x:1", row)[1] == want


def test_the_command_leaves_kept_and_dropped_rows_with_reasons(tmp_path, capsys):
    rows = [{"prompt": r.prompt, "answer": r.answer} for r in (EGG, BIKE, EGG, Row("Why?", ""))]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    main(["--data", str(data), "--output_dir", str(tmp_path / "out"), "--semantic", "false"])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (report["rows"], report["kept"], report["dropped"]) == (4, 2, {"exact duplicate": 1, "empty": 1})
    kept = [json.loads(line) for line in (tmp_path / "out" / "kept.jsonl").read_text().splitlines()]
    dropped = [json.loads(line) for line in (tmp_path / "out" / "dropped.jsonl").read_text().splitlines()]
    assert kept == rows[:2]
    assert dropped[0]["why"]["kept"].endswith("rows.jsonl:1") and dropped[0]["row"] == rows[2]
    with pytest.raises(ValueError, match="none of the fields prompt, "):
        data.write_text('{"text": "x"}\n')
        main(["--data", str(data)])
