"""The auditor's export: decisions, ledger and certificates as Parquet, and a manifest of what each file must hash to.

Belongs here: which tables, in which columns and order, written so that the same rows give the same bytes; and holding a
directory against its manifest. Does not belong here: judging what the rows say; the certificates alone are recomputed,
since that needs no database.

Same bytes: rows stand in the order of their keys, JSON is canonical text, the writer's options are fixed, and neither a
file nor the manifest holds a time of writing, a host or a path. The format of Parquet files is that of the pinned
pyarrow: another release of it may write other bytes for the same rows, so the manifest names the writer.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import sqlalchemy as sa

from flywheel_pipeline import __version__
from flywheel_pipeline.database import declared
from flywheel_pipeline.errors import FlywheelError, SchemaMismatch, UsageError
from flywheel_pipeline.promotion import certificate
from flywheel_pipeline.promotion.policy import canonical
from flywheel_pipeline.report.snapshot import Period, snapshot, within_time

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT: Final = "flywheel-audit/1"
MANIFEST: Final = "manifest.json"
ROWS_A_GROUP: Final = 5_000  # of one row group: bounds the memory of an export, and is part of the bytes

# Column types: whole numbers, text, UTC microseconds, and JSON as canonical text.
_INT, _TEXT, _STAMP, _JSON = "int64", "string", "timestamp[us, UTC]", "json"


@dataclass(frozen=True)
class _File:
    name: str
    query: str
    columns: Mapping[str, str]


def _table(name: str, table: str, order: str, at: str, columns: Mapping[str, str], where: str = "true") -> _File:
    # Names are those of this module, never of a caller.
    query = f"SELECT {', '.join(columns)} FROM {table} WHERE {where} AND {within_time(at)} ORDER BY {order}"  # noqa: S608
    return _File(f"{name}.parquet", query, columns)


FILES: Final = (
    _table(
        "decisions",
        "promotion_decisions",
        "decision_id",
        "decided_at",
        {
            "decision_id": _INT,
            "batch_id": _INT,
            "run_id": _TEXT,
            "decided_at": _STAMP,
            "subject_kind": _TEXT,
            "subject_id": _TEXT,
            "policy_name": _TEXT,
            "policy_hash": _TEXT,
            "verdict": _TEXT,
            "reason": _TEXT,
            "gates": _JSON,
            "evidence": _JSON,
            "decision_hash": _TEXT,
            "confirmed_batch_id": _INT,
        },
    ),
    _table(
        "ledger",
        "rule_events",
        "event_id",
        "occurred_at",
        {
            "event_id": _INT,
            "occurred_at": _STAMP,
            "rule_id": _TEXT,
            "rule_version": _INT,
            "kind": _TEXT,
            "from_state": _TEXT,
            "to_state": _TEXT,
            "definition": _JSON,
            "content_hash": _TEXT,
            "actor": _TEXT,
            "reason": _TEXT,
            "policy_hash": _TEXT,
            "decision_id": _INT,
            "batch_id": _INT,
            "run_id": _TEXT,
        },
    ),
    _table(
        "certificates",
        "rule_events",
        "event_id",
        "occurred_at",
        {"event_id": _INT, "rule_id": _TEXT, "rule_version": _INT, "certificate": _JSON},
        where="certificate IS NOT NULL AND jsonb_typeof(certificate) <> 'null'",
    ),
    _table(
        "human_acts",
        "human_acts",
        "act_id",
        "acted_at",
        {
            "act_id": _INT,
            "acted_at": _STAMP,
            "act": _TEXT,
            "subject_kind": _TEXT,
            "subject_id": _TEXT,
            "actor": _TEXT,
            "reason": _TEXT,
        },
    ),
    _table(
        "policy_activations",
        "policy_activations",
        "id",
        "activated_at",
        {"id": _INT, "activated_at": _STAMP, "policy_name": _TEXT, "as_of": _STAMP, "actor": _TEXT, "reason": _TEXT},
    ),
    _table(
        "gate_verdicts",
        "gate_verdicts",
        'batch_id, gate COLLATE "C"',
        "decided_at",
        {
            "batch_id": _INT,
            "gate": _TEXT,
            "verdict": _TEXT,
            "sentence": _TEXT,
            "offenders": _INT,
            "details": _JSON,
            "decided_at": _STAMP,
        },
    ),
)


@dataclass(frozen=True)
class Export:
    """What was written: rows by file, and the hash to note elsewhere, since a manifest cannot vouch for itself."""

    directory: str
    rows: dict[str, int]
    bytes: int
    manifest_sha256: str


@dataclass(frozen=True)
class Verification:
    """What a directory was found to be: its manifest's own hash, its rows, and what differs (nothing if it is whole)."""

    manifest_sha256: str
    rows: int
    certificates: int
    problems: tuple[str, ...]


def export(
    engine: sa.Engine,
    directory: Path,
    period: Period,
    *,
    force: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Export:
    """Write the export of a period, by the times at which things were decided, done or entered in the ledger.

    Everything is read in one snapshot. The files appear together, when all are whole.

    Args:
        engine: the database, at the schema of this release.
        directory: made if it is not there; one that holds anything is refused.
        period: days, UTC.
        force: replace an earlier export there; a directory that holds anything else is refused even so.
        progress: called with the name of each file before it is written.

    Raises:
        UsageError: the directory is not empty, or cannot be made.
        SchemaMismatch: the database holds no Flywheel schema.
        FlywheelError: a row cannot be written exactly.
    """
    directory = directory.expanduser().resolve()
    _refuse(directory, force=force)
    partial = directory.with_name(f".{directory.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(mode=0o700)
    except OSError as error:
        raise UsageError(
            f"{directory} cannot be written: {error.strerror}.", hint="Name another directory, or make its parent."
        ) from error
    try:
        rows = _write(engine, partial, period, progress)
        for path in partial.iterdir():
            _sync(path)
        size = sum(path.stat().st_size for path in partial.iterdir())
        digest = _sha256(partial / MANIFEST)
        if directory.exists():
            # Without its manifest a half-replaced directory is no export, and verify says so.
            (directory / MANIFEST).unlink(missing_ok=True)
            for path in sorted(partial.iterdir(), key=lambda path: path.name == MANIFEST):
                path.replace(directory / path.name)
            partial.rmdir()
        else:
            partial.rename(directory)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return Export(str(directory), rows, size, digest)


def _refuse(directory: Path, *, force: bool) -> None:
    if directory.exists() and not directory.is_dir():
        raise UsageError(f"{directory} is a file.", hint="An export is a directory: name another.")
    found = sorted(path.name for path in directory.iterdir()) if directory.exists() else []
    if found and not force:
        raise UsageError(
            f"{directory} is not empty.", hint="Name another directory; --force replaces an earlier export."
        )
    ours = {MANIFEST, *(file.name for file in FILES)}
    strange = [name for name in found if name not in ours]
    if strange:
        raise UsageError(
            f"{directory} holds {strange[0]}, which is of no export.", hint="--force replaces nothing but an export."
        )


def _write(
    engine: sa.Engine, directory: Path, period: Period, progress: Callable[[str], None] | None
) -> dict[str, int]:
    import pyarrow as pa

    described: dict[str, Any] = {}
    with snapshot(engine) as connection:
        revision = declared.revision(connection)
        if revision is None:
            raise SchemaMismatch("The database holds no Flywheel schema.", hint="There is nothing to export here.")
        for file in FILES:
            if progress is not None:
                progress(file.name)
            rows = _write_parquet(connection, file, directory / file.name, period)
            described[file.name] = {
                "sha256": _sha256(directory / file.name),
                "bytes": (directory / file.name).stat().st_size,
                "rows": rows,
                "columns": dict(file.columns),
            }
    document = {
        "format": FORMAT,
        "release": __version__,
        "schema_revision": revision,
        "writer": f"pyarrow {pa.__version__}",
        "period": {
            "from": period.since.isoformat() if period.since else None,
            "to": period.until.isoformat() if period.until else None,
        },
        "files": described,
    }
    (directory / MANIFEST).write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", "utf-8", newline="\n")
    for path in directory.iterdir():
        path.chmod(0o600)  # names of those who decided: for nobody else's eyes
    return {name: entry["rows"] for name, entry in described.items()}


def _write_parquet(connection: sa.Connection, file: _File, path: Path, period: Period) -> int:
    import pyarrow.parquet as pq

    schema = _schema(file)
    total = 0
    with pq.ParquetWriter(
        path,
        schema,
        version="2.6",
        compression="zstd",
        compression_level=3,
        use_dictionary=False,
        write_statistics=True,
        data_page_version="1.0",
        store_schema=False,
    ) as writer:
        for batch in _batches(connection, file, schema, period):
            total += batch.num_rows
            writer.write_table(batch, row_group_size=ROWS_A_GROUP)
    return total


def _schema(file: _File) -> pa.Schema:
    import pyarrow as pa

    types = {_INT: pa.int64(), _TEXT: pa.string(), _JSON: pa.string(), _STAMP: pa.timestamp("us", tz="UTC")}
    return pa.schema([pa.field(name, types[kind]) for name, kind in file.columns.items()])


def _batches(connection: sa.Connection, file: _File, schema: pa.Schema, period: Period) -> Iterator[pa.Table]:
    import pyarrow as pa

    kinds = list(file.columns.items())
    result = connection.execution_options(yield_per=ROWS_A_GROUP).execute(sa.text(file.query), period.bounds)
    for rows in result.partitions():
        columns = []
        for place, (name, kind) in enumerate(kinds):
            values = [row[place] for row in rows]
            if kind == _JSON:
                values = [None if value is None else _canonical(value, file.name, name) for value in values]
            columns.append(pa.array(values, schema.field(place).type))
        yield pa.Table.from_arrays(columns, schema=schema)


def _canonical(value: Any, file: str, column: str) -> str:
    try:
        return canonical(value)
    except ValueError as error:
        raise FlywheelError(f"A value of {column} for {file} is no JSON: {error}.") from error


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(directory: Path, *, expected: str | None = None) -> Verification:
    """Hold a directory against its manifest, and recompute every certificate in it. Needs no database.

    Args:
        directory: an export.
        expected: SHA-256 of the manifest as noted when it was exported; without it, whoever changes a file and the
            manifest alike is not found out.

    Raises:
        UsageError: there is no such directory, or no manifest in it.
    """
    directory = directory.expanduser().resolve()
    if not directory.is_dir():
        raise UsageError(f"There is no directory {directory}.")
    path = directory / MANIFEST
    if not path.is_file():
        raise UsageError(f"{directory} holds no {MANIFEST}.", hint="It is no export, or one that was broken off.")
    digest = _sha256(path)
    problems = []
    if expected is not None and expected.strip().lower() != digest:
        problems.append(f"{MANIFEST}: its SHA-256 is {digest}, not the one expected")
    try:
        document = json.loads(path.read_bytes())
        if document["format"] != FORMAT:
            problems.append(f"{MANIFEST}: its format is {document['format']!r}, not {FORMAT!r}")
            return Verification(digest, 0, 0, tuple(problems))
        files = {
            str(name): (str(e["sha256"]), int(e["bytes"]), int(e["rows"]), dict(e["columns"]))
            for name, e in document["files"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return Verification(
            digest, 0, 0, (*problems, f"{MANIFEST}: it cannot be read ({type(error).__name__}: {error})")
        )
    wanted = {file.name: file for file in FILES}
    problems += [f"{name}: the manifest does not name it" for name in sorted(set(wanted) - set(files))]
    problems += [f"{name}: no file of an export has this name" for name in sorted(set(files) - set(wanted))]
    present = {entry.name for entry in directory.iterdir()}
    problems += [f"{name}: it is not of this export" for name in sorted(present - set(files) - {MANIFEST})]
    rows = certificates = 0
    for name in sorted(set(files) & set(wanted)):
        found, counted, checked = _differences(directory / name, wanted[name], *files[name])
        problems += [f"{name}: {problem}" for problem in found]
        rows += counted
        certificates += checked
    return Verification(digest, rows, certificates, tuple(problems))


def _differences(
    path: Path, file: _File, sha256: str, size: int, rows: int, columns: dict[str, str]
) -> tuple[list[str], int, int]:
    """Return what differs, the rows, and the certificates recomputed."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.is_symlink() or not path.is_file():
        return ["it is missing"], 0, 0
    if path.stat().st_size != size:
        return [f"it has {path.stat().st_size:,} bytes, not {size:,}"], 0, 0
    if _sha256(path) != sha256:
        return ["its SHA-256 is not that of the manifest: it was changed"], 0, 0
    problems = []
    if columns != dict(file.columns):
        problems.append("the manifest claims other columns than this release writes")
    try:
        with pq.ParquetFile(path) as parquet:
            counted = parquet.metadata.num_rows
            if counted != rows:
                problems.append(f"it has {counted:,} rows, not {rows:,}")
            if not parquet.schema_arrow.equals(_schema(file)):
                problems.append("its columns are not those of the manifest")
            elif file.name == "certificates.parquet":
                return _recompute(parquet, problems), counted, counted
    except (pa.ArrowException, OSError) as error:
        return [f"it cannot be read: {error}"], 0, 0
    return problems, counted, 0


def _recompute(parquet: Any, problems: list[str]) -> list[str]:
    for batch in parquet.iter_batches(batch_size=200):
        for row in batch.to_pylist():
            wrong = certificate.verify(row["certificate"])
            if wrong:
                problems.append(
                    f"the certificate of {row['rule_id']} (event {row['event_id']}) does not hold: {wrong[0]}"
                )
    return problems
