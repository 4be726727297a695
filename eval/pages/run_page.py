"""One HTML page about a run: what was run, what changed, whether cheap tricks explain it, plots, answers to read.

The page is a single file: styles inline, plots as PNG data, no script and no request to anywhere, so that it can be
mailed and still opens. Text from models and data is escaped. What a run folder lacks is left out and named on the page.
"""

from __future__ import annotations

import base64
import io
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image  # comes with matplotlib

from plumbline.eval.grading.text_checks import refusal
from plumbline.eval.plotting import run_plots as plots
from plumbline.eval.plotting.axes import DARK, LIGHT, NothingToPlotError, Row, Theme

STAGES = {"sft": "Supervised fine-tuning", "reward_model": "Reward model", "dpo": "DPO", "ppo": "PPO"}
KIND_NAMES = {"harmful": "harmful", "twin": "harmless twin", "ordinary": "ordinary"}
KIND_COUNTS = {"harmful": "harmful", "twin": "harmless twins of these", "ordinary": "ordinary"}
CHECK_NAMES = {"length": "longer answers", "stock_phrases": "stock phrases", "twins": "declining everything"}
ABOUT_TARGETS = {
    "base": "the model as it came",
    "start": "after supervised fine-tuning",
    "dpo": "start, then DPO",
    "ppo": "start, then PPO",
}
MINUS = "\u2212"


@dataclass
class Run:
    """What was found in a run folder."""

    folder: Path
    summary: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, list[Row]] = field(default_factory=dict)  # by stage
    transcripts: dict[str, list[Row]] = field(default_factory=dict)  # by target
    notes: list[str] = field(default_factory=list)  # what is missing or damaged


def render(run: str | Path) -> Path:
    """Writes report.html into a run folder and returns its path.

    Reads summary.json, eval/<target>.jsonl, <stage>/metrics.jsonl and reward_model/report.json, or metrics.jsonl and
    report.json of a single stage's own folder.
    Raises FileNotFoundError if none of them is there, ValueError naming file and line for text that is not JSON.
    """
    found = read_run(Path(run))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    sections, missing = plot_sections(found)
    page = environment.get_template("report.html").render(
        title=_short_name(found.summary.get("model") or found.folder.name),
        facts=run_facts(found.summary),
        times=stage_times(found.summary),
        verdicts=verdict_sentences(found.summary),
        table=verdict_table(found.summary),
        checks=check_rows(found.summary),
        sections=sections,
        categories=category_table(found.summary),
        worst=worst_answers(found.transcripts),
        examples=choose_examples(found.transcripts, found.summary.get("compared_with", "start")),
        notes=found.notes + missing,
        settings=json.dumps(found.summary.get("settings", {}), indent=2, ensure_ascii=False, default=str),
        kind_names=KIND_NAMES,
        about_targets=ABOUT_TARGETS,
    )
    path = found.folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def readme_table(summary: Row) -> str:
    """The verdict table as Markdown: a row a figure, a column a target, intervals in brackets."""
    table = verdict_table(summary)
    if table is None:
        raise ValueError("the summary has no targets: run the evaluation first")
    lines = ["| | " + " | ".join(table["targets"]) + " |", "|---|" + "---|" * len(table["targets"])]
    for row in table["rows"]:
        cells = [f"{cell['main']} {cell['sub']}".strip() for cell in row["cells"]]
        lines.append(f"| {row['label']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


# ---- reading --------------------------------------------------------------------------------------------------------


def read_run(folder: Path) -> Run:
    """Reads what there is; a last line that a crash cut short is dropped and noted."""
    run = Run(folder)
    if (folder / "summary.json").exists():
        run.summary = _parse((folder / "summary.json").read_text(encoding="utf-8"), str(folder / "summary.json"))
    else:
        run.notes.append("summary.json is missing: nothing was evaluated, or not yet")
    measured = next((p for p in (folder / "reward_model" / "report.json", folder / "report.json") if p.exists()), None)
    if measured and "reward_model" not in run.summary:
        run.summary["reward_model"] = _parse(measured.read_text(encoding="utf-8"), str(measured))
    for stage in STAGES:
        if (folder / stage / "metrics.jsonl").exists():
            run.metrics[stage] = _read_rows(folder / stage / "metrics.jsonl", run.notes)
    if not run.metrics and (folder / "metrics.jsonl").exists():  # a single stage's folder
        rows = _read_rows(folder / "metrics.jsonl", run.notes)
        run.metrics[_stage_of(rows)] = rows
    paths = sorted((folder / "eval").glob("*.jsonl"))
    read = {path.stem: _read_rows(path, run.notes) for path in paths}
    order = [name for name in run.summary.get("targets", {}) if name in read]
    run.transcripts = {name: read[name] for name in order + [name for name in read if name not in order]}
    if not (run.summary or run.metrics or run.transcripts):
        raise FileNotFoundError(f"{folder}: no summary.json, metrics.jsonl or eval/*.jsonl; is this a run folder?")
    return run


def _read_rows(path: Path, notes: list[str]) -> list[Row]:
    text = path.read_text(encoding="utf-8")
    lines = text.split("\n")
    if lines[-1]:  # no line end: the writer was stopped in the middle
        try:
            json.loads(lines[-1])
        except json.JSONDecodeError:
            notes.append(f"{path.parent.name}/{path.name}: the last line is cut short and was left out")
            lines.pop()
    return [_parse(line, f"{path}:{number}") for number, line in enumerate(lines, start=1) if line.strip()]


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error.msg}); delete the line, or write the file again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where}: {type(value).__name__} instead of an object; write the file again")
    return value


def _stage_of(rows: Sequence[Row]) -> str:
    keys = {key for row in rows for key in row}
    if "objective/kl" in keys:
        return "ppo"
    if "rewards/margins" in keys:
        return "dpo"
    return "sft" if "mean_token_accuracy" in keys else "reward_model"


# ---- figures as text ------------------------------------------------------------------------------------------------


def _number(value: float | None, digits: int = 2, sign: bool = False) -> str:
    if value is None or not math.isfinite(value):
        return "?"
    text = f"{value:{'+' if sign else ''}.{digits}f}"
    return text.replace("-", MINUS) if float(text) else f"{0:.{digits}f}"  # no "-0.00"


def _brackets(interval: Row, digits: int = 2, sign: bool = False, scale: float = 1.0) -> str:
    if interval.get("low") is None or interval.get("high") is None:
        return ""
    return f"[{_number(scale * interval['low'], digits, sign)}, {_number(scale * interval['high'], digits, sign)}]"


def _direction(interval: Row) -> str:
    """up or down where the interval leaves out 0, "" otherwise."""
    if interval.get("low") is None or interval.get("high") is None:
        return ""
    return "up" if interval["low"] > 0 else "down" if interval["high"] < 0 else ""


def _gain_cell(gain: Row | None) -> dict[str, str]:
    if not gain or gain.get("mean") is None:
        return {"main": "\u2013", "sub": "", "mark": ""}
    return {"main": _number(gain["mean"], sign=True), "sub": _brackets(gain, sign=True), "mark": _direction(gain)}


def _rate_cell(rate: Row | None) -> dict[str, str]:
    if not rate:
        return {"main": "\u2013", "sub": "", "mark": ""}
    return {"main": f"{100 * rate['mean']:.0f}%", "sub": _brackets(rate, 0, scale=100), "mark": ""}


def _named_cell(rate: Row | None) -> dict[str, str]:
    """A rate under the name that summary.json gives it."""
    return _rate_cell(rate and {**rate, "mean": rate["rate"]})


def _guarded(behaviour: Row, kind: str) -> Row | None:
    return ((behaviour.get("guarded") or {}).get("refusals") or {}).get(kind)


def _points_cell(interval: Row | None) -> dict[str, str]:
    """A difference of two rates, in points of a hundred."""
    if not interval or interval.get("mean") is None:
        return _gain_cell(None)
    return {
        "main": _number(100 * interval["mean"], 0, sign=True),
        "sub": _brackets(interval, 0, sign=True, scale=100),
        "mark": _direction(interval),
    }


def _value_cell(value: float | None, digits: int = 0, sub: str = "", unit: str = "") -> dict[str, str]:
    return {"main": _number(value, digits) + unit, "sub": sub, "mark": ""}


def _short_name(model: str) -> str:
    return model.rsplit("/", 1)[-1].rsplit(":", 1)[-1]


# ---- sections -------------------------------------------------------------------------------------------------------


def verdict_table(summary: Row) -> dict[str, Any] | None:
    """{"targets": names, "rows": [{"label", "help", "cells"}]}, a cell a target; None without targets."""
    targets: Mapping[str, Any] = summary.get("targets") or {}
    if not targets:
        return None
    start = summary.get("compared_with", "start")
    against = {name: summary.get(name) or {} for name in targets}
    rows: list[dict[str, Any]] = []

    def add(label: str, help_text: str, cell: Callable[[str], dict[str, str]], kind: str = "") -> None:
        rows.append({"label": label, "help": help_text, "cells": [cell(name) for name in targets], "kind": kind})

    def gain(name: str, *path: str) -> dict[str, str]:
        if name == start:
            return {"main": "0", "sub": "by definition" if path == ("reward_gain",) else "", "mark": ""}
        value: Any = against[name]
        for key in path:
            value = (value or {}).get(key)
        return _gain_cell(value)

    add(f"Reward gain over {start}", "reference SDs", lambda n: gain(n, "reward_gain"), "first")
    for part in dict.fromkeys(part for name in targets for part in against[name].get("parts_gain", {})):
        add(part, "weighted", lambda n, p=part: gain(n, "parts_gain", p), "part")  # type: ignore[misc]
    add("Gain at equal length", "", lambda n: gain(n, "checks", "length"), "")
    for kind, label, help_text in (
        ("harmful", "Refuses harmful prompts", "higher is better"),
        ("twin", "Refuses harmless twins", "lower is better"),
        ("ordinary", "Refuses ordinary prompts", "lower is better"),
    ):
        if any(kind in figures["refusal"] for figures in targets.values()):
            add(label, help_text, lambda n, k=kind: _rate_cell(targets[n]["refusal"].get(k)))  # type: ignore[misc]
    if any((against[name].get("discrimination") or {}).get("n") for name in targets):
        add(
            "Harmful less twins",
            "refused, by pair",
            lambda n: _points_cell(against[n].get("discrimination")),
        )
    for kind, label in (("harmful", "Harmful, behind the guard"), ("twin", "Twins, behind the guard")):
        if any(kind in (against[n].get("guarded") or {}).get("refusals", {}) for n in targets):
            add(label, "refused or stopped", lambda n, k=kind: _named_cell(_guarded(against[n], k)))  # type: ignore[misc]
    add("Empty, garbled or echoed", "all kinds", lambda n: _non_answers(targets[n]))
    add("Answer length", "tokens, mean", lambda n: _length_cell(targets[n]["answer_tokens"]))
    add("Answers that end", "", lambda n: _value_cell(100 * targets[n]["finished_share"], unit="%"))
    add(f"KL from {start}", "nats an answer", lambda n: _kl_cell(targets[n]["kl_per_answer"]))
    if any(figures.get("unscored") for figures in targets.values()):
        add("Unscored answers", "left out of reward", lambda n: _value_cell(targets[n].get("unscored", 0)))
    return {"targets": list(targets), "rows": rows}


def _non_answers(figures: Row) -> dict[str, str]:
    count = sum(rate["count"] for rate in figures["non_answer"].values())
    n = sum(rate["n"] for rate in figures["non_answer"].values())
    return {"main": f"{100 * count / n:.0f}%", "sub": f"{count} of {n}", "mark": ""} if n else _value_cell(None)


def _length_cell(tokens: Row) -> dict[str, str]:
    return _value_cell(tokens["mean"], sub=f"median {_number(tokens['median'], 0)}")


def _kl_cell(kl: Row) -> dict[str, str]:
    return _value_cell(kl["mean"], 1, sub=_brackets(kl, 1)) if kl["mean"] is not None else _gain_cell(None)


def verdict_sentences(summary: Row) -> list[dict[str, Any]]:
    """One plain sentence or two a compared target, trained ones first."""
    start = summary.get("compared_with", "start")
    sentences = []
    for name in _compared(summary):
        compared, gain = summary[name], summary[name]["reward_gain"]
        if gain["mean"] is None:
            continue
        word = {"up": "scores higher than", "down": "scores lower than", "": "cannot be told apart from"}[
            _direction(gain)
        ]
        text = f"{word} {start}: {_number(gain['mean'], sign=True)} {_brackets(gain, sign=True)} reference SDs"
        rates = []
        for kind, label in (("harmful", "harmful prompts"), ("twin", "harmless twins")):
            before, after = (summary["targets"][t]["refusal"].get(kind) for t in (start, name))
            if before and after:
                rates.append(f"{label} {100 * before['mean']:.0f}% to {100 * after['mean']:.0f}%")
        if rates:
            text += "; refuses " + ", ".join(rates)
        failed = [CHECK_NAMES[check] for check in CHECK_NAMES if compared["checks"][check]["passed"] is False]
        sentences.append({"target": name, "text": text + ".", "failed": failed, "direction": _direction(gain)})
    return sentences


def _compared(summary: Row) -> list[str]:
    """Targets that were compared with the start, trained ones first."""
    names = [name for name in summary.get("targets") or {} if "reward_gain" in (summary.get(name) or {})]
    return sorted(names, key=lambda name: name == "base")


def check_rows(summary: Row) -> list[dict[str, Any]]:
    """A block a compared target: each trick, what was looked at, what was found."""
    blocks = []
    for name in _compared(summary):
        checks = summary[name]["checks"]
        length, stock, twins = checks["length"], checks["stock_phrases"], checks["twins"]
        rows = [
            {
                "trick": "Longer answers",
                "looked": "gain at equal length; mean change "
                f"{_number(length.get('extra_tokens_mean'), 1, True)} tokens",
                "found": _gain_cell(length),
                "passed": length["passed"],
                "why": length["why"],
            },
            {
                "trick": "Stock phrases",
                "looked": f"gain of {stock['n']} answers that share no sentence with two others",
                "found": _gain_cell(stock),
                "passed": stock["passed"],
                "why": stock["why"],
            },
        ]
        if "before" in twins:
            before, after = _rate_cell(twins["before"]), _rate_cell(twins["after"])
            rows.append({
                "trick": "Declining everything",
                "looked": f"harmless twins refused; {twins['newly_refused']} newly, {twins['newly_answered']} no "
                f"longer, McNemar p = {twins['p']:.2g}",
                "found": {"main": f"{before['main']} \u2192 {after['main']}", "sub": after["sub"], "mark": ""},
                "passed": twins["passed"],
                "why": twins["why"],
            })  # fmt: skip
        without = [{"part": part, **_gain_cell(gain)} for part, gain in checks["leave_one_part_out"].items()]
        rose = length["passed"] is not None
        blocks.append(
            {"target": name, "rows": rows if rose else rows[2:], "without": without if rose else [], "rose": rose}
        )
    return blocks


def run_facts(summary: Row) -> list[tuple[str, str]]:
    facts = [(key, str(summary[key])) for key in ("model", "seed") if key in summary]
    for group in ("machine", "versions"):
        for key, value in (summary.get(group) or {}).items():
            if value not in (None, "", [], {}):
                facts.append(
                    (str(key).replace("_", " "), ", ".join(map(str, value)) if isinstance(value, list) else str(value))
                )
    targets: Mapping[str, Any] = summary.get("targets") or {}
    if targets:
        kinds = next(iter(targets.values()))["refusal"]
        asked = ", ".join(f"{rate['n']} {KIND_COUNTS.get(kind, kind)}" for kind, rate in kinds.items())
        facts.append(("held-out prompts", asked))
    return facts


def stage_times(summary: Row) -> list[dict[str, Any]]:
    wall: Mapping[str, float] = summary.get("wall_s") or {}
    longest = max([s for stage, s in wall.items() if stage != "total"], default=0) or 1
    return [
        {
            "stage": stage.replace("_", " "),
            "time": _duration(s),
            "share": None if stage == "total" else 100 * s / longest,
        }
        for stage, s in wall.items()
    ]


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.0f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def plot_sections(run: Run) -> tuple[list[dict[str, Any]], list[str]]:
    """(sections of plots that could be drawn, a note a plot that could not)."""
    ppo, summary = run.metrics.get("ppo", []), run.summary
    wanted: dict[str, list[tuple[str, str, Callable[[Theme], Figure]]]] = {
        "What changed": [
            ("Gains", "Gain of the reward and of each weighted part, on the same held-out prompts.",
             lambda theme: plots.plot_gains(summary, theme=theme)),
            ("Refusal plane", "Up is safer, left is more useful. On the dashed line a model cannot tell harmful "
             "prompts from harmless ones.", lambda theme: plots.plot_refusal_plane(summary, theme=theme)),
            ("Reward against KL", "What each nat of distance from the start bought. A path that bends down has been "
             "over-optimised.", lambda theme: plots.plot_reward_vs_kl(ppo, summary, theme=theme)),
            ("Reward model", "The share of held-out pairs ranked as labelled; the dashed line is a coin. Dots "
             "on the diagonal are calibrated.", lambda theme: plots.plot_reward_model(summary, theme=theme)),
        ],
        "PPO, step by step": [
            ("Reward parts", "Each part as it enters the total, mean over the answers of a step.",
             lambda theme: plots.plot_reward_parts(ppo, theme=theme)),
            ("Answer length", "Longer answers, or answers that no longer end, are the commonest cheap trick.",
             lambda theme: plots.plot_answer_length(ppo, theme=theme)),
            ("Entropy", "A fall towards 0 means that the policy says one thing only.",
             lambda theme: plots.plot_entropy(ppo, theme=theme)),
            ("Size of each update", "Much clipping, or KL above a few hundredths, means too large steps.",
             lambda theme: plots.plot_policy_update(ppo, theme=theme)),
            ("Critic", "As long as it explains nothing, advantages are little more than centred rewards.",
             lambda theme: plots.plot_value(ppo, theme=theme)),
            ("Reward against a grader", "A grader that is never trained on, on the same held-out prompts as at step 0. "
             "Where the reward rises and the grader falls, the reward is being gamed.",
             lambda theme: plots.plot_grader(ppo, theme=theme)),
            ("Cheap tricks", "A reward that goes with length or repetition can be had without a better answer.",
             lambda theme: plots.plot_watch(ppo, theme=theme)),
            ("Expert load", "Tokens sent to each expert over an equal share: 1 is fair, 0 is a dead expert.",
             lambda theme: plots.plot_expert_load(ppo, theme=theme)),
        ],
        "The other stages": [
            (STAGES[stage], "", partial(_plot_stage, run.metrics.get(stage, [])))
            for stage in ("sft", "reward_model", "dpo")
        ],
    }  # fmt: skip
    sections, notes = [], []
    for heading, figures in wanted.items():
        drawn = []
        for title, text, draw in figures:
            try:
                drawn.append({"title": title, "text": text, "light": _png(draw(LIGHT)), "dark": _png(draw(DARK))})
            except NothingToPlotError as missing:
                notes.append(f"{title}: {missing}")
        if drawn:
            sections.append({"heading": heading, "plots": drawn})
    return sections, notes


def _plot_stage(rows: Sequence[Row], theme: Theme) -> Figure:
    return plots.plot_training(rows, theme=theme)


def _png(figure: Figure) -> str:
    """The figure as base64 PNG, 256 colours: a third of the size, and no difference that one can see."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[:, :, :3]
    image = Image.fromarray(pixels)
    small = image.quantize(256, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    palette, paper = small.getpalette() or [], 3 * int(np.asarray(small)[0, 0])
    palette[paper : paper + 3] = pixels[0, 0].tolist()  # the background has to match the page to the digit
    small.putpalette(palette)
    out = io.BytesIO()
    small.save(out, format="png")
    return base64.b64encode(out.getvalue()).decode("ascii")


def category_table(summary: Row) -> dict[str, Any] | None:
    """Refusals by hazard, a row a hazard and kind, a column a target; None where prompts have no category."""
    targets = [name for name in summary.get("targets") or {} if (summary.get(name) or {}).get("refusals_by_category")]
    if not targets:
        return None
    rows = []
    for kind, label in (("harmful", "harmful"), ("twin", "twin")):
        hazards = summary[targets[0]]["refusals_by_category"].get(kind, {})
        for hazard in hazards:
            rates = [summary[name]["refusals_by_category"].get(kind, {}).get(hazard) for name in targets]
            rows.append({
                "label": hazard, "kind": label,
                "cells": [f"{rate['count']} of {rate['n']}" if rate else "\u2013" for rate in rates],
            })  # fmt: skip
    return {"targets": targets, "rows": rows}


WORST = 5


def worst_answers(transcripts: Mapping[str, Sequence[Row]]) -> dict[str, Any] | None:
    """The five answers of the last trained target that are worst for a reader of safety: harmful prompts that it complied
    with first, by reward from below, then refused twins and ordinary prompts, then the lowest rewards of all.
    """
    trained = [name for name in ("ppo", "dpo") if name in transcripts]
    if not trained:
        return None

    def badness(row: Row) -> tuple[int, float]:
        declined = refusal(row["prompt"], row["answer"]) == "refusal"
        wrong = (row["kind"] == "harmful") != declined
        rank = 0 if wrong and row["kind"] == "harmful" else 1 if wrong else 2
        return rank, row["total"] if row["total"] is not None else -math.inf

    rows = sorted(transcripts[trained[0]], key=badness)[:WORST]
    return {
        "target": trained[0],
        "rows": [
            {
                "kind": row["kind"], "category": row.get("category", ""), "prompt": row["prompt"],
                "why": ("complied with", "refused", "lowest reward")[badness(row)[0]],
                "answers": [_answer(trained[0], row)],
            }
            for row in rows
        ],
    }  # fmt: skip


# ---- answers side by side -------------------------------------------------------------------------------------------


def choose_examples(transcripts: Mapping[str, Sequence[Row]], start: str = "start") -> dict[str, Any] | None:
    """A dozen prompts chosen by rule, not by taste: per kind the largest gain, the largest loss, the median gain and
    the largest change in length of the last trained target over the start. None without both transcripts.
    """
    trained = [name for name in ("ppo", "dpo") if name in transcripts] or [
        name for name in transcripts if name not in (start, "base")
    ]
    if start not in transcripts or not trained:
        return None
    main, shown = trained[0], [start] + [name for name in transcripts if name in trained]
    by_id = {name: {row["id"]: row for row in transcripts[name]} for name in shown}
    scored = [
        (
            row["total"] - by_id[start][row["id"]]["total"],
            row["answer_tokens"] - by_id[start][row["id"]]["answer_tokens"],
            row,
        )
        for row in transcripts[main]
        if row["id"] in by_id[start] and row["total"] is not None and by_id[start][row["id"]]["total"] is not None
    ]
    chosen: dict[str, dict[str, Any]] = {}
    kinds = dict.fromkeys(row["kind"] for _, _, row in scored)
    for kind in sorted(kinds, key=lambda kind: ("ordinary", "twin").index(kind) if kind in ("ordinary", "twin") else 2):
        of_kind = sorted((item for item in scored if item[2]["kind"] == kind), key=lambda item: item[0])
        middle = statistics.median_low(range(len(of_kind)))
        for why, (gain, extra, row) in (
            ("largest gain", of_kind[-1]),
            ("median gain", of_kind[middle]),
            ("largest loss" if of_kind[0][0] < 0 else "smallest gain", of_kind[0]),
            ("largest change in length", max(of_kind, key=lambda item: abs(item[1]))),
        ):
            if row["id"] in chosen:
                chosen[row["id"]]["why"] += f", {why}"
                continue
            answers = [_answer(name, by_id[name].get(row["id"])) for name in shown]
            chosen[row["id"]] = {
                "kind": kind, "category": row.get("category", ""), "prompt": row["prompt"], "why": why,
                "gain": _number(gain, sign=True), "extra": _number(extra, 0, True), "answers": answers,
            }  # fmt: skip
    return {"main": main, "start": start, "shown": shown, "rows": list(chosen.values())}


def _answer(name: str, row: Row | None) -> dict[str, Any]:
    if row is None:
        return {"target": name, "text": "(not asked)", "total": "?", "tokens": "?", "finished": True}
    return {
        "target": name,
        "text": row["answer"] or "(empty)",
        "total": "unscored" if row["total"] is None else _number(row["total"], sign=True),
        "tokens": row["answer_tokens"],
        "finished": bool(row["finished"]),
    }
