"""The version of each day's telemetry, and what the archive holds of purged days."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # A refresh takes the outbox and then reads telemetry, a writer goes the other way: without a refresh at work, and with
    # telemetry first, nobody waits for whom he keeps waiting. It is the lock of flywheel_lock_refresh().
    op.execute("SELECT pg_advisory_xact_lock(7380407443113377793)")
    op.execute("LOCK TABLE execution_telemetry IN ACCESS EXCLUSIVE MODE")
    op.create_table(
        "day_versions",
        sa.Column("day", sa.Date(), nullable=False),
        sa.Column(
            "version", postgresql.UUID(as_uuid=True), server_default=sa.text("gen_random_uuid()"), nullable=False
        ),
        sa.Column("noted_at", sa.TIMESTAMP(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False),
        sa.PrimaryKeyConstraint("day", name=op.f("day_versions_pkey")),
        comment="The version of each day's telemetry: another one whenever written cells of it leave the outbox.",
    )
    op.add_column(
        "touched_cells",
        sa.Column(
            "written",
            sa.Boolean(),
            server_default=sa.text("true"),
            nullable=False,
            comment="false: to be recomputed, though no row of it was written",
        ),
    )
    op.add_column(
        "sealed_days",
        sa.Column(
            "archived_generation",
            sa.String(length=64),
            nullable=True,
            comment="what the archive holds of it; null: nothing, it was purged",
        ),
    )
