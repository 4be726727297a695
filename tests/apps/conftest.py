"""A label store on SQLite and on PostgreSQL, with a clock that tests move and a fast password hasher; a browser."""

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import threading
import uuid
from pathlib import Path

import pytest

pytest.importorskip("argon2", reason="the labelling app needs the [ui] extra")
from argon2 import PasswordHasher  # noqa: E402

from plumbline.apps.label.store.database import PostgresDatabase, SQLiteDatabase  # noqa: E402
from plumbline.apps.label.store.items import NewItem, NewResponse  # noqa: E402
from plumbline.apps.label.store.store import LabelStore  # noqa: E402

FAST_HASHER = PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)
PASSWORD = "a long password"


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


def pair(number: int, **changes) -> NewItem:
    responses = [NewResponse(text=f"first {number}", model="red"), NewResponse(text=f"second {number}", model="blue")]
    fields = {"prompt": [{"role": "user", "content": f"question {number}"}], "responses": responses}
    return NewItem(**(fields | changes))


def _postgres_binary(name: str) -> str | None:
    found = shutil.which(name) or next(iter(sorted(map(str, Path("/usr/lib/postgresql").glob(f"*/bin/{name}")))), None)
    return str(Path(found).resolve()) if found else None


@pytest.fixture(scope="session")
def postgres_url():
    """A server of our own on a Unix socket, gone after the session."""
    pytest.importorskip("psycopg", reason="PostgreSQL tests need the [postgres] extra")
    initdb, pg_ctl = _postgres_binary("initdb"), _postgres_binary("pg_ctl")
    if initdb is None or pg_ctl is None:
        pytest.skip("no initdb and pg_ctl on this machine: install PostgreSQL's server")
    folder = Path(tempfile.mkdtemp(prefix="plumbline-pg-"))
    user = None
    if os.getuid() == 0:  # the server refuses to run as root
        names = {entry.pw_name for entry in pwd.getpwall()}
        user = "postgres" if "postgres" in names else "nobody"
        shutil.chown(folder, user)
    environment = {"PATH": os.environ["PATH"], "LC_ALL": "C"}

    def run(*command: str) -> None:
        subprocess.run(command, check=True, user=user, cwd=folder, env=environment, stdout=subprocess.DEVNULL)

    run(initdb, "-D", str(folder / "data"), "-U", "plumbline", "-A", "trust", "-E", "UTF8", "--no-sync")
    options = f"-c listen_addresses='' -c unix_socket_directories='{folder}' -c fsync=off"
    run(pg_ctl, "-D", str(folder / "data"), "-l", str(folder / "log"), "-w", "-o", options, "start")
    yield f"postgresql://plumbline@/postgres?host={folder}"
    run(pg_ctl, "-D", str(folder / "data"), "-m", "immediate", "stop")
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=["sqlite", "postgres"])
def database(request, tmp_path):
    if request.param == "sqlite":
        database = SQLiteDatabase(tmp_path / "labels.db")
    else:
        url, schema = request.getfixturevalue("postgres_url"), f"t{uuid.uuid4().hex}"
        import psycopg

        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(f"CREATE SCHEMA {schema}")
        database = PostgresDatabase(f"{url}&options=-csearch_path%3D{schema}")
    yield database
    database.close()


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def store(database, clock):
    return LabelStore(database, clock=clock, seed=0, hasher=FAST_HASHER)


@pytest.fixture
def make_account(store):
    return lambda name, role="annotator": store.add_account(name, PASSWORD, role)


# Web apps and the browser


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def serve():
    """Serves an app from a thread of the test; returns its address."""
    uvicorn = pytest.importorskip("uvicorn", reason="the web apps need the [ui] extra")
    running = []

    def start(app) -> str:
        port = free_port()
        server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        running.append((server, thread))
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            thread.join(0.05)
        return f"http://127.0.0.1:{port}"

    yield start
    for server, thread in running:
        server.should_exit = True
        thread.join(10)


@pytest.fixture(scope="module")
def browser():
    """Debian's chromium under playwright."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="browser tests need the [dev] extra")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no chromium on this machine: apt-get install chromium")
    sync_api.expect.set_options(timeout=30_000)  # the machine may be busy
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """A page of its own at an address; fails when a request leaves the machine or a script of ours fails."""
    contexts, outside, failed = [], [], []

    def open_at(url: str, **options):
        context = browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | options))
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.on("request", lambda r: None if r.url.startswith((url, "data:", "blob:")) else outside.append(r.url))
        page.on("pageerror", lambda error: failed.append(str(error)))
        page.goto(url)
        return page

    yield open_at
    for context in contexts:
        context.close()
    assert outside == [] and failed == []


def serious_violations(page) -> list[tuple[str, str]]:
    """What axe-core (its axe.min.js is at $PLUMBLINE_AXE) calls critical or serious: (rule, element)."""
    page.evaluate(Path(os.environ["PLUMBLINE_AXE"]).read_text(encoding="utf-8"))
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
    return [(v["id"], v["nodes"][0]["html"]) for v in found if v["impact"] in ("critical", "serious")]


def keep_screenshot(page, name: str) -> None:
    """Saves the page under $PLUMBLINE_SCREENSHOTS, where that is set."""
    if folder := os.environ.get("PLUMBLINE_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=str(Path(folder) / f"{name}.png"), full_page=True)
