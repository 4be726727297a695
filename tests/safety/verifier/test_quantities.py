"""Numbers of a claim against those of a passage, however both are written."""

import pytest

from plumbline.safety.verifier.claims import LONGEST_SENTENCE, sentence_spans, split_claims
from plumbline.safety.verifier.vetoes import unmatched_numbers, vetoes

SAME = [
    ("It has 1 600 beds.", "It has 1,600 beds."),
    ("It has 1\u202f600 beds.", "It has 1600 beds."),
    ("It weighs 1'600 kg.", "It weighs 1,600 kg."),
    ("It sold 3M copies.", "It sold 3 million copies."),
    ("It sold 3,000,000 copies.", "It sold 3 million copies."),
    ("3k people came.", "3,000 people came."),
    ("It cost 2bn dollars.", "It cost 2 billion dollars."),
    ("It fell to \u22125 degrees.", "It fell to -5 degrees."),
    ("The share is .5 of it.", "The share is 0.5 of it."),
    ("It is 29.00 km.", "It is 29 km."),
    ("It is 5m long.", "It is 5 metres long."),
    ("It opens at 9:30.", "It opens at 9:30 in the morning."),
    ("It opens at 9.", "It opens at 9 am."),
    ("It closes at 6 pm.", "It closes at 18:00."),
    ("It closes at 18:30.", "It closes at 6:30 in the evening."),
    ("It closes at 6:30.", "It closes at 18:30."),
]
OTHER = [
    ("It opens at 9:30.", "It opens at 9."),
    ("It opens at 9.", "It opens at 9:30."),
    ("It opens at 9:30.", "It opens at 9 in the morning."),
    ("It closes at 6 am.", "It closes at 6 pm."),
    ("It has 1 600 beds.", "It has 1,500 beds."),
    ("It sold 3M copies.", "It sold 2 million copies."),
    ("It sold 3M copies.", "It sold 3 copies."),
    ("It fell to \u22125 degrees.", "It fell to 5 degrees."),
    ("The share is .5 of it.", "The share is 5 of it."),
    ("It is 5m long.", "It is 5 km long."),
]


@pytest.mark.parametrize("claim, passage", SAME)
def test_equal_numbers_do_not_clash(claim, passage):
    assert vetoes(claim, passage) == [] == vetoes(passage, claim) and unmatched_numbers(claim, passage) == []


@pytest.mark.parametrize("claim, passage", OTHER)
def test_other_numbers_do(claim, passage):
    assert vetoes(claim, passage) and vetoes(passage, claim)


def test_a_long_stretch_without_a_full_stop_is_cut_at_blanks():
    text = "word " * 2000
    spans = sentence_spans(text)
    assert all(end - start <= LONGEST_SENTENCE for start, end in spans)
    assert " ".join(text[start:end] for start, end in spans) == text.strip()
    answer = "a" * 5000 + " is here."
    assert all(answer[claim.start : claim.end] == claim.text for claim in split_claims(answer))
