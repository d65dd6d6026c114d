"""Withdrawn rules: what an appliance was told of, must run no more, and has not yet let go.

Belongs here: marking what left or entered a manifest, what an appliance confirmed, and the tombstones that its
manifest carries. Does not belong here: what a manifest holds (`manifest`) and the commands about it (`publish`).

The row of a `sync_promoted_rule` command is the record of one rule version on one appliance: `told_at`, when it was
first handed over; `withdrawn_at`, since when it is in the manifest no more; `gone_at`, when the appliance let us know
that it runs it no more: by acknowledging the withdrawal, or by reporting the hash of a rule set without it. Between
the last two stands a tombstone, for at most `TOMBSTONE_LIFETIME`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

import sqlalchemy as sa

SYNC = "sync_promoted_rule"
WITHDRAW = "withdraw_rule"

# An appliance that has not spoken for so long is dead or dismounted; its next manifest replaces the whole rule set.
TOMBSTONE_LIFETIME = timedelta(days=30)


@dataclass(frozen=True)
class ContentChange:
    """A manifest that was written: the content before (None: there was no manifest, or nobody knows) and after."""

    appliance_id: str
    old: str | None
    new: str


# What a change took out of a manifest and put into it; thousands of appliances share a few pairs of contents.
DIFFERENCES = """
    pairs AS (SELECT DISTINCT old, new FROM changed WHERE old IS NOT NULL),
    olds AS (
      SELECT p.old, p.new, r.rule_id, r.rule_version
      FROM pairs p JOIN manifest_contents c ON c.content_hash = p.old
      CROSS JOIN LATERAL unnest(c.rule_ids, c.rule_versions) AS r(rule_id, rule_version)
    ),
    news AS (
      SELECT p.old, p.new, r.rule_id, r.rule_version
      FROM pairs p JOIN manifest_contents c ON c.content_hash = p.new
      CROSS JOIN LATERAL unnest(c.rule_ids, c.rule_versions) AS r(rule_id, rule_version)
    ),
    removed AS (SELECT * FROM olds EXCEPT SELECT * FROM news),
    added AS (SELECT * FROM news EXCEPT SELECT * FROM olds)
"""
# Of an appliance whose content before is not known: everything that it should run.
WANTED_IN_FULL = """
    wanted AS (
      SELECT d.appliance_id, r.rule_id, r.rule_version
      FROM changed d JOIN manifest_contents c ON c.content_hash = d.new
      CROSS JOIN LATERAL unnest(c.rule_ids, c.rule_versions) AS r(rule_id, rule_version)
      WHERE d.old IS NULL
    )
"""
_CHANGED = """
    changed AS (
      SELECT * FROM unnest(CAST(:ids AS text[]), CAST(:olds AS text[]), CAST(:news AS text[])) AS d(appliance_id, old, new)
    )
"""
# A tombstone stands for these rows. Its index has the same condition, but for the age.
ACTIVE = """
    c.command_type = 'sync_promoted_rule' AND c.told_at IS NOT NULL
    AND c.withdrawn_at IS NOT NULL AND c.gone_at IS NULL AND c.withdrawn_at > :withdrawn_since
"""


def mark_withdrawn(conn: sa.Connection, changes: Sequence[ContentChange], clock: datetime) -> None:
    """Note on the rows of the rule versions that left a manifest since when, and on those that came back that they did.

    Args:
        conn: a connection in a transaction, with manifests and contents written.
        changes: the manifests that were written.
        clock: the moment to note.
    """
    if not changes:
        return
    values = {
        "ids": [c.appliance_id for c in changes],
        "olds": [c.old for c in changes],
        "news": [c.new for c in changes],
        "clock": clock,
    }
    conn.execute(
        sa.text(
            f"""
            WITH {_CHANGED}, {DIFFERENCES}
            UPDATE appliance_commands c SET withdrawn_at = :clock, gone_at = NULL
            FROM changed d JOIN removed r ON (r.old, r.new) = (d.old, d.new)
            WHERE (c.appliance_id, c.rule_id, c.rule_version) = (d.appliance_id, r.rule_id, r.rule_version)
              AND c.command_type = 'sync_promoted_rule' AND c.withdrawn_at IS NULL
            """  # noqa: S608
        ),
        values,
    )
    back = """
            UPDATE appliance_commands c SET
              withdrawn_at = NULL, gone_at = NULL,
              status = CASE c.command_type WHEN 'withdraw_rule' THEN 'superseded' ELSE c.status END,
              status_reason = CASE c.command_type WHEN 'withdraw_rule' THEN 'the appliance should run the rule again'
                              ELSE c.status_reason END
            FROM {source}
            WHERE (c.appliance_id, c.rule_id, c.rule_version) = ({keys})
              AND (c.command_type = 'sync_promoted_rule' AND c.withdrawn_at IS NOT NULL
                   OR c.command_type = 'withdraw_rule' AND c.status <> 'superseded')
    """
    conn.execute(
        sa.text(
            f"WITH {_CHANGED}, {DIFFERENCES} "
            + back.format(
                source="changed d JOIN added r ON (r.old, r.new) = (d.old, d.new)",
                keys="d.appliance_id, r.rule_id, r.rule_version",
            )
        ),
        values,
    )
    if all(change.old is not None for change in changes):
        return
    conn.execute(
        sa.text(
            f"""
            WITH {_CHANGED}, {WANTED_IN_FULL}
            UPDATE appliance_commands c SET withdrawn_at = :clock, gone_at = NULL
            FROM changed d
            WHERE d.old IS NULL AND c.appliance_id = d.appliance_id
              AND c.command_type = 'sync_promoted_rule' AND c.rule_id IS NOT NULL AND c.withdrawn_at IS NULL
              AND NOT EXISTS (
                SELECT FROM wanted w
                WHERE (w.appliance_id, w.rule_id, w.rule_version) = (c.appliance_id, c.rule_id, c.rule_version))
            """  # noqa: S608
        ),
        values,
    )
    conn.execute(
        sa.text(
            f"WITH {_CHANGED}, {WANTED_IN_FULL} "
            + back.format(source="wanted w", keys="w.appliance_id, w.rule_id, w.rule_version")
        ),
        values,
    )


def confirm_gone(conn: sa.Connection, clock: datetime) -> int:
    """Note which withdrawn rule versions the appliances have let go; returns how many.

    An appliance says so by acknowledging the withdrawal, or by reporting, after it, the hash of the rule set that it
    should run.
    """
    return conn.execute(
        sa.text(
            """
            UPDATE appliance_commands c SET gone_at = :clock
            WHERE c.command_type = 'sync_promoted_rule' AND c.withdrawn_at IS NOT NULL AND c.gone_at IS NULL
              AND (
                EXISTS (
                  SELECT FROM appliance_commands w
                  WHERE (w.appliance_id, w.rule_id, w.rule_version) = (c.appliance_id, c.rule_id, c.rule_version)
                    AND w.command_type = 'withdraw_rule' AND w.status = 'acknowledged')
                OR EXISTS (
                  SELECT FROM appliances a JOIN appliance_manifests m USING (appliance_id)
                  JOIN manifest_contents t USING (content_hash)
                  WHERE a.appliance_id = c.appliance_id AND a.reported_manifest_hash = t.manifest_hash
                    AND a.state_reported_at > c.withdrawn_at)
              )
            """
        ),
        {"clock": clock},
    ).rowcount


def write_tombstones(conn: sa.Connection, batch_id: int, clock: datetime) -> tuple[int, int]:
    """Bring the tombstones of every manifest in line; returns (tombstones that stand, manifests rewritten for them).

    Each is `{rule_id, version, reason, since}`, ordered by rule and version. The reason is that of the ledger where
    the rule left service, the agent's where it cannot run it, else the rollout's.
    """
    rewritten = conn.execute(
        sa.text(
            f"""
            WITH stones AS (
              SELECT c.appliance_id, jsonb_agg(jsonb_build_object(
                'rule_id', c.rule_id,
                'version', c.rule_version,
                'reason', CASE
                  WHEN r.rule_id IS NULL THEN 'the rule is registered no more'
                  WHEN r.enabled AND r.rule_version > c.rule_version THEN 'replaced by version ' || r.rule_version
                  WHEN NOT r.enabled THEN r.state || coalesce(': ' || r.state_reason, '')
                  ELSE coalesce(
                    (SELECT w ->> 'reason' FROM jsonb_array_elements(t.withheld) AS w WHERE w ->> 'rule_id' = c.rule_id LIMIT 1),
                    'the rule is in service elsewhere, and not for this appliance')
                END,
                'since', to_char(c.withdrawn_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"')
              ) ORDER BY c.rule_id, c.rule_version) AS tombstones
              FROM appliance_commands c
              JOIN appliance_manifests m ON m.appliance_id = c.appliance_id
              JOIN manifest_contents t ON t.content_hash = m.content_hash
              LEFT JOIN l1_rules r ON r.rule_id = c.rule_id
              WHERE {ACTIVE}
              GROUP BY c.appliance_id
            )
            UPDATE appliance_manifests m SET
              tombstones = coalesce(s.tombstones, '[]'), batch_id = :batch
            FROM appliance_manifests o LEFT JOIN stones s ON s.appliance_id = o.appliance_id
            WHERE m.appliance_id = o.appliance_id AND o.tombstones <> coalesce(s.tombstones, '[]')
            """  # noqa: S608
        ),
        {"batch": batch_id, "withdrawn_since": clock - TOMBSTONE_LIFETIME},
    ).rowcount
    standing = conn.execute(
        sa.text("SELECT coalesce(sum(jsonb_array_length(tombstones)), 0)::bigint FROM appliance_manifests")
    ).scalar_one()
    return int(standing), rewritten
