"""Reads SFT pairs, preference pairs and prompts from JSON Lines, and refuses a bad row with file, line, value and rule.

A text field is a plain string (one user turn, one assistant turn) or a list of {"role", "content"} messages. What comes
out is TRL's conversational form, so that the chat template is applied once, by the trainer.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plumbline.policy_models.chat import Messages


@dataclass(frozen=True, kw_only=True)
class PreferencePair:
    """Two answers to one prompt, `chosen` preferred; `margin` >= 0 says how clearly (0: not said).

    p_chosen  share of people who preferred `chosen`, in [0.5, 1]; 0.5 is a tie
    harm      whether people called (chosen, rejected) harmful; None: not said
    """

    prompt: Messages
    chosen: Messages
    rejected: Messages
    margin: float = 0.0
    p_chosen: float = 1.0
    harm: tuple[bool | None, bool | None] = (None, None)
    source: str = ""
    annotator: str = ""
    time: str = ""
    tags: dict[str, str] = field(default_factory=dict)


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (place, row) for each line; place reads `file:line`. ValueError for a missing or malformed file."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; JSON Lines expected, one object a line")
    empty = True
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            place = f"{path}:{number}"
            try:
                row = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{place}: not UTF-8 ({error.reason} at byte {error.start}); save the file as UTF-8"
                ) from None
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{place}: not valid JSON ({error.msg} at column {error.colno}); fix the line"
                ) from None
            if not isinstance(row, dict):
                raise ValueError(f"{place}: an object is expected, found {type(row).__name__}; fix the line")
            empty = False
            yield place, row
    if empty:
        raise ValueError(f"{path}: the file has no rows; at least one is needed")


def read_text(place: str, row: dict[str, Any], names: tuple[str, ...], role: str) -> Messages:
    """The first of `names` that the row has, as messages that end with `role`."""
    name = next((n for n in names if n in row), None)
    if name is None:
        raise ValueError(f"{place}: field {names[0]!r} is missing (found {sorted(row)}); add it or drop the row")
    value = row[name]
    messages = [{"role": role, "content": value}] if isinstance(value, str) else value
    if not isinstance(messages, list) or not messages or not all(_is_message(m) for m in messages):
        raise ValueError(f"{place}: {name}={value!r:.80} must be a string or a list of role/content messages")
    if not messages[-1]["content"].strip():
        raise ValueError(f"{place}: {name} is empty; write a text or drop the row")
    if messages[-1]["role"] != role:
        raise ValueError(f"{place}: {name} ends with role {messages[-1]['role']!r}; its last message must be {role!r}")
    return [{"role": m["role"], "content": m["content"]} for m in messages]


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
    )


def read_sft(path: Path) -> list[dict[str, Messages]]:
    """Rows {"prompt", "completion"} for TRL. A row holds prompt and answer (or completion), or whole `messages`."""
    pairs = []
    for place, row in read_rows(path):
        if "messages" in row:
            messages = read_text(place, row, ("messages",), "assistant")
            prompt, completion = messages[:-1], messages[-1:]
            if not prompt:
                raise ValueError(f"{place}: messages hold an answer and no prompt; add the user's turn")
        else:
            prompt = read_text(place, row, ("prompt",), "user")
            completion = read_text(place, row, ("answer", "completion"), "assistant")
        pairs.append({"prompt": prompt, "completion": completion})
    return pairs


def read_preferences(path: Path) -> list[PreferencePair]:
    """Preference pairs; ValueError when chosen and rejected are the same text, a prompt is empty, a margin below 0."""
    pairs = []
    for place, row in read_rows(path):
        prompt = read_text(place, row, ("prompt",), "user")
        chosen = read_text(place, row, ("chosen",), "assistant")
        rejected = read_text(place, row, ("rejected",), "assistant")
        if chosen[-1]["content"].strip() == rejected[-1]["content"].strip():
            raise ValueError(f"{place}: chosen and rejected are the same text; drop the pair or relabel it")
        margin = row.get("margin", 0.0)
        if isinstance(margin, bool) or not isinstance(margin, int | float) or not 0 <= margin < math.inf:
            raise ValueError(f"{place}: margin={margin!r} must be a finite number of at least 0")
        p_chosen = row.get("p_chosen", 1.0)
        if isinstance(p_chosen, bool) or not isinstance(p_chosen, int | float) or not 0.5 <= p_chosen <= 1:
            raise ValueError(f"{place}: p_chosen={p_chosen!r} must be a share from 0.5 (a tie) to 1; swap the answers")
        harm = (row.get("chosen_harmful"), row.get("rejected_harmful"))
        if not all(one is None or isinstance(one, bool) for one in harm):
            raise ValueError(f"{place}: chosen_harmful, rejected_harmful={harm!r} must be true, false or absent")
        tags = {name: row[name] for name in ("axis", "kind", "category", "topic") if isinstance(row.get(name), str)}
        pairs.append(
            PreferencePair(
                prompt=prompt,
                chosen=chosen,
                rejected=rejected,
                margin=float(margin),
                p_chosen=float(p_chosen),
                harm=harm,
                source=str(row.get("source", path.name)),
                annotator=str(row.get("annotator", "")),
                time=str(row.get("time", "")),
                tags=tags,
            )
        )
    return pairs


def read_prompts(path: Path) -> list[Messages]:
    """Prompts for rollouts, each a conversation that ends with the user."""
    return [read_text(place, row, ("prompt",), "user") for place, row in read_rows(path)]


def last_user_text(prompt: Messages) -> str:
    """What rewards and reports show of a prompt: its last user turn."""
    return prompt[-1]["content"]


def split_pairs(pairs: list[PreferencePair], every: int) -> tuple[list[PreferencePair], list[PreferencePair]]:
    """(train, held out): one prompt in `every`, by its hash, is held out with all its pairs; 0 holds out none."""

    def held_out(pair: PreferencePair) -> bool:
        digest = hashlib.sha256(last_user_text(pair.prompt).strip().lower().encode()).digest()
        return bool(every) and int.from_bytes(digest[:4], "big") % every == 0

    return [p for p in pairs if not held_out(p)], [p for p in pairs if held_out(p)]
