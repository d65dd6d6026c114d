"""POST /api/agent/executions: one post or a batch of them, an answer for each row.

The answer is 200 when at least one row was taken (or the batch was empty), whatever became of the others, and 422 when
every row was refused; both list each row. Either way the batch is done with: what was refused stands in the rejects, and
sending it again would change nothing. Only 408, 429, 500 and 503 are to be retried, with the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from flywheel_pipeline.delivery.api.bodies import (
    JSON,
    NDJSON,
    UnreadableBody,
    inflate,
    media_type,
    read_body,
    require_encoding,
    rows_of,
)
from flywheel_pipeline.delivery.api.connections import driver_of
from flywheel_pipeline.delivery.api.limits import Limits
from flywheel_pipeline.delivery.api.metrics import ROWS
from flywheel_pipeline.delivery.api.problems import Problem, json_response
from flywheel_pipeline.delivery.api.state import admit, worker_of
from flywheel_pipeline.telemetry.batch import BatchResult, parse_batch, record_unreadable, take_batch
from flywheel_pipeline.telemetry.contract import Reject
from flywheel_pipeline.telemetry.intake import PostResult
from flywheel_pipeline.telemetry.reporters import Reporter


async def post_executions(request: Request) -> Response:
    """Take in executions. One transaction, committed before the answer; sending a batch again changes nothing."""
    worker = worker_of(request)
    caller = await admit(request)
    kind = media_type(request, (JSON, *NDJSON))
    gzipped = require_encoding(request)
    with worker.gate.entered(caller.appliance_id):
        body = await read_body(request, worker.limits.body_bytes, worker.limits.body_seconds)
        reporter = Reporter(caller.appliance_id, caller.sites)
        received_at = datetime.now(UTC)
        try:
            rows = await worker.connections.compute(lambda: _taken_apart(body, kind, gzipped, worker.limits))
        except UnreadableBody as error:
            worker.rates.rows(caller.appliance_id, 1, len(body))
            reject = Reject(error.code, error.reason)
            reject_id = await worker.connections.write(
                caller,
                lambda connection: record_unreadable(
                    driver_of(connection), body, reject, reporter, received_at=received_at
                ),
            )
            raise Problem(
                422,
                error.code,
                error.reason,
                "Correct it or send NDJSON, in which a broken line spoils no other; it is kept among the rejects.",
                reject_id=reject_id,
            ) from None
        worker.rates.rows(caller.appliance_id, len(rows.payloads), sum(map(len, rows.payloads)))
        parsed = await worker.connections.compute(lambda: parse_batch(rows.payloads, received_at=received_at))
        result = await worker.connections.write(
            caller,
            lambda connection: take_batch(
                driver_of(connection), rows.payloads, parsed, reporter, received_at=received_at
            ),
        )
    for outcome, count in result.counts.items():
        ROWS.labels(outcome).inc(count)
    return _answer(result, rows.single)


@dataclass(frozen=True, slots=True)
class _Rows:
    payloads: list[bytes]
    single: bool


def _taken_apart(body: bytes, kind: str, gzipped: bool, limits: Limits) -> _Rows:
    """The rows of the body. Raises UnreadableBody for one that has none to be told apart, Problem (413, 422)."""
    return _Rows(*rows_of(inflate(body, limits.inflated_bytes) if gzipped else body, kind, limits))


def _answer(result: BatchResult, single: bool) -> Response:
    rejected = result.counts["rejected"]
    refused = bool(rejected) and rejected == len(result.rows)
    answer: dict[str, Any] = {
        "received": len(result.rows),
        "inserted": result.counts["inserted"],
        "corrected": result.counts["corrected"],
        "unchanged": result.counts["unchanged"],
        "rejected": rejected,
        "results": [_row(position, row) for position, row in enumerate(result.rows)],
    }
    if refused:
        answer = {
            "code": str(result.rows[0].reason_code) if single else "all_rejected",
            "reason": str(result.rows[0].reason) if single else f"Each of the {rejected} rows was refused.",
            "hint": "Do not send it again as it is; it is kept among the rejects, `flywheel rejects list` shows why.",
            **answer,
        }
    return json_response(answer, 422 if refused else 200)


def _row(position: int, row: PostResult) -> dict[str, Any]:
    told: dict[str, Any] = {"position": position, "outcome": row.outcome, "execution_id": row.execution_id}
    if row.outcome == "rejected":
        told |= {"reason_code": row.reason_code, "reason": row.reason, "reject_id": row.reject_id}
    return told
