"""Tool calls, in the notation that a model's own chat template teaches it.

Three notations are read and can be enforced: that of Hermes and Qwen (`<tool_call>{...}</tool_call>`), Mistral's
(`[TOOL_CALLS] [...]`) and Llama 3's (the answer is one JSON object). Under a template with tools in another notation, calls stay
text. What does not parse, or names a tool that was not offered, stays text too: nothing that the model said is lost.
"""

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from plumbline.safety.constrained.grammar import Grammar

OPEN, CLOSE = "<tool_call>", "</tool_call>"
MISTRAL, PYTHON_TAG = "[TOOL_CALLS]", "<|python_tag|>"
MARKS = (OPEN, CLOSE, MISTRAL, PYTHON_TAG)  # shown in the text of an answer even where they are special tokens
Schema = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class ToolCall:
    """A call; `arguments` is JSON."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{secrets.token_hex(12)}")


def format_of(template: str | None) -> str | None:
    """The notation of a chat template: "hermes", "mistral", "llama3", "" for another one, None for no tools at all."""
    if not template or "tools" not in template:
        return None
    if OPEN in template:
        return "" if "<function=" in template else "hermes"
    if MISTRAL in template:
        return "mistral"
    if "python_tag" in template or '"parameters"' in template or "ipython" in template:
        return "llama3"
    return ""


def names_of(tools: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of the tools of a request."""
    return [tool["function"]["name"] for tool in tools]


def forced_grammar(tools: Sequence[Mapping[str, Any]], choice: Any, notation: str) -> Grammar:
    """One call of any tool ("required"), or of the one that `choice` names; ValueError where that cannot be enforced."""
    if notation not in ("hermes", "mistral", "llama3"):
        raise ValueError("tool_choice cannot be enforced in the notation of this model's template; use 'auto'")
    wanted = names_of(tools) if choice == "required" else [choice["function"]["name"]]
    key = "parameters" if notation == "llama3" else "arguments"
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool["function"]["name"]},
                key: tool["function"].get("parameters") or {"type": "object"},
            },
            "required": ["name", key],
            "additionalProperties": False,
        }
        for tool in tools
        if tool["function"]["name"] in wanted
    ]
    schema: Schema = {"x-guidance": {"whitespace_flexible": False}, "anyOf": calls}
    for call in calls:  # what `json_schema` would refuse
        Grammar.json_schema(call)
    before, after = {"hermes": (f"{OPEN}\n", f"\n{CLOSE}"), "mistral": (f"{MISTRAL} [", "]"), "llama3": ("", "")}[
        notation
    ]
    parts = [*([json.dumps(before)] if before else []), "call", *([json.dumps(after)] if after else [])]
    return Grammar.lark(f"start: {' '.join(parts)}\ncall: %json {json.dumps(schema)}\n")


class ToolReader:
    """Splits checked text into what is said and what is called. `feed` and `end` return strings and ToolCalls, in order."""

    def __init__(self, notation: str, names: Sequence[str]) -> None:
        self.notation, self.names = notation, set(names)
        self._held = ""
        self._after_call = False  # the line ends between calls belong to the notation

    def feed(self, text: str) -> list[str | ToolCall]:
        """What is settled after more text."""
        self._held += text
        if self.notation == "hermes":
            return self._hermes(final=False)
        if self.notation in ("mistral", "llama3"):
            return self._until_the_end()
        said, self._held = self._held, ""
        return [said] if said else []

    def end(self) -> list[str | ToolCall]:
        """The rest."""
        if self.notation == "hermes":
            return self._hermes(final=True)
        text, self._held = self._held, ""
        if not text:
            return []
        if self.notation == "mistral" and text.lstrip().startswith(MISTRAL):
            return self._calls(text.lstrip()[len(MISTRAL) :], "arguments") or [text]
        if self.notation == "llama3":
            return self._calls(text.strip().removeprefix(PYTHON_TAG), "parameters") or [text]
        return [text]

    def _hermes(self, *, final: bool) -> list[str | ToolCall]:
        out: list[str | ToolCall] = []
        while True:
            if self._after_call:
                self._held = self._held.lstrip("\n")
                self._after_call = not self._held
            at = self._held.find(OPEN)
            if at < 0:
                keep = 0 if final else _overlap(self._held, OPEN)
                said, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
                return out + ([said] if said else [])
            end = self._held.find(CLOSE, at)
            if end < 0 and not final:
                said, self._held = self._held[:at], self._held[at:]
                return out + ([said] if said else [])
            stop = len(self._held) if end < 0 else end + len(CLOSE)
            inside = self._held[at + len(OPEN) : stop if end < 0 else end]
            calls = self._calls(inside, "arguments")
            said = self._held[:at] if calls else self._held[:stop]
            if said.strip() or not calls:
                out.append(said)
            out += calls
            self._held, self._after_call = self._held[stop:], bool(calls)

    def _until_the_end(self) -> list[str | ToolCall]:
        """Text goes out at once unless the answer may be a call, which is known from how it begins."""
        start = self._held.lstrip()
        marks = (MISTRAL,) if self.notation == "mistral" else ("{", PYTHON_TAG)
        if not start or any(start.startswith(mark) or mark.startswith(start) for mark in marks):
            return []
        said, self._held = self._held, ""
        self.notation = ""
        return [said]

    def _calls(self, text: str, key: str) -> list[str | ToolCall]:
        """The calls in a JSON object or a list of them, all of them or none."""
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            return []
        calls: list[str | ToolCall] = []
        for one in found if isinstance(found, list) else [found]:
            if not isinstance(one, dict) or one.get("name") not in self.names:
                return []
            arguments = one.get(key, one.get("arguments", {}))
            if not isinstance(arguments, dict):
                return []
            calls.append(ToolCall(name=one["name"], arguments=json.dumps(arguments, ensure_ascii=False)))
        return calls


def _overlap(text: str, mark: str) -> int:
    """Characters at the end of a text that begin a mark."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0)
