"""`plumbline curate`: takes bad and repeated rows out of training data, balances what is left, and says what went and why.

    plumbline curate --data rows.jsonl --output_dir runs/curate [--keep 5000]

Leaves kept.jsonl (the rows as they came), dropped.jsonl (each with its reason), report.json. See align/data/curation.py for the
rules of levels 1 and 2, align/data/domain_weights.py for level 3, which runs when `keep` is given.
"""

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from plumbline.align.data.curation import Curated, CurationRules, Row, curate
from plumbline.align.data.domain_weights import QualityScore, balance, difficulty
from plumbline.align.data.formats import NO_FORM, form_of, parse_row, read_preferences
from plumbline.align.runtime.launch import parse_settings
from plumbline.messages import ANSWERS, CONVERSATIONS, Messages, last_user_text, read_example, say_forms
from plumbline.paths import STARTER
from plumbline.rows import read_rows


@dataclass(kw_only=True)
class CurateSettings:
    """Which rows, which rules."""

    data: str = field(
        default="", metadata={"help": "JSON Lines, JSON, CSV (also .gz) or Parquet: file or folder; or a hub id"}
    )
    output_dir: str = field(
        default="runs/curate", metadata={"help": "folder of kept.jsonl, dropped.jsonl, report.json"}
    )
    languages: str = field(default="en", metadata={"help": "ISO codes that stay, with commas; none: any"})
    near_duplicate: float = field(default=0.7, metadata={"help": "Jaccard index of 3-word shingles"})
    paraphrase_prompt: float = field(default=0.75, metadata={"help": "cosine of the prompts of a paraphrase, at least"})
    paraphrase_answer: float = field(default=0.80, metadata={"help": "and of the answers"})
    semantic: bool = field(default=True, metadata={"help": "level 2: paraphrases, clusters"})
    outlier: float = field(default=0.0, metadata={"help": "share of rows farthest from their cluster to drop"})
    drop_personal: bool = field(default=False, metadata={"help": "drop rows with personal data; else they are counted"})
    toxicity: float | None = field(
        default=None, metadata={"help": "drop answers of at least this risk; none: not asked"}
    )
    keep: int | None = field(
        default=None, metadata={"help": "level 3: rows to keep, balanced over domain and difficulty"}
    )
    evenness: float = field(default=0.5, metadata={"help": "of domains: 0 as in the data, 1 all the same"})
    domain_field: str | None = field(default=None, metadata={"help": "field that names the domain; none: clusters"})
    seed: int = field(default=0, metadata={"help": "of the clusters"})

    def rules(self) -> CurationRules:
        """For align/data/curation.py."""
        languages = () if self.languages == "none" else tuple(code.strip() for code in self.languages.split(","))
        return CurationRules(
            languages=languages,
            near_duplicate=self.near_duplicate,
            paraphrase=(self.paraphrase_prompt, self.paraphrase_answer),
            outlier=self.outlier,
            drop_personal=self.drop_personal,
        )


def read(source: str) -> tuple[list[dict[str, Any]], list[Row]]:
    """(rows as they are, prompt and answer of each). ValueError for a row without both, with its place."""
    if not source:
        raise ValueError("--data is missing: name a file, a folder or a hub id")
    raw, rows, forms = [], [], Counter[str]()
    for place, one in read_rows(source):
        form, found = texts(place, one)
        forms[form] += 1
        for prompt, answer in found:
            raw.append(one)
            rows.append(Row(prompt, answer, place))
    print(say_forms("curate", source, forms))
    return raw, rows


def texts(place: str, row: dict[str, Any]) -> tuple[str, list[tuple[str, str]]]:
    """(form, prompt and answer) of a row, of each instance in Self-Instruct's form; of a pair, the chosen answer."""
    prompt = row.get("instruction", row.get("prompt"))
    if isinstance(row.get("instances"), list) and isinstance(prompt, str):
        found = []
        for at, instance in enumerate(row["instances"]):
            if not isinstance(instance, dict) or not isinstance(instance.get("output"), str):
                raise ValueError(f"{place}: instances[{at}]={instance!r:.80} needs an output, a text")
            more = instance.get("input")
            joined = f"{prompt}\n\n{more}" if isinstance(more, str) and more.strip() else prompt
            found.append((joined, instance["output"]))
        return "Self-Instruct", found
    if form_of(row) != NO_FORM and not row.keys() & {*ANSWERS, *CONVERSATIONS}:
        pair = parse_row(place, row, "")
        assert pair is not None
        return form_of(row), [(_text(pair.prompt), _text(pair.chosen))]
    example = read_example(place, row, empty_answers=True)  # which are dropped, with their reason
    return example.form, [(_text(example.prompt), _text(example.answer))]


def _text(messages: Messages) -> str:
    """What is said, calls of tools included."""
    said = [[m["content"], *([json.dumps(m["tool_calls"])] if m.get("tool_calls") else [])] for m in messages]
    return "\n\n".join(text for texts in said for text in texts if text)


def run(settings: CurateSettings) -> dict[str, Any]:
    """Reads, filters, balances, writes; returns the report."""
    rules = settings.rules()
    started = time.perf_counter()
    raw, rows = read(settings.data)
    embed = None
    if settings.semantic or settings.keep is not None:
        from plumbline.safety.embedder.embedding import Embedder

        embed = Embedder(cache_size=0).embed  # each text comes once: a cache would only hold memory
    result = curate(rows, rules, embed=embed if settings.semantic else None, seed=settings.seed)
    reasons = {
        row: (drop.rule, drop.detail, drop.kept_row) for row, drop in enumerate(result.drops) if drop is not None
    }
    if settings.toxicity is not None:
        from plumbline.safety.verifier.toxicity import load_toxicity_scanner

        kept = result.kept()
        risks = load_toxicity_scanner().risk([rows[row].answer for row in kept])
        reasons |= {
            row: ("toxicity", f"{r:.2f}", None) for row, r in zip(kept, risks, strict=True) if r >= settings.toxicity
        }
    if settings.keep is not None:
        assert embed is not None
        kept = [row for row in range(len(rows)) if row not in reasons]
        chosen = level_three(settings, raw, rows, result, kept, embed)
        reasons |= {row: ("balance", "its domain and difficulty have better rows", None) for row in set(kept) - chosen}
    report = write(settings, raw, rows, reasons, result)
    report["seconds"] = round(time.perf_counter() - started, 1)
    return report


def level_three(
    settings: CurateSettings,
    raw: Sequence[dict[str, Any]],
    rows: Sequence[Row],
    result: Curated,
    kept: list[int],
    embed: Any,
) -> set[int]:
    """Rows that stay, by domain, difficulty and a quality score fitted on the starter preferences."""
    pairs = read_preferences(STARTER / "preferences.jsonl")
    quality = QualityScore.fit(
        embed,
        [last_user_text(p.prompt) for p in pairs],
        [p.chosen[-1]["content"] for p in pairs],
        [p.rejected[-1]["content"] for p in pairs],
    )
    prompts, answers = [rows[row].prompt for row in kept], [rows[row].answer for row in kept]
    name = settings.domain_field
    domain = [str(raw[row].get(name)) for row in kept] if name else result.cluster[kept].tolist()
    scores = quality([p[:400] for p in prompts], [a[:400] for a in answers])
    assert settings.keep is not None
    chosen = balance(
        domain, difficulty(prompts, answers).tolist(), scores.tolist(), keep=settings.keep, evenness=settings.evenness
    )
    return {kept[at] for at in chosen}


def write(
    settings: CurateSettings,
    raw: Sequence[dict[str, Any]],
    rows: Sequence[Row],
    reasons: dict[int, tuple[str, str, int | None]],
    result: Curated,
) -> dict[str, Any]:
    """The three files, and the report."""
    folder = Path(settings.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with (
        (folder / "kept.jsonl").open("w", encoding="utf-8") as kept,
        (folder / "dropped.jsonl").open("w", encoding="utf-8") as dropped,
    ):
        for number, row in enumerate(raw):
            if number not in reasons:
                kept.write(json.dumps(row, ensure_ascii=False) + "\n")
                continue
            rule, detail, other = reasons[number]
            why = {"rule": rule, "detail": detail, "place": rows[number].place}
            if other is not None:
                why["kept"] = rows[other].place
            dropped.write(json.dumps({"why": why, "row": row}, ensure_ascii=False) + "\n")
    sizes = np.bincount(result.cluster[result.cluster >= 0]) if (result.cluster >= 0).any() else np.zeros(0)
    report = {
        "data": settings.data,
        "rows": len(rows),
        "kept": len(rows) - len(reasons),
        "dropped": dict(Counter(rule for rule, _, _ in reasons.values()).most_common()),
        "personal_data": len(result.personal),
        "clusters": {
            "count": int((sizes > 0).sum()),
            "largest_share": float(sizes.max() / sizes.sum()) if len(sizes) else 0.0,
        },
    }
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    (settings,) = parse_settings((CurateSettings,), argv)
    report = run(settings)
    print(f"{report['rows']} rows, {report['kept']} kept -> {settings.output_dir}/kept.jsonl")
    for rule, count in report["dropped"].items():
        print(f"  {rule:18}{count:8}{count / report['rows']:8.1%}")
    print(f"  with personal data {report['personal_data']:7} (dropped only with --drop_personal)")
    print(json.dumps(report))
