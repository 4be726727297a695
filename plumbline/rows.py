"""One way in for data: rows of JSON Lines, JSON, CSV and Parquet files, of folders of these, of saved data sets, of the hub.

Every stage, tool and app reads through this module, so that a file means the same everywhere:

- text is UTF-8, with or without a byte order mark, with line feeds or carriage returns and line feeds; UTF-16 is refused
- only a line feed ends a row of JSON Lines: U+2028, U+2029 and U+0085 may stand inside a string
- what no tokenizer or file can hold again is refused with file, line, field and rule: half of a surrogate pair, a NUL,
  NaN and Infinity, a field that stands twice in one object

It imports the standard library alone; pyarrow and datasets are imported when a file or a hub id needs them.
"""

import csv
import datetime
import decimal
import gzip
import io
import json
import math
import re
import zlib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import IO, Any

from plumbline.paths import HOME, resolve_path

TEXT_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
SUFFIXES = (*TEXT_SUFFIXES, *(f"{suffix}.gz" for suffix in TEXT_SUFFIXES), ".parquet")
HUB_ID = re.compile(r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(?:@(?P<revision>[\w./-]+))?")
_BOM = b"\xef\xbb\xbf"

Row = dict[str, Any]


def read_rows(source: str | Path, *, split: str = "train") -> Iterator[tuple[str, Row]]:
    """Yields (place, row) for each row of a source, as `row_sources` names them; place reads `file:line`.

    In Parquet files and hub data sets, the number is that of the row. ValueError for what is not there, cannot be read,
    or has no rows.
    """
    empty = True
    for _, rows in row_sources(source, split=split):
        for placed in rows:
            empty = False
            yield placed
    if empty:
        raise ValueError(f"{source}: the file has no rows; at least one is needed")


def row_sources(source: str | Path, *, split: str = "train") -> Iterator[tuple[str, Iterator[tuple[str, Row]]]]:
    """(name, rows with their places) of each file of a source.

    A source is a file, a folder of files (looked through with its folders), a folder that `datasets` saved, a hub id
    (`owner/name`, or `owner/name@revision`), or several of these with commas between. A file with another suffix than
    `SUFFIXES` is read as JSON Lines.
    """
    path = Path(source)
    if _exists(path):
        several = [str(source)]
    else:
        several = [part.strip() for part in str(source).split(",") if part.strip()] or [str(source)]
    return chain.from_iterable(_sources_of(one, split) for one in several)


def is_hub_id(source: str) -> bool:
    """Whether the text can only be the name of a data set on the hub: no such path, and no data file's name."""
    return (
        HUB_ID.fullmatch(source) is not None
        and not source.partition("@")[0].endswith(SUFFIXES)
        and not _exists(Path(source))
    )


def data_source(name: str) -> str:
    """A source as it is given, or among the files that ship; a hub id stays one. ValueError for what is neither."""
    if "," in name and not _exists(Path(name)):
        return ",".join(data_source(part.strip()) for part in name.split(",") if part.strip())
    return name if is_hub_id(name) and not (HOME / name).exists() else str(resolve_path(name))


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that is too long, or holds a NUL
        return False


def _sources_of(source: str, split: str) -> Iterator[tuple[str, Iterator[tuple[str, Row]]]]:
    path = Path(source)
    if _exists(path) and path.is_dir():
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            yield path.name, _saved_rows(path, split)
            return
        files = sorted(file for file in path.rglob("*") if file.name.endswith(SUFFIXES) and file.is_file())
        if not files:
            raise ValueError(f"{path}: no files of {', '.join(SUFFIXES)} in this folder")
        for file in files:
            yield f"{file.resolve().parent.name}/{_stem(file)}", file_rows(file)
    elif _exists(path):
        yield _stem(path), file_rows(path)
    elif is_hub_id(source):
        yield source, hub_rows(source, split)
    else:
        raise ValueError(f"{source}: no such file or folder, and no hub id (owner/name)")


def _stem(file: Path) -> str:
    suffix = next((suffix for suffix in sorted(SUFFIXES, key=len, reverse=True) if file.name.endswith(suffix)), "")
    return file.name.removesuffix(suffix)


def hub_rows(source: str, split: str, *, streaming: bool = False) -> Iterator[tuple[str, Row]]:
    """Rows of a data set on the hub; ValueError when it cannot be had."""
    from datasets import load_dataset

    named = HUB_ID.fullmatch(source)
    if named is None:
        raise ValueError(f"{source!r}: no hub id; write owner/name, or owner/name@revision")
    try:
        rows = load_dataset(named["name"], split=split, revision=named["revision"], streaming=streaming)
        for number, row in enumerate(rows, start=1):
            yield f"{source}:{number}", _checked(f"{source}:{number}", row)
    except ValueError as error:
        if str(error).startswith(f"{source}:"):
            raise
        raise ValueError(f"{source}: no such file or folder, and the hub does not give it ({error})") from None
    except Exception as error:  # the library raises many kinds: offline, unknown, gated, no such split
        raise ValueError(f"{source}: no such file or folder, and the hub does not give it ({error})") from None


def _saved_rows(folder: Path, split: str) -> Iterator[tuple[str, Row]]:
    """Rows of a folder that `save_to_disk` of the datasets library wrote."""
    from datasets import DatasetDict, load_from_disk

    try:
        saved = load_from_disk(str(folder))
    except Exception as error:  # as for the hub
        raise ValueError(f"{folder}: looks like a saved data set, but cannot be read ({error})") from None
    if isinstance(saved, DatasetDict):
        if split not in saved:
            raise ValueError(f"{folder}: no split {split!r} among {', '.join(map(str, saved))}; name {folder}/<split>")
        saved = saved[split]
    for number, row in enumerate(saved, start=1):
        yield f"{folder}:{number}", _checked(f"{folder}:{number}", row)


def file_rows(file: str | Path) -> Iterator[tuple[str, Row]]:
    """Rows of one file by its suffix, none for an empty one; every fault of reading is a ValueError that names the file."""
    file = Path(file)
    try:
        with file.open("rb") as stream:
            yield from _stream_rows(str(file), stream)
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror or error}); is it there, and a file?") from None


def rows_of_bytes(content: bytes, name: str) -> Iterator[tuple[str, Row]]:
    """Rows of a file that came as bytes, such as an upload, read as `name` says. ValueError when there is no row."""
    empty = True
    for placed in _stream_rows(name, io.BytesIO(content)):
        empty = False
        yield placed
    if empty:
        raise ValueError(f"{name}: the file has no rows; at least one is needed")


def _stream_rows(file: str, stream: IO[bytes]) -> Iterator[tuple[str, Row]]:
    name = file.removesuffix(".gz")
    if name.endswith(".parquet"):
        yield from _parquet_rows(file, stream)
        return
    try:
        content: IO[bytes] = gzip.GzipFile(fileobj=stream) if file.endswith(".gz") else stream  # type: ignore[assignment]
        if name.endswith((".csv", ".tsv")):
            yield from _table_rows(file, _decoded(file, content.read()))
        elif name.endswith(".json"):
            yield from _json_rows(file, _decoded(file, content.read()))
        else:
            for number, line in enumerate(content, start=1):
                if number == 1:
                    _refuse_utf16(file, line)
                yield from _line_row(f"{file}:{number}", line)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{file}: no whole gzip file ({error}); copy or download it again") from None


def read_text(file: str | Path) -> str:
    """The text of a file that is no table, such as a document; ValueError as for rows."""
    try:
        return _decoded(str(file), Path(file).read_bytes())
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror})") from None


def parse_object(place: str, text: str) -> Row:
    """One JSON object, such as a line of JSON Lines; ValueError with the place for anything else."""
    return _checked(place, _loads(place, text))


def parse_value(place: str, field: str, text: str) -> Any:
    """The value of JSON that a field holds as a text; ValueError with place and field for what is none."""
    try:
        value = _loads(place, text)
    except ValueError as error:
        fault = str(error).removeprefix(f"{place}: ").removesuffix("; fix the line")
        raise ValueError(f"{place}: {field}={text!r:.80} holds JSON as a text, but it is {fault}; fix it") from None
    try:
        return _plain(place, field, value)
    except RecursionError:
        raise ValueError(f"{place}: field {field!r:.80} is nested too deep to be read") from None


# JSON


def _line_row(place: str, line: bytes) -> Iterator[tuple[str, Row]]:
    line = line.removeprefix(_BOM)
    if not line.strip():
        return
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: not UTF-8 ({error.reason} at byte {error.start}); save the file as UTF-8") from None
    yield place, parse_object(place, text)


def _loads(place: str, text: str) -> Any:
    try:
        return _DECODER.decode(text.strip(" \t\r\n"))
    except json.JSONDecodeError as error:
        fix = "a list of rows belongs in a .json file" if text.strip() == "[" else "fix the line"
        raise ValueError(f"{place}: not valid JSON ({error.msg} at column {error.colno}); {fix}") from None
    except ValueError as error:  # a field twice, or a number of thousands of digits
        raise ValueError(f"{place}: {error}; fix the line") from None
    except RecursionError:
        raise ValueError(f"{place}: nested too deep to be read; fix the line") from None


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        double = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"field {double!r:.80} stands twice in one object")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_no_doubles)
_SPACE = re.compile(r"[ \t\r\n]*")


def _json_rows(file: str, text: str) -> Iterator[tuple[str, Row]]:
    """A list of objects, one object, or JSON Lines under another name."""
    at = _skip(text, 0)
    if not text.startswith("[", at):
        try:
            whole, end = _DECODER.raw_decode(text, at)
            if not text[end:].strip(" \t\r\n"):
                yield f"{file}:1", _checked(f"{file}:1", whole)
                return
        except (ValueError, RecursionError):
            pass
        for number, one in enumerate(text.split("\n"), start=1):
            if one.strip():
                yield f"{file}:{number}", parse_object(f"{file}:{number}", one)
        return
    line, counted, at = 1, 0, at + 1
    at = _skip(text, at)
    first = True
    while not (first and text.startswith("]", at)):
        line, counted = line + text.count("\n", counted, at), at
        place = f"{file}:{line}"
        try:
            row, at = _DECODER.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}:{error.lineno}: not valid JSON ({error.msg} at column {error.colno})") from None
        except ValueError as error:
            raise ValueError(f"{place}: {error}; fix the row") from None
        except RecursionError:
            raise ValueError(f"{place}: nested too deep to be read; fix the row") from None
        yield place, _checked(place, row)
        at, first = _skip(text, at), False
        if text.startswith("]", at):
            break
        if not text.startswith(",", at):
            line += text.count("\n", counted, at)
            raise ValueError(f"{file}:{line}: not valid JSON (',' or ']' expected after a row of the list)")
        at = _skip(text, at + 1)
    if rest := text[at + 1 :].strip(" \t\r\n"):
        raise ValueError(f"{file}: not valid JSON ({rest[:20]!r} after the end of the list)")


def _skip(text: str, at: int) -> int:
    return _SPACE.match(text, at).end()  # type: ignore[union-attr]


# CSV


def _table_rows(file: str, text: str) -> Iterator[tuple[str, Row]]:
    """Rows of a table with a header. Lines of comment (#) may stand before it; an empty cell is null."""
    lines = text.split("\n")
    skipped = next((n for n, line in enumerate(lines) if line.strip() and not line.startswith("#")), len(lines))
    header = lines[skipped] if skipped < len(lines) else ""
    comma = "\t" if file.removesuffix(".gz").endswith(".tsv") else ","
    if comma not in header:
        comma = next((mark for mark in ";\t" if mark in header), comma)
    body = "\n".join(lines[skipped:])
    reader = csv.reader(io.StringIO(body, newline=""), delimiter=comma, strict=True)
    csv.field_size_limit(2**31 - 1)  # the usual 131,072 characters are fewer than a long conversation has
    names: list[str] | None = None
    start = skipped + 1
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(f"{file}:{start}: no valid CSV ({error}); quote the text and double its quotes") from None
        place, start = f"{file}:{start}", skipped + reader.line_num + 1
        if not cells:
            continue
        if names is None:
            names = [cell.strip() or f"column {n}" for n, cell in enumerate(cells, start=1)]
            if double := next((name for n, name in enumerate(names) if name in names[:n]), None):
                raise ValueError(f"{place}: column {double!r} stands twice in the header; rename one")
            continue
        if len(cells) != len(names):
            raise ValueError(f"{place}: {len(cells)} cells, the header has {len(names)}; quote texts that hold commas")
        yield place, _checked(place, {name: cell or None for name, cell in zip(names, cells, strict=True)})


# Parquet


def _parquet_rows(file: str, stream: IO[bytes]) -> Iterator[tuple[str, Row]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(stream) as table:
            for batch in table.iter_batches(batch_size=4096):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file}:{number}", _checked(f"{file}:{number}", row)
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{file}: no readable Parquet ({str(error).strip()}); is the file whole?") from None


# What every row is asked


def _checked(place: str, row: Any) -> Row:
    if not isinstance(row, dict):
        hint = "; a list of rows belongs in a .json file" if isinstance(row, list) else "; fix the line"
        raise ValueError(f"{place}: an object is expected, found {type(row).__name__}{hint}")
    try:
        return {name: _plain(place, _name(place, name), value) for name, value in row.items()}
    except RecursionError:
        raise ValueError(f"{place}: nested too deep to be read; fix the line") from None


def _plain(place: str, field: str, value: Any) -> Any:
    """The value as JSON has it; ValueError for what JSON, UTF-8 or a tokenizer cannot hold."""
    if isinstance(value, str):
        return _sound(place, f"field {field!r:.80}", value)
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            name = "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
            raise ValueError(f"{place}: field {field!r:.80} is {name}; a finite number or null is needed")
        return value
    if isinstance(value, dict):
        return {name: _plain(place, f"{field}.{_name(place, name)}", item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(place, f"{field}[{at}]", item) for at, item in enumerate(value)]
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal):
        return _plain(place, field, float(value))
    raise ValueError(f"{place}: field {field!r:.80} holds {type(value).__name__}; drop the column, or make it text")


def _name(place: str, name: Any) -> str:
    return _sound(place, "the name of a field", name) if isinstance(name, str) else str(name)


def is_sound(text: str) -> bool:
    """Whether a reader of this module takes the text: a very small model may write a NUL."""
    try:
        _sound("", "", text)
    except ValueError:
        return False
    return True


def _sound(place: str, what: str, text: str) -> str:
    """The text, if UTF-8 can hold it and it has no NUL."""
    if "\0" in text:
        raise ValueError(f"{place}: {what} holds a NUL (\\u0000) at character {text.index(chr(0))}; take it out")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{place}: {what} holds half of a surrogate pair ({text[error.start]!r} at character {error.start}), "
            "as of an emoji that was cut in two; take it out"
        ) from None
    return text


# Encodings


def _refuse_utf16(file: str, start: bytes) -> None:
    if start.startswith((b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")) or (b"\0" in start[:4] and start[:1] != b'"'):
        raise ValueError(f"{file}:1: UTF-16 or UTF-32, and not UTF-8; save the file as UTF-8")


def _decoded(file: str, content: bytes) -> str:
    _refuse_utf16(file, content)
    content = content.removeprefix(_BOM)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{file}:{line}: not UTF-8 ({error.reason}); save the file as UTF-8") from None
