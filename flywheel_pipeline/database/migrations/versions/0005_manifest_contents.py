"""Contents of manifests, what appliances were told and must drop, conflicts between served rules."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

Stamp = sa.TIMESTAMP(timezone=True)


def upgrade() -> None:
    for name, comment in (
        ("told_at", "when the appliance was first handed this command; null: it knows nothing of it"),
        (
            "withdrawn_at",
            "sync commands: since when the rule version is in its manifest no more; null: it is, or never was",
        ),
        ("gone_at", "when the appliance let us know that it runs the withdrawn version no more"),
    ):
        op.add_column("appliance_commands", sa.Column(name, Stamp, nullable=True, comment=comment))
    op.execute("UPDATE appliance_commands SET told_at = coalesce(delivered_at, acknowledged_at)")
    op.create_index(
        "appliance_commands_unsettled_idx",
        "appliance_commands",
        ["appliance_id", "status"],
        postgresql_where=sa.text("status IN ('pending', 'delivered', 'expired')"),
    )
    op.create_index(
        "appliance_commands_due_idx",
        "appliance_commands",
        ["expires_at"],
        postgresql_where=sa.text("status IN ('pending', 'delivered')"),
    )
    op.create_index(
        "appliance_commands_tombstones_idx",
        "appliance_commands",
        ["appliance_id"],
        postgresql_where=sa.text("withdrawn_at IS NOT NULL AND gone_at IS NULL"),
    )
    for name, comment in (
        ("content_hash", "its row of manifest_contents; null: written before there was one"),
        ("commanded_hash", "the content that its commands were last brought in line with"),
    ):
        op.add_column("rule_manifests", sa.Column(name, sa.String(length=64), nullable=True, comment=comment))
    op.add_column(
        "rule_manifests",
        sa.Column(
            "drift_since",
            Stamp,
            nullable=True,
            comment="since when the appliance has not reported this rule set; null: it has",
        ),
    )
    op.create_table(
        "manifest_contents",
        sa.Column("content_hash", sa.String(length=64), nullable=False, comment="of rules and withheld"),
        sa.Column("manifest_hash", sa.String(length=64), nullable=False),
        sa.Column("rules", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("withheld", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("rule_count", sa.Integer(), nullable=False),
        sa.Column("rule_ids", sa.ARRAY(sa.Text()), nullable=False, comment="the promoted rules in it, by id"),
        sa.Column("rule_versions", sa.ARRAY(sa.Integer()), nullable=False, comment="their versions, in the same order"),
        sa.PrimaryKeyConstraint("content_hash", name=op.f("manifest_contents_pkey")),
        comment="Each content of a manifest once: thousands of appliances share a few, and two are compared by their lists.",
    )
    op.create_table(
        "rule_conflicts",
        sa.Column("incident_type", sa.Text(), nullable=False),
        sa.Column("platform", sa.String(length=50), nullable=False),
        sa.Column("winner_id", sa.String(length=255), nullable=False, comment="the rule that the agent tries first"),
        sa.Column("loser_id", sa.String(length=255), nullable=False, comment="the rule behind it"),
        sa.Column("winner_version", sa.Integer(), nullable=False),
        sa.Column("loser_version", sa.Integer(), nullable=False),
        sa.Column(
            "kind", sa.String(length=20), nullable=False, comment="shadowed: the loser never fires; overlaps: it may"
        ),
        sa.Column("same_runbook", sa.Boolean(), nullable=False, comment="both run the same script: harmless"),
        sa.Column("appliances", sa.Integer(), nullable=False, comment="manifests that hold both"),
        sa.Column("batch_id", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("kind IN ('shadowed', 'overlaps')", name=op.f("rule_conflicts_kind_check")),
        sa.PrimaryKeyConstraint("incident_type", "platform", "winner_id", "loser_id", name=op.f("rule_conflicts_pkey")),
        comment="Served rules that match the same incident on the same appliance: which one wins. Derived; rewritten on change.",
    )
