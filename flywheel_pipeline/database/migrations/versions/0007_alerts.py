"""Alerts: their state, their events, the outbox of notifications."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0007"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "alerts",
        sa.Column(
            "alert_key",
            sa.String(length=1100),
            nullable=False,
            comment="check:… | run:… | quarantine:… | candidate:… | daemon:…",
        ),
        sa.Column("kind", sa.String(length=20), nullable=False),
        sa.Column("severity", sa.String(length=10), nullable=False),
        sa.Column("state", sa.String(length=10), nullable=False, comment="ok: never raised; open; recovered"),
        sa.Column(
            "observed", sa.String(length=10), nullable=False, comment="pass | fail | error (could not be evaluated)"
        ),
        sa.Column(
            "observed_at",
            sa.TIMESTAMP(timezone=True),
            nullable=False,
            comment="of the newest observation folded in; older ones are ignored",
        ),
        sa.Column("title", sa.Text(), nullable=False),
        sa.Column("sentence", sa.Text(), nullable=False),
        sa.Column(
            "details",
            postgresql.JSONB(astext_type=sa.Text()),
            nullable=False,
            comment="statement, offenders, command, run_id, asset …",
        ),
        sa.Column("first_at", sa.TIMESTAMP(timezone=True), nullable=True, comment="when this opening began"),
        sa.Column("last_at", sa.TIMESTAMP(timezone=True), nullable=True, comment="last change of state"),
        sa.Column("times_raised", sa.Integer(), server_default="0", nullable=False),
        sa.Column("acknowledged_by", sa.String(length=255), nullable=True),
        sa.Column("acknowledged_at", sa.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("acknowledged_reason", sa.Text(), nullable=True),
        sa.Column("escalated_at", sa.TIMESTAMP(timezone=True), nullable=True),
        sa.CheckConstraint("(state = 'open') = (observed <> 'pass')", name=op.f("alerts_open_check")),
        sa.CheckConstraint(
            "kind IN ('check', 'run', 'quarantine', 'candidate', 'daemon')", name=op.f("alerts_kind_check")
        ),
        sa.CheckConstraint("observed IN ('pass', 'fail', 'error')", name=op.f("alerts_observed_check")),
        sa.CheckConstraint("severity IN ('info', 'warning', 'critical')", name=op.f("alerts_severity_check")),
        sa.CheckConstraint("state IN ('ok', 'open', 'recovered')", name=op.f("alerts_state_check")),
        sa.PrimaryKeyConstraint("alert_key", name=op.f("alerts_pkey")),
        comment="One row per thing that can alert, as last observed.",
    )
    op.create_table(
        "alert_events",
        sa.Column("event_id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("alert_key", sa.String(length=1100), nullable=False),
        sa.Column("transition", sa.String(length=20), nullable=False),
        sa.Column("observed", sa.String(length=10), nullable=False),
        sa.Column("severity", sa.String(length=10), nullable=False),
        sa.Column("title", sa.Text(), nullable=False),
        sa.Column("sentence", sa.Text(), nullable=False),
        sa.Column("details", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("actor", sa.String(length=255), nullable=True),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("occurred_at", sa.TIMESTAMP(timezone=True), nullable=False),
        sa.Column(
            "recorded_at", sa.TIMESTAMP(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.CheckConstraint(
            "transition <> 'acknowledged' OR (btrim(actor) <> '' AND btrim(reason) <> '')",
            name=op.f("alert_events_signed_check"),
        ),
        sa.CheckConstraint(
            "transition IN ('raised', 'changed', 'recovered', 'escalated', 'acknowledged')",
            name=op.f("alert_events_transition_check"),
        ),
        sa.ForeignKeyConstraint(["alert_key"], ["alerts.alert_key"], name=op.f("alert_events_alert_key_fkey")),
        sa.PrimaryKeyConstraint("event_id", name=op.f("alert_events_pkey")),
        sa.UniqueConstraint(
            "alert_key", "transition", "occurred_at", name=op.f("alert_events_alert_key_transition_occurred_at_key")
        ),
        comment="Changes of state of alerts, append-only.",
    )
    op.create_table(
        "notifications",
        sa.Column("notification_id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("event_id", sa.BigInteger(), nullable=False),
        sa.Column(
            "channel", sa.String(length=100), nullable=False, comment="alias; the URL is in the environment alone"
        ),
        sa.Column("not_before", sa.TIMESTAMP(timezone=True), nullable=False, comment="the end of quiet hours"),
        sa.Column("next_attempt_at", sa.TIMESTAMP(timezone=True), nullable=False),
        sa.Column("attempts", sa.Integer(), server_default="0", nullable=False),
        sa.Column(
            "claim", sa.Uuid(), nullable=True, comment="the attempt at work; left behind by a sender that was killed"
        ),
        sa.Column("claimed_until", sa.TIMESTAMP(timezone=True), nullable=True),
        sa.Column(
            "in_doubt",
            sa.Boolean(),
            server_default=sa.text("false"),
            nullable=False,
            comment="a killed sender may have delivered it",
        ),
        sa.Column("sent_at", sa.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("error", sa.Text(), nullable=True, comment="of the last attempt, redacted"),
        sa.Column("created_at", sa.TIMESTAMP(timezone=True), nullable=False),
        sa.CheckConstraint("(claim IS NULL) = (claimed_until IS NULL)", name=op.f("notifications_claim_check")),
        sa.ForeignKeyConstraint(["event_id"], ["alert_events.event_id"], name=op.f("notifications_event_id_fkey")),
        sa.PrimaryKeyConstraint("notification_id", name=op.f("notifications_pkey")),
        sa.UniqueConstraint("event_id", "channel", name=op.f("notifications_event_id_channel_key")),
        comment="The outbox: one row per event and channel, written with the event, delivered at least once.",
    )
    op.create_index(
        "notifications_unsent_idx",
        "notifications",
        ["channel", "notification_id"],
        unique=False,
        postgresql_where=sa.text("sent_at IS NULL"),
    )
