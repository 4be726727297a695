"""Reads preference pairs as others publish them: a file, a folder of files or a hub id, each row by the fields it has.

- TRL: `prompt`, `chosen`, `rejected` as texts or as messages, with or without the prompt inside the answers; `margin`
- hh-rlhf: `chosen` and `rejected` are two transcripts, "\\n\\nHuman: ... \\n\\nAssistant: ..."
- two answers and a verdict, by one person or several (AutoJ, PandaLM, LLMBar, Tulu's human evaluation, PKU-SafeRLHF)
- RMB (`conversation_input`, `chosen`, `reject`), ShareGPT (`conversations` of from/value), and the exports of the
  labelling app, which are TRL's form with `p_chosen`, `margin`, `annotator`

Without a `prompt`, what both conversations share is taken message by message, never letter by letter: the longest
common start of "The sky is blue." and "The sky is green." is no prompt.
"""

import gzip
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from plumbline.align.data.rows import PreferencePair, read_preferences
from plumbline.policy_models.chat import Messages

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet")
TURN = re.compile(r"\n\n(Human|Assistant):")
ROLES = {"human": "user", "gpt": "assistant", "Human": "user", "Assistant": "assistant"}
TAGS = ("axis", "kind", "category", "topic", "subset", "scenario", "motivation_app")
Row = dict[str, Any]
# prompt, first answer, second answer, votes: each in [0, 1], 1 the first is better, 0 the second, 0.5 a tie
Verdict = tuple[Any, Any, Any, list[float]]


@dataclass
class ReadReport:
    """What reading gave: pairs, ties among them, and how many rows were left out for which reason."""

    pairs: int = 0
    ties: int = 0
    left_out: Counter[str] = field(default_factory=Counter)

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
    several = [source] if Path(source).exists() else str(source).split(",")
    for name, rows in chain.from_iterable(_sources(one, split) for one in several):
        for place, row in rows:
            pair = parse_row(place, row, name, report.left_out)
            if pair is not None:
                pairs.append(pair)
    report.pairs, report.ties = len(pairs), sum(p.p_chosen == 0.5 for p in pairs)
    if not pairs:
        raise ValueError(f"{source}: no preference pairs found ({report}); see align/data/formats.py for formats")
    return pairs, report


def parse_row(place: str, row: Row, source: str, left_out: Counter[str]) -> PreferencePair | None:
    """One row as a pair with the better answer first, or None after counting why not."""
    found = _verdict(row)
    if found is None:
        left_out["rows without two answers"] += 1
        return None
    prompt, first, second, votes = found
    if not votes:
        left_out["rows without a verdict"] += 1
        return None
    if prompt is None:
        first, second = (_conversation(place, text, sorted(row)) for text in (first, second))
        both = enumerate(zip(first, second, strict=False))
        shared = next((i for i, (a, b) in both if a != b), min(len(first), len(second)))
        # the answers are what comes after the last shared user turn
        while shared and first[shared - 1]["role"] != "user":
            shared -= 1
        prompt, first, second = first[:shared], first[shared:], second[shared:]
        if not prompt:
            left_out["conversations without a shared prompt"] += 1
            return None
    else:
        prompt = _messages(place, prompt, "user")
        first, second = (_answer(place, side, prompt) for side in (first, second))
    if not all(side and side[-1]["role"] == "assistant" and side[-1]["content"].strip() for side in (first, second)):
        left_out["pairs with an empty answer"] += 1
        return None
    if first[-1]["content"].strip() == second[-1]["content"].strip():
        left_out["pairs with one text twice"] += 1
        return None
    share = sum(votes) / len(votes)
    harm = _harm(row)
    if share < 0.5:
        first, second, share, harm = second, first, 1 - share, (harm[1], harm[0])
    margin = row.get("margin")
    margin = 0.0 if margin is None else margin
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not 0 <= margin < math.inf:
        raise ValueError(f"{place}: margin={margin!r} must be a finite number of at least 0")
    tags = {name: str(row[name]) for name in TAGS if isinstance(row.get(name), str)}
    if isinstance(row.get("category_path"), str):
        tags["category"] = row["category_path"].removesuffix(".json")
    if len(votes) > 1:
        tags["agreement"] = f"{max(share, 1 - share):.2f} of {len(votes)}"
    return PreferencePair(
        prompt=prompt,
        chosen=first,
        rejected=second,
        margin=float(margin),
        p_chosen=share,
        harm=harm,
        source=str(row.get("source") or source),
        annotator=str(row.get("annotator") or ""),
        time=str(row.get("time") or ""),
        tags=tags,
    )


def _verdict(row: Row) -> Verdict | None:
    """The first format whose fields the row has."""
    return next((make(row) for fields, make in FORMATS if fields <= row.keys()), None)


def _vote(value: Any, first: Any, second: Any, tie: Any = None) -> list[float]:
    if value == first:
        return [1.0]
    if value == second:
        return [0.0]
    return [0.5] if tie is not None and value == tie else []


def _chosen(prompt: str, chosen: str, rejected: str) -> Callable[[Row], Verdict]:
    def make(row: Row) -> Verdict:
        share = row.get("p_chosen")
        return row.get(prompt), row[chosen], row[rejected], [1.0 if share is None else _share(share)]

    return make


def _share(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"p_chosen={value!r} must be a number from 0 to 1")
    return float(value)


def _pandalm(row: Row) -> Verdict:
    prompt = row["instruction"] + (f"\n\n{row['input']}" if row.get("input") else "")
    votes = [vote for n in (1, 2, 3) for vote in _vote(str(row.get(f"annotator{n}")), "1", "2", "0")]
    return prompt, row["response1"], row["response2"], votes


def _tulu(row: Row) -> Verdict:
    first, second = ("a-is-better", "a-is-slightly-better"), ("b-is-better", "b-is-slightly-better")
    said = row["preference"]
    votes = [1.0] if said in first else [0.0] if said in second else [0.5] if said == "tie" else []
    return row["prompt"], row["completion_a"], row["completion_b"], votes


FORMATS: list[tuple[set[str], Callable[[Row], Verdict]]] = [
    ({"conversation_input", "chosen", "reject"}, _chosen("conversation_input", "chosen", "reject")),
    ({"conversations", "chosen", "rejected"}, _chosen("conversations", "chosen", "rejected")),
    ({"chosen", "rejected"}, _chosen("prompt", "chosen", "rejected")),
    ({"prompt", "completion_a", "completion_b", "preference"}, _tulu),
    ({"instruction", "response1", "response2", "annotator1"}, _pandalm),
    (
        {"prompt", "response 1", "response 2", "label"},
        lambda row: (row["prompt"], row["response 1"], row["response 2"], _vote(row["label"], 0, 1, 2)),
    ),
    (
        {"input", "output_1", "output_2", "label"},
        lambda row: (row["input"], row["output_1"], row["output_2"], _vote(row["label"], 1, 2)),
    ),
    (
        {"prompt", "response_0", "response_1", "better_response_id"},
        lambda row: (row["prompt"], row["response_0"], row["response_1"], _vote(row["better_response_id"], 0, 1)),
    ),
]


def _harm(row: Row) -> tuple[bool | None, bool | None]:
    """Whether each answer was called harmful, in the order of the row's answers."""
    if {"is_response_0_safe", "is_response_1_safe"} <= row.keys():
        return not row["is_response_0_safe"], not row["is_response_1_safe"]
    return row.get("chosen_harmful"), row.get("rejected_harmful")


def read_training_pairs(source: str | Path) -> list[PreferencePair]:
    """Pairs to train on. A JSON Lines file in our own form is read strictly, a bad row is an error; any other source as
    `read_pairs` does, which prints what it left out.
    """
    path = Path(source)
    if path.name.endswith(".jsonl") and path.is_file() and not _published(path):
        return read_preferences(path)
    pairs, report = read_pairs(source)
    print(f"{source}: {report}")
    return pairs


def _published(path: Path) -> bool:
    """Whether the first row is in a known form that is not our own: no prompt, or other names."""
    with path.open("rb") as lines:
        first = next((line for line in lines if line.strip()), b"{}")
    try:
        row = json.loads(first)
    except ValueError:
        return False
    if not isinstance(row, dict) or {"prompt", "chosen", "rejected"} <= row.keys():
        return False
    return any(fields <= row.keys() for fields, _ in FORMATS)


def cost_pairs(pairs: list[PreferencePair]) -> list[PreferencePair]:
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


def _conversation(place: str, value: Any, columns: Sequence[str] = ()) -> Messages:
    """A whole conversation: messages, or a transcript of hh-rlhf."""
    if not isinstance(value, str):
        return _messages(place, value, "assistant")
    parts = TURN.split(value)
    if len(parts) < 3:
        raise ValueError(
            f"{place}: field 'prompt' is missing (found {list(columns)}); add it, or give both texts as whole transcripts "
            "(\\n\\nHuman: ... \\n\\nAssistant: ...)"
        )
    turns = zip(parts[1::2], parts[2::2], strict=True)
    return [{"role": ROLES[who], "content": text.strip()} for who, text in turns]


def _messages(place: str, value: Any, role: str) -> Messages:
    """Messages of a text, of role/content or of from/value dictionaries."""
    if isinstance(value, bool | int | float):  # an answer such as True or 42, which a csv reader took for a value
        value = str(value)
    if isinstance(value, str):
        if role == "user" and TURN.match(value):
            return [m for m in _conversation(place, value) if m["content"]]
        return [{"role": role, "content": value}]
    value = [value] if isinstance(value, dict) else value
    messages = []
    for message in value if isinstance(value, list) else [None]:
        if not isinstance(message, dict):
            raise ValueError(f"{place}: {value!r:.80} is neither a text nor a list of messages")
        if "answer" in message:  # RMB: {"llm": ..., "answer": ...}
            message = {"role": "assistant", "content": message["answer"]}
        who, text = message.get("role", message.get("from")), message.get("content", message.get("value"))
        if not isinstance(who, str) or not isinstance(text, str):
            raise ValueError(f"{place}: message {message!r:.80} needs a role and a content, both texts")
        messages.append({"role": ROLES.get(who, who), "content": text})
    return messages


def _answer(place: str, value: Any, prompt: Messages) -> Messages:
    """The assistant's last turn; a prompt repeated in front of it is taken away."""
    messages = _messages(place, value, "assistant")
    return messages[-1:] if len(messages) > 1 and messages[:-1] == prompt[-len(messages) + 1 :] else messages


def _sources(source: str | Path, split: str) -> Iterator[tuple[str, Iterator[tuple[str, Row]]]]:
    """(name, rows with their places) of each file."""
    path = Path(source)
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.name.endswith(SUFFIXES) and f.is_file())
        if not files:
            raise ValueError(f"{path}: no files of {', '.join(SUFFIXES)} in this folder")
        for file in files:
            yield f"{file.resolve().parent.name}/{_stem(file)}", read_rows(file)
    elif path.is_file():
        yield _stem(path), read_rows(path)
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) and not path.suffix:
        from datasets import load_dataset

        try:
            rows = load_dataset(str(source), split=split)
        except Exception as error:  # the library raises many kinds: offline, unknown, gated, no such split
            raise ValueError(f"{source}: no such file or folder, and the hub does not give it ({error})") from None
        yield str(source), ((f"{source}:{n}", dict(row)) for n, row in enumerate(rows))
    else:
        raise ValueError(f"{source}: no such file or folder, and no hub id (owner/name)")


def _stem(file: Path) -> str:
    return file.name.split(".jsonl")[0].removesuffix(".json").removesuffix(".parquet")


def read_rows(file: Path) -> Iterator[tuple[str, Row]]:
    """(file:line, row) of JSON Lines (also gzip-compressed), a JSON list, or Parquet."""
    if file.name.endswith(".parquet"):
        import pyarrow.parquet

        for number, row in enumerate(pyarrow.parquet.read_table(file).to_pylist(), start=1):
            yield f"{file}:{number}", row
        return
    opened = gzip.open(file, "rb") if file.name.endswith(".gz") else file.open("rb")
    with opened as stream:
        try:
            if file.name.endswith(".json"):
                rows = json.load(stream)
                yield from ((f"{file}:{n}", row) for n, row in enumerate(rows, start=1) if isinstance(row, dict))
                return
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise ValueError(f"{file}:{number}: an object is expected, found {type(row).__name__}")
                    yield f"{file}:{number}", row
        except (json.JSONDecodeError, UnicodeDecodeError, gzip.BadGzipFile) as error:
            raise ValueError(f"{file}: not valid JSON ({error}); fix or remove the file") from None
