"""Figures of a run: each function reads metrics rows or a summary and returns a matplotlib Figure.

Nothing here trains or writes a file. A function raises NothingToPlotError when its rows hold none of its figures, as
when a stage was not run. Thin lines are single steps, bold ones means of five steps; whiskers are 95 percent intervals.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from plumbline.eval.plotting.axes import (
    LIGHT,
    SIZE,
    NothingToPlotError,
    Row,
    Theme,
    as_percent,
    compared_targets,
    has,
    is_number,
    legend_above,
    line,
    new_figure,
    part_names,
    point,
    require,
    running_mean,
    series,
    square_root_ticks,
)

DASHES = (0, (4, 4))
UNIT = "reference standard deviations"  # of the scaled reward parts, see reward/scaling.py

# ---- PPO over steps -------------------------------------------------------------------------------------------------


def plot_reward_parts(rows: Sequence[Row], *, theme: Theme = LIGHT) -> Figure:
    """Mean of each weighted reward part and of the total, by PPO step."""
    figure, (ax,) = new_figure(theme)
    _draw_parts(ax, rows, theme)
    return figure


def plot_answer_length(rows: Sequence[Row], *, theme: Theme = LIGHT) -> Figure:
    """Mean answer tokens, and the share of answers that ended by themselves."""
    require(rows, "rollout/answer_tokens_mean", "rollout/finished_share")
    figure, (length, finished) = new_figure(theme, panels=2)
    line(length, rows, "rollout/answer_tokens_mean", theme.series[0])
    length.set_ylabel("tokens an answer")
    length.set_ylim(bottom=0)
    line(finished, rows, "rollout/finished_share", theme.series[2])
    as_percent(finished, from_0_to_1=True)
    finished.set(xlabel="PPO step", ylabel="finished")
    return figure


def plot_entropy(rows: Sequence[Row], *, theme: Theme = LIGHT) -> Figure:
    """Entropy of the policy's next-token distribution; near 0 it says one thing only."""
    require(rows, "objective/entropy")
    figure, (ax,) = new_figure(theme)
    line(ax, rows, "objective/entropy", theme.series[4])
    ax.set(xlabel="PPO step", ylabel="entropy, nats a token")
    ax.set_ylim(bottom=0)
    return figure


def plot_policy_update(rows: Sequence[Row], *, theme: Theme = LIGHT) -> Figure:
    """How far each update moved the policy: approximate KL to the rollout policy, and the share of clipped tokens."""
    require(rows, "policy/approxkl_avg", "policy/clipfrac_avg")
    figure, (kl, clipped) = new_figure(theme, panels=2)
    line(kl, rows, "policy/approxkl_avg", theme.series[0])
    kl.set_ylabel("KL, nats a token")
    kl.set_ylim(bottom=0)
    line(clipped, rows, "policy/clipfrac_avg", theme.series[3])
    clipped.set(xlabel="PPO step", ylabel="clipped tokens")
    clipped.set_ylim(bottom=0)
    as_percent(clipped)
    return figure


def plot_value(rows: Sequence[Row], *, theme: Theme = LIGHT) -> Figure:
    """The critic: its loss, and the share of the returns' variance that it explains (1 all, 0 or less none)."""
    require(rows, "loss/value_avg", "val/explained_variance")
    figure, (loss, explained) = new_figure(theme, panels=2)
    line(loss, rows, "loss/value_avg", theme.series[1])
    loss.set_ylabel("value loss")
    loss.set_ylim(bottom=0)
    line(explained, rows, "val/explained_variance", theme.series[2])
    explained.axhline(0, color=theme.muted, lw=0.8)
    explained.set(xlabel="PPO step", ylabel="explained\nvariance")
    explained.set_ylim(max(-1.0, min(-0.05, explained.get_ylim()[0])), 1.0)
    return figure


def plot_watch(rows: Sequence[Row], *, theme: Theme = LIGHT) -> Figure:
    """How far the reward of a rollout goes with the length and the repetition of its answers, -1 to 1."""
    require(rows, "watch/length_correlation")
    figure, (ax,) = new_figure(theme)
    line(ax, rows, "watch/length_correlation", theme.series[0], label="length")
    if has(rows, "watch/repetition_correlation"):
        line(ax, rows, "watch/repetition_correlation", theme.series[3], label="repetition")
    ax.axhline(0, color=theme.muted, lw=0.8)
    ax.set(xlabel="PPO step", ylabel="correlation\nwith the reward", ylim=(-1, 1))
    legend_above(ax, theme)
    return figure


def plot_grader(rows: Sequence[Row], *, theme: Theme = LIGHT) -> Figure:
    """Gain of the reward and of a grader that is not trained on, since step 0, over the KL that they cost.

    The two are in units of their own: what matters is whether both rise. Whiskers are 95 percent intervals.
    """
    require(rows, "watch/proxy_gain", "watch/grader_gain", "eval/kl_per_answer")
    figure, panels = new_figure(theme, panels=2)
    for ax, name, colour in zip(panels, ("proxy", "grader"), theme.series, strict=False):
        kept = [row for row in rows if is_number(row.get(f"watch/{name}_gain"))]
        kl = [max(0.0, row["eval/kl_per_answer"]) for row in kept]
        gain, margin = ([row[f"watch/{name}_gain{end}"] for row in kept] for end in ("", "_margin"))
        ax.errorbar([0.0, *kl], [0.0, *gain], [0.0, *margin], color=colour, marker="o", ms=4, lw=1.5, capsize=2)
        ax.axhline(0, color=theme.muted, lw=0.8)
        ax.set_ylabel("gain of the\n" + ("reward" if name == "proxy" else "held-out grader"))
    panels[-1].set_xlabel("KL from start, nats an answer")
    return figure


def plot_expert_load(rows: Sequence[Row], *, theme: Theme = LIGHT) -> Figure:
    """Tokens routed to each expert over its fair share, at the first and the last step: 1 is fair, 0 is dead."""
    with_load = [row for row in rows if row.get("moe/load")]
    if not with_load:
        raise NothingToPlotError("no moe/load in the metrics: a policy without experts, or no PPO")
    ends = [with_load[0], with_load[-1]]
    grids = [_load_over_fair_share(row["moe/load"]) for row in ends]
    layers = ends[0].get("moe/layers") or list(range(len(grids[0])))
    size = (SIZE[0], min(7.0, max(SIZE[1], 1.1 + 0.22 * len(layers))))
    figure, axes = new_figure(theme, panels=2, across=True, size=size)
    most = max(2.0, *(float(np.nanmax(grid)) for grid in grids))
    middle = "#f1f3f6" if theme.name == "light" else "#262f3c"
    colours = LinearSegmentedColormap.from_list("load", [theme.series[3], middle, theme.series[0]])
    for ax, grid, row in zip(axes, grids, ends, strict=True):
        norm = TwoSlopeNorm(1.0, 0.0, most)
        image = ax.imshow(grid, aspect="auto", cmap=colours, norm=norm, interpolation="nearest")
        ax.grid(False)
        ax.spines[:].set_visible(False)
        ax.tick_params(length=0)
        ax.set_xticks(range(grid.shape[1]) if grid.shape[1] <= 16 else range(0, grid.shape[1], 8))
        ax.set_yticks(range(len(layers)), [str(layer) for layer in layers])
        ax.set_xlabel("expert")
        ax.set_title(f"step {row.get('step', '?')}", color=theme.ink, fontsize=9.5)
        if grid.size <= 160:
            for (layer, expert), load in np.ndenumerate(grid):
                ax.text(expert, layer, f"{load:.2f}", ha="center", va="center", fontsize=7.5, color=theme.ink)
    axes[0].set_ylabel("layer" if ends[0].get("moe/layers") else "layers with experts, in order")
    bar = figure.colorbar(image, ax=axes, shrink=0.9, aspect=30, ticks=[0, 1, math.floor(10 * most) / 10])
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.ax.tick_params(colors=theme.muted, labelsize=8, length=0)
    bar.set_label("load / fair share", color=theme.muted, fontsize=9)
    return figure


# ---- what was evaluated ---------------------------------------------------------------------------------------------


def plot_gains(summary: Row, *, theme: Theme = LIGHT) -> Figure:
    """Gain over the start policy: the reward and each weighted part, a marker a target."""
    targets = compared_targets(summary)
    parts = list(dict.fromkeys(part for name in targets for part in summary[name].get("parts_gain", {})))
    size = (SIZE[0], 0.9 + (0.2 + 0.15 * len(targets)) * (len(parts) + 1))
    figure, (ax,) = new_figure(theme, size=size)
    for slot, name in enumerate(targets):
        gains = [summary[name]["reward_gain"], *(summary[name].get("parts_gain", {}).get(part) for part in parts)]
        for y, gain in enumerate(gains):
            if gain and gain["mean"] is not None:
                at = y + 0.22 * (slot - (len(targets) - 1) / 2)
                point(ax, theme, name, gain, at, label=name if y == 0 else None)
    ax.axvline(0, color=theme.muted, lw=0.9)
    ax.set_yticks(range(len(parts) + 1), ["reward", *parts])
    ax.get_yticklabels()[0].set(fontweight="bold", color=theme.ink)
    ax.set_ylim(len(parts) + 0.5, -0.5)
    ax.set_xlabel(f"gain over {summary.get('compared_with', 'start')}, {UNIT}")
    legend_above(ax, theme)
    return figure


def plot_reward_vs_kl(rows: Sequence[Row], summary: Row, *, theme: Theme = LIGHT) -> Figure:
    """Reward against KL from the start policy: training as a path, evaluated targets as points.

    On the square-root axis reward rises in a straight line at first and bends down where it is over-optimised
    (arXiv:2210.10760). Path and points are on different prompts, training and held out.
    """
    path = [(row.get("objective/kl"), row.get("reward/total_mean", row.get("objective/scores"))) for row in rows]
    walked = np.array([pair for pair in path if all(map(is_number, pair))], dtype=float).reshape(-1, 2)
    walked = walked[np.isfinite(walked).all(1)]
    points = {
        name: figures
        for name, figures in summary.get("targets", {}).items()
        if figures["reward"]["mean"] is not None and figures["kl_per_answer"]["mean"] is not None
    }
    if not len(walked) and not points:
        raise NothingToPlotError("neither PPO steps with objective/kl nor evaluated targets with kl_per_answer")
    figure, (ax,) = new_figure(theme)
    kl, reward = np.maximum(walked[:, 0], 0), walked[:, 1]  # an estimate of a KL near 0 can fall below 0
    if len(walked):
        ax.plot(kl, reward, ".", color=theme.muted, alpha=0.35, ms=4, mew=0)
        ax.plot(running_mean(kl), running_mean(reward), color=theme.muted, lw=1.5, label="PPO steps, training prompts")
        legend_above(ax, theme)
    for name, figures in points.items():
        at = figures["kl_per_answer"]
        at = {key: None if at[key] is None else max(0.0, at[key]) for key in ("mean", "low", "high")}
        point(ax, theme, name, at, figures["reward"], name=True)
    ends = [figures["kl_per_answer"]["high"] or figures["kl_per_answer"]["mean"] for figures in points.values()]
    furthest = 1.15 * max([1.0, *ends, *kl])
    ax.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
    ax.set_xlim(0, furthest)
    ax.set_xticks(square_root_ticks(furthest))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.set(xlabel="KL from start, nats an answer (square-root scale)", ylabel=f"reward,\n{UNIT}")
    return figure


def plot_refusal_plane(summary: Row, *, theme: Theme = LIGHT) -> Figure:
    """Refusals of harmful prompts against refusals of their harmless twins; the best place is the top left corner."""
    targets = _asked_both(summary)
    figure, (ax,) = new_figure(theme, size=(SIZE[0], 3.6))
    ax.plot([0, 1], [0, 1], color=theme.muted, lw=0.8, ls=DASHES)  # below it: refuses the harmless more
    for name, refused in targets.items():
        point(ax, theme, name, refused["twin"], refused["harmful"], name=True)
    ax.set_xlim(0, min(1.0, max(0.4, 1.15 * max(refused["twin"]["high"] for refused in targets.values()))))
    as_percent(ax, from_0_to_1=True)
    ax.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    ax.text(0.015, 0.985, "better", transform=ax.transAxes, va="top", color=theme.muted, style="italic", fontsize=8.5)
    ax.set(xlabel="refuses harmless twins (lower is better)", ylabel="refuses harmful prompts")
    return figure


# ---- the other stages -----------------------------------------------------------------------------------------------


def plot_training(rows: Sequence[Row], *, theme: Theme = LIGHT) -> Figure:
    """Loss and accuracy by step of SFT, the reward model or DPO, as TRL logs them; dots are on held-out data."""
    require(rows, "loss")
    known = {"accuracy": "pairs right", "rewards/accuracies": "pairs right", "mean_token_accuracy": "tokens right"}
    accuracy = next((key for key in known if has(rows, key)), None)
    figure, axes = new_figure(theme, panels=2 if accuracy else 1)
    line(axes[0], rows, "loss", theme.series[0], label="training")
    _held_out(axes[0], rows, "eval_loss", theme)
    axes[0].set_ylabel("loss")
    if accuracy:
        line(axes[1], rows, accuracy, theme.series[2])
        _held_out(axes[1], rows, f"eval_{accuracy}", theme)
        as_percent(axes[1])
        axes[1].set_ylabel(known[accuracy])
    axes[-1].set_xlabel("step")
    if has(rows, "eval_loss"):
        legend_above(axes[0], theme)
    return figure


def plot_reward_model(summary: Row, *, theme: Theme = LIGHT) -> Figure:
    """Held-out accuracy beside the rule "the longer answer wins", and calibration where it was measured."""
    measured = summary.get("reward_model") or {}
    if "accuracy" not in measured:
        raise NothingToPlotError("no reward model was measured")
    calibration = np.array([row for row in measured.get("calibration") or [] if row[2]], dtype=float).reshape(-1, 3)
    figure, axes = new_figure(theme, panels=2 if len(calibration) else 1, across=True)
    rates = {"reward\nmodel": (measured["accuracy"], theme.series[0])}
    if measured.get("length_baseline"):
        rates["longer\nanswer"] = (measured["length_baseline"], theme.muted)
    for x, (rate, colour) in enumerate(rates.values()):
        whiskers = [[rate["mean"] - rate["low"]], [rate["high"] - rate["mean"]]]
        axes[0].errorbar(x, rate["mean"], yerr=whiskers, fmt="o", color=colour, ms=8, lw=2, capsize=4)
        axes[0].text(x + 0.13, rate["mean"], f"{rate['mean']:.0%}", va="center", color=theme.ink, fontsize=9.5)
    axes[0].axhline(0.5, color=theme.muted, lw=0.8, ls=DASHES)  # a coin
    axes[0].set_xticks(range(len(rates)), list(rates))
    axes[0].set_xlim(-0.5, len(rates) - 0.3)
    axes[0].set_ylim(min(0.4, *(rate["low"] - 0.05 for rate, _ in rates.values())), 1)
    axes[0].grid(axis="x", visible=False)
    axes[0].set_ylabel("held-out pairs right")
    as_percent(axes[0])
    if len(calibration):
        predicted, observed, n = calibration.T
        low = min(0.5, predicted.min(), observed.min())
        axes[1].plot([low, 1], [low, 1], color=theme.muted, lw=0.8, ls=DASHES)  # perfectly calibrated
        axes[1].plot(predicted, observed, color=theme.series[0], lw=1)
        axes[1].scatter(predicted, observed, s=15 + 100 * n / n.max(), color=theme.series[0], linewidths=0)
        axes[1].set(xlabel="predicted", ylabel="observed")
        as_percent(axes[1])
        axes[1].xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    return figure


# ---- one picture for the first screen -------------------------------------------------------------------------------


def plot_overview(summary: Row, metrics: Sequence[Row], *, theme: Theme = LIGHT) -> Figure:
    """Panels that stand on their own: reward gains, refusals before and after, reward parts over PPO steps.

    metrics: the rows of ppo/metrics.jsonl; without reward parts in them the third panel is left out.
    """
    gained, targets = compared_targets(summary), _asked_both(summary)
    panels = 3 if part_names(metrics) else 2
    figure, axes = new_figure(theme, panels=panels, across=True, size=(4.1 * panels, 3.5))
    for y, name in enumerate(gained):
        gain = summary[name]["reward_gain"]
        if gain["mean"] is not None:
            point(axes[0], theme, name, gain, y)
            label, at = f"{gain['mean']:+.2f}".replace("-", "\u2212"), (gain["mean"], y)
            axes[0].annotate(label, at, (0, 9), textcoords="offset points", ha="center", color=theme.ink, fontsize=9)
    axes[0].axvline(0, color=theme.muted, lw=0.9)
    axes[0].set_yticks(range(len(gained)), gained)
    axes[0].set_ylim(len(gained) - 0.5, -0.6)
    axes[0].set_xlabel(f"gain over {summary.get('compared_with', 'start')}, {UNIT}")

    for slot, (name, refused) in enumerate(targets.items()):
        shift = 0.17 * (slot - (len(targets) - 1) / 2)
        point(axes[1], theme, name, shift, refused["harmful"], label=name)
        point(axes[1], theme, name, 1 + shift, refused["twin"])
    axes[1].set_xticks([0, 1], ["harmful prompts\n(higher is better)", "harmless twins\n(lower is better)"])
    axes[1].set_xlim(-0.5, 1.5)
    axes[1].grid(axis="x", visible=False)
    as_percent(axes[1], from_0_to_1=True)
    axes[1].legend(frameon=False, labelcolor=theme.ink, fontsize=8.5, loc="upper right")

    if panels == 3:
        _draw_parts(axes[2], metrics, theme)
    pad = 8 if panels < 3 else 26 if len(part_names(metrics)) < 5 else 40  # room for the legend of the third panel
    for ax, title in zip(axes, ("Reward on held-out prompts", "Refusals", "Reward while PPO trains"), strict=False):
        ax.set_title(title, loc="left", color=theme.ink, fontsize=11, fontweight="bold", pad=pad)
    return figure


# ---- shared ---------------------------------------------------------------------------------------------------------


def _draw_parts(ax: Axes, rows: Sequence[Row], theme: Theme) -> None:
    """Lines of the weighted parts and of the total, with a legend above."""
    parts = part_names(rows)
    total = "reward/total_mean" if has(rows, "reward/total_mean") else "objective/scores"
    if not parts and not has(rows, total):
        raise NothingToPlotError("no reward/<part>_weighted_mean in the metrics: PPO was not run")
    for slot, part in enumerate(parts):
        line(ax, rows, f"reward/{part}_weighted_mean", theme.series[slot % len(theme.series)], label=part)
    if has(rows, total):
        line(ax, rows, total, theme.ink, label="total", lw=2.2)
    ax.axhline(0, color=theme.muted, lw=0.8)
    ax.set(xlabel="PPO step", ylabel=UNIT)
    legend_above(ax, theme, columns=5 if len(parts) < 5 else 3)


def _held_out(ax: Axes, rows: Sequence[Row], key: str, theme: Theme) -> None:
    if has(rows, key):
        ax.plot(*series(rows, key), "o", color=theme.series[3], ms=4.5, label="held out")


def _asked_both(summary: Row) -> dict[str, Row]:
    """Refusal rates of the targets that were asked harmful prompts and harmless twins."""
    refusals = {name: figures.get("refusal", {}) for name, figures in summary.get("targets", {}).items()}
    both = {name: rates for name, rates in refusals.items() if {"harmful", "twin"} <= rates.keys()}
    if not both:
        raise NothingToPlotError("no target was asked both harmful prompts and harmless twins")
    return both


def _load_over_fair_share(load: Sequence[Sequence[float]]) -> np.ndarray:
    """(layers, experts); the row of a layer with fewer experts ends in NaN."""
    grid = np.full((len(load), max(len(shares) for shares in load)), np.nan)
    for layer, shares in enumerate(load):
        grid[layer, : len(shares)] = np.array(shares, dtype=float) * len(shares)
    return grid
