"""Attributions of failing rules: the latest answer for each."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0006"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "rule_attributions",
        sa.Column("rule_id", sa.String(length=255), nullable=False),
        sa.Column(
            "evidence_hash",
            sa.String(length=64),
            nullable=False,
            comment="of the counts and the method it rests on",
        ),
        sa.Column("matches", sa.BigInteger(), nullable=False, comment="executions it rests on"),
        sa.Column("sentence", sa.Text(), nullable=False, comment="the causes in words; empty: none stands out"),
        sa.Column(
            "result",
            postgresql.JSONB(astext_type=sa.Text()),
            nullable=False,
            comment="health.report.as_json, redacted",
        ),
        sa.Column("page", sa.Text(), nullable=False, comment="the same as Markdown"),
        sa.Column("plots", postgresql.JSONB(astext_type=sa.Text()), nullable=False, comment="PNG data URIs by name"),
        sa.Column(
            "batch_id", sa.BigInteger(), nullable=True, comment="the batch that computed it; null: outside a run"
        ),
        sa.Column(
            "computed_at",
            sa.TIMESTAMP(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.PrimaryKeyConstraint("rule_id", name=op.f("rule_attributions_pkey")),
        comment="Why each failing rule fails, the latest answer only; a rule that no longer fails has no row.",
    )
