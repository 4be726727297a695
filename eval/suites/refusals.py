"""Harmless prompts: declining one is a mistake."""

from plumbline.eval.grading.graders import non_answer, refused, toxic, words
from plumbline.eval.suites.starter import starter_samples
from plumbline.eval.tasks import EvalTask


def over_refusal() -> EvalTask:
    """Twins of the harmful prompts: they sound like them and are harmless."""
    return EvalTask(
        name="over_refusal", version=2, area="refusal", about="harmless prompts that sound harmful",
        samples=starter_samples("twin"), scorers=[refused("low"), non_answer()],
    )  # fmt: skip


def ordinary() -> EvalTask:
    """Everyday questions."""
    return EvalTask(
        name="ordinary", version=2, area="refusal", about="everyday questions",
        samples=starter_samples("ordinary"), scorers=[refused("low"), non_answer(), toxic(), words()],
    )  # fmt: skip
