"""Random rows and random bytes through every reader: each gives rows, or the documented ValueError, and nothing else.

    python -m benchmarks.fuzz_readers [--rows 20000] [--seed 0]

Rows are made from the field names that the readers know and from values that people's files have held: nulls, lists where
a text belongs, halves of surrogate pairs, NaN, deep nesting. Ends with one line of JSON on standard output; exit status 1
when a reader raised anything but a ValueError that names the place.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from plumbline.align.data.formats import FORMATS, parse_row
from plumbline.apps.commands.curate import texts
from plumbline.apps.label.exchange import item_of
from plumbline.eval.samples import _parse
from plumbline.eval.targets.recorded import _recorded
from plumbline.messages import read_example, read_prompt
from plumbline.rows import rows_of_bytes
from plumbline.safety.drift import read_texts
from plumbline.safety.verifier.knowledge import read_documents

PLACE = "rows.jsonl:7"
FIELDS = sorted(
    {name for _, fields, _ in FORMATS for name in fields}
    | set(
        "messages conversations conversation prompt answer completion response output question instruction input".split()
    )
    | set("system system_prompt tools functions history chosen rejected margin p_chosen chosen_harmful kind id".split())
    | set("category pair topic text fact doc_id responses gold tags target_labels warning instances source".split())
    | {"is_response_0_safe", "is_response_1_safe", "chosen_harmful", "rejected_harmful", "annotator2", "weight"}
)
TEXTS = ["", " ", "Why?", "Because.", "né 👍", "a\u2028b", "\ud83d", "x\0y", "\n\nHuman: Why?\n\nAssistant: So.", "true",
         "[{'role': 'user'}]", '[{"role": "user", "content": "x"}]', "{", "0.5", "nan", "1e999", "harmful", "ordinary"]  # fmt: skip
ROLES = [
    "user",
    "assistant",
    "system",
    "tool",
    "human",
    "gpt",
    "User",
    "function_call",
    "observation",
    "narrator",
    "",
    None,
]
MESSAGE = "role content from value tool_calls name tool_call_id reasoning_content thinking function_call weight".split()


_USER, _BOT = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}
_CALL = {"id": "c", "type": "function", "function": {"name": "tide", "arguments": "{}"}}
WHOLE: list[dict[str, Any]] = [
    {"prompt": "Why?", "answer": "Because."},
    {"instruction": "Add.", "input": "1 1", "output": "2", "history": [["Hi", "Hello."]]},
    {"messages": [_USER, {"role": "assistant", "content": None, "tool_calls": [_CALL]},
                  {"role": "tool", "content": "14:05", "tool_call_id": "c"}, _BOT], "tools": [{"name": "tide"}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "Why?"}]}, _BOT], "system": "Be brief."},
    {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]},
    {"prompt": "Why?", "chosen": [_USER, _BOT], "rejected": [_USER, {"role": "assistant", "content": "No."}], "margin": 1},
    {"chosen": "\n\nHuman: Why?\n\nAssistant: So.", "rejected": "\n\nHuman: Why?\n\nAssistant: No."},
    {"chosen": [_USER, _BOT], "rejected": [_USER, {"role": "assistant", "content": "No."}], "p_chosen": 0.4},
    {"instruction": "Why?", "completions": [{"response": "a", "overall_score": 1}, {"response": "b", "overall_score": 2}]},
    {"input": {"messages": [_USER]}, "preferred_output": [_BOT], "non_preferred_output": [{"role": "assistant", "content": "No."}]},
    {"prompt": "Why?", "response_1": "a", "response_2": "b", "preference_strength": -2},
    {"prompt": "Why?", "response_0": "a", "response_1": "b", "better_response_id": 1, "is_response_0_safe": True},
    {"instruction": "Why?", "instances": [{"input": "", "output": "x"}]},
    {"prompt": "Why?", "responses": ["a", {"text": "b", "model": "m"}], "gold": {"winner": 0}, "tags": {"axis": "help"}},
    {"prompt": "Why?", "kind": "harmful", "id": "one", "category": "S1", "pair": "", "topic": "x"},
    {"id": "d1", "text": "The hut has 12 beds."},
]  # fmt: skip


def scalar(rng: random.Random) -> Any:
    return rng.choice(
        [None, True, False, 0, 1, -1, 3, 0.5, 1e308, float("nan"), float("inf"), 10**30, *TEXTS, *TEXTS * 2]
    )


def value(rng: random.Random, depth: int = 0) -> Any:
    """Mostly what a field may hold, sometimes anything."""
    kind = rng.random()
    if kind < 0.45 or depth > 3:
        return scalar(rng)
    if kind < 0.75:
        return [message(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind < 0.85:
        return [value(rng, depth + 1) for _ in range(rng.randrange(3))]
    return {rng.choice(FIELDS + MESSAGE): value(rng, depth + 1) for _ in range(rng.randrange(3))}


def message(rng: random.Random, depth: int) -> Any:
    if rng.random() < 0.1:
        return value(rng, depth)
    one: dict[str, Any] = {"role": rng.choice(ROLES), "content": rng.choice(TEXTS)}
    for name in rng.sample(MESSAGE, rng.randrange(3)):
        one[name] = value(rng, depth + 1)
    if rng.random() < 0.2:
        one.pop(rng.choice(["role", "content"]), None)
    return one


def row(rng: random.Random) -> dict[str, Any]:
    """A whole row in some form, the same with a few values changed, or random fields."""
    if rng.random() < 0.75:
        whole: dict[str, Any] = json.loads(json.dumps(rng.choice(WHOLE)))
        for _ in range(rng.choice([0, 0, 1, 1, 2])):
            change(rng, whole)
        return whole
    fields = set(rng.choice(FORMATS)[1]) if rng.random() < 0.4 else set()
    fields |= set(rng.sample(FIELDS, rng.randrange(1, 5)))
    return {name: value(rng) for name in sorted(fields)}


def change(rng: random.Random, one: Any) -> None:
    """Replaces, adds or takes away a value somewhere below."""
    while isinstance(one, dict | list) and one:
        key = rng.choice(sorted(one)) if isinstance(one, dict) else rng.randrange(len(one))
        if isinstance(one[key], dict | list) and one[key] and rng.random() < 0.6:
            one = one[key]
            continue
        if rng.random() < 0.3:
            del one[key]
        else:
            one[key] = value(rng)
        return


def encoded(rng: random.Random, rows: list[dict[str, Any]]) -> tuple[str, bytes]:
    """(name, bytes) of a file: rows in one of its forms, whole or with some bytes changed, or only bytes."""
    suffix = rng.choice([".jsonl", ".jsonl", ".json", ".csv", ".tsv", ".jsonl.gz", ".parquet"])
    if rng.random() < 0.1:
        return f"f{suffix}", rng.randbytes(rng.randrange(200))
    ascii_only = rng.random() < 0.7
    if suffix == ".json":
        text = json.dumps(rows, ensure_ascii=ascii_only)
    elif suffix in (".csv", ".tsv"):
        cells = [[str(cell) for cell in one.values()] for one in rows]
        text = "\n".join(("," if suffix == ".csv" else "\t").join(line) for line in [list(rows[0]), *cells])
    else:
        text = rng.choice(["\n", "\r\n", "\n\n"]).join(json.dumps(one, ensure_ascii=ascii_only) for one in rows)
    content = bytearray(text.encode(rng.choice(["utf-8", "utf-8", "utf-8-sig", "utf-16"]), errors="surrogatepass"))
    for _ in range(rng.randrange(3) if rng.random() < 0.3 else 0):
        content[rng.randrange(len(content))] = rng.randrange(256)
    return f"f{suffix}", bytes(content)


def readers(folder: Path) -> dict[str, Callable[[dict[str, Any]], Any]]:
    """name -> what reads one row that a file gave, and may raise ValueError."""

    def through_a_file(read: Callable[[Path], Any]) -> Callable[[dict[str, Any]], Any]:
        def call(one: dict[str, Any]) -> Any:
            file = folder / "one.jsonl"
            file.write_text(json.dumps(one), encoding="utf-8")
            return read(file)

        return call

    return {
        "SFT examples": lambda one: read_example(PLACE, one),
        "prompts": lambda one: read_prompt(PLACE, one),
        "pairs, strict": lambda one: parse_row(PLACE, one, "source"),
        "pairs, counted": lambda one: parse_row(PLACE, one, "source", Counter()),
        "curate": lambda one: texts(PLACE, one),
        "label import": lambda one: item_of(PLACE, one, source="source"),
        "transcripts": lambda one: _recorded(one, PLACE),
        "evaluation samples": lambda one: _parse(one, PLACE, "id"),
        "documents": through_a_file(read_documents),
        "drift": through_a_file(read_texts),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng, started = random.Random(options.seed), time.perf_counter()
    taken: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    failures: list[str] = []

    def asked(name: str, call: Callable[[], Any], place: str) -> Any:
        try:
            found = call()
        except ValueError as error:
            refused[name] += 1
            if place not in str(error):
                failures.append(f"{name}: {error}")
            return None
        except Exception as error:
            failures.append(f"{name}: {type(error).__name__}: {error}")
            return None
        taken[name] += 1
        return found

    with tempfile.TemporaryDirectory() as scratch:
        asks = readers(Path(scratch))
        for _ in range(options.rows):
            file, content = encoded(rng, [row(rng) for _ in range(rng.randrange(1, 3))])
            asked("files", lambda: list(rows_of_bytes(content, file)), file)  # noqa: B023
            line = json.dumps(row(rng)).encode()
            for _, one in asked("rows", lambda: list(rows_of_bytes(line, PLACE[:-2])), PLACE[:-2]) or []:  # noqa: B023
                for name, read in asks.items():
                    asked(name, lambda: read(one), ".jsonl")  # noqa: B023
    for failure in failures[:20]:
        print(failure, file=sys.stderr)
    report = {
        "rows": options.rows,
        "taken": dict(taken),
        "refused": dict(refused),
        "failures": len(failures),
        "seconds": round(time.perf_counter() - started, 1),
    }
    print(json.dumps(report))
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
