"""API keys, limits of each, and the other checks that come before a request is read. ASGI middleware, so that streams pass.

A file of keys has a line a key, `name key` or only the key, with limits of its own behind it where it has some:

    alice sk-3f...   rpm=60 concurrent=4
"""

import asyncio
import hashlib
import hmac
import math
import os
import time
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from plumbline.apps.serve.errors import error_body

VARIABLE = "PLUMBLINE_API_KEYS"
OPEN_PATHS = ("/healthz", "/readyz")
SHORTEST_KEY = 16


@dataclass(eq=False)
class ApiKey:
    """One key, by its hash. 0 for no limit."""

    name: str
    digest: bytes = field(repr=False)
    requests_per_minute: int = 0
    concurrent: int = 0
    running: int = 0
    times: deque[float] = field(default_factory=deque, repr=False)


def read_keys(path: str, *, requests_per_minute: int = 0, concurrent: int = 0) -> list[ApiKey]:
    """The keys of a file, or without one of $PLUMBLINE_API_KEYS; ValueError names the line that is wrong, never its key."""
    if path:
        file = Path(path)
        if not file.is_file():
            raise ValueError(f"{path}: no such file of API keys")
        lines = [(f"{path}:{at}", line) for at, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)]
    else:
        lines = [(f"${VARIABLE}", part) for part in os.environ.get(VARIABLE, "").split(",")]
    keys: list[ApiKey] = []
    for where, line in lines:
        words = line.split("#")[0].split()
        if not words:
            continue
        limits = {"rpm": requests_per_minute, "concurrent": concurrent}
        while len(words) > 1 and "=" in words[-1] and words[-1].split("=")[0] in limits:
            name, _, value = words.pop().partition("=")
            if not value.isdigit():
                raise ValueError(f"{where}: {name}={value!r} must be a whole number")
            limits[name] = int(value)
        if len(words) > 2 or len(words[-1]) < SHORTEST_KEY:
            raise ValueError(f"{where}: write `name key`, the key of at least {SHORTEST_KEY} characters")
        name = words[0] if len(words) == 2 else f"key {len(keys) + 1}"
        digest = hashlib.sha256(words[-1].encode()).digest()
        if any(hmac.compare_digest(digest, other.digest) for other in keys):
            raise ValueError(f"{where}: this key stands here twice")
        keys.append(ApiKey(name, digest, limits["rpm"], limits["concurrent"]))
    if path and not keys:
        raise ValueError(f"{path}: holds no API key")
    return keys


def find_key(keys: Collection[ApiKey], given: str) -> ApiKey | None:
    """The key that was given, compared with every one of them in the same time."""
    digest, found = hashlib.sha256(given.encode("utf-8", "surrogateescape")).digest(), None
    for key in keys:
        if hmac.compare_digest(digest, key.digest):
            found = key
    return found


class Gate:
    """Keys, limits, sizes, origins: what is not taken is answered here, in OpenAI's shape.

    `accepting` says whether new work is taken; while the server drains, everything but its health is answered with 503.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: Collection[ApiKey],
        max_body: int,
        cors: Collection[str] = (),
        accepting: Callable[[], bool] = lambda: True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.app, self.keys, self.max_body, self.cors = app, keys, max_body, frozenset(cors)
        self.accepting, self.clock = accepting, clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers or passes on one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        send = self._with_headers(send, headers.get("origin"))
        if scope["method"] == "OPTIONS" and headers.get("origin") in self.cors:
            await JSONResponse({})(scope, receive, send)
            return
        if scope["path"] in OPEN_PATHS:
            await self.app(scope, receive, send)
            return
        key = find_key(self.keys, _bearer(headers)) if self.keys else None
        refusal = self._refusal(scope, headers, key)
        if refusal:
            await refusal(scope, receive, send)
            return
        if key is None or scope["path"] == "/metrics":
            await self.app(scope, self._bounded(receive), send)
            return
        key.running += 1
        try:
            await self.app(scope, self._bounded(receive), send)
        finally:
            key.running -= 1

    def _refusal(self, scope: Scope, headers: dict[str, str], key: ApiKey | None) -> JSONResponse | None:
        origin = headers.get("origin")
        if origin and origin not in self.cors and scope["method"] not in ("GET", "HEAD"):
            return _refuse(403, "pages of other origins may not call this server", "invalid_request_error", "cors")
        if self.keys and key is None:
            message = "no such API key; send `Authorization: Bearer KEY`"
            return _refuse(401, message, "authentication_error", "invalid_api_key", {"WWW-Authenticate": "Bearer"})
        if not self.accepting() and scope["path"] != "/metrics":
            message = "the server is shutting down; ask another one"
            return _refuse(503, message, "server_error", "shutting_down", {"Retry-After": "5"})
        length = headers.get("content-length")
        if length is not None and (not length.isdigit() or int(length) > self.max_body):
            message = f"the request has {length} bytes; the limit is {self.max_body}"
            return _refuse(413, message, "invalid_request_error", "too_large")
        return self._over_limit(key) if key and scope["path"] != "/metrics" else None

    def _over_limit(self, key: ApiKey) -> JSONResponse | None:
        now = self.clock()
        if key.concurrent and key.running >= key.concurrent:
            message = f"{key.running} requests of this key are running; the limit is {key.concurrent}"
            return _refuse(429, message, "rate_limit_error", "concurrent_requests", {"Retry-After": "1"})
        while key.times and key.times[0] <= now - 60:
            key.times.popleft()
        if key.requests_per_minute and len(key.times) >= key.requests_per_minute:
            wait = str(max(1, math.ceil(key.times[0] + 60 - now)))
            message = f"{key.requests_per_minute} requests a minute are the limit of this key; come back in {wait} s"
            return _refuse(429, message, "rate_limit_error", "requests_per_minute", {"Retry-After": wait})
        if key.requests_per_minute:
            key.times.append(now)
        return None

    def _bounded(self, receive: Receive) -> Receive:
        """A body without a length is cut off where it grows too long: the reader then sees a body that is no JSON."""
        seen = 0

        async def bounded() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.max_body:
                return {"type": "http.request", "body": b"", "more_body": False}
            return message

        return bounded

    def _with_headers(self, send: Send, origin: str | None) -> Send:
        more = [(b"x-content-type-options", b"nosniff"), (b"cache-control", b"no-store")]
        if origin in self.cors and origin is not None:
            more += [
                (b"access-control-allow-origin", origin.encode("latin-1")),
                (b"access-control-allow-headers", b"authorization, content-type"),
                (b"access-control-allow-methods", b"GET, POST"),
                (b"vary", b"origin"),
            ]

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *more]
            await send(message)

        return with_headers


def _bearer(headers: dict[str, str]) -> str:
    kind, _, value = headers.get("authorization", "").partition(" ")
    return value.strip() if kind.lower() == "bearer" else ""


def _refuse(
    status: int, message: str, kind: str, code: str, headers: dict[str, str] | None = None
) -> JSONResponse:  # fmt: skip
    return JSONResponse(error_body(message, kind, code), status, headers)


async def until_disconnect(receive: Receive) -> None:
    """Returns when the client has gone. For after the body was read."""
    while (await receive())["type"] != "http.disconnect":
        await asyncio.sleep(0)
