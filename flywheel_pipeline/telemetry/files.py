"""Reading telemetry files, record by record in bounded memory: NDJSON, CSV and Parquet.

Belongs here: where a record begins and ends, its line number, and its translation to the one JSON form that
the contract reads. Does not belong here: what a valid record is (`contract`) and the database (`intake`).
"""

from __future__ import annotations

import csv
import math
import re
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

import pydantic_core
import sqlalchemy as sa

from flywheel_pipeline.database.tables import execution_telemetry
from flywheel_pipeline.errors import UsageError
from flywheel_pipeline.telemetry.blocks import Line, RawBlock, cut, read_lines
from flywheel_pipeline.telemetry.contract import (
    FLAT_COLUMNS,
    JSON_COLUMNS,
    LINE_LIMIT_BYTES,
    MADE_COLUMNS,
    REQUIRED_COLUMNS,
    ParsedRow,
    Reject,
    parse_line,
    too_long,
)
from flywheel_pipeline.telemetry.encoding import Encoder, encoder
from flywheel_pipeline.telemetry.landing import TYPES
from flywheel_pipeline.telemetry.parsers import parsers, process_count
from flywheel_pipeline.telemetry.rejects import RefusedRow

if TYPE_CHECKING:
    import pyarrow as pa

#: NDJSON files from this size on are parsed by processes: these take 0.6 s of CPU to start, the lines as much.
PROCESSES_FROM_BYTES: Final = 24 << 20
_BUFFER_BYTES: Final = 1 << 20
_PARQUET_ROWS: Final = 4_096

_BOOLEANS: Final = {"t": True, "true": True, "1": True, "f": False, "false": False, "0": False}
_INTEGER: Final = re.compile(r"[+-]?\d{1,19}")
_NUMBER: Final = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?")
_SHORT_OFFSET: Final = re.compile(r":\d\d(\.\d+)?[+-]\d\d$")
_TYPES: Final[Mapping[str, sa.types.TypeEngine[Any]]] = {
    name: execution_telemetry.c[name].type for name in FLAT_COLUMNS
}


@dataclass(slots=True)
class Record:
    """One record of a file: its bytes and what the contract made of them.

    `payload` is what a retry would read again (for CSV and Parquet rows: the row as a JSON object);
    `fraction` is the share of the file read so far, in [0, 1].
    """

    line_number: int
    payload: bytes
    outcome: ParsedRow | Reject
    fraction: float
    payload_bytes: int | None = None
    payload_hash: str | None = None

    def refused(self, reject: Reject) -> RefusedRow:
        """The record as a refused row."""
        if self.payload_bytes is None or self.payload_hash is None:
            return RefusedRow.of(self.line_number, reject, self.payload)
        return RefusedRow(self.line_number, reject, self.payload, self.payload_bytes, self.payload_hash)


@dataclass(slots=True)
class Block:
    """Consecutive records of a file: of good ones id, encoded row and line number, and the refused ones.

    `payload(position)` gives the bytes of a good row; `payload_bytes` is their length together; `fraction` is the share
    of the file read so far, in [0, 1].
    """

    execution_ids: list[str]
    rows: list[bytes]
    line_numbers: list[int]
    refused: list[RefusedRow]
    payload: Callable[[int], bytes]
    payload_bytes: int
    fraction: float

    @property
    def records(self) -> int:
        """The number of records, good and refused."""
        return len(self.rows) + len(self.refused)


def read_blocks(
    path: Path, received_at: datetime, *, most_records: int, most_bytes: int
) -> Generator[Block, None, None]:
    """Read a telemetry file by its suffix: .ndjson and .jsonl, .csv, .parquet.

    Blank lines are no records. `received_at` (aware) is the clock of the contract. A block holds at most
    `most_records`, and payloads of `most_bytes` and one record.

    Raises UsageError, before the first block, for a file that is missing, unreadable, of an unknown kind, or
    whose header does not fit.
    """
    reader = _READERS.get(path.suffix.lower())
    if not path.exists():
        raise UsageError(f"There is no file {path}.")
    if not path.is_file():
        raise UsageError(f"{path} is not a file.")
    if reader is None and path.suffix.lower() not in _NDJSON:
        raise UsageError(
            f"{path.name} has the unknown suffix {path.suffix!r}.",
            hint="Telemetry comes as .ndjson or .jsonl (one JSON object a line), .csv or .parquet.",
        )
    try:
        with path.open("rb", buffering=_BUFFER_BYTES) as file:
            if reader is None:
                blocks = _read_ndjson(file, path, received_at, most_records)
            else:
                blocks = _grouped(reader(file, path, received_at), most_records, most_bytes)
            with closing(blocks):
                yield from blocks
    except PermissionError as error:
        raise UsageError(f"{path} may not be read by this user.") from error


def _grouped(records: Iterator[Record], most_records: int, most_bytes: int) -> Generator[Block, None, None]:
    """Records one by one, parsed in this process, as blocks."""
    encode = encoder(TYPES)
    held: list[Record] = []
    held_bytes = 0
    for item in records:
        held.append(item)
        held_bytes += len(item.payload)
        if len(held) >= most_records or held_bytes >= most_bytes:
            yield _block(held, held_bytes, encode)
            held, held_bytes = [], 0
    if held:
        yield _block(held, held_bytes, encode)


def _block(records: Iterable[Record], payload_bytes: int, encode: Encoder) -> Block:
    payloads: list[bytes] = []
    block = Block([], [], [], [], payloads.__getitem__, payload_bytes, 0.0)
    for item in records:
        outcome: bytes | Reject
        if isinstance(item.outcome, ParsedRow):
            outcome = encode(item.outcome.values)
            if isinstance(outcome, bytes):
                block.execution_ids.append(item.outcome.execution_id)
                block.rows.append(outcome)
                block.line_numbers.append(item.line_number)
                payloads.append(item.payload)
        else:
            outcome = item.outcome
        if isinstance(outcome, Reject):
            block.refused.append(item.refused(outcome))
        block.fraction = item.fraction
    return block


# --------------------------------------------------------------------------------------------------
# NDJSON
# --------------------------------------------------------------------------------------------------


def _read_ndjson(file: IO[bytes], path: Path, received_at: datetime, most_records: int) -> Generator[Block, None, None]:
    size = max(path.stat().st_size, 1)
    processes = process_count() if size >= PROCESSES_FROM_BYTES else 0
    with parsers(file, received_at, TYPES, processes) as team:
        for raw, parsed in team.parse(cut(file, most_records)):
            refused = [
                RefusedRow(number, Reject(code, reason), payload, length, digest)
                for number, code, reason, payload, length, digest in parsed.refused
            ]
            fraction = min(raw.end / size, 1.0)
            payload = partial(_payload, raw, parsed.line_numbers, {})
            yield Block(
                parsed.execution_ids, parsed.rows, parsed.line_numbers, refused, payload, len(raw.data), fraction
            )


def _payload(block: RawBlock, line_numbers: list[int], known: dict[int, bytes], position: int) -> bytes:
    if not known:
        known.update(block.payloads())
    return known[line_numbers[position]]


# --------------------------------------------------------------------------------------------------
# CSV
# --------------------------------------------------------------------------------------------------


def _read_csv(file: IO[bytes], path: Path, received_at: datetime) -> Iterator[Record]:
    size = max(path.stat().st_size, 1)
    csv.field_size_limit(max(csv.field_size_limit(), LINE_LIMIT_BYTES))  # of the process: 128 KiB by default
    lines = _Lines(file)
    header = _csv_header(lines, path)
    while (line := lines.take()) is not None:
        number, raw, whole = line
        fraction = min(file.tell() / size, 1.0)
        if whole is not None:
            yield Record(number, raw, too_long(whole[0]), fraction, *whole)
        elif not raw.isspace():
            group = [line, *_continuation(lines, raw)]
            record = b"".join(part for _, part, _ in group)
            fields = _csv_fields(record, len(header))
            if isinstance(fields, Reject):
                # Its quotes may belong to no record at all: give up one line, and read the others anew.
                lines.put_back(group[1:])
                yield Record(number, raw.rstrip(b"\r\n"), fields, fraction)
            else:
                payload, outcome = _csv_outcome(record, header, fields, number, received_at)
                yield Record(number, payload, outcome, fraction)


class _Lines:
    """The physical lines of a file, with a place for lines that have to be read again."""

    def __init__(self, file: IO[bytes]) -> None:
        self._lines = read_lines(file)
        self._again: deque[Line] = deque()

    def take(self) -> Line | None:
        return self._again.popleft() if self._again else next(self._lines, None)

    def put_back(self, lines: list[Line]) -> None:
        self._again.extendleft(reversed(lines))


def _continuation(lines: _Lines, raw: bytes) -> list[Line]:
    """The further lines of a record with line breaks inside quotes; empty where its quotes do not close."""
    group: list[Line] = []
    quotes, length = raw.count(b'"'), len(raw)
    while quotes % 2:
        line = lines.take()
        if line is not None:
            group.append(line)
            quotes += line[1].count(b'"')
            length += len(line[1])
        if line is None or line[2] is not None or length > LINE_LIMIT_BYTES:
            lines.put_back(group)
            return []
    return group


def _csv_header(lines: _Lines, path: Path) -> list[str]:
    line = lines.take()
    if line is None:
        raise UsageError(f"{path.name} is empty: a CSV file begins with a header of column names.")
    try:
        text = line[1].decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"The header of {path.name} is not UTF-8.") from error
    header = [name.strip() for name in next(csv.reader([text]), [])]
    _require_columns(header, path)
    return header


def _require_columns(columns: list[str], path: Path) -> None:
    """Refuse a file whose columns do not fit, before any row of it is read."""
    unknown = sorted(set(columns) - FLAT_COLUMNS - MADE_COLUMNS)
    missing = sorted(REQUIRED_COLUMNS - set(columns))
    twice = sorted({name for name in columns if columns.count(name) > 1})
    problems = [
        f"{words} {', '.join(map(repr, names))}"
        for words, names in (("unknown", unknown), ("missing", missing), ("given twice:", twice))
        if names
    ]
    if problems:
        raise UsageError(
            f"The columns of {path.name} do not fit the telemetry contract: {'; '.join(problems)}.",
            hint="Columns are those of execution_telemetry; nothing was imported.",
        )


def _csv_fields(record: bytes, width: int) -> list[str] | Reject:
    text = record.decode(errors="surrogateescape")
    complete = record.endswith(b"\n")
    if record.count(b'"') % 2:
        return Reject("invalid_csv" if complete else "truncated", "a quoted field does not end")
    try:
        fields = next(csv.reader([text], strict=True))
    except csv.Error as error:
        return Reject("invalid_csv", str(error))
    if len(fields) != width:
        code = "wrong_field_count" if complete else "truncated"
        return Reject(code, f"{len(fields)} fields where the header has {width}")
    return fields


def _csv_outcome(
    record: bytes, header: list[str], fields: list[str], number: int, received_at: datetime
) -> tuple[bytes, ParsedRow | Reject]:
    try:
        record.decode()
    except UnicodeDecodeError as error:
        reason = f"byte {error.start + 1} is not UTF-8 ({record[error.start]:#04x})"
        return record, Reject("invalid_utf8", reason)
    row: dict[str, Any] = {}
    for name, text in zip(header, fields, strict=True):
        if text and name not in MADE_COLUMNS:
            try:
                row[name] = _from_text(name, text)
            except ValueError as error:
                return record, Reject("wrong_type", f"{name} must be JSON ({error}): {text[:80]!r}")
    payload = pydantic_core.to_json(row)
    return payload, parse_line(payload, number, received_at=received_at)


def _from_text(name: str, text: str) -> Any:
    """The value that a CSV cell means, or the text itself where it means none (the contract says why).

    Raises ValueError for a cell of a JSON column that is no JSON.
    """
    column = _TYPES[name]
    if name in JSON_COLUMNS:
        return pydantic_core.from_json(text)
    if isinstance(column, sa.Boolean):
        return _BOOLEANS.get(text.lower(), text)
    if isinstance(column, sa.Integer):
        return int(text) if _INTEGER.fullmatch(text) else text
    if isinstance(column, sa.Double):
        return float(text) if _NUMBER.fullmatch(text) else text
    if isinstance(column, sa.TIMESTAMP) and _SHORT_OFFSET.search(text):
        return f"{text}:00"  # PostgreSQL writes +00, ISO 8601 as the contract reads it +00:00
    return text


# --------------------------------------------------------------------------------------------------
# Parquet
# --------------------------------------------------------------------------------------------------


def _read_parquet(file: IO[bytes], path: Path, received_at: datetime) -> Iterator[Record]:
    import pyarrow as pa  # 60 ms and 40 MB: only where a Parquet file is read
    import pyarrow.parquet as pq

    number = 0
    try:
        parquet = pq.ParquetFile(file)
        columns = list(parquet.schema_arrow.names)
        _require_columns(columns, path)
        total = max(parquet.metadata.num_rows, 1)
        wanted = [name for name in columns if name not in MADE_COLUMNS]
        for batch in parquet.iter_batches(batch_size=_PARQUET_ROWS, columns=wanted):
            for row in _parquet_rows(_microseconds(batch)):
                number += 1
                payload, outcome = _parquet_outcome(row, number, received_at)
                yield Record(number, payload, outcome, number / total)
    except (pa.ArrowException, OSError) as error:
        raise UsageError(
            f"{path.name} cannot be read as Parquet after row {number}: {str(error).splitlines()[0]}",
            hint="What was read before is imported; importing a repaired file again repeats nothing.",
        ) from error


def _microseconds(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Timestamps in microseconds, PostgreSQL's unit; pandas writes nanoseconds."""
    import pyarrow as pa

    for index, field in enumerate(batch.schema):
        if pa.types.is_timestamp(field.type) and field.type.unit == "ns":
            unit = pa.timestamp("us", tz=field.type.tz)
            cast = batch.column(index).cast(unit, safe=False)
            batch = batch.set_column(index, field.with_type(unit), cast)
    return batch


def _parquet_rows(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | UnicodeDecodeError]:
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for index in range(batch.num_rows):
            try:
                yield batch.slice(index, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                yield error


def _parquet_outcome(
    row: dict[str, Any] | UnicodeDecodeError, number: int, received_at: datetime
) -> tuple[bytes, ParsedRow | Reject]:
    if isinstance(row, UnicodeDecodeError):
        raw = bytes(row.object)
        return raw, Reject("invalid_utf8", f"{raw[:80]!r} is not UTF-8 from byte {row.start + 1} on")
    values: dict[str, Any] = {}
    for name, value in row.items():
        try:
            plain = _from_arrow(name, value)
        except ValueError as error:
            payload = pydantic_core.to_json([str(cell) for cell in row.values()])
            return payload, Reject("wrong_type", f"{name} must be JSON ({error}): {str(value)[:80]!r}")
        if plain is not None:
            values[name] = plain
    payload = pydantic_core.to_json(values, inf_nan_mode="constants", bytes_mode="base64", fallback=str)
    return payload, parse_line(payload, number, received_at=received_at)


def _from_arrow(name: str, value: Any) -> Any:
    """A Parquet value as the contract reads it: pandas writes a missing number as NaN and 2 as 2.0."""
    if isinstance(value, float) and math.isnan(value):
        return None
    if name in JSON_COLUMNS:
        return pydantic_core.from_json(value) if isinstance(value, str) and value else value or None
    if isinstance(_TYPES[name], sa.Integer) and isinstance(value, float) and value.is_integer():
        return int(value)
    return value


_NDJSON: Final = frozenset({".ndjson", ".jsonl"})
_READERS: Final[Mapping[str, Callable[[IO[bytes], Path, datetime], Iterator[Record]]]] = {
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
