"""Withdrawn rules: what an appliance was told of, must run no more, and has not yet let go.

Belongs here: marking what left or entered a manifest, what an appliance confirmed, and the tombstones that its
manifest carries. Does not belong here: what a manifest holds (`manifest`) and the commands about it (`publish`).

The row of a `sync_promoted_rule` command is the record of one rule version on one appliance: `told_at`, when it was
first handed over; `withdrawn_at`, since when it is in the manifest no more; `gone_at`, when the appliance let us know
that it runs it no more: by acknowledging the withdrawal, or by reporting the hash of a rule set without it. Between
the last two stands a tombstone, for at most `TOMBSTONE_LIFETIME`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


_COMPARED = (
    "DROP TABLE IF EXISTS pg_temp.changed, pg_temp.removed, pg_temp.added, pg_temp.wanted",
    "CREATE TEMP TABLE changed (appliance_id text, old text, new text, live boolean) ON COMMIT DROP",
    "CREATE TEMP TABLE removed (old text, new text, rule_id text, rule_version integer) ON COMMIT DROP",
    "CREATE TEMP TABLE added (LIKE removed) ON COMMIT DROP",
    "CREATE TEMP TABLE wanted (appliance_id text, rule_id text, rule_version integer) ON COMMIT DROP",
)
# Thousands of appliances share a few pairs of contents, so a change is a pair's and not an appliance's.
_VERSIONS = """
    SELECT p.old, p.new, r.rule_id, r.rule_version
    FROM (SELECT DISTINCT old, new FROM changed WHERE old IS NOT NULL) AS p
    JOIN manifest_contents c ON c.content_hash = p.{side}
    CROSS JOIN LATERAL unnest(c.rule_ids, c.rule_versions) AS r(rule_id, rule_version)
"""
_DIFFER = "INSERT INTO {name} ({of}) EXCEPT ({other})"
_DIFFERENCES = (
    _DIFFER.format(name="removed", of=_VERSIONS.format(side="old"), other=_VERSIONS.format(side="new")),
    _DIFFER.format(name="added", of=_VERSIONS.format(side="new"), other=_VERSIONS.format(side="old")),
    """
    INSERT INTO wanted
    SELECT d.appliance_id, r.rule_id, r.rule_version
    FROM changed d JOIN manifest_contents c ON c.content_hash = d.new
    CROSS JOIN LATERAL unnest(c.rule_ids, c.rule_versions) AS r(rule_id, rule_version)
    WHERE d.old IS NULL
    """,
    "ANALYZE changed, removed, added, wanted",
)


def compare_contents(conn: sa.Connection, changed: str, values: Mapping[str, object]) -> int:
    """Compare contents once for all the statements behind it, in temporary tables of the transaction.

    `changed` holds the appliances, `removed` and `added` the promoted rule versions that a change from one content to
    another took out and put in, `wanted` all those that an appliance should run whose content before is not known.

    Args:
        conn: a connection in a transaction.
        changed: a query of appliance_id, old content hash (null: not known), new content hash, and whether the appliance
            is live; with the parameters `values`.
        values: its parameters.

    Returns:
        How many appliances changed.
    """
    for statement in _COMPARED:
        conn.execute(sa.text(statement))
    changes = conn.execute(sa.text(f"INSERT INTO changed {changed}"), values).rowcount
    for statement in _DIFFERENCES:
        conn.execute(sa.text(statement))
    return changes


_WRITTEN = """
    SELECT d.appliance_id, d.old, d.new, NULL::boolean
    FROM unnest(CAST(:ids AS text[]), CAST(:olds AS text[]), CAST(:news AS text[])) AS d(appliance_id, old, new)
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
    }
    compare_contents(conn, _WRITTEN, values)
    conn.execute(
        sa.text(
            """
            UPDATE appliance_commands c SET withdrawn_at = :clock, gone_at = NULL
            FROM changed d JOIN removed r ON (r.old, r.new) = (d.old, d.new)
            WHERE (c.appliance_id, c.rule_id, c.rule_version) = (d.appliance_id, r.rule_id, r.rule_version)
              AND c.command_type = 'sync_promoted_rule' AND c.withdrawn_at IS NULL
            """
        ),
        {"clock": clock},
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
            back.format(
                source="changed d JOIN added r ON (r.old, r.new) = (d.old, d.new)",
                keys="d.appliance_id, r.rule_id, r.rule_version",
            )
        )
    )
    if all(change.old is not None for change in changes):
        return
    conn.execute(
        sa.text(
            """
            UPDATE appliance_commands c SET withdrawn_at = :clock, gone_at = NULL
            FROM changed d
            WHERE d.old IS NULL AND c.appliance_id = d.appliance_id
              AND c.command_type = 'sync_promoted_rule' AND c.rule_id IS NOT NULL AND c.withdrawn_at IS NULL
              AND NOT EXISTS (
                SELECT FROM wanted w
                WHERE (w.appliance_id, w.rule_id, w.rule_version) = (c.appliance_id, c.rule_id, c.rule_version))
            """
        ),
        {"clock": clock},
    )
    conn.execute(sa.text(back.format(source="wanted w", keys="w.appliance_id, w.rule_id, w.rule_version")))


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
