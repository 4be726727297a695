"""Conversations in the forms people write them in: what is kept, what is refused, what a row's fields are taken for."""

from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from plumbline.messages import as_message, as_messages, last_user_text, read_example, read_prompt, say_forms, tools_of

USER, BOT = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"id": "c1", "type": "function", "function": {"name": "tide", "arguments": '{"port": "Leith"}'}}
CALLED = CALL | {"function": {"name": "tide", "arguments": {"port": "Leith"}}}
TOOL = {"type": "function", "function": {"name": "tide", "parameters": {}}}

SAME = {  # every one of these says: user asks Why?, assistant answers Because.
    "prompt/answer": {"prompt": "Why?", "answer": "Because."},
    "prompt/completion": {"prompt": [USER], "completion": [BOT]},
    "prompt/response": {"prompt": "Why?", "response": "Because."},
    "question/answer": {"question": "Why?", "answer": "Because."},
    "instruction/output (Alpaca)": {"instruction": "Why?", "input": "", "output": "Because."},
    "messages": {"messages": [USER, BOT]},
    "ShareGPT conversations": {
        "conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]
    },
    "conversation": {
        "conversation": [{"role": "User", "content": "Why?"}, {"role": "Assistant", "content": "Because."}]
    },
}


@pytest.mark.parametrize("form", SAME)
def test_each_form_gives_the_same_example_and_says_its_name(form):
    found = read_example("f:1", SAME[form])
    assert (found.prompt, found.answer, found.form, found.tools) == ([USER], [BOT], form, None)


@pytest.mark.parametrize("form", SAME)
def test_a_system_column_becomes_the_first_message(form):
    for name in ("system", "system_prompt"):
        assert read_example("f:1", SAME[form] | {name: "Be brief."}).prompt == [SYSTEM, USER]
    assert read_example("f:1", SAME[form] | {"system": None}).prompt == [USER]
    assert read_example("f:1", SAME[form] | {"system": " "}).prompt == [USER]
    asked, _ = read_prompt("f:1", SAME[form] | {"system": "Be brief."})
    assert asked == [SYSTEM, USER]


def test_two_system_prompts_are_one_or_an_error():
    row = {"messages": [SYSTEM, USER, BOT]}
    assert read_example("f:1", row | {"system": "Be brief. "}).prompt == [SYSTEM, USER]
    with pytest.raises(
        ValueError, match=r"f:1: system='Be long\.' and the first message .* two different system prompts"
    ):
        read_example("f:1", row | {"system": "Be long."})


def test_alpaca_has_an_input_and_a_history():
    row = {"instruction": "Add.", "input": "1 1", "output": "2", "history": [["Hi", "Hello."]]}
    found = read_example("f:1", row)
    assert [m["content"] for m in found.prompt] == ["Hi", "Hello.", "Add.\n\n1 1"]
    with pytest.raises(ValueError, match=r"f:1: history\[0\]=\['Hi'\] must be a question and its answer"):
        read_example("f:1", row | {"history": [["Hi"]]})


def test_an_answer_that_repeats_the_prompt_is_the_answer_alone():
    for answer in ([USER, BOT], [SYSTEM, USER, BOT]):
        found = read_example("f:1", {"prompt": "Why? ", "completion": answer})
        assert found.answer == [BOT] and [m["role"] for m in found.prompt] == [m["role"] for m in answer[:-1]]
    longer = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}, USER]
    for prompt, head in ((longer, [USER]), ([USER], longer)):  # either side may hold more of the talk before
        assert read_example("f:1", {"prompt": prompt, "completion": [*head, BOT]}).prompt == longer
    with pytest.raises(ValueError, match="completion holds turns of the user that are not those of the prompt"):
        read_example("f:1", {"prompt": "Why?", "completion": [{"role": "user", "content": "When?"}, BOT]})


def test_calls_of_tools_are_kept_with_their_arguments_as_objects():
    talk = [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "c1", "content": "14:05", "name": "tide"}, BOT]  # fmt: skip
    found = read_example("f:1", {"messages": talk, "tools": [TOOL]})
    assert found.tools == [TOOL] and found.answer == [BOT]
    assert found.prompt[1] == {"role": "assistant", "content": "", "tool_calls": [CALLED]}
    assert found.prompt[2] == talk[2]
    last = read_example("f:1", {"messages": talk[:2]})  # an answer that is a call
    assert last.answer[0]["tool_calls"] == [CALLED]
    old = as_message("f:1", "m", {"role": "assistant", "content": None, "function_call": CALL["function"]})
    assert old["tool_calls"] == [{"type": "function", "function": CALLED["function"]}]
    gpt = as_message("f:1", "m", {"from": "function_call", "value": '{"name": "tide", "arguments": {"port": "Leith"}}'})
    assert gpt["tool_calls"][0]["function"] == CALLED["function"] and gpt["role"] == "assistant"
    assert as_message("f:1", "m", {"from": "observation", "value": "14:05"})["role"] == "tool"
    assert tools_of("f:1", {"tools": '[{"name": "tide"}]'}) == [{"type": "function", "function": {"name": "tide"}}]


def test_parts_of_text_are_joined_and_thoughts_kept():
    parts = [{"type": "text", "text": "Be"}, {"type": "text", "text": "cause."}]
    assert as_message("f:1", "m", {"role": "assistant", "content": parts}) == BOT
    thinking = {"type": "thinking", "thinking": "hm"}
    assert as_message("f:1", "m", {"role": "assistant", "content": [thinking, *parts]})["reasoning_content"] == "hm"
    said = as_message("f:1", "m", BOT | {"reasoning_content": "hm", "refusal": None, "audio": None, "weight": 1})
    assert said == BOT | {"reasoning_content": "hm"}
    assert as_message("f:1", "m", {"role": "assistant", "content": None, "refusal": "No."})["content"] == "No."
    with pytest.raises(ValueError, match=r"f:1: m\.content\[0\]=\{'type': 'image_url'.* is no part of text"):
        as_message("f:1", "m", {"role": "user", "content": [{"type": "image_url", "image_url": "x"}]})


@pytest.mark.parametrize(
    "row, rule",
    [
        ({"text": "x"}, r"f:1: none of the fields prompt, .*a text to continue has no prompt"),
        ({"prompt": "Why?"}, r"f:1: none of the fields answer, completion"),
        ({"prompt": "Why?", "answer": None}, r"f:1: answer=None must be a text or a list of messages"),
        ({"prompt": "Why?", "answer": " "}, r"f:1: answer is empty"),
        ({"prompt": 3, "answer": "x"}, r"f:1: prompt=3 must be a text"),
        ({"prompt": [BOT], "answer": "x"}, r"f:1: prompt ends with role 'assistant'; its last message must be 'user'"),
        ({"messages": [USER]}, r"f:1: messages ends with role 'user'; its last message must be 'assistant'"),
        ({"messages": [BOT]}, r"f:1: messages hold an answer and no prompt"),
        ({"messages": [SYSTEM, BOT]}, r"f:1: messages hold an answer and no prompt"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, r"f:1: .*messages\[1\].*its content is null"),
        ({"messages": [{"role": "narrator", "content": "x"}, BOT]}, r"f:1: .*has role 'narrator'; known are user"),
        ({"messages": "Why?"}, r"f:1: messages"),
        ({"messages": []}, r"f:1: messages=\[\] must be a text or a list of messages"),
        ({"messages": [["user", "x"]]}, r"f:1: messages\[0\]=.* is no message"),
        ({"prompt": "[{'role': 'user', 'content': 'x'}]", "answer": "x"}, r"f:1: prompt=.*holds JSON as a text, but"),
        (
            {"messages": [USER, BOT], "tools": "no json"},
            r"f:1: tools='no json' holds JSON as a text, but it is not valid",
        ),
        ({"messages": [USER, BOT], "tools": [3]}, r"f:1: tools=\[3\] must be a list of objects"),
    ],
)
def test_what_is_refused_names_place_field_and_rule(row, rule):
    with pytest.raises(ValueError, match=rule):
        read_example("f:1", row)


def test_a_list_that_is_held_as_json_text_is_read():
    assert as_messages("f:1", "prompt", '[{"role": "user", "content": "Why?"}]', "user") == [USER]
    with pytest.raises(ValueError, match="surrogate"):
        as_messages("f:1", "prompt", '[{"role": "user", "content": "\\ud83d"}]', "user")


def test_prompts_alone_and_out_of_conversations():
    assert read_prompt("f:1", {"prompt": "Why?"}) == ([USER], "prompt")
    assert read_prompt("f:1", {"messages": [SYSTEM, USER, BOT]}) == ([SYSTEM, USER], "prompts of messages")
    with pytest.raises(ValueError, match="f:1: messages hold no turn of the user"):
        read_prompt("f:1", {"messages": [BOT]})


def test_words_for_people():
    assert last_user_text([SYSTEM, USER, BOT]) == "Why?" and last_user_text("x") == "x"
    assert say_forms("sft", "a.jsonl", Counter(messages=3)) == "sft: read 3 rows of a.jsonl as messages"
    assert say_forms("sft", "a", Counter(messages=3, x=1)) == "sft: read 4 rows of a 3 as messages, 1 as x"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "type", "text", "tool_calls", "function",
                                       "name", "arguments", "function_call", "thinking"]), inner, max_size=4),
    max_leaves=10,
)  # fmt: skip
ROLES = st.sampled_from(["user", "assistant", "human", "gpt", "tool", "function_call", "system", "x"])
MESSAGE = st.fixed_dictionaries(
    {}, optional={"role": ROLES, "from": ROLES, "content": JSON, "value": JSON, "tool_calls": JSON}
)
FIELDS = st.sampled_from(
    ["prompt", "answer", "messages", "conversations", "instruction", "input", "output", "system", "tools", "history"]
)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(FIELDS, JSON | st.lists(MESSAGE, max_size=3), max_size=5))
def test_any_row_is_an_example_or_a_valueerror(row):
    for read in (read_example, read_prompt):
        try:
            found = read("f:1", row)
        except ValueError as error:
            assert str(error).startswith("f:1: ")
        else:
            messages = found[0] if isinstance(found, tuple) else [*found.prompt, *found.answer]
            assert all(
                isinstance(m["content"], str) and m["role"] in ("system", "user", "assistant", "tool") for m in messages
            )


@pytest.mark.parametrize("history", [7, True, "before", {"a": "b"}])
def test_a_history_that_is_no_list_is_refused(history):
    row = {"instruction": "Go on.", "output": "Yes.", "history": history}
    with pytest.raises(ValueError, match="f:1: history=.* must be a list of questions and their answers"):
        read_example("f:1", row)
