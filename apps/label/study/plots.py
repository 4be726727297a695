"""The Statistics page as one picture: each estimate a dot with its 95% interval."""

import io
from typing import Any

import matplotlib.figure

Row = tuple[str, dict[str, float | None]]


def statistics_png(statistics: dict[str, Any]) -> bytes:
    """A PNG of agreement, annotators and model strengths; panels without data are left out."""
    annotators = statistics["annotators"]
    models = statistics["models"] or {"strength": {}}
    panels: list[tuple[str, list[Row], float | None]] = [
        ("Krippendorff's alpha", list(statistics["agreement"].items()), 0.0),
        ("Share of left answers chosen", _of(annotators, "left_share"), 0.5),
        ("Gold items passed (share)", _of(annotators, "gold_pass"), None),
        ("Estimated accuracy (share)", _of(annotators, "accuracy"), 0.5),
        ("Model strength (log-odds)", list(models["strength"].items()), 0.0),
    ]
    panels = [panel for panel in panels if panel[1]] or [("No labels yet", [], None)]
    heights = [0.9 + 0.28 * len(rows) for _, rows, _ in panels]
    figure = matplotlib.figure.Figure(figsize=(7.5, sum(heights)), layout="constrained")
    grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (title, rows, neutral) in zip(grid, panels, strict=True):
        for place, (_, value) in enumerate(rows):
            mean, low, high = value["mean"], value["low"], value["high"]
            if mean is not None and low is not None and high is not None:
                axes.plot([low, high], [place, place], color="#1d4ed8", linewidth=2)
            axes.plot(mean, place, "o", color="#16181d", markersize=5)
        if neutral is not None:
            axes.axvline(neutral, color="#b0b5bf", linewidth=1, zorder=0)
        axes.set_yticks(range(len(rows)), [name for name, _ in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlabel(title + ", with 95% interval" if rows else title)
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def _of(annotators: list[dict[str, Any]], name: str) -> list[Row]:
    return [(row["annotator"], row[name]) for row in annotators if row[name]]
