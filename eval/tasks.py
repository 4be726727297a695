"""What an evaluation is made of: a task asks samples, a target replies, scorers grade the replies.

Sample (eval/samples.py) -> Reply (eval/targets/) -> Score, one a scorer
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from plumbline.eval.samples import Sample

Messages = list[dict[str, str]]
Prompt = Messages | str  # a conversation to answer, or a text to continue


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What a target made of one sample.

    answers   the text of each assistant turn, the last of them the answer to `sample.input`
    finished  False when the answer ran into the limit of tokens; None where the target cannot tell
    logp      one log-probability a choice, in nats, where choices were asked for
    error     why there is no reply ("time-out after 60 s"); such a sample is unscored and asked again next time
    final     asking again would give the same error (a prompt that is too long), so it is kept
    """

    answers: tuple[str, ...] = ()
    finished: bool | None = None
    logp: tuple[float, ...] = ()
    error: str = ""
    final: bool = False

    @property
    def text(self) -> str:
        """The last answer."""
        return self.answers[-1] if self.answers else ""


@dataclass(frozen=True)
class Score:
    """One grade: a number, or None with the reason why there is none. `why` also explains a grade."""

    value: float | None
    why: str = ""


Grade = Callable[[Sequence[Sample], Sequence[Reply]], list[Score]]


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """One figure of a task.

    grade   replies without an error and their samples -> one score each; all at once, so that a group can be compared
    better  the end that is good: "low", "high", or "" for a figure that only describes
    rate    values are 0 and 1: shown in percent, with a Wilson interval
    judge   name of the judge whose errors the figure inherits, "" for an exact check (see eval/grading/calibration.py)
    """

    name: str
    grade: Grade
    better: Literal["low", "high", ""] = ""
    rate: bool = True
    judge: str = ""
    about: str = ""


@dataclass(frozen=True, kw_only=True)
class EvalTask:
    """A suite: samples, scorers and a version. The first scorer is its headline.

    version         raised when samples or scoring change: older numbers no longer compare
    area            attack, refusal, toxicity, bias, truth, leakage, behaviour or capability: a heading in the report
    max_new_tokens  a limit of its own for the length of an answer; None takes the run's
    stop            strings that end an answer; the text is cut before the first of them
    needs           the suite that must be run with this one: no attack success without over-refusal beside it
    """

    name: str
    version: int
    area: str
    samples: Sequence[Sample]
    scorers: Sequence[Scorer]
    about: str
    max_new_tokens: int | None = None
    stop: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    source: str = "data/starter"

    def __post_init__(self) -> None:
        if not self.samples or not self.scorers:
            raise ValueError(f"suite {self.name!r} has {len(self.samples)} samples and {len(self.scorers)} scorers")
        for what, names in (("sample", [s.id for s in self.samples]), ("scorer", [s.name for s in self.scorers])):
            if doubled := {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else set():
                raise ValueError(f"suite {self.name!r}: two {what}s are called {sorted(doubled)[0]!r}; names are keys")

    @property
    def asks_choices(self) -> bool:
        """Whether it reads log-probabilities of choices instead of answers."""
        return bool(self.samples[0].choices)

    def first(self, limit: int | None) -> EvalTask:
        """The task with its first `limit` samples; a group that stands together is finished, not cut."""
        if limit is None or limit >= len(self.samples):
            return self
        end = limit
        while (
            end < len(self.samples)
            and self.samples[end].group
            and self.samples[end].group == self.samples[end - 1].group
        ):
            end += 1
        return replace(self, samples=self.samples[:end])


@dataclass(frozen=True, kw_only=True)
class Graded:
    """All rows of one target on one suite: samples, replies, and the scores by scorer, in the same order."""

    target: str
    task: EvalTask
    replies: Sequence[Reply]
    scores: dict[str, list[Score]] = field(default_factory=dict)


def grade(target: str, task: EvalTask, replies: Sequence[Reply]) -> Graded:
    """Scores the replies of one target. A reply with an error, and a scorer that raises, leave rows unscored."""
    known = [at for at, reply in enumerate(replies) if not reply.error]
    scores: dict[str, list[Score]] = {}
    for scorer in task.scorers:
        row = [Score(None, reply.error) for reply in replies]
        try:
            found = scorer.grade([task.samples[at] for at in known], [replies[at] for at in known])
            if len(found) != len(known):
                raise ValueError(f"{len(found)} scores for {len(known)} replies")
        except Exception as error:  # one broken scorer must not cost the others; its rows are shown as unscored
            found = [Score(None, f"scorer {scorer.name} raised {type(error).__name__}: {error}")] * len(known)
        for at, score in zip(known, found, strict=True):
            value = score.value
            if value is not None and not (abs(value) < float("inf")):
                score = Score(None, f"the score is {value}")
            elif value is not None and scorer.rate and value not in (0, 1):
                score = Score(None, f"the score is {value}, where only 0 and 1 are possible")
            row[at] = score
        scores[scorer.name] = row
    return Graded(target=target, task=task, replies=replies, scores=scores)


def digest(*parts: Any) -> str:
    """Hash of plain values, the same on every machine."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=_plain)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _plain(value: Any) -> Any:
    if hasattr(value, "__dataclass_fields__"):
        return asdict(value)
    return dict(value) if hasattr(value, "keys") else list(value)
