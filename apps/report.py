"""`plumbline report RUN`: renders the HTML page of a run folder again."""

import sys
from collections.abc import Sequence
from pathlib import Path

from eval.report import render


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; RUN holds summary.json or metrics.jsonl."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if len(argv) != 1 or argv[0].startswith("-"):
        raise ValueError("usage: plumbline report RUN, RUN being a run folder such as runs/demo")
    run = Path(argv[0])
    if not run.is_dir():
        raise ValueError(f"{run}: no such run folder")
    print(render(run))
