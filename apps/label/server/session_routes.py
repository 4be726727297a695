"""Signing in and out, and who one is."""

from typing import Any

from fastapi import APIRouter, HTTPException, Request, Response
from pydantic import BaseModel

from plumbline.apps.label.server.context import COOKIE, Annotator, Context, Name, Password, Store
from plumbline.apps.label.store.accounts import SESSION_DAYS
from plumbline.apps.label.store.answers import CRITERIA, FLAG_REASONS, SKIP_REASONS, SPAN_LABELS, STRENGTHS

router = APIRouter()


class SignIn(BaseModel):
    """A name and its password."""

    name: Name
    password: Password


@router.post("/api/sign-in", tags=["session"])
def sign_in(body: SignIn, request: Request, response: Response, context: Context, store: Store) -> dict[str, Any]:
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


@router.post("/api/sign-out", tags=["session"])
def sign_out(response: Response) -> dict[str, bool]:
    """Deletes the cookie of this browser."""
    response.delete_cookie(COOKIE)
    return {"ok": True}


@router.get("/api/me", tags=["session"])
def me(account: Annotator, context: Context) -> dict[str, Any]:
    """Who is signed in, and the words that the pages offer."""
    choices: dict[str, Any] = {"criteria": CRITERIA, "strengths": STRENGTHS, "span_labels": SPAN_LABELS}
    choices |= {"skip": SKIP_REASONS, "flag": FLAG_REASONS, "policies": len(context.arena.policies)}
    return {"name": account.name, "role": account.role, "choices": choices}


@router.get("/healthz", tags=["session"])
def health(store: Store) -> dict[str, bool]:
    """Whether the database answers."""
    store.settings()
    return {"ok": True}
