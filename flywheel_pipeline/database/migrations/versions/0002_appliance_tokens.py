"""Tokens and reported state of appliances; tombstones in manifests."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "appliance_tokens",
        sa.Column("token_id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("appliance_id", sa.String(length=255), nullable=False),
        sa.Column("site_id", sa.String(length=255), nullable=False, comment="the only site it may read and report for"),
        sa.Column("token_hash", sa.String(length=64), nullable=False, comment="sha256 of the token, hex"),
        sa.Column("issued_at", sa.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("issued_by", sa.String(length=255), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("expires_at", sa.TIMESTAMP(timezone=True), nullable=True, comment="null: until revoked"),
        sa.Column("revoked_at", sa.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("revoked_by", sa.String(length=255), nullable=True),
        sa.Column("revoked_reason", sa.Text(), nullable=True),
        sa.CheckConstraint(
            "btrim(issued_by) <> '' AND btrim(reason) <> ''", name=op.f("appliance_tokens_signed_check")
        ),
        sa.CheckConstraint(
            "(revoked_at IS NULL) = (revoked_by IS NULL) AND (revoked_at IS NULL) = (revoked_reason IS NULL)",
            name=op.f("appliance_tokens_revoked_check"),
        ),
        sa.PrimaryKeyConstraint("token_id", name=op.f("appliance_tokens_pkey")),
        sa.UniqueConstraint("token_hash", name=op.f("appliance_tokens_token_hash_key")),
        comment="Bearer tokens of appliances, hashed; one that was issued is never deleted, only revoked.",
    )
    op.create_index("appliance_tokens_appliance_id_idx", "appliance_tokens", ["appliance_id"], unique=False)
    op.add_column(
        "appliances",
        sa.Column(
            "reported_manifest_hash",
            sa.String(length=64),
            nullable=True,
            comment="hash of the rule set the agent says it runs",
        ),
    )
    op.add_column(
        "appliances",
        sa.Column(
            "state_reported_at",
            sa.TIMESTAMP(timezone=True),
            nullable=True,
            comment="when the agent last reported its state; null: never",
        ),
    )
    op.add_column(
        "rule_manifests",
        sa.Column(
            "tombstones",
            postgresql.JSONB(astext_type=sa.Text()),
            server_default=sa.text("'[]'::jsonb"),
            nullable=False,
            comment="promoted rules it was told of and must drop: {rule_id, version, reason, since}",
        ),
    )
