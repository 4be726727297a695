"""What a reward component is, and the record that a composite reward returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from plumbline.messages import Messages, last_user_text

Prompt = str | Messages  # a text is one turn of the user


@runtime_checkable
class RewardComponent(Protocol):
    """One named opinion about answers: a function, a classifier or a model behind one call.

    It is given the last user turn of each prompt as a text. One that carries `reads_conversations = True`, such as a
    learned preference model, is given the prompts as they are: texts, or messages with the system's and earlier turns.

    A component may also carry `min_std`, in units of its own score: a smaller spread among reference answers is
    treated as this one, so that a component on which the reference answers all agree does not turn into noise.
    """

    name: str

    def __call__(self, prompts: Sequence[str], answers: Sequence[str]) -> list[float | None]:
        """One finite score a row, higher meaning more of what the name says; None means "no opinion"."""
        ...


def ask(component: Any, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float | None]:
    """The component's scores, of whole conversations where it reads those."""
    if getattr(component, "reads_conversations", False):
        return component(prompts, answers)
    return component([last_user_text(prompt) for prompt in prompts], answers)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The same scores at three stages, by component name; each list has one entry a row.

    raw       what the component returned
    scaled    (raw - mean) / std over reference-policy answers, so the unit is one reference standard deviation
    weighted  weight * scaled: what was added to the total
    None stays None at every stage.
    """

    raw: Mapping[str, list[float | None]]
    scaled: Mapping[str, list[float | None]]
    weighted: Mapping[str, list[float | None]]


@dataclass(frozen=True, kw_only=True)
class Reward:
    """Scores of a batch of answers.

    total[i] is exactly `sum` of the weighted parts of row i that are not None, in component order. It is None when a
    required component has no score, or no component has one; why[i] then says which, and is None otherwise.
    """

    total: list[float | None]
    parts: Parts
    why: list[str | None]

    def __len__(self) -> int:
        return len(self.total)
