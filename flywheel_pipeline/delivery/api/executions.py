"""POST /api/agent/executions: one post or a batch of them, an answer for each row.

The answer is 200 when at least one row was taken (or the batch was empty), whatever became of the others, and 422 when
every row was refused; both list each row. Either way the batch is done with: what was refused stands in the rejects, and
sending it again would change nothing. Only 408, 429, 500 and 503 are to be retried, with the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
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
from flywheel_pipeline.delivery.api.limits import Limits
from flywheel_pipeline.delivery.api.metrics import ROWS
from flywheel_pipeline.delivery.api.problems import Problem, json_response
from flywheel_pipeline.delivery.api.state import admit_alone, worker_of
from flywheel_pipeline.telemetry.batch import BatchResult, record_unreadable, take_batch
from flywheel_pipeline.telemetry.contract import Reject
from flywheel_pipeline.telemetry.intake import PostResult
from flywheel_pipeline.telemetry.reporters import Reporter


async def post_executions(request: Request) -> Response:
    """Take in executions. One transaction, committed before the answer; sending a batch again changes nothing."""
    worker = worker_of(request)
    caller = await admit_alone(request)
    kind = media_type(request, (JSON, *NDJSON))
    gzipped = require_encoding(request)
    with worker.gate.entered(caller.appliance_id):
        body = await read_body(request, worker.limits.body_bytes, worker.limits.body_seconds)
        reporter = Reporter(caller.appliance_id, caller.sites)
        request_of = _Request(body, kind, gzipped, reporter, datetime.now(UTC))
        rows = await worker.connections.write(lambda engine: request_of.taken_apart(engine, worker.limits))
        worker.rates.rows(caller.appliance_id, len(rows.payloads))
        result = await worker.connections.write(
            lambda engine: take_batch(engine, rows.payloads, reporter, received_at=request_of.received_at)
        )
    for outcome, count in result.counts.items():
        ROWS.labels(outcome).inc(count)
    return _answer(result, rows.single)


@dataclass(frozen=True, slots=True)
class _Rows:
    payloads: list[bytes]
    single: bool


@dataclass(frozen=True, slots=True)
class _Request:
    body: bytes
    kind: str
    gzipped: bool
    reporter: Reporter
    received_at: datetime

    def taken_apart(self, engine: sa.Engine, limits: Limits) -> _Rows:
        """The rows of the body; a body that has none to be told apart is kept as one reject, and refused."""
        try:
            body = inflate(self.body, limits.inflated_bytes) if self.gzipped else self.body
            return _Rows(*rows_of(body, self.kind, limits))
        except UnreadableBody as error:
            reject = Reject(error.code, error.reason)
            reject_id = record_unreadable(engine, self.body, reject, self.reporter, received_at=self.received_at)
            raise Problem(
                422,
                error.code,
                error.reason,
                "Correct it or send NDJSON, in which a broken line spoils no other; it is kept among the rejects.",
                reject_id=reject_id,
            ) from None


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
