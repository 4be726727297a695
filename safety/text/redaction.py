"""Takes spans out of a text, once, after all scanners have looked: no scanner ever sees what another one changed."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from plumbline.safety.findings import Span
from plumbline.safety.taxonomy import meaning, severity


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """Characters [start, end) to take out because of a category; `how` is "placeholder", "hash" or "vault"."""

    start: int
    end: int
    category: str
    how: str = "placeholder"
    replacement: str | None = None


@dataclass
class Vault:
    """Remembers what stands behind numbered placeholders, so that an answer can get it back. Kept in memory only.

    The same value gets the same placeholder, so that a model can still tell two people apart.
    """

    values: dict[str, str] = field(default_factory=dict)  # placeholder -> value
    key: bytes = field(default_factory=lambda: secrets.token_bytes(16), repr=False)

    def hide(self, value: str, category: str) -> str:
        for placeholder, known in self.values.items():
            if known == value and placeholder.startswith(f"[{_label(category)}_"):
                return placeholder
        number = 1 + sum(placeholder.startswith(f"[{_label(category)}_") for placeholder in self.values)
        placeholder = f"[{_label(category)}_{number}]"
        self.values[placeholder] = value
        return placeholder

    def restore(self, text: str, only: Collection[str] | None = None) -> str:
        """The text with every placeholder of this vault (or of `only`) replaced by its value; unknown ones stay."""
        known = [placeholder for placeholder in self.values if only is None or placeholder in only]
        if not known:
            return text
        return re.sub("|".join(map(re.escape, known)), lambda match: self.values[match.group()], text)

    def digest(self, value: str) -> str:
        """Eight hex digits that are equal for equal values within one vault and say nothing of the value outside it."""
        return hmac.new(self.key, value.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()[:8]


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


def redact(text: str, cuts: Iterable[Cut], vault: Vault | None = None) -> str:
    """The text with each cut replaced by its replacement or a placeholder such as [EMAIL] or, with a vault, [EMAIL_1]."""
    vault = vault or Vault()
    out, at = [], 0
    for cut in merge(cuts):
        value = text[cut.start : cut.end]
        out.append(text[at : cut.start])
        if cut.replacement is not None:
            out.append(cut.replacement)
        elif cut.how == "vault":
            out.append(vault.hide(value, cut.category))
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


def _label(category: str) -> str:
    return re.sub(r"\W+", "_", meaning(category).upper()).strip("_")
