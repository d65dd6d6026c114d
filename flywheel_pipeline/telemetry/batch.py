"""Batches of posts from one appliance: one transaction, and for each row what became of it.

Belongs here: carrying the rows of one request through contract, scope and landing. Does not belong here: HTTP, and
taking a request apart into rows (`delivery.api`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Final

import psycopg

from flywheel_pipeline.telemetry.contract import LINE_LIMIT_BYTES, ParsedRow, Reject, parse_line
from flywheel_pipeline.telemetry.intake import Outcome, PostResult
from flywheel_pipeline.telemetry.landing import land
from flywheel_pipeline.telemetry.rejects import RefusedRow, kept_of, record
from flywheel_pipeline.telemetry.reporters import Reporter, confine, registered_at

#: What an appliance is told where the full reason would name host, site or start of a row that may be another's.
_DISCREET: Final = {
    "conflicting_identity": "execution_id is known already with another site, host or start; an id names one execution",
    "undated_correction": "execution_id is known already with other values, and a correction needs a reported_at",
}
#: Of how many bytes of one appliance's open rejects all are kept, and how many of each one above that.
KEPT_BYTES: Final = 64 << 20
_HEAD_BYTES: Final = 1 << 10


@dataclass(slots=True)
class BatchResult:
    """What became of the rows of one batch: `rows` in their order, `counts` by outcome."""

    rows: list[PostResult]
    counts: Counter[Outcome] = field(default_factory=Counter)


def parse_batch(payloads: Sequence[bytes], *, received_at: datetime) -> list[ParsedRow | Reject]:
    """Read posts that arrive now, before any transaction is open."""
    return [parse_line(payload, None, received_at=received_at, live=True) for payload in payloads]


def take_batch(
    connection: psycopg.Connection[Any],
    payloads: Sequence[bytes],
    outcomes: list[ParsedRow | Reject],
    reporter: Reporter,
    *,
    received_at: datetime,
) -> BatchResult:
    """Take in posts of one appliance, inside the caller's open transaction, which commits them all.

    `outcomes` are the payloads as `parse_batch` read them. `received_at` (aware) is their arrival. Good rows land, the others go to the rejects under the reporter as source,
    where the same bytes are one reject however often they are sent; once KEPT_BYTES of them wait for a decision, a new one
    keeps its first bytes, its hash and its reason. Doing it again changes nothing.

    Raises psycopg.OperationalError when the database goes away; nothing landed then, or all of it did (it went away
    during the commit) and sending it again is recognised.
    """
    _hold_to_scope(connection, outcomes, reporter)
    rows = [(position, row) for position, row in enumerate(outcomes) if isinstance(row, ParsedRow)]
    landed = land(connection, [row for _, row in rows], tell=True)
    refused = {position: row for position, row in enumerate(outcomes) if isinstance(row, Reject)}
    refused |= {rows[position][0]: reject for position, reject in landed.refused.items()}
    reject_ids = _record(connection, reporter.source, received_at, refused, payloads)
    told: list[PostResult | None] = [None] * len(payloads)
    for position, reject in refused.items():
        row = outcomes[position]
        told[position] = PostResult(
            "rejected",
            row.execution_id if isinstance(row, ParsedRow) else None,
            reject.reason_code,
            _DISCREET.get(reject.reason_code, reject.reason),
            reject_ids[position],
        )
    for number, (position, row) in enumerate(rows):
        if told[position] is None:
            told[position] = PostResult(landed.changed.get(number, "unchanged"), row.execution_id)
    results = [result for result in told if result is not None]
    return BatchResult(results, Counter(result.outcome for result in results))


def _hold_to_scope(connection: psycopg.Connection[Any], outcomes: list[ParsedRow | Reject], reporter: Reporter) -> None:
    rows = [(position, row) for position, row in enumerate(outcomes) if isinstance(row, ParsedRow)]
    held = confine([row for _, row in rows], reporter, lambda ids: registered_at(connection, reporter.sites, ids))
    for (position, row), verdict in zip(rows, held, strict=True):
        if verdict is not row:
            outcomes[position] = verdict


def _record(
    connection: psycopg.Connection[Any],
    source: str,
    received_at: datetime,
    refused: dict[int, Reject],
    payloads: Sequence[bytes],
) -> dict[int, int]:
    """Write rejects, equal bytes once, and return the reject's id for each position."""
    if not refused:
        return {}
    wholes = {position: RefusedRow.of(None, reject, payloads[position]) for position, reject in refused.items()}
    distinct: dict[str, RefusedRow] = {}
    for whole in wholes.values():
        distinct.setdefault(whole.payload_hash, replace(whole, payload=whole.payload[:LINE_LIMIT_BYTES]))
    waiting, known = kept_of(connection, source, list(distinct))
    for key, row in distinct.items():
        if key not in known:
            distinct[key] = _fitted(row, KEPT_BYTES - waiting)
            waiting += len(distinct[key].payload)
    record(connection, source, received_at, [distinct[key] for key in sorted(distinct)])
    found = connection.execute(
        "SELECT payload_hash, id FROM telemetry_rejects "
        "WHERE source = %s AND line_number IS NULL AND payload_hash = ANY (%s)",
        (source, list(distinct)),
    )
    ids: dict[str, int] = dict(found.fetchall())
    return {position: ids[whole.payload_hash] for position, whole in wholes.items()}


def _fitted(row: RefusedRow, room: int) -> RefusedRow:
    """The row as it is kept: whole, or its head where there is no room for more."""
    if len(row.payload) <= max(room, _HEAD_BYTES):
        return row
    why = f"only its first {_HEAD_BYTES:,} bytes are kept, {KEPT_BYTES >> 20} MiB of this source wait for a decision already"
    return replace(
        row, payload=row.payload[:_HEAD_BYTES], reject=replace(row.reject, reason=f"{row.reject.reason}; {why}")
    )


def record_unreadable(
    connection: psycopg.Connection[Any], payload: bytes, reject: Reject, reporter: Reporter, *, received_at: datetime
) -> int:
    """Keep a whole body that could not be taken apart into rows, cut at the limit of a line; return the reject's id."""
    return _record(connection, reporter.source, received_at, {0: reject}, [payload])[0]
