"""The real app in headless Chromium: by mouse and by keyboard, through reloads, a killed server, hostile answers.

Needs playwright and Debian's chromium.
"""

import itertools
import json
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="browser tests need the [dev] extra")
pytest.importorskip("gradio", reason="the labelling app needs the [ui] extra")
pytestmark = pytest.mark.slow

from plumbline.apps.label.store.database import SQLiteDatabase  # noqa: E402
from plumbline.apps.label.store.items import NewItem, NewResponse  # noqa: E402
from plumbline.apps.label.store.store import LabelStore  # noqa: E402
from tests.apps.conftest import FAST_HASHER, PASSWORD, free_port, pair  # noqa: E402

REPOSITORY = Path(__file__).resolve().parents[3]
HOSTILE = '<img src="http://evil.example/x.png" onerror="document.title=1"><script>document.title=2</script>'


class App:
    """The server as a process, and the store it works on."""

    def __init__(self, folder: Path, *arena: str) -> None:
        self.db = folder / "labels.db"
        self.store = LabelStore(SQLiteDatabase(self.db), hasher=FAST_HASHER, seed=0)
        self.store.change_settings(None, {"target_labels": 50, "repeat_share": 0.0, "control_share": 0.0})
        for name, role in (("ann", "annotator"), ("bob", "annotator"), ("rita", "reviewer"), ("root", "admin")):
            self.store.add_account(name, PASSWORD, role)
        self.port, self.arena = free_port(), arena
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "plumbline.apps.cli", "label", "--db", str(self.db), "--port", str(self.port)]
        command += [part for policy in self.arena for part in ("--arena", policy)]
        self.process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
        for _ in range(1200):
            try:
                urllib.request.urlopen(f"{self.url}/healthz", timeout=5)
                return
            except OSError:
                time.sleep(0.1)
        raise AssertionError("the server did not start")

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def said(self, name: str) -> list[tuple[str, int]]:
        with self.store.database.read() as run:
            rows = run(
                "SELECT j.outcome, j.strength FROM judgement j JOIN assignment a ON a.id = j.assignment_id"
                " JOIN account c ON c.id = a.account_id WHERE c.name = ? AND j.is_current = 1 ORDER BY j.id",
                (name,),
            )
        return [(row["outcome"], row["strength"]) for row in rows]


def slow_writer():
    """An OpenAI-compatible endpoint that writes words for as long as anybody listens."""
    from fastapi import FastAPI
    from fastapi.responses import StreamingResponse

    app = FastAPI()

    @app.post("/v1/chat/completions")
    def complete(body: dict) -> StreamingResponse:
        def events():
            for number in itertools.count():
                piece = {"choices": [{"delta": {"content": f"{body['model']} word {number} "}}]}
                yield f"data: {json.dumps(piece)}\n\n"
                time.sleep(0.05)

        return StreamingResponse(events(), media_type="text/event-stream")

    return app


@pytest.fixture(scope="module")
def app(tmp_path_factory, serve):
    endpoint = serve(slow_writer())
    app = App(tmp_path_factory.mktemp("label"), f"one={endpoint}/v1#red", f"two={endpoint}/v1#blue")
    app.store.add_items([pair(n) for n in range(40)])
    yield app
    app.kill()


@pytest.fixture
def open_as(app, open_page):
    """A signed-in page of its own."""

    def sign_in(name: str, **options) -> sync_api.Page:
        page = open_page(app.url, **options)
        page.get_by_label("Name").fill(name)
        page.get_by_label("Password").fill(PASSWORD)
        page.get_by_role("button", name="Sign in").click()
        page.locator("#pl-submit, .pl-card h3").first.wait_for()
        return page

    return sign_in


def texts(page) -> list[str]:
    return page.locator(".pl-answer .pl-text").all_inner_texts()


def saved(page, before: list[str]) -> None:
    """Waits until the next task has taken the place of the one before."""
    sync_api.expect(page.locator(".pl-status").filter(has_text="Saved").first).to_be_visible()
    page.wait_for_function(
        "before => document.querySelector('.pl-answer .pl-text')?.innerText !== before", arg=before[0]
    )


def test_label_by_mouse_by_keyboard_undo_and_reload(app, open_as):
    page = open_as("ann")
    assert page.get_by_role("tab", name="Admin").count() == 0 or not page.get_by_role("tab", name="Admin").is_visible()
    before = texts(page)
    page.get_by_role("button", name="A is better").click()
    page.get_by_role("button", name="significantly better").click()
    page.get_by_role("button", name="Submit").dblclick()  # counts once
    saved(page, before)
    assert app.said("ann") == [("prefer", 4)]

    before = texts(page)
    page.keyboard.press("2")
    page.keyboard.press("q")
    page.keyboard.press("Enter")
    saved(page, before)
    assert app.said("ann") == [("prefer", 4), ("prefer", 1)]

    held = texts(page)
    page.keyboard.press("u")
    page.wait_for_function("held => document.querySelector('.pl-answer .pl-text')?.innerText !== held", arg=held[0])
    assert texts(page) == before
    page.keyboard.press("3")
    page.keyboard.press("Enter")
    saved(page, before)
    assert app.said("ann") == [("prefer", 4), ("tie", None)] and texts(page) == held

    page.get_by_text("Ratings and reasons").click()
    page.locator("#pl-rationale").fill("1 2 3 half a thought")  # keys in a text are text
    page.wait_for_timeout(900)  # the draft is saved half a second after the last key
    page.reload()
    sync_api.expect(page.locator("#pl-rationale")).to_have_value("1 2 3 half a thought")
    assert texts(page) == held and len(app.said("ann")) == 2


def test_a_killed_server_loses_no_vote_and_two_annotators_work_at_once(app, open_as):
    ann, bob = open_as("ann"), open_as("bob")
    done = len(app.said("ann")), len(app.said("bob"))
    before = texts(ann), texts(bob)
    app.kill()
    for page in (ann, bob):
        page.keyboard.press("4")
        page.keyboard.press("Enter")
        sync_api.expect(page.locator(".pl-status.pl-problem").first).to_contain_text("Not saved yet")
    app.start()
    for page, old in zip((ann, bob), before, strict=True):
        saved(page, old)
    assert (len(app.said("ann")), len(app.said("bob"))) == (done[0] + 1, done[1] + 1)
    assert app.said("ann")[-1] == app.said("bob")[-1] == ("both_bad", None)


def test_hostile_answers_are_shown_and_do_nothing(app, open_as):
    responses = [NewResponse(text=HOSTILE), NewResponse(text="fine")]
    app.store.add_items([NewItem(prompt=[{"role": "user", "content": HOSTILE}], responses=responses, warning="rude")])
    with app.store.database.write() as run:
        run("UPDATE item SET n_done = 9 WHERE warning = 'rude'")
    page = open_as("bob")
    for _ in range(12):
        if page.get_by_text("Content warning: rude").count():
            break
        before = texts(page)
        page.keyboard.press("3")
        page.keyboard.press("Enter")
        saved(page, before)
    page.keyboard.press("v")
    assert HOSTILE in texts(page)
    assert page.title() == "Plumbline labels" and page.locator("img[src*=evil]").count() == 0


def test_arena_streams_stops_and_names_after_the_vote(app, open_as):
    page = open_as("ann")
    page.get_by_role("tab", name="Arena").click()
    arena = page.locator("plumbline-arena")
    arena.get_by_label("Your prompt").fill("Say something.")
    arena.get_by_role("button", name="Ask both").click()
    for side in ("A", "B"):
        sync_api.expect(arena.get_by_label(f"Text of answer {side}")).to_contain_text("word 3")
    assert arena.get_by_role("button", name="Submit").count() == 0  # no vote before both have ended
    arena.get_by_role("button", name="Stop").click()
    arena.get_by_role("button", name="B is better").click()
    assert "was one" not in arena.inner_text() and "was two" not in arena.inner_text()
    arena.get_by_role("button", name="Submit").click()
    sync_api.expect(arena).to_contain_text("A was")
    with app.store.database.read() as run:
        models = [row["model"] for row in run("SELECT model FROM response WHERE finish_reason = 'stopped'")]
    assert sorted(models) == ["one", "two"]


def test_a_reviewer_settles_what_annotators_disagree_on(app, open_as):
    app.store.add_items([pair(900, target_labels=2)])
    with app.store.database.write() as run:
        item = run("SELECT max(id) AS id FROM item")[0]["id"]
        run("UPDATE item SET n_done = 60 WHERE id = ?", (item,))  # next for both
        run("UPDATE item SET target_labels = 62 WHERE id = ?", (item,))
    for name, choose in (("ann", "3"), ("bob", "4")):
        page = open_as(name)
        for _ in range(5):
            before = texts(page)
            mine = any("900" in text for text in before)
            page.keyboard.press(choose)
            page.keyboard.press("Enter")
            saved(page, before)
            if mine:
                break
        else:
            pytest.fail(f"{name} was not given the item")
    page = open_as("rita")
    page.get_by_role("tab", name="Review").click()
    row = page.get_by_role("row").filter(has_text="question 900")
    sync_api.expect(row).to_contain_text("1 tie")
    assert "red" not in row.inner_text() and "blue" not in row.inner_text()
    row.get_by_role("button", name="Decide").click()
    review = page.locator("plumbline-review")
    review.get_by_role("button", name="A is better").click()
    review.get_by_role("button", name="Submit").click()
    sync_api.expect(page.get_by_role("row").filter(has_text="question 900")).to_have_count(0)
    assert app.said("rita")[-1] == ("prefer", 3)


def test_export_from_the_admin_tab(app, open_as, tmp_path):
    page = open_as("root")
    page.get_by_role("tab", name="Admin").click()
    with page.expect_download() as download:
        page.get_by_role("button", name="Download", exact=True).click()
    download.value.save_as(tmp_path / "labels.jsonl")
    assert download.value.suggested_filename == "labels-preference.jsonl"
