"""What the handlers of the labelling app share: the store, the sessions, and who may call what."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, HTTPException, Request
from pydantic import Field, StringConstraints

from plumbline.apps.label.arena import Arena
from plumbline.apps.label.store.accounts import SIGN_IN_FIRST, Account, Session, Sessions, SignInBrake
from plumbline.apps.label.store.store import LabelStore

COOKIE = "plumbline_session"
KNOWN = "plumbline_known_browser"
MAX_UPLOAD = 64 * 2**20  # bytes
MAX_BODY = 2**20  # bytes of a JSON request

Key = Annotated[int, Field(ge=1, le=2**31 - 1)]  # an id in a path
Name = Annotated[str, StringConstraints(min_length=1, max_length=64)]
Password = Annotated[str, StringConstraints(min_length=1, max_length=256)]


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


# Dependencies are async where they do not wait: FastAPI sends plain functions to another thread, at every request.


async def context_of(request: Request) -> LabelContext:
    """The context of the app that a request reached."""
    return request.app.state.label


async def store_of(request: Request) -> LabelStore:
    """The store of the app that a request reached."""
    return request.app.state.label.store


async def signed(request: Request) -> Session:
    """The session of a request's cookie; 401 without one. That its account is still open is for the store to check."""
    session = request.app.state.label.session_of(request)
    if session is None:
        raise HTTPException(401, SIGN_IN_FIRST)
    return session


def signed_in(session: Annotated[Session, Depends(signed)], request: Request) -> Account:
    """The account of a request; 401 where it is closed."""
    account = request.app.state.label.store.account_of(session)
    if account is None:
        raise HTTPException(401, SIGN_IN_FIRST)
    return account


def at_least(role: str) -> Callable[[Account], Account]:
    """A dependency: the account of a request, 403 where its role is below `role`."""

    def check(account: Annotated[Account, Depends(signed_in)]) -> Account:
        if not account.may(role):
            raise HTTPException(403, f"this needs the role {role!r}; your account has {account.role!r}")
        return account

    return check


Context = Annotated[LabelContext, Depends(context_of)]
Store = Annotated[LabelStore, Depends(store_of)]
Signed = Annotated[Session, Depends(signed)]
Annotator = Annotated[Account, Depends(signed_in)]
Reviewer = Annotated[Account, Depends(at_least("reviewer"))]
Admin = Annotated[Account, Depends(at_least("admin"))]
