"""Where labels live: one SQLite file (WAL) by default, PostgreSQL by URL, behind one small protocol.

Both run the same statements, written with `?` places. Writers take turns: SQLite through BEGIN IMMEDIATE, PostgreSQL
through one advisory lock a transaction, so that whatever a transaction read still holds when it writes. Without that,
select-then-insert hands one item to more annotators than wanted. A write takes about a millisecond, so one at a time is
enough for hundreds of annotators.

A commit is on disk before the annotator sees "saved" (synchronous=FULL): a power cut loses no vote. Keep an SQLite file
on a local disk; network mounts break its locks.
"""

import re
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

Row = dict[str, Any]
Statement = tuple[str, Sequence[Any]]  # with the values of its places

SCHEMA_VERSION = 1

# {id}: a key that counts up; {real}: a 64-bit float; {strict}: SQLite's type checks. JSON is text, times are Unix
# seconds, truth is 0 or 1. Everything that annotators say is in `judgement`, whose rows are never changed but for
# `is_current`: a second thought is a new row with the next revision.
_TABLES = """
CREATE TABLE setting (key TEXT PRIMARY KEY, value TEXT NOT NULL) {strict};
CREATE TABLE account (
  id {id}, name TEXT NOT NULL UNIQUE, pw_hash TEXT NOT NULL, pseudonym TEXT NOT NULL UNIQUE,
  role TEXT NOT NULL CHECK (role IN ('annotator', 'reviewer', 'admin')),
  active INTEGER NOT NULL DEFAULT 1, paused INTEGER NOT NULL DEFAULT 0, token_version INTEGER NOT NULL DEFAULT 0,
  created_at {real} NOT NULL) {strict};
CREATE TABLE item (
  id {id}, kind TEXT NOT NULL CHECK (kind IN ('single', 'pair', 'ranking')), prompt_json TEXT NOT NULL,
  prompt_hash TEXT NOT NULL, content_hash TEXT NOT NULL UNIQUE, source TEXT NOT NULL, warning TEXT NOT NULL DEFAULT '',
  is_gold INTEGER NOT NULL DEFAULT 0, gold_json TEXT, is_control INTEGER NOT NULL DEFAULT 0,
  target_labels INTEGER NOT NULL, n_done INTEGER NOT NULL DEFAULT 0, priority {real} NOT NULL DEFAULT 0,
  shuffle {real} NOT NULL, status TEXT NOT NULL DEFAULT 'open'
  CHECK (status IN ('open', 'complete', 'flagged', 'retired')), tags_json TEXT NOT NULL DEFAULT '{{}}',
  created_at {real} NOT NULL) {strict};
CREATE INDEX item_queue ON item (status, is_gold, is_control, n_done DESC, priority DESC, shuffle);
CREATE TABLE response (
  id {id}, item_id INTEGER NOT NULL REFERENCES item (id), idx INTEGER NOT NULL, text TEXT NOT NULL,
  model TEXT NOT NULL DEFAULT '', params_json TEXT NOT NULL DEFAULT '{{}}', finish_reason TEXT NOT NULL DEFAULT '',
  score {real}, scored_by TEXT, UNIQUE (item_id, idx)) {strict};
CREATE TABLE assignment (
  id {id}, item_id INTEGER NOT NULL REFERENCES item (id), account_id INTEGER NOT NULL REFERENCES account (id),
  round INTEGER NOT NULL, state TEXT NOT NULL
  CHECK (state IN ('leased', 'done', 'skipped', 'expired', 'withdrawn')), lease_until {real} NOT NULL,
  order_json TEXT NOT NULL, served_reason TEXT NOT NULL, guideline_version INTEGER NOT NULL,
  served_at {real} NOT NULL, closed_at {real}, UNIQUE (item_id, account_id, round)) {strict};
CREATE INDEX assignment_live ON assignment (item_id) WHERE state = 'leased';
CREATE INDEX assignment_own ON assignment (account_id, state, closed_at);
CREATE TABLE judgement (
  id {id}, assignment_id INTEGER NOT NULL REFERENCES assignment (id), revision INTEGER NOT NULL,
  is_current INTEGER NOT NULL, request_id TEXT NOT NULL UNIQUE, outcome TEXT NOT NULL
  CHECK (outcome IN ('prefer', 'tie', 'both_bad', 'rank', 'good', 'bad', 'skip', 'flag')), winner_id INTEGER, strength INTEGER,
  answer_json TEXT NOT NULL, gold_pass INTEGER, late INTEGER NOT NULL, elapsed_ms INTEGER NOT NULL,
  active_ms INTEGER NOT NULL, guideline_version INTEGER NOT NULL, event_seq INTEGER NOT NULL,
  created_at {real} NOT NULL, UNIQUE (assignment_id, revision)) {strict};
CREATE UNIQUE INDEX judgement_one_current ON judgement (assignment_id) WHERE is_current = 1;
CREATE TABLE draft (
  assignment_id INTEGER PRIMARY KEY REFERENCES assignment (id), payload_json TEXT NOT NULL, at {real} NOT NULL) {strict};
CREATE TABLE event (
  seq {id}, at {real} NOT NULL, account_id INTEGER, kind TEXT NOT NULL, subject TEXT NOT NULL,
  payload_json TEXT NOT NULL, prev_hash TEXT NOT NULL, hash TEXT NOT NULL) {strict};
CREATE TABLE export (
  id {id}, at {real} NOT NULL, format TEXT NOT NULL, filter_json TEXT NOT NULL, n_rows INTEGER NOT NULL,
  max_event_seq INTEGER NOT NULL, sha256 TEXT NOT NULL) {strict}
"""


def table_columns() -> dict[str, frozenset[str]]:
    """The columns of each table."""
    tables = re.findall(r"CREATE TABLE (\w+) \((.*?)\) \{strict\}", _TABLES, re.DOTALL)
    return {
        name: frozenset(re.findall(r"(?:^|,)\s*(\w+) (?:\{id\}|\{real\}|TEXT|INTEGER)", columns))
        for name, columns in tables
    }


_SQLITE_TRIGGERS = [
    f"CREATE TRIGGER {table}_{verb.split()[0].lower()}_refused BEFORE {verb} ON {table} "
    f"BEGIN SELECT RAISE(ABORT, '{table} rows are append-only'); END"
    for table, verb in (
        ("event", "UPDATE"),
        ("event", "DELETE"),
        ("judgement", "DELETE"),
        ("judgement", "UPDATE OF outcome, winner_id, strength, answer_json, request_id, assignment_id, created_at"),
    )
]
_POSTGRES_TRIGGERS = [
    "CREATE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS "
    "$$ BEGIN RAISE EXCEPTION '% rows are append-only', TG_TABLE_NAME; END $$",
    "CREATE TRIGGER event_refused BEFORE UPDATE OR DELETE ON event FOR EACH ROW EXECUTE FUNCTION refuse_change()",
    "CREATE TRIGGER judgement_refused BEFORE DELETE OR UPDATE OF outcome, winner_id, strength, answer_json, "
    "request_id, assignment_id, created_at ON judgement FOR EACH ROW EXECUTE FUNCTION refuse_change()",
]


class Execute(Protocol):
    """Runs statements of one transaction."""

    def __call__(self, statement: str, values: Sequence[Any] = (), /) -> list[Row]:
        """The rows; an empty list where a statement returns none."""

    def together(self, *statements: Statement) -> list[list[Row]]:
        """The rows of each, in order: one round trip for statements of which none needs to know what another one returned."""

    def finish(self, *statements: Statement) -> list[list[Row]]:
        """As `together`, with the commit in the same round trip; nothing can be run after it."""


class Database(Protocol):
    """The join between the store and a database engine."""

    def write(self) -> AbstractContextManager[Execute]:
        """One transaction that is alone in writing; rolled back when the block raises."""

    def read(self) -> AbstractContextManager[Execute]:
        """One transaction that sees one moment."""

    def query(self, statement: str, values: Sequence[Any] = ()) -> list[Row]:
        """One SELECT by itself: a single round trip."""

    def close(self) -> None:
        """Closes the calling thread's connections, and one that threads share once it is free."""


class SQLiteDatabase:
    """A database in one file, made with its tables where it is missing. One connection a thread.

    Writers of one process queue at a lock of their own: SQLite itself lets them try again after ever longer pauses, so
    that under load some wait many times longer than others. Other processes are waited for in SQLite's way.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.parent.is_dir():
            raise ValueError(f"{self.path}: the folder {self.path.parent} does not exist; make it first")
        self._local = threading.local()
        self._turn = threading.Lock()
        try:
            with self.write() as run:
                if not run("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'setting'"):
                    ddl = _TABLES.format(id="INTEGER PRIMARY KEY AUTOINCREMENT", real="REAL", strict="STRICT")
                    for statement in [*ddl.split(";"), *_SQLITE_TRIGGERS]:
                        run(statement)
                    run("INSERT INTO setting VALUES ('schema_version', ?)", (str(SCHEMA_VERSION),))
                check_schema_version(run, str(self.path))
        except sqlite3.DatabaseError as error:
            raise ValueError(f"{self.path}: cannot be opened as a label database ({error})") from None

    def _connection(self) -> sqlite3.Connection:
        if getattr(self._local, "connection", None) is None:
            connection = sqlite3.connect(self.path, timeout=30, isolation_level=None)
            connection.row_factory = lambda cursor, row: {
                column[0]: value for column, value in zip(cursor.description, row, strict=True)
            }
            for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
                connection.execute(f"PRAGMA {pragma}").close()
            self._local.connection = connection
        return self._local.connection

    @contextmanager
    def _transaction(self, begin: str) -> Iterator[Execute]:
        connection = self._connection()
        connection.execute(begin)
        try:
            yield _SQLiteExecute(connection)
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        if connection.in_transaction:
            connection.execute("COMMIT")

    @contextmanager
    def write(self) -> Iterator[Execute]:
        """See `Database`."""
        with self._turn, self._transaction("BEGIN IMMEDIATE") as run:
            yield run

    def read(self) -> AbstractContextManager[Execute]:
        """See `Database`."""
        return self._transaction("BEGIN")

    def query(self, statement: str, values: Sequence[Any] = ()) -> list[Row]:
        """See `Database`."""
        return self._connection().execute(statement, values).fetchall()

    def close(self) -> None:
        """See `Database`."""
        if getattr(self._local, "connection", None) is not None:
            self._local.connection.close()
            self._local.connection = None


class _SQLiteExecute:
    def __init__(self, connection: sqlite3.Connection) -> None:
        self.connection = connection

    def __call__(self, statement: str, values: Sequence[Any] = (), /) -> list[Row]:
        return self.connection.execute(statement, values).fetchall()

    def together(self, *statements: Statement) -> list[list[Row]]:
        return [self(*one) for one in statements]

    def finish(self, *statements: Statement) -> list[list[Row]]:
        rows = self.together(*statements)
        self("COMMIT")
        return rows


class PostgresDatabase:
    """A PostgreSQL database by URL, its tables made where they are missing.

    One connection for all that write, since they take turns anyway, one for all single queries, and one a thread for
    transactions that read: the fewer there are, the sooner their server processes have plans and caches warm.
    """

    def __init__(self, url: str) -> None:
        try:
            import psycopg
            from psycopg.rows import dict_row
        except ImportError:
            raise ValueError(
                f"{mask_password(url)}: psycopg is missing; pip install 'plumbline-rlhf[postgres]'"
            ) from None
        self.url, self._connect, self._rows, self._error = url, psycopg.connect, dict_row, psycopg.OperationalError
        self._reader, self._writer, self._asker = threading.local(), SimpleNamespace(), SimpleNamespace()
        self._turn = threading.Lock()  # writers of one process queue here, those of others at the lock in the database
        self._asking = threading.Lock()
        try:
            with self.write() as run:
                if not run("SELECT 1 FROM pg_tables WHERE schemaname = current_schema() AND tablename = 'setting'"):
                    key = "INTEGER GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY"
                    ddl = _TABLES.format(id=key, real="DOUBLE PRECISION", strict="")
                    for statement in [*ddl.split(";"), *_POSTGRES_TRIGGERS]:
                        run(statement)
                    run("INSERT INTO setting VALUES ('schema_version', ?)", (str(SCHEMA_VERSION),))
                check_schema_version(run, mask_password(url))
        except psycopg.OperationalError as error:
            raise ValueError(f"{mask_password(url)}: cannot connect ({str(error).strip().splitlines()[0]})") from None

    def _connection(self, holder: Any) -> Any:
        connection = getattr(holder, "connection", None)
        if connection is None or connection.closed:
            connection = self._connect(self.url, autocommit=True, row_factory=self._rows)
            # Else statements whose plans look cheaper with their values known are planned at every call, which takes
            # longer than they do; all go by keys and the queue's index, whatever the values.
            connection.execute("SET plan_cache_mode = force_generic_plan")
            holder.connection = connection
        return connection

    def _first(self, holder: Any, statement: str, values: Sequence[Any] = ()) -> tuple[Any, Any]:
        """(connection, cursor) of a statement outside a transaction; where the server went away, once more on a fresh one."""
        connection = self._connection(holder)
        try:
            return connection, connection.execute(_percent(statement, values), values or None)
        except self._error:
            connection.close()
            connection = self._connection(holder)
            return connection, connection.execute(_percent(statement, values), values or None)

    @contextmanager
    def _transaction(self, holder: Any, begin: str) -> Iterator[Execute]:
        connection = self._connection(holder)
        try:
            connection, _ = self._first(holder, begin)
            yield _PostgresExecute(connection)
        except BaseException:
            if _in_transaction(connection):
                connection.execute("ROLLBACK")
            raise
        if _in_transaction(connection):
            connection.execute("COMMIT")

    @contextmanager
    def write(self) -> Iterator[Execute]:
        """See `Database`."""
        begin = "BEGIN; SELECT pg_advisory_xact_lock(hashtext('plumbline' || current_schema()))"
        with self._turn, self._transaction(self._writer, begin) as run:
            yield run

    def read(self) -> AbstractContextManager[Execute]:
        """See `Database`."""
        return self._transaction(self._reader, "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")

    def query(self, statement: str, values: Sequence[Any] = ()) -> list[Row]:
        """See `Database`."""
        with self._asking:
            return self._first(self._asker, statement, values)[1].fetchall()

    def close(self) -> None:
        """See `Database`."""
        for holder in (self._reader, self._writer, self._asker):
            with self._turn, self._asking:
                if getattr(holder, "connection", None) is not None:
                    holder.connection.close()
                    holder.connection = None


class _PostgresExecute:
    def __init__(self, connection: Any) -> None:
        self.connection = connection

    def __call__(self, statement: str, values: Sequence[Any] = (), /) -> list[Row]:
        return _rows(self.connection.execute(_percent(statement, values), values or None))

    def together(self, *statements: Statement) -> list[list[Row]]:
        with self.connection.pipeline():
            cursors = [self.connection.execute(_percent(one, values), values or None) for one, values in statements]
        return [_rows(cursor) for cursor in cursors]

    def finish(self, *statements: Statement) -> list[list[Row]]:
        return self.together(*statements, ("COMMIT", ()))[:-1]


def _in_transaction(connection: Any) -> bool:
    return not connection.closed and connection.info.transaction_status.name != "IDLE"


def _rows(cursor: Any) -> list[Row]:
    return cursor.fetchall() if cursor.description else []


def _percent(statement: str, values: Sequence[Any]) -> str:
    return statement.replace("?", "%s") if values else statement


def check_schema_version(run: Execute, place: str) -> None:
    """Refuses a database of another version: its columns may mean something else."""
    found = run("SELECT value FROM setting WHERE key = 'schema_version'")[0]["value"]
    if found != str(SCHEMA_VERSION):
        raise ValueError(
            f"{place}: made by another version (schema {found}, this one reads {SCHEMA_VERSION}); "
            "export from it with the version that made it, and import here"
        )


def open_database(target: str | Path) -> Database:
    """A PostgreSQL database for a `postgresql://` URL, else the SQLite file at that path."""
    if re.match(r"postgres(ql)?://", str(target)):
        return PostgresDatabase(str(target))
    if "://" in str(target):
        raise ValueError(f"{mask_password(str(target))}: takes a path to an SQLite file or a postgresql:// URL")
    return SQLiteDatabase(target)


def mask_password(url: str) -> str:
    """The URL with its password hidden, for messages."""
    return re.sub(r"(://[^:/@]*):[^@]*@", r"\1:***@", url)
