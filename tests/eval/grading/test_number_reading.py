"""Numbers are equal when their values are, however people and models write them."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plumbline.eval.grading.graders import exact, last_number, mentions_target
from plumbline.eval.grading.number_reading import as_number, equal_numbers, final_number, numbers_in, plain, runs_in
from plumbline.eval.samples import Sample
from plumbline.eval.suites import load_suites
from plumbline.eval.tasks import Reply

SAME = [  # target, answer that comes to it
    ("18", "In all that is $18.00."), ("18", "so 18.0"), ("18", "18."), ("18", "**18**"), ("18", "(18)"), ("18", "18!"), ("18", "18..."),
    ("70000", "a profit of $70,000.00"), ("70000", "70'000 francs"), ("70000", "70 000"), ("70000", "70\u00a0000 km"),
    ("70000", "70\u2009000"), ("70000", "70\u202f000"), ("1234567", "1 234 567"), ("1234567", "1.234.567"), ("6.5", "6,5 km"),
    ("-4", "It is \u22124."), ("-4", "x = -4"), ("-4", "-$4"), ("-4", "$-4"), ("-4", "\uff0d\uff14"), ("4", "7-4 is 3, so 4"),
    ("0.5", "a chance of .5"), ("0.5", "0.50"), ("0.5", "1/2"), ("0.5", "\u00bd"), ("2.5", "2\u00bd"), ("0.5", r"\frac{1}{2}"),
    ("0.001", "1e-3"), ("2000", "2 \u00d7 10^3"), ("2000", "2\u00d710\u00b3"), ("1000", r"\boxed{1{,}000}"), ("1000", r"1\,000"),
    ("5", r"\boxed{5} because 2 + 3"), ("3000000", "3 million"), ("3", "3 million"), ("20", "That is 20 %."), ("0.2", "20%"),
    ("29", "\uff12\uff19"), ("29", "\u0662\u0669"), ("7", "Seven."), ("21", "twenty-one"), ("200", "two hundred"),
    ("3", "#### 3\n\nI needed 2 steps."), ("3", "#### 3 in 2 steps"), ("12", "#### $12.00"), ("12", "#### The answer is 12"),
    ("12", "The answer is 12. I looked at it 2 times."), ("12", "**Answer:** 12\nThat took 3 steps"), ("7", "the answer is 3+4=7."),
    ("9", "H2O and CO2 make 9"), ("30", "3 x 10 = 30"), ("7", "So 7, as asked."),
]  # fmt: skip
OTHER = [
    ("18", "18.01"), ("4", "\u22124"), ("5", "It is .5"), ("1000", "1.000"), ("12", "1, 2"), ("123", "1,2,3"), ("9", "9:30"),
    ("3", "version 1.2.3"), ("2", "H2O"), ("50", "5/6/2050"), ("1000", "2 000"), ("30", "300"), ("0", "none"),
]  # fmt: skip


@pytest.mark.parametrize("target, said", SAME)
def test_a_right_number_is_counted_right(target, said):
    sample = Sample(id="1", input="x", target=target)
    assert exact(pick=final_number).grade([sample], [Reply(answers=(said,))])[0].value == 1, last_number(said)


@pytest.mark.parametrize("target, said", OTHER)
def test_another_number_is_not(target, said):
    sample = Sample(id="1", input="x", target=target)
    assert exact(pick=final_number).grade([sample], [Reply(answers=(said,))])[0].value == 0, last_number(said)


@settings(max_examples=200, deadline=None)
@given(
    st.decimals(-(10**9), 10**9, places=3),
    st.sampled_from([",", " ", "\u00a0", "\u2009", "\u202f", "'"]),
    st.sampled_from("-\u2212"),
)
def test_every_way_to_write_a_number_reads_back(value, blank, minus):
    written = f"{value:,.3f}".replace(",", blank).replace("-", minus)
    found = final_number(f"So the answer is **{written}**.")
    assert found is not None and found.values[0] == Fraction(value)
    assert equal_numbers(written, plain(Fraction(value)))


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60) | st.text("0123456789.,-/ '%$eE\u2212\u00bd#", max_size=40))
def test_any_text_is_read_without_an_error(text):
    numbers_in(text), as_number(text), final_number(text), runs_in(text)


def test_what_is_one_number_and_what_is_not():
    assert [str(as_number(t)) for t in ("$29.00", "(42)", "**5**", "x = 5", "5 %", r"\boxed{5}")] == [
        "29",
        "42",
        "5",
        "5",
        "5",
        "5",
    ]
    assert [as_number(t) for t in ("5 apples", "", "(A)", "3 4", "9:30", "5/6/2024", "1.2.3")] == [None] * 7
    assert [
        str(n) for n in numbers_in("1, 2, 3; 4,5,6; 5-3; 10\u201312; 2024-01-05")
    ] == "1 2 3 4 5 6 5 3 10 12 2024 1 5".split()


@pytest.mark.parametrize(
    "target, said, want",
    [
        ("7.2 million dollars", "They paid $7,200,000.", 1), ("5,895 metres", "5 895 metres", 1), ("Seven", "7 points", 1),
        ("1994", "in 1994", 1), ("1994", "in 1995", 0), ("at 9:30", "9:30", 1), ("at 9:30", "at 9:15", 0), ("20 percent", "20%", 1),
        ("14 October 1066", "October 14, 1066", 1), ("CO2", "CO2", 1), ("CO2", "2", 0), ("Bras\u00edlia", "Bras\u00edlia", 1),
    ],
)  # fmt: skip
def test_numbers_of_a_free_answer_count_by_value(target, said, want):
    assert (
        mentions_target().grade([Sample(id="1", input="x", target=target)], [Reply(answers=(said,))])[0].value == want
    )


def test_every_fact_mentions_itself_and_nothing_mentions_a_fact():
    (task,) = load_suites(["fact_recall"])
    for said, want in ((lambda s: s.target, 1), (lambda s: "", 0)):
        scores = task.scorers[0].grade(task.samples, [Reply(answers=(said(s),)) for s in task.samples])
        assert {score.value for score in scores} == {want}


@pytest.mark.parametrize(
    "target, said, want",
    [("(B)", "**B**", 1), ("(B)", "B)", 1), ("yes", '"Yes."', 1), (") ]", ") ]", 1), (") ]", "", 0), (")", "", 0), ("True", "true.", 1),
     ("valid", "invalid", 0), ("5", "5.0", 1)],
)  # fmt: skip
def test_short_answers_in_emphasis_are_equal(target, said, want):
    assert exact().grade([Sample(id="1", input="x", target=target)], [Reply(answers=(said,))])[0].value == want


def test_character_by_character_where_lm_eval_compares_so():
    sample, reply = Sample(id="1", input="x", target="29"), Reply(answers=("29.00",))
    assert exact(as_text=True).grade([sample], [reply])[0].value == 0 and exact().grade([sample], [reply])[0].value == 1
