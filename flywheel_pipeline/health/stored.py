"""The kept answers: which failing rules need a new attribution, and the latest one of each.

Belongs here: when to compute again, writing and reading `rule_attributions`. Does not belong here: attribution itself
(`why`). A run in which nothing fails, or nothing changed, costs one query of the scorecard.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert

from flywheel_pipeline.database.tables import rule_attributions
from flywheel_pipeline.health.failing_rules import AT_LEAST, BELOW

METHOD = "1"  # raise it where the same evidence gives another answer: every answer is then computed anew
GROWTH = 0.01  # of the executions: a rule of a million is not read again for each of them ...
AT_LATEST = dt.timedelta(minutes=15)  # ... but its answer is never older than this, once it changed
PLOTTED = 1  # of the failing rules, worst first, whose plots are drawn (0.6 s each); `flywheel why` draws any
LOCK = 7380407443113377797  # one attribution at a time, whoever asks


@dataclass(frozen=True)
class Kept:
    """The latest attribution of a rule. `result` is `report.as_json`, `page` Markdown, `plots` data URIs by name."""

    rule_id: str
    sentence: str
    result: Mapping[str, Any]
    page: str
    plots: Mapping[str, str]
    computed_at: dt.datetime


@dataclass(frozen=True)
class Update:
    """What an update did: rules that fail, those computed anew, those dropped since they no longer fail, seconds."""

    failing: tuple[str, ...]
    computed: tuple[str, ...]
    dropped: tuple[str, ...]
    seconds: float


def update_attributions(connection: sa.Connection, *, batch_id: int | None = None) -> Update:
    """Bring the kept attributions in line with the evidence, in the caller's transaction.

    Attributed is each rule that fails and is in service or in quarantine: a rule leaves service in the very run in
    which its failures showed, and that is when one asks why.
    """
    started = time.perf_counter()
    connection.execute(sa.text("SELECT pg_advisory_xact_lock(:key)"), {"key": LOCK})
    rows = (
        connection.execute(
            sa.text(
                "SELECT c.rule_id, c.matches, c.raw_successes, c.successes, c.failures, c.refired, c.agent_unsupported, "
                "c.not_applicable, c.unreachable, c.escalated, c.suppressed, c.unverified, c.sites, "
                "extract(epoch FROM c.first_at)::text AS first_at, extract(epoch FROM c.last_at)::text AS last_at "
                "FROM rule_scorecard AS c "
                "WHERE (c.enabled OR c.state = 'quarantined') AND c.matches >= :at_least AND c.success_rate < :below "
                "ORDER BY c.raw_failures DESC, c.rule_id"
            ),
            {"at_least": AT_LEAST, "below": BELOW},
        )
        .mappings()
        .all()
    )
    failing = [str(row["rule_id"]) for row in rows]
    hashes = {str(row["rule_id"]): _evidence_hash(dict(row)) for row in rows}
    matches = {str(row["rule_id"]): int(row["matches"]) for row in rows}
    kept = {
        row.rule_id: row
        for row in connection.execute(
            sa.text(
                "SELECT rule_id, evidence_hash, matches, clock_timestamp() - computed_at AS age FROM rule_attributions"
            )
        )
    }

    def is_due(rule_id: str) -> bool:
        old = kept.get(rule_id)
        if old is None:
            return True
        if old.evidence_hash == hashes[rule_id]:
            return False
        grown = abs(matches[rule_id] - old.matches) >= max(1.0, GROWTH * old.matches)
        return bool(grown or old.age >= AT_LATEST)

    due = [rule_id for rule_id in failing if is_due(rule_id)]
    dropped = sorted(set(kept) - set(failing))
    if dropped:
        connection.execute(sa.delete(rule_attributions).where(rule_attributions.c.rule_id.in_(dropped)))
    if due:
        _compute(connection, due, hashes, batch_id, frozenset(failing[:PLOTTED]))
    return Update(tuple(failing), tuple(due), tuple(dropped), time.perf_counter() - started)


def _compute(
    connection: sa.Connection,
    due: Sequence[str],
    hashes: Mapping[str, str],
    batch_id: int | None,
    plotted: frozenset[str],
) -> None:
    from flywheel_pipeline.health import report, why  # numpy and matplotlib: only where there is something to say

    answers = why.attribute(connection, due)
    rows = [
        {
            "rule_id": rule_id,
            "evidence_hash": hashes[rule_id],
            "matches": answer.executions,
            "sentence": report.sentence(answer),
            "result": report.as_json(answer),
            "page": report.markdown(answer),
            "plots": report.plots(answer) if rule_id in plotted else {},
            "batch_id": batch_id,
            "computed_at": sa.func.clock_timestamp(),
        }
        for rule_id, answer in answers.items()
    ]
    for row in rows:
        statement = insert(rule_attributions).values(row)
        connection.execute(
            statement.on_conflict_do_update(
                index_elements=["rule_id"],
                set_={name: statement.excluded[name] for name in row if name != "rule_id"},
            )
        )


def _evidence_hash(row: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps([METHOD, row], sort_keys=True).encode()).hexdigest()


def kept_attributions(connection: sa.Connection, rule_ids: Sequence[str] | None = None) -> dict[str, Kept]:
    """The latest attributions by rule id, most executions first; of these rules, or of all."""
    query = sa.select(rule_attributions).order_by(rule_attributions.c.matches.desc(), rule_attributions.c.rule_id)
    if rule_ids is not None:
        query = query.where(rule_attributions.c.rule_id.in_(list(rule_ids)))
    return {
        row.rule_id: Kept(row.rule_id, row.sentence, row.result, row.page, row.plots, row.computed_at)
        for row in connection.execute(query)
    }
