"""Text that a reader never sees: Unicode tag characters, bidi overrides, runs of zero-width characters, terminal escapes.

What has a use in writing is left alone: joiners inside emoji and in scripts that need them, flags spelled with tags, direction
marks, a byte order mark at the start.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from plumbline.safety.findings import ALL_STAGES, Category, Cost, Finding, ScanItem, Span, Stage

FLAG = re.compile(
    "\U0001f3f4[\U000e0030-\U000e0039\U000e0061-\U000e007a]{2,6}\U000e007f"
)  # flag of a region, as in emoji
# A joiner or variation selector beside an emoji, or a (non-)joiner between letters of Arabic, Indic and south-east Asian scripts;
# a soft hyphen (or a mark against a ligature) between syllables, not between single letters.
USEFUL = re.compile(
    "(?<=[\u00a9-\u3299\U0001f000-\U0001faff\ufe0f\u20e3])[\u200d\ufe0e\ufe0f]|(?<=[0-9#*])\ufe0f(?=\u20e3)"
    "|(?<=[^\\W\\d_][^\\W\\d_])[\u00ad\u200c](?=[^\\W\\d_]{2})"
    "|(?<=[\u0600-\u0dff\u0e00-\u109f\u1780-\u17ff])[\u200b-\u200d]"
)
ANY = re.compile(  # of the characters that the patterns below look for
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\x9b\u00ad\u034f\u180e\u200b-\u200d\u202d\u202e\u2060-\u2064\u3164"
    "\ufe00-\ufe0f\ufeff\uffa0\U000e0000-\U000e01ef]"
)
KINDS = (  # what, pattern, score
    ("tag characters", re.compile("[\U000e0000-\U000e007f]+"), 1.0),
    ("variation selectors that carry data", re.compile("[\ufe00-\ufe0f\U000e0100-\U000e01ef]{3,}"), 0.95),
    ("bidi override", re.compile("[\u202d\u202e]"), 0.9),
    (
        "terminal escape",
        re.compile("\x1b\\[[0-9;?]{0,16}[A-Za-z]|\x1b\\][^\x07\x1b]{0,200}\x07?|\x9b[0-9;]{1,16}[A-Za-z]"),
        0.9,
    ),
    ("zero-width characters inside words", re.compile("(?<=\\w)[\u200b-\u200d\u2060\ufeff\u00ad\u034f]+(?=\\w)"), 0.6),
    ("run of zero-width characters", re.compile("[\u200b-\u200d\u2060-\u2064\ufeff\u180e\u3164\uffa0]{3,}"), 0.8),
    ("control characters", re.compile("[\x00-\x08\x0b\x0c\x0e-\x1a\x1c-\x1f\x7f]+"), 0.5),
)


class HiddenText:
    """One finding a kind of hiding, its spans where. Zero-width characters inside words score more the more there are."""

    version = "1"
    categories: tuple[str, ...] = (Category.HIDDEN_TEXT,)
    stages: frozenset[Stage] = ALL_STAGES
    cost: Cost = "regex"
    folds = False  # a folded text has nothing hidden left

    def __init__(self, *, name: str = "hidden_text") -> None:
        self.name = name

    def scan(self, items: Sequence[ScanItem]) -> list[list[Finding]]:
        return [self._scan(item.text) for item in items]

    def _scan(self, text: str) -> list[Finding]:
        if not ANY.search(text):
            return []
        # Blanked out letter for letter, so that offsets stay.
        shown = FLAG.sub(lambda m: " " * len(m.group()), text)
        shown = USEFUL.sub(" ", " " + shown[1:] if shown.startswith("\ufeff") else shown)
        found = []
        for what, pattern, score in KINDS:
            spans = tuple(Span(start=m.start(), end=m.end(), label=what) for m in pattern.finditer(shown))
            if spans:
                if what.endswith("inside words"):
                    score = min(0.95, score + 0.05 * (len(spans) - 1))
                reason = f"{what}, {len(spans)} times"
                found.append(Finding(
                    scanner=self.name, version=self.version, category=Category.HIDDEN_TEXT, score=score, spans=spans, reason=reason
                ))  # fmt: skip
        return found
