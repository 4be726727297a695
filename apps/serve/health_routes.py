"""GET /healthz, /readyz and /metrics."""

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from plumbline.apps.monitor.metrics import ServeMetrics
from plumbline.apps.serve.engine.backend import Backend
from plumbline.apps.serve.errors import error_body


def health_routes(backend: Backend, metrics: ServeMetrics, accepting: Callable[[], bool]) -> APIRouter:
    """The routes. Alive is not ready: while the server drains it is alive and takes nothing."""
    router = APIRouter()

    @router.get("/healthz", summary="Whether the process is alive", response_class=JSONResponse)
    def healthz() -> dict[str, Any]:
        return {"status": "ok"}

    @router.get("/readyz", summary="Whether requests are taken", response_class=JSONResponse)
    async def readyz() -> Response:
        problem = await backend.ready() if accepting() else "the server is shutting down"
        if problem:
            return JSONResponse(error_body(problem, "server_error", "not_ready"), 503)
        return JSONResponse({"status": "ready"})

    @router.get("/metrics", summary="Metrics for Prometheus", response_class=Response)
    def exposition() -> Response:
        return Response(metrics.text(), media_type=metrics.content_type)

    return router
