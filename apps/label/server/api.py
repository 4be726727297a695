"""The REST API of the labelling app, and the app itself: sign-in, tasks, review, admin.

Everything that changes a database goes through these handlers, also from the pages (label_app.py). Each asks for a signed
session and a role before it acts on its input, and the store checks that an assignment belongs to who sends it.
"""

import json
from collections.abc import Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException, Request, Response, UploadFile
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, RedirectResponse, StreamingResponse
from pydantic import BaseModel, Field, StringConstraints

from plumbline.apps.label.arena import Arena
from plumbline.apps.label.exchange import FORMATS, export_rows, read_items, starter_items
from plumbline.apps.label.store.accounts import SESSION_DAYS, SIGN_IN_FIRST, Account, Session, Sessions, SignInBrake
from plumbline.apps.label.store.answers import (
    CRITERIA,
    FLAG_REASONS,
    SKIP_REASONS,
    SPAN_LABELS,
    STRENGTHS,
    Answer,
    RefusedError,
)
from plumbline.apps.label.store.store import LabelStore
from plumbline.apps.web.files import serve_files
from plumbline.apps.web.request_guard import WebGuard

COOKIE = "plumbline_session"
STATIC = Path(__file__).parents[1] / "static"
MAX_UPLOAD = 64 * 2**20  # bytes
MAX_BODY = 2**20  # bytes of a JSON request

Key = Annotated[int, Field(ge=1, le=2**31 - 1)]  # an id in a path
Name = Annotated[str, StringConstraints(min_length=1, max_length=64)]
Password = Annotated[str, StringConstraints(min_length=1, max_length=256)]


class SignIn(BaseModel):
    """A name and its password."""

    name: Name
    password: Password


class Submit(BaseModel):
    """An answer and the id that makes sending it twice harmless."""

    request_id: str = Field(min_length=8, max_length=100)
    answer: Answer


class NewAccount(BaseModel):
    """An account to make."""

    name: Name
    password: Password
    role: str = "annotator"


class AccountChange(BaseModel):
    """What to change; the rest stays."""

    role: str | None = None
    active: bool | None = None
    paused: bool | None = None
    password: Password | None = None


class Status(BaseModel):
    """Where an item goes."""

    status: str


class Text(BaseModel):
    """Guidelines in Markdown."""

    text: str = Field(max_length=200_000)


class Prompt(BaseModel):
    """What the two policies of the arena answer."""

    prompt: str = Field(min_length=1, max_length=20_000)


@dataclass(kw_only=True)
class LabelContext:
    """What the handlers share."""

    store: LabelStore
    arena: Arena
    sessions: Sessions
    secure_cookie: bool = False  # True where the app is reached over https
    name_brake: SignInBrake = field(default_factory=SignInBrake)
    address_brake: SignInBrake = field(default_factory=lambda: SignInBrake(limit=30))

    def account_of(self, request: Request) -> Account | None:
        """Who is signed in."""
        session = self.session_of(request)
        return None if session is None else self.store.account_of(session)

    def session_of(self, request: Request) -> Session | None:
        """What the request's cookie says, where its signature is good; the account may be closed by now."""
        return self.sessions.read(request.cookies.get(COOKIE))


def make_api(store: LabelStore, arena: Arena | None = None, *, secure_cookie: bool = False) -> FastAPI:
    """The FastAPI app without the pages; its context is at `app.state.label`."""
    from plumbline.apps.label.study.label_statistics import label_statistics

    context = LabelContext(
        store=store,
        arena=arena or Arena([]),
        sessions=Sessions(store.setting("session_key") or ""),
        secure_cookie=secure_cookie,
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        yield
        store.database.close()

    app = FastAPI(title="Plumbline labels", version="1", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.label = context

    async def signed(request: Request) -> Session:
        session = context.session_of(request)
        if session is None:
            raise HTTPException(401, SIGN_IN_FIRST)
        return session

    def signed_in(session: Annotated[Session, Depends(signed)]) -> Account:
        account = store.account_of(session)
        if account is None:
            raise HTTPException(401, SIGN_IN_FIRST)
        return account

    def at_least(role: str) -> Callable[[Account], Account]:
        def check(account: Annotated[Account, Depends(signed_in)]) -> Account:
            if not account.may(role):
                raise HTTPException(403, f"this needs the role {role!r}; your account has {account.role!r}")
            return account

        return check

    Annotator = Annotated[Account, Depends(signed_in)]
    Reviewer = Annotated[Account, Depends(at_least("reviewer"))]
    Admin = Annotated[Account, Depends(at_least("admin"))]

    @app.exception_handler(RefusedError)
    def refused(request: Request, error: RefusedError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, error.status)

    @app.exception_handler(ValueError)
    def bad_value(request: Request, error: ValueError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 422)

    app.add_middleware(WebGuard, max_body=MAX_BODY, max_upload=MAX_UPLOAD)

    # Sessions

    @app.post("/api/sign-in", tags=["session"])
    def sign_in(body: SignIn, request: Request, response: Response) -> dict[str, Any]:
        """Sets the session cookie. Wrong passwords are braked by name and by address (429)."""
        address = request.client.host if request.client else ""
        context.name_brake.check(body.name)
        context.address_brake.check(address)
        account = store.check_password(body.name, body.password)
        if account is None:
            context.name_brake.failed(body.name)
            context.address_brake.failed(address)
            raise HTTPException(401, "name and password do not fit")
        response.set_cookie(
            COOKIE,
            context.sessions.cookie(account),
            max_age=SESSION_DAYS * 86400,
            httponly=True,
            samesite="lax",
            secure=context.secure_cookie,
        )
        return {"name": account.name, "role": account.role}

    @app.post("/api/sign-out", tags=["session"])
    def sign_out(response: Response) -> dict[str, bool]:
        """Deletes the cookie of this browser."""
        response.delete_cookie(COOKIE)
        return {"ok": True}

    @app.get("/api/me", tags=["session"])
    def me(account: Annotator) -> dict[str, Any]:
        """Who is signed in, and the words that the pages offer."""
        choices: dict[str, Any] = {"criteria": CRITERIA, "strengths": STRENGTHS, "span_labels": SPAN_LABELS}
        choices |= {"skip": SKIP_REASONS, "flag": FLAG_REASONS, "policies": len(context.arena.policies)}
        return {"name": account.name, "role": account.role, "choices": choices}

    @app.get("/healthz", tags=["session"])
    def health() -> dict[str, bool]:
        """Whether the database answers."""
        store.settings()
        return {"ok": True}

    # Labelling. The two calls that every label makes go to one other thread, not three: the store checks the session in
    # the transaction that acts, and what they return is a response, which nothing has to validate.

    @app.post("/api/claim", tags=["label"])
    def claim(session: Annotated[Session, Depends(signed)]) -> JSONResponse:
        """{"task": the next task or null, "progress": counts}. A live lease of one's own is given again."""
        return JSONResponse(store.next_task(session.account_id, session))

    @app.post("/api/assignments/{assignment}/submit", tags=["label"])
    def submit(assignment: Key, body: Submit, session: Annotated[Session, Depends(signed)]) -> JSONResponse:
        """Stores an answer once; another answer to the same assignment is a revision."""
        return JSONResponse(store.submit(session.account_id, assignment, body.request_id, body.answer, session))

    @app.post("/api/assignments/{assignment}/heartbeat", tags=["label"])
    def heartbeat(assignment: Key, account: Annotator) -> dict[str, float]:
        """Extends the lease while the page is open."""
        return {"lease_until": store.heartbeat(account.id, assignment)}

    @app.put("/api/assignments/{assignment}/draft", tags=["label"])
    def draft(assignment: Key, payload: dict[str, Any], account: Annotator) -> dict[str, bool]:
        """Keeps an unfinished answer."""
        store.save_draft(account.id, assignment, payload)
        return {"ok": True}

    @app.post("/api/undo", tags=["label"])
    def undo(account: Annotator) -> dict[str, Any]:
        """The task answered last, with what was said."""
        return {"task": store.undo(account.id), "progress": store.progress(account.id)}

    @app.post("/api/assignments/{assignment}/withdraw", tags=["label"])
    def withdraw(assignment: Key, account: Annotator) -> dict[str, bool]:
        """Takes one's label back for good."""
        store.withdraw(account.id, assignment)
        return {"ok": True}

    @app.get("/api/guidelines", tags=["label"])
    def guidelines(account: Annotator) -> dict[str, Any]:
        """The guidelines and their version."""
        version, text = store.guidelines()
        return {"version": version, "text": text}

    # Arena

    @app.post("/api/arena", tags=["arena"])
    def arena_start(body: Prompt, account: Annotator) -> StreamingResponse:
        """Lines of JSON: {"run"}, then {"slot", "text"} pieces of both answers, at last {"task"} or {"error"}."""
        events = context.arena.answer(store, account.id, body.prompt)
        lines = (json.dumps(event, ensure_ascii=False) + "\n" for event in events)
        return StreamingResponse(lines, media_type="application/x-ndjson", headers={"X-Accel-Buffering": "no"})

    @app.post("/api/arena/{run}/stop", tags=["arena"])
    def arena_stop(run: str, account: Annotator) -> dict[str, bool]:
        """Ends one's own run early; what was written by then can be voted on."""
        context.arena.stop(account.id, run)
        return {"ok": True}

    @app.get("/api/assignments/{assignment}/names", tags=["arena"])
    def names(assignment: Key, account: Annotator) -> dict[str, list[str]]:
        """The policies behind the two answers, after one's own vote."""
        return {"names": store.names(account.id, assignment)}

    # Review and statistics

    @app.get("/api/review", tags=["review"])
    def review_queue(account: Reviewer) -> list[dict[str, Any]]:
        """Items that were flagged, or whose annotators disagree."""
        return store.review_queue()

    @app.post("/api/review/{item}", tags=["review"])
    def open_review(item: Key, account: Reviewer) -> dict[str, Any]:
        """A task on this item whose answer settles it; sent as any other."""
        return {"task": store.open_review(account.id, item)}

    @app.put("/api/items/{item}/status", tags=["review"])
    def item_status(item: Key, body: Status, account: Reviewer) -> dict[str, bool]:
        """Puts an item back into the queue, or retires it."""
        store.set_item_status(item, body.status, by=account.id)
        return {"ok": True}

    @app.put("/api/guidelines", tags=["review"])
    def change_guidelines(body: Text, account: Reviewer) -> dict[str, int]:
        """New guidelines; labels from now on carry their version."""
        if "\x00" in body.text:
            raise HTTPException(422, "the text holds a zero byte")
        return {"version": store.change_guidelines(account.id, body.text)}

    @app.get("/api/statistics", tags=["review"])
    def statistics(account: Reviewer) -> dict[str, Any]:
        """Agreement, bias, annotators and models, each with its interval."""
        return label_statistics(store)

    @app.get("/api/statistics.png", tags=["review"])
    def statistics_plots(account: Reviewer) -> Response:
        """The main estimates with their intervals as one picture."""
        from plumbline.apps.label.study.plots import statistics_png

        return Response(statistics_png(label_statistics(store)), media_type="image/png")

    @app.get("/api/events", tags=["review"])
    def events(account: Reviewer, after: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0) -> list[dict[str, Any]]:
        """The audit trail after a sequence number, 1,000 rows at most."""
        return store.events(after)

    # Admin

    @app.get("/api/accounts", tags=["admin"])
    def accounts(account: Admin) -> list[dict[str, Any]]:
        """All accounts."""
        names = ("id", "name", "pseudonym", "role", "active", "paused")
        return [{name: getattr(one, name) for name in names} for one in store.accounts()]

    @app.post("/api/accounts", tags=["admin"], status_code=201)
    def add_account(body: NewAccount, account: Admin) -> dict[str, Any]:
        """A new account."""
        return {"id": store.add_account(body.name, body.password, body.role, by=account.id).id}

    @app.patch("/api/accounts/{other}", tags=["admin"])
    def change_account(other: Key, body: AccountChange, account: Admin) -> dict[str, bool]:
        """Changes a role, closes or pauses an account, sets a password."""
        store.change_account(other, by=account.id, **body.model_dump())
        return {"ok": True}

    @app.get("/api/settings", tags=["admin"])
    def settings(account: Admin) -> dict[str, Any]:
        """The settings in force."""
        return vars(store.settings())

    @app.patch("/api/settings", tags=["admin"])
    def change_settings(changes: dict[str, Any], account: Admin) -> dict[str, Any]:
        """Changes settings by name."""
        return vars(store.change_settings(account.id, changes))

    @app.post("/api/import", tags=["admin"])
    async def import_file(file: UploadFile, account: Admin) -> dict[str, int]:
        """Items from JSON Lines (see docs/labelling.md), all or none."""
        if not (file.filename or "").endswith((".jsonl", ".json")):
            raise HTTPException(415, f"{file.filename!r}: JSON Lines are taken, in a file that ends with .jsonl")
        content = await file.read(MAX_UPLOAD + 1)
        if len(content) > MAX_UPLOAD:
            raise HTTPException(413, f"the file has over {MAX_UPLOAD} bytes; import it with `plumbline label import`")
        from fastapi.concurrency import run_in_threadpool

        added, doubles = await run_in_threadpool(
            lambda: store.add_items(read_items(content, file.filename or "upload"), by=account.id)
        )
        return {"added": added, "doubles": doubles}

    @app.post("/api/import/starter", tags=["admin"])
    def import_starter(account: Admin) -> dict[str, int]:
        """The preference pairs that ship with Plumbline, as items."""
        added, doubles = store.add_items(starter_items(), by=account.id)
        return {"added": added, "doubles": doubles}

    @app.get("/api/export/{format}", tags=["admin"])
    def export(format: str, account: Admin) -> PlainTextResponse:
        """Labels as JSON Lines in one of the formats of docs/labelling.md."""
        if format not in FORMATS:
            raise HTTPException(404, f"no format {format!r}; there are {', '.join(FORMATS)}")
        rows = export_rows(store, format, by=account.id)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        headers = {"Content-Disposition": f'attachment; filename="labels-{format}.jsonl"'}
        return PlainTextResponse(text, media_type="application/x-ndjson", headers=headers)

    # Pages that need no gradio

    @app.get("/", include_in_schema=False)
    def front() -> RedirectResponse:
        return RedirectResponse("/app/")

    @app.get("/sign-in", include_in_schema=False)
    def sign_in_page() -> FileResponse:
        return FileResponse(STATIC / "sign_in.html")

    serve_files(app, STATIC)
    return app
