"""What the web apps do to every request: own origin only, bounded bodies, headers that keep model text harmless."""

import json
import re
from collections.abc import Collection

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Model text is data: whatever a page renders, nothing may be fetched from elsewhere or framed.
CONTENT_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline';"
    " img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; frame-ancestors 'none'; form-action 'self'"
)
HEADERS = [
    (b"content-security-policy", CONTENT_POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]
NO_STORE = [(b"cache-control", b"no-store")]
DEEPEST = 40  # brackets within brackets of a JSON body; what the apps take has fewer than ten
_JSON_TEXT = re.compile(rb'"(?:[^"\\]|\\.)*"?', re.DOTALL)


def body_refusal(body: bytes) -> tuple[int, str] | None:
    """(status, reason) for a JSON body that no handler could work with; None for one to pass on, also where it is no JSON."""
    depth = 0
    for bracket in re.findall(rb"[\[\]{}]", _JSON_TEXT.sub(b"", body)):
        depth += 1 if bracket in b"[{" else -1
        if depth > DEEPEST:
            return 422, f"the request is nested over {DEEPEST} deep"
    if re.search(rb"\\u[dD][89a-fA-F]|NaN|Infinity", body):
        try:
            json.dumps(json.loads(body, parse_constant=_no_number), ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return 422, "a text holds half of a surrogate pair (half of an emoji), which is no character; remove it"
        except _NoNumberError as error:
            return 422, f"{error} is no number of JSON"
        except ValueError:
            return None  # no JSON: the app says so
    return None


class _NoNumberError(Exception):
    pass


def _no_number(name: str) -> None:
    raise _NoNumberError(name)


class WebGuard:
    """ASGI middleware. `max_body`, `max_upload`: bytes of a request, and of one with files (0: as any other).

    `hosts`: names by which the app may be reached, any if None. An app without sign-in names its own, or else a page of
    another site whose name is pointed at this machine could talk to it.
    """

    def __init__(
        self, app: ASGIApp, *, max_body: int, max_upload: int = 0, hosts: Collection[str] | None = None
    ) -> None:
        self.app, self.max_body, self.max_upload, self.hosts = app, max_body, max_upload, hosts

    def refusal(self, method: str, headers: dict[str, str]) -> tuple[int, str] | None:
        """(status, reason) for a request that is not taken."""
        host, origin = headers.get("host", ""), headers.get("origin")
        if self.hosts is not None and host.rsplit(":", 1)[0] not in self.hosts:
            return 403, f"no such host {host!r}; use one of {', '.join(sorted(self.hosts))}"
        if method not in ("GET", "HEAD") and origin not in (None, f"http://{host}", f"https://{host}"):
            return 403, f"requests from {origin!r} are not taken"
        if "transfer-encoding" in headers:  # browsers send a length; without one nothing bounds the body
            return 411, "send the body with a Content-Length"
        length, multipart = headers.get("content-length", "0"), _holds_files(headers)
        limit = self.max_upload if multipart and self.max_upload else self.max_body
        if not length.isdigit() or int(length) > limit:
            return 413, f"the request has {length} bytes; {limit} at most"
        return None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or answers it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        more = HEADERS + NO_STORE if scope["path"].startswith("/api/") else HEADERS

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *more]
            await send(message)

        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        refused = self.refusal(scope["method"], headers)
        if refused is None and scope["method"] not in ("GET", "HEAD") and not _holds_files(headers):
            body, receive = await _read_whole(receive)
            refused = body_refusal(body)
        answer = JSONResponse({"detail": refused[1]}, refused[0]) if refused else self.app
        await answer(scope, receive, send_with_headers)


def _holds_files(headers: dict[str, str]) -> bool:
    return headers.get("content-type", "").startswith("multipart/")


async def _read_whole(receive: Receive) -> tuple[bytes, Receive]:
    """The body of a request, whose length is bounded by now, and a channel that gives it again."""
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            break
        body, more = body + message.get("body", b""), message.get("more_body", False)
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return body, again
