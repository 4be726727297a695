"""The web app of `plumbline chat`: one page, one stream of events an answer, thumbs into the label store.

For one person at their own machine: it listens on the loopback only, takes no other host name, and has no sign-in.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from pydantic import BaseModel, Field

from plumbline.apps.chat.conversation import GuardedChat
from plumbline.apps.label.store.answers import RefusedError
from plumbline.apps.label.store.database import open_database
from plumbline.apps.label.store.items import NewItem, NewResponse
from plumbline.apps.label.store.store import LabelStore
from plumbline.apps.web.files import serve_files
from plumbline.apps.web.request_guard import WebGuard

STATIC = Path(__file__).parent / "static"
MAX_TURNS = 200
LOOPBACK = frozenset({"127.0.0.1", "localhost", "[::1]"})


class ChatMessage(BaseModel):
    """One turn."""

    role: Literal["user", "assistant"]
    content: str = Field(max_length=50_000)


class Ask(BaseModel):
    """The conversation so far; the last turn is the user's."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_TURNS)


class Thumb(BaseModel):
    """What the user thinks of an answer; `request_id` makes sending it twice harmless."""

    answer: str = Field(max_length=64)
    good: bool
    request_id: str = Field(min_length=8, max_length=100)


@dataclass(kw_only=True)
class Thumbs:
    """The label store, and the account in whose name thumbs are given."""

    store: LabelStore
    account: int

    @classmethod
    def open(cls, database: str, name: str) -> "Thumbs":
        """ValueError where there is no database or no such account."""
        if not database:
            raise ValueError("--as needs --labels (or $PLUMBLINE_LABELS): the label database that thumbs go to")
        if "://" not in database and not Path(database).is_file():
            raise ValueError(f"{database}: no such label database; `plumbline label` makes one")
        store = LabelStore(open_database(database))
        account = next((one for one in store.accounts() if one.name == name and one.active), None)
        if account is None:
            raise ValueError(f"{database}: no account {name!r} in use; `plumbline label user add {name}` makes it")
        return cls(store=store, account=account.id)

    def give(self, chat: GuardedChat, thumb: Thumb) -> dict[str, Any]:
        """Stores a thumb as a label on a single answer."""
        said = chat.said(thumb.answer)
        response = NewResponse(text=said.answer, model=chat.name, params={"policy": chat.about["policy"]})
        item = NewItem(prompt=said.messages, responses=[response], source="chat", target_labels=1)
        return self.store.add_thumb(self.account, item, good=thumb.good, request_id=thumb.request_id)


def make_chat_app(chat: GuardedChat, thumbs: Thumbs | None = None) -> FastAPI:
    """The app; without `thumbs` the page offers none."""
    app = FastAPI(title="Plumbline chat", version="1", docs_url=None, redoc_url=None)
    app.add_middleware(WebGuard, max_body=4 * 2**20, hosts=LOOPBACK)

    @app.exception_handler(ValueError)
    def bad_value(request: Request, error: ValueError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 422)

    @app.exception_handler(RefusedError)
    def refused(request: Request, error: RefusedError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, error.status)

    @app.get("/api/about")
    def about() -> dict[str, Any]:
        """The model, the policy, what is steered and verified, and whether thumbs are kept."""
        return chat.about | {"thumbs": thumbs is not None}

    @app.post("/api/chat")
    def ask(body: Ask) -> StreamingResponse:
        """Lines of JSON, as `GuardedChat.turn` gives them."""
        if body.messages[-1].role != "user" or not body.messages[-1].content.strip():
            raise HTTPException(422, "the last message must be the user's, and hold a text")
        events = chat.turn([message.model_dump() for message in body.messages])
        return StreamingResponse(_lines(events), media_type="application/x-ndjson")

    @app.post("/api/thumb")
    def thumb(body: Thumb) -> dict[str, Any]:
        """Good or bad, stored as a label; another thumb on the same answer is a revision."""
        if thumbs is None:
            raise HTTPException(409, "no label database: start with --labels DB --as NAME")
        return thumbs.give(chat, body)

    @app.get("/", include_in_schema=False)
    def page() -> FileResponse:
        return FileResponse(STATIC / "chat.html")

    serve_files(app, STATIC)
    return app


def _lines(events: Iterator[dict[str, Any]]) -> Iterator[str]:
    for event in events:
        yield json.dumps(event) + "\n"  # in ASCII: half a surrogate pair has no UTF-8
