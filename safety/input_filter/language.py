"""Which language a text is in, by its script and its commonest small words: enough to keep a guard to the languages it knows.

Short texts say nothing: below `min_words` known small words a Latin text is not judged. Not a language identifier for
translation work; where every language must be told apart, use a model for it behind the same Scanner protocol.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

from plumbline.safety.findings import INPUT_STAGES, Category, Cost, Finding, ScanItem, Stage

SMALL_WORDS = {
    "en": "the and is are of to in that it you for with not this was have be what how do can my your from or an on as at we they",
    "de": "der die das und ist nicht ich du ein eine zu mit den von für auf wie im sich auch es dem wir sie aber oder bei nach",
    "fr": "le la les et est une un des que qui dans pour pas vous je nous il ce au avec sur du mais comment plus sont être cette",
    "es": "el los las y es una un que de en por para con no se lo del al como más pero su me qué cómo está son muy este hay",
    "it": "il lo gli e è una un che di in per con non si come più ma sono della del alla questo anche mi cosa ho nel dei",
    "pt": "o os as e é uma um que de em por para com não se do da no na como mais mas seu eu você está são isso ao",
    "nl": "de het een en is niet ik je van dat op te met voor zijn maar hoe naar ook er aan wat dit bij of wij",
    "pl": "i nie się na jest to że do jak w z co ale czy dla tak od po są przez",
    "sv": "och att det är en som på av för med den inte jag har till om ett men var hur kan du",
    "tr": "ve bir bu için ne da de mi ile çok nasıl var daha ama gibi ben sen olarak",
}
SCRIPTS = {
    "CYRILLIC": "ru", "ARABIC": "ar", "HEBREW": "he", "GREEK": "el", "DEVANAGARI": "hi", "THAI": "th", "HANGUL": "ko",
    "HIRAGANA": "ja", "KATAKANA": "ja", "CJK": "zh", "BENGALI": "bn", "TAMIL": "ta", "GEORGIAN": "ka", "ARMENIAN": "hy",
}  # fmt: skip
_WORDS = {language: frozenset(words.split()) for language, words in SMALL_WORDS.items()}


def language_of(text: str, *, min_words: int = 3) -> tuple[str | None, float]:
    """The language as a two-letter code (of a script, its commonest), or None if unknown, and the share of evidence for it."""
    sample = text[:2000]
    letters = [ch for ch in sample if ch.isalpha()]
    if not letters:
        return None, 0.0
    foreign = Counter(unicodedata.name(ch, "").split(" ")[0] for ch in letters if ord(ch) > 0x24F)
    if sum(foreign.values()) > 0.5 * len(letters):
        if foreign["HIRAGANA"] + foreign["KATAKANA"]:
            return "ja", 1.0
        script, count = foreign.most_common(1)[0]
        return SCRIPTS.get(script), count / len(letters)
    words = re.findall(r"[^\W\d_]+", sample.lower())
    votes = {language: sum(word in known for word in words) for language, known in _WORDS.items()}
    best = max(votes, key=lambda language: votes[language])
    second = max(count for language, count in votes.items() if language != best)
    if votes[best] < min_words or votes[best] == second:
        return None, 0.0
    return best, votes[best] / (votes[best] + second)


class Language:
    """A finding where a text is in a language outside `allowed` (two-letter codes); the score is the share of the evidence."""

    version = "1"
    categories: tuple[str, ...] = (Category.LANGUAGE,)
    stages: frozenset[Stage] = INPUT_STAGES
    cost: Cost = "regex"
    folds = False

    def __init__(self, allowed: Sequence[str] = ("en",), *, min_words: int = 3, name: str = "language") -> None:
        known = set(SMALL_WORDS) | set(SCRIPTS.values())
        if isinstance(allowed, str) or not allowed or not set(allowed) <= known:
            raise ValueError(f"language: allowed {allowed!r} must be a list of codes among {', '.join(sorted(known))}")
        self.name, self.allowed, self.min_words = name, frozenset(allowed), min_words

    def scan(self, items: Sequence[ScanItem]) -> list[list[Finding]]:
        found = []
        for item in items:
            language, share = language_of(item.text, min_words=self.min_words)
            here = []
            if language is not None and language not in self.allowed:
                here.append(Finding(
                    scanner=self.name, version=self.version, category=Category.LANGUAGE, score=share, reason=f"looks like {language}"
                ))  # fmt: skip
            found.append(here)
        return found
