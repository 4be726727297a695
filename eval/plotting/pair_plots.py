"""Figures of a scorer of pairs: its calibration and its margins, from the report of `eval/stats/pair_accuracy.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from plumbline.eval.plotting.axes import LIGHT, NothingToPlotError, Theme, legend_above, new_figure


def plot_pair_reports(reports: Mapping[str, Mapping[str, Any]], *, theme: Theme = LIGHT) -> Figure:
    """Left: share ranked right against temperature-scaled confidence. Right: margins in units of their mean size.

    Scorers without a calibration (too few prompts) are drawn on the right only.
    """
    if not reports:
        raise NothingToPlotError("no scorer was measured")
    figure, (left, right) = new_figure(theme, panels=2, across=True, size=(7.6, 3.4))
    left.plot([0.5, 1], [0.5, 1], color=theme.muted, lw=0.8, ls=(0, (4, 3)))  # perfectly calibrated
    for (name, report), colour in zip(reports.items(), theme.series, strict=False):
        bins = report["calibration"]
        if bins and not isinstance(bins, str):
            sure, hit, n = np.array(bins, dtype=float).T
            left.plot(sure, hit, color=colour, lw=1, label=f"{name}, ECE {report['ece']:.3f}")
            left.scatter(sure, hit, s=12 + 80 * n / n.max(), color=colour, linewidths=0)
        edges, counts = np.array(report["margins"]["edges"]), np.array(report["margins"]["counts"])
        right.stairs(counts / counts.sum(), edges, color=colour, lw=1.4, label=name)
    right.axvline(0, color=theme.muted, lw=0.8, ls=(0, (4, 3)))
    left.set(xlabel="confidence of the ranking", ylabel="share ranked right", xlim=(0.48, 1.02))
    right.set(xlabel="margin / its mean size", ylabel="share of pairs")
    if left.get_legend_handles_labels()[0]:
        legend_above(left, theme, columns=1)
    legend_above(right, theme, columns=1)
    return figure
