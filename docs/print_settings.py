"""Prints the settings tables of docs/run_folders.md from the dataclasses, so that the page says what the code does.

`python docs/print_settings.py` writes the tables into the page; tests/docs/test_reference.py compares.
"""

import dataclasses
import importlib
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from plumbline.align.models.start import ModelSettings  # noqa: E402
from plumbline.align.runtime.launch import trainer_defaults  # noqa: E402
from plumbline.paths import HOME  # noqa: E402

PAGE = ROOT / "docs" / "run_folders.md"
BEGIN, END = "<!-- settings: begin -->", "<!-- settings: end -->"
COMMANDS = {  # command -> (module, class of its settings, TRL's settings that it takes besides)
    "upcycle": ("plumbline.apps.commands.upcycle", "UpcycleSettings", ""),
    "self-answers": ("plumbline.align.self_answers", "SelfAnswerSettings", ""),
    "sft": ("plumbline.align.sft", "SFTSettings", "SFTConfig"),
    "reward-model": ("plumbline.align.reward_model", "RewardModelSettings", "RewardConfig"),
    "ppo": ("plumbline.align.rl.settings", "PPOSettings", ""),
    "sample-pairs": ("plumbline.align.sample_pairs", "PairSettings", ""),
    "dpo": ("plumbline.align.dpo", "DPOSettings", "DPOConfig"),
    "demo": ("plumbline.apps.demo", "DemoSettings", ""),
}


def rows(settings: type, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """(name, default, help) of every setting; those of a nested dataclass as `group.name`."""
    types = typing.get_type_hints(settings)
    for field in dataclasses.fields(settings):
        kind = types[field.name]
        if dataclasses.is_dataclass(kind):
            yield from rows(typing.cast(type, kind), f"{prefix}{field.name}.")
            continue
        yield f"{prefix}{field.name}", shown(field), field.metadata.get("help", "")


def shown(field: dataclasses.Field[Any]) -> str:
    """The default as one would write it in a settings file."""
    value = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
    if value is dataclasses.MISSING:
        return "must be given"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return "none" if value is None else f"`{str(value).replace(f'{HOME}/', '')}`"


def table(settings: type, without: set[tuple[str, str, str]]) -> str:
    lines = ["| setting | default | what it is |", "|---|---|---|"]
    for name, default, text in rows(settings):
        if (name, default, text) not in without:
            lines.append(f"| `{name}` | {default} | {text.replace('|', chr(92) + '|')} |")
    return "\n".join(lines)


def tables() -> str:
    """The settings of every stage, those that several share only once."""
    shared = set(rows(ModelSettings))
    parts = [f"### Shared by all training stages\n\n{table(ModelSettings, set())}"]
    ppo: set[tuple[str, str, str]] = set()
    for command, (module, name, trl) in COMMANDS.items():
        settings = getattr(importlib.import_module(module), name)
        without = (shared if issubclass(settings, ModelSettings) else set()) | (
            ppo if command == "sample-pairs" else set()
        )
        if command == "ppo":
            ppo = set(rows(settings))
        more = f"\n\nBesides these it takes every setting of TRL's `{trl}`." if trl else ""
        more += "\n\nBesides these it takes the settings of `ppo`." if command == "sample-pairs" else ""
        parts.append(f"### {command}\n\n{table(settings, without)}{more}")
    own = "\n".join(f"| `{name}` | {why} |" for name, why in _defaults())
    parts.append(
        "### Where TRL's settings have other defaults here\n\nA settings file or a flag overrides each.\n\n"
        f"| setting | default here |\n|---|---|\n{own}"
    )
    return "\n\n".join(parts)


def _defaults() -> Iterator[tuple[str, str]]:
    by_machine = {"use_cpu": "true on a machine without a GPU", "bf16": "true where the hardware multiplies bf16"}
    for name, value in trainer_defaults().items():
        yield name, by_machine.get(name) or f"`{str(value).lower() if isinstance(value, bool) else value}`"


def page() -> str:
    """The page with its tables made anew."""
    text = PAGE.read_text(encoding="utf-8")
    before, after = text.index(BEGIN) + len(BEGIN), text.index(END)
    return f"{text[:before]}\n{tables()}\n{text[after:]}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
