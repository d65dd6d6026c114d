"""Landing rows in `execution_telemetry`: new executions by COPY, versions of known ones through a staging table.

Belongs here: the SQL that makes intake idempotent and independent of the order of arrival. Does not belong
here: what a valid row is (`contract`), where rows come from (`intake`), what becomes of others (`rejects`).

Rows come encoded for COPY, each once, and are compared as these bytes. Rows that say the same in other bytes (JSON whose
keys are in another order) PostgreSQL finds to be the same.

Versions. Rows of one execution_id are versions of one execution, ordered by `reported_at` and, where that
ties, by the MD5 of the content. The last version stands; one without `reported_at` comes before all that have
one. Each step from a version to the next is one UPDATE, so that the trigger on the table writes the history.
`created_at` is the earliest arrival of any version. Identity (site, host, start) never changes.

Which executions are known is asked first. If somebody else commits one of the others before our COPY does, the unique
key refuses the COPY, and the rows are landed again through staging alone, which takes such a row as a version. All
inserts come first and in the order of the key, so that two importers of the same rows wait for each other instead of
deadlocking.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Final, Literal

import psycopg
import sqlalchemy as sa
from psycopg import sql
from psycopg.copy import LibpqWriter

from flywheel_pipeline.database.tables import execution_telemetry
from flywheel_pipeline.telemetry.contract import COLUMNS, ParsedRow, Reject
from flywheel_pipeline.telemetry.encoding import HEADER, TRAILER, bigint_field, encoder, staged

#: How PostgreSQL refuses a row: a bad value, a broken constraint, a RAISE in somebody's trigger.
_REFUSALS: Final = (psycopg.DataError, psycopg.IntegrityError, psycopg.errors.RaiseException)

_IDENTITY: Final = ("execution_id", "site_id", "hostname")
_CONTENT: Final = tuple(name for name in COLUMNS if name not in (*_IDENTITY, "reported_at", "created_at"))
_ANALYZE_FROM_ROWS: Final = 1_000
#: Each flush lets go of the interpreter lock, and gets it back 5 ms later when another thread reads a file.
_FLUSH_BYTES: Final = 4 << 20
_ROWS_AT_ONCE: Final = 1_000
_REPORTED_AT: Final = COLUMNS.index("reported_at")
_COPY_TYPES: Final[tuple[tuple[type[sa.types.TypeEngine[Any]], str], ...]] = (
    (sa.Boolean, "bool"),
    (sa.Integer, "int4"),
    (sa.Double, "float8"),
    (sa.Numeric, "numeric"),
    (sa.TIMESTAMP, "timestamptz"),
    (sa.JSON, "jsonb"),
    (sa.String, "text"),
)


@dataclass(slots=True)
class Landed:
    """What became of rows, by their position in the sequence that was landed.

    `inserted` and `corrected` count rows; `superseded` are older than what stands already and `repeated` say
    nothing new, neither changes a value; `refused` maps a position to the reason. `changed` says which positions were
    inserted or corrected, where `land` was asked to tell.
    """

    inserted: int = 0
    corrected: int = 0
    repeated: int = 0
    superseded: int = 0
    refused: dict[int, Reject] = field(default_factory=dict)
    changed: dict[int, Literal["inserted", "corrected"]] = field(default_factory=dict)

    def add(self, other: Landed) -> None:
        """Add the counts and refusals of `other`, whose positions are of the same sequence."""
        self.inserted += other.inserted
        self.corrected += other.corrected
        self.repeated += other.repeated
        self.superseded += other.superseded
        self.refused.update(other.refused)
        self.changed.update(other.changed)


def land(connection: psycopg.Connection[Any], rows: Sequence[ParsedRow], *, tell: bool = False) -> Landed:
    """Insert new executions and apply corrections, inside the caller's open transaction.

    With `tell`, `changed` names the positions that were inserted or corrected; files need the counts alone.
    A row that PostgreSQL itself refuses is found by halving and named in `refused`; the others land.
    Raises psycopg.OperationalError when the database goes away.
    """
    encode = encoder(TYPES)
    encoded = [encode(row.values) for row in rows]
    batch = _Batch([row.execution_id for row in rows], [row if isinstance(row, bytes) else b"" for row in encoded])
    refused = {position: row for position, row in enumerate(encoded) if isinstance(row, Reject)}
    landed = _land(connection, batch, [position for position in range(len(rows)) if position not in refused], tell)
    landed.refused.update(refused)
    return landed


def land_encoded(
    connection: psycopg.Connection[Any], execution_ids: Sequence[str], rows: Sequence[bytes], *, tell: bool = False
) -> Landed:
    """The same for rows that are encoded already (`encoding.encoder` of TYPES); the two sequences run in step."""
    return _land(connection, _Batch(execution_ids, rows), range(len(rows)), tell)


@dataclass(frozen=True, slots=True)
class _Batch:
    """Rows to land, by position: what is passed around below are positions in these."""

    execution_ids: Sequence[str]
    rows: Sequence[bytes]


def _land(connection: psycopg.Connection[Any], batch: _Batch, positions: Sequence[int], tell: bool) -> Landed:
    if connection.info.parameter_status("client_encoding") != "UTF8":
        connection.execute("SET LOCAL client_encoding TO 'UTF8'")  # in which rows are encoded
    # PostgreSQL copies into no table whose rows it must hold against a policy.
    confined = connection.execute(_CONFINED).fetchone() == (True,)
    return _land_some(connection, batch, positions, tell, staged_only=confined)


def _land_some(
    connection: psycopg.Connection[Any],
    batch: _Batch,
    positions: Sequence[int],
    tell: bool,
    *,
    staged_only: bool = False,
) -> Landed:
    if not positions:
        return Landed()
    try:
        with connection.transaction():
            return _merge(connection, batch, positions, tell, staged_only)
    except _REFUSALS as error:
        if isinstance(error, psycopg.errors.UniqueViolation) and not staged_only:
            return _land_some(connection, batch, positions, tell, staged_only=True)
        if len(positions) == 1:
            reason = error.diag.message_primary or str(error)
            return Landed(refused={positions[0]: Reject("refused_by_database", reason)})
    middle = len(positions) // 2
    landed = _land_some(connection, batch, positions[:middle], tell, staged_only=staged_only)
    landed.add(_land_some(connection, batch, positions[middle:], tell, staged_only=staged_only))
    return landed


def _merge(
    connection: psycopg.Connection[Any], batch: _Batch, positions: Sequence[int], tell: bool, staged_only: bool
) -> Landed:
    landed = Landed()
    ids = batch.execution_ids
    rounds, twins = _versions(batch, positions)
    landed.repeated = sum(map(len, twins.values()))
    with connection.cursor() as cursor:
        if not staged_only:
            known = _known(cursor, [ids[position] for position in rounds[0]])
            new = [position for position in rounds[0] if ids[position] not in known]
            if new:
                rounds[0] = [position for position in rounds[0] if ids[position] in known]
                new.sort(key=ids.__getitem__)
                _copy(cursor, _COPY_NEW, (batch.rows[position] for position in new))
                landed.inserted = cursor.rowcount
                landed.repeated += len(new) - landed.inserted  # somebody's own trigger left out the others
                if tell:
                    _tell_inserted(cursor, batch, new, landed)
        staged_rows = sum(map(len, rounds))
        if staged_rows:
            _merge_staged(cursor, batch, rounds, staged_rows, landed, tell)
    for position in landed.refused.keys() & twins.keys():
        landed.repeated -= len(twins[position])
        landed.refused.update(dict.fromkeys(twins[position], landed.refused[position]))
    return landed


def _tell_inserted(cursor: psycopg.Cursor[Any], batch: _Batch, new: Sequence[int], landed: Landed) -> None:
    ids = batch.execution_ids
    if landed.inserted < len(new):
        inserted = _known(cursor, [ids[position] for position in new])
        new = [position for position in new if ids[position] in inserted]
    landed.changed.update(dict.fromkeys(new, "inserted"))


def _merge_staged(
    cursor: psycopg.Cursor[Any], batch: _Batch, rounds: list[list[int]], rows: int, landed: Landed, tell: bool
) -> None:
    cursor.execute(_STAGING)
    cursor.execute(_EMPTY)
    _copy(
        cursor,
        _COPY_STAGED,
        (
            staged(batch.rows[position], position, version)
            for version, positions in enumerate(rounds)
            for position in positions
        ),
    )
    if rows >= _ANALYZE_FROM_ROWS:
        cursor.execute(_ANALYZE)
    for version, positions in enumerate(rounds):
        if not positions:
            continue
        if version == 0:
            inserted = cursor.execute(_INSERT_AND_TELL if tell else _INSERT).rowcount
            landed.inserted += inserted
            if tell and inserted:
                new = {execution_id for (execution_id,) in cursor.fetchall()}
                told = [position for position in positions if batch.execution_ids[position] in new]
                landed.changed.update(dict.fromkeys(told, "inserted"))
            if inserted == len(positions):
                continue
            landed.repeated -= inserted  # they equal themselves in the comparison below
        landed.repeated += len(positions)
        for (position,) in cursor.execute(_OUT_OF_SIGHT, {"version": version}).fetchall():
            landed.repeated -= 1
            landed.refused[position] = Reject(
                "conflicting_identity", "an execution with this id was reported by another site"
            )
        _apply(cursor, version, landed)


def _known(cursor: psycopg.Cursor[Any], execution_ids: list[str]) -> set[str]:
    """Those of the execution ids that stand in the log."""
    return {id_ for (id_,) in cursor.execute(_KNOWN, (execution_ids,), binary=True).fetchall()}


def _copy(cursor: psycopg.Cursor[Any], statement: sql.Composed, rows: Iterable[bytes]) -> None:
    # In the form of a binary COPY, header and trailer included; psycopg sends what is written as it is.
    with cursor.copy(statement, writer=LibpqWriter(cursor, flush_threshold=_FLUSH_BYTES)) as copy:
        copy.write(HEADER)
        for batch in _batched(rows):
            copy.write(b"".join(batch))
        copy.write(TRAILER)


def _batched(rows: Iterable[bytes]) -> Iterator[list[bytes]]:
    rows = iter(rows)
    while batch := list(islice(rows, _ROWS_AT_ONCE)):
        yield batch


def _versions(batch: _Batch, positions: Sequence[int]) -> tuple[list[list[int]], dict[int, list[int]]]:
    """Split rows into rounds in which no execution occurs twice, oldest versions first.

    Equal rows stand there once; the second result maps the position of that one to those of its twins.
    """
    ids, rows = batch.execution_ids, batch.rows
    if len({ids[position] for position in positions}) == len(positions):
        return [list(positions)], {}
    versions: dict[str, list[int]] = {}
    twins: dict[int, list[int]] = {}
    repeated: set[str] = set()
    for position in positions:
        known = versions.setdefault(ids[position], [])
        if known:
            twin = next((other for other in known if rows[other] == rows[position]), None)
            if twin is not None:
                twins.setdefault(twin, []).append(position)
                continue
            repeated.add(ids[position])
        known.append(position)
    for execution_id in repeated:
        versions[execution_id].sort(key=lambda position: _reported(rows[position]))
    rounds: list[list[int]] = []
    for known in versions.values():
        for number, position in enumerate(known):
            if number == len(rounds):
                rounds.append([])
            rounds[number].append(position)
    return rounds, twins


def _reported(row: bytes) -> float:
    reported_at = bigint_field(row, _REPORTED_AT)
    return float("-inf") if reported_at is None else reported_at


def _apply(cursor: psycopg.Cursor[Any], version: int, landed: Landed) -> None:
    """Compare one round with what stands, and write what is newer."""
    newer: list[int] = []
    earlier: list[int] = []
    for position, verdict, arrived_earlier, reason in cursor.execute(_COMPARE, {"version": version}).fetchall():
        landed.repeated -= 1
        if verdict in ("conflicting_identity", "undated_correction"):
            landed.refused[position] = Reject(verdict, reason)
            continue
        match verdict:
            case "corrected":
                landed.corrected += 1
                landed.changed[position] = "corrected"
                newer.append(position)
            case "confirmed":
                landed.repeated += 1
                newer.append(position)
            case "superseded":
                landed.superseded += 1
            case _:
                landed.repeated += 1
        if arrived_earlier and verdict not in ("corrected", "confirmed"):
            earlier.append(position)
    if newer:
        cursor.execute(_REPLACE, {"positions": newer})
    if earlier:
        cursor.execute(_ARRIVED_EARLIER, {"positions": earlier})


def _names(columns: Iterable[str], alias: str | None = None) -> sql.Composed:
    parts = [sql.Identifier(name) if alias is None else sql.Identifier(alias, name) for name in columns]
    return sql.SQL(", ").join(parts)


def _copy_type(column: str) -> str:
    declared = execution_telemetry.c[column].type
    return next(name for kind, name in _COPY_TYPES if isinstance(declared, kind))


#: PostgreSQL's types of COLUMNS, in which rows are encoded.
TYPES: Final = tuple(map(_copy_type, COLUMNS))

_CONFINED: Final = sql.SQL("SELECT row_security_active('execution_telemetry'::regclass)")

_KNOWN: Final = sql.SQL("SELECT execution_id FROM execution_telemetry WHERE execution_id = ANY (%s::text[])")

_COPY_NEW: Final = sql.SQL("COPY execution_telemetry ({columns}) FROM STDIN (FORMAT binary)").format(
    columns=_names(COLUMNS)
)

_STAGING: Final = sql.SQL(
    "CREATE TEMPORARY TABLE IF NOT EXISTS staged_executions ON COMMIT DELETE ROWS AS "
    "SELECT 0::bigint AS position, 0::bigint AS version, {columns} FROM execution_telemetry WITH NO DATA"
).format(columns=_names(COLUMNS))

_EMPTY: Final = sql.SQL("DELETE FROM staged_executions")

_COPY_STAGED: Final = sql.SQL(
    "COPY staged_executions (position, version, {columns}) FROM STDIN (FORMAT binary)"
).format(columns=_names(COLUMNS))

_ANALYZE: Final = sql.SQL("ANALYZE staged_executions (execution_id, version)")

# In the order in which Python sorts the rows of _COPY_NEW.
_INSERT: Final = sql.SQL(
    """
    INSERT INTO execution_telemetry ({columns})
    SELECT {columns} FROM staged_executions s
    WHERE version = 0 AND NOT EXISTS (SELECT FROM execution_telemetry t WHERE t.execution_id = s.execution_id)
    ORDER BY execution_id COLLATE "C"
    ON CONFLICT (execution_id) DO NOTHING
    """
).format(columns=_names(COLUMNS))

_INSERT_AND_TELL: Final = _INSERT + sql.SQL("RETURNING execution_id")

_SAME: Final = sql.SQL("(ROW({s}) IS NOT DISTINCT FROM ROW({t}))").format(
    s=_names(_CONTENT, "s"), t=_names(_CONTENT, "t")
)
_REPORTED: Final = sql.SQL("coalesce({}.reported_at, '-infinity')")

# Only rows that are not plainly the same come back, and locked: what PostgreSQL had to wait for it compares
# again.
# Refused by the key and yet not to be seen: row security keeps it from the session of an appliance.
_OUT_OF_SIGHT: Final = sql.SQL(
    """
    SELECT s.position FROM staged_executions s
    WHERE s.version = %(version)s
      AND NOT EXISTS (SELECT FROM execution_telemetry t WHERE t.execution_id = s.execution_id)
    """
)

_COMPARE: Final = sql.SQL(
    """
    SELECT s.position,
      CASE
        WHEN s.hostname <> t.hostname OR s.started_at <> t.started_at OR {other_site}
          THEN 'conflicting_identity'
        WHEN {same} AND {s_at} <= {t_at} THEN 'repeated'
        WHEN {same} THEN 'confirmed'
        WHEN s.reported_at IS NULL AND t.reported_at IS NULL THEN 'undated_correction'
        WHEN {s_at} > {t_at} THEN 'corrected'
        WHEN {s_at} < {t_at} THEN 'superseded'
        WHEN md5(ROW({s_content})::text) COLLATE "C" > md5(ROW({t_content})::text) COLLATE "C"
          THEN 'corrected'
        ELSE 'superseded'
      END AS verdict,
      s.created_at < t.created_at AS arrived_earlier,
      CASE
        WHEN s.hostname <> t.hostname
          THEN format('execution %s is known from host %s, and this row names host %s',
                      s.execution_id, t.hostname, s.hostname)
        WHEN s.started_at <> t.started_at
          THEN format('execution %s is known to have started_at %s, and this row says %s',
                      s.execution_id, t.started_at, s.started_at)
        WHEN s.site_id <> t.site_id
          THEN format('execution %s is known from site %s, and this row names site %s',
                      s.execution_id, t.site_id, s.site_id)
        ELSE format('execution %s is known with other values, and neither row has a reported_at that would '
                    'tell which is newer', s.execution_id)
      END AS reason
    FROM staged_executions s
    JOIN execution_telemetry t ON t.execution_id = s.execution_id
    WHERE s.version = %(version)s
      AND (NOT {same} OR {s_at} > {t_at} OR s.created_at < t.created_at
           OR s.hostname <> t.hostname OR s.site_id <> t.site_id)
    ORDER BY t.execution_id COLLATE "C"
    FOR UPDATE OF t
    """.replace("%s", "%%s")
).format(
    same=_SAME,
    s_at=_REPORTED.format(sql.Identifier("s")),
    t_at=_REPORTED.format(sql.Identifier("t")),
    s_content=_names(_CONTENT, "s"),
    t_content=_names(_CONTENT, "t"),
    # A renamed site is the same site. Aliases never chain, so one step on each side is enough.
    other_site=sql.SQL(
        """
        CASE WHEN s.site_id <> t.site_id THEN NOT EXISTS (
          SELECT FROM site_aliases a
          WHERE (a.alias = s.site_id AND a.site_id = t.site_id)
             OR (a.alias = t.site_id AND a.site_id = s.site_id)
             OR (a.alias = s.site_id AND EXISTS (
                   SELECT FROM site_aliases b WHERE b.alias = t.site_id AND b.site_id = a.site_id)))
        ELSE false END
        """
    ),
)

_REPLACE: Final = sql.SQL(
    """
    UPDATE execution_telemetry t
    SET {assignments}, reported_at = s.reported_at, created_at = least(t.created_at, s.created_at)
    FROM staged_executions s
    WHERE s.execution_id = t.execution_id AND s.position = ANY (%(positions)s)
    """
).format(
    assignments=sql.SQL(", ").join(
        sql.SQL("{} = {}").format(sql.Identifier(name), sql.Identifier("s", name)) for name in _CONTENT
    )
)

_ARRIVED_EARLIER: Final = sql.SQL(
    """
    UPDATE execution_telemetry t SET created_at = s.created_at
    FROM staged_executions s
    WHERE s.execution_id = t.execution_id AND s.position = ANY (%(positions)s) AND s.created_at < t.created_at
    """
)
