"""Reads preference pairs as others publish them: a file, a folder of files or a hub id, each row by the fields it has.

- TRL: `prompt`, `chosen`, `rejected` as texts or as messages, with or without the prompt inside the answers; `margin`.
  UltraFeedback as TRL's users know it has this form
- hh-rlhf: `chosen` and `rejected` are two transcripts, "\\n\\nHuman: ... \\n\\nAssistant: ..."
- two answers and a verdict, by one person or several (AutoJ, PandaLM, LLMBar, Tulu's human evaluation, PKU-SafeRLHF,
  HelpSteer's preferences), OpenAI's (`preferred_output`), or several answers with scores (UltraFeedback as it was made)
- RMB (`conversation_input`, `chosen`, `reject`), ShareGPT (`conversations` of from/value), and the exports of the
  labelling app, which are TRL's form with `p_chosen`, `margin`, `annotator`

A `system` column beside any of these becomes the first message of the prompt. Without a `prompt`, what both
conversations share is taken message by message, never letter by letter: the longest common start of "The sky is blue."
and "The sky is green." is no prompt.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plumbline.messages import Messages, as_messages, say_forms, tools_of, with_system, without_prompt
from plumbline.rows import Row, read_rows, row_sources

NO_FORM = "no known form"
TURN = re.compile(r"\n\n(Human|Assistant):")
TAGS = ("axis", "kind", "category", "topic", "subset", "scenario", "motivation_app")
# prompt, first answer, second answer, votes: each in [0, 1], 1 the first is better, 0 the second, 0.5 a tie
Verdict = tuple[Any, Any, Any, list[float]]


@dataclass(frozen=True, kw_only=True)
class PreferencePair:
    """Two answers to one prompt, `chosen` preferred; `margin` >= 0 says how clearly (0: not said).

    p_chosen  share of people who preferred `chosen`, in [0.5, 1]; 0.5 is a tie
    harm      whether people called (chosen, rejected) harmful; None: not said
    tools     what was offered to the assistant; None: nothing
    """

    prompt: Messages
    chosen: Messages
    rejected: Messages
    margin: float = 0.0
    p_chosen: float = 1.0
    harm: tuple[bool | None, bool | None] = (None, None)
    source: str = ""
    annotator: str = ""
    time: str = ""
    tags: dict[str, str] = field(default_factory=dict)
    tools: list[Any] | None = None


@dataclass
class ReadReport:
    """What reading gave: pairs, ties among them, and how many rows were left out for which reason."""

    pairs: int = 0
    ties: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    forms: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        out = ", ".join(f"{count} {why}" for why, count in self.left_out.most_common())
        return f"{self.pairs} pairs ({self.ties} ties)" + (f"; left out: {out}" if out else "")


def read_pairs(source: str | Path, *, split: str = "train") -> tuple[list[PreferencePair], ReadReport]:
    """All pairs of a file, of the readable files of a folder and its folders, of a hub data set, or of several of these
    with commas between.

    Ties are pairs with p_chosen = 0.5. Rows that hold no pair (one answer, twice the same text, no verdict) are left out
    and counted by reason. In a folder, files without a single pair are left out too.

    Raises:
        ValueError: nothing there, no known format in a named file, a row that breaks its own format.
    """
    report, pairs = ReadReport(), []
    for name, rows in row_sources(source, split=split):
        for place, row in rows:
            pair = parse_row(place, row, name, report.left_out)
            if pair is not None:
                report.forms[form_of(row)] += 1
                pairs.append(pair)
    report.pairs, report.ties = len(pairs), sum(p.p_chosen == 0.5 for p in pairs)
    if not pairs:
        raise ValueError(f"{source}: no preference pairs found ({report}); see align/data/formats.py for formats")
    return pairs, report


def read_preferences(source: str | Path) -> list[PreferencePair]:
    """Preference pairs, read strictly: a row that holds no pair is an error with file, line and rule.

    ValueError also when chosen and rejected are the same text, a prompt is empty, a margin is below 0.
    """
    pairs = [parse_row(place, row, Path(source).name) for place, row in read_rows(source)]
    return [pair for pair in pairs if pair is not None]


def parse_row(place: str, row: Row, source: str, left_out: Counter[str] | None = None) -> PreferencePair | None:
    """One row as a pair with the better answer first, or None after counting in `left_out` why not.

    Without `left_out`, a row that holds no pair is a ValueError.
    """

    def leave_out(reason: str, rule: str) -> None:
        if left_out is None:
            raise ValueError(f"{place}: {rule}")
        left_out[reason] += 1

    try:
        found = _verdict(row)
    except (TypeError, KeyError) as error:
        raise ValueError(f"{place}: not in the form of {form_of(row)} ({error}); fix the row") from None
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
    if found is None:
        one = next((name for name in ("prompt", "chosen", "rejected") if name not in row), "rejected")
        leave_out("rows without two answers", f"field {one!r} is missing (found {sorted(row)}); add it or drop the row")
        return None
    asked, first, second, votes = found
    if not votes:
        leave_out("rows without a verdict", "no verdict says which answer is better; add one or drop the row")
        return None
    names = _names(row)
    for name, side in zip(names[1:], (first, second), strict=True):
        if side is None or (isinstance(side, str) and not side.strip()):
            leave_out("pairs with an empty answer", f"{name} is empty; write a text or drop the row")
            return None
    if asked is None:
        sides = [_conversation(place, name, side, row) for name, side in zip(names[1:], (first, second), strict=True)]
        both = enumerate(zip(*sides, strict=False))
        shared = next((i for i, (a, b) in both if a != b), min(map(len, sides)))
        # the answers are what comes after the last shared user turn
        while shared and sides[0][shared - 1]["role"] != "user":
            shared -= 1
        prompt, answers = sides[0][:shared], [side[shared:] for side in sides]
        if not prompt:
            leave_out(
                "conversations without a shared prompt", "chosen and rejected share no turn of the user at their start"
            )
            return None
        prompt = with_system(place, row, prompt)
    else:
        prompt = with_system(place, row, _turns(place, names[0], asked, "user"))
        answers = []
        for name, side in zip(names[1:], (first, second), strict=True):
            prompt, answer = without_prompt(place, name, prompt, _turns(place, name, side, "assistant"))
            answers.append(answer)
    if prompt[-1]["role"] not in ("user", "tool"):
        raise ValueError(f"{place}: {names[0]} ends with role {prompt[-1]['role']!r}; its last message must be 'user'")
    if not prompt[-1]["content"].strip():
        leave_out("pairs with an empty prompt", f"{names[0]} is empty; write a text or drop the row")
        return None
    if not all(side and side[-1]["role"] == "assistant" and _says(side) for side in answers):
        leave_out("pairs with an empty answer", f"{names[1]} or {names[2]} is empty; write a text or drop the row")
        return None
    if _said(answers[0]) == _said(answers[1]):
        rule = f"{names[1]} and {names[2]} are the same text; drop the pair or relabel it"
        leave_out("pairs with one text twice", rule)
        return None
    return _pair(place, row, source, prompt, answers, votes)


def _pair(
    place: str, row: Row, source: str, prompt: Messages, answers: Sequence[Messages], votes: list[float]
) -> PreferencePair:
    """The pair of a row's prompt and answers, with the fields beside them checked."""
    chosen, rejected = answers
    share = sum(votes) / len(votes)
    harm = _harm(place, row)
    if share < 0.5:
        chosen, rejected, share, harm = rejected, chosen, 1 - share, (harm[1], harm[0])
    margin = _number(row.get("margin"), 0.0)
    if margin is None or not 0 <= margin < math.inf:
        raise ValueError(f"{place}: margin={row['margin']!r} must be a finite number of at least 0")
    tags = {name: str(row[name]) for name in TAGS if isinstance(row.get(name), str)}
    if isinstance(row.get("category_path"), str):
        tags["category"] = row["category_path"].removesuffix(".json")
    if len(votes) > 1:
        tags["agreement"] = f"{max(share, 1 - share):.2f} of {len(votes)}"
    return PreferencePair(
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        margin=margin,
        p_chosen=share,
        harm=harm,
        source=str(row.get("source") or source),
        annotator=str(row.get("annotator") or ""),
        time=str(row.get("time") or ""),
        tags=tags,
        tools=tools_of(place, row) or tools_of(place, _input(row)),
    )


def _says(answer: Messages) -> bool:
    return bool(answer[-1]["content"].strip() or answer[-1].get("tool_calls"))


def _said(answer: Messages) -> list[Any]:
    return [m | {"content": m["content"].strip()} for m in answer]


def _number(value: Any, default: float) -> float | None:
    """The number, also of a text such as a CSV file has; the default for null, None for what is no number."""
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def _verdict(row: Row) -> Verdict | None:
    """The first format whose fields the row has."""
    return next((make(row) for _, fields, make in FORMATS if fields <= row.keys()), None)


def form_of(row: Row) -> str:
    """What the row is taken for."""
    return next((name for name, fields, _ in FORMATS if fields <= row.keys()), NO_FORM)


def _names(row: Row) -> tuple[str, str, str]:
    """What the row calls its prompt and its two answers, for messages."""
    return next(
        (names for names in ANSWER_NAMES if set(names[1:]) <= row.keys()), ("prompt", "first answer", "second answer")
    )


def _vote(value: Any, first: Any, second: Any, tie: Any = None) -> list[float]:
    """A vote of numbers or of their texts, such as a CSV file has."""
    said = str(value)
    if said == str(first):
        return [1.0]
    if said == str(second):
        return [0.0]
    return [0.5] if tie is not None and said == str(tie) else []


def _chosen(prompt: str, chosen: str, rejected: str) -> Callable[[Row], Verdict]:
    def make(row: Row) -> Verdict:
        share = _number(row.get("p_chosen"), 1.0)
        if share is None or not 0 <= share <= 1:
            raise ValueError(f"p_chosen={row['p_chosen']!r} must be a number from 0 to 1")
        return row.get(prompt), row[chosen], row[rejected], [share]

    return make


def _pandalm(row: Row) -> Verdict:
    prompt = row["instruction"] + (f"\n\n{row['input']}" if row.get("input") else "")
    votes = [vote for n in (1, 2, 3) for vote in _vote(str(row.get(f"annotator{n}")), "1", "2", "0")]
    return prompt, row["response1"], row["response2"], votes


def _tulu(row: Row) -> Verdict:
    first, second = ("a-is-better", "a-is-slightly-better"), ("b-is-better", "b-is-slightly-better")
    said = row["preference"]
    votes = [1.0] if said in first else [0.0] if said in second else [0.5] if said == "tie" else []
    return row["prompt"], row["completion_a"], row["completion_b"], votes


def _openai(row: Row) -> Verdict:
    return _input(row).get("messages"), row["preferred_output"], row["non_preferred_output"], [1.0]


def _input(row: Row) -> Row:
    """OpenAI's preference form holds messages and tools one level down."""
    return row["input"] if isinstance(row.get("input"), dict) else {}


def _helpsteer(row: Row) -> Verdict:
    strength = _number(row["preference_strength"], math.nan)  # from -3, the first is better, to 3
    votes = [] if strength is None or math.isnan(strength) else [0.5 if not strength else float(strength < 0)]
    return row.get("prompt", row.get("context")), row["response_1"], row["response_2"], votes


def _ultrafeedback(row: Row) -> Verdict:
    """The best and the worst of several answers, by their overall score."""
    scored = [
        (float(score), one.get("response"))
        for one in row["completions"]
        if isinstance(one, dict) and (score := _number(one.get("overall_score"), math.nan)) is not None
        if not math.isnan(score)
    ]
    if len(scored) < 2:
        return row["instruction"], "one", "two", []
    (low, worst), (high, best) = (take(scored, key=lambda pair: pair[0]) for take in (min, max))
    return row["instruction"], best, worst, [1.0 if high > low else 0.5]


# name, fields that show it, how it is read; the first that fits
FORMATS: list[tuple[str, set[str], Callable[[Row], Verdict]]] = [
    ("RMB", {"conversation_input", "chosen", "reject"}, _chosen("conversation_input", "chosen", "reject")),
    ("ShareGPT pairs", {"conversations", "chosen", "rejected"}, _chosen("conversations", "chosen", "rejected")),
    ("prompt/chosen/rejected", {"prompt", "chosen", "rejected"}, _chosen("prompt", "chosen", "rejected")),
    (
        "instruction/chosen/rejected",
        {"instruction", "chosen", "rejected"},
        _chosen("instruction", "chosen", "rejected"),
    ),
    ("question/chosen/rejected", {"question", "chosen", "rejected"}, _chosen("question", "chosen", "rejected")),
    ("chosen/rejected with the prompt inside", {"chosen", "rejected"}, _chosen("prompt", "chosen", "rejected")),
    ("Tulu's comparisons", {"prompt", "completion_a", "completion_b", "preference"}, _tulu),
    ("PandaLM", {"instruction", "response1", "response2", "annotator1"}, _pandalm),
    (
        "AutoJ",
        {"prompt", "response 1", "response 2", "label"},
        lambda row: (row["prompt"], row["response 1"], row["response 2"], _vote(row["label"], 0, 1, 2)),
    ),
    (
        "LLMBar",
        {"input", "output_1", "output_2", "label"},
        lambda row: (row["input"], row["output_1"], row["output_2"], _vote(row["label"], 1, 2)),
    ),
    (
        "PKU-SafeRLHF",
        {"prompt", "response_0", "response_1", "better_response_id"},
        lambda row: (row["prompt"], row["response_0"], row["response_1"], _vote(row["better_response_id"], 0, 1)),
    ),
    ("HelpSteer preferences", {"response_1", "response_2", "preference_strength"}, _helpsteer),
    ("OpenAI preferences", {"input", "preferred_output", "non_preferred_output"}, _openai),
    ("UltraFeedback", {"instruction", "completions"}, _ultrafeedback),
]
ANSWER_NAMES = [
    ("conversation_input", "chosen", "reject"),
    ("prompt", "chosen", "rejected"),
    ("input", "preferred_output", "non_preferred_output"),
]


def _harm(place: str, row: Row) -> tuple[bool | None, bool | None]:
    """Whether each answer was called harmful, in the order of the row's answers."""
    safe = ("is_response_0_safe", "is_response_1_safe")
    names = safe if set(safe) <= row.keys() else ("chosen_harmful", "rejected_harmful")
    said = [{"true": True, "false": False}.get(str(row.get(name)).lower(), row.get(name)) for name in names]
    if not all(one is None or isinstance(one, bool) for one in said):
        raise ValueError(f"{place}: {', '.join(names)}={said} must be true, false or absent")
    first, second = (not one if names == safe and one is not None else one for one in said)
    return first, second


def read_training_pairs(source: str | Path) -> list[PreferencePair]:
    """Pairs to train on; says what was read and left out.

    A file in our own form (its first row has prompt, chosen and rejected) is read strictly, whatever its suffix: a row
    without a pair is an error. Any other source is read as `read_pairs` does.
    """
    path = Path(source)
    if path.is_file() and _own_form(path):
        pairs = read_preferences(path)
        print(say_forms("data", source, Counter({"prompt/chosen/rejected": len(pairs)})))
    else:
        pairs, report = read_pairs(source)
        print(say_forms("data", source, report.forms))
        print(f"data: {report}")
    if said := _repeats(pairs):
        print(f"data: {said}")
    return pairs


def _own_form(path: Path) -> bool:
    """Whether the first row has prompt, chosen and rejected."""
    first = next(read_rows(path), None)
    return first is not None and {"prompt", "chosen", "rejected"} <= first[1].keys()


def _repeats(pairs: Iterable[PreferencePair]) -> str:
    """What is to be said of comparisons that occur more than once; "" for nothing.

    All of them stay: to a loss of single comparisons, a repeated one weighs more and two that contradict each other make
    a tie, as two people would who judged them.
    """
    seen: dict[tuple[str, str, str], Counter[bool]] = {}
    for pair in pairs:
        better, worse = repr(_said(pair.chosen)), repr(_said(pair.rejected))
        first, second = sorted((better, worse))
        if pair.p_chosen > 0.5:
            seen.setdefault((repr(_said(pair.prompt)), first, second), Counter())[better == first] += 1
    repeated = sum(count - 1 for votes in seen.values() for count in votes.values() if count > 1)
    contradicted = sum(len(votes) > 1 for votes in seen.values())
    parts = [f"{repeated} pairs repeat an earlier one and weigh that much more"] if repeated else []
    if contradicted:
        parts.append(f"{contradicted} comparisons are also there the other way round and make ties together")
    return "; ".join(parts)


def cost_pairs(pairs: Sequence[PreferencePair]) -> list[PreferencePair]:
    """Pairs for a cost model: `chosen` is the more harmful answer. Pairs that say nothing about harm are left out.

    Two harmful (or two harmless) answers rank nothing: they are ties whose signs alone are learned.
    """
    out = []
    for pair in pairs:
        if None in pair.harm:
            continue
        swap = pair.harm[1] and not pair.harm[0]
        fields = dict(vars(pair)) | {"p_chosen": 1.0 if pair.harm[0] != pair.harm[1] else 0.5, "margin": 0.0}
        if swap:
            fields |= {"chosen": pair.rejected, "rejected": pair.chosen, "harm": (True, False)}
        out.append(PreferencePair(**fields))
    if not out:
        raise ValueError(
            f"none of {len(pairs)} pairs says whether its answers are harmful: a cost model needs chosen_harmful and "
            "rejected_harmful (or is_response_0_safe and is_response_1_safe) in each row"
        )
    return out


def _conversation(place: str, field: str, value: Any, row: Row) -> Messages:
    """A whole conversation: messages, or a transcript of hh-rlhf."""
    if isinstance(value, str) and len(TURN.split(value)) < 3:
        raise ValueError(
            f"{place}: field 'prompt' is missing (found {sorted(row)}); add it, or give both texts as whole transcripts "
            "(\\n\\nHuman: ... \\n\\nAssistant: ...)"
        )
    return _turns(place, field, value, "assistant")


def _turns(place: str, field: str, value: Any, role: str) -> Messages:
    """Messages of a text, a transcript of hh-rlhf, or messages in any form."""
    if isinstance(value, bool | int | float):  # an answer such as True or 42, which a csv reader took for a value
        value = str(value)
    if isinstance(value, str) and TURN.match(value):
        parts = TURN.split(value)
        turns = zip(parts[1::2], parts[2::2], strict=True)
        messages = [{"role": "user" if who == "Human" else "assistant", "content": text.strip()} for who, text in turns]
        if role == "user":  # a prompt ends with the assistant's turn opened
            messages = [m for m in messages if m["content"]]
        return messages or [{"role": role, "content": ""}]
    if isinstance(value, dict) and "answer" in value:  # RMB: {"llm": ..., "answer": ...}
        value = {"role": "assistant", "content": value["answer"]}
    return as_messages(place, field, value, role)
