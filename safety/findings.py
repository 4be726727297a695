"""The records of the safety pipeline: what is scanned, what a scanner reports, what is decided, what is answered.

A scanner is pure: it never changes text and never decides an action. The policy decides, and its hash is in every verdict.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Literal, Protocol, runtime_checkable


class Stage(StrEnum):
    """Where in a conversation a text stands."""

    INPUT = "input"  # what the user wrote
    RETRIEVED = "retrieved"  # a document put into the prompt
    TOOL_RESULT = "tool_result"
    DECODE = "decode"  # tokens being chosen
    STREAM = "stream"  # a part of an answer on its way out
    OUTPUT = "output"  # a whole answer


class Action(IntEnum):
    """What is done with a text, mildest first: the highest of several wins."""

    ALLOW = 0
    ANNOTATE = 1  # let through with a note
    FLAG = 2  # let through, a person should look
    REDACT = 3  # let through without the spans
    REWRITE = 4  # replaced by a corrected text
    BLOCK = 5  # replaced by a reply
    HALT = 6  # and the conversation ends


class Status(StrEnum):
    """How the run of one scanner ended. Anything but OK is in the verdict, and ERROR and TIMEOUT go through `on_error`."""

    OK = "ok"
    ERROR = "error"
    TIMEOUT = "timeout"
    SKIPPED = "skipped"


class Category(StrEnum):
    """Hazards by their MLCommons AILuminate v1.0 code; codes with `x_`, `out_`, `pii.`, `sec.`, `tox` and `fact.` are ours."""

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
    ELECTIONS = "spc_ele"
    INJECTION = "x_inj"
    JAILBREAK = "x_jbk"
    SYSTEM_PROMPT_EXTRACTION = "x_spe"
    EXFILTRATION = "x_exf"
    HIDDEN_TEXT = "x_hid"
    CODE_ABUSE = "x_cia"
    LANGUAGE = "x_language"
    LENGTH = "x_length"
    TOPIC = "x_topic"
    PHRASE = "x_phrase"
    EMAIL = "pii.email"
    PHONE = "pii.phone"
    CREDIT_CARD = "pii.credit_card"
    IBAN = "pii.iban"
    IP_ADDRESS = "pii.ip_address"
    URL = "pii.url"
    NATIONAL_ID = "pii.national_id"
    DRIVER_LICENCE = "pii.driver_licence"
    SECRET = "sec.key"
    PASSWORD = "sec.password"
    PRIVATE_KEY = "sec.private_key"
    REFUSAL = "out_refusal"
    TOXICITY = "tox"
    FACT_REFUTED = "fact.refuted"
    FACT_UNSUPPORTED = "fact.unsupported"
    FACT_CONFLICTING = "fact.conflicting"


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """Characters [start, end) of the original text; `replacement` is what redaction puts there (None: a placeholder)."""

    start: int
    end: int
    label: str = ""
    replacement: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.end:
            raise ValueError(f"span [{self.start}, {self.end}) must satisfy 0 <= start <= end")


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """A passage that bears on a claim. `quote` is characters [start, end) of the document, word for word."""

    doc_id: str
    doc_sha256: str
    start: int
    end: int
    quote: str
    score: float
    stance: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that one scanner saw in one text.

    scanner   name of the scanner instance (two instances of one class have two names)
    version   of the scanner: of its rules, or the first characters of the hash of its weights
    category  what it saw: a Category, or a code of your own that begins with "x_"
    score     calibrated risk, 0 surely fine to 1 surely not; thresholds live in the policy
    spans     where, in the original text; empty means the whole text
    reason    one line for a person; never holds the text itself, so that a log of findings holds no secrets
    evidence  passages of documents, for findings about facts
    view      which reading of the text it was seen in: "raw", "folded", "base64" ... (see plumbline.safety.text.normalise)
    """

    scanner: str
    version: str
    category: str
    score: float
    spans: tuple[Span, ...] = ()
    reason: str = ""
    evidence: tuple[Evidence, ...] = ()
    view: str = "raw"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.score) and 0 <= self.score <= 1):
            raise ValueError(f"{self.scanner}: score {self.score} of a finding must lie in [0, 1]")
        if self.category not in _CATEGORIES and not self.category.startswith("x_"):
            raise ValueError(
                f"{self.scanner}: category {self.category!r} is no Category; your own codes begin with 'x_'"
            )


_CATEGORIES = frozenset(Category)
Cost = Literal["regex", "cpu", "gpu", "llm"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ScanItem:
    """One text to scan, and what scanners of answers need to know of it."""

    text: str
    stage: Stage = Stage.INPUT
    prompt: str = ""  # what was asked, where `text` is an answer
    system: str = ""  # the system prompt in force
    documents: tuple[str, ...] = ()


@runtime_checkable
class Scanner(Protocol):
    """Pure and batched: one list of findings an item, in order, whatever else is in the batch.

    categories  every code it may report, with globs ("pii.*"): a failure counts against the strictest of them
    cost        decides when it runs: "regex" before "cpu" before "gpu" before "llm"
    folds       whether the pipeline shows it the normalised readings of a text too
    """

    name: str
    version: str
    categories: tuple[str, ...]
    stages: frozenset[Stage]
    cost: Cost
    folds: bool

    def scan(self, items: Sequence[ScanItem]) -> list[list[Finding]]: ...


ALL_STAGES = frozenset(Stage)
INPUT_STAGES = frozenset({Stage.INPUT, Stage.RETRIEVED, Stage.TOOL_RESULT})
OUTPUT_STAGES = frozenset({Stage.STREAM, Stage.OUTPUT})


@dataclass(frozen=True, kw_only=True, slots=True)
class ScannerRun:
    """How one scanner fared on one text; `detail` names the exception or why it was skipped."""

    scanner: str
    status: Status
    ms: float = 0.0
    detail: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fired:
    """One rule of the policy that applied, and the findings (indices into the verdict's) it applied to."""

    rule: str
    action: Action
    findings: tuple[int, ...] = ()
    why: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What was decided about one text.

    `text` is what may be passed on: the original, a redacted form, or the reply of the rule that blocked. The spans of
    its findings are offsets in the original.
    """

    action: Action
    text: str
    stage: Stage
    findings: tuple[Finding, ...] = ()
    fired: tuple[Fired, ...] = ()
    runs: tuple[ScannerRun, ...] = ()
    policy_id: str = ""
    policy_sha256: str = ""
    request_id: str = ""
    text_sha256: str = ""  # of the original, so that a log can name a text without holding it

    @property
    def blocked(self) -> bool:
        return self.action >= Action.BLOCK


@dataclass(frozen=True, kw_only=True, slots=True)
class GuardedAnswer:
    """What a guarded model says. `verdicts` are by layer ("input", "output", ...); `ms` is the time of each."""

    text: str
    action: Action
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    citations: tuple[Evidence, ...] = ()
    ms: dict[str, float] = field(default_factory=dict)

    @property
    def blocked(self) -> bool:
        return self.action >= Action.BLOCK
