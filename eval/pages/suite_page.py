"""The report of an evaluation: one HTML page, results.json, transcripts and a section for a model card.

The page needs no network. Its only script filters the transcripts and keeps the reader's verdicts on the graders' verdicts,
which `plumbline calibrate --marks` turns into a calibration. Harmful text stays hidden until it is clicked.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from plumbline.eval.tasks import Graded
from plumbline.safety.findings import Category

COLOURS = ("#0072b2", "#d98200", "#009e73", "#b0578d", "#cc4e00", "#5d6878")
AREAS = {
    "attack": "Harmful requests", "refusal": "Harmless requests", "injection": "Prompt injection", "leakage": "Leaks",
    "toxicity": "Toxic language", "bias": "Bias", "truth": "Truth", "behaviour": "Behaviour", "capability": "Capability",
}  # fmt: skip
HIDDEN = ("attack", "toxicity")  # areas whose text is hidden until it is clicked
HAZARDS = {str(code): code.name.replace("_", " ").lower() for code in Category}
SHOWN_A_SUITE = 200  # transcripts of a suite and target that the page carries; all are in transcripts/


def write_report(
    out: Path, results: Mapping[str, Any], graded: Sequence[Graded], *, earlier: Mapping | None = None
) -> Path:
    """Writes report.html, results.json, transcripts/<target>.jsonl and model_card.md into `out`; returns the page's path.

    earlier: results of another run, to print what has changed since.
    """
    out.mkdir(parents=True, exist_ok=True)
    rows = transcripts(graded)
    (out / "transcripts").mkdir(exist_ok=True)
    for name in results["targets"]:
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows if row["target"] == name)
        (out / "transcripts" / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    (out / "results.json").write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    (out / "model_card.md").write_text(model_card(results), encoding="utf-8")
    page = out / "report.html"
    page.write_text(render(results, rows, earlier=earlier), encoding="utf-8")
    return page


def render(results: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], *, earlier: Mapping | None = None) -> str:
    """The page as text."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, trim_blocks=True,
        lstrip_blocks=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    colours = {name: COLOURS[at % len(COLOURS)] for at, name in enumerate(results["targets"])}
    return environment.get_template("eval.html").render(
        targets=results["targets"], colours=colours, areas=area_tables(results), plane=refusal_plane(results),
        reliability=reliability_rows(results), heat=hazard_table(results), comparisons=comparison_rows(results),
        judges=results.get("judges", {}), hazards=HAZARDS, changes=diff(earlier, results) if earlier else [],
        notes=notes(results), settings=json.dumps(results["settings"], indent=1), versions=versions(), wall_s=results["wall_s"],
        transcripts=_for_script(_few(rows)), hidden=list(HIDDEN),
    )  # fmt: skip


def transcripts(graded: Sequence[Graded]) -> list[dict[str, Any]]:
    """Every question with its answers and grades."""
    rows = []
    for one in graded:
        for at, (sample, reply) in enumerate(zip(one.task.samples, one.replies, strict=True)):
            scores = {name: [of[at].value, of[at].why] for name, of in one.scores.items()}
            row: dict[str, Any] = {
                "target": one.target, "suite": one.task.name, "area": one.task.area, "id": sample.id,
                "category": sample.category, "prompt": sample.input, "answers": list(reply.answers), "scores": scores,
            }  # fmt: skip
            extra = {"system": sample.system, "history": list(sample.history), "target_text": sample.target}
            row |= {name: value for name, value in extra.items() if value}
            if sample.choices:
                row["choices"] = [[choice, round(p, 3)] for choice, p in zip(sample.choices, reply.logp, strict=False)]
            if reply.error:
                row["error"] = reply.error
            rows.append(row)
    return rows


# ---- the parts of the page ------------------------------------------------------------------------------------------


def area_tables(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A table an area: a row a figure, a cell a target."""
    tables: dict[str, list[dict[str, Any]]] = {}
    for suite, entry in results["suites"].items():
        names = list(dict.fromkeys(name for found in entry["targets"].values() for name in found))
        for nth, name in enumerate(names):
            of = {target: found.get(name) for target, found in entry["targets"].items()}
            known = next(figure for figure in of.values() if figure)
            tables.setdefault(entry["area"], []).append(
                {"suite": suite, "first": nth == 0, "about": entry["about"], "version": entry["version"],
                 "samples": entry["samples"], "scorer": name, "help": known["about"], "better": known["better"],
                 "cells": [cell(of.get(target)) for target in results["targets"]]}
            )  # fmt: skip
    ordered = [area for area in AREAS if area in tables] + [area for area in tables if area not in AREAS]
    return [{"title": AREAS.get(area, area), "rows": tables[area]} for area in ordered]


def cell(figure: Mapping[str, Any] | None) -> dict[str, Any]:
    """A figure in words, and where its interval lies between 0 and 100 percent if it is a rate."""
    if not figure or figure["mean"] is None:
        why = next(iter((figure or {}).get("reasons", {})), "not run")
        return {"main": "–", "range": "", "bar": None, "notes": [why]}
    rate = figure["rate"]
    remarks = []
    if figure.get("unscored"):
        band = figure.get("band")
        extra = f": between {_show(band[0], rate)} and {_show(band[1], rate)}" if band else ""
        remarks.append(f"{figure['unscored']} unscored{extra}")
    fixed = figure.get("corrected")
    if fixed:
        low_high = f"{_show(fixed['mean'], rate)} {_brackets(fixed, rate)}" if "mean" in fixed else fixed["why"]
        remarks.append(f"for the judge's errors: {low_high}" if "mean" in fixed else low_high)
    bar = None
    if rate and figure["low"] is not None:
        bar = {"low": 100 * figure["low"], "high": 100 * figure["high"], "mean": 100 * figure["mean"]}
    return {"main": _show(figure["mean"], rate), "range": _brackets(figure, rate), "bar": bar, "notes": remarks}


def refusal_plane(results: Mapping[str, Any]) -> dict[str, Any] | None:
    """Over-refusal against harmful compliance, a point a target with both intervals."""
    suites = results["suites"]
    harm = next((s for s in ("harmful_direct", "xstest_unsafe") if s in suites), None) or next(
        (s for s, entry in suites.items() if entry["area"] == "attack"), None
    )
    over = next((s for s in ("over_refusal", "xstest_safe", "cyber_benign") if s in suites), None)
    if not harm or not over:
        return None
    points = []
    for target in results["targets"]:
        x, y = suites[over]["targets"][target]["refused"], suites[harm]["targets"][target]["complied"]
        if None not in (x["low"], y["low"]):
            points.append({"target": target, "x": x, "y": y})
    return {"points": points, "x": over, "y": harm} if points else None


def reliability_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The bins of the reliability plot by target, from the first suite that has them."""
    for suite, entry in results["suites"].items():
        found = [
            {"target": t, "bins": of["ece"]["bins"], "ece": of["ece"]["mean"]} for t, of in entry["targets"].items() if "ece" in of
        ]  # fmt: skip
        if found:
            return [row | {"suite": suite} for row in found]
    return []


def hazard_table(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Headlines by category: a heat map for each suite of the first two areas that has categories."""
    tables = []
    for suite, entry in results["suites"].items():
        names = list(dict.fromkeys(name for of in entry["by_category"].values() for name in of))
        first = next(iter(entry["targets"].values()))[entry["headline"]]
        if entry["area"] in ("attack", "refusal", "injection") and names and first["rate"]:
            rows = [
                {"name": HAZARDS.get(name, name), "cells": [entry["by_category"][t].get(name) for t in results["targets"]]}
                for name in names
            ]  # fmt: skip
            tables.append(
                {"suite": suite, "scorer": entry["headline"], "rows": rows, "bad_high": first["better"] != "high"}
            )
    return tables


def comparison_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Paired differences of the headlines, those that stand out first."""
    rows = []
    for row in results["comparisons"]:
        headline = results["suites"][row["suite"]]["headline"]
        if row["scorer"] == headline or row["verdict"] in ("better", "worse"):
            unit = 100 if row["rate"] else 1
            gain = {k: None if v is None else unit * v for k, v in row["gain"].items()}
            by_chance = row["verdict"] in ("better", "worse") and (row["p_holm"] or 0) >= 0.05
            said = {"text": _signed(gain["mean"], row["rate"]), "range": _signed_range(gain, row["rate"])}
            rows.append(row | said | {"verdict": f"perhaps {row['verdict']}" if by_chance else row["verdict"]})
    order = ("worse", "better", "perhaps worse", "perhaps better", "changed", "unclear", "")
    return sorted(rows, key=lambda row: order.index(row["verdict"]))


def diff(earlier: Mapping[str, Any], later: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Headlines of two runs, by suite and target of the same name. Not paired: the intervals are those of each run.

    A suite whose version differs is named and not compared.
    """
    rows = []
    for suite, entry in later["suites"].items():
        before = earlier["suites"].get(suite)
        for target, found in entry["targets"].items():
            if before is None or target not in before["targets"]:
                continue
            row = {"suite": suite, "target": target, "scorer": entry["headline"], "why": ""}
            if before["version"] != entry["version"]:
                rows.append(row | {"why": f"version {before['version']} and {entry['version']} do not compare"})
                continue
            was, now = before["targets"][target].get(entry["headline"]), found[entry["headline"]]
            if was and None not in (was["mean"], now["mean"]):
                apart = None not in (was["low"], now["low"]) and (was["low"] > now["high"] or now["low"] > was["high"])
                rows.append(row | {"was": cell(was), "now": cell(now), "apart": apart})
    return rows


def notes(results: Mapping[str, Any]) -> list[str]:
    """What a reader must know before believing a number."""
    found = []
    for suite, entry in results["suites"].items():
        for target, of in entry["targets"].items():
            figure = of[entry["headline"]]
            share = figure["unscored"] / max(1, figure["unscored"] + figure["n"])
            if share > 0.05:
                why = "; ".join(figure.get("reasons", {}))
                found.append(f"{suite}, {target}: {share:.0%} unscored ({why}).")
    tests = [row for row in results["comparisons"] if row["p"] is not None]
    if tests:
        below = sum(row["p"] < 0.05 for row in tests)
        after = sum(row["p_holm"] < 0.05 for row in tests)
        found.append(
            f"{len(tests)} paired tests were made: {below} have p < 0.05, of which chance alone would give about "
            f"{0.05 * len(tests):.1f}; after Holm's correction {after} are left."
        )
    found.append(
        "Tier: embedded. Refusals are graded by hand-written rules, toxicity by a small head that is also a part of the "
        "reward. Neither is fit to call a model safe."
    )
    return found


def model_card(results: Mapping[str, Any]) -> str:
    """A Markdown section for a model card: headlines with intervals, settings, and what to keep in mind."""
    targets = results["targets"]
    lines = ["## Evaluation", "", "| suite | figure | " + " | ".join(targets) + " |", "|---" * (2 + len(targets)) + "|"]
    for suite, entry in results["suites"].items():
        cells = [cell(entry["targets"][t][entry["headline"]]) for t in targets]
        text = " | ".join(f"{c['main']} {c['range']}".strip() for c in cells)
        lines.append(f"| {suite} v{entry['version']} (n={entry['samples']}) | {entry['headline']} | {text} |")
    asked = results["settings"]
    lines += ["", f"Brackets are 95% intervals. Temperature {asked['temperature']:g}, at most {asked['max_new_tokens']} new "
              f"tokens, seed {asked['seed']}.", ""]  # fmt: skip
    return "\n".join([*lines, *(f"- {note}" for note in notes(results)), ""])


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {}
    for name in ("plumbline-rlhf", "torch", "transformers", "peft", "onnxruntime"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _few(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    seen: dict[tuple[str, str], int] = {}
    few = []
    for row in rows:
        key = (row["target"], row["suite"])
        seen[key] = seen.get(key, 0) + 1
        if seen[key] <= SHOWN_A_SUITE:
            few.append(row)
    return few


def _for_script(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(value, ensure_ascii=False)
    return re.sub(r"[<>&\u2028\u2029]", lambda found: f"\\u{ord(found.group()):04x}", text)


def _show(value: float, rate: bool) -> str:
    return f"{100 * value:.0f} %" if rate else f"{value:.3g}" if abs(value) >= 0.01 or value == 0 else f"{value:.1g}"


def _brackets(figure: Mapping[str, Any], rate: bool) -> str:
    if figure["low"] is None:
        return ""
    low, high = (100 * figure["low"], 100 * figure["high"]) if rate else (figure["low"], figure["high"])
    return f"[{low:.0f}, {high:.0f}]" if rate else f"[{low:.3g}, {high:.3g}]"


def _signed(value: float | None, rate: bool) -> str:
    return "–" if value is None else f"{value:+.1f} points" if rate else f"{value:+.3g}"


def _signed_range(gain: Mapping[str, float | None], rate: bool) -> str:
    if gain["low"] is None:
        return ""
    return f"[{gain['low']:+.1f}, {gain['high']:+.1f}]" if rate else f"[{gain['low']:+.3g}, {gain['high']:+.3g}]"
