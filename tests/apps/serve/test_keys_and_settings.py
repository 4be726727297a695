"""Keys, limits and what a server refuses to start with."""

import asyncio

import pytest
from starlette.responses import PlainTextResponse

from plumbline.apps.serve.command import main, parser
from plumbline.apps.serve.keys import Gate, find_key, read_keys
from plumbline.apps.serve.settings import ServeSettings, read_settings
from plumbline.paths import CONFIGS

KEY, OTHER = "sk-0123456789abcdef", "sk-fedcba9876543210"


def ask(gate, method="POST", path="/v1/x", **headers):
    """(status, headers, body) of one request through the gate."""
    sent = []

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        sent.append(message)

    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": method, "path": path, "headers": raw, "query_string": b""}
    asyncio.run(gate(scope, receive, send))
    return sent[0]["status"], dict(sent[0]["headers"]), b"".join(m.get("body", b"") for m in sent[1:])


def gate(**changes):
    return Gate(PlainTextResponse("through"), **({"keys": [], "max_body": 100} | changes))


def test_keys_are_read_from_a_file_and_from_the_environment(tmp_path, monkeypatch):
    file = tmp_path / "keys"
    file.write_text(f"# ours\nalice {KEY} rpm=2 concurrent=1\n{OTHER}\n")
    alice, nameless = read_keys(str(file), requests_per_minute=9)
    assert (alice.name, alice.requests_per_minute, alice.concurrent) == ("alice", 2, 1)
    assert (nameless.name, nameless.requests_per_minute) == ("key 2", 9)
    assert find_key([alice, nameless], OTHER) is nameless and find_key([alice, nameless], KEY[:-1]) is None
    assert KEY not in repr(alice)
    monkeypatch.setenv("PLUMBLINE_API_KEYS", f"{KEY},{OTHER}")
    assert len(read_keys("")) == 2


@pytest.mark.parametrize(
    "text, words",
    [("short\n", "1: write `name key`"), ("a b c-0123456789abcdef\n", "1: write"), (f"{KEY}\nx {KEY}\n", "2: this key stands here twice"),
     (f"{KEY} rpm=many", "rpm='many'"), ("# none\n", "holds no API key")],
)  # fmt: skip
def test_a_file_of_keys_that_is_wrong(tmp_path, text, words):
    (tmp_path / "keys").write_text(text)
    with pytest.raises(ValueError, match=words) as error:
        read_keys(str(tmp_path / "keys"))
    assert KEY not in str(error.value)


def test_without_its_key_nothing_passes(tmp_path):
    keys = read_keys_of(tmp_path, KEY)
    for headers in ({}, {"authorization": f"Bearer {OTHER}"}, {"authorization": KEY}, {"authorization": "Bearer "}):
        status, _, body = ask(gate(keys=keys), **headers)
        assert status == 401 and b'"code":"invalid_api_key"' in body
    assert ask(gate(keys=keys), authorization=f"Bearer {KEY}")[0] == 200
    assert ask(gate(keys=keys), method="GET", path="/healthz")[0] == 200
    assert ask(gate(keys=keys), method="GET", path="/metrics")[0] == 401


def read_keys_of(tmp_path, line):
    (tmp_path / "keys").write_text(line)
    return read_keys(str(tmp_path / "keys"))


def test_limits_of_a_key(tmp_path):
    now = [0.0]
    keys = read_keys_of(tmp_path, f"{KEY} rpm=2 concurrent=1")
    one = gate(keys=keys, clock=lambda: now[0])
    assert [ask(one, authorization=f"Bearer {KEY}")[0] for _ in range(3)] == [200, 200, 429]
    status, headers, _ = ask(one, authorization=f"Bearer {KEY}")
    assert headers[b"retry-after"] == b"60"
    now[0] = 61
    assert ask(one, authorization=f"Bearer {KEY}")[0] == 200
    keys[0].running, now[0] = 1, 200
    assert ask(one, authorization=f"Bearer {KEY}")[0] == 429


def test_other_origins_are_refused_unless_they_are_named():
    assert ask(gate(), origin="https://evil.example")[0] == 403
    status, headers, _ = ask(gate(cors=["https://app.example"]), origin="https://app.example")
    assert status == 200 and headers[b"access-control-allow-origin"] == b"https://app.example"
    assert b"access-control-allow-origin" not in ask(gate(), method="GET", origin="https://evil.example")[1]
    assert ask(gate(cors=["https://app.example"]), method="OPTIONS", origin="https://app.example")[0] == 200


def test_long_bodies_and_a_draining_server():
    assert ask(gate(), content_length="101")[0] == 413
    assert ask(gate(), content_length="-1")[0] == 413
    status, headers, _ = ask(gate(accepting=lambda: False))
    assert status == 503 and headers[b"retry-after"] == b"5"
    assert ask(gate(accepting=lambda: False), method="GET", path="/readyz")[0] == 200  # the route itself says no


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"backend": "magic"}, "backend='magic'"),
        ({"backend": "openai"}, "--url go together"),
        ({"url": "http://x"}, "--url go together"),
        ({"backend": "openai", "url": "http://x", "ban": ("x",)}, "need the weights"),
        ({"rows": 0}, "rows=0"),
        ({"context": -1}, "context=-1"),
        ({"guard_layers": ("input", "x")}, "guard_layers"),
        ({"guard": "off", "documents": "x"}, "do nothing with --guard off"),
        ({"cors": ("*",)}, "any web page"),
        ({"adapters": ("red",)}, "NAME=FOLDER"),
        ({"adapters": ("a=x", "a=y")}, "the name is taken"),
        ({"deadline_s": float("nan")}, "deadline_s=nan"),
        ({"port": 70000}, "port=70000"),
    ],
)
def test_settings_that_contradict_themselves(changes, words):
    with pytest.raises(ValueError, match=words):
        ServeSettings(**changes)


def test_settings_files(tmp_path):
    file = tmp_path / "serve.yaml"
    file.write_text("rows: 3\ndeadline_s: 5\nban: [one, two]\ncors: https://a.example\n")
    read = read_settings(str(file), {"rows": 4})
    assert (read.rows, read.deadline_s, read.ban, read.cors) == (4, 5.0, ("one", "two"), ("https://a.example",))
    for text, words in [
        ("rows: many", "rows='many'"),
        ("rowz: 3", "unknown settings rowz"),
        ("- 1", "settings by name"),
    ]:
        file.write_text(text)
        with pytest.raises(ValueError, match=words):
            read_settings(str(file), {})


@pytest.mark.parametrize("file", sorted((CONFIGS / "serve").glob("*.yaml")), ids=lambda f: f.stem)
def test_the_files_that_ship(file):
    assert read_settings(file.stem, {}).model


@pytest.mark.parametrize(
    "argv, words",
    [
        (["no/such/model", "--port", "0"], "no such folder"),
        (["bundled:tiny-llama", "--host", "0.0.0.0", "--port", "0"], "give --api-keys FILE"),
        (["bundled:tiny-llama", "--port", "0", "--guard", "no-such-policy"], "no-such-policy"),
        (["bundled:tiny-llama", "--port", "0", "--guard", "rules_only", "--index", "nowhere"], "nowhere"),
        (
            ["bundled:tiny-llama", "--port", "0", "--guard", "off", "--adapters", "red=nowhere"],
            "no adapter_config.json",
        ),
        (["bundled:tiny-llama", "--port", "0", "--guard", "off", "--reward-model", "nowhere/at/all"], "no such folder"),
        (["bundled:tiny-llama", "--port", "0", "--guard", "off", "--context", "99999"], "2048 positions"),
        (["bundled:tiny-llama", "--concurrent", "3", "--port", "0"], "limits of API keys"),
    ],
)
def test_a_server_that_cannot_start_says_why_in_a_sentence(argv, words, monkeypatch):
    monkeypatch.delenv("PLUMBLINE_API_KEYS", raising=False)
    monkeypatch.setattr("plumbline.apps.serve.command.load_embed", lambda: None)
    with pytest.raises(ValueError, match=words) as error:
        main(argv)
    assert "\n" not in str(error.value)


def test_every_setting_is_a_flag():
    flags = {action.dest for action in parser()._actions}
    assert set(ServeSettings.__dataclass_fields__) <= flags
