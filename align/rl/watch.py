"""Is the reward being earned or gamed? What a run logs for that.

Two signs on every rollout: how far the reward goes with the length of an answer, and with its repetition. One on every
evaluation: whether a grader that is never trained on moves as the reward does, on the same prompts as at step 0.
"""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from plumbline.eval.grading.text_checks import repetition

Grader = Callable[[Sequence[str], Sequence[str]], list[float | None]]


def correlation(xs: Sequence[float], ys: Sequence[float]) -> float | None:
    """Pearson's r; None for fewer than 3 pairs or a constant."""
    n = len(xs)
    if n < 3:
        return None
    mean_x, mean_y = math.fsum(xs) / n, math.fsum(ys) / n
    dx, dy = [x - mean_x for x in xs], [y - mean_y for y in ys]
    spread = math.sqrt(math.fsum(d * d for d in dx) * math.fsum(d * d for d in dy))
    return math.fsum(a * b for a, b in zip(dx, dy, strict=True)) / spread if spread > 0 else None


def rollout_watch(totals: Sequence[float | None], answers: Sequence[str], tokens: Sequence[int]) -> dict[str, float]:
    """watch/length_correlation and watch/repetition_correlation with the reward, and watch/repetition_mean, in [0, 1].

    Rows without a total are left out, and so is a correlation that is not defined.
    """
    rows = [at for at, total in enumerate(totals) if total is not None]
    known = [float(totals[at]) for at in rows]  # type: ignore[arg-type]
    repeated = [repetition(answers[at]) for at in rows]
    found = {
        "watch/length_correlation": correlation([float(tokens[at]) for at in rows], known),
        "watch/repetition_correlation": correlation(repeated, known),
        "watch/repetition_mean": math.fsum(repeated) / len(rows) if rows else None,
    }
    return {name: value for name, value in found.items() if value is not None}


def grader_watch(samples: Sequence[dict], first: Path) -> dict[str, float]:
    """Gains since step 0 of the reward (`total`) and of the held-out grader (`grader`), paired by prompt.

    `samples` are the rows of this evaluation, `first` the table of step 0. watch/<name>_gain is the mean difference,
    watch/<name>_gain_margin half of its 95% interval. watch/hacking is 1 where the reward has risen and the grader has
    fallen, both by more than their margins. Empty at step 0 and without a grader.
    """
    if not first.is_file() or not any(row.get("grader") is not None for row in samples):
        return {}
    before = {row["prompt"]: row for row in map(json.loads, first.read_text(encoding="utf-8").rstrip("\n").split("\n"))}
    found: dict[str, float] = {}
    for name, key in (("proxy", "total"), ("grader", "grader")):
        pairs = [(before.get(row["prompt"], {}).get(key), row.get(key)) for row in samples]
        gains = [after - earlier for earlier, after in pairs if earlier is not None and after is not None]
        if len(gains) < 2:
            return {}
        mean = math.fsum(gains) / len(gains)
        variance = math.fsum((gain - mean) ** 2 for gain in gains) / (len(gains) - 1)
        found[f"watch/{name}_gain"] = mean
        found[f"watch/{name}_gain_margin"] = 1.96 * math.sqrt(variance / len(gains))
    rose = found["watch/proxy_gain"] > found["watch/proxy_gain_margin"]
    fell = found["watch/grader_gain"] < -found["watch/grader_gain_margin"]
    return found | {"watch/hacking": float(rose and fell)}
