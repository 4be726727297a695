"""Takes spans out of a text, once, after all scanners have looked: no scanner ever sees what another one changed."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from urllib.parse import quote

from plumbline.safety.findings import Span
from plumbline.safety.taxonomy import meaning, severity


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """Characters [start, end) to take out because of a category; `how` is "placeholder", "hash", "vault" or "typed"."""

    start: int
    end: int
    category: str
    how: str = "placeholder"
    replacement: str | None = None


# A numbered placeholder as people, models and programs write it: in any case, escaped for Markdown, HTML or a URL.
PLACEHOLDER = re.compile(
    r"(?P<open>\\{0,2}\[|%5B|&#(?:91|x5B);|&l(?:brack|sqb);) ?"
    r"(?P<label>[A-Z](?:[A-Z0-9]|\\{0,2}_|%5F|-){0,60}?)(?:\\{0,2}_|%5F)(?P<number>[0-9]{1,6})"
    r" ?(?:\\{0,2}\]|%5D|&#(?:93|x5D);|&r(?:brack|sqb);)",
    re.IGNORECASE,
)


def canonical(found: re.Match[str]) -> str:
    """A match of PLACEHOLDER as a vault writes it."""
    label = re.sub(r"%5F|\\{1,2}_|-", "_", found["label"], flags=re.IGNORECASE)
    return f"[{label.upper()}_{found['number']}]"


@dataclass
class Vault:
    """Remembers what stands behind numbered placeholders, so that an answer can get it back. Kept in memory only.

    The same value gets the same placeholder, so that a model can still tell two people apart. Only what the user wrote (`own`) is
    given back: what a tool, a document or the model itself brought in stays a placeholder. A placeholder that somebody typed is no
    placeholder: its number is not given out (`reserved`), and where it is one already, what was typed is hidden behind another.
    """

    values: dict[str, str] = field(default_factory=dict)  # placeholder -> value
    own: set[str] = field(default_factory=set)  # placeholders of what the user wrote
    reserved: set[str] = field(default_factory=set)
    key: bytes = field(default_factory=lambda: secrets.token_bytes(16), repr=False)

    def __post_init__(self) -> None:
        self._known = {(_label_of(placeholder), value): placeholder for placeholder, value in self.values.items()}

    def hide(self, value: str, category: str, *, own: bool = True) -> str:
        """The placeholder of a value. `own`: the user wrote it, and may get it back."""
        return self._hide(value, _label(category), own)

    def _hide(self, value: str, label: str, own: bool) -> str:
        placeholder = self._known.get((label, value))
        if placeholder is None:
            number = self._numbers.get(label, 0) + 1
            while (placeholder := f"[{label}_{number}]") in self.values or placeholder in self.reserved:
                number += 1
            self._numbers[label] = number
            self.values[placeholder] = value
            self._known[label, value] = placeholder
        if own:
            self.own.add(placeholder)
        return placeholder

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {}

    def reserve(self, text: str) -> None:
        """Placeholders in a text that are none of this vault's will never be."""
        self.reserved |= {one for found in PLACEHOLDER.finditer(text) if (one := canonical(found)) not in self.values}

    def typed(self, text: str) -> list[tuple[int, int]]:
        """Where a text spells a placeholder of this vault."""
        return [found.span() for found in PLACEHOLDER.finditer(text) if canonical(found) in self.values]

    def hide_typed(self, literal: str) -> str:
        """A placeholder that gives a typed one back as it was typed."""
        found = PLACEHOLDER.fullmatch(literal)
        return self._hide(literal, _label_of(canonical(found)) if found else "TEXT", True)

    def mask(self, text: str) -> str:
        """The text with every value of this vault replaced by its placeholder, where it stands by itself."""
        behind = {value: placeholder for placeholder, value in self.values.items() if len(value) > 2}
        if not any(value in text for value in behind):
            return text
        longest = sorted(behind, key=len, reverse=True)
        return re.sub("|".join(map(_alone, longest)), lambda found: behind[found.group()], text)

    def restore(self, text: str) -> str:
        """The text with every placeholder of what the user wrote, however it is spelt, replaced by its value; others stay."""

        def value(found: re.Match[str]) -> str:
            placeholder = canonical(found)
            if placeholder not in self.own:
                return found.group()
            hidden = self.values[placeholder]
            return quote(hidden, safe="") if found["open"].startswith("%") else hidden

        return PLACEHOLDER.sub(value, text) if self.own else text

    def digest(self, value: str) -> str:
        """Eight hex digits that are equal for equal values within one vault and say nothing of the value outside it."""
        return hmac.new(self.key, value.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()[:8]


def _alone(value: str) -> str:
    """A pattern for a value that no letter or digit goes on from."""
    before = r"(?<![0-9A-Za-z])" if value[0].isascii() and value[0].isalnum() else ""
    behind = r"(?![0-9A-Za-z])" if value[-1].isascii() and value[-1].isalnum() else ""
    return before + re.escape(value) + behind


def merge(cuts: Iterable[Cut]) -> list[Cut]:
    """Cuts that do not overlap, in order.

    What overlaps becomes one cut over all of it, under the category of the longest (then the most severe) of them: a
    character that any finding wanted out is out.
    """
    merged: list[list[Cut]] = []
    reach = -1
    for cut in sorted(cuts, key=lambda cut: (cut.start, cut.end)):
        if cut.start == cut.end:
            continue
        if merged and cut.start < reach:
            merged[-1].append(cut)
        else:
            merged.append([cut])
        reach = max(reach, cut.end)
    out = []
    for group in merged:
        best = max(group, key=lambda cut: (cut.end - cut.start, severity(cut.category)))
        start, end = min(cut.start for cut in group), max(cut.end for cut in group)
        whole = best.start == start and best.end == end
        out.append(
            Cut(
                start=start,
                end=end,
                category=best.category,
                how=best.how,
                replacement=best.replacement if whole else None,
            )
        )
    return out


def redact(text: str, cuts: Iterable[Cut], vault: Vault | None = None, *, own: bool = True, ours: bool = False) -> str:
    """The text with each cut replaced by its replacement or a placeholder such as [EMAIL] or, with a vault, [EMAIL_1].

    own: the user wrote the text, and may get back what is hidden. ours: the text may hold placeholders of the vault; in any
    other, those were typed, and are hidden themselves.
    """
    vault = vault or Vault()
    cuts = list(cuts)
    if not ours:
        vault.reserve(text)
        taken = merge(cuts)
        cuts += [
            Cut(start=start, end=end, category="typed", how="typed")
            for start, end in vault.typed(text)
            if not any(cut.start < end and start < cut.end for cut in taken)
        ]
    out, at = [], 0
    for cut in merge(cuts):
        value = text[cut.start : cut.end]
        out.append(text[at : cut.start])
        if cut.replacement is not None:
            out.append(cut.replacement)
        elif cut.how == "typed":
            out.append(vault.hide_typed(value))
        elif cut.how == "vault":
            out.append(vault.hide(value, cut.category, own=own))
        elif cut.how == "hash":
            out.append(f"[{_label(cut.category)}:{vault.digest(value)}]")
        else:
            out.append(f"[{_label(cut.category)}]")
        at = cut.end
    out.append(text[at:])
    return "".join(out)


def cuts_of(spans: Sequence[Span], category: str, how: str, length: int) -> list[Cut]:
    """What a finding wants out of a text of `length` characters: its spans, or everything if it names none."""
    if not spans:
        return [Cut(start=0, end=length, category=category, how=how)]
    return [
        Cut(
            start=min(span.start, length),
            end=min(span.end, length),
            category=category,
            how=how,
            replacement=span.replacement,
        )
        for span in spans
    ]


def _label_of(placeholder: str) -> str:
    return placeholder[1:-1].rpartition("_")[0]


def _label(category: str) -> str:
    return re.sub(r"\W+", "_", meaning(category).upper()).strip("_")
