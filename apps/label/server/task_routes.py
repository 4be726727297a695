"""What an annotator does: claim a task, answer it, take it back; and the arena.

The two calls that every label makes go to one other thread, not three: the store checks the session in the transaction
that acts, and what they return is a response, which nothing has to validate.
"""

import json
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, Field

from plumbline.apps.label.server.context import Annotator, Context, Key, Signed, Store
from plumbline.apps.label.store.answers import Answer

router = APIRouter()


class Submit(BaseModel):
    """An answer and the id that makes sending it twice harmless."""

    request_id: str = Field(min_length=8, max_length=100)
    answer: Answer


class Prompt(BaseModel):
    """What the two policies of the arena answer."""

    prompt: str = Field(min_length=1, max_length=20_000)


@router.post("/api/claim", tags=["label"])
def claim(session: Signed, store: Store) -> JSONResponse:
    """{"task": the next task or null, "progress": counts}. A live lease of one's own is given again."""
    return JSONResponse(store.next_task(session.account_id, session))


@router.post("/api/assignments/{assignment}/submit", tags=["label"])
def submit(assignment: Key, body: Submit, session: Signed, store: Store) -> JSONResponse:
    """Stores an answer once; another answer to the same assignment is a revision."""
    return JSONResponse(store.submit(session.account_id, assignment, body.request_id, body.answer, session))


@router.post("/api/assignments/{assignment}/heartbeat", tags=["label"])
def heartbeat(assignment: Key, account: Annotator, store: Store) -> dict[str, float]:
    """Extends the lease while the page is open."""
    return {"lease_until": store.heartbeat(account.id, assignment)}


@router.put("/api/assignments/{assignment}/draft", tags=["label"])
def draft(assignment: Key, payload: dict[str, Any], account: Annotator, store: Store) -> dict[str, bool]:
    """Keeps an unfinished answer."""
    store.save_draft(account.id, assignment, payload)
    return {"ok": True}


@router.post("/api/undo", tags=["label"])
def undo(account: Annotator, store: Store) -> dict[str, Any]:
    """The task answered last, with what was said."""
    return {"task": store.undo(account.id), "progress": store.progress(account.id)}


@router.post("/api/assignments/{assignment}/withdraw", tags=["label"])
def withdraw(assignment: Key, account: Annotator, store: Store) -> dict[str, bool]:
    """Takes one's label back for good."""
    store.withdraw(account.id, assignment)
    return {"ok": True}


@router.get("/api/guidelines", tags=["label"])
def guidelines(account: Annotator, store: Store) -> dict[str, Any]:
    """The guidelines and their version."""
    version, text = store.guidelines()
    return {"version": version, "text": text}


@router.post("/api/arena", tags=["arena"])
def arena_start(body: Prompt, account: Annotator, context: Context, store: Store) -> StreamingResponse:
    """Lines of JSON: {"run"}, then {"slot", "text"} pieces of both answers, at last {"task"} or {"error"}."""
    events = context.arena.answer(store, account.id, body.prompt)
    lines = (json.dumps(event, ensure_ascii=False) + "\n" for event in events)
    return StreamingResponse(lines, media_type="application/x-ndjson", headers={"X-Accel-Buffering": "no"})


@router.post("/api/arena/{run}/stop", tags=["arena"])
def arena_stop(run: str, account: Annotator, context: Context) -> dict[str, bool]:
    """Ends one's own run early; what was written by then can be voted on."""
    context.arena.stop(account.id, run)
    return {"ok": True}


@router.get("/api/assignments/{assignment}/names", tags=["arena"])
def names(assignment: Key, account: Annotator, store: Store) -> dict[str, list[str]]:
    """The policies behind the two answers, after one's own vote."""
    return {"names": store.names(account.id, assignment)}
