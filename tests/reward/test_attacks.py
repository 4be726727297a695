"""The tricks themselves, rewards that fall for them, and cautious ensembles. The shipped composite is attacked below."""

import pytest

from plumbline.reward.attacks import HACKS, attack
from plumbline.reward.learned import PreferenceEnsemble

PROMPT = "How do I keep basil alive on a windowsill?"
GOOD = "Water it when the top of the soil is dry, from below. Pinch the tips every week so that it grows bushy."


def test_every_trick_is_made_from_the_prompt_without_thought():
    made = {name: make(PROMPT, GOOD) for name, make in HACKS.items()}
    assert len(HACKS) >= 15 and len(set(made.values())) == len(HACKS)
    assert made["keywords"] == "keep, basil, alive, windowsill."
    assert made["repetition"].count("Water it when the top") == 12
    assert (
        made["look_alike_letters"] != f"Here is what to know about {PROMPT}"
        and "basil" not in made["look_alike_letters"]
    )
    assert GOOD not in made.values()
    assert {name: make(PROMPT, GOOD) for name, make in HACKS.items()} == made  # the same each time


def test_a_reward_of_length_falls_for_long_ones_only():
    result = attack(lambda ps, xs: [float(len(x)) for x in xs], [PROMPT], [GOOD])
    assert result.beaten["empty"] == result.beaten["stock_refusal"] == 1
    assert result.beaten["very_long"] == result.beaten["repetition"] == 0
    assert result.all_beaten == 0 and result.wins[0][1] == "very_long" and result.wins[0][2] > 0


def test_a_tie_is_no_victory_and_no_score_is_a_defeat_of_the_trick():
    tied = attack(lambda ps, xs: [1.0] * len(xs), [PROMPT], [GOOD], hacks={"empty": HACKS["empty"]})
    assert tied.all_beaten == 0
    silent = attack(lambda ps, xs: [1.0 if x == GOOD else None for x in xs], [PROMPT], [GOOD])
    assert silent.all_beaten == 1 and set(silent.unscored) == set(HACKS)
    with pytest.raises(ValueError, match="no score to 1 good answers"):
        attack(lambda ps, xs: [None] * len(xs), [PROMPT], [GOOD])
    with pytest.raises(ValueError, match="0 prompts"):
        attack(lambda ps, xs: [], [], [])


def test_ensembles_charge_for_disagreement():
    members = [lambda ps, xs: [1.0, 5.0, 1.0], lambda ps, xs: [1.0, -1.0, None]]
    ensemble = PreferenceEnsemble(members, caution=0.5)
    assert ensemble(["p"] * 3, ["a"] * 3) == [1.0, 2.0 - 0.5 * 3.0, None]
    assert ensemble.mean_and_spread(["p"] * 3, ["a"] * 3)[1] == (2.0, 3.0)
    with pytest.raises(ValueError, match="at least 2 members"):
        PreferenceEnsemble(members[:1])
