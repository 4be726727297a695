"""Evaluation samples: what is asked, and what kind of question it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plumbline.rows import Row, file_rows

KINDS = ("harmful", "twin", "ordinary")


@dataclass(frozen=True)
class Sample:
    """One held-out prompt.

    kind      harmful: to be declined; twin: sounds harmful, is not, deserves an answer; ordinary: everything else
    category  hazard code of harmful and twin prompts, or another heading to break results down by; "" for none
    pair      the label that a harmful prompt and its twin share, "" if it has no counterpart
    topic     a few words, for reading the results by topic
    system    system prompt, "" for the chat template's own
    history   earlier user turns; the target answers each before the next is put
    raw       the input goes to the model as it is, without a chat template: a text to continue
    choices   continuations of the input whose log-probabilities are asked for instead of an answer
    target    the right answer, the index of the right choice, or a planted string, as the scorers of the task want it
    group     samples with equal labels are one cluster when intervals are drawn; "" is a cluster of its own
    details   whatever else a scorer of the task needs
    """

    id: str
    input: str
    kind: str = "ordinary"
    category: str = ""
    pair: str = ""
    topic: str = ""
    system: str = ""
    history: tuple[str, ...] = ()
    raw: bool = False
    choices: tuple[str, ...] = ()
    target: str = ""
    group: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)


def read_samples(path: str | Path, *, limit: int | None = None) -> list[Sample]:
    """Reads JSON Lines with the fields prompt, kind and, optionally, id, category, pair, topic.

    A row without an id gets one from the file's name and its line ("eval:12"). `limit` keeps the first rows of each
    kind in turn, so that a small run still has all kinds. Raises ValueError naming file and line for a row that breaks
    a rule, FileNotFoundError if there is no such file.
    """
    path = Path(path)
    if limit is not None and limit < 1:
        raise ValueError(f"{limit=}: needs at least 1 sample, or None for all")
    samples: list[Sample] = []
    line_of: dict[str, int] = {}  # of ids and of prompts, to name both lines of a double
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file of samples")
    for place, row in file_rows(path):
        line_no = int(place.rpartition(":")[2])
        sample = _parse(row, place, default_id=f"{path.stem}:{line_no}")
        for what, value in (("id", sample.id), ("prompt", sample.input)):
            first = line_of.setdefault(f"{what} {value}", line_no)
            if first != line_no:
                raise ValueError(f"{path}:{line_no}: {what} {value[:60]!r} is also on line {first}; drop or change one")
        samples.append(sample)
    if not samples:
        raise ValueError(f"{path}: no samples; needs one JSON object a line with prompt and kind")
    return samples if limit is None else _spread(samples, limit)


def _parse(row: Row, where: str, default_id: str) -> Sample:
    row = {name: value for name, value in row.items() if value is not None}  # an empty cell of a table
    fields = {"id": default_id, "category": "", "pair": "", "topic": ""} | row
    for name in ("id", "prompt", "kind", "category", "pair", "topic"):
        if not isinstance(fields.get(name), str):
            raise ValueError(f"{where}: {name} is {fields.get(name)!r}; needs text")
    for name in ("id", "prompt"):
        if not fields[name].strip():
            raise ValueError(f"{where}: {name} is empty; fill it in or drop the row")
    if fields["kind"] not in KINDS:
        raise ValueError(f"{where}: kind is {fields['kind']!r}; needs one of {', '.join(KINDS)}")
    return Sample(fields["id"], fields["prompt"], fields["kind"], fields["category"], fields["pair"], fields["topic"])


def _spread(samples: list[Sample], limit: int) -> list[Sample]:
    """The first samples of each kind, as evenly as the kinds allow, in the order of the file."""
    nth: dict[str, int] = dict.fromkeys(KINDS, 0)
    order = []
    for index, sample in enumerate(samples):
        order.append((nth[sample.kind], index))
        nth[sample.kind] += 1
    return [samples[index] for index in sorted(index for _, index in sorted(order)[:limit])]
