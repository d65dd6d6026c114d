"""Manifests and commands in the database: what every appliance should run, and telling it so.

Belongs here: reading rules and appliances, writing `rule_manifests`, the life of `appliance_commands`, the
list of deployments. Does not belong here: what goes into a manifest (`manifest`), nor HTTP. Every function
works inside the caller's transaction and can be repeated: a second call finds nothing to do.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import sqlalchemy as sa

from flywheel_pipeline.database import tables as t
from flywheel_pipeline.delivery.manifest import (
    ApplianceRow,
    Manifest,
    RuleRow,
    RunbookRow,
    build_manifests,
    canonical_json,
    unservable_rules,
)
from flywheel_pipeline.delivery.scopes import load_quarantines
from flywheel_pipeline.errors import UsageError
from flywheel_pipeline.health.failing_rules import AT_LEAST, BELOW

COMMAND_TYPE = "sync_promoted_rule"
COMMAND_LIFETIME = timedelta(hours=24)

# An appliance that has not checked in for this long gets no commands: nobody is there to fetch them. Agents
# keep an offline queue of 60 minutes and check in every few minutes, so a week is a dead or dismounted
# machine.
LIVE_WITHIN = timedelta(days=7)

# One publisher at a time: two that interleave could write an older manifest over a newer one.
_LOCK = sa.text("SELECT pg_advisory_xact_lock(hashtext('flywheel:publish'))")


@dataclass(frozen=True)
class ManifestReport:
    """What `write_manifests` did.

    Attributes:
        appliances: manifests that stand now.
        written: those created or changed.
        unchanged: those left alone.
        removed: manifests of appliances that are retired or gone.
        rules: entries over all manifests.
        withheld: pairs of rule and appliance held back.
        unservable: enabled rules kept out of every manifest, as (rule_id, problem). Anything here is a fault
            that the caller must fail on, after the commit: other rules must not stay in service for it.
    """

    appliances: int
    written: int
    unchanged: int
    removed: int
    rules: int
    withheld: int
    unservable: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class CommandReport:
    """What `queue_commands` did, in commands.

    Attributes:
        queued: created now.
        redelivered: queued again: expired, or superseded and wanted once more.
        expired: not fetched or not acknowledged in time.
        superseded: for a rule that the appliance should no longer run.
        open: pending or delivered after all that.
        waiting_appliances: those with rules to be told of but without a sign of life, so without commands.
    """

    queued: int
    redelivered: int
    expired: int
    superseded: int
    open: int
    waiting_appliances: int

    @property
    def changes(self) -> int:
        """Commands whose row was written; 0 when a publication is repeated."""
        return self.queued + self.redelivered + self.expired + self.superseded


@dataclass(frozen=True)
class Deployment:
    """A row of the view `deployments`: how far one rule version got on one appliance."""

    rule_id: str
    rule_version: int
    appliance_id: str
    site_id: str | None
    wanted: bool
    state: str
    command_status: str | None
    withheld_reason: str | None
    promoted_at: datetime | None
    queued_at: datetime | None
    delivered_at: datetime | None
    acknowledged_at: datetime | None
    first_executed_at: datetime | None


@dataclass(frozen=True)
class Command:
    """A command as an appliance fetches it."""

    id: UUID
    command_type: str
    params: dict[str, Any] = field(default_factory=dict)


def clock_of(conn: sa.Connection, batch_id: int) -> datetime:
    """The moment a batch works at: `as_of` of a replay, else the transaction's now (UTC).

    Raises:
        UsageError: there is no such batch.
    """
    clock = conn.execute(
        sa.text("SELECT coalesce(as_of, now()) FROM refresh_batches WHERE batch_id = :batch"),
        {"batch": batch_id},
    ).scalar_one_or_none()
    if clock is None:
        raise UsageError(f"There is no batch {batch_id}.", hint="Open one by running the whole graph: flywheel run.")
    return clock  # type: ignore[no-any-return]


def load_rules(conn: sa.Connection) -> list[RuleRow]:
    """All rules, by id; `failing` where the scorecard shows enough executions and too few successes.

    Enough and too few are `health.failing_rules.AT_LEAST` and `BELOW` (a fraction), for the raw rate and the
    rated one: the raw rate alone counts hosts that are merely unreachable, the rated one alone misses
    successes of agents that send no verification.
    """
    rows = conn.execute(
        sa.text(
            """
            SELECT r.rule_id, r.rule_version, r.incident_pattern, r.runbook_id, r.platform, r.source, r.state,
                   r.enabled, r.content_hash, r.rollout_step,
                   coalesce(s.successes + s.failures >= :at_least
                            AND s.success_rate < :below AND s.rated_rate < :below, false) AS failing
            FROM l1_rules r LEFT JOIN rule_scorecard s USING (rule_id)
            ORDER BY r.rule_id
            """
        ),
        {"at_least": AT_LEAST, "below": BELOW},
    )
    return [RuleRow(**row) for row in rows.mappings()]


def load_appliances(conn: sa.Connection, clock: datetime) -> list[ApplianceRow]:
    """The appliances that are to have a manifest: all but the retired; renamed sites by the name in use."""
    rows = conn.execute(
        sa.text(
            """
            SELECT a.appliance_id, coalesce(s.site_id, a.site_id) AS site_id, a.agent_version, a.capabilities
            FROM appliances a
            LEFT JOIN site_aliases s ON s.alias = a.site_id AND :clock >= s.valid_from AND :clock < s.valid_to
            WHERE a.status <> 'retired'
            ORDER BY a.appliance_id
            """
        ),
        {"clock": clock},
    )
    return [ApplianceRow(**row) for row in rows.mappings()]


def load_catalogue(conn: sa.Connection) -> dict[str, RunbookRow]:
    """The runbook catalogue, by runbook id."""
    c = t.runbooks.c
    rows = conn.execute(sa.select(c.runbook_id, c.name, c.platform, c.severity, c.enabled).order_by(c.runbook_id))
    return {row["runbook_id"]: RunbookRow(**row) for row in rows.mappings()}


def write_manifests(conn: sa.Connection, batch_id: int) -> ManifestReport:
    """Bring `rule_manifests` to the desired state; rows that are right already are not touched.

    Args:
        conn: a connection in a transaction; the caller commits.
        batch_id: the batch to stamp on what is written.

    Raises:
        UsageError: there is no such batch.
    """
    conn.execute(_LOCK)
    clock = clock_of(conn, batch_id)
    rules, catalogue = load_rules(conn), load_catalogue(conn)
    manifests = build_manifests(
        rules,
        load_appliances(conn, clock),
        catalogue,
        on_unservable="leave_out",
        quarantines=load_quarantines(conn),
    )
    groups, members = _share(manifests)
    written = conn.execute(
        sa.text(
            """
            WITH contents AS (
              SELECT * FROM jsonb_to_recordset(CAST(:groups AS jsonb))
                AS g(no integer, manifest_hash text, rules jsonb, withheld jsonb)
            ), members AS (
              SELECT * FROM jsonb_to_recordset(CAST(:members AS jsonb))
                AS m(no integer, appliance_id text, site_id text)
            )
            INSERT INTO rule_manifests
              (appliance_id, site_id, manifest_hash, rules, withheld, rule_count, batch_id, built_at)
            SELECT m.appliance_id, m.site_id, c.manifest_hash, c.rules, c.withheld,
                   jsonb_array_length(c.rules), :batch, :clock
            FROM members m JOIN contents c USING (no)
            WHERE NOT EXISTS (
              SELECT FROM rule_manifests same
              WHERE (same.appliance_id, same.site_id, same.manifest_hash, same.withheld)
                  = (m.appliance_id, m.site_id, c.manifest_hash, c.withheld))
            ON CONFLICT (appliance_id) DO UPDATE SET
              site_id = excluded.site_id, manifest_hash = excluded.manifest_hash, rules = excluded.rules,
              withheld = excluded.withheld, rule_count = excluded.rule_count, batch_id = excluded.batch_id,
              built_at = excluded.built_at
            """
        ),
        {"groups": groups, "members": members, "batch": batch_id, "clock": clock},
    ).rowcount
    removed = conn.execute(
        sa.delete(t.rule_manifests).where(
            t.rule_manifests.c.appliance_id != sa.all_(sa.cast(_ids(manifests), sa.ARRAY(sa.Text)))
        )
    ).rowcount
    return ManifestReport(
        appliances=len(manifests),
        written=written,
        unchanged=len(manifests) - written,
        removed=removed,
        rules=sum(len(m.rules) for m in manifests),
        withheld=sum(len(m.withheld) for m in manifests),
        unservable=tuple(unservable_rules(rules, catalogue)),
    )


def _ids(manifests: Sequence[Manifest]) -> list[str]:
    return [m.appliance_id for m in manifests]


def _share(manifests: Sequence[Manifest]) -> tuple[str, str]:
    """Manifests as two JSON documents: each content once, and which appliance has which."""
    numbers: dict[tuple[str, str], int] = {}
    contents: list[dict[str, Any]] = []
    members: list[dict[str, Any]] = []
    texts: dict[int, str] = {}
    for m in manifests:
        withheld = texts.setdefault(id(m.withheld), canonical_json(m.withheld))
        number = numbers.setdefault((m.manifest_hash, withheld), len(numbers))
        if number == len(contents):
            contents.append({"no": number, "manifest_hash": m.manifest_hash, "rules": m.rules, "withheld": m.withheld})
        members.append({"no": number, "appliance_id": m.appliance_id, "site_id": m.site_id})
    return json.dumps(contents), json.dumps(members)


# Commands are told of promoted rules alone: built-in rules ship with the agent.
_WANTED = """
    wanted AS (
      SELECT m.appliance_id, e.rule ->> 'id' AS rule_id, (e.rule ->> 'version')::integer AS rule_version,
             coalesce(a.status = 'online' AND a.last_checkin >= :alive_since, false) AS live
      FROM rule_manifests m
      CROSS JOIN LATERAL jsonb_array_elements(m.rules) AS e(rule)
      LEFT JOIN appliances a USING (appliance_id)
      WHERE e.rule ->> 'source' <> 'builtin'
    )
"""


def queue_commands(conn: sa.Connection, batch_id: int) -> CommandReport:
    """Queue one command for each (appliance, promoted rule, version) in the manifests; tend the older ones.

    A command that was not fetched or not acknowledged within its lifetime expires; while the rule is still
    wanted and the appliance alive it is queued again, in the same row, so its age stays true. A command for a
    rule that the appliance should no longer run is superseded. A command that the appliance refused
    (`failed`) stays so. Parameters hold no time, so that a repetition is the same command: publishing twice
    queues nothing more.

    Args:
        conn: a connection in a transaction, with the manifests written; the caller commits.
        batch_id: the batch to stamp on what is written.

    Raises:
        UsageError: there is no such batch.
    """
    conn.execute(_LOCK)
    clock = clock_of(conn, batch_id)
    values = {
        "batch": batch_id,
        "clock": clock,
        "type": COMMAND_TYPE,
        "expires_at": clock + COMMAND_LIFETIME,
        "alive_since": clock - LIVE_WITHIN,
    }
    superseded = conn.execute(
        sa.text(
            f"""
            WITH {_WANTED}
            UPDATE appliance_commands c SET status = 'superseded', batch_id = :batch,
              status_reason = 'the appliance should no longer run this version of the rule'
            WHERE c.command_type = :type AND c.rule_id IS NOT NULL AND c.status IN ('pending', 'delivered')
              AND NOT EXISTS (
                SELECT FROM wanted w
                WHERE (w.appliance_id, w.rule_id, w.rule_version)
                    = (c.appliance_id, c.rule_id, c.rule_version))
            """  # noqa: S608
        ),
        values,
    ).rowcount
    expired = expire_commands(conn, clock, batch_id=batch_id)
    redelivered = conn.execute(
        sa.text(
            f"""
            WITH {_WANTED}
            UPDATE appliance_commands c SET status = 'pending', delivered_at = NULL, batch_id = :batch,
              expires_at = :expires_at, status_reason = 'queued again, was ' || c.status
            FROM wanted w
            WHERE c.command_type = :type AND c.status IN ('expired', 'superseded') AND w.live
              AND (w.appliance_id, w.rule_id, w.rule_version) = (c.appliance_id, c.rule_id, c.rule_version)
            """  # noqa: S608
        ),
        values,
    ).rowcount
    queued = conn.execute(
        sa.text(
            f"""
            WITH {_WANTED}
            INSERT INTO appliance_commands
              (appliance_id, command_type, params, status, created_at, expires_at,
               rule_id, rule_version, batch_id)
            SELECT w.appliance_id, :type,
                   jsonb_build_object('rule_id', w.rule_id, 'rule_version', w.rule_version),
                   'pending', :clock, :expires_at, w.rule_id, w.rule_version, :batch
            FROM wanted w
            WHERE w.live
            ORDER BY w.appliance_id, w.rule_id
            ON CONFLICT DO NOTHING
            """  # noqa: S608
        ),
        values,
    ).rowcount
    row = conn.execute(
        sa.text(
            f"""
            WITH {_WANTED}
            SELECT (SELECT count(*) FROM appliance_commands
                    WHERE command_type = :type AND status IN ('pending', 'delivered')),
                   (SELECT count(DISTINCT appliance_id) FROM wanted WHERE NOT live)
            """  # noqa: S608
        ),
        values,
    ).one()
    return CommandReport(queued, redelivered, expired, superseded, open=row[0], waiting_appliances=row[1])


def expire_commands(conn: sa.Connection, clock: datetime, *, batch_id: int | None = None) -> int:
    """Expire the commands, of any type, that were not acknowledged by their `expires_at`; returns how many.

    A command without `expires_at` never expires.
    """
    return conn.execute(
        sa.text(
            """
            UPDATE appliance_commands SET status = 'expired', batch_id = coalesce(:batch, batch_id),
              status_reason =
                CASE status WHEN 'pending' THEN 'not fetched in time' ELSE 'not acknowledged in time' END
            WHERE status IN ('pending', 'delivered') AND expires_at <= :clock
            """
        ),
        {"clock": clock, "batch": batch_id},
    ).rowcount


def take_commands(conn: sa.Connection, appliance_id: str, clock: datetime) -> list[Command]:
    """Hand an appliance its pending commands and mark them delivered; oldest first.

    Two fetches at once hand each command to one of them.
    """
    rows = conn.execute(
        sa.text(
            """
            WITH taken AS (
              SELECT id FROM appliance_commands
              WHERE appliance_id = :appliance AND status = 'pending'
                AND (expires_at IS NULL OR expires_at > :clock)
              FOR UPDATE SKIP LOCKED
            ), delivered AS (
              UPDATE appliance_commands c SET status = 'delivered', delivered_at = :clock
              FROM taken WHERE c.id = taken.id
              RETURNING c.id, c.command_type, c.params, c.created_at
            )
            SELECT id, command_type, params FROM delivered ORDER BY created_at, params ->> 'rule_id', id
            """
        ),
        {"appliance": appliance_id, "clock": clock},
    )
    return [Command(**row) for row in rows.mappings()]


def acknowledge_command(
    conn: sa.Connection, appliance_id: str, command_id: UUID, clock: datetime, *, failure: str | None = None
) -> bool:
    """Record an appliance's answer to a command: done, or refused with a reason.

    An answer that comes after the command expired still counts, since the appliance did act on it. A repeated
    answer, or one to a superseded command, changes nothing.

    Args:
        conn: a connection in a transaction; the caller commits.
        appliance_id: the appliance that answers; it can answer for itself only.
        command_id: the command it answers.
        clock: when it answered.
        failure: why the appliance could not do it; None: done.

    Returns:
        Whether the command changed.

    Raises:
        UsageError: this appliance has no such command.
    """
    known = conn.execute(
        sa.text("SELECT FROM appliance_commands WHERE id = :id AND appliance_id = :appliance FOR UPDATE"),
        {"id": command_id, "appliance": appliance_id},
    ).first()
    if known is None:
        raise UsageError(
            f"Appliance {appliance_id} has no command {command_id}.",
            hint="Fetch the commands again; each appliance answers for its own.",
        )
    changed = conn.execute(
        sa.text(
            """
            UPDATE appliance_commands SET
              status = CASE WHEN CAST(:failure AS text) IS NULL THEN 'acknowledged' ELSE 'failed' END,
              acknowledged_at = CASE WHEN CAST(:failure AS text) IS NULL THEN CAST(:clock AS timestamptz) END,
              delivered_at = coalesce(delivered_at, :clock), status_reason = :failure
            WHERE id = :id AND status IN ('pending', 'delivered', 'expired')
            """
        ),
        {"id": command_id, "clock": clock, "failure": failure},
    ).rowcount
    return changed == 1


def deployments(
    conn: sa.Connection,
    *,
    rule_id: str | None = None,
    appliance_id: str | None = None,
    limit: int | None = None,
) -> list[Deployment]:
    """How far each promoted rule version got on each appliance, by rule, version and appliance.

    Args:
        conn: any connection; nothing is written.
        rule_id: one rule only.
        appliance_id: one appliance only.
        limit: at most so many rows; None: all.
    """
    rows = conn.execute(
        sa.text(
            """
            SELECT rule_id, rule_version, appliance_id, site_id, wanted, state, command_status,
                   withheld_reason, promoted_at, queued_at, delivered_at, acknowledged_at, first_executed_at
            FROM deployments
            WHERE (CAST(:rule AS text) IS NULL OR rule_id = :rule)
              AND (CAST(:appliance AS text) IS NULL OR appliance_id = :appliance)
            ORDER BY rule_id, rule_version, appliance_id
            LIMIT :limit
            """
        ),
        {"rule": rule_id, "appliance": appliance_id, "limit": limit},
    )
    return [Deployment(**row) for row in rows.mappings()]
