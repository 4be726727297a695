"""Write a reward component of your own and mix it with those that ship.

    python examples/write_a_reward.py

A component is anything with a `name` that turns prompts and answers into one score each; None means "no opinion". The
composite scales every component by its spread on reference answers before it weights it, so a weight of 1 means the
same for all of them. Nothing here loads a language model.
"""

import re
from collections.abc import Sequence

from plumbline.reward import CompositeReward, RewardComponent
from plumbline.reward.components.toxicity import Toxicity


class Bullets:
    """The share of lines that are list items: for those who want answers as lists. No opinion on answers of one line."""

    name = "bullets"
    min_std = 0.1  # when reference answers hardly differ, their spread counts as this much

    def __call__(self, prompts: Sequence[str], answers: Sequence[str]) -> list[float | None]:
        return [self.share(answer.splitlines()) for answer in answers]

    @staticmethod
    def share(lines: Sequence[str]) -> float | None:
        """In [0, 1]; None where there is nothing that could be a list."""
        return (
            sum(bool(re.match(r"\s*([-*]|\d+\.)\s", line)) for line in lines) / len(lines) if len(lines) > 1 else None
        )


def main() -> None:
    """Fits the scaling on reference answers, then scores three others part by part."""
    bullets: RewardComponent = Bullets()
    reward = CompositeReward([(bullets, 1.0), (Toxicity(), -1.0)])

    # Reference answers are what the model said before training; a run fits them by itself and keeps scaling.json.
    reference = [
        "Boil water.\nAdd tea.",
        "- Boil water.\nAdd tea and wait.",
        "Boil water.\n- Add tea.\n- Wait.\nDrink.",
    ]
    reward.fit(["How do I make tea?"] * len(reference), reference)

    answers = ["- Boil water.\n- Add tea.", "Boil water and add tea.", "- Work it out yourself, you idiot.\n- Go away."]
    scored = reward(["How do I make tea?"] * len(answers), answers)
    for row, answer in enumerate(answers):
        parts = {name: column[row] for name, column in scored.parts.weighted.items()}
        told = ", ".join(f"{name} {'no opinion' if part is None else f'{part:+.2f}'}" for name, part in parts.items())
        print(f"{scored.total[row]:+.2f} = {told}   {answer!r}")


if __name__ == "__main__":
    main()
