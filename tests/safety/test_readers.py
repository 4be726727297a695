"""The guard's readers of JSON Lines: a row ends at a line feed and nowhere else, and what is no text is refused by line."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plumbline.safety.drift import read_texts
from plumbline.safety.verifier.knowledge import read_documents

READERS = {"drift": read_texts, "documents": lambda path: [document.text for document in read_documents(path)]}
each = pytest.mark.parametrize("read", READERS.values(), ids=READERS)


def write(path, rows, *, start="", end="\n"):
    path.write_bytes((start + end.join(json.dumps({"text": row}, ensure_ascii=False) for row in rows) + end).encode())
    return path


@each
@pytest.mark.parametrize("start", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n"])
def test_marks_and_line_ends_of_any_system(tmp_path, read, start, end):
    rows = ["a\u2028b", "c\u0085d\u2029", "e\x0bf\x0c\x1c", "g"]
    assert read(write(tmp_path / "rows.jsonl", rows, start=start, end=end)) == rows


@each
@pytest.mark.parametrize(
    "line",
    ['{"text": "half \\ud83d"}', '{"text": null}', '{"text": ["a"]}', "[1]", "{", '{"text": "a",}', "[" * 20_000],
)
def test_what_is_no_text_is_refused_by_line(tmp_path, read, line):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: "):
        read(path)


@each
def test_what_is_no_utf8_is_refused_by_file(tmp_path, read):
    path = tmp_path / "rows.jsonl"
    path.write_bytes('{"text": "a"}\n'.encode("utf-16"))
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: UTF-16 or UTF-32, and not UTF-8"):
        read(path)


@each
@settings(deadline=None, max_examples=30)
@given(
    rows=st.lists(
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1), min_size=1, max_size=4
    )
)
def test_any_text_comes_back_as_it_was(tmp_path_factory, read, rows):
    assert read(write(tmp_path_factory.mktemp("rows") / "rows.jsonl", rows)) == rows
