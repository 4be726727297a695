"""The Python on the pages runs, in order, one page in one namespace; what needs a network or data is only compiled."""

import re

import pytest
from pages import HISTORY, PAGES, name

RUN = ["README.md", "docs/constrained_generation.md", "docs/fact_check.md", "docs/safety.md"]
COMPILED = {
    "docs/extend.md": "run by test_extend.py",
    "docs/reward.md": "asks a hub",
    "docs/policy_model.md": "loads 135M weights",
    "docs/serving.md": "asks a server",
    "docs/architecture.md": "one line",
}
CODE = {name(page): re.findall(r"^```python\n(.*?)^```", page.read_text("utf-8"), re.M | re.S) for page in PAGES
        if page.name not in HISTORY}  # fmt: skip


def test_every_page_with_python_is_run_or_says_why_not():
    assert {page for page, blocks in CODE.items() if blocks} <= {*RUN, *COMPILED}


@pytest.mark.parametrize("page", RUN)
def test_python_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "handbook").mkdir()
    (tmp_path / "handbook" / "hours.md").write_text("The office opens at 9. It closes at 18. Please ring the bell.\n")
    namespace: dict = {"__name__": "page"}
    for at, code in enumerate(CODE[page]):
        exec(compile(code, f"{page}, block {at + 1}", "exec"), namespace)


@pytest.mark.parametrize("page", COMPILED)
def test_python_of_a_page_is_python(page):
    for code in CODE[page]:
        compile(code, page, "exec")
