"""Who may do what: accounts with argon2 passwords, signed session cookies, and a brake on password guessing."""

import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from plumbline.apps.label.store.answers import RefusedError
from plumbline.apps.label.store.database import Execute, Row

SIGN_IN_FIRST = "sign in first: POST /api/sign-in with name and password"
ROLES = ("annotator", "reviewer", "admin")  # each may do what those before it may
SESSION_DAYS = 14
MIN_PASSWORD = 8
MOST_KEYS = 10_000  # that a brake remembers before it forgets those whose time is over
KNOWN_DAYS = 365


@dataclass(frozen=True, kw_only=True)
class Account:
    """One person. `paused`: gold answers went wrong too often; a reviewer decides. `pseudonym` stands in exports."""

    id: int
    name: str
    pseudonym: str
    role: str
    active: bool
    paused: bool
    token_version: int

    def may(self, role: str) -> bool:
        """Whether the account has this role or a higher one."""
        return ROLES.index(self.role) >= ROLES.index(role)


@dataclass(frozen=True, kw_only=True)
class Session:
    """What a cookie with a good signature says."""

    account_id: int
    token_version: int

    def holds(self, rows: list[Row]) -> bool:
        """Whether the account (its rows) is still open, and its sessions were not ended since."""
        return bool(rows and rows[0]["active"] and rows[0]["token_version"] == self.token_version)


def check_session(session: Session | None, rows: list[Row]) -> None:
    """RefusedError(401) where a session no longer holds; None is for callers without one, which the API is not."""
    if session is not None and not session.holds(rows):
        raise RefusedError(401, SIGN_IN_FIRST)


def account_of(row: Row) -> Account:
    """The account of a row of the table."""
    names = ("id", "name", "pseudonym", "role", "token_version")
    return Account(active=bool(row["active"]), paused=bool(row["paused"]), **{name: row[name] for name in names})


def insert_account(run: Execute, name: str, password_hash: str, role: str, now: float) -> Account:
    """A new row; ValueError for a name that is taken or not fit to be one."""
    if not name or name != name.strip() or len(name) > 64 or not name.isprintable():
        raise ValueError(f"name {name!r:.80}: 1 to 64 printable characters without blanks at the ends")
    if role not in ROLES:
        raise ValueError(f"role {role!r}: must be one of {', '.join(ROLES)}")
    if run("SELECT 1 FROM account WHERE name = ?", (name,)):
        raise ValueError(f"name {name!r} is taken; choose another, or set its password with `plumbline label user`")
    pseudonym = f"annotator-{secrets.token_hex(4)}"
    rows = run(
        "INSERT INTO account (name, pw_hash, pseudonym, role, created_at) VALUES (?, ?, ?, ?, ?) RETURNING *",
        (name, password_hash, pseudonym, role, now),
    )
    return account_of(rows[0])


def check_password_rule(password: str) -> str:
    """The password; ValueError when it is too short or too long."""
    if not MIN_PASSWORD <= len(password) <= 256:
        raise ValueError(f"the password has {len(password)} characters; {MIN_PASSWORD} to 256 are asked for")
    return password


def password_hasher() -> Any:
    """argon2id at the library's defaults; the extra is named where it is missing."""
    try:
        from argon2 import PasswordHasher
    except ImportError:
        raise ValueError("argon2-cffi is missing; pip install 'plumbline-rlhf[ui]'") from None
    return PasswordHasher()


class Sessions:
    """Signed cookies that survive restarts: the key lies in the database, nothing in memory.

    A cookie holds the account's id and token version, so that signing out, a new password, a new role or a closed account
    ends all sessions of that account at once.
    """

    def __init__(self, key: str, *, max_age: float = SESSION_DAYS * 86400) -> None:
        from itsdangerous import URLSafeTimedSerializer

        self.max_age = max_age
        self._signer = URLSafeTimedSerializer(key, salt="plumbline-session")
        self._known = URLSafeTimedSerializer(key, salt="plumbline-known-browser")

    def cookie(self, account: Account) -> str:
        """The value of the cookie of a signed-in account."""
        return self._signer.dumps([account.id, account.token_version])

    def read(self, cookie: str | None) -> Session | None:
        """What a cookie says; None when it is missing, forged or expired."""
        from itsdangerous import BadData

        try:
            account_id, version = self._signer.loads(cookie or "", max_age=int(self.max_age))
        except (BadData, ValueError, TypeError):
            return None
        return Session(account_id=account_id, token_version=version)

    def known_browser(self, account: Account) -> str:
        """The value of a cookie that stays after signing out: this browser has known the account's password once."""
        return self._known.dumps([account.name, secrets.token_hex(8)])

    def knows(self, cookie: str | None, name: str) -> str | None:
        """The mark of a browser in which this name has signed in before, None for any other."""
        from itsdangerous import BadData

        try:
            known, mark = self._known.loads(cookie or "", max_age=KNOWN_DAYS * 86400)
        except (BadData, ValueError, TypeError):
            return None
        return str(mark) if known == name else None


class SignInBrake:
    """At most `limit` wrong passwords a key within `window` seconds; then 429 for the rest of it.

    A try is counted before the password is looked at and given back when it was right, so that tries sent at once do not all
    pass while the first is still being hashed.
    """

    def __init__(self, limit: int = 5, window: float = 60.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit, self.window, self.clock = limit, window, clock
        self._tries: dict[object, deque[float]] = {}
        self._lock = threading.Lock()

    def take(self, key: object) -> float:
        """Counts a try and returns its mark; RefusedError(429) where the key has used up its tries."""
        with self._lock:
            now = self.clock()
            if len(self._tries) > MOST_KEYS:  # names made up at random must not fill the memory
                self._tries = {key: tries for key, tries in self._tries.items() if tries[-1] > now - self.window}
            tries = self._tries.setdefault(key, deque())
            while tries and tries[0] <= now - self.window:
                tries.popleft()
            if len(tries) >= self.limit:
                raise RefusedError(429, f"too many wrong passwords; try again in {self.window:.0f} seconds")
            tries.append(now)
            return now

    def give_back(self, key: object, mark: float) -> None:
        """Takes a try off the count: its password was right."""
        with self._lock:
            tries = self._tries.get(key)
            if tries and mark in tries:
                tries.remove(mark)
            if not tries:
                self._tries.pop(key, None)
