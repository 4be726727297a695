"""The ASGI app: routes around one Answering, behind the gate of keys and limits."""

import time
from collections.abc import Callable, Collection
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import plumbline
from plumbline.apps.monitor.metrics import ServeMetrics
from plumbline.apps.serve.answering import Answering
from plumbline.apps.serve.chat_routes import chat_routes
from plumbline.apps.serve.completion_routes import completion_routes
from plumbline.apps.serve.embedding_routes import Embed, embedding_routes
from plumbline.apps.serve.errors import add_error_handlers
from plumbline.apps.serve.health_routes import health_routes
from plumbline.apps.serve.keys import ApiKey, Gate
from plumbline.apps.serve.model_routes import model_routes
from plumbline.apps.serve.moderation_routes import moderation_routes
from plumbline.apps.serve.settings import ServeSettings

REFUSALS = {
    400: "the request is not one that can be answered",
    401: "no such API key",
    403: "a page of another origin",
    404: "no such model",
    413: "the body is too long",
    429: "a limit is reached; Retry-After says when to come back",
    503: "the server is shutting down",
    504: "the deadline passed",
}
ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def make_serve_app(
    answering: Answering,
    settings: ServeSettings,
    *,
    keys: Collection[ApiKey] = (),
    embed: Embed | None = None,
    accepting: Callable[[], bool] = lambda: True,
) -> FastAPI:
    """The app; `accepting` turns False when the server drains."""
    app = FastAPI(title="plumbline serve", version=plumbline.__version__, docs_url=None, redoc_url=None)
    backend, metrics = answering.backend, answering.metrics
    metrics.watch(backend.stats)
    app.include_router(chat_routes(answering, settings.deadline_s))
    app.include_router(completion_routes(answering, settings.deadline_s))
    app.include_router(embedding_routes(embed))
    app.include_router(moderation_routes(answering))
    app.include_router(model_routes(backend, embeds=embed is not None, started=int(time.time())))
    app.include_router(health_routes(backend, metrics, accepting))
    add_error_handlers(app)
    app.add_middleware(_Timed, metrics=metrics)
    app.add_middleware(Gate, keys=keys, max_body=settings.max_body, cors=settings.cors, accepting=accepting)
    app.openapi = lambda: _schema(app)  # type: ignore[method-assign]
    return app


class _Timed:
    """Observes how long each route takes, to the end of its stream."""

    def __init__(self, app: ASGIApp, metrics: ServeMetrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.monotonic(), 500

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, noted)
        finally:
            route = getattr(
                scope.get("route"), "path", "none"
            )  # never the path of the request: anybody can make one up
            self.metrics.request(route, status, time.monotonic() - started)


def _schema(app: FastAPI) -> dict[str, Any]:
    """OpenAPI, with the errors that this server gives in the place of FastAPI's own."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
        schema["components"]["schemas"]["Error"] = ERROR_SCHEMA
        body = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
        for path in schema["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
                for status, meaning in REFUSALS.items():
                    operation["responses"][str(status)] = {"description": meaning, "content": body}
        app.openapi_schema = schema
    return app.openapi_schema
