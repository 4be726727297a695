"""Backup and restore of a label database as one compressed file of JSON lines, the same for SQLite and PostgreSQL.

So a backup of one can be restored into the other. The file holds password hashes and the session key: keep it as safe as
the database. It is taken in one transaction, while people label.
"""

import gzip
import json
import os
from pathlib import Path

from plumbline.apps.label.store.database import SCHEMA_VERSION, Database, PostgresDatabase

# In an order that foreign keys allow.
TABLES = ("setting", "account", "item", "response", "assignment", "judgement", "draft", "event", "export")
_KEYS = {
    table: "seq" if table == "event" else "id" for table in TABLES if table not in ("setting", "draft")
}  # that count up


def backup(database: Database, path: Path) -> dict[str, int]:
    """Writes the file (readable by its owner only) and returns rows by table; ValueError where it exists."""
    if path.exists():
        raise ValueError(f"{path} exists; a backup never overwrites one, choose another name")
    counts = {}
    part = path.with_name(path.name + ".part")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as raw, gzip.open(raw, "wt", encoding="utf-8") as lines, database.read() as run:
        lines.write(json.dumps({"plumbline_labels": SCHEMA_VERSION}) + "\n")
        for table in TABLES:
            rows = run(f"SELECT * FROM {table} ORDER BY 1")
            counts[table] = len(rows)
            for row in rows:
                lines.write(json.dumps([table, row], ensure_ascii=False) + "\n")
        lines.write(json.dumps({"rows": counts}) + "\n")
    part.rename(path)  # a file of this name is whole
    return counts


def restore(database: Database, path: Path) -> dict[str, int]:
    """Fills an empty database from a backup, all or nothing; ValueError for a database in use or a damaged file."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give one that `plumbline label backup` wrote")
    counts = dict.fromkeys(TABLES, 0)
    try:
        with gzip.open(path, "rt", encoding="utf-8") as lines, database.write() as run:
            if any(run(f"SELECT 1 FROM {table} LIMIT 1") for table in ("account", "item", "event")):
                raise ValueError("the database is in use; restore into a new one")
            version = json.loads(next(lines)).get("plumbline_labels")
            if version != SCHEMA_VERSION:
                raise ValueError(f"{path}: made by another version (schema {version}, this one reads {SCHEMA_VERSION})")
            run("DELETE FROM setting")
            end = None
            for line in lines:
                entry = json.loads(line)
                if isinstance(entry, dict):
                    end = entry["rows"]
                    break
                table, row = entry
                if table not in TABLES:
                    raise ValueError(f"{path}: unknown table {table!r}")
                columns = _columns(row)
                places = ", ".join("?" * len(row))
                run(f"INSERT INTO {table} ({columns}) VALUES ({places})", tuple(row.values()))
                counts[table] += 1
            if end != counts:
                raise ValueError(f"{path}: cut short (has {counts}, should have {end}); take another backup")
            if isinstance(database, PostgresDatabase):  # keys go on where the rows end
                for table, key in _KEYS.items():
                    run(f"SELECT setval(pg_get_serial_sequence('{table}', '{key}'), max({key})) FROM {table}")
    except (OSError, EOFError, StopIteration, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a whole backup ({type(error).__name__}: {error})") from None
    return counts


def _columns(row: dict[str, object]) -> str:
    if not all(name.isidentifier() for name in row):
        raise ValueError(f"column names {sorted(row)} are not those of a backup")
    return ", ".join(row)
