"""Every page of the labelling app, filled, on desktop and phone, light and dark: nothing too wide, and axe finds nothing.

axe-core's axe.min.js is taken from $PLUMBLINE_AXE (`npm pack axe-core@4.14.1`), screenshots go to $PLUMBLINE_SCREENSHOTS.
"""

import os
import random

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="browser tests need the [dev] extra")
pytest.importorskip("gradio", reason="the labelling app needs the [ui] extra")
pytestmark = pytest.mark.slow

from plumbline.apps.label.arena import Arena, ArenaPolicy  # noqa: E402
from plumbline.apps.label.exchange import starter_items  # noqa: E402
from plumbline.apps.label.server.pages import make_label_app  # noqa: E402
from plumbline.apps.label.store.answers import Answer  # noqa: E402
from plumbline.apps.label.store.database import SQLiteDatabase  # noqa: E402
from plumbline.apps.label.store.items import NewItem, NewResponse  # noqa: E402
from plumbline.apps.label.store.store import LabelStore  # noqa: E402
from tests.apps.conftest import FAST_HASHER, PASSWORD, keep_screenshot, serious_violations  # noqa: E402

TABS = ("Label", "Arena", "Review", "Statistics", "Guidelines", "Admin")
MARKDOWN = """Remember what you have seen in a **set**:

```python
def unique(items):
    seen = set()
    return [item for item in items if not (item in seen or seen.add(item))]
```

1. It keeps the *first* of each.
2. It takes linear time.

| items | result |
|---|---|
| `[3, 1, 3]` | `[3, 1]` |

> Items must be hashable. ![x](http://evil.example/x.png) <script>document.title = 1</script>"""
SHORT = "Call `list(dict.fromkeys(items))`: dictionaries keep the order in which keys were added.\n\n- short\n- fast\n  - it runs in C"


def filled(store: LabelStore) -> None:
    """As a team leaves it after a morning: four annotators of different care, gold, flags, ties, three models."""
    rng = random.Random(0)
    store.change_settings(None, {"target_labels": 3, "gold_gap": [6, 9]})
    store.change_guidelines(None, "# Comparing two answers\n\nChoose the answer **you would rather have been given**.")
    items = []
    for number, item in enumerate(starter_items()[:60]):
        models = rng.sample(["base", "sft-v1", "ppo-v2"], 2)
        responses = [NewResponse(text=r.text, model=m) for r, m in zip(item.responses, models, strict=True)]
        gold = {"winner": 0} if number % 12 == 0 else None
        items.append(NewItem(prompt=item.prompt, responses=responses, source="starter", gold=gold))
    store.add_items(items)
    with store.database.read() as run:
        better = {row["text"] for row in run("SELECT text FROM response WHERE idx = 0")}
    people = {"ada": 0.95, "bob": 0.9, "cleo": 0.85, "dan": 0.6}
    accounts = {name: store.add_account(name, PASSWORD, "annotator").id for name in people}
    for _ in range(30):
        for name, care in people.items():
            task = store.claim(accounts[name])
            if task is None:
                continue
            first = task["answers"][0]["text"] in better
            draw = rng.random()
            if draw < 0.85:
                rated = [{"fluency": 4, "safety": 5, "relevance": 5 if first else 2, "toxicity": 1},
                         {"fluency": 4, "safety": 5, "relevance": 2 if first else 5, "toxicity": 1}]  # fmt: skip
                winner = int(first != (rng.random() < care))
                answer = Answer(outcome="prefer", winner=winner, strength=rng.choice([2, 3, 3, 4]), active_ms=14000,
                                ratings=rated if draw < 0.3 else [])  # fmt: skip
            elif draw < 0.97:
                answer = Answer(outcome="tie" if draw < 0.93 else "both_bad", active_ms=9000)
            else:
                answer = Answer(outcome="flag", reason="personal data")
            store.submit(accounts[name], task["assignment"], f"request-{task['assignment']}", answer)
    question = [{"role": "user", "content": "How do I remove duplicates from a Python list and keep the order?"}]
    store.add_items([NewItem(prompt=question, responses=[NewResponse(text=MARKDOWN), NewResponse(text=SHORT)])])
    with store.database.write() as run:  # the next item for whoever comes
        run("UPDATE item SET n_done = 2, is_control = 0, priority = 9 WHERE prompt_json LIKE '%remove duplicates%'")
        run("UPDATE item SET is_control = 0, n_done = 0 WHERE status = 'open' AND is_gold = 0 AND priority < 9")


@pytest.fixture(scope="module")
def url(tmp_path_factory, serve):
    database = SQLiteDatabase(tmp_path_factory.mktemp("pages") / "labels.db")
    store = LabelStore(database, hasher=FAST_HASHER, seed=0)
    filled(store)
    store.change_settings(None, {"control_share": 0.0})
    for number in range(4):
        store.add_account(f"root{number}", PASSWORD, "admin")
    words = [ArenaPolicy(name=name, stream=lambda prompt, seed: iter(["some ", "words"])) for name in ("one", "two")]
    return serve(make_label_app(store, Arena(words)))


def go_to(page, name: str) -> None:
    """Opens a tab, also where gradio has put it into its menu."""
    tab = page.get_by_role("tab", name=name, exact=True)
    if not (tab.count() and tab.first.is_visible()):
        page.locator(".overflow-menu button").first.click()
        tab = page.locator(".overflow-dropdown").get_by_text(name, exact=True)
    tab.first.click()
    page.locator(f"plumbline-{name.lower()} > div > *").first.wait_for()  # drawn once the server has answered


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_every_page_fits_its_window_and_is_accessible(url, open_page, scheme, width):
    page = open_page(url, viewport={"width": width, "height": 860}, color_scheme=scheme)
    if "PLUMBLINE_AXE" in os.environ:
        assert serious_violations(page) == [], "sign-in"
    page.get_by_label("Name").fill(f"root{2 * (width == 390) + (scheme == 'dark')}")
    page.get_by_label("Password").fill(PASSWORD)
    page.get_by_role("button", name="Sign in").click()
    page.locator("#pl-submit, .pl-card h3").first.wait_for()
    for name in TABS:
        go_to(page, name)
        if name == "Label":
            page.get_by_label("Formatted").check()
            page.keyboard.press("1")
            page.mouse.move(0, 0)
        keep_screenshot(page, f"{name.lower()}-{width}-{scheme}")
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name
        if "PLUMBLINE_AXE" in os.environ:
            assert serious_violations(page) == [], name


def test_the_formatted_view_draws_markdown_and_runs_and_loads_nothing(url, open_page):
    page = open_page(url)
    page.get_by_label("Name").fill("root0")
    page.get_by_label("Password").fill(PASSWORD)
    page.get_by_role("button", name="Sign in").click()
    page.locator("#pl-submit").wait_for()
    assert MARKDOWN in page.locator(".pl-answer .pl-text").all_inner_texts()  # as it is, unless asked for
    page.get_by_label("Formatted").check()
    text = page.locator(".pl-answer .pl-text").filter(has_text="Remember what")
    assert text.locator("strong").all_inner_texts() == ["set"] and text.locator("em").first.inner_text() == "first"
    assert text.locator("pre code").inner_text().startswith("def unique(items):\n    seen = set()")
    assert text.locator("ol > li").count() == 2 and text.locator("td code").all_inner_texts() == ["[3, 1, 3]", "[3, 1]"]
    quote = text.locator("blockquote").inner_text()
    assert "<http://evil.example/x.png>" in quote and "<script>document.title = 1</script>" in quote
    assert page.locator(".pl-text img, .pl-text script, .pl-text a").count() == 0 and page.title() == "Plumbline labels"
    nested = page.locator(".pl-answer .pl-text").filter(has_text="fromkeys").locator("ul ul li")
    assert nested.inner_text() == "it runs in C"
    page.get_by_label("Formatted").uncheck()
