"""Labels of prompts in the place of a scanner's guess."""

import pytest

from plumbline.reward.components.known import KnownHarm
from plumbline.reward.components.safety import Safety


class Guess:
    def risk(self, texts):
        self.asked = list(texts)
        return [0.4] * len(texts)


class Declines:
    def at_once(self, prompts, answers):
        return [float(answer.startswith("No")) for answer in answers]


def test_labels_come_first_and_the_scanner_is_asked_for_the_rest():
    scanner = Guess()
    harm = KnownHarm(scanner, {"bad": 1.0, "fine": 0.0})
    assert harm.risk(["fine", "new", "bad", "newer"]) == [0.0, 0.4, 1.0, 0.4]
    assert scanner.asked == ["new", "newer"]
    assert harm.risk([]) == []


def test_safety_pays_for_what_the_label_says():
    safety = Safety(harm=KnownHarm(Guess(), {"bad": 1.0, "fine": 0.0}), refusal=Declines(), over_refusal_cost=0.5)
    assert safety(["bad", "bad", "fine", "fine"], ["No.", "Sure.", "No.", "Sure."]) == [1.0, 0.0, 0.5, 1.0]


def test_a_label_is_a_probability():
    with pytest.raises(ValueError, match="label 2 of 'x' must be between 0 and 1"):
        KnownHarm(Guess(), {"x": 2})
