"""The REST API: sessions, roles, other people's assignments, hostile text, limits; and that fuzzing finds no 5xx."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("fastapi", reason="the labelling app needs the [ui] extra")
from fastapi.testclient import TestClient

from plumbline.apps.label.arena import Arena, ArenaPolicy
from plumbline.apps.label.server.api import make_api
from plumbline.apps.label.server.context import COOKIE, KNOWN
from plumbline.apps.label.store.accounts import Sessions, SignInBrake
from plumbline.apps.label.store.database import SQLiteDatabase
from plumbline.apps.label.store.items import NewItem, NewResponse, check_characters
from tests.apps.conftest import PASSWORD, pair

TIE = {"outcome": "tie"}
HOSTILE = (
    '<img src="http://evil.example/x.png" onerror="alert(1)"><script>alert(1)</script>![x](http://evil.example/y.png)'
)


@pytest.fixture
def database(tmp_path):
    return SQLiteDatabase(tmp_path / "labels.db")


def writer(name):
    return ArenaPolicy(name=name, stream=lambda prompt, seed: iter([f"{name} says ", "something ", "to ", prompt]))


@pytest.fixture
def app(store, make_account):
    store.change_settings(None, {"control_share": 0.0, "repeat_share": 0.0})
    for name, role in (("ann", "annotator"), ("bob", "annotator"), ("eve", "reviewer"), ("root", "admin")):
        make_account(name, role)
    store.add_items([pair(n) for n in range(4)])
    return make_api(store, Arena([writer("red"), writer("blue")], seed=0))


@pytest.fixture
def sign_in(app):
    def client(name=None):
        client = TestClient(app, raise_server_exceptions=False)
        if name:
            assert client.post("/api/sign-in", json={"name": name, "password": PASSWORD}).status_code == 200
        return client

    return client


def submit(client, task, request_id="request-0001", answer=TIE):
    path = f"/api/assignments/{task['assignment']}/submit"
    return client.post(path, json={"request_id": request_id, "answer": answer})


OPEN = {"/api/sign-in", "/api/sign-out", "/healthz"}  # what anybody may call
NEEDS = {"review": "reviewer", "admin": "admin"}


def routes(app):
    for path, methods in app.openapi()["paths"].items():
        for method, described in methods.items():
            yield method.upper(), path, described["tags"][0]


def call(client, method, path):
    for name in ("assignment", "item", "other"):
        path = path.replace("{" + name + "}", "1")
    return client.request(method, path.replace("{run}", "x").replace("{format}", "full"), json={})


def test_every_handler_asks_for_a_session_and_changes_nothing_without_one(app, sign_in, store):
    before = store.events()
    for method, path, _ in routes(app):
        if path not in OPEN:
            assert call(sign_in(), method, path).status_code == 401, (method, path)
    assert store.events() == before


def test_every_handler_of_a_role_refuses_those_below_it(app, sign_in, store):
    before = store.events()
    for name, tags in (("ann", ("review", "admin")), ("eve", ("admin",))):
        client = sign_in(name)
        for method, path, tag in routes(app):
            if tag in tags:
                assert call(client, method, path).status_code == 403, (name, method, path)
    assert store.events() == before


def test_forged_expired_and_revoked_cookies_are_no_session(app, sign_in, store):
    ann = next(account for account in store.accounts() if account.name == "ann")
    good = Sessions(store.setting("session_key")).cookie(ann)
    for cookie in ("", "x", good[:-2], Sessions("another key").cookie(ann), "[1,0]"):
        client = sign_in()
        client.cookies.set(COOKIE, cookie)
        assert client.post("/api/claim").status_code == 401
    client = sign_in()
    client.cookies.set(COOKIE, good)
    assert client.get("/api/me").json()["role"] == "annotator"
    app.state.label.sessions.max_age = -1
    assert client.get("/api/me").status_code == 401
    app.state.label.sessions.max_age = 1000
    store.change_account(ann.id, role="reviewer")  # ends sessions of the old role
    assert client.get("/api/me").status_code == 401


def test_a_session_that_ends_between_claim_and_submit_takes_its_label_with_it(sign_in, store):
    ann = sign_in("ann")
    task = ann.post("/api/claim").json()["task"]
    account = next(account for account in store.accounts() if account.name == "ann")
    store.change_account(account.id, password="another password")
    before = store.events()
    assert submit(ann, task).status_code == 401
    assert ann.post("/api/claim").status_code == 401
    assert ann.post("/api/claim").json()["detail"].startswith("sign in first")
    assert store.events() == before


def test_a_session_survives_a_restart(store, app, sign_in):
    cookie = sign_in("ann").cookies[COOKIE]
    again = TestClient(make_api(store))
    again.cookies.set(COOKIE, cookie)
    assert again.get("/api/me").json()["name"] == "ann"


def test_another_annotators_assignment_is_refused(sign_in, store):
    ann, bob = sign_in("ann"), sign_in("bob")
    task = ann.post("/api/claim").json()["task"]
    number, before = task["assignment"], store.events()
    assert submit(bob, task).status_code == 403
    assert bob.put(f"/api/assignments/{number}/draft", json={}).status_code == 403
    for act in ("heartbeat", "withdraw"):
        assert bob.post(f"/api/assignments/{number}/{act}").status_code == 403
    assert bob.get(f"/api/assignments/{number}/names").status_code == 403
    assert store.events() == before


def test_label_twice_undo_and_bad_answers(sign_in):
    ann = sign_in("ann")
    task = ann.post("/api/claim").json()["task"]
    assert submit(ann, task, answer={"outcome": "prefer", "winner": 7, "strength": 1}).status_code == 422
    assert submit(ann, task, answer={"outcome": "nonsense"}).status_code == 422
    first, second = submit(ann, task).json(), submit(ann, task).json()
    assert first["judgement"] == second["judgement"] and second["repeated"]
    assert ann.post("/api/undo").json()["task"]["said"]["outcome"] == "tie"
    assert ann.post("/api/claim").json()["progress"]["done"] == 1


def test_wrong_passwords_are_braked_by_name(app, sign_in):
    clock = [0.0]
    app.state.label.name_brake.clock = lambda: clock[0]
    client = sign_in()
    for _ in range(5):
        assert client.post("/api/sign-in", json={"name": "ann", "password": "wrong"}).status_code == 401
    assert client.post("/api/sign-in", json={"name": "ann", "password": PASSWORD}).status_code == 429
    assert client.post("/api/sign-in", json={"name": "bob", "password": PASSWORD}).status_code == 200
    clock[0] = 61.0
    assert client.post("/api/sign-in", json={"name": "ann", "password": PASSWORD}).status_code == 200


def test_requests_from_other_sites_are_refused(sign_in):
    ann = sign_in("ann")
    assert ann.post("/api/claim", headers={"Origin": "http://evil.example"}).status_code == 403
    assert ann.post("/api/claim", headers={"Origin": "http://testserver"}).status_code == 200


def test_hostile_text_stays_text_and_the_policy_forbids_other_hosts(sign_in, store):
    responses = [NewResponse(text=HOSTILE), NewResponse(text="fine")]
    store.add_items([NewItem(prompt=[{"role": "user", "content": HOSTILE}], responses=responses)])
    store.set_priorities({5: 9.0}, model="x")
    store.rng.random = lambda: 0.5
    answer = sign_in("ann").post("/api/claim")
    assert HOSTILE in [a["text"] for a in answer.json()["task"]["answers"]]
    assert answer.headers["content-type"] == "application/json"
    policy = answer.headers["content-security-policy"]
    assert "default-src 'self'" in policy and "img-src 'self'" in policy and "http:" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_uploads_are_checked_by_type_size_and_content(sign_in, store, monkeypatch):
    root = sign_in("root")

    def upload(name, content):
        return root.post("/api/import", files={"file": (name, content)})

    row = json.dumps({"prompt": "new", "responses": ["a", "b"]}).encode()
    assert upload("pairs.jsonl", row).json() == {"added": 1, "doubles": 0}
    assert upload("pairs.exe", row).status_code == 415
    bad = upload("pairs.jsonl", row + b"\n{}")
    assert bad.status_code == 422 and "pairs.jsonl:2" in bad.json()["detail"]
    monkeypatch.setattr("plumbline.apps.label.server.context.MAX_UPLOAD", 100)
    assert upload("pairs.jsonl", row * 100).status_code == 413
    assert root.post("/api/claim", content=b"x", headers={"Content-Length": "2000000"}).status_code == 413


def test_the_arena_streams_both_blind_and_names_them_after_the_vote(sign_in):
    ann, bob = sign_in("ann"), sign_in("bob")
    events = [json.loads(line) for line in ann.post("/api/arena", json={"prompt": "hello"}).text.splitlines()]
    task = events[-1]["task"]
    shown = ["".join(e["text"] for e in events if e.get("slot") == slot).strip() for slot in (0, 1)]
    assert shown == [a["text"] for a in task["answers"]] and sorted(s.split()[0] for s in shown) == ["blue", "red"]
    path = f"/api/assignments/{task['assignment']}/names"
    assert ann.get(path).status_code == 403
    assert submit(ann, task).status_code == 200
    assert ann.get(path).json()["names"] == [s.split()[0] for s in shown]
    assert bob.get(path).status_code == 403
    assert ann.post("/api/arena/none/stop").status_code == 404


def test_a_policy_that_fails_stores_nothing(store, make_account):
    def broken(prompt, seed):
        yield "half"
        raise RuntimeError("out of memory")

    arena = Arena([writer("red"), ArenaPolicy(name="blue", stream=broken)])
    account = make_account("zoe")
    events = list(arena.answer(store, account.id, "hello"))
    assert "failed" in events[-1]["error"] and "memory" not in json.dumps(events)
    with store.database.read() as run:
        assert run("SELECT count(*) AS n FROM item")[0]["n"] == 0


def test_review_export_and_accounts_through_the_api(sign_in):
    ann, bob, eve, root = (sign_in(name) for name in ("ann", "bob", "eve", "root"))
    task = ann.post("/api/claim").json()["task"]
    submit(ann, task, answer={"outcome": "flag", "reason": "personal data"})
    (item,) = eve.get("/api/review").json()
    assert eve.put(f"/api/items/{item['id']}/status", json={"status": "retired"}).status_code == 200
    assert eve.get("/api/review").json() == []
    task = bob.post("/api/claim").json()["task"]
    submit(bob, task, "request-bob1", {"outcome": "prefer", "winner": 0, "strength": 4})
    (row,) = map(json.loads, root.get("/api/export/preference").text.splitlines())
    assert row["margin"] == 1.0
    assert root.get("/api/export/nonsense").status_code == 404
    assert eve.get("/api/statistics").json()["judgements"] == 2
    assert eve.get("/api/statistics.png").content.startswith(b"\x89PNG")
    made = root.post("/api/accounts", json={"name": "new", "password": PASSWORD, "role": "annotator"})
    assert made.status_code == 201
    assert root.patch(f"/api/accounts/{made.json()['id']}", json={"active": False}).status_code == 200
    assert root.patch("/api/settings", json={"target_labels": 0}).status_code == 422


def test_fuzzing_the_api_finds_no_server_error(app, sign_in):
    schemathesis = pytest.importorskip("schemathesis", reason="fuzzing needs the [dev] extra")
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import strategies as st

    client = sign_in("root")
    schema = schemathesis.openapi.from_dict(app.openapi())
    operations = [found.ok() for found in schema.get_all_operations()]
    cases = st.one_of([operation.as_strategy() for operation in operations if operation.path != "/api/sign-in"])

    @settings(max_examples=150, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(cases)
    def fuzz(case):
        request = case.as_transport_kwargs(base_url="http://testserver")
        request.pop("cookies", None)  # the client brings its session
        answer = client.request(**request)
        assert answer.status_code < 500, (case.method, case.path, answer.text)

    fuzz()


def tries(client, name, password, count=25):
    """Statuses of as many sign-ins sent at once."""
    with ThreadPoolExecutor(count) as pool:
        ask = lambda _: client.post("/api/sign-in", json={"name": name, "password": password}).status_code  # noqa: E731
        return list(pool.map(ask, range(count)))


def test_wrong_passwords_sent_at_once_do_not_pass_the_limit(app, store, monkeypatch):
    slow = store.check_password

    def check(name, password):  # hashing takes long enough for all of them to arrive
        time.sleep(0.05)
        return slow(name, password)

    monkeypatch.setattr(store, "check_password", check)
    statuses = tries(TestClient(app), "ann", "wrong password")
    assert statuses.count(401) == 5 and statuses.count(429) == 20


def test_nobody_is_locked_out_by_somebody_else(app):
    attacker, elsewhere = TestClient(app, client=("203.0.113.9", 1)), TestClient(app, client=("198.51.100.7", 1))
    body = {"name": "ann", "password": PASSWORD}
    mine = TestClient(app, client=("203.0.113.9", 2))  # behind the same address, and has been here before
    assert mine.post("/api/sign-in", json=body).status_code == 200
    mine.post("/api/sign-out")
    assert 429 in tries(attacker, "ann", "wrong password", 8)
    assert attacker.post("/api/sign-in", json=body).status_code == 429
    assert elsewhere.post("/api/sign-in", json=body).status_code == 200
    assert mine.post("/api/sign-in", json=body).status_code == 200
    for name in (f"name-{n}" for n in range(40)):  # many names from one address are braked by the address
        attacker.post("/api/sign-in", json={"name": name, "password": "wrong password"})
    assert attacker.post("/api/sign-in", json={"name": "bob", "password": PASSWORD}).status_code == 429
    assert mine.post("/api/sign-in", json=body).status_code == 200


def test_a_known_browser_has_its_own_limit_and_no_other_name(app):
    mine = TestClient(app, client=("203.0.113.9", 2))
    assert mine.post("/api/sign-in", json={"name": "ann", "password": PASSWORD}).status_code == 200
    assert tries(mine, "ann", "wrong password", 9).count(401) == 5
    assert tries(mine, "bob", "wrong password", 9).count(401) == 5
    forged = TestClient(app, client=("203.0.113.8", 2), cookies={KNOWN: mine.cookies[KNOWN][:-2] + "xx"})
    assert tries(forged, "ann", "wrong password", 9).count(401) == 5


def test_right_passwords_use_up_nothing_and_the_brake_forgets(app):
    client = TestClient(app)
    for _ in range(12):
        assert client.post("/api/sign-in", json={"name": "ann", "password": PASSWORD}).status_code == 200
        client.cookies.clear()
    brake = SignInBrake(limit=2, clock=lambda: now[0])
    now = [0.0]
    for n in range(10_002):
        brake.take(n)
    now[0] = 100.0
    brake.take("next")
    assert len(brake._tries) == 1


def test_signing_out_ends_the_session_on_the_server(sign_in, store):
    ann, bob = sign_in("ann"), sign_in("bob")
    copy = ann.cookies[COOKIE]
    task = ann.post("/api/claim").json()["task"]
    assert ann.post("/api/sign-out").status_code == 200
    stolen = sign_in()
    stolen.cookies.set(COOKIE, copy)
    assert stolen.get("/api/me").status_code == 401
    assert stolen.post("/api/claim").status_code == 401
    assert submit(stolen, task).status_code == 401
    assert stolen.post("/api/sign-out").status_code == 200  # says nothing, does nothing
    assert bob.get("/api/me").status_code == 200 and sign_in("ann").get("/api/me").status_code == 200
    assert [e["kind"] for e in store.events()].count("sign-out") == 1 and store.broken_event() is None


@pytest.mark.parametrize(
    "changes",
    ['{"gold_gap": 5}', '{"gold_gap": [1]}', '{"gold_gap": [1, 2, 3]}', '{"gold_gap": ["a", "b"]}', '{"gold_gap": [1.5, 2]}',
     '{"gold_gap": [[1], 2]}', '{"gold_gap": null}', '{"gold_gap": {"a": 1}}', '{"gold_gap": [true, true]}', '{"target_labels": [2]}',
     '{"target_labels": 2.5}', '{"target_labels": "2"}', '{"target_labels": true}', '{"control_share": NaN}', '{"control_share": 1e400}',
     '{"control_share": [0.1]}', '{"lease_seconds": 1' + "0" * 400 + "}", '{"nothing": 1}', "[]", "5",
     '{"gold_gap": ' + "[" * 900 + "]" * 900 + "}"],
)  # fmt: skip
def test_settings_that_do_not_fit_are_refused(sign_in, store, changes):
    root, before = sign_in("root"), store.settings()
    answer = root.patch("/api/settings", content=changes, headers={"Content-Type": "application/json"})
    assert answer.status_code == 422 and answer.json()["detail"]
    assert store.settings() == before


DEEP = {"list": "[" * 5000 + "]" * 5000, "object": '{"a":' * 5000 + "1" + "}" * 5000, "not closed": "[" * 50_000}


@pytest.mark.parametrize("how", DEEP)
@pytest.mark.parametrize(
    "wrapped", ["{}", '{{"answer": {}}}', '{{"request_id": "a-request", "answer": {{"spans": {}}}}}']
)
def test_deeply_nested_json_is_refused_everywhere(app, sign_in, how, wrapped):
    root = sign_in("root")
    for method, path, _ in routes(app):
        if method in ("POST", "PUT", "PATCH"):
            path = (
                path.replace("{run}", "x").replace("{assignment}", "1").replace("{item}", "1").replace("{other}", "1")
            )
            answer = root.request(
                method, path, content=wrapped.format(DEEP[how]), headers={"Content-Type": "application/json"}
            )
            assert 400 <= answer.status_code < 500, (path, answer.status_code)


@pytest.mark.parametrize("text", ["half \\ud83d", "other half \\udc4d", "twice \\ud83d\\ud83d"])
def test_half_an_emoji_is_refused_in_words(sign_in, text):
    ann, root = sign_in("ann"), sign_in("root")
    task = ann.post("/api/claim").json()["task"]
    json_type = {"Content-Type": "application/json"}
    said = '{"request_id": "request-1", "answer": {"outcome": "tie", "rationale": "' + text + '"}}'
    for client, method, path, body in (
        (ann, "POST", f"/api/assignments/{task['assignment']}/submit", said),
        (ann, "PUT", f"/api/assignments/{task['assignment']}/draft", '{"rationale": "' + text + '"}'),
        (root, "PUT", "/api/guidelines", '{"text": "' + text + '"}'),
    ):
        answer = client.request(method, path, content=body, headers=json_type)
        assert answer.status_code == 422 and "half of an emoji" in answer.json()["detail"]
    whole = said.replace(text, "whole \\ud83d\\udc4d, and \\\\ud83d in six characters")
    path = f"/api/assignments/{task['assignment']}/submit"
    assert ann.request("POST", path, content=whole, headers=json_type).status_code == 200


def test_an_import_names_the_line_of_half_an_emoji_and_takes_files_from_windows(sign_in):
    root = sign_in("root")
    rows = b'{"prompt": "q", "responses": ["a", "b"]}\r\n{"prompt": "q2", "responses": ["a \\ud83d", "b"]}\r\n'
    answer = root.post("/api/import", files={"file": ("i.jsonl", rows)})
    assert answer.status_code == 422 and "i.jsonl:2" in answer.json()["detail"]
    good = b"\xef\xbb\xbf" + rows.split(b"\r\n")[0] + b"\r\n"
    assert root.post("/api/import", files={"file": ("i.jsonl", good)}).json() == {"added": 1, "doubles": 0}


def test_a_zero_byte_is_refused_and_the_words_for_one_are_not():
    with pytest.raises(ValueError, match="zero byte"):
        check_characters(["a\x00"])
    check_characters(["a \\u0000 in six characters", "\\\\u0000"])
