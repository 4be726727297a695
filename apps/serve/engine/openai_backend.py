"""Another server that speaks OpenAI's API (vLLM, SGLang, llama.cpp, a hosted model) as a backend: the guard as a proxy.

The other server is always asked for a stream, so that checks keep pace with it and a client that leaves stops it. Tool calls
that it has parsed come back as text in one notation, so that they are checked like every other text.
"""

import asyncio
import codecs
import json
import math
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

import httpx

from plumbline.apps.serve.engine.backend import (
    BadRequestError,
    BusyError,
    DeadlineError,
    DrainingError,
    Finish,
    Piece,
    Request,
    Served,
    TokenLogprob,
    UpstreamError,
    find_served,
)
from plumbline.apps.serve.tools import CLOSE, OPEN

CONNECT_S = 10.0
MOST_MESSAGE = 500  # characters of an error of the other server that are passed on


class OpenAIBackend:
    """One model of another server.

    Args:
        url: up to and with /v1.
        model: its name there; `name` is its name here.
        key: sent as a bearer token.
        limit: requests under way at a time; one more is refused.
        transport: of httpx, for tests.
    """

    def __init__(
        self, url: str, model: str, *, name: str, key: str = "", limit: int = 64, transport: httpx.AsyncBaseTransport | None = None
    ) -> None:  # fmt: skip
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"url={url!r} must begin with http:// or https://")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        timeout = httpx.Timeout(CONNECT_S, read=None, pool=None)
        self.url, self.model, self.name, self.limit = url.rstrip("/"), model, name, limit
        limits = httpx.Limits(max_connections=None)
        self.client = httpx.AsyncClient(headers=headers, timeout=timeout, limits=limits, transport=transport)
        self.running = 0
        self._draining = False

    def served(self) -> list[Served]:
        """The one model."""
        return [Served(name=self.name)]

    def tool_format(self, model: str) -> str | None:
        """The notation in which parsed calls are handed on."""
        return "hermes"

    async def submit(self, request: Request) -> "ProxyGeneration":
        """Sends the request; returns once the other server has taken it."""
        find_served(self, request.model)
        if self._draining:
            raise DrainingError("the server is shutting down; ask another one", retry_after_s=5)
        if self.running >= self.limit:
            raise BusyError(f"{self.running} requests are under way, the limit of this server", retry_after_s=1)
        path = "chat/completions" if request.messages is not None else "completions"
        deadline = time.monotonic() + request.deadline_s
        self.running += 1
        try:
            sent = self.client.build_request("POST", f"{self.url}/{path}", json=self._body(request))
            response = await _in_time(self.client.send(sent, stream=True), deadline)
            if response.status_code != 200:
                await _in_time(response.aread(), deadline)
                raise _refusal(response)
        except httpx.HTTPError as error:
            self.running -= 1
            raise UpstreamError(f"the server behind this one cannot be reached ({type(error).__name__})") from error
        except BaseException:
            self.running -= 1
            raise
        return ProxyGeneration(self, response, request, deadline)

    def stats(self) -> dict[str, float]:
        """Requests under way."""
        return {"rows": self.running, "waiting": 0}

    async def ready(self) -> str | None:
        """Whether the other server lists its models."""
        try:
            response = await self.client.get(f"{self.url}/models", timeout=CONNECT_S)
        except httpx.HTTPError as error:
            return f"the server behind this one cannot be reached ({type(error).__name__})"
        return None if response.status_code < 500 else f"the server behind this one answers with {response.status_code}"

    def drain(self) -> None:
        """Takes no more requests."""
        self._draining = True

    async def close(self, patience_s: float = 0.0) -> None:
        """Waits for what is under way, then closes all connections."""
        self.drain()
        until = time.monotonic() + patience_s
        while self.running and time.monotonic() < until:
            await asyncio.sleep(0.02)
        await self.client.aclose()

    def _body(self, request: Request) -> dict[str, Any]:
        drawing = request.drawing
        body: dict[str, Any] = {
            "model": self.model, "n": request.n, "stream": True, "stream_options": {"include_usage": True},
            "temperature": drawing.temperature, "top_p": drawing.top_p,
        }  # fmt: skip
        chat = request.messages is not None
        body |= {"messages": [dict(m) for m in request.messages or ()]} if chat else {"prompt": request.prompt}
        if drawing.max_tokens is not None:
            body["max_tokens"] = drawing.max_tokens
        for name in ("top_k", "seed", "frequency_penalty", "presence_penalty"):
            if (value := getattr(drawing, name)) not in (None, 0):
                body[name] = value
        if drawing.seed == 0:
            body["seed"] = 0
        if drawing.stop:
            body["stop"] = list(drawing.stop)
        if drawing.logit_bias:
            body["logit_bias"] = {str(token): bias for token, bias in drawing.logit_bias.items()}
        if drawing.logprobs is not None:
            body |= {"logprobs": True, "top_logprobs": drawing.logprobs} if chat else {"logprobs": drawing.logprobs}
        if request.tools:
            body |= {"tools": [dict(tool) for tool in request.tools], "tool_choice": request.tool_choice}
            if not request.parallel_tool_calls:
                body["parallel_tool_calls"] = False
        if request.response_format:
            body["response_format"] = dict(request.response_format)
        return body


class ProxyGeneration:
    """A stream of the other server, as pieces."""

    def __init__(self, backend: OpenAIBackend, response: httpx.Response, request: Request, deadline: float) -> None:
        self.backend, self.response, self.request, self.deadline = backend, response, request, deadline
        self.prompt_tokens = self.cached_tokens = 0
        self._open = True
        self._closing: asyncio.Task[None] | None = None
        self._choices = [_Choice(index) for index in range(request.n)]

    def cancel(self) -> None:
        """Drops the connection, which stops the other server."""
        if self._open:
            self._open = False
            self.backend.running -= 1
            self._closing = asyncio.ensure_future(self.response.aclose())

    async def __aiter__(self) -> AsyncIterator[Piece]:
        lines = self.response.aiter_lines()
        try:
            while True:
                try:
                    line = await _in_time(anext(lines), self.deadline)
                except StopAsyncIteration:
                    return
                if not line.startswith("data:"):
                    continue
                data = line.removeprefix("data:").strip()
                if data == "[DONE]":
                    return
                for piece in self._read(data):
                    yield piece
        except httpx.HTTPError as error:
            raise UpstreamError(f"the server behind this one broke off ({type(error).__name__})") from error
        finally:
            self.cancel()

    def _read(self, data: str) -> list[Piece]:
        """The pieces of one event."""
        try:
            event = json.loads(data)
            if error := event.get("error"):
                raise UpstreamError(
                    f"the server behind this one failed: {str(error.get('message', error))[:MOST_MESSAGE]}"
                )
            if usage := event.get("usage"):
                self.prompt_tokens = int(usage.get("prompt_tokens") or 0)
                self.cached_tokens = int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)
            pieces: list[Piece] = []
            for choice in event.get("choices") or ():
                pieces += self._choices[choice.get("index", 0)].read(choice)
            return pieces
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise UpstreamError(
                f"the server behind this one sent what is no completion ({type(error).__name__})"
            ) from error


class _Choice:
    """One answer of the other server: where its text stands, and the tool calls that are not complete yet."""

    def __init__(self, index: int) -> None:
        self.index, self.at = index, 0
        self.calls: dict[int, dict[str, str]] = {}
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def read(self, choice: Mapping[str, Any]) -> list[Piece]:
        """Its part of an event."""
        delta = choice.get("delta") or {}
        text = delta.get("content") or choice.get("text") or ""
        if not isinstance(text, str):
            raise TypeError("content is not text")
        for call in delta.get("tool_calls") or ():
            known = self.calls.setdefault(call.get("index", 0), {"name": "", "arguments": ""})
            function = call.get("function") or {}
            known["name"] += function.get("name") or ""
            known["arguments"] += function.get("arguments") or ""
        finish = choice.get("finish_reason")
        if finish is not None:
            text += "".join(_as_text(call) for _, call in sorted(self.calls.items()))
        logprobs = self._logprobs(choice.get("logprobs") or {})
        ended: Finish | None = None if finish is None else "length" if finish == "length" else "stop"
        if not text and not logprobs and ended is None:
            return []
        return [Piece(self.index, text, len(logprobs) or int(bool(text)), logprobs, ended)]

    def _logprobs(self, logprobs: Mapping[str, Any]) -> tuple[TokenLogprob, ...]:
        out = []
        for one in logprobs.get("content") or ():
            data = bytes(one["bytes"]) if one.get("bytes") else one["token"].encode()
            length = len(self.decoder.decode(data))
            top = tuple(
                (t["token"], bytes(t.get("bytes") or t["token"].encode()), t["logprob"])
                for t in one.get("top_logprobs") or ()
            )
            out.append(TokenLogprob(one["token"], data, one["logprob"], self.at, self.at + length, top))
            self.at += length
        for place, token in enumerate(logprobs.get("tokens") or ()):
            likeliest = (logprobs.get("top_logprobs") or [None] * (place + 1))[place] or {}
            top = tuple((text, text.encode(), value) for text, value in likeliest.items())
            value = logprobs["token_logprobs"][place]
            out.append(TokenLogprob(token, token.encode(), value, self.at, self.at + len(token), top))
            self.at += len(token)
        return tuple(out)


def _as_text(call: Mapping[str, str]) -> str:
    try:
        arguments = json.loads(call["arguments"] or "{}")
    except ValueError:
        arguments = call["arguments"]
    return f"{OPEN}\n{json.dumps({'name': call['name'], 'arguments': arguments}, ensure_ascii=False)}\n{CLOSE}"


async def _in_time(work: Any, deadline: float) -> Any:
    left = deadline - time.monotonic()
    try:
        return await asyncio.wait_for(work, None if math.isinf(left) else max(0.0, left))
    except TimeoutError:
        raise DeadlineError("the answer took longer than the deadline; ask for fewer tokens") from None


def _refusal(response: httpx.Response) -> Exception:
    try:
        error = response.json().get("error") or {}
        message = (
            str(error.get("message") or error)[:MOST_MESSAGE] if isinstance(error, dict) else str(error)[:MOST_MESSAGE]
        )
    except (ValueError, AttributeError):
        message = f"HTTP {response.status_code}"
    if response.status_code == 429:
        after = response.headers.get("retry-after", "")
        return BusyError(f"the server behind this one: {message}", retry_after_s=float(after) if after.isdigit() else 1)
    if response.status_code in (400, 413, 422):
        return BadRequestError(f"the server behind this one: {message}")
    return UpstreamError(f"the server behind this one answered with {response.status_code}: {message}")
