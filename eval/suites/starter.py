"""Reading what ships: data/starter, and the small files beside the suites."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from plumbline.eval.samples import Sample, read_samples
from plumbline.paths import STARTER
from plumbline.rows import file_rows

HERE = Path(__file__).resolve().parent


def starter_samples(kind: str) -> list[Sample]:
    """The evaluation samples of one kind: harmful, twin or ordinary."""
    return [sample for sample in read_samples(STARTER / "eval.jsonl") if sample.kind == kind]


def read_rows(name: str) -> list[dict[str, Any]]:
    """Rows of a JSON Lines file beside the suites, or of data/starter."""
    path = HERE / name if (HERE / name).is_file() else STARTER / name
    return [row for _, row in file_rows(path)]
