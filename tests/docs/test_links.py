"""No link of a page leads nowhere, and every page can be reached from the README."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from pages import PAGES, REPOSITORY, anchors, links, name  # noqa: E402


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    for target in links(page):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists() and file.is_relative_to(REPOSITORY), f"{name(page)}: {target}"
        assert not anchor or anchor in anchors(file), f"{name(page)}: {target}: {name(file)} has no such heading"


def test_every_page_can_be_reached_from_the_readme():
    seen, todo = set(), [REPOSITORY / "README.md"]
    while todo:
        page = todo.pop()
        if page not in seen and page.suffix == ".md" and page.is_relative_to(REPOSITORY):
            seen.add(page)
            todo += [(page.parent / target.split("#")[0]).resolve() for target in links(page) if target[0] != "#"]
    assert not [name(page) for page in PAGES if page not in seen]


def test_a_dead_link_and_a_heading_are_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A `b`, c\n\n[x](gone.md) `[y](code.md)` ![p](q.png#a-b-c) [w](https://e.org)\n")
    assert list(links(page)) == ["gone.md", "q.png#a-b-c"] and anchors(page) == {"a-b-c"}
