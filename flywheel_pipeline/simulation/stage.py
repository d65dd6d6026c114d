"""Playing the replay of 2026-02-15: the morning as the old system left it, then the day's last rows, by the intake.

Belongs here: what a replay puts into an empty database and in which order. Does not belong here: the data
(`replay*.py`), and any figure of the evening, which the pipeline alone produces.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert

from flywheel_pipeline.aggregates.batches import activate_policy
from flywheel_pipeline.candidates.patterns import import_patterns
from flywheel_pipeline.database import tables
from flywheel_pipeline.errors import UsageError
from flywheel_pipeline.promotion.ledger import import_rules
from flywheel_pipeline.simulation.replay import Replay, build_replay, write_ndjson
from flywheel_pipeline.telemetry.intake import IntakeReport, import_file

ACTOR = "replay-2026-02-15"


@dataclass(frozen=True)
class Part:
    """One part of the day as staged: rows that came in by the intake, and the file they came from."""

    name: str
    as_of: dt.datetime
    file: Path
    intake: IntakeReport
    patterns: int
    rules: int


def is_played(connection: sa.Connection) -> bool:
    """Return whether the day was played into this database, at least up to its last four executions' import."""
    marked = sa.text("SELECT 1 FROM policy_activations WHERE actor = :actor")
    if connection.execute(marked, {"actor": ACTOR}).first() is None:
        return False
    # The evening's rows are the last that the replay brings; their decisions come with the next run at the latest.
    return (
        connection.execute(
            sa.text("SELECT 1 FROM execution_telemetry WHERE execution_id = ANY(:ids) LIMIT 1"),
            {"ids": [post["execution"]["execution_id"] for post in build_replay().evening_posts]},
        ).first()
        is not None
    )


def require_replay_or_empty(connection: sa.Connection) -> None:
    """Refuse to play into a database with telemetry of its own: the day's figures would be wrong.

    Raises:
        UsageError: there is telemetry, and it is not the replay's.
    """
    if connection.execute(sa.text("SELECT 1 FROM policy_activations WHERE actor = :actor"), {"actor": ACTOR}).first():
        return
    if connection.execute(sa.text("SELECT 1 FROM execution_telemetry LIMIT 1")).first():
        raise UsageError(
            "This database holds telemetry that is not the replay's.",
            hint="Play the day into another one: set FLYWHEEL_HOME to an empty directory, or FLYWHEEL_DATABASE_URL.",
        )


def stage_morning(engine: sa.Engine, replay: Replay, directory: Path) -> Part:
    """Stage the morning: fleet, patterns and rules as the old system left them, 13,131 executions, policy legacy."""
    with engine.begin() as connection:
        require_replay_or_empty(connection)
        activate_policy(
            connection,
            "legacy",
            actor=ACTOR,
            reason="the day is replayed under the rules of that day",
            as_of=replay.evening_as_of,
        )
        for table, rows in (
            (tables.sites, replay.sites),
            (tables.appliances, replay.appliances),
            (tables.evidence_bundles, replay.evidence_bundles),
        ):
            if rows:
                connection.execute(insert(table).on_conflict_do_nothing(), rows)
        patterns = import_patterns(connection, replay.patterns)
        keys: dict[str, Any] = {}
        for row in connection.execute(
            sa.text(
                "SELECT promoted_to_rule_id, pattern_key, incident_type, runbook_id FROM patterns "
                "WHERE promoted_to_rule_id IS NOT NULL ORDER BY promoted_at, pattern_id"
            )
        ):
            keys.setdefault(row.promoted_to_rule_id, row)
        rules = []
        for rule in replay.rules:
            origin = keys.get(rule["rule_id"])
            rules.append({**rule, "pattern_key": origin.pattern_key if origin else None})
        imported = import_rules(
            connection,
            rules,
            actor=ACTOR,
            reason="as the old system left it: a migration had re-enabled every promoted rule",
        )
    return _stage(engine, "morning", replay.morning_as_of, replay.morning_posts, directory, patterns, imported)


def stage_evening(engine: sa.Engine, replay: Replay, directory: Path) -> Part:
    """Stage the day's last four executions."""
    return _stage(engine, "evening", replay.evening_as_of, replay.evening_posts, directory, 0, 0)


def _stage(
    engine: sa.Engine,
    name: str,
    as_of: dt.datetime,
    posts: list[dict[str, Any]],
    directory: Path,
    patterns: int,
    rules: int,
) -> Part:
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / f"replay-2026-02-15-{name}.ndjson"
    write_ndjson(file, posts)
    report = import_file(engine, file, source=file.name, received_at=as_of)
    return Part(name, as_of, file, report, patterns, rules)


def compare(found: dict[str, Any], golden: dict[str, Any]) -> list[dict[str, Any]]:
    """Compare a status with the golden table, figure by figure: [{figure, expected, found, ok}].

    Every leaf of `golden` is a figure; lists of rules are matched by rule_id.
    """
    lines: list[dict[str, Any]] = []
    for section in ("telemetry", "patterns", "rules"):
        for key, expected in golden[section].items():
            value = found[section].get(key)
            lines.append(
                {
                    "figure": f"{section}: {key.replace('_', ' ')}",
                    "expected": expected,
                    "found": value,
                    "ok": value == expected,
                }
            )
    for section in ("top_rules", "builtin_rules"):
        by_id = {rule["rule_id"]: rule for rule in found[section]}
        for rule in golden[section]:
            value = by_id.get(rule["rule_id"], {})
            for key in ("matches", "successes", "failures"):
                lines.append(
                    {
                        "figure": f"{rule['rule_id']}: {key}",
                        "expected": rule[key],
                        "found": value.get(key),
                        "ok": value.get(key) == rule[key],
                    }
                )
    return lines
