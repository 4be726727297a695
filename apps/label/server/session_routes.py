"""Signing in and out, and who one is."""

from typing import Any

from fastapi import APIRouter, HTTPException, Request, Response
from pydantic import BaseModel

from plumbline.apps.label.server.context import COOKIE, KNOWN, Annotator, Context, Name, Password, Store
from plumbline.apps.label.store.accounts import KNOWN_DAYS, SESSION_DAYS
from plumbline.apps.label.store.answers import CRITERIA, FLAG_REASONS, SKIP_REASONS, SPAN_LABELS, STRENGTHS

router = APIRouter()


class SignIn(BaseModel):
    """A name and its password."""

    name: Name
    password: Password


@router.post("/api/sign-in", tags=["session"])
def sign_in(body: SignIn, request: Request, response: Response, context: Context, store: Store) -> dict[str, Any]:
    """Sets the session cookie. Wrong passwords are braked (429) by name and address together, and by address.

    So nobody can lock somebody else out from another address; and where both share one, a browser in which the name has signed
    in before has tries of its own, by a signed cookie that stays.
    """
    address = request.client.host if request.client else ""
    browser = context.sessions.knows(request.cookies.get(KNOWN), body.name)
    place = (body.name, "browser", browser) if browser else (body.name, "address", address)
    taken = [(context.name_brake, place, context.name_brake.take(place))]
    if not browser:
        taken.append((context.address_brake, address, context.address_brake.take(address)))
    account = store.check_password(body.name, body.password)
    if account is None:
        raise HTTPException(401, "name and password do not fit")
    for brake, key, mark in taken:
        brake.give_back(key, mark)
    for cookie, value, days in (
        (COOKIE, context.sessions.cookie(account), SESSION_DAYS),
        (KNOWN, context.sessions.known_browser(account), KNOWN_DAYS),
    ):
        secure = context.secure_cookie
        response.set_cookie(cookie, value, max_age=days * 86400, httponly=True, samesite="lax", secure=secure)
    return {"name": account.name, "role": account.role}


@router.post("/api/sign-out", tags=["session"])
def sign_out(request: Request, response: Response, context: Context, store: Store) -> dict[str, bool]:
    """Ends the account's sessions, on the server and in every browser, and deletes the cookie of this one."""
    session = context.session_of(request)
    if session is not None:
        store.end_sessions(session)
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
