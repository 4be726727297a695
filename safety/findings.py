"""What a scanner reports. A scanner never changes text and never decides an action: the policy does."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum


class Category(StrEnum):
    """Hazards by their MLCommons AILuminate v1.0 code; `x_`, `out_` and `tox` codes are ours."""

    VIOLENT_CRIMES = "vcr"
    NON_VIOLENT_CRIMES = "ncr"
    SEX_CRIMES = "src"
    CHILD_EXPLOITATION = "cse"
    SELF_HARM = "ssh"
    INDISCRIMINATE_WEAPONS = "iwp"
    HATE = "hte"
    DEFAMATION = "dfm"
    PRIVACY = "prv"
    INTELLECTUAL_PROPERTY = "ipv"
    SEXUAL_CONTENT = "sxc"
    SPECIALISED_ADVICE = "spc"
    JAILBREAK = "x_jbk"
    REFUSAL = "out_refusal"
    TOXICITY = "tox"


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """Characters [start, end) of the original text."""

    start: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.end:
            raise ValueError(f"span [{self.start}, {self.end}) must satisfy 0 <= start <= end")


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that one scanner saw in one text.

    scanner   name of the scanner instance (two instances of one class have two names)
    version   of the scanner: the first characters of the hash of its weights
    category  what it saw
    score     calibrated risk, 0 surely fine to 1 surely not; thresholds live in the policy
    spans     where, in the original text; empty means the whole text
    reason    one line for a person; never holds the text itself
    """

    scanner: str
    version: str
    category: Category
    score: float
    spans: tuple[Span, ...] = ()
    reason: str = ""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.score) and 0 <= self.score <= 1):
            raise ValueError(f"{self.scanner}: score {self.score} of a finding must lie in [0, 1]")
