"""What a data-quality question answers, whoever asks it: a Dagster check, the command line or a test.

Belongs here: the answer (`Finding`) and its recording as a verdict of a batch. Does not belong here: the questions,
which stand in each room's `quality.py` and import no Dagster.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB


@dataclass(frozen=True)
class Finding:
    """The answer to one question.

    `offenders` counts what breaks the statement, `sample` shows at most 20 of it; `figures` are numbers worth a plot
    (counts, seconds, fractions). `severe` says whether a failure is an error or a warning where that depends on what
    was found; None leaves it to the check. `paths` name files that say more; `pages` are Markdown that says more, in which
    whatever telemetry reported is escaped.
    """

    passed: bool
    sentence: str
    observed: str
    required: str
    offenders: int = 0
    sample: Sequence[Mapping[str, Any]] = field(default_factory=tuple)
    figures: Mapping[str, float | int | None] = field(default_factory=dict)
    severe: bool | None = None
    paths: Mapping[str, str] = field(default_factory=dict)
    pages: Mapping[str, str] = field(default_factory=dict)


def _json(value: Any) -> Any:
    return value if isinstance(value, (str, int, float, bool)) or value is None else str(value)


def record_verdict(connection: sa.Connection, batch_id: int, gate: str, finding: Finding) -> None:
    """Write the verdict of a gate for this batch. A pass may become a fail; a fail stays."""
    _record(
        connection,
        batch_id,
        gate,
        "pass" if finding.passed else "fail",
        finding.sentence,
        finding.offenders,
        {
            "observed": finding.observed,
            "required": finding.required,
            "sample": [{k: _json(v) for k, v in row.items()} for row in finding.sample],
        },
    )


def record_error(connection: sa.Connection, batch_id: int, gate: str, error: BaseException) -> None:
    """Write that a gate could not answer; like a fail, it blocks."""
    _record(connection, batch_id, gate, "error", f"{type(error).__name__}: {error}"[:2000], 0, {})


def _record(
    connection: sa.Connection,
    batch_id: int,
    gate: str,
    verdict: str,
    sentence: str,
    offenders: int,
    details: dict[str, Any],
) -> None:
    connection.execute(
        sa.text(
            "INSERT INTO gate_verdicts (batch_id, gate, verdict, sentence, offenders, details) "
            "VALUES (:batch_id, :gate, :verdict, :sentence, :offenders, :details) "
            "ON CONFLICT (batch_id, gate) DO UPDATE SET verdict = excluded.verdict, sentence = excluded.sentence, "
            "offenders = excluded.offenders, details = excluded.details, decided_at = excluded.decided_at "
            "WHERE gate_verdicts.verdict = 'pass'"
        ).bindparams(sa.bindparam("details", type_=JSONB)),
        {
            "batch_id": batch_id,
            "gate": gate,
            "verdict": verdict,
            "sentence": sentence,
            "offenders": offenders,
            "details": details,
        },
    )


def unmet_gates(connection: sa.Connection, batch_id: int) -> dict[str, str]:
    """Return {gate: 'fail' | 'error' | 'missing'} for each required gate of this batch that did not pass."""
    return {
        row.gate: row.verdict
        for row in connection.execute(
            sa.text(
                "SELECT g.gate, coalesce(v.verdict, 'missing') AS verdict FROM required_gates AS g "
                "LEFT JOIN gate_verdicts AS v ON v.gate = g.gate AND v.batch_id = :batch "
                "WHERE v.verdict IS DISTINCT FROM 'pass' ORDER BY g.gate"
            ),
            {"batch": batch_id},
        )
    }
