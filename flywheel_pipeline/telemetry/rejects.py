"""Rejects: rows that broke the contract, kept with their bytes and the reason until someone decides.

Belongs here: recording, listing, retrying, discarding and purging refused rows. Does not belong here: the reasons
themselves (`contract`) and reading files (`intake`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import Any, Final, Literal

import psycopg
import sqlalchemy as sa
from psycopg.rows import class_row

from flywheel_pipeline.database.tables import reject_purges, telemetry_rejects
from flywheel_pipeline.errors import UsageError
from flywheel_pipeline.telemetry.contract import ParsedRow, Reject, parse_line
from flywheel_pipeline.telemetry.landing import land
from flywheel_pipeline.telemetry.reporters import SOURCE_PREFIX, confine, load_reporter, registered_at

Status = Literal["open", "accepted", "discarded"]

_RETRY_ROWS: Final = 5_000
_RETRY_BYTES: Final = 32 << 20
#: Refusals that speak of the bytes and not of a field: trying again says nothing new about them.
_UNREADABLE: Final = frozenset(
    {"invalid_utf8", "invalid_json", "not_an_object", "truncated", "line_too_long", "nul_character"}
)


@dataclass(frozen=True, slots=True)
class RefusedRow:
    """One row refused on its way in.

    `payload` are its bytes, cut at LINE_LIMIT_BYTES; `payload_bytes` and `payload_hash` (SHA-256, hex) are of
    the whole; `line_number` is 1-based in the source, None where there are no lines.
    """

    line_number: int | None
    reject: Reject
    payload: bytes
    payload_bytes: int
    payload_hash: str

    @classmethod
    def of(cls, line_number: int | None, reject: Reject, payload: bytes) -> RefusedRow:
        """Make a refused row whose whole payload is at hand."""
        return cls(line_number, reject, payload, len(payload), sha256(payload).hexdigest())


@dataclass(frozen=True, slots=True)
class RejectRow:
    """One row of `telemetry_rejects` as the command line lists it."""

    id: int
    received_at: datetime
    source: str
    line_number: int | None
    reason_code: str
    reason: str
    payload: bytes
    payload_bytes: int
    times_seen: int
    status: Status
    retried_at: datetime | None
    execution_id: str | None
    decided_at: datetime | None


@dataclass(frozen=True, slots=True)
class RetryReport:
    """What a retry did: rows tried, rows accepted, and the refused ones counted by reason code."""

    tried: int
    accepted: int
    refused: Counter[str]


@dataclass(frozen=True, slots=True)
class PurgeReport:
    """What a purge removed: rejects decided before `decided_before`, by what had been decided."""

    decided_before: datetime
    accepted: int
    discarded: int


def record(
    connection: psycopg.Connection[Any], source: str, received_at: datetime, rows: Sequence[RefusedRow]
) -> list[int]:
    """Write refused rows inside the caller's transaction and return their ids.

    The same bytes on the same line of the same source are one reject; it counts how often it was seen. Where they were cut,
    its first reason stays, which says so.
    """
    if not rows:
        return []
    found = connection.execute(
        """
        INSERT INTO telemetry_rejects AS r (
          received_at, source, line_number, reason_code, reason, payload, payload_bytes, payload_hash)
        SELECT %(received_at)s, %(source)s, n.line_number, n.reason_code, n.reason, n.payload, n.bytes, n.hash
        FROM unnest(%(lines)s::bigint[], %(codes)s::text[], %(reasons)s::text[], %(payloads)s::bytea[],
                    %(bytes)s::bigint[], %(hashes)s::text[])
          AS n (line_number, reason_code, reason, payload, bytes, hash)
        ORDER BY n.line_number, n.hash
        ON CONFLICT (source, line_number, payload_hash) DO UPDATE
          SET times_seen = r.times_seen + 1, reason_code = excluded.reason_code,
              reason = CASE WHEN octet_length(r.payload) < r.payload_bytes THEN r.reason ELSE excluded.reason END
        RETURNING r.id
        """,
        {
            "received_at": received_at,
            "source": source,
            "lines": [row.line_number for row in rows],
            "codes": [row.reject.reason_code for row in rows],
            "reasons": [row.reject.reason.replace("\x00", "\\x00") for row in rows],
            "payloads": [row.payload for row in rows],
            "bytes": [row.payload_bytes for row in rows],
            "hashes": [row.payload_hash for row in rows],
        },
        binary=True,
    )
    return [id_ for (id_,) in found.fetchall()]


def kept_of(connection: psycopg.Connection[Any], source: str, hashes: Sequence[str]) -> tuple[int, set[str]]:
    """Return the bytes kept of the source's open rejects, and which of these payloads (SHA-256, hex) it has, of no line.

    Until the caller's transaction ends, whoever else asks for this source waits, and those payloads stay: so what is
    recorded by this answer keeps the bound however many batches of one source are taken at once.
    """
    connection.execute("SELECT pg_advisory_xact_lock(hashtextextended('flywheel:rejects:' || %s, 0))", (source,))
    found = connection.execute(
        "SELECT coalesce(sum(octet_length(payload)), 0)::bigint FROM telemetry_rejects "
        "WHERE source = %s AND status = 'open'",
        (source,),
    ).fetchone()
    known = connection.execute(
        "SELECT payload_hash FROM telemetry_rejects "
        "WHERE source = %s AND line_number IS NULL AND payload_hash = ANY (%s) ORDER BY payload_hash FOR NO KEY UPDATE",
        (source, list(hashes)),
    )
    return (found[0] if found else 0), {key for (key,) in known.fetchall()}


def list_rejects(connection: sa.Connection, status: Status | None = "open", limit: int | None = 50) -> list[RejectRow]:
    """Rejects of a status (None: of any), the latest first."""
    query = sa.select(*(telemetry_rejects.c[name] for name in RejectRow.__dataclass_fields__))
    if status is not None:
        query = query.where(telemetry_rejects.c.status == status)
    rows = connection.execute(query.order_by(telemetry_rejects.c.id.desc()).limit(limit))
    return [RejectRow(**row) for row in rows.mappings()]


def retry(engine: sa.Engine, ids: Sequence[int] | None = None, *, now: datetime | None = None) -> RetryReport:
    """Hold open rejects (all, or those of `ids`) against the contract again; what passes lands.

    `now` (default: the real time) is the clock of the contract. Rows whose bytes were cut stay refused.
    Batches commit one by one, so an interrupted retry keeps what it did and can be run again.

    Raises UsageError when one of `ids` is no open reject.
    """
    now = now or datetime.now(UTC)
    if ids is not None:
        with engine.connect() as connection:
            _require_open(connection, ids)
    tried = accepted = last = 0
    refused: Counter[str] = Counter()
    while True:
        with engine.begin() as outer:
            connection_ = outer.connection.driver_connection
            assert isinstance(connection_, psycopg.Connection)  # noqa: S101 - engine.DRIVER
            batch = _open_rejects(connection_, ids, last)
            if not batch:
                return RetryReport(tried, accepted, refused)
            good, bad = _retry_batch(connection_, batch, now)
        last = batch[-1].id
        tried += len(batch)
        accepted += good
        refused += bad


def discard(connection: sa.Connection, ids: Sequence[int]) -> int:
    """Give open rejects up for good; they stay on record until a purge. Returns their number.

    Raises UsageError when one of `ids` is no open reject; then none is discarded.
    """
    _require_open(connection, ids)
    return connection.execute(
        sa.update(telemetry_rejects)
        .where(telemetry_rejects.c.id.in_(list(ids)), telemetry_rejects.c.status == "open")
        .values(status="discarded", decided_at=sa.func.clock_timestamp())
    ).rowcount


# A row that somebody else holds is being sent again or looked at: the next purge comes to it.
_DATE_DECISIONS: Final = """
WITH undated AS (
  SELECT id FROM telemetry_rejects WHERE status <> 'open' AND decided_at IS NULL FOR NO KEY UPDATE SKIP LOCKED
)
UPDATE telemetry_rejects AS r
SET decided_at = CASE r.status WHEN 'accepted' THEN coalesce(r.retried_at, :now) ELSE :now END
FROM undated AS u WHERE u.id = r.id
"""
_PURGE: Final = """
WITH due AS (
  SELECT id FROM telemetry_rejects WHERE status <> 'open' AND decided_at < :decided_before FOR UPDATE SKIP LOCKED
),
purged AS (
  DELETE FROM telemetry_rejects AS r USING due AS d WHERE d.id = r.id RETURNING r.status
)
SELECT count(*) FILTER (WHERE status = 'accepted') AS accepted, count(*) FILTER (WHERE status = 'discarded') AS discarded
FROM purged
"""


def purge(connection: sa.Connection, *, keep_days: int, actor: str, now: datetime | None = None) -> PurgeReport:
    """Remove rejects that were decided more than `keep_days` before `now` (default: the real time); open ones stay.

    How many went, and who said so, is a row of `reject_purges`; nothing is written where none went. The same bytes sent
    again after that are a new reject, or land. A decision of which nobody noted when counts from the first purge that
    finds it, an accepted one from its retry.
    """
    now = now or datetime.now(UTC)
    before = now - timedelta(days=keep_days)
    connection.execute(sa.text(_DATE_DECISIONS), {"now": now})
    gone = connection.execute(sa.text(_PURGE), {"decided_before": before}).one()
    if gone.accepted or gone.discarded:
        connection.execute(
            sa.insert(reject_purges).values(
                actor=actor, decided_before=before, accepted=gone.accepted, discarded=gone.discarded
            )
        )
    return PurgeReport(before, gone.accepted, gone.discarded)


def _require_open(connection: sa.Connection, ids: Sequence[int]) -> None:
    found = connection.execute(
        sa.select(telemetry_rejects.c.id).where(
            telemetry_rejects.c.id.in_(list(ids)), telemetry_rejects.c.status == "open"
        )
    )
    missing = sorted(set(ids) - set(found.scalars()))
    if missing:
        raise UsageError(
            f"No open reject has the id {', '.join(map(str, missing))}.",
            hint="`flywheel rejects list` shows the open ones.",
        )


@dataclass(frozen=True, slots=True)
class _Open:
    id: int
    received_at: datetime
    source: str
    line_number: int | None
    reason_code: str
    payload: bytes
    payload_bytes: int

    @property
    def is_cut(self) -> bool:
        return self.payload_bytes > len(self.payload)


def _open_rejects(connection: psycopg.Connection[Any], ids: Sequence[int] | None, last: int) -> list[_Open]:
    with connection.cursor(row_factory=class_row(_Open), binary=True) as cursor:
        return cursor.execute(
            """
            SELECT id, received_at, source, line_number, reason_code, payload, payload_bytes
            FROM (SELECT *, sum(octet_length(payload)) OVER (ORDER BY id) - octet_length(payload) AS before
                  FROM telemetry_rejects
                  WHERE status = 'open' AND id > %(last)s
                    AND (%(ids)s::bigint[] IS NULL OR id = ANY (%(ids)s))
                  ORDER BY id LIMIT %(rows)s) r
            WHERE before < %(bytes)s
            ORDER BY id
            """,
            {
                "last": last,
                "ids": None if ids is None else list(ids),
                "rows": _RETRY_ROWS,
                "bytes": _RETRY_BYTES,
            },
        ).fetchall()


def _confined(connection: psycopg.Connection[Any], source: str, row: ParsedRow) -> ParsedRow | Reject:
    """Hold what an appliance sent against its scope of today: trying again must not land what it may not report."""
    reporter = load_reporter(connection, source.removeprefix(SOURCE_PREFIX))
    (held,) = confine([row], reporter, lambda ids: registered_at(connection, reporter.sites, ids))
    return held


def _retry_batch(
    connection: psycopg.Connection[Any], batch: Sequence[_Open], now: datetime
) -> tuple[int, Counter[str]]:
    rows: list[tuple[_Open, ParsedRow]] = []
    refused: list[tuple[_Open, Reject]] = []
    for item in batch:
        parsed: ParsedRow | Reject
        if item.is_cut:
            parsed = Reject(item.reason_code, "")
        else:
            parsed = parse_line(item.payload, item.line_number, received_at=now)
            if isinstance(parsed, ParsedRow) and item.source.startswith(SOURCE_PREFIX):
                parsed = _confined(connection, item.source, parsed)
        if isinstance(parsed, Reject):
            refused.append((item, parsed))
        else:
            rows.append((item, parsed.received_by(item.received_at)))
    landed = land(connection, [row for _, row in rows])
    refused += [(rows[position][0], reject) for position, reject in landed.refused.items()]
    good = [pair for position, pair in enumerate(rows) if position not in landed.refused]
    connection.execute(
        """
        UPDATE telemetry_rejects r
        SET status = 'accepted', execution_id = n.execution_id, retried_at = clock_timestamp(), decided_at = clock_timestamp()
        FROM unnest(%s::bigint[], %s::text[]) AS n (id, execution_id)
        WHERE r.id = n.id AND r.status = 'open'
        """,
        ([item.id for item, _ in good], [row.execution_id for _, row in good]),
    )
    told = [(item, reject) for item, reject in refused if reject.reason_code not in _UNREADABLE and not item.is_cut]
    connection.execute(
        "UPDATE telemetry_rejects SET retried_at = clock_timestamp() WHERE id = ANY (%s)",
        ([item.id for item, _ in refused],),
    )
    connection.execute(
        """
        UPDATE telemetry_rejects r SET reason_code = n.code, reason = n.reason
        FROM unnest(%s::bigint[], %s::text[], %s::text[]) AS n (id, code, reason)
        WHERE r.id = n.id AND r.status = 'open'
        """,
        (
            [item.id for item, _ in told],
            [reject.reason_code for _, reject in told],
            [reject.reason.replace("\x00", "\\x00") for _, reject in told],
        ),
    )
    return len(good), Counter(
        item.reason_code if reject.reason_code in _UNREADABLE else reject.reason_code for item, reject in refused
    )
