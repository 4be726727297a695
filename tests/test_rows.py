"""The one way in for data: files of every kind, encodings, what is refused by line; any bytes give rows or a ValueError."""

import gzip
import json
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from plumbline.rows import data_source, is_hub_id, parse_value, read_rows, read_text, row_sources, rows_of_bytes

ROWS = [{"prompt": "Why\u2028so\u0085late?", "n": 1}, {"prompt": "né 👍", "n": None}]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)


def rows(content, name="a.jsonl"):
    return [row for _, row in rows_of_bytes(content if isinstance(content, bytes) else content.encode(), name)]


@pytest.mark.parametrize(
    "content",
    [
        LINES,
        LINES + "\n",
        LINES.replace("\n", "\r\n") + "\r\n",
        "\ufeff" + LINES,
        "\n\n" + LINES.replace("\n", "\n \n") + "\n\t\n",
        "\ufeff" + LINES.replace("\n", "\n\ufeff"),  # two files with byte order marks, one behind the other
    ],
    ids=["plain", "last line feed", "crlf", "bom", "blank lines", "joined boms"],
)
def test_json_lines_in_any_dress(content):
    assert rows(content) == ROWS


def test_only_a_line_feed_ends_a_row():
    for separator in ("\u2028", "\u2029", "\x85", "\x1c", "\v", "\f"):
        text = json.dumps({"text": f"a{separator}b"}, ensure_ascii=separator in "\x1c\v\f")
        assert rows(text)[0]["text"] == f"a{separator}b"


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.json", json.dumps(ROWS)),
        ("a.json", "\ufeff" + json.dumps(ROWS, indent=2)),
        ("a.json", LINES),  # JSON Lines under the other name
        ("a.ndjson", LINES),
        ("a.unknown", LINES),
    ],
)
def test_lists_and_lines_under_several_names(name, content):
    assert rows(content, name) == ROWS


def test_one_object_alone_is_one_row():
    assert rows('{\n "prompt": "p"\n}', "a.json") == [{"prompt": "p"}]


def test_a_table_has_a_header_and_null_for_an_empty_cell():
    text = '# made by hand\nprompt,answer,margin\n"a, ""b""\nc",x,\n\nd,y,0.5\n'
    want = [{"prompt": 'a, "b"\nc', "answer": "x", "margin": None}, {"prompt": "d", "answer": "y", "margin": "0.5"}]
    assert rows(text, "a.csv") == want
    assert rows(text.replace("\n", "\r\n"), "a.csv")[1] == want[1]
    assert rows("prompt;answer\na,b;c\n", "a.csv") == [{"prompt": "a,b", "answer": "c"}]
    assert rows("prompt\tanswer\na,b\tc\n", "a.tsv") == [{"prompt": "a,b", "answer": "c"}]
    assert rows(",prompt\n0,p\n", "a.csv") == [{"column 1": "0", "prompt": "p"}]  # pandas writes its index so
    long = "x" * 200_000
    assert rows(f"prompt\n{long}\n", "a.csv") == [{"prompt": long}]


def test_parquet_rows_keep_lists_and_dates(tmp_path):
    import datetime

    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table(
        {"messages": [[{"role": "user", "content": "p"}]], "day": [datetime.date(2024, 2, 29)], "none": [None]}
    )
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert [row for _, row in read_rows(tmp_path / "a.parquet")] == [
        {"messages": [{"role": "user", "content": "p"}], "day": "2024-02-29", "none": None}
    ]
    pyarrow.parquet.write_table(pyarrow.table({"x": [1.0, math.nan]}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"b\.parquet:2: field 'x' is NaN"):
        list(read_rows(tmp_path / "b.parquet"))
    (tmp_path / "c.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"c\.parquet: no readable Parquet"):
        list(read_rows(tmp_path / "c.parquet"))


@pytest.mark.parametrize(
    "content, rule",
    [
        (LINES.encode("utf-16"), r"a\.jsonl:1: UTF-16 or UTF-32, and not UTF-8"),
        (LINES.encode("utf-16-le"), r"a\.jsonl:1: UTF-16 or UTF-32"),
        (LINES.encode("utf-32"), r"a\.jsonl:1: UTF-16 or UTF-32"),
        (b'{"a": 1}\n{"a": "\xff"}', r"a\.jsonl:2: not UTF-8 \(invalid start byte at byte 7\); save the file as UTF-8"),
        (b'{"a": 1}\n{"a": 1,}', r"a\.jsonl:2: not valid JSON .* at column 9\)"),
        (b'{"a": {"b": ["\\ud83d"]}}', r"a\.jsonl:1: field 'a\.b\[0\]' holds half of a surrogate pair .* character 0"),
        (b'{"\\ud83d": 1}', r"a\.jsonl:1: the name of a field holds half of a surrogate pair"),
        (b'{"a": "x\\u0000"}', r"a\.jsonl:1: field 'a' holds a NUL .* character 1"),
        (b'{"a": NaN}', r"a\.jsonl:1: field 'a' is NaN; a finite number or null is needed"),
        (b'{"a": [-Infinity]}', r"a\.jsonl:1: field 'a\[0\]' is -Infinity"),
        (b'{"a": 1e999}', r"a\.jsonl:1: field 'a' is Infinity"),
        (b'{"a": 1, "a": 2}', r"a\.jsonl:1: field 'a' stands twice in one object"),
        (b"[1]", r"a\.jsonl:1: an object is expected, found list; a list of rows belongs in a \.json file"),
        (b'[\n{"a": 1}\n]', r"a\.jsonl:1: not valid JSON .*; a list of rows belongs in a \.json file"),
        (b'{"a": ' + b"[" * 100_000, r"a\.jsonl:1: (nested too deep|not valid JSON)"),
        (b'{"a": ' + b"9" * 5000 + b"}", r"a\.jsonl:1: .*; fix the line"),
        (b"\n \n", r"a\.jsonl: the file has no rows"),
        (b"", r"a\.jsonl: the file has no rows"),
    ],
)
def test_what_is_refused_names_line_field_and_rule(content, rule):
    with pytest.raises(ValueError, match=rule):
        rows(content)


@pytest.mark.parametrize(
    "name, content, rule",
    [
        ("a.json", '[{"a": 1},\n{"a": NaN}]', r"a\.json:2: field 'a' is NaN"),
        ("a.json", '[{"a": 1},\n\n"x"]', r"a\.json:3: an object is expected, found str"),
        ("a.json", '[{"a": 1}\n{"a": 2}]', r"a\.json:2: not valid JSON \(',' or ']' expected"),
        ("a.json", '[{"a": 1}] x', r"a\.json: not valid JSON \('x' after the end"),
        ("a.json", '[{"a": 1},\n{"a": 2', r"a\.json:2: not valid JSON"),
        ("a.json", "[]", r"a\.json: the file has no rows"),
        ("a.csv", "a,b\n1,2\n3\n", r"a\.csv:3: 1 cells, the header has 2"),
        ("a.csv", "a,a\n1,2\n", r"a\.csv:1: column 'a' stands twice"),
        ("a.csv", 'a,b\n"x" y,2\n', r"a\.csv:2: no valid CSV"),
        ("a.csv", 'a,b\n1,"x\n', r"a\.csv:2: no valid CSV \(unexpected end of data\)"),
        ("a.csv", "name\nx\0\n", r"a\.csv:2: field 'name' holds a NUL"),
        ("a.csv", "a,b\n", r"a\.csv: the file has no rows"),
    ],
)
def test_lists_and_tables_are_refused_by_line_too(name, content, rule):
    with pytest.raises(ValueError, match=rule):
        rows(content, name)


def test_files_that_are_not_whole_or_not_there(tmp_path):
    whole = gzip.compress(LINES.encode())
    assert rows(whole, "a.jsonl.gz") == ROWS
    for broken in (whole[:-5], b"no gzip", whole[:20] + b"xx" + whole[22:]):
        with pytest.raises(ValueError, match=r"a\.jsonl\.gz"):
            rows(broken, "a.jsonl.gz")
    with pytest.raises(ValueError, match="no such file or folder, and no hub id"):
        list(read_rows(tmp_path / "nowhere.jsonl"))
    with pytest.raises(ValueError, match="no such file or folder"):
        list(read_rows("\0" * 3))
    with pytest.raises(ValueError, match="no files of"):
        list(read_rows(tmp_path))
    (tmp_path / "latin.txt").write_bytes("né".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt:1: not UTF-8"):
        read_text(tmp_path / "latin.txt")


def test_a_folder_is_read_file_by_file_and_several_sources_one_after_the_other(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "b.csv").write_text("prompt\np\n")
    (tmp_path / "a.jsonl").write_text('{"prompt": "q"}\n')
    (tmp_path / "notes.txt").write_text("no table")
    named = [(name, [row["prompt"] for _, row in found]) for name, found in row_sources(tmp_path)]
    assert named == [(f"{tmp_path.name}/a", ["q"]), ("in/b", ["p"])]
    both = f"{tmp_path / 'a.jsonl'}, {tmp_path / 'in'}"
    assert [row["prompt"] for _, row in read_rows(both)] == ["q", "p"]


def test_a_saved_data_set_is_read_by_its_split(tmp_path):
    from datasets import Dataset, DatasetDict

    DatasetDict({"train": Dataset.from_list([{"prompt": "p"}])}).save_to_disk(tmp_path / "d")
    assert [row for _, row in read_rows(tmp_path / "d")] == [{"prompt": "p"}]
    with pytest.raises(ValueError, match="no split 'test' among train"):
        list(read_rows(tmp_path / "d", split="test"))


@pytest.mark.parametrize("name", ["owner/name", "owner/name-v1.5", "owner/name@main", "owner/name@refs/pr/3"])
def test_hub_ids(name, monkeypatch):
    import datasets

    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name, **more: asked.append((name, more)) or [{"prompt": "p"}])
    assert is_hub_id(name) and data_source(name) == name
    assert list(read_rows(name)) == [(f"{name}:1", {"prompt": "p"})]
    base, _, revision = name.partition("@")
    assert asked == [(base, {"split": "train", "revision": revision or None, "streaming": False})]


@pytest.mark.parametrize("name", ["owner/name.jsonl", "name", "a/b/c", "/absolute/path", "~/x", "a b/c", ""])
def test_what_is_no_hub_id(name):
    assert not is_hub_id(name)


def test_a_hub_that_cannot_be_reached_is_one_sentence(monkeypatch):
    import datasets

    def offline(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(
        ValueError, match=r"owner/name: no such file or folder, and the hub does not give it \(no network"
    ):
        list(read_rows("owner/name"))


# Properties: any JSON value, any bytes

ANY_TEXT = st.text(st.characters(codec=None, exclude_categories=()), max_size=20)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT, inner, max_size=3),
    max_leaves=8,
)
QUICK = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


@QUICK
@given(
    st.lists(st.dictionaries(ANY_TEXT, JSON, max_size=3), min_size=1, max_size=3), st.sampled_from(["jsonl", "json"])
)
def test_any_json_comes_back_or_is_refused(given_rows, kind):
    text = json.dumps(given_rows) if kind == "json" else "\n".join(map(json.dumps, given_rows))
    try:
        found = rows(text, f"a.{kind}")
    except ValueError as error:
        assert str(error).startswith(f"a.{kind}:")
        assert any(word in str(error) for word in ("surrogate", "NUL", "NaN", "Infinity"))
    else:
        assert found == json.loads(json.dumps(given_rows))
        json.dumps(found, allow_nan=False, ensure_ascii=False).encode("utf-8")


@QUICK
@given(st.binary(max_size=60), st.sampled_from(["a.jsonl", "a.json", "a.csv", "a.tsv", "a.jsonl.gz", "a.parquet"]))
def test_any_bytes_give_rows_or_a_valueerror(content, name):
    try:
        assert all(isinstance(row, dict) for row in rows(content, name))
    except ValueError as error:
        assert str(error).startswith(name)


@QUICK
@given(ANY_TEXT)
def test_json_held_as_a_text_is_read_or_refused(text):
    try:
        json.dumps(parse_value("a:1", "tools", text), allow_nan=False, ensure_ascii=False).encode("utf-8")
    except ValueError as error:
        assert str(error).startswith("a:1: ")
