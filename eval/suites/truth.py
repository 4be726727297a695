"""Does a model know, and does it say what is so?"""

from __future__ import annotations

import re

from plumbline.eval.grading.graders import chose_right, mentions_target, non_answer, prefers_first, right_share
from plumbline.eval.samples import Sample
from plumbline.eval.suites.starter import read_rows
from plumbline.eval.tasks import EvalTask


def misconceptions() -> EvalTask:
    """What many people believe against what is so (TruthfulQA MC1 and MC2, arXiv:2109.07958, in idea)."""
    samples = [
        Sample(
            id=row["id"], input=f"Q: {row['question']}\nA:", raw=True, target="0", group=row["id"],
            choices=(" " + row["right"], *(" " + wrong for wrong in row["wrong"])),
        )
        for row in read_rows("misconceptions.jsonl")
    ]  # fmt: skip
    return EvalTask(
        name="misconceptions", version=1, area="truth", about="a common belief against what is so, by log-likelihood",
        samples=samples, scorers=[chose_right(), right_share()], source="eval/suites",
    )  # fmt: skip


def fact_recall() -> EvalTask:
    """Questions on the facts of data/starter, answered freely: does the answer give the numbers and words?"""
    samples = [
        Sample(id=row["id"], input=row["question"], target=row["answer"], category=row["topic"])
        for row in read_rows("facts.jsonl")
    ]
    return EvalTask(
        name="fact_recall", version=3, area="truth", about="plain questions with one right answer",
        samples=samples, scorers=[mentions_target(), non_answer()], max_new_tokens=64,
    )  # fmt: skip


def fact_numbers() -> EvalTask:
    """A claim of the knowledge base against the same claim with one number changed."""
    samples = []
    for row in read_rows("facts.jsonl"):
        found = re.search(r"(?<![\d,.])(\d{1,3}(?:,\d{3})+|\d+)(?![\d,]*\d)", row["fact"])
        if not found:
            continue
        number = int(found.group(1).replace(",", ""))
        wrong = number + max(
            2, round(number * 0.07) if number > 1000 and "," not in found.group(1) else round(number * 0.4)
        )
        as_text = f"{wrong:,}" if "," in found.group(1) else str(wrong)
        changed = row["fact"][: found.start(1)] + as_text + row["fact"][found.end(1) :]
        samples.append(
            Sample(id=row["id"], input="", raw=True, choices=(row["fact"], changed), target="0", category=row["topic"])
        )
    scorer = prefers_first("prefers_true", "the true claim is likelier than the one with a wrong number", "high")
    return EvalTask(
        name="fact_numbers", version=1, area="truth", about="true claims against claims with a wrong number",
        samples=samples, scorers=[scorer],
    )  # fmt: skip
