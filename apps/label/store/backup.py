"""Backup and restore of a label database as one compressed file of JSON lines, the same for SQLite and PostgreSQL.

So a backup of one can be restored into the other. The file holds password hashes and the session key: keep it as safe as
the database. It is taken in one transaction, while people label.
"""

import gzip
import json
import os
import sqlite3
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from plumbline.apps.label.store.database import (
    SCHEMA_VERSION,
    Database,
    Execute,
    PostgresDatabase,
    check_schema_version,
    table_columns,
)
from plumbline.apps.label.store.items import read_terms

# In an order that foreign keys allow.
TABLES = ("setting", "account", "item", "response", "assignment", "judgement", "draft", "event", "export")
_KEYS = {
    table: "seq" if table == "event" else "id" for table in TABLES if table not in ("setting", "draft")
}  # that count up


MAX_LINE = 16 * 2**20  # characters: more than any row of a real database
PLAIN_SIZE, MAX_RATIO = 64 * 2**20, 200  # a file may unpack to this many bytes, or to so many times its size
_JSON_COLUMNS: dict[str, type | tuple[type, ...]] = {  # what their text must hold
    "prompt_json": list, "gold_json": dict, "tags_json": dict, "params_json": dict, "order_json": list, "answer_json": dict,
    "payload_json": object, "filter_json": object,
}  # fmt: skip


class BackupError(ValueError):
    """A file that is not a whole backup of this version, or cannot be written or restored. Nothing was restored."""


def backup(database: Database, path: Path) -> dict[str, int]:
    """Writes the file (readable by its owner only) and returns rows by table; BackupError where that is not possible."""
    counts = {}
    part = path.with_name(path.name + ".part")
    try:
        if path.exists() or path.is_symlink():
            raise BackupError(f"{path} exists; a backup never overwrites one, choose another name")
        part.unlink(missing_ok=True)  # of a backup that was cut short; never written through, whatever it points to
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with (
            os.fdopen(descriptor, "wb") as raw,
            gzip.open(raw, "wt", encoding="utf-8") as lines,
            database.read() as run,
        ):
            lines.write(json.dumps({"plumbline_labels": SCHEMA_VERSION}) + "\n")
            for table in TABLES:
                rows = run(f"SELECT * FROM {table} ORDER BY 1")
                counts[table] = len(rows)
                for row in rows:
                    lines.write(json.dumps([table, row], ensure_ascii=False) + "\n")
            lines.write(json.dumps({"rows": counts}) + "\n")
        part.rename(path)  # a file of this name is whole
    except OSError as error:
        raise BackupError(f"{path}: cannot be written ({error.strerror or error})") from None
    return counts


def restore(database: Database, path: Path) -> dict[str, int]:
    """Fills an empty database from a backup, all or nothing; BackupError for a database in use and for any other file."""
    if not path.is_file():
        raise BackupError(f"{path}: no such file; give one that `plumbline label backup` wrote")
    try:
        with database.write() as run:
            if any(run(f"SELECT 1 FROM {table} LIMIT 1") for table in ("account", "item", "event")):
                raise BackupError("the database is in use; restore into a new one")
            return _fill(database, run, _entries(path))
    except BackupError as error:
        raise BackupError(f"{path}: {error}; nothing was restored") from None
    except (
        OSError,
        EOFError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RecursionError,
        OverflowError,
        zlib.error,
        *_errors_of(database),
    ) as error:
        said = " ".join(str(error).split())
        raise BackupError(
            f"{path}: not a whole backup ({type(error).__name__}: {said:.200}); nothing was restored"
        ) from None


def _entries(path: Path) -> Iterator[Any]:
    """The JSON values of a file, line by line, as far as it unpacks to a sensible size."""
    most = max(PLAIN_SIZE, MAX_RATIO * path.stat().st_size)
    read = 0
    with gzip.open(path, "rt", encoding="utf-8", newline="\n") as lines:
        while line := lines.readline(MAX_LINE):
            read += len(line)
            if read > most or len(line) == MAX_LINE:
                raise BackupError(
                    f"unpacks to over {most if read > most else MAX_LINE} characters{'' if read > most else ' a line'}"
                )
            if not line.endswith("\n"):
                raise BackupError("its last line is cut")
            yield json.loads(line, parse_constant=_no_constant)


def _fill(database: Database, run: Execute, entries: Iterator[Any]) -> dict[str, int]:
    first, end = next(entries, None), None
    if not isinstance(first, dict) or "plumbline_labels" not in first:
        raise BackupError("not a backup of labels: its first line does not say so")
    if first["plumbline_labels"] != SCHEMA_VERSION:
        made, ours = first["plumbline_labels"], SCHEMA_VERSION
        raise BackupError(f"made by another version (schema {made!r:.40}, this one reads {ours})")
    run("DELETE FROM setting")
    counts = dict.fromkeys(TABLES, 0)
    columns = table_columns()
    for entry in entries:
        if end is not None:
            raise BackupError("something stands behind its end")
        if isinstance(entry, dict):
            end = entry.get("rows")
            continue
        if not (isinstance(entry, list) and len(entry) == 2 and entry[0] in columns and isinstance(entry[1], dict)):
            raise BackupError(f"{str(entry)[:60]!r} is no row of a table")
        table, row = entry
        _check_row(table, row, columns[table])
        places = ", ".join("?" * len(row))
        run(f"INSERT INTO {table} ({', '.join(row)}) VALUES ({places})", tuple(row.values()))
        counts[table] += 1
    if end != counts:
        raise BackupError(f"cut short (has {counts}, should have {end}); take another backup")
    check_schema_version(run, "its setting")
    read_terms(run)  # its settings are settings
    if isinstance(database, PostgresDatabase):  # keys go on where the rows end
        for table, key in _KEYS.items():
            run(f"SELECT setval(pg_get_serial_sequence('{table}', '{key}'), max({key})) FROM {table}")
    return counts


def _check_row(table: str, row: dict[str, Any], columns: frozenset[str]) -> None:
    """BackupError for columns and values that no row of the table has."""
    if set(row) != columns:
        raise BackupError(f"a row of {table} has the columns {sorted(row)!s:.80}, not those of the table")
    for name, value in row.items():
        if isinstance(value, bool) or not isinstance(value, str | int | float | None):
            raise BackupError(f"{table}.{name} is {value!r:.40}: needs a text, a number or null")
        wanted = _JSON_COLUMNS.get(name)
        if wanted is not None and value is not None and not isinstance(json.loads(str(value)), wanted):
            raise BackupError(f"{table}.{name} holds {value!r:.40}, which is not what belongs there")


def _errors_of(database: Database) -> tuple[type[Exception], ...]:
    """What the database raises for rows that break its rules."""
    if isinstance(database, PostgresDatabase):
        import psycopg

        return (psycopg.Error,)
    return (sqlite3.Error,)


def _no_constant(name: str) -> None:
    raise BackupError(f"{name} is no number of JSON")
