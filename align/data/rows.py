"""What the stages are given: SFT examples, preference pairs and prompts, from any file or form that is understood.

Files are read by `plumbline.rows`, rows are understood by `plumbline.messages`; a bad row is refused with file, line,
value and rule, and each reader says in one line what it took the rows for. What comes out are messages, so that the
chat template is applied once, by the stage.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from plumbline.align.data.formats import PreferencePair, read_preferences
from plumbline.messages import CONVERSATIONS, Messages, last_user_text, read_example, read_prompt, say_forms, tools_of
from plumbline.rows import Row, read_rows

__all__ = [
    "Messages",
    "PreferencePair",
    "last_user_text",
    "read_preferences",
    "prompts_with_kinds",
    "read_prompts",
    "read_rows",
    "read_sft",
    "split_pairs",
]


def read_sft(source: str | Path, *, split: str = "train") -> list[dict[str, Any]]:
    """Rows {"prompt", "completion"} of messages, and "tools" where a row offers some.

    Of a conversation, the last turn is the completion. A conversation whose last turn OpenAI's `weight` of 0 takes out
    of training is left out and counted.
    """
    rows, forms, weightless = [], Counter[str](), 0
    for place, row in read_rows(source, split=split):
        found = read_example(place, row)
        if _weightless(row):
            weightless += 1
            continue
        forms[found.form] += 1
        tools = {"tools": found.tools} if found.tools else {}
        rows.append({"prompt": found.prompt, "completion": found.answer, **tools})
    if weightless:
        print(f"data: {weightless} rows of {source} have a last turn of weight 0: left out")
    if not rows:
        raise ValueError(f"{source}: all {weightless} rows have a last turn of weight 0; nothing is left to train on")
    print(say_forms("data", source, forms))
    return rows


def _weightless(row: Row) -> bool:
    """Whether the last message says weight 0."""
    messages: Any = next((row[name] for name in CONVERSATIONS if isinstance(row.get(name), list)), None)
    return bool(messages) and isinstance(messages[-1], dict) and messages[-1].get("weight") == 0


def read_prompts(source: str | Path, *, split: str = "train") -> list[Messages]:
    """Prompts for rollouts, each a conversation that ends with the user; answers beside them are left out.

    Rows that offer tools are left out and counted: a rollout has nothing that would answer a call.
    """
    prompts, forms, tools = [], Counter[str](), 0
    for place, row in read_rows(source, split=split):
        prompt, form = read_prompt(place, row)
        if _asks_tools(place, row, prompt):
            tools += 1
            continue
        forms[form] += 1
        prompts.append(prompt)
    if tools:
        print(f"data: {tools} prompts of {source} come with tools, which a rollout cannot answer: left out")
    if not prompts:
        raise ValueError(f"{source}: all {tools} prompts come with tools, which a rollout cannot answer; add others")
    print(say_forms("data", source, forms))
    return prompts


def _asks_tools(place: str, row: Row, prompt: Messages) -> bool:
    return tools_of(place, row) is not None or any(m.get("tool_calls") or m["role"] == "tool" for m in prompt)


def prompts_with_kinds(source: str | Path, *, split: str = "train") -> list[tuple[Messages, str | None]]:
    """The prompts that `read_prompts` gives, each with the field `kind` of its row, None where there is none. Says nothing."""
    labelled = []
    for place, row in read_rows(source, split=split):
        prompt, _ = read_prompt(place, row)
        if not _asks_tools(place, row, prompt):
            labelled.append((prompt, row["kind"] if isinstance(row.get("kind"), str) else None))
    return labelled


def split_pairs(pairs: Sequence[PreferencePair], every: int) -> tuple[list[PreferencePair], list[PreferencePair]]:
    """(train, held out): one prompt in `every`, by its hash, is held out with all its pairs; 0 holds out none."""

    def held_out(pair: PreferencePair) -> bool:
        digest = hashlib.sha256(last_user_text(pair.prompt).strip().lower().encode()).digest()
        return bool(every) and int.from_bytes(digest[:4], "big") % every == 0

    return [p for p in pairs if not held_out(p)], [p for p in pairs if held_out(p)]
