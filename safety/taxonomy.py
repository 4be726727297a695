"""What each category means, how severe it is, and what other guards call it.

Codes are those of MLCommons AILuminate v1.0 where it has one. The tables are data: `TO_CATEGORY[guard][label]` is the category
that a label of that guard maps to, and `to_label(guard, category)` is the way back.
"""

from __future__ import annotations

from plumbline.safety.findings import Category

MEANING: dict[str, tuple[str, int]] = {  # category -> (name, severity from 1 to 5)
    Category.VIOLENT_CRIMES: ("violent crimes", 4),
    Category.SEX_CRIMES: ("sex-related crimes", 5),
    Category.CHILD_EXPLOITATION: ("child sexual exploitation", 5),
    Category.SELF_HARM: ("suicide and self-harm", 4),
    Category.INDISCRIMINATE_WEAPONS: ("indiscriminate weapons", 5),
    Category.NON_VIOLENT_CRIMES: ("non-violent crimes", 3),
    Category.HATE: ("hate", 3),
    Category.DEFAMATION: ("defamation and disinformation", 2),
    Category.PRIVACY: ("privacy", 3),
    Category.INTELLECTUAL_PROPERTY: ("intellectual property", 2),
    Category.SEXUAL_CONTENT: ("sexual content", 2),
    Category.SPECIALISED_ADVICE: ("specialised advice", 2),
    Category.ELECTIONS: ("elections", 2),
    Category.INJECTION: ("prompt injection", 4),
    Category.JAILBREAK: ("jailbreak", 4),
    Category.SYSTEM_PROMPT_EXTRACTION: ("system prompt extraction", 4),
    Category.EXFILTRATION: ("data exfiltration", 4),
    Category.HIDDEN_TEXT: ("hidden text", 4),
    Category.CODE_ABUSE: ("code interpreter abuse", 4),
    Category.LANGUAGE: ("language outside the policy", 1),
    Category.LENGTH: ("length outside the policy", 1),
    Category.TOPIC: ("topic outside the policy", 2),
    Category.PHRASE: ("banned phrase", 3),
    Category.EMAIL: ("e-mail address", 3),
    Category.PHONE: ("telephone number", 3),
    Category.CREDIT_CARD: ("payment card number", 4),
    Category.IBAN: ("bank account number", 4),
    Category.IP_ADDRESS: ("IP address", 2),
    Category.URL: ("web address", 1),
    Category.NATIONAL_ID: ("national identity number", 4),
    Category.DRIVER_LICENCE: ("driving licence number", 3),
    Category.SECRET: ("access key or token", 5),
    Category.PASSWORD: ("password", 4),
    Category.PRIVATE_KEY: ("private key", 5),
    Category.REFUSAL: ("refusal", 1),
    Category.TOXICITY: ("toxic tone", 2),
    Category.FACT_REFUTED: ("claim that a source refutes", 3),
    Category.FACT_UNSUPPORTED: ("claim without support", 1),
    Category.FACT_CONFLICTING: ("claim on which sources disagree", 2),
}

# Where several labels of a guard mean one category, the first is the one that `to_label` gives.
TO_CATEGORY: dict[str, dict[str, Category]] = {
    "llama_guard": {  # Llama Guard 3 and 4
        "S1": Category.VIOLENT_CRIMES,
        "S2": Category.NON_VIOLENT_CRIMES,
        "S3": Category.SEX_CRIMES,
        "S4": Category.CHILD_EXPLOITATION,
        "S5": Category.DEFAMATION,
        "S6": Category.SPECIALISED_ADVICE,
        "S7": Category.PRIVACY,
        "S8": Category.INTELLECTUAL_PROPERTY,
        "S9": Category.INDISCRIMINATE_WEAPONS,
        "S10": Category.HATE,
        "S11": Category.SELF_HARM,
        "S12": Category.SEXUAL_CONTENT,
        "S13": Category.ELECTIONS,
        "S14": Category.CODE_ABUSE,
    },
    "qwen3guard": {
        "Violent": Category.VIOLENT_CRIMES,
        "Non-violent Illegal Acts": Category.NON_VIOLENT_CRIMES,
        "Sexual Content or Sexual Acts": Category.SEXUAL_CONTENT,
        "PII": Category.PRIVACY,
        "Suicide & Self-Harm": Category.SELF_HARM,
        "Unethical Acts": Category.HATE,
        "Politically Sensitive Topics": Category.ELECTIONS,
        "Copyright Violation": Category.INTELLECTUAL_PROPERTY,
        "Jailbreak": Category.JAILBREAK,
    },
    "shieldgemma": {
        "dangerous": Category.VIOLENT_CRIMES,
        "hate": Category.HATE,
        "harassment": Category.TOXICITY,
        "sexual": Category.SEXUAL_CONTENT,
    },
}

# Finer categories that a guard has no label for -> the category whose label is nearest.
NEAREST: dict[str, dict[str, Category]] = {
    "llama_guard": {Category.ELECTIONS: Category.ELECTIONS, Category.TOXICITY: Category.HATE},
    "qwen3guard": {
        Category.INDISCRIMINATE_WEAPONS: Category.VIOLENT_CRIMES,
        Category.SEX_CRIMES: Category.SEXUAL_CONTENT,
        Category.CHILD_EXPLOITATION: Category.SEXUAL_CONTENT,
        Category.DEFAMATION: Category.HATE,
        Category.TOXICITY: Category.HATE,
        Category.INJECTION: Category.JAILBREAK,
        Category.SYSTEM_PROMPT_EXTRACTION: Category.JAILBREAK,
    },
    "shieldgemma": {
        Category.SEX_CRIMES: Category.SEXUAL_CONTENT,
        Category.CHILD_EXPLOITATION: Category.SEXUAL_CONTENT,
        Category.SELF_HARM: Category.VIOLENT_CRIMES,
        Category.INDISCRIMINATE_WEAPONS: Category.VIOLENT_CRIMES,
        Category.NON_VIOLENT_CRIMES: Category.VIOLENT_CRIMES,
    },
}


def severity(category: str) -> int:
    """1 (a matter of house style) to 5 (never acceptable); categories of your own ("x_...") count as 3."""
    return MEANING[category][1] if category in MEANING else 3


def meaning(category: str) -> str:
    """The category in words; a category of your own is its own name."""
    return MEANING[category][0] if category in MEANING else category.removeprefix("x_").replace("_", " ")


def to_category(guard: str, label: str) -> Category:
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


def _table(guard: str) -> dict[str, Category]:
    if guard not in TO_CATEGORY:
        raise ValueError(f"no labels for the guard {guard!r}; known: {', '.join(TO_CATEGORY)}")
    return TO_CATEGORY[guard]
