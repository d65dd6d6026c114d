"""Rollout steps, quarantines of a part of the fleet, CUSUM checkpoints, and what each policy hash stands for."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_NOW = sa.text("clock_timestamp()")


def upgrade() -> None:
    op.add_column(
        "l1_rules",
        sa.Column(
            "rollout_step",
            sa.Integer(),
            nullable=True,
            comment="step within canary or ring, 1 or 2; fold of rule_events",
        ),
    )
    op.add_column(
        "rule_events",
        sa.Column(
            "rollout_step",
            sa.Integer(),
            nullable=True,
            comment="step within canary or ring, 1 or 2; null: no step, or before there were any",
        ),
    )
    op.drop_constraint(op.f("human_acts_act_check"), "human_acts", type_="check")
    op.create_check_constraint(
        op.f("human_acts_act_check"),
        "human_acts",
        "act IN ('approve', 'reject', 'quarantine', 'readmit', 'retire', 'freeze', 'thaw', 'lift', 'pause', 'resume', "
        "'abort')",
    )
    op.create_table_comment(
        "human_acts",
        "What people decided, append-only. The last of freeze and thaw says whether promotion is frozen, the last of "
        "pause and resume whether a rule's rollout is.",
        existing_comment="What people decided, append-only. The last of freeze and thaw says whether promotion is frozen.",
    )
    op.create_table(
        "policy_documents",
        sa.Column("policy_hash", sa.String(length=64), nullable=False),
        sa.Column("policy_name", sa.String(length=100), nullable=False),
        sa.Column(
            "document",
            postgresql.JSONB(astext_type=sa.Text()),
            nullable=False,
            comment="every value of the policy, defaults included",
        ),
        sa.Column("recorded_at", sa.TIMESTAMP(timezone=True), server_default=_NOW, nullable=False),
        sa.PrimaryKeyConstraint("policy_hash", name=op.f("policy_documents_pkey")),
        comment="Append-only: what each policy hash on a batch or a decision stands for.",
    )
    op.create_table(
        "scope_quarantines",
        sa.Column("event_id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("rule_id", sa.String(length=255), nullable=False),
        sa.Column("rule_version", sa.Integer(), nullable=False),
        sa.Column(
            "pattern_key",
            sa.String(length=1024),
            nullable=True,
            comment="of the rule, set by the database: copies of the rule share it",
        ),
        sa.Column("content_hash", sa.String(length=64), nullable=False, comment="of the rule, set by the database"),
        sa.Column("kind", sa.String(length=20), nullable=False),
        sa.Column("scope_kind", sa.String(length=20), nullable=False),
        sa.Column("scope_value", sa.String(length=255), nullable=False, comment="a site id, or an agent version"),
        sa.Column("actor", sa.String(length=255), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column(
            "evidence",
            postgresql.JSONB(astext_type=sa.Text()),
            server_default=sa.text("'{}'::jsonb"),
            nullable=False,
            comment="W, n, window",
        ),
        sa.Column("policy_hash", sa.String(length=64), nullable=True),
        sa.Column("decision_id", sa.BigInteger(), nullable=True),
        sa.Column("batch_id", sa.BigInteger(), nullable=True),
        sa.Column("run_id", sa.String(length=255), nullable=True),
        sa.Column("occurred_at", sa.TIMESTAMP(timezone=True), server_default=_NOW, nullable=False),
        sa.CheckConstraint("kind IN ('quarantined', 'lifted')", name=op.f("scope_quarantines_kind_check")),
        sa.CheckConstraint(
            "scope_kind IN ('site', 'agent_version') AND btrim(scope_value) <> ''",
            name=op.f("scope_quarantines_scope_check"),
        ),
        sa.ForeignKeyConstraint(
            ["decision_id"],
            ["promotion_decisions.decision_id"],
            name=op.f("scope_quarantines_decision_id_fkey"),
        ),
        sa.ForeignKeyConstraint(
            ["batch_id"], ["refresh_batches.batch_id"], name=op.f("scope_quarantines_batch_id_fkey")
        ),
        sa.PrimaryKeyConstraint("event_id", name=op.f("scope_quarantines_pkey")),
        comment="Append-only: which part of the fleet a rule is kept from. The last event of a scope says whether it is.",
    )
    op.create_index(
        "scope_quarantines_scope_idx",
        "scope_quarantines",
        ["rule_id", "rule_version", "scope_kind", "scope_value", "event_id"],
        unique=False,
    )
    op.create_table(
        "cusum_checkpoints",
        sa.Column("policy_hash", sa.String(length=64), nullable=False),
        sa.Column("rule_id", sa.String(length=255), nullable=False),
        sa.Column("rule_version", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("scope_kind", sa.String(length=20), nullable=False),
        sa.Column("scope_value", sa.String(length=255), nullable=False),
        sa.Column(
            "until",
            sa.TIMESTAMP(timezone=True),
            nullable=False,
            comment="episodes that began before it are in these figures; one for a rule",
        ),
        sa.Column("episodes", sa.BigInteger(), nullable=False),
        sa.Column("failures", sa.BigInteger(), nullable=False),
        sa.Column("w", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint(
            "policy_hash",
            "rule_id",
            "rule_version",
            "scope_kind",
            "scope_value",
            name=op.f("cusum_checkpoints_pkey"),
        ),
        comment="Where each CUSUM stood some days ago, so that a run need not begin at the version's first episode. "
        "Derived: deleted wherever an episode before it or a scope changes, and made anew.",
    )
