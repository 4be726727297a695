"""Does alignment cost anything? Small sets of our own; the public ones (MMLU, ARC, GSM8K, ...) are in public.py."""

from __future__ import annotations

import random
from functools import lru_cache

from plumbline.eval.grading.graders import chose_right, exact
from plumbline.eval.grading.number_reading import final_number
from plumbline.eval.grading.sandbox import passes
from plumbline.eval.samples import Sample
from plumbline.eval.suites.starter import read_rows
from plumbline.eval.tasks import EvalTask

LETTERS = "ABCD"
STORIES = [  # text, and the answer as a function of the numbers a, b, c
    ("Mina has {a} marbles and wins {b} more. How many marbles has she now?", lambda a, b, c: a + b),
    ("A shelf holds {a} books. {b} are lent out. How many are left?", lambda a, b, c: a - b),
    ("A box holds {b} eggs. How many eggs are in {c} boxes?", lambda a, b, c: b * c),
    ("{a} plums are put on plates, {c} on each, and what is left over is eaten. How many plates are full?",
     lambda a, b, c: a // c),
    ("A ticket costs {b} pounds. Ana buys {c} and pays with {a} pounds. How much change does she get?",
     lambda a, b, c: a - b * c),
    ("Tom reads {b} pages a day for {c} days and then {a} pages on Sunday. How many pages is that?",
     lambda a, b, c: b * c + a),
    ("Two trains carry {a} and {b} people. {c} get off each train. How many people are still on the trains?",
     lambda a, b, c: a + b - 2 * c),
    ("A garden is {b} metres long and {c} metres wide. How long is a fence around it, in metres?",
     lambda a, b, c: 2 * (b + c)),
    ("Lea is {b} years old and her aunt is {c} times as old. How old is the aunt?", lambda a, b, c: b * c),
    ("A lorry brings {a} bricks in the morning and half as many in the afternoon. How many bricks is that?",
     lambda a, b, c: a + a // 2),
]  # fmt: skip


@lru_cache(maxsize=1)
def quiz_rows() -> list[dict]:
    """Questions with four choices and two paraphrases each, written for this project."""
    return read_rows("quiz.jsonl")


def quiz_question(row: dict, *, before: str = "", kind: str = "plain") -> Sample:
    """A quiz row in the form of MMLU: lettered choices, the answer a letter."""
    lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, row["choices"], strict=True)]
    return Sample(
        id=f"{row['id']}-{kind}", input="\n".join([before + row["question"], *lines, "Answer:"]), raw=True, group=row["id"],
        choices=tuple(f" {letter}" for letter in LETTERS), target=str(row["answer"]), category=kind, topic=row["topic"],
    )  # fmt: skip


def quiz() -> EvalTask:
    """General knowledge, the whole text of each choice weighed."""
    samples = [
        Sample(
            id=row["id"], input=f"Question: {row['question']}\nAnswer:", raw=True, topic=row["topic"],
            choices=tuple(" " + choice for choice in row["choices"]), target=str(row["answer"]), category=row["topic"],
        )
        for row in quiz_rows()
    ]  # fmt: skip
    return EvalTask(
        name="quiz", version=1, area="capability", about="general knowledge, four choices, by log-likelihood",
        samples=samples, scorers=[chose_right(), chose_right("correct_normed", per="character")], source="eval/suites",
    )  # fmt: skip


def arithmetic() -> EvalTask:
    """Word problems with one or two steps, the numbers drawn once and for all."""
    draw = random.Random(11)
    samples = []
    for at in range(100):
        text, solve = STORIES[at % len(STORIES)]
        c, b = draw.randint(2, 6), draw.randint(7, 12)
        a = draw.randint(4, 19) * 2 + b * c
        samples.append(
            Sample(id=f"sum-{at}", input=text.format(a=a, b=b, c=c) + " End with the number alone.", group=text,
                   target=str(solve(a, b, c)))
        )  # fmt: skip
    return EvalTask(
        name="arithmetic", version=2, area="capability", about="word problems of one or two steps",
        samples=samples, scorers=[exact(pick=final_number)], max_new_tokens=96, source="eval/suites",
    )  # fmt: skip


def code() -> EvalTask:
    """Small Python functions, continued from signature and docstring and run against tests in a sandbox."""
    samples = [
        Sample(id=row["id"], input=row["prompt"], raw=True, details={"tests": row["tests"]})
        for row in read_rows("code.jsonl")
    ]
    return EvalTask(
        name="code", version=2, area="capability", about="small Python functions, run against tests",
        samples=samples, scorers=[passes()], max_new_tokens=256, source="eval/suites",
    )  # fmt: skip
