"""Datasets of every accepted form as chunks of raw rows.

A source is cut into chunks whose borders do not depend on who reads them, so that processes can work on them in any order and a
restart can leave out those that are done. Where the form allows it (JSON lines, Parquet, Arrow) a chunk is only a place in a file and
is read by the process that works on it; CSV and JSON documents are parsed in order, and their chunks carry the rows. Neither holds
more than a chunk in memory.

    .jsonl      one JSON object a line
    .json       an array of objects; PubMedQA's published form {pmid: {QUESTION, CONTEXTS, LONG_ANSWER, final_decision}}; JSON lines
    .parquet    columns, nested ones too
    .csv        with a header line
    hub         `qiaojin/PubMedQA` and datasets of that layout, through `datasets`
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from trainer.config import DataConfig
from trainer.errors import ConfigError, UserError

CHUNK_ROWS = 2000
CHUNK_BYTES = 4 << 20
MAX_ROW_BYTES = 8 << 20
"""A longer row is rejected without being parsed: memory stays bounded whatever the file holds."""

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
SAMPLE = Path(__file__).parent / "sample" / "pubmedqa-sample.jsonl"

ALIASES: dict[str, tuple[str, ...]] = {
    "id": ("id", "pubid"),
    "question": ("question", "QUESTION"),
    "context": ("context", "contexts", "CONTEXTS"),
    "answer": ("answer", "long_answer", "LONG_ANSWER"),
    "decision": ("decision", "final_decision"),
}
"""Columns that are found without `run.data.columns`: plain names, the hub's and the published form's of PubMedQA."""


@dataclass(frozen=True)
class Bad:
    """A row that could not even be read."""

    reason: str
    snippet: str


@dataclass(frozen=True)
class RawRow:
    """A row as its file has it, or why it could not be read."""

    where: str
    """File and place, for messages."""
    value: Mapping[str, Any] | Bad


@dataclass(frozen=True)
class Chunk:
    """A part of a source. Exactly one of the ways to its rows is set by `kind`."""

    kind: str
    """`lines` (byte range of a JSON lines file), `parquet` (a row group), `arrow` (row range of an Arrow file), `rows`, `batch`."""
    path: str
    start: int = 0
    stop: int = 0
    rows: list[RawRow] = field(default_factory=list)
    batch: Any = None
    columns: tuple[str, ...] = ()


@dataclass(frozen=True)
class Source:
    """A dataset: its files, and what is known of it before reading."""

    files: tuple[Path, ...]
    name: str
    """For the manifest and messages."""
    columns: Mapping[str, str]
    """run.data.columns."""
    arrow: tuple[Path, ...] = ()
    """Arrow files of a hub dataset; `files` is empty then."""
    official: bool = False
    """Whether this is PubMedQA itself, whose official test rows must stay unseen."""

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path in (*self.files, *self.arrow))

    def chunks(self) -> Iterator[Chunk]:
        """All chunks in order. Raises UserError if a file is damaged or is not what its name says."""
        for path in self.arrow:
            rows = _arrow(path).num_rows
            for start in range(0, rows, CHUNK_ROWS):
                yield Chunk("arrow", str(path), start, min(rows, start + CHUNK_ROWS))
        for path in self.files:
            yield from {".jsonl": _lines, ".json": _json, ".parquet": _parquet, ".csv": _csv}[path.suffix](path, self.columns)


def open_source(data: DataConfig, storage: Path) -> Source:
    """The dataset that the configuration names. Raises UserError if there is none, or ConfigError if a mapped column is missing."""
    if data.sample:
        return Source((SAMPLE,), "sample", {})
    if data.name:
        return hub_source(data.name, data.revision, data.subsets, data.columns)
    path = storage / data.path
    if path.is_dir():
        files = tuple(sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file() and not p.name.startswith(".")))
        if not files:
            raise UserError(f"run.data.path: {path} holds no {', '.join(SUFFIXES)} file.")
    elif path.is_file():
        files = (path,)
        if path.suffix not in SUFFIXES:
            raise ConfigError("run.data.path", data.path, f"Give one of {', '.join(SUFFIXES)}.")
    else:
        raise UserError(f"run.data.path: {path} does not exist. Put the dataset on the shared storage, or correct the path.")
    for file in files:
        _check_header(file)
    if all(file.stat().st_size == 0 for file in files):
        raise UserError(f"run.data.path: {path} is empty.")
    official = any(file.suffix == ".json" and _is_published_form(file) for file in files)
    return Source(files, data.path, data.columns, official=official)


def hub_source(name: str, revision: str, subsets: list[str], columns: Mapping[str, str]) -> Source:
    """A hub dataset, downloaded (once) by `datasets`; all splits of the given subsets. `name` may be a directory in the hub's layout."""
    import datasets

    files: list[Path] = []
    names: list[str | None] = [*subsets] or [None]
    for subset in names:
        try:
            splits = datasets.load_dataset(name, subset, revision=revision or None)
        except Exception as error:  # the hub client and pyarrow raise many kinds; all mean that it cannot be had
            line = (str(error).strip().splitlines() or [""])[0][:300]
            raise UserError(f"The hub dataset {name} (subset {subset}, revision {revision}) cannot be loaded: "
                            f"{type(error).__name__}: {line} "
                            "Check run.data.name, run.data.revision, run.data.subsets and the network; a gated dataset needs HF_TOKEN, "
                            "and a subset must be named where the dataset has several.") from error
        for split in splits:
            files += [Path(entry["filename"]) for entry in splits[split].cache_files]
    if not files:
        raise UserError(f"The hub dataset {name} has no rows.")
    for file in files:
        resolve_columns(_arrow(file).schema.names, columns, name)
    return Source((), "/".join([name, *subsets]), columns, tuple(files), official=name.rstrip("/").lower().endswith("pubmedqa"))


def resolve_columns(names: list[str] | tuple[str, ...], columns: Mapping[str, str], where: str) -> dict[str, str]:
    """Which column of a table holds which field. Raises ConfigError if question or answer is missing, or a mapped column."""
    found = {}
    for name, aliases in ALIASES.items():
        if name in columns:
            if columns[name] not in names:
                raise ConfigError(f"run.data.columns.{name}", columns[name], f"{where} has the columns {', '.join(names)}.")
            found[name] = columns[name]
        elif alias := next((a for a in aliases if a in names), None):
            found[name] = alias
    for name in ("question", "answer"):
        if name not in found:
            raise ConfigError(f"run.data.columns.{name}", None,
                              f"{where} has the columns {', '.join(names)}: name the one with the {name}.")
    return found


def read(chunk: Chunk) -> Iterator[RawRow]:
    """The rows of a chunk, in order."""
    if chunk.kind == "rows":
        yield from chunk.rows
    elif chunk.kind == "lines":
        yield from _read_lines(chunk)
    elif chunk.kind == "batch":
        yield from _read_table(pa.table(chunk.batch), Path(chunk.path).name, chunk.start)
    elif chunk.kind == "parquet":
        with _parquet_file(Path(chunk.path)) as file:
            table = _damaged(Path(chunk.path), lambda: file.read_row_group(chunk.start, columns=list(chunk.columns), use_threads=False))
        yield from _read_table(table, Path(chunk.path).name, chunk.stop)
    else:
        table = _arrow(Path(chunk.path)).slice(chunk.start, chunk.stop - chunk.start)
        yield from _read_table(table, Path(chunk.path).name, chunk.start)


# --- JSON lines -------------------------------------------------------------------------------------------------------------------

def _lines(path: Path, columns: Mapping[str, str]) -> Iterator[Chunk]:
    size = path.stat().st_size
    for start in range(0, size, CHUNK_BYTES):
        yield Chunk("lines", str(path), start, min(size, start + CHUNK_BYTES))


def _read_lines(chunk: Chunk) -> Iterator[RawRow]:
    """The lines that start within the byte range; the last may end beyond it."""
    with open(chunk.path, "rb") as file:
        if chunk.start > 0:
            file.seek(chunk.start - 1)
            _skip_line(file)
        while (place := file.tell()) < chunk.stop:
            line = file.readline(MAX_ROW_BYTES)
            where = f"{Path(chunk.path).name}, byte {place}"
            if len(line) == MAX_ROW_BYTES and not line.endswith(b"\n"):
                _skip_line(file)
                yield RawRow(where, Bad("row too large", snippet(line[:400])))
                continue
            if place == 0:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield RawRow(where, parse_object(line))


def _skip_line(file: BinaryIO) -> None:
    while (part := file.readline(1 << 20)) and not part.endswith(b"\n"):
        pass


def parse_object(line: bytes) -> Mapping[str, Any] | Bad:
    """One JSON object, or why it is none."""
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return Bad("not UTF-8", snippet(line))
    except (ValueError, RecursionError):
        return Bad("not JSON", snippet(line))
    return value if isinstance(value, dict) else Bad("not an object", snippet(line))


def snippet(raw: object, length: int = 200) -> str:
    """A short printable form of a row."""
    text = raw.decode("utf-8", "backslashreplace") if isinstance(raw, bytes) else raw if isinstance(raw, str) else repr(raw)
    text = text[: length + 1].encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= length else text[:length] + "…"


# --- JSON documents ---------------------------------------------------------------------------------------------------------------

_SPACE = re.compile(r"[ \t\r\n]*")


class _Json:
    """Values of a JSON document one after another, from a buffer that holds one value at a time."""

    def __init__(self, path: Path) -> None:
        self.path, self.file = path, open(path, encoding="utf-8-sig", errors="surrogateescape", newline="")  # noqa: SIM115
        self.text, self.at, self.done = "", 0, False
        self.dropped = 0
        self.decoder = json.JSONDecoder()

    def more(self) -> bool:
        """Read on; False at the end of the file."""
        # At least as much as is already waiting, so that a long value is tried a few times only.
        part = self.file.read(max(1 << 20, len(self.text) - self.at))
        self.dropped += self.at
        self.text, self.at, self.done = self.text[self.at :] + part, 0, not part
        return bool(part)

    def peek(self) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            match = _SPACE.match(self.text, self.at)
            self.at = match.end() if match else self.at
            if self.at < len(self.text) or not self.more():
                return self.text[self.at : self.at + 1]

    @property
    def place(self) -> int:
        """Characters read so far."""
        return self.dropped + self.at

    def skip(self, expected: str) -> None:
        found = self.peek()
        if found != expected or found == "":
            raise self.error(f"{expected!r} expected, {'the end' if not found else repr(found)} found")
        self.at += 1

    def value(self) -> Any:
        """The next whole value. A number at the very end of the buffer could go on, so one character must follow it."""
        self.peek()
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.at)
            except RecursionError:
                raise self.error("values are nested too deeply") from None
            except ValueError as error:
                if len(self.text) - self.at > MAX_ROW_BYTES:
                    raise self.error(f"a value is damaged or longer than {MAX_ROW_BYTES >> 20} MiB") from None
                if not self.more():
                    raise self.error(f"it is cut off or damaged ({error})") from None
            else:
                if end < len(self.text) or self.done:
                    self.at = end
                    return value
                self.more()

    def error(self, what: str) -> UserError:
        return UserError(f"{self.path} is not a readable JSON document: {what}. Give an array of objects, PubMedQA's published form "
                         "{id: {…}}, or one object a line (.jsonl).")

    def close(self) -> None:
        self.file.close()


def _first_object(path: Path) -> Any:
    """The object on the first line, if it is whole there and more follows: then the file is JSON lines."""
    with open(path, "rb") as file:
        line = file.readline(MAX_ROW_BYTES).removeprefix(b"\xef\xbb\xbf")
        rest = file.read(4096).strip()
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and rest else None


def _is_published_form(path: Path) -> bool:
    """Whether a .json file maps ids to rows with PubMedQA's columns."""
    if _first_object(path) is not None:
        return False
    document = _Json(path)
    try:
        if document.peek() != "{":
            return False
        document.skip("{")
        if document.peek() != '"':
            return False
        document.value()
        document.skip(":")
        row = document.value()
        return isinstance(row, dict) and {"QUESTION", "LONG_ANSWER"} <= set(row)
    except UserError:
        return False  # reported where the rows are read
    finally:
        document.close()


def _json(path: Path, columns: Mapping[str, str]) -> Iterator[Chunk]:
    if _first_object(path) is not None:
        yield from _lines(path, columns)
        return
    rows: list[RawRow] = []
    size = start = 0
    for row, length in _json_rows(path):
        rows.append(row)
        size += length
        if len(rows) == CHUNK_ROWS or size > CHUNK_BYTES:
            yield Chunk("rows", str(path), start, start + len(rows), rows)
            start, rows, size = start + len(rows), [], 0
    if rows:
        yield Chunk("rows", str(path), start, start + len(rows), rows)


def _json_rows(path: Path) -> Iterator[tuple[RawRow, int]]:
    """Rows of a document, with their length in characters."""
    document = _Json(path)
    try:
        opening = document.peek()
        if opening == "":
            return
        if opening not in "[{":
            raise document.error("it starts neither with [ nor with {")
        closing = "]" if opening == "[" else "}"
        document.skip(opening)
        number = 0
        while document.peek() != closing:
            if number:
                document.skip(",")
            key = str(number)
            if opening == "{":
                key = document.value()
                if not isinstance(key, str):
                    raise document.error("a key is not text")
                document.skip(":")
            before = document.place
            value = document.value()
            where = f"{path.name}, {'row' if opening == '[' else 'id'} {key}"
            if not isinstance(value, dict):
                if opening == "{":
                    raise document.error(f"the value of {snippet(key, 40)!r} is not an object")
                yield RawRow(where, Bad("not an object", snippet(value))), document.place - before
            else:
                # The published form has the id as key. A row's own id wins.
                yield RawRow(where, value if opening == "[" or "id" in value else {"id": key, **value}), document.place - before
            number += 1
        document.skip(closing)
        if document.peek() != "":
            raise document.error("something follows its end")
    finally:
        document.close()


# --- CSV --------------------------------------------------------------------------------------------------------------------------

def _csv(path: Path, columns: Mapping[str, str]) -> Iterator[Chunk]:
    if path.stat().st_size == 0:
        return
    csv.field_size_limit(MAX_ROW_BYTES)
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(_whole_lines(file, path), strict=True)
        rows: list[RawRow] = []
        size = start = 0
        header: list[str] = []
        while True:
            try:
                values = next(reader, None)
            except csv.Error as error:
                raise UserError(f"{path}, line {reader.line_num}: {error}. Check the quotes around there; fields with commas, quotes or "
                                "line breaks are written in double quotes, quotes inside them twice.") from None
            if values is None:
                break
            if not values:
                continue
            if not header:
                header = [name.strip() for name in values]
                if len(set(header)) < len(header):
                    raise UserError(f"{path}: the header line names a column twice: {', '.join(header)}.")
                resolve_columns(header, columns, path.name)
                continue
            where = f"{path.name}, line {reader.line_num}"
            if len(values) != len(header):
                rows.append(RawRow(where, Bad("wrong number of columns", snippet(",".join(values)))))
            else:
                rows.append(RawRow(where, dict(zip(header, values, strict=True))))
            size += sum(map(len, values))
            if len(rows) == CHUNK_ROWS or size > CHUNK_BYTES:
                yield Chunk("rows", str(path), start, start + len(rows), rows)
                start, rows, size = start + len(rows), [], 0
        if rows:
            yield Chunk("rows", str(path), start, start + len(rows), rows)


def _whole_lines(file: io.TextIOBase, path: Path) -> Iterator[str]:
    """Lines of bounded length."""
    while line := file.readline(MAX_ROW_BYTES):
        if len(line) == MAX_ROW_BYTES and not line.endswith("\n"):
            raise UserError(f"{path} has a line longer than {MAX_ROW_BYTES >> 20} MiB; it is hardly CSV.")
        yield line


# --- Parquet and Arrow ------------------------------------------------------------------------------------------------------------

def _parquet_file(path: Path) -> pq.ParquetFile:
    return _damaged(path, lambda: pq.ParquetFile(path, pre_buffer=False))


def _damaged(path: Path, action: Any) -> Any:
    try:
        return action()
    except (pa.ArrowException, OSError) as error:
        line = (str(error).strip().splitlines() or [""])[0][:200].rstrip(".")
        raise UserError(f"{path} is damaged, cut off or not {path.suffix[1:].capitalize()}: {line}. Write or copy it again.") from None


def _parquet(path: Path, columns: Mapping[str, str]) -> Iterator[Chunk]:
    if path.stat().st_size == 0:
        return
    with _parquet_file(path) as file:
        wanted = tuple(resolve_columns(file.schema_arrow.names, columns, path.name).values())
        first = 0
        for group in range(file.num_row_groups):
            meta = file.metadata.row_group(group)
            if meta.num_rows <= 2 * CHUNK_ROWS and meta.total_byte_size <= 8 * CHUNK_BYTES:
                yield Chunk("parquet", str(path), group, first, columns=wanted)
            else:  # too much for one chunk: decoded here in passing
                place = first
                batches = file.iter_batches(CHUNK_ROWS, row_groups=[group], columns=list(wanted), use_threads=False)
                while (batch := _damaged(path, lambda: next(batches, None))) is not None:  # noqa: B023
                    yield Chunk("batch", str(path), place, place + batch.num_rows, batch=batch)
                    place += batch.num_rows
            first += meta.num_rows


_ARROW: dict[Path, pa.Table] = {}


def _arrow(path: Path) -> pa.Table:
    """An Arrow stream file, mapped into memory."""
    if path not in _ARROW:
        _ARROW[path] = _damaged(path, lambda: pa.ipc.open_stream(pa.memory_map(str(path))).read_all())
    return _ARROW[path]


def _read_table(table: pa.Table, name: str, first: int) -> Iterator[RawRow]:
    keep = [i for i, column in enumerate(table.schema.names) if table.schema.names.index(column) == i]
    table = table.select(keep)
    for start in range(0, table.num_rows, 500):
        part = table.slice(start, 500)
        try:
            rows: list[Any] = part.to_pylist()
        except UnicodeDecodeError:
            rows = [_arrow_row(part, i) for i in range(part.num_rows)]
        except (pa.ArrowException, ValueError, OverflowError) as error:  # a type without a Python form
            rows = [Bad("wrong type", snippet(str(error)))] * part.num_rows
        for i, row in enumerate(rows):
            yield RawRow(f"{name}, row {first + start + i}", row)


def _arrow_row(table: pa.Table, index: int) -> Any:
    try:
        return table.slice(index, 1).to_pylist()[0]
    except UnicodeDecodeError as error:
        return Bad("not UTF-8", snippet(bytes(error.object)))


def _check_header(path: Path) -> None:
    """Refuse text files that are compressed or not UTF-8 as a whole, which would otherwise look like damaged rows."""
    if path.suffix == ".parquet":
        return
    with open(path, "rb") as file:
        head = file.read(4)
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"{path} is UTF-16. Convert it to UTF-8 (iconv -f utf-16 -t utf-8).")
    if head[:2] == b"\x1f\x8b" or head == b"PK\x03\x04" or head == b"\x28\xb5\x2f\xfd":
        raise UserError(f"{path} is compressed. Unpack it first.")
    if head == b"PAR1":
        raise UserError(f"{path} is Parquet. Give it the suffix .parquet.")
