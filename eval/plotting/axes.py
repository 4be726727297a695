"""What every figure shares: ink, axes, lines, intervals, and reading numbers from metrics rows.

Colours are those of Okabe and Ito, which stay apart for colour-blind readers; markers differ as well. Figures are made
without pyplot, so nothing global changes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

Row = Mapping[str, Any]
SIZE = (5.2, 3.1)  # inches; with text of 8 to 10 points this reads on a phone and on a desk
SMOOTHED = 5  # steps in the running mean that is drawn over the raw values
PARTS = ("fluency", "relevance", "safety", "toxicity")  # drawn in this order, so each keeps its colour
MARKERS = {"base": "s", "start": "o", "dpo": "D", "ppo": "^"}


class NothingToPlotError(ValueError):
    """The rows hold none of the figures that a plot needs, as when a stage was not run."""


@dataclass(frozen=True)
class Theme:
    """Ink of a figure on a light or a dark page. `series` are for lines, `targets` for evaluated models."""

    name: str
    paper: str
    ink: str
    muted: str
    faint: str
    series: tuple[str, ...]
    targets: Mapping[str, str]


LIGHT = Theme(
    name="light",
    paper="#ffffff",
    ink="#1c2430",
    muted="#5d6878",
    faint="#e2e6ec",
    series=("#0072b2", "#d99100", "#009e73", "#cc4e00", "#b0578d", "#3aa0d8"),
    targets={"base": "#8a93a1", "start": "#1c2430", "dpo": "#d98200", "ppo": "#0072b2"},
)
DARK = Theme(
    name="dark",
    paper="#161c25",
    ink="#e8ecf2",
    muted="#9fabbc",
    faint="#2b3441",
    series=("#56b4e9", "#f0b429", "#2fc79a", "#ff8a4c", "#dd92c0", "#8fd0f5"),
    targets={"base": "#8792a3", "start": "#e8ecf2", "dpo": "#f0a534", "ppo": "#56b4e9"},
)

# ---- axes -----------------------------------------------------------------------------------------------------------


def new_figure(
    theme: Theme, *, panels: int = 1, across: bool = False, size: tuple[float, float] = SIZE
) -> tuple[Figure, list[Axes]]:
    """A figure and its panels, below one another over one x axis, or across."""
    figure = Figure(figsize=size, dpi=160, layout="constrained", facecolor=theme.paper)
    rows, columns = (1, panels) if across else (panels, 1)
    axes = list(figure.subplots(rows, columns, sharex=panels > 1 and not across, squeeze=False).flat)
    for ax in axes:
        ax.set_facecolor(theme.paper)
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color(theme.muted)
        ax.grid(color=theme.faint, lw=0.8)
        ax.set_axisbelow(True)
        ax.tick_params(colors=theme.muted, labelsize=8.5)
        ax.xaxis.label.set(color=theme.muted, fontsize=9)
        ax.yaxis.label.set(color=theme.muted, fontsize=9)
    return figure, axes


def as_percent(ax: Axes, *, from_0_to_1: bool = False) -> None:
    if from_0_to_1:
        ax.set_ylim(0, 1.03)
    decimals = 0 if np.ptp(ax.get_ylim()) > 0.05 else 1
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=decimals))


def legend_above(ax: Axes, theme: Theme, columns: int = 4) -> None:
    ax.legend(
        frameon=False,
        labelcolor=theme.ink,
        fontsize=8.5,
        ncols=columns,
        loc="lower left",
        bbox_to_anchor=(-0.02, 1.0),
        borderaxespad=0.2,
        handlelength=1.1,
        handletextpad=0.5,
        columnspacing=1.0,
    )


def line(ax: Axes, rows: Sequence[Row], key: str, colour: str, *, label: str | None = None, lw: float = 1.7) -> None:
    """The raw values, faint, under their running mean; few values are drawn as they are."""
    steps, values = series(rows, key)
    if len(values) < 4 * SMOOTHED:
        ax.plot(steps, values, color=colour, lw=lw, label=label, marker="." if len(values) < 15 else "")
    else:
        ax.plot(steps, values, color=colour, lw=0.7, alpha=0.3)
        ax.plot(steps, running_mean(values), color=colour, lw=lw, label=label)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))


def point(
    ax: Axes, theme: Theme, target: str, x: Row | float, y: Row | float, *, name: bool = False, label: str | None = None
) -> None:
    """A target's marker with the intervals that x and y carry; `name` writes the target beside it."""
    at_x, x_error = _centre_and_whiskers(x)
    at_y, y_error = _centre_and_whiskers(y)
    colour, marker = theme.targets.get(target, theme.series[4]), MARKERS.get(target, "P")
    ax.errorbar(
        at_x, at_y, xerr=x_error, yerr=y_error, fmt=marker, color=colour, ms=6.5, lw=1.6, capsize=3, label=label
    )
    if name:
        ax.annotate(
            target, (at_x, at_y), (8, 6), textcoords="offset points", color=colour, fontweight="bold", fontsize=9.5
        )


def _centre_and_whiskers(value: Row | float) -> tuple[float, list[list[float]] | None]:
    if not isinstance(value, Mapping):
        return value, None
    mean, low, high = value["mean"], value.get("low"), value.get("high")
    if low is None or high is None:
        return mean, None
    return mean, [[max(0.0, mean - low)], [max(0.0, high - mean)]]


# ---- reading --------------------------------------------------------------------------------------------------------


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def has(rows: Sequence[Row], key: str) -> bool:
    return any(is_number(row.get(key)) for row in rows)


def require(rows: Sequence[Row], *keys: str) -> None:
    missing = [key for key in keys if not has(rows, key)]
    if missing:
        raise NothingToPlotError(f"no {', '.join(missing)} in the metrics")


def series(rows: Sequence[Row], key: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of the rows that have the key; a value that is not finite becomes a gap."""
    require(rows, key)
    found = [(row.get("step", number), row[key]) for number, row in enumerate(rows) if is_number(row.get(key))]
    steps, values = np.array(found, dtype=float).T
    return steps, np.where(np.isfinite(values), values, np.nan)


def running_mean(values: np.ndarray, width: int = SMOOTHED) -> np.ndarray:
    """Mean of up to `width` (odd) values around each, fewer at the ends; gaps do not spread. Short series stay raw."""
    if len(values) < 4 * width:
        return values
    known, window = np.isfinite(values), np.ones(width)
    total = np.convolve(np.where(known, values, 0.0), window, "same")
    count = np.convolve(known.astype(float), window, "same")
    return np.where(known, total / np.maximum(count, 1), np.nan)


def part_names(rows: Sequence[Row]) -> list[str]:
    """Names in reward/<part>_weighted_mean, the usual four first."""
    ending = "_weighted_mean"
    keys = dict.fromkeys(key for row in rows for key in row if key.startswith("reward/") and key.endswith(ending))
    names = [key[len("reward/") : -len(ending)] for key in keys]
    return [name for name in PARTS if name in names] + [name for name in names if name not in PARTS]


def compared_targets(summary: Row) -> list[str]:
    names = [name for name in summary.get("targets", {}) if "reward_gain" in (summary.get(name) or {})]
    if not names:
        raise NothingToPlotError("no target was compared with the start policy")
    return names


def square_root_ticks(furthest: float) -> list[float]:
    """Round values up to `furthest` that spread evenly enough over a square-root axis."""
    unit = 10 ** math.floor(math.log10(furthest / 3))
    return [unit * mark for mark in (0, 0.5, 2, 4, 7, 10, 15, 20, 30) if unit * mark <= furthest]
