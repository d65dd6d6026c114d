"""Manifests and commands in the database: what every appliance should run, and telling it so.

Belongs here: reading rules and appliances, writing `appliance_manifests`, the life of `appliance_commands`, the
list of deployments. Does not belong here: what goes into a manifest (`manifest`), nor HTTP. Every function
works inside the caller's transaction and can be repeated: a second call finds nothing to do.
"""

# ruff: noqa: S608 (statements are put together from constants of this room; every value is bound)
from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import sqlalchemy as sa

from flywheel_pipeline.database import tables as t
from flywheel_pipeline.delivery.conflicts import find_conflicts, write_conflicts
from flywheel_pipeline.delivery.manifest import (
    ApplianceRow,
    Manifest,
    RuleRow,
    RunbookRow,
    build_manifests,
    canonical_json,
    content_hash,
    unservable_rules,
)
from flywheel_pipeline.delivery.scopes import load_quarantines
from flywheel_pipeline.delivery.tombstones import (
    ACTIVE,
    TOMBSTONE_LIFETIME,
    ContentChange,
    compare_contents,
    confirm_gone,
    mark_withdrawn,
    write_tombstones,
)
from flywheel_pipeline.errors import UsageError
from flywheel_pipeline.health.failing_rules import AT_LEAST, BELOW

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
        tombstones: pairs of appliance and withdrawn rule version that the appliance has not let go yet.
        tombstones_rewritten: manifests whose list of them changed.
        shadowed: pairs of rules of which the second never fires where both are served.
        overlaps: pairs of rules of which it depends on the incident which one fires.
    """

    appliances: int
    written: int
    unchanged: int
    removed: int
    rules: int
    withheld: int
    unservable: tuple[tuple[str, str], ...] = ()
    tombstones: int = 0
    tombstones_rewritten: int = 0
    shadowed: int = 0
    overlaps: int = 0


@dataclass(frozen=True)
class CommandReport:
    """What `queue_commands` did, in commands.

    Attributes:
        queued: created now.
        redelivered: queued again: expired, or superseded and wanted once more.
        expired: not fetched or not acknowledged in time.
        superseded: those that hold no more: the rule left the manifest, came back, or is known to be gone.
        open: pending or delivered after all that.
        waiting_appliances: those with rules to be told of but without a sign of life, so without commands.
        withdrawn: withdrawals created now.
    """

    queued: int
    redelivered: int
    expired: int
    superseded: int
    open: int
    waiting_appliances: int
    withdrawn: int = 0

    @property
    def changes(self) -> int:
        """Commands whose row was written; 0 when a publication is repeated."""
        return self.queued + self.redelivered + self.expired + self.superseded + self.withdrawn


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
    """All rules, by id; `failing` by `is_failing` on what the scorecard shows."""
    rows = conn.execute(
        sa.text(
            """
            SELECT r.rule_id, r.rule_version, r.incident_pattern, r.runbook_id, r.platform, r.source, r.state,
                   r.enabled, r.content_hash, r.rollout_step,
                   coalesce(s.successes + s.failures, 0) AS rated, s.success_rate, s.rated_rate
            FROM l1_rules r LEFT JOIN rule_scorecard s USING (rule_id)
            ORDER BY r.rule_id
            """
        )
    )
    measured = ("rated", "success_rate", "rated_rate")
    return [
        RuleRow(
            **{name: value for name, value in row.items() if name not in measured},
            failing=is_failing(row["source"], row["rated"], row["success_rate"], row["rated_rate"]),
        )
        for row in rows.mappings()
    ]


def is_failing(source: str, rated: int, success_rate: float | None, rated_rate: float | None) -> bool:
    """Whether a rule is measured to fail and stands behind the others; see `manifest.rule_order`.

    A built-in rule fails only where its raw and its rated rate are both low: the raw rate alone counts hosts that are
    merely unreachable, the rated one alone misses successes of agents that send no verification. A promoted rule
    fails on the rated one alone. So one that stands before a built-in rule is never below the rate at which the
    built-in lost its place: a promoted rule never outranks a healthier built-in.

    Args:
        source: builtin or promoted.
        rated: executions that ended in a verified success or a failure; fewer than `AT_LEAST` say too little.
        success_rate: fraction of all executions that were reported as success.
        rated_rate: fraction of the rated executions that were verified successes.
    """
    if rated < AT_LEAST or rated_rate is None or rated_rate >= BELOW:
        return False
    return source != "builtin" or (success_rate is not None and success_rate < BELOW)


def load_appliances(conn: sa.Connection, clock: datetime) -> list[ApplianceRow]:
    """The appliances that are to have a manifest: all but the retired; renamed sites by the name in use.

    Each with the action forms that it has shown in telemetry not to know (`capability_findings`).
    """
    refused: dict[str, set[str]] = {}
    found = conn.execute(
        sa.text(
            "SELECT unnest(open_on) AS appliance_id, action_form FROM capability_findings WHERE cardinality(open_on) > 0"
        )
    )
    for row in found:
        refused.setdefault(row.appliance_id, set()).add(row.action_form)
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
    return [ApplianceRow(**row, refused=tuple(sorted(refused.get(row["appliance_id"], ())))) for row in rows.mappings()]


def load_catalogue(conn: sa.Connection) -> dict[str, RunbookRow]:
    """The runbook catalogue, by runbook id."""
    c = t.runbooks.c
    rows = conn.execute(sa.select(c.runbook_id, c.name, c.platform, c.severity, c.enabled).order_by(c.runbook_id))
    return {row["runbook_id"]: RunbookRow(**row) for row in rows.mappings()}


def write_manifests(conn: sa.Connection, batch_id: int) -> ManifestReport:
    """Bring `appliance_manifests` and their contents to the desired state; rows that are right already are not touched.

    What leaves a manifest stands there as a tombstone until the appliance has let it go (`tombstones`).

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
    hashes = write_contents(conn, manifests)
    standing = {
        row.appliance_id: (row.site_id, row.content_hash)
        for row in conn.execute(sa.text("SELECT appliance_id, site_id, content_hash FROM appliance_manifests"))
    }
    wanted = {m.appliance_id: (m.site_id, content) for m, content in zip(manifests, hashes, strict=True)}
    changed = [a for a, content in wanted.items() if standing.get(a) != content]
    values = {
        "ids": changed,
        "sites": [wanted[a][0] for a in changed],
        "contents": [wanted[a][1] for a in changed],
        "batch": batch_id,
        "clock": clock,
    }
    if changed:
        conn.execute(sa.text(_PUT_MANIFESTS), values)
    gone = sorted(standing.keys() - wanted.keys())
    if gone:
        conn.execute(sa.text("DELETE FROM appliance_manifests WHERE appliance_id = ANY(:gone)"), {"gone": gone})
    changes = [ContentChange(a, standing.get(a, ("", None))[1], wanted[a][1]) for a in changed]
    mark_withdrawn(conn, changes, clock)
    confirm_gone(conn, clock)
    tombstones, rewritten = write_tombstones(conn, batch_id, clock)
    conn.execute(sa.text(_NOTE_DRIFT), {"clock": clock})
    conflicts = find_conflicts(rules, manifests)
    write_conflicts(conn, conflicts, batch_id)
    if changed or gone:
        _drop_unused_contents(conn)
    return ManifestReport(
        appliances=len(manifests),
        written=len(changed),
        unchanged=len(manifests) - len(changed),
        removed=len(gone),
        rules=sum(len(m.rules) for m in manifests),
        withheld=sum(len(m.withheld) for m in manifests),
        unservable=tuple(unservable_rules(rules, catalogue)),
        tombstones=tombstones,
        tombstones_rewritten=rewritten,
        shadowed=sum(c.kind == "shadowed" for c in conflicts),
        overlaps=sum(c.kind == "overlaps" for c in conflicts),
    )


# Since when, and not how often: a manifest that changes daily must not make an appliance look young that never follows.
_NOTE_DRIFT = """
    UPDATE appliance_manifests m SET drift_since = CASE WHEN m.drift_since IS NULL THEN :clock END
    FROM appliances a, manifest_contents c
    WHERE a.appliance_id = m.appliance_id AND c.content_hash = m.content_hash
      AND (a.reported_manifest_hash IS NOT DISTINCT FROM c.manifest_hash) = (m.drift_since IS NOT NULL)
"""

_PUT_MANIFESTS = """
    INSERT INTO appliance_manifests AS m (appliance_id, site_id, content_hash, batch_id, built_at)
    SELECT d.appliance_id, d.site_id, d.content_hash, :batch, :clock
    FROM unnest(CAST(:ids AS text[]), CAST(:sites AS text[]), CAST(:contents AS text[])) AS d(appliance_id, site_id, content_hash)
    ON CONFLICT (appliance_id) DO UPDATE SET
      site_id = excluded.site_id, content_hash = excluded.content_hash, batch_id = excluded.batch_id, built_at = excluded.built_at
"""


def write_contents(conn: sa.Connection, manifests: Sequence[Manifest]) -> list[str]:
    """Store the contents, and the entries in them, that are new; return the content hash of every manifest, in order."""
    withheld_texts: dict[int, str] = {}
    by_content: dict[tuple[str, int], str] = {}
    distinct: dict[str, Manifest] = {}
    hashes: list[str] = []
    for m in manifests:
        key = (m.manifest_hash, id(m.withheld))
        if key not in by_content:
            withheld = withheld_texts.setdefault(id(m.withheld), canonical_json(m.withheld))
            by_content[key] = content_hash(m.manifest_hash, withheld)
            distinct.setdefault(by_content[key], m)
        hashes.append(by_content[key])
    known = set(conn.execute(sa.text("SELECT content_hash FROM manifest_contents")).scalars())
    fresh = [(content, distinct[content]) for content in sorted(distinct.keys() - known)]
    if not fresh:
        return hashes
    entry_ids = _write_entries(conn, [m for _, m in fresh])
    kept_back = {key: place for place, key in enumerate(dict.fromkeys(id(m.withheld) for _, m in fresh))}
    promoted = [sorted((r["id"], r["version"]) for r in m.rules if r["source"] != "builtin") for _, m in fresh]
    # As documents: text in an array is quoted character by character, which takes longer than all the rest.
    conn.execute(
        sa.text(
            """
            INSERT INTO manifest_contents (content_hash, manifest_hash, entry_ids, withheld, rule_count, rule_ids, rule_versions)
            SELECT d.content_hash, d.manifest_hash, d.entry_ids, w.withheld, cardinality(d.entry_ids), d.rule_ids, d.rule_versions
            FROM jsonb_to_recordset(CAST(:contents AS jsonb))
              AS d(content_hash text, manifest_hash text, entry_ids bigint[], kept_back integer, rule_ids text[], rule_versions integer[])
            JOIN jsonb_array_elements(CAST(:withheld AS jsonb)) WITH ORDINALITY AS w(withheld, place) ON w.place = d.kept_back + 1
            """
        ),
        {
            "contents": json.dumps(
                [
                    {
                        "content_hash": content,
                        "manifest_hash": m.manifest_hash,
                        "entry_ids": [entry_ids[id(entry)] for entry in m.rules],
                        "kept_back": kept_back[id(m.withheld)],
                        "rule_ids": [rule_id for rule_id, _ in listed],
                        "rule_versions": [version for _, version in listed],
                    }
                    for (content, m), listed in zip(fresh, promoted, strict=True)
                ]
            ),
            "withheld": f"[{','.join(withheld_texts[key] for key in kept_back)}]",
        },
    )
    return hashes


def _write_entries(conn: sa.Connection, manifests: Sequence[Manifest]) -> dict[int, int]:
    """Store the entries that are new; return the entry id by the identity of the entry's object, of which few are shared."""
    objects = {id(entry): entry for m in manifests for entry in m.rules}
    texts = {key: canonical_json(entry) for key, entry in objects.items()}
    by_text = {text: (hashlib.sha256(text.encode()).hexdigest(), objects[key]) for key, text in texts.items()}
    values = {
        "hashes": [hashed for hashed, _ in by_text.values()],
        "rules": [str(entry["id"]) for _, entry in by_text.values()],
        "versions": [int(entry["version"]) for _, entry in by_text.values()],
        "entries": f"[{','.join(by_text)}]",
    }
    conn.execute(
        sa.text(
            """
            INSERT INTO manifest_entries (entry_hash, rule_id, rule_version, entry)
            SELECT d.entry_hash, d.rule_id, d.rule_version, e.entry
            FROM unnest(CAST(:hashes AS text[]), CAST(:rules AS text[]), CAST(:versions AS integer[]))
              WITH ORDINALITY AS d(entry_hash, rule_id, rule_version, place)
            JOIN jsonb_array_elements(CAST(:entries AS jsonb)) WITH ORDINALITY AS e(entry, place) USING (place)
            WHERE NOT EXISTS (SELECT FROM manifest_entries k WHERE k.entry_hash = d.entry_hash)
            ORDER BY d.rule_id, d.entry_hash
            """
        ),
        values,
    )
    stored = conn.execute(
        sa.text("SELECT entry_hash, entry_id FROM manifest_entries WHERE entry_hash = ANY (:hashes)"),
        {"hashes": values["hashes"]},
    )
    ids = {row.entry_hash: row.entry_id for row in stored}
    return {key: ids[by_text[text][0]] for key, text in texts.items()}


def _drop_unused_contents(conn: sa.Connection) -> None:
    conn.execute(
        sa.text(
            """
            DELETE FROM manifest_contents c
            WHERE NOT EXISTS (SELECT FROM appliance_manifests m WHERE m.content_hash = c.content_hash)
              AND NOT EXISTS (SELECT FROM appliance_manifests m WHERE m.commanded_hash = c.content_hash)
            """
        )
    )
    conn.execute(
        sa.text(
            """
            DELETE FROM manifest_entries e
            WHERE NOT EXISTS (
              SELECT FROM (SELECT DISTINCT unnest(c.entry_ids) AS entry_id FROM manifest_contents c) AS u
              WHERE u.entry_id = e.entry_id)
            """
        )
    )


# Appliances whose commands are not in line with their manifest, and what the difference is. Commands are told of promoted
# rules alone: built-in rules ship with the agent.
_LIVE = "coalesce(a.status = 'online' AND a.last_checkin >= :alive_since, false)"
_CHANGED = f"""
    SELECT m.appliance_id, m.commanded_hash AS old, m.content_hash AS new, {_LIVE} AS live
    FROM appliance_manifests m LEFT JOIN appliances a USING (appliance_id)
    WHERE m.commanded_hash IS DISTINCT FROM m.content_hash
"""
_NEWLY_WANTED = """
    WITH newly_wanted AS (
      SELECT d.appliance_id, r.rule_id, r.rule_version
      FROM changed d JOIN added r ON (r.old, r.new) = (d.old, d.new)
      WHERE d.live
      UNION ALL
      SELECT w.appliance_id, w.rule_id, w.rule_version FROM wanted w JOIN changed d USING (appliance_id) WHERE d.live
    )
"""
_NO_LONGER = "the appliance should no longer run this version of the rule"


def queue_commands(conn: sa.Connection, batch_id: int) -> CommandReport:
    """Queue one command for each (appliance, promoted rule, version) in the manifests; tend the older ones.

    A rule version that an appliance was told of and should run no more gets a `withdraw_rule` command of the same
    key. A command that was not fetched or not acknowledged within its lifetime expires; while it still holds and the
    appliance is alive it is queued again, in the same row, so its age stays true. A command that holds no more is
    superseded. A command that the appliance refused (`failed`) stays so. Parameters hold no time, so that a
    repetition is the same command: publishing twice queues nothing more. No command waits for an appliance without
    a sign of life.

    Costs what changed: a manifest whose content its commands were brought in line with is not looked at again.

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
        "expires_at": clock + COMMAND_LIFETIME,
        "alive_since": clock - LIVE_WITHIN,
        "withdrawn_since": clock - TOMBSTONE_LIFETIME,
        "no_longer": _NO_LONGER,
    }

    def run(statement: str) -> int:
        return conn.execute(sa.text(statement), values).rowcount

    compare_contents(conn, _CHANGED, values)
    superseded = run(_SUPERSEDE_REMOVED) + run(_SUPERSEDE_UNKNOWN) + run(_SUPERSEDE_ORPHANS) + run(_SUPERSEDE_SETTLED)
    expired = expire_commands(conn, clock, batch_id=batch_id)
    redelivered = run(_REDELIVER_EXPIRED) + run(_REDELIVER_WANTED) + run(_REDELIVER_WITHDRAWALS)
    queued = run(_QUEUE_WANTED)
    withdrawn = run(_QUEUE_WITHDRAWALS)
    run(_MARK_COMMANDED)
    row = conn.execute(sa.text(_COUNT_COMMANDS), values).one()
    return CommandReport(
        queued, redelivered, expired, superseded, open=row[0], waiting_appliances=row[1], withdrawn=withdrawn
    )


_SUPERSEDE_REMOVED = """
    UPDATE appliance_commands c SET status = 'superseded', batch_id = :batch, status_reason = :no_longer
    FROM changed d JOIN removed r ON (r.old, r.new) = (d.old, d.new)
    WHERE (c.appliance_id, c.rule_id, c.rule_version) = (d.appliance_id, r.rule_id, r.rule_version)
      AND c.command_type = 'sync_promoted_rule' AND c.status IN ('pending', 'delivered', 'expired')
"""
# Of appliances whose earlier content is not known, everything that the manifest does not hold.
_SUPERSEDE_UNKNOWN = """
    UPDATE appliance_commands c SET status = 'superseded', batch_id = :batch, status_reason = :no_longer
    FROM changed d
    WHERE d.old IS NULL AND c.appliance_id = d.appliance_id
      AND c.command_type = 'sync_promoted_rule' AND c.rule_id IS NOT NULL AND c.status IN ('pending', 'delivered', 'expired')
      AND NOT EXISTS (
        SELECT FROM wanted w
        WHERE (w.appliance_id, w.rule_id, w.rule_version) = (c.appliance_id, c.rule_id, c.rule_version))
"""
# Of appliances without a manifest, every command about a rule. One look at the index per appliance, not per command.
_SUPERSEDE_ORPHANS = """
    WITH RECURSIVE having_open(appliance_id) AS (
      (SELECT min(appliance_id) FROM appliance_commands WHERE status IN ('pending', 'delivered', 'expired'))
      UNION ALL
      SELECT (SELECT min(c.appliance_id) FROM appliance_commands c
              WHERE c.status IN ('pending', 'delivered', 'expired') AND c.appliance_id > h.appliance_id)
      FROM having_open h WHERE h.appliance_id IS NOT NULL
    ),
    orphans AS MATERIALIZED (
      SELECT h.appliance_id FROM having_open h
      WHERE h.appliance_id IS NOT NULL
        AND NOT EXISTS (SELECT FROM appliance_manifests m WHERE m.appliance_id = h.appliance_id)
    )
    UPDATE appliance_commands c SET status = 'superseded', batch_id = :batch, status_reason = :no_longer
    FROM orphans o
    WHERE c.appliance_id = o.appliance_id AND c.status IN ('pending', 'delivered', 'expired') AND c.rule_id IS NOT NULL
      AND c.command_type IN ('sync_promoted_rule', 'withdraw_rule')
"""
# Withdrawals that the appliance's own report has settled.
_SUPERSEDE_SETTLED = """
    UPDATE appliance_commands w SET
      status = 'superseded', batch_id = :batch, status_reason = 'the appliance reports a rule set without this version'
    FROM appliance_commands c
    WHERE w.command_type = 'withdraw_rule' AND w.status IN ('pending', 'delivered', 'expired')
      AND (c.appliance_id, c.rule_id, c.rule_version) = (w.appliance_id, w.rule_id, w.rule_version)
      AND c.command_type = 'sync_promoted_rule' AND c.gone_at IS NOT NULL
"""
_AGAIN = """
    UPDATE appliance_commands c SET status = 'pending', delivered_at = NULL, acknowledged_at = NULL, batch_id = :batch,
      expires_at = :expires_at, status_reason = 'queued again, was ' || c.status
"""
# What is expired still holds: what holds no more was superseded above. A withdrawal holds while its tombstone stands.
_REDELIVER_EXPIRED = f"""
    {_AGAIN}
    FROM appliances a
    WHERE a.appliance_id = c.appliance_id AND {_LIVE} AND c.status = 'expired' AND c.rule_id IS NOT NULL
      AND (c.command_type = 'sync_promoted_rule' OR c.command_type = 'withdraw_rule' AND EXISTS (
        SELECT FROM appliance_commands s
        WHERE (s.appliance_id, s.rule_id, s.rule_version) = (c.appliance_id, c.rule_id, c.rule_version)
          AND {ACTIVE.replace("c.", "s.")}))
"""
_REDELIVER_WANTED = f"""
    {_NEWLY_WANTED}
    {_AGAIN}
    FROM newly_wanted w
    WHERE c.command_type = 'sync_promoted_rule' AND c.status = 'superseded'
      AND (w.appliance_id, w.rule_id, w.rule_version) = (c.appliance_id, c.rule_id, c.rule_version)
"""
_REDELIVER_WITHDRAWALS = f"""
    {_AGAIN.replace(" c SET", " w SET").replace("c.status", "w.status")}
    FROM appliance_commands c JOIN appliances a USING (appliance_id)
    WHERE {ACTIVE} AND {_LIVE} AND w.command_type = 'withdraw_rule' AND w.status = 'superseded'
      AND (w.appliance_id, w.rule_id, w.rule_version) = (c.appliance_id, c.rule_id, c.rule_version)
"""
_QUEUE_WANTED = f"""
    {_NEWLY_WANTED}
    INSERT INTO appliance_commands
      (appliance_id, command_type, params, status, created_at, expires_at, rule_id, rule_version, batch_id)
    SELECT w.appliance_id, 'sync_promoted_rule',
           jsonb_build_object('rule_id', w.rule_id, 'rule_version', w.rule_version),
           'pending', :clock, :expires_at, w.rule_id, w.rule_version, :batch
    FROM newly_wanted w
    ORDER BY w.appliance_id, w.rule_id
    ON CONFLICT DO NOTHING
"""
_QUEUE_WITHDRAWALS = f"""
    INSERT INTO appliance_commands
      (appliance_id, command_type, params, status, created_at, expires_at, rule_id, rule_version, batch_id)
    SELECT c.appliance_id, 'withdraw_rule',
           jsonb_build_object('rule_id', c.rule_id, 'rule_version', c.rule_version),
           'pending', :clock, :expires_at, c.rule_id, c.rule_version, :batch
    FROM appliance_commands c
    JOIN appliances a USING (appliance_id)
    JOIN appliance_manifests m USING (appliance_id)
    WHERE {ACTIVE} AND {_LIVE}
    ORDER BY c.appliance_id, c.rule_id, c.rule_version
    ON CONFLICT DO NOTHING
"""
# An appliance without a sign of life stays due: it is told when it is back.
_MARK_COMMANDED = f"""
    UPDATE appliance_manifests m SET commanded_hash = m.content_hash
    FROM appliances a
    WHERE a.appliance_id = m.appliance_id AND {_LIVE} AND m.commanded_hash IS DISTINCT FROM m.content_hash
"""
_COUNT_COMMANDS = f"""
    SELECT
      (SELECT count(*) FROM appliance_commands
       WHERE status IN ('pending', 'delivered') AND command_type IN ('sync_promoted_rule', 'withdraw_rule')),
      (SELECT count(*) FROM appliance_manifests m
       JOIN manifest_contents c USING (content_hash)
       LEFT JOIN appliances a USING (appliance_id)
       WHERE cardinality(c.rule_ids) > 0 AND NOT {_LIVE})
"""


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

    Two fetches at once hand each command to one of them. A rule that has left the manifest since its command was
    queued is not told of any more.
    """
    rows = conn.execute(
        sa.text(
            """
            WITH taken AS (
              SELECT id FROM appliance_commands
              WHERE appliance_id = :appliance AND status = 'pending' AND withdrawn_at IS NULL
                AND (expires_at IS NULL OR expires_at > :clock)
              FOR UPDATE SKIP LOCKED
            ), delivered AS (
              UPDATE appliance_commands c SET
                status = 'delivered', delivered_at = :clock, told_at = coalesce(c.told_at, :clock)
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
              delivered_at = coalesce(delivered_at, :clock), told_at = coalesce(told_at, :clock), status_reason = :failure
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
