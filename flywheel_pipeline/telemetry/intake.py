"""Intake: the one way in for telemetry, as single posts and as NDJSON, CSV and Parquet files.

Belongs here: carrying records through the contract into the database and saying what became of each. Does not
belong here: file formats (`files`), the contract (`contract`), the SQL of landing (`landing`).

Every row that is read ends in exactly one of: inserted, corrected, unchanged, rejected. Doing it again, in
any order and in any pieces, leaves the same rows.
"""

from __future__ import annotations

import json
import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, Final, Literal

import psycopg
import sqlalchemy as sa

from flywheel_pipeline.errors import DatabaseUnavailable, SchemaMismatch
from flywheel_pipeline.telemetry.contract import LINE_LIMIT_BYTES, ParsedRow, Reject, parse_line
from flywheel_pipeline.telemetry.files import Block, read_blocks
from flywheel_pipeline.telemetry.landing import land, land_encoded
from flywheel_pipeline.telemetry.rejects import RefusedRow, record

#: A chunk is one transaction: at most so many records, and so many bytes of them. Two are held in memory.
CHUNK_RECORDS: Final = 20_000
CHUNK_BYTES: Final = 16 << 20
#: So many ids of rejects a report carries; the table has them all.
REPORTED_IDS: Final = 1_000

Progress = Callable[[int, float], None]
Outcome = Literal["inserted", "corrected", "unchanged", "rejected"]


@dataclass(slots=True)
class IntakeReport:
    """What became of the records of one source: read = inserted + corrected + unchanged + rejected.

    `superseded` counts those of the unchanged that are older than the version that stands; `reasons` counts
    rejects by reason code; `reject_ids` are the first REPORTED_IDS of them.
    """

    source: str
    read: int = 0
    inserted: int = 0
    corrected: int = 0
    unchanged: int = 0
    superseded: int = 0
    rejected: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    reject_ids: list[int] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return {
            "source": self.source,
            "read": self.read,
            "inserted": self.inserted,
            "corrected": self.corrected,
            "unchanged": self.unchanged,
            "superseded": self.superseded,
            "rejected": self.rejected,
            "reasons": dict(self.reasons.most_common()),
            "reject_ids": list(self.reject_ids),
        }


@dataclass(frozen=True, slots=True)
class PostResult:
    """What became of one post; the last three are set for a rejected one only."""

    outcome: Outcome
    execution_id: str | None
    reason_code: str | None = None
    reason: str | None = None
    reject_id: int | None = None


def import_file(
    engine: sa.Engine,
    path: str | Path,
    *,
    source: str | None = None,
    received_at: datetime | None = None,
    progress: Progress | None = None,
) -> IntakeReport:
    """Import a telemetry file (.ndjson, .jsonl, .csv, .parquet) and say what became of its records.

    `source` names the file in the rejects (default: its name). `received_at` (aware; default: now) is the
    clock of the contract and the arrival of rows without a `reported_at`. `progress(records, fraction)` is
    called after each chunk. Chunks commit one by one: an interrupted import is finished by importing the file
    again.

    Raises UsageError when the file as a whole cannot be read; SchemaMismatch and DatabaseUnavailable when the
    database is not ready. Bad rows raise nothing: they are in the rejects.
    """
    path = Path(path)
    received_at = received_at or datetime.now(UTC)
    report = IntakeReport(source or os.fsencode(path.name).decode(errors="replace"))
    # One chunk lands in a thread, which mostly waits for PostgreSQL, while the next one is read.
    blocks = read_blocks(path, received_at, most_records=CHUNK_RECORDS, most_bytes=CHUNK_BYTES)
    with closing(blocks), ThreadPoolExecutor(1, thread_name_prefix="flywheel-intake") as pool:
        landing: Future[float] | None = None
        for chunk in _chunks(blocks):
            if landing is not None:
                _tell(progress, report, landing.result())
            landing = pool.submit(_land_chunk, engine, chunk, received_at, report)
        if landing is not None:
            landing.result()
    _tell(progress, report, 1.0)
    return report


def _tell(progress: Progress | None, report: IntakeReport, fraction: float) -> None:
    if progress:
        progress(report.read, fraction)


@dataclass(slots=True)
class _Chunk:
    """Records to land in one transaction: whole blocks, and where in the chunk each of them begins."""

    execution_ids: list[str] = field(default_factory=list)
    rows: list[bytes] = field(default_factory=list)
    refused: list[RefusedRow] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    begins: list[int] = field(default_factory=list)
    records: int = 0
    payload_bytes: int = 0

    def add(self, block: Block) -> None:
        """Append a block."""
        self.blocks.append(block)
        self.begins.append(len(self.rows))
        self.execution_ids += block.execution_ids
        self.rows += block.rows
        self.refused += block.refused
        self.records += block.records
        self.payload_bytes += block.payload_bytes

    def refuse(self, position: int, reject: Reject) -> None:
        """Count the row at `position` among the refused ones."""
        number = bisect_right(self.begins, position) - 1
        block, position = self.blocks[number], position - self.begins[number]
        self.refused.append(RefusedRow.of(block.line_numbers[position], reject, block.payload(position)))


def _chunks(blocks: Iterable[Block]) -> Iterator[_Chunk]:
    chunk = _Chunk()
    for block in blocks:
        if chunk.records and (
            chunk.records + block.records > CHUNK_RECORDS or chunk.payload_bytes + block.payload_bytes > CHUNK_BYTES
        ):
            yield chunk
            chunk = _Chunk()
        chunk.add(block)
    if chunk.records:
        yield chunk


def post_execution(
    engine: sa.Engine,
    payload: Mapping[str, Any] | bytes,
    *,
    received_at: datetime | None = None,
    source: str = "http",
) -> PostResult:
    """Take in one post, as an agent sends it: `{"site_id", "reported_at", "execution": {...}}`.

    `received_at` (aware; default: now) is its arrival. A rejected post is recorded under `source`.
    Raises SchemaMismatch and DatabaseUnavailable as `import_file` does.
    """
    received_at = received_at or datetime.now(UTC)
    raw = payload if isinstance(payload, bytes) else json.dumps(payload, default=_plain).encode()
    parsed = parse_line(raw, None, received_at=received_at, live=True)
    with _transaction(engine) as connection:
        if isinstance(parsed, ParsedRow):
            landed = land(connection, [parsed])
            if not landed.refused:
                outcome: Outcome = "unchanged"
                if landed.inserted:
                    outcome = "inserted"
                elif landed.corrected:
                    outcome = "corrected"
                return PostResult(outcome, parsed.execution_id)
            reject = landed.refused[0]
        else:
            reject = parsed
        full = RefusedRow.of(None, reject, raw)
        cut = RefusedRow(None, reject, raw[:LINE_LIMIT_BYTES], full.payload_bytes, full.payload_hash)
        (reject_id,) = record(connection, source, received_at, [cut])
    execution_id = parsed.execution_id if isinstance(parsed, ParsedRow) else None
    return PostResult("rejected", execution_id, reject.reason_code, reject.reason, reject_id)


def _land_chunk(engine: sa.Engine, chunk: _Chunk, received_at: datetime, report: IntakeReport) -> float:
    """Land one chunk in one transaction, add it to the report, and return the share of the file that is in."""
    with _transaction(engine) as connection:
        landed = land_encoded(connection, chunk.execution_ids, chunk.rows)
        for position, reject in landed.refused.items():
            chunk.refuse(position, reject)
        ids = record(connection, report.source, received_at, chunk.refused)
    report.read += chunk.records
    report.inserted += landed.inserted
    report.corrected += landed.corrected
    report.unchanged += landed.repeated + landed.superseded
    report.superseded += landed.superseded
    report.rejected += len(chunk.refused)
    report.reasons.update(row.reject.reason_code for row in chunk.refused)
    report.reject_ids += ids[: max(REPORTED_IDS - len(report.reject_ids), 0)]
    return chunk.blocks[-1].fraction


@contextmanager
def _transaction(engine: sa.Engine) -> Iterator[psycopg.Connection[Any]]:
    """One transaction on a psycopg connection, with plain words for a database that is not ready."""
    try:
        with engine.begin() as connection:
            driver = connection.connection.driver_connection
            if not isinstance(driver, psycopg.Connection):
                raise TypeError(f"intake needs the psycopg driver, not {type(driver).__name__}")
            yield driver
    except psycopg.errors.UndefinedTable as error:
        raise SchemaMismatch(
            "The database has no telemetry tables.", hint="Run `flywheel db upgrade` first."
        ) from error
    except (psycopg.OperationalError, sa.exc.OperationalError) as error:
        first = str(error).strip().partition("\n")[0]
        raise DatabaseUnavailable(
            f"The database went away during the import: {first}",
            hint="Import again when it is back; what has landed is recognised.",
        ) from error


def _plain(value: object) -> str:
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, Decimal):
        return str(value)
    raise TypeError(f"a post holds JSON values, not {type(value).__name__}")
