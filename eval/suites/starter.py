"""Reading what ships: data/starter, and the small files beside the suites."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from plumbline.eval.samples import Sample, read_samples
from plumbline.paths import STARTER

HERE = Path(__file__).resolve().parent


def starter_samples(kind: str) -> list[Sample]:
    """The evaluation samples of one kind: harmful, twin or ordinary."""
    return [sample for sample in read_samples(STARTER / "eval.jsonl") if sample.kind == kind]


def read_rows(name: str) -> list[dict[str, Any]]:
    """Rows of a JSON Lines file beside the suites, or of data/starter."""
    path = HERE / name if (HERE / name).is_file() else STARTER / name
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
