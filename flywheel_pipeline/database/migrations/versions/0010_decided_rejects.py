"""Open rejects of a source are found by an index; when a reject was decided, and which decided ones were purged, is on record."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # No default: rejects that were decided before stay as they are, undated, and no row is rewritten.
    op.add_column(
        "telemetry_rejects",
        sa.Column(
            "decided_at",
            sa.TIMESTAMP(timezone=True),
            nullable=True,
            comment="when it was accepted or discarded; null: open, or nobody noted when",
        ),
    )
    op.create_index(
        "telemetry_rejects_open_idx", "telemetry_rejects", ["source"], postgresql_where=sa.text("status = 'open'")
    )
    op.create_table(
        "reject_purges",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("purged_at", sa.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("actor", sa.String(length=255), nullable=False),
        sa.Column(
            "decided_before", sa.TIMESTAMP(timezone=True), nullable=False, comment="those decided before this went"
        ),
        sa.Column("accepted", sa.BigInteger(), nullable=False, comment="rows purged that had landed by a retry"),
        sa.Column("discarded", sa.BigInteger(), nullable=False, comment="rows purged that had been given up"),
        sa.PrimaryKeyConstraint("id", name=op.f("reject_purges_pkey")),
        comment="Which decided rejects were purged, by whom: the rejects here and these are all there ever were.",
    )
