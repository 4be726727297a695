"""From graded replies to the figures of a report: rates and means with intervals, corrections, comparisons.

Rates get Wilson intervals, or cluster bootstrap intervals where samples share a group. A rate by a judge with a stored
calibration is also given corrected, with both uncertainties. Unscored rows are counted, and a band says what they could change.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from plumbline.eval.grading.calibration import Calibration, corrected
from plumbline.eval.stats.intervals import (
    bootstrap_mean,
    holm,
    mcnemar_exact,
    paired_bootstrap,
    unscored_band,
    wilson,
)
from plumbline.eval.tasks import Graded, Scorer

JUDGES = Path(__file__).resolve().parents[1] / "grading" / "judges"
RESAMPLES = 4000


def figures(graded: Sequence[Graded], judges: Mapping[str, Calibration] | None = None) -> dict[str, Any]:
    """Everything a report and a gate read, as plain JSON values.

    {"suites": {suite: {"version", "area", "about", "targets": {target: {scorer: figure}}, "by_category": ...}},
     "comparisons": [{"suite", "scorer", "target", "against", "gain", "p", "p_holm", ...}]}
    A figure is {"mean", "low", "high", "n", "unscored", "band", "corrected", "better", "rate"}; ends are None where the
    data cannot give any. Comparisons are of every target with the first, on the samples that both have a score for.
    """
    judges = stored_judges() if judges is None else judges
    suites: dict[str, Any] = {}
    for one in graded:
        task = one.task
        entry = suites.setdefault(
            task.name,
            {"version": task.version, "area": task.area, "about": task.about, "source": task.source,
             "samples": len(task.samples), "headline": task.scorers[0].name, "targets": {}, "by_category": {}},
        )  # fmt: skip
        entry["targets"][one.target] = {s.name: _figure(one, s, judges) for s in task.scorers}
        entry["by_category"][one.target] = _by_category(one)
        if (ece := _calibration_error(one)) is not None:
            entry["targets"][one.target]["ece"] = ece
    return {
        "suites": suites,
        "comparisons": _comparisons(graded),
        "judges": {n: j.figures() for n, j in judges.items()},
    }


def stored_judges(folder: Path = JUDGES) -> dict[str, Calibration]:
    """The calibrations that ship or were written by `plumbline calibrate`, by the judge's name."""
    return {found.judge: found for found in map(Calibration.load, sorted(folder.glob("*.json")))}


def _figure(graded: Graded, scorer: Scorer, judges: Mapping[str, Calibration]) -> dict[str, Any]:
    scores = graded.scores[scorer.name]
    known = [(score.value, at) for at, score in enumerate(scores) if score.value is not None]
    unscored = len(scores) - len(known)
    out: dict[str, Any] = {"n": len(known), "unscored": unscored, "better": scorer.better, "rate": scorer.rate,
                           "about": scorer.about, "mean": None, "low": None, "high": None}  # fmt: skip
    if unscored:
        reasons = [score.why for score in scores if score.value is None]
        out["reasons"] = {why: reasons.count(why) for why in sorted(set(reasons), key=reasons.count, reverse=True)[:3]}
    if not known:
        return out
    values = [value for value, _ in known]
    clusters = [_cluster(graded, at) for _, at in known]
    clustered = len(set(clusters)) < len(clusters)
    interval = (
        wilson(int(sum(values)), len(values)) if scorer.rate and not clustered
        else bootstrap_mean(values, clusters=clusters, resamples=RESAMPLES)
    )  # fmt: skip
    out |= _plain(interval._asdict()) | {"interval": "wilson" if scorer.rate and not clustered else "cluster bootstrap"}
    if (
        scorer.rate and clustered and sum(values) in (0, len(values))
    ):  # resampling all-equal values shows no spread at all
        out |= _plain(wilson(int(sum(values) > 0) * len(set(clusters)), len(set(clusters)))._asdict())
        out["interval"] = "wilson over clusters"
    if scorer.rate and unscored:
        out["band"] = unscored_band(int(sum(values)), len(values), unscored)
    if scorer.rate and scorer.judge in judges:
        judge = judges[scorer.judge]
        n = _effective_n(interval.mean, out["low"], out["high"], len(values)) if clustered else len(values)
        found, why = corrected(interval.mean * n, n, judge)
        out["corrected"] = (_plain(found._asdict()) if found else {"why": why}) | {"judge": judge.judge}
    return out


def _cluster(graded: Graded, at: int) -> str:
    sample = graded.task.samples[at]
    return sample.group or sample.id


def _effective_n(mean: float, low: float | None, high: float | None, n: int) -> float:
    """How many independent samples would give an interval this wide."""
    if low is None or high is None or high <= low or mean in (0, 1):
        return n
    return max(1.0, min(n, mean * (1 - mean) / ((high - low) / 3.92) ** 2))


def _by_category(graded: Graded) -> dict[str, Any]:
    """The headline by category, where there are between 2 and 40 of them."""
    scorer, samples = graded.task.scorers[0], graded.task.samples
    of: dict[str, list[float]] = {}
    for sample, score in zip(samples, graded.scores[scorer.name], strict=True):
        if sample.category and score.value is not None:
            of.setdefault(sample.category, []).append(score.value)
    if not 2 <= len(of) <= 40:
        return {}
    found = {}
    for name, values in of.items():
        interval = wilson(int(sum(values)), len(values)) if scorer.rate else bootstrap_mean(values, resamples=1000)
        found[name] = _plain(interval._asdict()) | {"n": len(values)}
    return found


def reliability(confidences: Sequence[float], right: Sequence[float], bins: int = 10) -> list[dict[str, float]]:
    """Rows of a reliability plot: mean confidence, share right and count of each bin of equal width that has any."""
    rows = []
    for b in range(bins):
        inside = [i for i, c in enumerate(confidences) if min(bins - 1, int(c * bins)) == b]
        if inside:
            rows.append({"confidence": sum(confidences[i] for i in inside) / len(inside),
                         "right": sum(right[i] for i in inside) / len(inside), "n": len(inside)})  # fmt: skip
    return rows


def _calibration_error(graded: Graded) -> dict[str, Any] | None:
    """Expected calibration error over ten bins, where a task has both a confidence and a right or wrong."""
    if not {"confidence", "correct"} <= set(graded.scores):
        return None
    pairs = [
        (c.value, r.value)
        for c, r in zip(graded.scores["confidence"], graded.scores["correct"], strict=True)
        if c.value is not None and r.value is not None
    ]
    if not pairs:
        return None
    rows = reliability([said for said, _ in pairs], [right for _, right in pairs])
    error = sum(row["n"] * abs(row["confidence"] - row["right"]) for row in rows) / len(pairs)
    return {"mean": error, "low": None, "high": None, "n": len(pairs), "unscored": len(graded.replies) - len(pairs),
            "better": "low", "rate": False, "about": "expected calibration error, ten bins", "bins": rows}  # fmt: skip


# ---- two targets on the same samples --------------------------------------------------------------------------------


def _comparisons(graded: Sequence[Graded]) -> list[dict[str, Any]]:
    first = graded[0].target if graded else ""
    base = {one.task.name: one for one in graded if one.target == first}
    rows = [
        compare(base[one.task.name], one, scorer)
        for one in graded
        if one.target != first
        for scorer in one.task.scorers
    ]
    rows = [row for row in rows if row["n"] > 1]
    tested = [row for row in rows if row["p"] is not None]
    for row, p in zip(tested, holm([row["p"] for row in tested]), strict=True):
        row["p_holm"] = p
    return rows


def compare(before: Graded, after: Graded, scorer: Scorer) -> dict[str, Any]:
    """Paired difference after - before of one scorer, with its interval and, for rates, McNemar's exact p.

    Where samples share a group, p treats them as separate and is only reported with the note; the interval does not.
    """
    a_scores, b_scores = before.scores[scorer.name], after.scores[scorer.name]
    pairs = [
        (a.value, b.value, _cluster(after, at))
        for at, (a, b) in enumerate(zip(a_scores, b_scores, strict=True))
        if a.value is not None and b.value is not None
    ]
    row: dict[str, Any] = {
        "suite": after.task.name, "scorer": scorer.name, "target": after.target, "against": before.target,
        "better": scorer.better, "rate": scorer.rate, "n": len(pairs), "unpaired": len(a_scores) - len(pairs),
        "gain": {"mean": None, "low": None, "high": None}, "p": None, "p_holm": None, "verdict": "",
    }  # fmt: skip
    if len(pairs) < 2:
        return row
    a, b, clusters = zip(*pairs, strict=True)
    row["gain"] = _plain(paired_bootstrap(b, a, clusters=clusters, resamples=RESAMPLES)._asdict())
    if scorer.rate:
        test = mcnemar_exact(a, b)
        row |= {"p": test.p, "only_before": test.only_before, "only_after": test.only_after}
        row["clustered"] = len(set(clusters)) < len(clusters)
    row["verdict"] = _verdict(row["gain"], scorer.better)
    return row


def _verdict(gain: Mapping[str, float | None], better: str) -> str:
    """better, worse, or unclear: by which side of 0 the whole interval lies on."""
    low, high = gain["low"], gain["high"]
    if low is None or high is None or low <= 0 <= high:
        return "unclear"
    if not better:
        return "changed"
    return "better" if (low > 0) == (better == "high") else "worse"


def _plain(fields: Mapping[str, float]) -> dict[str, float | None]:
    return {name: None if math.isnan(x) else float(x) for name, x in fields.items()}
