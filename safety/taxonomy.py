"""What each category means, how severe it is, and what other guards call it.

Codes are those of MLCommons AILuminate v1.0 where it has one. The tables are data: `TO_CATEGORY[guard][label]` is the category
that a label of that guard maps to, and `to_label(guard, category)` is the way back.
"""

from __future__ import annotations

from safety.findings import Category as C

MEANING: dict[str, tuple[str, int]] = {  # category -> (name, severity from 1 to 5)
    C.VIOLENT_CRIMES: ("violent crimes", 4),
    C.SEX_CRIMES: ("sex-related crimes", 5),
    C.CHILD_EXPLOITATION: ("child sexual exploitation", 5),
    C.SELF_HARM: ("suicide and self-harm", 4),
    C.INDISCRIMINATE_WEAPONS: ("indiscriminate weapons", 5),
    C.NON_VIOLENT_CRIMES: ("non-violent crimes", 3),
    C.HATE: ("hate", 3),
    C.DEFAMATION: ("defamation and disinformation", 2),
    C.PRIVACY: ("privacy", 3),
    C.INTELLECTUAL_PROPERTY: ("intellectual property", 2),
    C.SEXUAL_CONTENT: ("sexual content", 2),
    C.SPECIALISED_ADVICE: ("specialised advice", 2),
    C.ELECTIONS: ("elections", 2),
    C.INJECTION: ("prompt injection", 4),
    C.JAILBREAK: ("jailbreak", 4),
    C.SYSTEM_PROMPT_EXTRACTION: ("system prompt extraction", 4),
    C.EXFILTRATION: ("data exfiltration", 4),
    C.HIDDEN_TEXT: ("hidden text", 4),
    C.CODE_ABUSE: ("code interpreter abuse", 4),
    C.LANGUAGE: ("language outside the policy", 1),
    C.LENGTH: ("length outside the policy", 1),
    C.TOPIC: ("topic outside the policy", 2),
    C.PHRASE: ("banned phrase", 3),
    C.EMAIL: ("e-mail address", 3),
    C.PHONE: ("telephone number", 3),
    C.CREDIT_CARD: ("payment card number", 4),
    C.IBAN: ("bank account number", 4),
    C.IP_ADDRESS: ("IP address", 2),
    C.URL: ("web address", 1),
    C.NATIONAL_ID: ("national identity number", 4),
    C.DRIVER_LICENCE: ("driving licence number", 3),
    C.SECRET: ("access key or token", 5),
    C.PASSWORD: ("password", 4),
    C.PRIVATE_KEY: ("private key", 5),
    C.REFUSAL: ("refusal", 1),
    C.TOXICITY: ("toxic tone", 2),
    C.FACT_REFUTED: ("claim that a source refutes", 3),
    C.FACT_UNSUPPORTED: ("claim without support", 1),
    C.FACT_CONFLICTING: ("claim on which sources disagree", 2),
}

# Where several labels of a guard mean one category, the first is the one that `to_label` gives.
TO_CATEGORY: dict[str, dict[str, C]] = {
    "llama_guard": {  # Llama Guard 3 and 4
        "S1": C.VIOLENT_CRIMES,
        "S2": C.NON_VIOLENT_CRIMES,
        "S3": C.SEX_CRIMES,
        "S4": C.CHILD_EXPLOITATION,
        "S5": C.DEFAMATION,
        "S6": C.SPECIALISED_ADVICE,
        "S7": C.PRIVACY,
        "S8": C.INTELLECTUAL_PROPERTY,
        "S9": C.INDISCRIMINATE_WEAPONS,
        "S10": C.HATE,
        "S11": C.SELF_HARM,
        "S12": C.SEXUAL_CONTENT,
        "S13": C.ELECTIONS,
        "S14": C.CODE_ABUSE,
    },
    "qwen3guard": {
        "Violent": C.VIOLENT_CRIMES,
        "Non-violent Illegal Acts": C.NON_VIOLENT_CRIMES,
        "Sexual Content or Sexual Acts": C.SEXUAL_CONTENT,
        "PII": C.PRIVACY,
        "Suicide & Self-Harm": C.SELF_HARM,
        "Unethical Acts": C.HATE,
        "Politically Sensitive Topics": C.ELECTIONS,
        "Copyright Violation": C.INTELLECTUAL_PROPERTY,
        "Jailbreak": C.JAILBREAK,
    },
    "shieldgemma": {
        "dangerous": C.VIOLENT_CRIMES,
        "hate": C.HATE,
        "harassment": C.TOXICITY,
        "sexual": C.SEXUAL_CONTENT,
    },
}

# Finer categories that a guard has no label for -> the category whose label is nearest.
NEAREST: dict[str, dict[str, C]] = {
    "llama_guard": {C.ELECTIONS: C.ELECTIONS, C.TOXICITY: C.HATE},
    "qwen3guard": {
        C.INDISCRIMINATE_WEAPONS: C.VIOLENT_CRIMES,
        C.SEX_CRIMES: C.SEXUAL_CONTENT,
        C.CHILD_EXPLOITATION: C.SEXUAL_CONTENT,
        C.DEFAMATION: C.HATE,
        C.TOXICITY: C.HATE,
        C.INJECTION: C.JAILBREAK,
        C.SYSTEM_PROMPT_EXTRACTION: C.JAILBREAK,
    },
    "shieldgemma": {
        C.SEX_CRIMES: C.SEXUAL_CONTENT,
        C.CHILD_EXPLOITATION: C.SEXUAL_CONTENT,
        C.SELF_HARM: C.VIOLENT_CRIMES,
        C.INDISCRIMINATE_WEAPONS: C.VIOLENT_CRIMES,
        C.NON_VIOLENT_CRIMES: C.VIOLENT_CRIMES,
    },
}


def severity(category: str) -> int:
    """1 (a matter of house style) to 5 (never acceptable); categories of your own ("x_...") count as 3."""
    return MEANING[category][1] if category in MEANING else 3


def meaning(category: str) -> str:
    """The category in words; a category of your own is its own name."""
    return MEANING[category][0] if category in MEANING else category.removeprefix("x_").replace("_", " ")


def to_category(guard: str, label: str) -> C:
    """The category of another guard's label; ValueError names the labels it knows."""
    table = _table(guard)
    for known, category in table.items():
        if known.casefold() == label.strip().casefold():
            return category
    raise ValueError(f"{guard} has no label {label!r} in the taxonomy; known: {', '.join(table)}")


def to_label(guard: str, category: str) -> str | None:
    """The label another guard gives to a category, or None where it has nothing like it."""
    table = _table(guard)
    wanted = NEAREST[guard].get(category, category)
    return next((label for label, known in table.items() if known == wanted), None)


def _table(guard: str) -> dict[str, C]:
    if guard not in TO_CATEGORY:
        raise ValueError(f"no labels for the guard {guard!r}; known: {', '.join(TO_CATEGORY)}")
    return TO_CATEGORY[guard]
