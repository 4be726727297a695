"""Evaluation: suites of samples, put to targets, graded, with intervals and one page as a report.

    from plumbline.eval import load_suites, open_target, run_suites

The top holds the records and the runner; suites/, targets/, grading/, stats/, plotting/, pages/, gates/ and harnesses/
are the rooms.
"""

from plumbline.lazy import exports

__all__, __getattr__, __dir__ = exports(
    __name__,
    {
        "EvalTask": "tasks",
        "Reply": "tasks",
        "Sample": "samples",
        "Score": "tasks",
        "Scorer": "tasks",
        "check_gates": "gates.bounds",
        "load_suites": "suites",
        "open_target": "targets.specs",
        "read_gates": "gates.bounds",
        "read_samples": "samples",
        "run_suites": "runner",
        "wilson": "stats.intervals",
    },
)
