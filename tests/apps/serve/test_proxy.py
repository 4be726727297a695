"""Another server behind the guard: this server, in front of one of its own kind and of one that misbehaves."""

import asyncio
import json

import httpx
import pytest

from plumbline.apps.serve.answering import Answering
from plumbline.apps.serve.app import make_serve_app
from plumbline.apps.serve.engine.backend import (
    BadRequestError,
    BusyError,
    DeadlineError,
    DrainingError,
    ServeError,
    UpstreamError,
)
from plumbline.apps.serve.engine.openai_backend import OpenAIBackend
from plumbline.apps.serve.settings import ServeSettings
from tests.apps.serve.conftest import Scripted, collect, greedy

TALK = [{"role": "user", "content": "Hello"}]


def proxy(handler, **options):
    return OpenAIBackend(
        "http://other/v1", "theirs", name="ours", key="sk-x", transport=httpx.MockTransport(handler), **options
    )


def events(*choices, usage=None):
    lines = [{"choices": [choice]} for choice in choices] + ([{"choices": [], "usage": usage}] if usage else [])
    text = "".join(f"data: {json.dumps(line)}\n\n" for line in lines) + "data: [DONE]\n\n"
    return httpx.Response(200, text=text, headers={"content-type": "text/event-stream"})


def run(work):
    return asyncio.run(asyncio.wait_for(work, 120))


def test_what_is_sent_and_what_comes_back():
    seen = []

    def handler(request):
        seen.append((request.url.path, request.headers["authorization"], json.loads(request.content)))
        return events(
            {"index": 0, "delta": {"content": "Hel"}, "logprobs": {"content": [{"token": "Hel", "logprob": -1.0, "bytes": None}]}},
            {"index": 1, "delta": {"content": "Bye"}},
            {"index": 0, "delta": {"content": "lo"}, "finish_reason": "length"},
            {"index": 1, "delta": {"tool_calls": [{"index": 0, "function": {"name": "f", "arguments": '{"a"'}}]}},
            {"index": 1, "delta": {"tool_calls": [{"index": 0, "function": {"arguments": ": 1}"}}]}, "finish_reason": "tool_calls"},
            usage={"prompt_tokens": 5, "prompt_tokens_details": {"cached_tokens": 2}},
        )  # fmt: skip

    async def asked():
        backend = proxy(handler)
        generation = await backend.submit(greedy(TALK, "ours", n=2, seed=0, stop=("x",), top_k=3, logprobs=0))
        answers = await collect(generation)
        await backend.close()
        return answers, generation, backend.running

    answers, generation, running = run(asked())
    assert (answers[0]["text"], answers[0]["finish"]) == ("Hello", "length")
    assert answers[1]["text"] == 'Bye<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
    assert (generation.prompt_tokens, generation.cached_tokens, running) == (5, 2, 0)
    path, key, body = seen[0]
    assert path == "/v1/chat/completions" and key == "Bearer sk-x" and body["messages"] == TALK
    assert (body["model"], body["n"], body["seed"], body["stop"], body["top_k"], body["stream"]) == (
        "theirs",
        2,
        0,
        ["x"],
        3,
        True,
    )


def broken(request):
    raise httpx.ConnectError("no")


@pytest.mark.parametrize(
    "handler, error, words",
    [
        (broken, UpstreamError, "cannot be reached"),
        (lambda r: httpx.Response(400, json={"error": {"message": "too long"}}), BadRequestError, "too long"),
        (lambda r: httpx.Response(429, json={"error": {"message": "later"}}, headers={"retry-after": "7"}), BusyError, "later"),
        (lambda r: httpx.Response(500, text="<html>"), UpstreamError, "answered with 500"),
        (lambda r: httpx.Response(200, text="data: {]\n\n"), UpstreamError, "no completion"),
        (lambda r: httpx.Response(200, text='data: {"choices": [{"index": 9}]}\n\n'), UpstreamError, "no completion"),
        (lambda r: httpx.Response(200, text='data: {"error": {"message": "gone"}}\n\n'), UpstreamError, "gone"),
    ],
)  # fmt: skip
def test_a_server_that_misbehaves_is_an_error_of_ours(handler, error, words):
    async def asked():
        backend = proxy(handler)
        with pytest.raises(error, match=words) as raised:
            await collect(await backend.submit(greedy(TALK, "ours")))
        assert backend.running == 0
        return raised.value

    assert isinstance(run(asked()), ServeError)


def test_an_answer_that_breaks_off_is_no_answer():
    """Neither [DONE] nor a finish: nothing may pass for a whole answer."""
    client = _client(
        Answering(
            proxy(
                lambda r: httpx.Response(200, text='data: {"choices": [{"index": 0, "delta": {"content": "ha"}}]}\n\n')
            ),
            None,
        )
    )
    for stream in (False, True):
        response = client.post("/v1/chat/completions", json={"model": "ours", "messages": TALK, "stream": stream})
        assert "broke off" in response.text and "[DONE]" not in response.text
        assert stream or response.status_code == 502


def _client(answering):
    from starlette.testclient import TestClient

    return TestClient(make_serve_app(answering, ServeSettings()), raise_server_exceptions=False)


def test_limits_deadlines_and_draining():
    async def asked():
        backend = proxy(lambda r: events({"index": 0, "delta": {"content": "x"}, "finish_reason": "stop"}), limit=1)
        first = await backend.submit(greedy(TALK, "ours"))
        with pytest.raises(BusyError):
            await backend.submit(greedy(TALK, "ours"))
        first.cancel()
        with pytest.raises(DeadlineError):
            await backend.submit(greedy(TALK, "ours", deadline_s=0))
        assert backend.running == 0
        backend.drain()
        with pytest.raises(DrainingError):
            await backend.submit(greedy(TALK, "ours"))
        await backend.close()

    run(asked())


def test_this_server_behind_itself():
    """The outer one speaks to the inner one over HTTP; tool calls survive both."""
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call>'
    inner = make_serve_app(Answering(Scripted(["Well. ", call[:20], call[20:]]), None), ServeSettings())
    outer = OpenAIBackend("http://inner/v1", "scripted", name="ours", transport=httpx.ASGITransport(inner))
    tools = [{"type": "function", "function": {"name": "weather"}}]
    body = {"model": "ours", "messages": TALK, "tools": tools, "logprobs": True}
    choice = _client(Answering(outer, None)).post("/v1/chat/completions", json=body).json()["choices"][0]
    assert choice["message"]["content"].startswith("Well.")
    assert json.loads(choice["message"]["tool_calls"][0]["function"]["arguments"]) == {"city": "Bern"}
    assert choice["finish_reason"] == "tool_calls"
