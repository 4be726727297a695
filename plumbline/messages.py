"""Conversations as people write them down, brought to one form: lists of messages with a role and a content.

A message is {"role", "content"} with the content a text, and whatever else a chat template can use: `tool_calls`, `name`,
`tool_call_id`, `reasoning_content`, `thinking`. What cannot be understood is refused with place, field and rule, and
nothing is dropped without a word: a part of a content that is no text (an image) is an error.

The forms of a row are recognised by its fields:

- `messages` (OpenAI, TRL), also with `tools`; `conversations` of from/value (ShareGPT), also with `system` and `tools`
- `prompt` and `answer`, `completion`, `response` or `output`; `question` and `answer`; texts or messages
- `instruction`, `input`, `output` (Alpaca), also with `history`
- a `system` (or `system_prompt`) column beside any of these becomes the first message
"""

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from plumbline.rows import Row, parse_value

Message = dict[str, Any]
Messages = list[Message]

ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "ai", "model"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "function", "observation", "ipython", "tool_response"), "tool"),
}
KEPT = ("tool_calls", "name", "tool_call_id", "reasoning_content", "thinking")  # beside role and content
CONVERSATIONS = ("messages", "conversations", "conversation")
PROMPTS = ("prompt", "instruction", "question", "query")
ANSWERS = ("answer", "completion", "response", "output")
SYSTEMS = ("system", "system_prompt")
_TEXT_PARTS = ("text", "input_text", "output_text")
_AS_TEXT = re.compile(r"\s*\[\s*\{\s*(['\"])(?:role|content|from|value)\1\s*:")


@dataclass(frozen=True, kw_only=True)
class Example:
    """A prompt and its answer: messages that end with the assistant's, who may have called tools.

    form   how the row was understood, for the reader's one line
    tools  what was offered to the assistant, as JSON schemas of functions; None: nothing
    """

    prompt: Messages
    answer: Messages
    form: str
    tools: list[Any] | None = None


def last_user_text(prompt: Messages | str) -> str:
    """What reports show of a prompt: its last user turn, or the last message where no user speaks."""
    if isinstance(prompt, str):
        return prompt
    return next((m["content"] for m in reversed(prompt) if m["role"] == "user"), prompt[-1]["content"])


def say_forms(what: str, source: Any, forms: Counter[str]) -> str:
    """'sft: read 330 rows of data.jsonl as messages'."""
    total = sum(forms.values())
    kinds = ", ".join(f"{count} as {form}" if len(forms) > 1 else f"as {form}" for form, count in forms.most_common())
    return f"{what}: read {total} row{'s' * (total != 1)} of {source} {kinds}"


def read_example(place: str, row: Row, *, empty_answers: bool = False) -> Example:
    """The prompt and the answer that a row holds, in any of the forms above; an empty answer is refused unless asked for.

    Raises:
        ValueError: with place, field and rule for a row in none of the forms, or one that breaks its own.
    """
    tools = tools_of(place, row)
    name, asked, said = (_first(row, names) for names in (CONVERSATIONS, PROMPTS, ANSWERS))
    if name is not None and (row[name] is not None or asked is None):
        messages = with_system(place, row, as_messages(place, name, row[name], "assistant"))
        if messages[-1]["role"] != "assistant":
            role = messages[-1]["role"]
            raise ValueError(f"{place}: {name} ends with role {role!r}; its last message must be 'assistant'")
        if all(m["role"] == "system" for m in messages[:-1]):
            raise ValueError(f"{place}: {name} hold an answer and no prompt; add the user's turn")
        if not empty_answers:
            _refuse_empty(place, name, messages[-1])
        raw = row[name]
        form = "ShareGPT conversations" if isinstance(raw, list) and "from" in raw[0] else name
        return Example(prompt=messages[:-1], answer=messages[-1:], form=form, tools=tools)
    if asked is None or said is None:
        missing = PROMPTS if asked is None else ANSWERS
        other = " (a text to continue has no prompt: SFT trains on answers)" if "text" in row else ""
        raise ValueError(
            f"{place}: none of the fields {', '.join(missing)} or {', '.join(CONVERSATIONS)} is there "
            f"(found {sorted(row)}){other}; name the columns so, or drop the row"
        )
    prompt = _asked(place, row, asked)
    answer = as_messages(place, said, row[said], "assistant")
    prompt, answer = without_prompt(place, said, prompt, answer)
    if not empty_answers:
        _refuse_empty(place, said, answer[-1])
    form = f"{asked}/{said}" + (" (Alpaca)" if (asked, said) == ("instruction", "output") else "")
    return Example(prompt=prompt, answer=answer, form=form, tools=tools)


def read_prompt(place: str, row: Row) -> tuple[Messages, str]:
    """(what is asked, form) of a row: a prompt alone, or that of an example, whose answer is left out."""
    asked = _first(row, PROMPTS)
    if asked is not None:
        return _asked(place, row, asked), asked
    name = _first(row, CONVERSATIONS)
    if name is None:
        raise ValueError(
            f"{place}: none of the fields {', '.join((*PROMPTS, *CONVERSATIONS))} is there (found {sorted(row)}); "
            "name the column of prompts so, or drop the row"
        )
    messages = with_system(place, row, as_messages(place, name, row[name], "user"))
    while messages and messages[-1]["role"] != "user":
        messages.pop()
    if not messages:
        raise ValueError(f"{place}: {name} hold no turn of the user; add one, or drop the row")
    _refuse_empty(place, name, messages[-1])
    return messages, f"prompts of {name}"


def read_answer(place: str, row: Row, names: tuple[str, ...]) -> str:
    """The text of the first of these fields that the row has, an answer of the assistant; ValueError for none or an empty one."""
    name = _first(row, names)
    if name is None:
        raise ValueError(f"{place}: field {names[0]!r} is missing (found {sorted(row)}); add it or drop the row")
    messages = as_messages(place, name, row[name], "assistant")
    _refuse_empty(place, name, messages[-1])
    return messages[-1]["content"].strip()


def _first(row: Row, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if row.get(name) is not None), next((n for n in names if n in row), None))


def _asked(place: str, row: Row, name: str) -> Messages:
    """The prompt in a field of its own, with Alpaca's `input` and `history`, and a system prompt that stands beside it."""
    value = row[name]
    if name == "instruction" and isinstance(value, str):
        more = row.get("input")
        if isinstance(more, str) and more.strip():
            value = f"{value}\n\n{more}"
        elif more is not None and not isinstance(more, str):
            raise ValueError(f"{place}: input={more!r:.80} must be a text")
    messages = as_messages(place, name, value, "user")
    history = row.get("history") if name == "instruction" else None
    if history is not None and not isinstance(history, list):
        raise ValueError(f"{place}: history={history!r:.80} must be a list of questions and their answers")
    for at, turn in enumerate(history or []):
        if not isinstance(turn, list) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise ValueError(f"{place}: history[{at}]={turn!r:.80} must be a question and its answer, both texts")
    turns = [
        {"role": role, "content": text}
        for turn in history or []
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    if messages[-1]["role"] != "user":
        raise ValueError(f"{place}: {name} ends with role {messages[-1]['role']!r}; its last message must be 'user'")
    _refuse_empty(place, name, messages[-1])
    return with_system(place, row, [*turns, *messages])


def _refuse_empty(place: str, field: str, message: Message) -> None:
    if not message["content"].strip() and not message.get("tool_calls"):
        raise ValueError(f"{place}: {field} is empty; write a text or drop the row")


def with_system(place: str, row: Row, messages: Messages) -> Messages:
    """The messages behind the text of a system column; unchanged where the row has none, or both say the same."""
    for name in SYSTEMS:
        text = row.get(name)
        if text is None or (isinstance(text, str) and not text.strip()):
            continue
        if not isinstance(text, str):
            raise ValueError(f"{place}: {name}={text!r:.80} must be a text")
        if messages and messages[0]["role"] == "system":
            if messages[0]["content"].strip() != text.strip():
                raise ValueError(
                    f"{place}: {name}={text!r:.60} and the first message {messages[0]['content']!r:.60} are two "
                    "different system prompts; keep one"
                )
            return messages
        return [{"role": "system", "content": text}, *messages]
    return messages


def without_prompt(place: str, field: str, prompt: Messages, answer: Messages) -> tuple[Messages, Messages]:
    """(prompt, answer) where the answer's messages may repeat the prompt, the whole of it or its last turns.

    A system prompt, or earlier turns, that only the answer's side holds are taken from there. ValueError for an answer
    whose user turns are not those of the prompt.
    """
    at = max((n for n, m in enumerate(answer, start=1) if m["role"] in ("user", "system")), default=0)
    head, tail = answer[:at], answer[at:]
    if not tail:
        raise ValueError(
            f"{place}: {field} ends with role {answer[-1]['role']!r}; its last message must be 'assistant'"
        )
    if tail[-1]["role"] != "assistant":
        raise ValueError(f"{place}: {field} ends with role {tail[-1]['role']!r}; its last message must be 'assistant'")
    if not head:
        return prompt, tail
    own_system, own = _split_system(prompt)
    other_system, other = _split_system(head)
    if own_system and other_system and _same(own_system) != _same(other_system):
        raise ValueError(f"{place}: {field} repeats the prompt with another system prompt; keep one")
    system = own_system or other_system
    longer, shorter = (own, other) if len(own) >= len(other) else (other, own)
    if _same(longer)[len(longer) - len(shorter) :] != _same(shorter):
        raise ValueError(
            f"{place}: {field} holds turns of the user that are not those of the prompt; "
            "an answer is what the assistant says last"
        )
    return [*system, *longer], tail


def _split_system(messages: Messages) -> tuple[Messages, Messages]:
    return (messages[:1], messages[1:]) if messages and messages[0]["role"] == "system" else ([], messages)


def _same(messages: Messages) -> list[Message]:
    return [m | {"content": m["content"].strip()} for m in messages]


def tools_of(place: str, row: Row) -> list[Any] | None:
    """The tools that a row offers (`tools`, or `functions` of OpenAI's older form); JSON as a text is read."""
    value = row.get("tools") if row.get("tools") is not None else row.get("functions")
    if isinstance(value, str):
        value = parse_value(place, "tools", value) if value.strip() else None
    if value is None or value == []:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise ValueError(f"{place}: tools={value!r:.80} must be a list of objects, the schemas of functions")
    return [tool if "function" in tool or "type" in tool else {"type": "function", "function": tool} for tool in value]


# One message


def as_messages(place: str, field: str, value: Any, role: str) -> Messages:
    """Messages of a text (one turn of `role`), of one message, or of a list of messages; never empty."""
    if isinstance(value, str):
        if not _AS_TEXT.match(value):
            return [{"role": role, "content": value}]
        value = parse_value(place, field, value)  # a list that a CSV file, or a careless export, holds as a text
    value = [value] if isinstance(value, dict) else value
    if not isinstance(value, list) or not value:
        raise ValueError(f"{place}: {field}={value!r:.80} must be a text or a list of messages with role and content")
    return [as_message(place, f"{field}[{at}]", message) for at, message in enumerate(value)]


def as_message(place: str, field: str, value: Any) -> Message:
    """One message in the form of this module; role/content and from/value (ShareGPT) are read."""
    if not isinstance(value, dict):
        raise ValueError(f"{place}: {field}={value!r:.80} is no message; it needs a role and a content")
    said = value.get("role", value.get("from"))
    if said == "function_call":  # ShareGPT's way to write a call
        return _function_call(place, field, value.get("value", value.get("content")))
    role = ROLES.get(said.strip().lower()) if isinstance(said, str) else None
    if role is None:
        rule = "needs a role and a content" if said is None else f"has role {said!r:.40}; known are {', '.join(ROLES)}"
        raise ValueError(f"{place}: message {field}={value!r:.80} {rule}")
    message: Message = {"role": role, "content": ""}
    for name in KEPT:
        if value.get(name) not in (None, "", []):
            message[name] = value[name]
    if value.get("reasoning") and "reasoning_content" not in message:
        message["reasoning_content"] = value["reasoning"]
    if isinstance(value.get("function_call"), dict) and "tool_calls" not in message:
        message["tool_calls"] = [{"type": "function", "function": value["function_call"]}]
    if "tool_calls" in message:
        message["tool_calls"] = _tool_calls(place, field, message["tool_calls"])
    for name in ("name", "tool_call_id", "reasoning_content", "thinking"):
        if name in message and not isinstance(message[name], str):
            raise ValueError(f"{place}: {field}.{name}={message[name]!r:.80} must be a text")
    content = next((value[name] for name in ("content", "value") if value.get(name) is not None), None)
    if content is None and isinstance(value.get("refusal"), str):
        content = value["refusal"]
    if content is None:
        if not message.keys() & {"tool_calls", "reasoning_content", "thinking"}:
            known = "is null" if any(n in value for n in ("content", "value")) else "is missing"
            raise ValueError(
                f"{place}: message {field}={value!r:.80} needs a role and a content; its content {known}: "
                "write a text, or drop the row"
            )
        return message
    return message | _content(place, field, content)


def _content(place: str, field: str, content: Any) -> Message:
    if isinstance(content, str):
        return {"content": content}
    if isinstance(content, dict):
        content = [content]
    if not isinstance(content, list):
        raise ValueError(f"{place}: {field}.content={content!r:.80} must be a text or a list of parts")
    texts, thoughts = [], []
    for at, part in enumerate(content):
        kind = part.get("type", "text") if isinstance(part, dict) else None
        if isinstance(part, str):
            texts.append(part)
        elif kind in _TEXT_PARTS and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "thinking" and isinstance(part.get("thinking"), str):
            thoughts.append(part["thinking"])
        else:
            raise ValueError(
                f"{place}: {field}.content[{at}]={part!r:.80} is no part of text; only texts are taken, "
                "no images, sounds or files"
            )
    found: Message = {"content": "".join(texts)}
    return found | ({"reasoning_content": "".join(thoughts)} if thoughts else {})


def _tool_calls(place: str, field: str, calls: Any) -> list[Any]:
    """Calls in OpenAI's form, their arguments as objects: a template that writes JSON would quote a text once more."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise ValueError(f"{place}: {field}.tool_calls={calls!r:.80} must be a list of objects")
    found = []
    for at, call in enumerate(calls):
        call = {name: item for name, item in call.items() if item is not None}
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f"{place}: {field}.tool_calls[{at}]={call!r:.80} needs a function with a name")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str) and arguments.lstrip().startswith("{"):
            arguments = parse_value(place, f"{field}.tool_calls[{at}].function.arguments", arguments)
        named = {"name": function["name"], "arguments": arguments}
        found.append({"type": "function", **(call if "function" in call else {}), "function": named})
    return found


def _function_call(place: str, field: str, value: Any) -> Message:
    call = parse_value(place, field, value) if isinstance(value, str) else value
    calls = call if isinstance(call, list) else [call]
    if not all(isinstance(one, dict) for one in calls):
        raise ValueError(f"{place}: {field}={value!r:.80}: a function call must be an object with name and arguments")
    return {"role": "assistant", "content": "", "tool_calls": _tool_calls(place, field, calls)}
