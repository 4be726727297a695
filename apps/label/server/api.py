"""The labelling app without its pages: the routes, what guards them, and the errors they answer with.

Everything that changes a database goes through the routes, also from the pages (pages.py). Each asks for a signed session
and a role before it acts on its input, and the store checks that an assignment belongs to who sends it.
"""

from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, RedirectResponse

from plumbline.apps.label.arena import Arena
from plumbline.apps.label.server import admin_routes, review_routes, session_routes, task_routes
from plumbline.apps.label.server.context import MAX_BODY, MAX_UPLOAD, LabelContext
from plumbline.apps.label.store.accounts import Sessions
from plumbline.apps.label.store.answers import RefusedError
from plumbline.apps.label.store.store import LabelStore
from plumbline.apps.web.files import serve_files
from plumbline.apps.web.request_guard import WebGuard

STATIC = Path(__file__).parents[1] / "static"


def make_api(store: LabelStore, arena: Arena | None = None, *, secure_cookie: bool = False) -> FastAPI:
    """The FastAPI app without the pages; its context is at `app.state.label`."""

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        yield
        store.database.close()

    app = FastAPI(title="Plumbline labels", version="1", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.label = LabelContext(
        store=store,
        arena=arena or Arena([]),
        sessions=Sessions(store.setting("session_key") or ""),
        secure_cookie=secure_cookie,
    )
    app.add_middleware(WebGuard, max_body=MAX_BODY, max_upload=MAX_UPLOAD)
    for routes in (session_routes, task_routes, review_routes, admin_routes):
        app.include_router(routes.router)

    @app.exception_handler(RefusedError)
    def refused(request: Request, error: RefusedError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, error.status)

    @app.exception_handler(ValueError)
    def bad_value(request: Request, error: ValueError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 422)

    @app.get("/", include_in_schema=False)
    def front() -> RedirectResponse:
        return RedirectResponse("/app/")

    @app.get("/sign-in", include_in_schema=False)
    def sign_in_page() -> FileResponse:
        return FileResponse(STATIC / "sign_in.html")

    serve_files(app, STATIC)
    return app
