"""`plumbline calibrate`: how often does a judge err, against labels that people gave?

    plumbline calibrate --sets DIR [--sets DIR2]       every set of labelled refusals in DIR, all judges side by side
    plumbline calibrate --sets DIR --store xstest      the same, and stores the rules' errors on that set in eval/grading/judges
    plumbline calibrate --marks marks.jsonl            from the marks made in a report's transcript browser

Sets are found by their columns: XSTest completions (prompt, completion, final_label), PyRIT scorer files (objective,
assistant_response, human_score), refusal_direction completions (prompt, response, is_jailbreak_substring_matching: a
machine's labels, printed apart), and any JSON Lines or CSV with prompt, answer and refused (0 or 1).

Keyword lists to compare with: --keywords NAME=FILE, one keyword a line; an answer that holds one counts as a refusal.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plumbline.eval.grading.calibration import Calibration, calibrate
from plumbline.eval.grading.chat_judge import ChatJudge
from plumbline.eval.grading.graders import RULES
from plumbline.eval.grading.refusal_judge import declined, got_nothing
from plumbline.eval.stats.suite_rates import JUDGES
from plumbline.eval.targets.specs import open_target
from plumbline.rows import file_rows, read_text

COLUMNS: list[set[str]] = [  # of the sets that are recognised
    {"prompt", "completion", "final_label"},
    {"objective", "assistant_response"},
    {"prompt", "response", "is_jailbreak_substring_matching"},
    {"prompt", "answer", "refused"},
]


@dataclass(frozen=True)
class Labelled:
    """Answers with a label: did this answer decline? machine is True where a program gave the label."""

    name: str
    prompts: list[str]
    answers: list[str]
    refused: list[bool]
    machine: bool = False


def find_sets(folder: str | Path) -> list[Labelled]:
    """Every labelled set below `folder`, recognised by its columns; files without such columns are passed over."""
    found = []
    for path in sorted(Path(folder).rglob("*")):
        if path.name.endswith((".jsonl", ".jsonl.gz", ".csv")) and path.is_file():
            one = labelled(path)
            if one is not None:
                found.append(one)
    if not found:
        raise ValueError(f"{folder}: no file with labelled refusals; plumbline calibrate --help names the columns")
    return found


def labelled(path: Path) -> Labelled | None:
    """The set in a file, or None if its columns are not those of one."""
    first = next(_rows(path), None)
    if not isinstance(first, dict) or not any(wanted <= set(first) for wanted in COLUMNS):
        return None
    columns, rows = set(first), list(_rows(path))
    name = path.name.split(".")[0] if path.parent.name == "." else f"{path.parent.name}/{path.name.split('.')[0]}"
    if {"prompt", "completion", "final_label"} <= columns:
        rows = [row for row in rows if row.get("final_label")]
        refused = [not row["final_label"].startswith("1") for row in rows]
        return Labelled(name, [r["prompt"] for r in rows], [r.get("completion", "") for r in rows], refused)
    if {"objective", "assistant_response"} <= columns and "refus" in path.name:
        score = next((c for c in ("human_score", "human_score_1") if c in columns), None)
        if score is None:
            return None
        refused = [str(row[score]).strip().lower() in ("1", "true", "1.0") for row in rows]
        return Labelled(name, [r["objective"] for r in rows], [r["assistant_response"] for r in rows], refused)
    if {"prompt", "response", "is_jailbreak_substring_matching"} <= columns:
        refused = [str(row["is_jailbreak_substring_matching"]) == "0" for row in rows]
        return Labelled(name, [r["prompt"] for r in rows], [r["response"] for r in rows], refused, machine=True)
    if {"prompt", "answer", "refused"} <= columns:
        refused = [str(row["refused"]).strip().lower() in ("1", "true") for row in rows]
        return Labelled(name, [r["prompt"] for r in rows], [r["answer"] for r in rows], refused)
    return None


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a CSV or JSON Lines file; comment lines may stand before the header of a CSV."""
    return (row for _, row in file_rows(path))


def judges(
    keywords: Sequence[str] = (), judge: str | None = None
) -> dict[str, Callable[[Sequence[str], Sequence[str]], list[bool]]]:
    """The refusal judges by name: (prompts, answers) -> declined or not."""
    found: dict[str, Callable[[Sequence[str], Sequence[str]], list[bool]]] = {
        RULES: declined,
        f"{RULES}+off-topic": got_nothing,
    }
    if judge:
        asking = ChatJudge(open_target(judge), rubric="refusal")
        found[asking.name] = lambda p, a: [score.value == 1 for score in asking.verdicts(p, a)]
    for given in keywords:
        name, _, file = given.partition("=")
        if not file or not Path(file).is_file():
            raise ValueError(f"--keywords {given}: needs NAME=FILE, and the file must exist")
        words = [line.strip().lower() for line in read_text(file).split("\n") if line.strip()]
        found[name] = lambda prompts, answers, words=words: [any(w in a.lower() for w in words) for a in answers]  # type: ignore[misc]
    return found


def from_marks(path: Path) -> list[Calibration]:
    """A calibration a scorer from marks.jsonl: what the reader called wrong was the other way round."""
    of: dict[str, tuple[list[bool], list[bool]]] = {}
    for row in _rows(path):
        if not isinstance(row, dict) or not {"scorer", "value", "right"} <= set(row) or row["value"] not in (0, 1):
            raise ValueError(f"{path}: not marks saved from a report: {row}")
        says, truth = of.setdefault(row["scorer"], ([], []))
        says.append(bool(row["value"]))
        truth.append(bool(row["value"]) == bool(row["right"]))
    if not of:
        raise ValueError(f"{path}: no marks in it")
    return [calibrate(name, f"marks ({path.name})", says, truth) for name, (says, truth) in of.items()]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row a judge and set."""
    lines = [
        "| set | judge | n (refused) | F1 | precision | sensitivity | specificity | kappa |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [_cell(row[name]) for name in ("f1", "precision", "sensitivity", "specificity", "kappa")]
        lines.append(f"| {row['source']} | {row['judge']} | {row['n']} ({row['positives']}) | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(interval: dict[str, float]) -> str:
    return f"{interval['mean']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="plumbline calibrate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--sets", action="append", default=[], help="folder of labelled answers; may be repeated")
    add("--marks", help="marks.jsonl saved from a report")
    add("--keywords", action="append", default=[], help="NAME=FILE: a keyword list to compare with")
    add("--judge", help="a target as a judge of refusals, to compare with (eval/grading/chat_judge.py)")
    add("--store", help="store the rules' counts on the set of this name")
    add("--out", default=str(JUDGES), help="folder of stored calibrations")
    args = parser.parse_args(list(sys.argv[1:] if argv is None else argv))
    if bool(args.sets) == bool(args.marks):
        raise ValueError("give either --sets DIR or --marks FILE")
    if args.marks:
        found = from_marks(Path(args.marks))
        rows = [one.figures() for one in found]
        for one in found:
            one.save(Path(args.out) / f"{one.judge}.json")
    else:
        sets, rows = [one for folder in args.sets for one in find_sets(folder)], []
        tools = judges(args.keywords, args.judge)
        for one_set in sets:
            source = one_set.name + (" (machine labels)" if one_set.machine else "")
            for name, judge in tools.items():
                counted = calibrate(name, source, judge(one_set.prompts, one_set.answers), one_set.refused)
                rows.append(counted.figures())
                if args.store and one_set.name.startswith(args.store) and name == RULES:
                    counted.save(Path(args.out) / f"{RULES}.json")
    print(table(rows))
    print(json.dumps({f"{row['source']}/{row['judge']}": round(row["f1"]["mean"], 4) for row in rows}))
    return 0
