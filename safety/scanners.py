"""The scanners that a policy file can name under `use`: ours, and those of other packages (plumbline/extensions.py)."""

from __future__ import annotations

import importlib

from plumbline.extensions import added
from plumbline.safety.findings import Scanner
from plumbline.safety.policy import ScannerSettings

KINDS = {  # use -> (module, class); a module is imported when a policy asks for it, so rules alone need no embedder
    "pii": ("plumbline.safety.input_filter.pii", "Pii"),
    "secrets": ("plumbline.safety.input_filter.secrets", "Secrets"),
    "hidden_text": ("plumbline.safety.input_filter.hidden_text", "HiddenText"),
    "injection_rules": ("plumbline.safety.input_filter.injection", "InjectionRules"),
    "injection": ("plumbline.safety.input_filter.injection", "InjectionHead"),
    "harm": ("plumbline.safety.input_filter.harm", "HarmScanner"),
    "toxicity": ("plumbline.safety.verifier.toxicity", "ToxicityScanner"),
    "refusal": ("plumbline.safety.verifier.refusal", "RefusalHead"),
    "language": ("plumbline.safety.input_filter.language", "Language"),
    "length": ("plumbline.safety.input_filter.length", "Length"),
    "topics": ("plumbline.safety.input_filter.topics", "Topics"),
    "phrases": ("plumbline.safety.input_filter.phrases", "Phrases"),
    "prompt_leak": ("plumbline.safety.verifier.prompt_leak", "PromptLeak"),
}


def build_scanner(entry: ScannerSettings) -> Scanner:
    """The scanner of one entry of a policy; ValueError names the kind or the setting that is wrong."""
    make = _class_of(entry)
    try:
        return make(name=entry.name, **entry.settings)
    except TypeError as error:
        raise ValueError(
            f"scanner {entry.name!r}: settings {dict(entry.settings)} do not fit {make.__name__}: {error}"
        ) from None


def _class_of(entry: ScannerSettings) -> type:
    if entry.use in KINDS:
        module, kind = KINDS[entry.use]
        return getattr(importlib.import_module(module), kind)
    others = added("plumbline.scanners", KINDS)
    if entry.use not in others:
        known = ", ".join(sorted([*KINDS, *others]))
        raise ValueError(f"scanner {entry.name!r}: no kind {entry.use!r}; known are {known}")
    return others[entry.use].load()
