"""Tokens into text, stop texts split over pieces, tool calls read in three notations."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plumbline.apps.serve.engine.text import AnswerText, Vocabulary
from plumbline.apps.serve.tools import ToolCall, ToolReader, forced_grammar, format_of
from tests.apps.serve.conftest import TOOL_TEMPLATE, tiny

TOOLS = [{"type": "function", "function": {"name": name}} for name in ("weather", "time")]


@settings(deadline=None, derandomize=True)
@given(st.binary(max_size=40))
def test_the_text_is_the_tokenizers_however_characters_are_split(data):
    tokenizer = tiny()[1]
    ids = [tokenizer.convert_tokens_to_ids(tokenizer.tokenize(chr(b)))[-1] if b < 128 else 3 + b for b in data]
    text = AnswerText(_vocabulary())
    assert "".join(text.feed(id_) for id_ in ids) + text.end() == tokenizer.decode(ids, skip_special_tokens=True)


def _vocabulary():
    return Vocabulary(tiny()[1])


def fed(text: str, stop, pieces=1):
    reader = AnswerText(_vocabulary(), stop)
    ids = tiny()[1](text)["input_ids"]
    out = "".join(reader.feed(id_) for id_ in ids)
    return out + reader.end(), reader


@pytest.mark.parametrize(
    "text, stop, want",
    [
        ("one END two", ["END"], "one "),
        ("one EN", ["END"], "one EN"),
        ("aab", ["ab"], "a"),
        ("xENENDy", ["END"], "xEN"),
        ("abc", ["bc", "b"], "a"),
        ("no stop", [], "no stop"),
    ],
)
def test_stop_texts_by_hand(text, stop, want):
    got, reader = fed(text, stop)
    assert got == want and reader.stopped == (want != text)
    assert reader.cut == (len(want) if reader.stopped else -1)


@settings(deadline=None, derandomize=True)
@given(st.text("abE", max_size=12), st.lists(st.text("abE", min_size=1, max_size=3), max_size=3))
def test_nothing_of_a_stop_text_is_shown(text, stop):
    got, reader = fed(text, stop)
    assert text.startswith(got) and not any(one in got for one in stop)
    assert reader.stopped or got == text


def read(notation, text, size):
    reader = ToolReader(notation, ["weather", "time"])
    parts = []
    for at in range(0, len(text), size):
        parts += reader.feed(text[at : at + size])
    parts += reader.end()
    said = "".join(one for one in parts if isinstance(one, str))
    return said, [(one.name, json.loads(one.arguments)) for one in parts if isinstance(one, ToolCall)]


CALL = '{"name": "weather", "arguments": {"city": "Bern"}}'


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    "notation, text, said, calls",
    [
        ("hermes", f"Let me see.<tool_call>\n{CALL}\n</tool_call>", "Let me see.", [("weather", {"city": "Bern"})]),
        (
            "hermes",
            f"<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>",
            "",
            [("weather", {"city": "Bern"})] * 2,
        ),
        ("hermes", "<tool_call>{broken</tool_call> after", "<tool_call>{broken</tool_call> after", []),
        ("hermes", '<tool_call>{"name": "rm"}</tool_call>', '<tool_call>{"name": "rm"}</tool_call>', []),
        ("hermes", f"<tool_call>{CALL}", "", [("weather", {"city": "Bern"})]),
        ("hermes", "a < b and <tool", "a < b and <tool", []),
        ("mistral", f"[TOOL_CALLS] [{CALL}]", "", [("weather", {"city": "Bern"})]),
        ("mistral", "[TOO much text", "[TOO much text", []),
        ("llama3", '{"name": "time", "parameters": {"zone": 1}}', "", [("time", {"zone": 1})]),
        ("llama3", '{"temperature": 3}', '{"temperature": 3}', []),
        ("llama3", "It is 3 o'clock {about}", "It is 3 o'clock {about}", []),
        ("", f"<tool_call>{CALL}</tool_call>", f"<tool_call>{CALL}</tool_call>", []),
    ],
)
def test_tool_calls_by_hand(notation, text, said, calls, size):
    assert read(notation, text, size) == (said, calls)


@settings(deadline=None, derandomize=True)
@given(
    st.text('{}"<tool_call>/ab', max_size=60), st.integers(1, 5), st.sampled_from(["hermes", "mistral", "llama3", ""])
)
def test_what_is_no_call_stays_text_to_the_letter(text, size, notation):
    assert read(notation, text, size) == (text, [])


@pytest.mark.parametrize(
    "template, want",
    [(None, None), ("{{ messages }}", None), (TOOL_TEMPLATE, "hermes"), ("tools [TOOL_CALLS]", "mistral"),
     ("tools Environment: ipython", "llama3"), ("tools <tool_call><function=", ""), ("tools", "")],
)  # fmt: skip
def test_the_notation_of_a_template(template, want):
    assert format_of(template) == want


def test_a_call_cannot_be_forced_in_an_unknown_notation():
    with pytest.raises(ValueError, match="cannot be enforced"):
        forced_grammar(TOOLS, "required", "")
