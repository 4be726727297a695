"""What an admin does: accounts, settings, items in, labels out."""

import json
from typing import Any

from fastapi import APIRouter, HTTPException, UploadFile
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel

from plumbline.apps.label.exchange import FORMATS, export_rows, read_items, starter_items
from plumbline.apps.label.server import context
from plumbline.apps.label.server.context import Admin, Key, Name, Password, Store

router = APIRouter()


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


@router.get("/api/accounts", tags=["admin"])
def accounts(account: Admin, store: Store) -> list[dict[str, Any]]:
    """All accounts."""
    names = ("id", "name", "pseudonym", "role", "active", "paused")
    return [{name: getattr(one, name) for name in names} for one in store.accounts()]


@router.post("/api/accounts", tags=["admin"], status_code=201)
def add_account(body: NewAccount, account: Admin, store: Store) -> dict[str, Any]:
    """A new account."""
    return {"id": store.add_account(body.name, body.password, body.role, by=account.id).id}


@router.patch("/api/accounts/{other}", tags=["admin"])
def change_account(other: Key, body: AccountChange, account: Admin, store: Store) -> dict[str, bool]:
    """Changes a role, closes or pauses an account, sets a password."""
    store.change_account(other, by=account.id, **body.model_dump())
    return {"ok": True}


@router.get("/api/settings", tags=["admin"])
def settings(account: Admin, store: Store) -> dict[str, Any]:
    """The settings in force."""
    return vars(store.settings())


@router.patch("/api/settings", tags=["admin"])
def change_settings(changes: dict[str, Any], account: Admin, store: Store) -> dict[str, Any]:
    """Changes settings by name."""
    return vars(store.change_settings(account.id, changes))


@router.post("/api/import", tags=["admin"])
async def import_file(file: UploadFile, account: Admin, store: Store) -> dict[str, int]:
    """Items from JSON Lines (see docs/labelling.md), all or none."""
    if not (file.filename or "").endswith((".jsonl", ".json")):
        raise HTTPException(415, f"{file.filename!r}: JSON Lines are taken, in a file that ends with .jsonl")
    content = await file.read(context.MAX_UPLOAD + 1)
    if len(content) > context.MAX_UPLOAD:
        raise HTTPException(
            413, f"the file has over {context.MAX_UPLOAD} bytes; import it with `plumbline label import`"
        )
    added, doubles = await run_in_threadpool(
        lambda: store.add_items(read_items(content, file.filename or "upload"), by=account.id)
    )
    return {"added": added, "doubles": doubles}


@router.post("/api/import/starter", tags=["admin"])
def import_starter(account: Admin, store: Store) -> dict[str, int]:
    """The preference pairs that ship with Plumbline, as items."""
    added, doubles = store.add_items(starter_items(), by=account.id)
    return {"added": added, "doubles": doubles}


@router.get("/api/export/{format}", tags=["admin"])
def export(format: str, account: Admin, store: Store) -> PlainTextResponse:
    """Labels as JSON Lines in one of the formats of docs/labelling.md."""
    if format not in FORMATS:
        raise HTTPException(404, f"no format {format!r}; there are {', '.join(FORMATS)}")
    rows = export_rows(store, format, by=account.id)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    headers = {"Content-Disposition": f'attachment; filename="labels-{format}.jsonl"'}
    return PlainTextResponse(text, media_type="application/x-ndjson", headers=headers)
