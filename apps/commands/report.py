"""`plumbline report RUN [--readme]`: renders the HTML page of a run folder again, and the README's figures from it."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from plumbline.eval.pages.run_page import readme_table, render
from plumbline.eval.plotting.run_plots import plot_overview
from plumbline.paths import HOME

_BEGIN, _END = "<!-- demo table -->", "<!-- end of demo table -->"


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; RUN holds summary.json or metrics.jsonl. `--readme` also writes docs/demo.png and the table."""
    argv = list(sys.argv[1:] if argv is None else argv)
    runs = [arg for arg in argv if arg != "--readme"]
    if len(runs) != 1 or runs[0].startswith("-"):
        raise ValueError("usage: plumbline report RUN [--readme], RUN being a run folder such as runs/demo")
    run = Path(runs[0])
    if not run.is_dir():
        raise ValueError(f"{run}: no such run folder")
    print(render(run))
    if "--readme" in argv:
        write_readme(run)


def write_readme(run: Path) -> None:
    """Puts the figure and the table of a demo run into the README, with the command that made them."""
    if not (HOME / "README.md").is_file():
        raise ValueError("--readme writes README.md and docs/demo.png of a clone; this is an installed package")
    summary = json.loads((run / "summary.json").read_text())
    metrics = [json.loads(line) for line in (run / "ppo" / "metrics.jsonl").read_text().splitlines()]
    plot_overview(summary, metrics).savefig(HOME / "docs" / "demo.png", dpi=130)
    readme = HOME / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, after = text.index(_BEGIN) + len(_BEGIN), text.index(_END)
    accuracy, baseline = summary["reward_model"]["accuracy"], summary["reward_model"]["length_baseline"]
    lines = [
        "",
        "![Rewards, KL and refusals of the demo, drawn by its report](docs/demo.png)",
        "",
        readme_table(summary),
        "",
        f"Reward model: {accuracy['mean']:.0%} [{accuracy['low']:.0%}, {accuracy['high']:.0%}] of {accuracy['n']} "
        f'held-out pairs right; "the longer answer is better" gets {baseline["mean"]:.0%}. All of it took '
        f"{summary['wall_s']['total'] / 60:.0f} minutes on {summary['machine']['cpus']} CPU cores. Intervals are 95%. "
        f"Printed by `make demo` (seed {summary['seed']}), copied here by `plumbline report runs/demo --readme`.",
        "",
    ]
    readme.write_text(text[:before] + "\n".join(lines) + text[after:], encoding="utf-8")
