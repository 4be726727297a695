"""Hostile and damaged backups: each ends in the one documented error, and nothing is restored."""

import gzip
import json
import os
import zlib

import pytest

from plumbline.apps.label.command import main
from plumbline.apps.label.store import backup as backups
from plumbline.apps.label.store.backup import BackupError, backup, restore
from plumbline.apps.label.store.database import SQLiteDatabase, table_columns
from plumbline.apps.label.store.store import LabelStore
from tests.apps.conftest import FAST_HASHER, PASSWORD, pair


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    store = LabelStore(SQLiteDatabase(folder / "labels.db"), hasher=FAST_HASHER, seed=0)
    store.add_items([pair(1), pair(2)])
    store.add_account("ann", PASSWORD, "admin")
    backup(store.database, folder / "labels.gz")
    store.database.close()
    return (folder / "labels.gz").read_bytes()


def lines_of(whole: bytes) -> list:
    return [json.loads(line) for line in gzip.decompress(whole).splitlines()]


def packed(lines: list) -> bytes:
    return gzip.compress(
        "".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines).encode("utf-8", "surrogatepass")
    )


def with_row(table: str, **changes):
    """A backup whose first row of a table has these values."""

    def spoil(whole: bytes) -> bytes:
        lines = lines_of(whole)
        at = next(at for at, line in enumerate(lines) if isinstance(line, list) and line[0] == table)
        lines[at] = [table, lines[at][1] | changes]
        return packed(lines)

    return spoil


def with_lines(change):
    return lambda whole: packed(change(lines_of(whole)))


def without_column(whole: bytes) -> bytes:
    lines = lines_of(whole)
    del next(line[1] for line in lines if isinstance(line, list) and line[0] == "item")["prompt_json"]
    return packed(lines)


def with_setting(key: str, value: str | None):
    """A backup with another value of a setting; None leaves the setting out."""

    def spoil(whole: bytes) -> bytes:
        lines = [
            line
            for line in lines_of(whole)
            if not (isinstance(line, list) and line[0] == "setting" and line[1]["key"] == key)
        ]
        if value is None:
            lines[-1]["rows"]["setting"] -= 1
            return packed(lines)
        return packed([lines[0], ["setting", {"key": key, "value": value}], *lines[1:]])

    return spoil


HOSTILE = {
    "empty file": lambda whole: b"",
    "not gzip": lambda whole: b"plain text\n",
    "cut in the middle": lambda whole: whole[: len(whole) // 2],
    "cut by one byte": lambda whole: whole[:-1],
    "a bit turned over": lambda whole: whole[:40] + bytes([whole[40] ^ 255]) + whole[41:],
    "end line missing": with_lines(lambda lines: lines[:-1]),
    "a row missing": with_lines(lambda lines: lines[:3] + lines[4:]),
    "rows behind the end": with_lines(lambda lines: [*lines, lines[1]]),
    "bomb": lambda whole: gzip.compress(json.dumps({"plumbline_labels": 1}).encode() + b"\n" + b'["setting", {}]\n' * 8_000_000, 9),
    "bomb in one line": lambda whole: gzip.compress(b"[" * 40_000_000, 9),
    "not UTF-8": lambda whole: gzip.compress(gzip.decompress(whole).replace(b"first", b"\xff\xfe")),
    "not JSON": with_lines(lambda lines: [lines[0], "{", *lines[1:]]),
    "nested deeply": with_lines(lambda lines: [lines[0], "[" * 100_000, *lines[1:]]),
    "nan": with_lines(lambda lines: [lines[0], '["setting", {"key": "a", "value": NaN}]', *lines[1:]]),
    "first line a list": with_lines(lambda lines: [[1], *lines[1:]]),
    "first line a number": with_lines(lambda lines: [1, *lines[1:]]),
    "another file of ours": lambda whole: gzip.compress(b'{"prompt": "a"}\n'),
    "older version": with_lines(lambda lines: [{"plumbline_labels": 0}, *lines[1:]]),
    "newer version": with_lines(lambda lines: [{"plumbline_labels": 2}, *lines[1:]]),
    "version of another kind": with_lines(lambda lines: [{"plumbline_labels": [1]}, *lines[1:]]),
    "row a number": with_lines(lambda lines: [lines[0], 7, *lines[1:]]),
    "row of three": with_lines(lambda lines: [lines[0], ["item", {}, {}], *lines[1:]]),
    "row without columns": with_lines(lambda lines: [lines[0], ["item", {}], *lines[1:]]),
    "table of the engine": with_lines(lambda lines: [lines[0], ["sqlite_master", {"name": "x"}], *lines[1:]]),
    "table with SQL": with_lines(lambda lines: [lines[0], ["item; DROP TABLE item", {}], *lines[1:]]),
    "table a list": with_lines(lambda lines: [lines[0], [["item"], {}], *lines[1:]]),
    "column with SQL": with_row("item", **{"id) VALUES (1); DROP TABLE item; --": 1}),
    "column missing": without_column,
    "text for a number": with_row("item", target_labels="two"),
    "number too large": with_row("item", target_labels=10**30),
    "infinite number": with_lines(lambda lines: [lines[0], '["setting", {"key": "a", "value": 1e999}]', *lines[1:]]),
    "list for a text": with_row("item", source=["a"]),
    "null where none may be": with_row("item", prompt_json=None),
    "prompt that is no JSON": with_row("item", prompt_json="{"),
    "prompt of another type": with_row("item", prompt_json='"text"'),
    "unknown role": with_row("account", role="owner"),
    "half an emoji": with_row("item", source="\ud83d"),
    "an id twice": with_lines(lambda lines: [*lines[:-1], next(x for x in lines if isinstance(x, list) and x[0] == "item"), lines[-1]]),
    "answer of no item": with_row("response", item_id=99),
    "settings that are none": with_setting("label_settings", '{"gold_gap": 5}'),
    "settings a list": with_setting("label_settings", "[]"),
    "no schema": with_setting("schema_version", None),
    "other schema": with_setting("schema_version", "7"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_backup_is_one_error_and_restores_nothing(name, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(backups, "PLAIN_SIZE", 2 * 2**20)  # the bomb need not be large to be one
    monkeypatch.setattr(backups, "MAX_LINE", 2**20)
    file, target = tmp_path / "hostile.gz", SQLiteDatabase(tmp_path / "new.db")
    file.write_bytes(HOSTILE[name](whole))
    before = target.query("SELECT * FROM setting")
    with pytest.raises(BackupError, match="hostile.gz.*nothing was restored") as caught:
        restore(target, file)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    assert target.query("SELECT * FROM setting") == before
    assert all(not target.query(f"SELECT 1 FROM {table}") for table in table_columns() if table != "setting")
    file.write_bytes(whole)  # and the database is still good for the right one
    assert restore(target, file)["item"] == 2
    target.close()


def test_a_bomb_is_stopped_before_it_unpacks(tmp_path, monkeypatch):
    monkeypatch.setattr(backups, "PLAIN_SIZE", 2**20)
    packer = zlib.compressobj(9, wbits=31)
    head = packer.compress(b'{"plumbline_labels": 1}\n')
    body = b"".join(packer.compress(b'["setting", 1]\n' * 100_000) for _ in range(200))  # 300 MB
    (tmp_path / "bomb.gz").write_bytes(head + body + packer.flush())
    target = SQLiteDatabase(tmp_path / "new.db")
    with pytest.raises(BackupError, match="is no row|unpacks to over"):
        restore(target, tmp_path / "bomb.gz")
    target.close()


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe", "database"])
def test_paths_that_are_no_backup(kind, tmp_path):
    path, target = tmp_path / "there.gz", SQLiteDatabase(tmp_path / "new.db")
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)  # opening it would wait for ever
    elif kind == "database":
        path = tmp_path / "new.db"
    with pytest.raises(BackupError):
        restore(target, path)
    target.close()


def test_a_backup_is_not_written_through_links_or_over_files(tmp_path):
    store = LabelStore(SQLiteDatabase(tmp_path / "labels.db"), hasher=FAST_HASHER, seed=0)
    precious = tmp_path / "precious"
    precious.write_text("keep")
    (tmp_path / "a.gz.part").symlink_to(precious)
    (tmp_path / "b.gz").symlink_to(tmp_path / "nowhere")
    backup(store.database, tmp_path / "a.gz")
    assert precious.read_text() == "keep" and not (tmp_path / "a.gz").is_symlink()
    for path, rule in ((tmp_path / "b.gz", "exists"), (tmp_path / "no" / "folder" / "c.gz", "cannot be written")):
        with pytest.raises(BackupError, match=rule):
            backup(store.database, path)
    store.database.close()


def test_the_command_says_it_in_one_line(tmp_path):
    (tmp_path / "x.gz").write_bytes(b"no")
    with pytest.raises(ValueError, match="x.gz: not a whole backup"):
        main(["--db", str(tmp_path / "new.db"), "restore", str(tmp_path / "x.gz")])
