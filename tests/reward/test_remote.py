"""Remote rewards against a real server on this machine: batches, retries, time-outs, and no made-up scores."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from plumbline.reward.composite import CompositeReward
from plumbline.reward.remote import RemoteReward, RemoteRewardError


@pytest.fixture
def server():
    """A server whose replies are drawn from `server.replies`: (status, body or function of the request, headers)."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):  # noqa: N802
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                httpd.requests.append((request, dict(self.headers)))
                status, body, headers = httpd.replies.pop(0) if httpd.replies else (200, lengths, {})
            if status == 0:
                httpd.release.wait(10)
                return
            body = body(request) if callable(body) else body
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body if isinstance(body, bytes) else json.dumps(body).encode())

        def log_message(self, *args):
            pass

    lock = threading.Lock()
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.requests, httpd.replies, httpd.release = [], [], threading.Event()
    httpd.url = f"http://127.0.0.1:{httpd.server_port}/score"
    threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
    yield httpd
    httpd.release.set()
    httpd.shutdown()
    httpd.server_close()


def lengths(request):
    return {"scores": [len(answer) if answer else None for answer in request["answers"]]}


def test_batches_come_back_in_order(server):
    remote = RemoteReward(server.url, batch_size=3, parallel=4)
    answers = ["x" * n for n in range(10)]
    assert remote(["p"] * 10, answers) == [None, *map(float, range(1, 10))]
    assert sorted(len(request["prompts"]) for request, _ in server.requests) == [1, 3, 3, 3]
    assert remote([], []) == []


def test_busy_servers_are_asked_again_with_growing_waits(server):
    waits = []
    server.replies = [(503, b"busy", {}), (429, b"slow down", {"Retry-After": "7"})]
    assert RemoteReward(server.url, wait=waits.append)(["p"], ["abc"]) == [3.0]
    assert waits == [0.5, 7.0]


def test_giving_up_says_what_the_server_said(server):
    server.replies = [(500, b"out of memory", {})] * 2
    with pytest.raises(RemoteRewardError, match=r"no scores after 2 tries.*HTTP 500 b'out of memory'"):
        RemoteReward(server.url, tries=2, wait=lambda _: None)(["p"], ["a"])


def test_our_own_mistakes_are_not_tried_again(server):
    server.replies = [(401, b"no token", {})]
    with pytest.raises(RemoteRewardError, match=r"HTTP 401 b'no token'; not tried again"):
        RemoteReward(server.url)(["p"], ["a"])
    assert len(server.requests) == 1


def test_a_server_that_never_replies_times_out(server):
    server.replies = [(0, b"", {})]
    with pytest.raises(RemoteRewardError, match="no scores after 1 tries.*timed out"):
        RemoteReward(server.url, timeout=0.2, tries=1)(["p"], ["a"])


@pytest.mark.parametrize(
    "body, message",
    [
        (b"<html>", r"replied b'<html>'; expected"),
        ({"result": [1]}, "expected"),
        ({"scores": [1, 2]}, "replied 2 scores for 1 answers"),
        ({"scores": 1.0}, "replied float scores"),
        ({"scores": ["0.5"]}, "replied the score '0.5'"),
        ({"scores": [True]}, "replied the score True"),
        (b'{"scores": [NaN]}', "replied the score nan"),
    ],
)
def test_replies_that_are_no_scores_raise(server, body, message):
    server.replies = [(200, body, {})]
    with pytest.raises(RemoteRewardError, match=message):
        CompositeReward([(RemoteReward(server.url), 1.0)])(["p"], ["a"])


def test_the_token_comes_from_the_environment(server, monkeypatch):
    remote = RemoteReward(server.url, token_env="PLUMBLINE_TEST_TOKEN")
    with pytest.raises(RemoteRewardError, match="PLUMBLINE_TEST_TOKEN is empty"):
        remote(["p"], ["a"])
    monkeypatch.setenv("PLUMBLINE_TEST_TOKEN", "secret")
    remote(["p"], ["a"])
    assert server.requests[0][1]["Authorization"] == "Bearer secret"


@pytest.mark.parametrize("options", [{"url": "ftp://x"}, {"tries": 0}, {"timeout": 0}, {"batch_size": 0}])
def test_bad_settings(options):
    with pytest.raises(ValueError, match="must"):
        RemoteReward(**{"url": "http://x"} | options)
