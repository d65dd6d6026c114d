"""The schema of the first release.

Written by alembic's autogenerate from `tables.py`, forward only; a test proves that the two are equal. The
next change of `tables.py` becomes a new file: `alembic revision --autogenerate --rev-id 0002 -m "..."` with
FLYWHEEL_DATABASE_URL at an upgraded database, then read and edit what it wrote.
"""

# ruff: noqa: E501 - comments and conditions stand here as they are in the database

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "appliance_commands",
        sa.Column("id", sa.UUID(), server_default=sa.text("gen_random_uuid()"), nullable=False),
        sa.Column("appliance_id", sa.String(length=255), nullable=False),
        sa.Column("command_type", sa.String(length=100), nullable=False),
        sa.Column(
            "params",
            postgresql.JSONB(astext_type=sa.Text()),
            server_default=sa.text("'{}'::jsonb"),
            nullable=False,
        ),
        sa.Column("status", sa.String(length=50), server_default="pending", nullable=False),
        sa.Column("created_at", sa.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("delivered_at", sa.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("acknowledged_at", sa.TIMESTAMP(timezone=True), nullable=True),
        sa.Column(
            "expires_at",
            sa.TIMESTAMP(timezone=True),
            server_default=sa.text("now() + interval '24 hours'"),
            nullable=True,
        ),
        sa.Column("rule_id", sa.String(length=255), nullable=True),
        sa.Column("rule_version", sa.Integer(), nullable=True),
        sa.Column("status_reason", sa.Text(), nullable=True),
        sa.Column("batch_id", sa.BigInteger(), nullable=True),
        sa.CheckConstraint(
            "status IN ('pending', 'delivered', 'acknowledged', 'failed', 'expired', 'superseded')",
            name=op.f("appliance_commands_status_check"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("appliance_commands_pkey")),
        sa.UniqueConstraint(
            "appliance_id",
            "command_type",
            "params",
            name=op.f("appliance_commands_appliance_id_command_type_params_key"),
        ),
    )
    op.create_index(
        "appliance_commands_rule_key",
        "appliance_commands",
        ["appliance_id", "rule_id", "rule_version", "command_type"],
        unique=True,
        postgresql_where=sa.text("rule_id IS NOT NULL"),
    )
    op.create_table(
        "appliances",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("appliance_id", sa.String(length=255), nullable=False, comment="<site_id>-<MAC>"),
        sa.Column("site_id", sa.String(length=255), nullable=False),
        sa.Column("agent_version", sa.String(length=50), nullable=True),
        sa.Column("last_checkin", sa.TIMESTAMP(timezone=True), nullable=True),
        sa.Column(
            "status",
            sa.String(length=50),
            server_default="online",
            nullable=False,
            comment="online | offline | retired",
        ),
        sa.Column(
            "capabilities",
            postgresql.JSONB(astext_type=sa.Text()),
            nullable=True,
            comment="action forms the agent reports; null: decided by its version",
        ),
        sa.Column("created_at", sa.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("appliances_pkey")),
        sa.UniqueConstraint("appliance_id", name=op.f("appliances_appliance_id_key")),
    )
    op.create_index("appliances_site_id_idx", "appliances", ["site_id"], unique=False)
    op.create_table(
        "evidence_bundles",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("bundle_id", sa.String(length=255), nullable=False),
        sa.Column("appliance_id", sa.String(length=255), nullable=False),
        sa.Column("order_id", sa.String(length=255), nullable=True),
        sa.Column("incident_id", sa.String(length=255), nullable=True),
        sa.Column("check_type", sa.String(length=255), nullable=True),
        sa.Column("outcome", sa.String(length=50), nullable=True),
        sa.Column("pre_state", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column("post_state", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column("actions_taken", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column("timestamp_start", sa.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("timestamp_end", sa.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("created_at", sa.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("evidence_bundles_pkey")),
        sa.UniqueConstraint("bundle_id", name=op.f("evidence_bundles_bundle_id_key")),
    )
    op.create_index("evidence_bundles_appliance_id_idx", "evidence_bundles", ["appliance_id"], unique=False)
    op.create_index("evidence_bundles_created_at_idx", "evidence_bundles", ["created_at"], unique=False)
    op.create_table(
        "execution_corrections",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("execution_id", sa.String(length=255), nullable=False),
        sa.Column(
            "corrected_at",
            sa.TIMESTAMP(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.Column(
            "before",
            postgresql.JSONB(astext_type=sa.Text()),
            nullable=False,
            comment="the changed columns as they were",
        ),
        sa.Column("after", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("execution_corrections_pkey")),
        comment="History of every UPDATE of a telemetry row, written by trigger.",
    )
    op.create_index(
        "execution_corrections_execution_id_idx", "execution_corrections", ["execution_id"], unique=False
    )
    op.create_table(
        "execution_telemetry",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("execution_id", sa.String(length=255), nullable=False, comment="idempotency key"),
        sa.Column("incident_id", sa.String(length=255), nullable=True),
        sa.Column("site_id", sa.String(length=255), nullable=False),
        sa.Column("appliance_id", sa.String(length=255), server_default="unknown", nullable=False),
        sa.Column(
            "runbook_id",
            sa.String(length=255),
            nullable=False,
            comment="legacy agents: the RULE id on L1 rows, L2-<action> on L2 rows",
        ),
        sa.Column(
            "rule_id",
            sa.String(length=255),
            nullable=True,
            comment="the L1 rule that matched, from agents that send it",
        ),
        sa.Column(
            "action",
            sa.String(length=255),
            nullable=True,
            comment="what the agent was told to do, from agents that send it",
        ),
        sa.Column("hostname", sa.String(length=255), nullable=False),
        sa.Column("platform", sa.String(length=50), nullable=True),
        sa.Column("incident_type", sa.String(length=255), nullable=True),
        sa.Column("agent_version", sa.String(length=50), nullable=True),
        sa.Column("started_at", sa.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("completed_at", sa.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("duration_seconds", sa.Double(), nullable=True),
        sa.Column("success", sa.Boolean(), nullable=False),
        sa.Column("status", sa.String(length=50), nullable=True),
        sa.Column("verification_passed", sa.Boolean(), nullable=True),
        sa.Column("confidence", sa.Double(), nullable=True),
        sa.Column("resolution_level", sa.String(length=10), nullable=True),
        sa.Column("state_before", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column("state_after", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column("state_diff", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column("executed_steps", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column("error_message", sa.Text(), nullable=True),
        sa.Column("error_step", sa.Integer(), nullable=True),
        sa.Column("error_traceback", sa.Text(), nullable=True),
        sa.Column("failure_type", sa.String(length=100), nullable=True),
        sa.Column("retry_count", sa.Integer(), nullable=True),
        sa.Column("was_correct_runbook", sa.Boolean(), nullable=True),
        sa.Column("was_correct_diagnosis", sa.Boolean(), nullable=True),
        sa.Column("manual_intervention_needed", sa.Boolean(), nullable=True),
        sa.Column("human_feedback", sa.Text(), nullable=True),
        sa.Column("evidence_bundle_id", sa.String(length=255), nullable=True),
        sa.Column("tags", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column("cost_usd", sa.Numeric(precision=12, scale=6), nullable=True),
        sa.Column("input_tokens", sa.Integer(), nullable=True),
        sa.Column("output_tokens", sa.Integer(), nullable=True),
        sa.Column("pattern_signature", sa.String(length=255), nullable=True),
        sa.Column("reasoning", sa.Text(), nullable=True),
        sa.Column(
            "chaos_campaign_id",
            sa.String(length=255),
            nullable=True,
            comment="set: a chaos or synthetic row; it counts nowhere",
        ),
        sa.Column(
            "created_at",
            sa.TIMESTAMP(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
            comment="arrival time",
        ),
        sa.Column(
            "reported_at",
            sa.TIMESTAMP(timezone=True),
            nullable=True,
            comment="the agent's clock when it sent this version of the row",
        ),
        sa.Column(
            "event_at",
            sa.TIMESTAMP(timezone=True),
            sa.Computed("COALESCE(started_at, completed_at, created_at)", persisted=True),
            nullable=True,
            comment="event time: the start, or the best the agent sent",
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("execution_telemetry_pkey")),
        sa.UniqueConstraint("execution_id", name=op.f("execution_telemetry_execution_id_key")),
    )
    op.create_index(
        "execution_telemetry_site_event_idx", "execution_telemetry", ["site_id", "event_at"], unique=False
    )
    op.create_table(
        "human_acts",
        sa.Column("act_id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("act", sa.String(length=20), nullable=False),
        sa.Column(
            "subject_kind",
            sa.String(length=20),
            nullable=True,
            comment="pattern | rule; null for freeze and thaw",
        ),
        sa.Column("subject_id", sa.String(length=1024), nullable=True),
        sa.Column("actor", sa.String(length=255), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column(
            "acted_at",
            sa.TIMESTAMP(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.CheckConstraint(
            "(act IN ('freeze', 'thaw')) = (subject_id IS NULL)", name=op.f("human_acts_subject_check")
        ),
        sa.CheckConstraint(
            "act IN ('approve', 'reject', 'quarantine', 'readmit', 'retire', 'freeze', 'thaw')",
            name=op.f("human_acts_act_check"),
        ),
        sa.CheckConstraint(
            "btrim(actor) <> '' AND btrim(reason) <> ''", name=op.f("human_acts_signed_check")
        ),
        sa.PrimaryKeyConstraint("act_id", name=op.f("human_acts_pkey")),
        comment="What people decided, append-only. The last of freeze and thaw says whether promotion is frozen.",
    )
    op.create_table(
        "l1_rules",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("rule_id", sa.String(length=255), nullable=False),
        sa.Column("incident_pattern", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("runbook_id", sa.String(length=255), nullable=True),
        sa.Column("confidence", sa.Double(), nullable=True),
        sa.Column("promoted_from_l2", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column(
            "enabled",
            sa.Boolean(),
            server_default=sa.text("false"),
            nullable=False,
            comment="fold of rule_events",
        ),
        sa.Column("created_at", sa.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("match_count", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("success_count", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("failure_count", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column(
            "success_rate",
            sa.Double(),
            sa.Computed(
                "CASE WHEN match_count > 0 THEN success_count::double precision / match_count END",
                persisted=True,
            ),
            nullable=True,
            comment="fraction; null over nothing",
        ),
        sa.Column(
            "source",
            sa.String(length=50),
            server_default="promoted",
            nullable=False,
            comment="builtin | promoted",
        ),
        sa.Column("updated_at", sa.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("platform", sa.String(length=50), nullable=True),
        sa.Column(
            "pattern_key",
            sa.String(length=1024),
            nullable=True,
            comment="the pattern this rule was promoted from, where known",
        ),
        sa.Column("state", sa.String(length=20), nullable=False, comment="fold of rule_events"),
        sa.Column("rule_version", sa.Integer(), server_default="1", nullable=False),
        sa.Column("content_hash", sa.String(length=64), nullable=False),
        sa.Column("state_reason", sa.Text(), nullable=True),
        sa.Column("state_actor", sa.String(length=255), nullable=True),
        sa.Column("state_at", sa.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("last_event_id", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("l1_rules_pkey")),
        sa.UniqueConstraint("rule_id", name=op.f("l1_rules_rule_id_key")),
    )
    op.create_table(
        "outcome_class_rules",
        sa.Column("rule_name", sa.String(length=100), nullable=False),
        sa.Column("outcome_class", sa.String(length=30), nullable=False),
        sa.Column(
            "field",
            sa.String(length=30),
            nullable=False,
            comment="the telemetry column the pattern is held against",
        ),
        sa.Column("pattern", sa.Text(), nullable=False, comment="an ILIKE pattern"),
        sa.Column("description", sa.Text(), nullable=False),
        sa.Column("enabled", sa.Boolean(), server_default=sa.text("true"), nullable=False),
        sa.CheckConstraint(
            "field IN ('error_message', 'failure_type', 'status')",
            name=op.f("outcome_class_rules_field_check"),
        ),
        sa.CheckConstraint(
            "outcome_class IN ('synthetic', 'agent_unsupported', 'not_applicable', 'unreachable', 'escalated', 'suppressed')",
            name=op.f("outcome_class_rules_outcome_class_check"),
        ),
        sa.CheckConstraint(
            "pattern <> '' AND pattern !~ '^%*$'", name=op.f("outcome_class_rules_pattern_check")
        ),
        sa.PrimaryKeyConstraint("rule_name", name=op.f("outcome_class_rules_pkey")),
        comment="Error pattern -> outcome class. Classes rank in the order of the outcome_class check.",
    )
    op.create_table(
        "patterns",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("pattern_id", sa.String(length=255), nullable=False),
        sa.Column("pattern_signature", sa.String(length=255), nullable=False),
        sa.Column("description", sa.Text(), nullable=True),
        sa.Column("incident_type", sa.String(length=255), nullable=False),
        sa.Column("runbook_id", sa.String(length=255), nullable=True),
        sa.Column("proposed_rule", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column(
            "occurrences",
            sa.Integer(),
            server_default="0",
            nullable=False,
            comment="imported patterns: as the old success-only stream reported it; else as observed",
        ),
        sa.Column("success_count", sa.Integer(), server_default="0", nullable=False),
        sa.Column("failure_count", sa.Integer(), server_default="0", nullable=False),
        sa.Column(
            "success_rate",
            sa.Double(),
            sa.Computed(
                "CASE WHEN occurrences > 0 THEN success_count::double precision / occurrences * 100 END",
                persisted=True,
            ),
            nullable=True,
            comment="PERCENT, as in production; everything else here is a fraction",
        ),
        sa.Column("avg_resolution_time_ms", sa.Double(), nullable=True),
        sa.Column("total_resolution_time_ms", sa.Double(), nullable=True),
        sa.Column("status", sa.String(length=50), server_default="pending", nullable=False),
        sa.Column("promoted_at", sa.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("promoted_to_rule_id", sa.String(length=255), nullable=True),
        sa.Column("example_incidents", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column("first_seen", sa.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("last_seen", sa.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("created_at", sa.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("platform", sa.String(length=50), nullable=True),
        sa.Column(
            "pattern_key",
            sa.String(length=1024),
            nullable=True,
            comment="candidates.keys.pattern_key; null: unknown",
        ),
        sa.Column(
            "source",
            sa.String(length=50),
            server_default="imported",
            nullable=False,
            comment="imported | observed",
        ),
        sa.CheckConstraint(
            "status IN ('pending', 'approved', 'promoted', 'rejected')", name=op.f("patterns_status_check")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("patterns_pkey")),
        sa.UniqueConstraint("pattern_id", name=op.f("patterns_pattern_id_key")),
        sa.UniqueConstraint("pattern_key", name=op.f("patterns_pattern_key_key")),
        sa.UniqueConstraint("pattern_signature", name=op.f("patterns_pattern_signature_key")),
    )
    op.create_table(
        "policy_activations",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("policy_name", sa.String(length=100), nullable=False),
        sa.Column(
            "as_of", sa.TIMESTAMP(timezone=True), nullable=True, comment="clock of a replay; null: real time"
        ),
        sa.Column("actor", sa.String(length=255), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column(
            "activated_at",
            sa.TIMESTAMP(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("policy_activations_pkey")),
        comment="Append-only; the last row is the policy in force. None: `standard`.",
    )
    op.create_table(
        "refresh_batches",
        sa.Column("batch_id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("run_id", sa.String(length=255), nullable=False, comment="Dagster run id: one batch a run"),
        sa.Column("opened_at", sa.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("policy_name", sa.String(length=100), nullable=False),
        sa.Column("policy_hash", sa.String(length=64), nullable=False),
        sa.Column(
            "as_of", sa.TIMESTAMP(timezone=True), nullable=True, comment="clock of a replay; null: now"
        ),
        sa.Column(
            "refreshed_at",
            sa.TIMESTAMP(timezone=True),
            nullable=True,
            comment="null: the aggregates were not refreshed in this batch",
        ),
        sa.Column(
            "refresh_seq", sa.BigInteger(), nullable=True, comment="order of refreshes under the refresh lock"
        ),
        sa.Column("cells_refreshed", sa.BigInteger(), nullable=True),
        sa.Column("rows_written", sa.BigInteger(), nullable=True),
        sa.Column("decided_at", sa.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("applied_at", sa.TIMESTAMP(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("batch_id", name=op.f("refresh_batches_pkey")),
        sa.UniqueConstraint("run_id", name=op.f("refresh_batches_run_id_key")),
    )
    op.create_table(
        "required_gates",
        sa.Column("gate", sa.String(length=100), nullable=False),
        sa.Column("question", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("gate", name=op.f("required_gates_pkey")),
        comment="Every gate here needs a verdict 'pass' in the batch before the database accepts a promotion.",
    )
    op.create_table(
        "rule_aliases",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("alias", sa.String(length=255), nullable=False),
        sa.Column("rule_id", sa.String(length=255), nullable=False),
        sa.Column(
            "valid_from", sa.TIMESTAMP(timezone=True), server_default=sa.text("'-infinity'"), nullable=False
        ),
        sa.Column(
            "valid_to", sa.TIMESTAMP(timezone=True), server_default=sa.text("'infinity'"), nullable=False
        ),
        sa.Column("actor", sa.String(length=255), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("created_at", sa.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint(
            "valid_from < valid_to AND alias <> rule_id", name=op.f("rule_aliases_sane_check")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("rule_aliases_pkey")),
        sa.UniqueConstraint("alias", "valid_from", name=op.f("rule_aliases_alias_valid_from_key")),
    )
    op.create_table(
        "rule_manifests",
        sa.Column("appliance_id", sa.String(length=255), nullable=False),
        sa.Column("site_id", sa.String(length=255), nullable=False),
        sa.Column("manifest_hash", sa.String(length=64), nullable=False),
        sa.Column(
            "rules",
            postgresql.JSONB(astext_type=sa.Text()),
            nullable=False,
            comment="what this appliance should run, in its deterministic order",
        ),
        sa.Column(
            "withheld",
            postgresql.JSONB(astext_type=sa.Text()),
            nullable=False,
            comment="enabled rules it cannot run, with the reason",
        ),
        sa.Column("rule_count", sa.Integer(), nullable=False),
        sa.Column("batch_id", sa.BigInteger(), nullable=False),
        sa.Column("built_at", sa.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("appliance_id", name=op.f("rule_manifests_pkey")),
        comment="Desired state: one row per appliance.",
    )
    op.create_table(
        "rule_transitions",
        sa.Column("kind", sa.String(length=30), nullable=False),
        sa.Column(
            "from_state", sa.String(length=20), nullable=False, comment="'none' before the first event"
        ),
        sa.Column("to_state", sa.String(length=20), nullable=False),
        sa.Column("meaning", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("kind", "from_state", "to_state", name=op.f("rule_transitions_pkey")),
        comment="The legal edges of a rule's life; the ledger trigger refuses all others.",
    )
    op.create_table(
        "runbooks",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("runbook_id", sa.String(length=255), nullable=False),
        sa.Column("name", sa.String(length=255), nullable=False),
        sa.Column("description", sa.Text(), nullable=True),
        sa.Column("category", sa.String(length=100), nullable=True),
        sa.Column("check_type", sa.String(length=255), nullable=True),
        sa.Column("platform", sa.String(length=50), nullable=True, comment="windows | linux | macos"),
        sa.Column("severity", sa.String(length=50), nullable=True),
        sa.Column("is_disruptive", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column(
            "requires_maintenance_window", sa.Boolean(), server_default=sa.text("false"), nullable=False
        ),
        sa.Column("hipaa_controls", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column("version", sa.String(length=50), nullable=True),
        sa.Column("steps", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column("enabled", sa.Boolean(), server_default=sa.text("true"), nullable=False),
        sa.Column("created_at", sa.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("runbooks_pkey")),
        sa.UniqueConstraint("runbook_id", name=op.f("runbooks_runbook_id_key")),
    )
    op.create_table(
        "schema_objects",
        sa.Column("kind", sa.String(length=20), nullable=False, comment="routine | model | seed"),
        sa.Column("name", sa.String(length=255), nullable=False),
        sa.Column("content_hash", sa.String(length=64), nullable=False),
        sa.Column(
            "applied_at",
            sa.TIMESTAMP(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.PrimaryKeyConstraint("kind", "name", name=op.f("schema_objects_pkey")),
        comment="Routines, SQL models and seeds as last applied, by content hash.",
    )
    op.create_table(
        "sealed_days",
        sa.Column("day", sa.Date(), nullable=False),
        sa.Column("sealed_at", sa.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("rows_purged", sa.BigInteger(), nullable=False),
        sa.Column("actor", sa.String(length=255), nullable=False),
        sa.PrimaryKeyConstraint("day", name=op.f("sealed_days_pkey")),
        comment="Days whose telemetry was purged: their cells keep their figures and are recomputed no more.",
    )
    op.create_table(
        "site_aliases",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("alias", sa.String(length=255), nullable=False),
        sa.Column("site_id", sa.String(length=255), nullable=False),
        sa.Column(
            "valid_from", sa.TIMESTAMP(timezone=True), server_default=sa.text("'-infinity'"), nullable=False
        ),
        sa.Column(
            "valid_to", sa.TIMESTAMP(timezone=True), server_default=sa.text("'infinity'"), nullable=False
        ),
        sa.Column("actor", sa.String(length=255), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("created_at", sa.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint(
            "valid_from < valid_to AND alias <> site_id", name=op.f("site_aliases_sane_check")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("site_aliases_pkey")),
        sa.UniqueConstraint("alias", "valid_from", name=op.f("site_aliases_alias_valid_from_key")),
    )
    op.create_table(
        "sites",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("site_id", sa.String(length=255), nullable=False),
        sa.Column("name", sa.String(length=255), nullable=True),
        sa.Column("healing_tier", sa.String(length=50), nullable=True),
        sa.Column("status", sa.String(length=50), server_default="active", nullable=False),
        sa.Column("created_at", sa.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("sites_pkey")),
        sa.UniqueConstraint("site_id", name=op.f("sites_site_id_key")),
    )
    op.create_table(
        "telemetry_rejects",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column(
            "received_at", sa.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False
        ),
        sa.Column("source", sa.Text(), nullable=False, comment="file name, 'http' or the caller's word"),
        sa.Column("line_number", sa.BigInteger(), nullable=True, comment="1-based, in the source"),
        sa.Column("reason_code", sa.String(length=50), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column(
            "payload", sa.LargeBinary(), nullable=False, comment="raw bytes, cut at the declared limit"
        ),
        sa.Column("payload_bytes", sa.BigInteger(), nullable=False, comment="length before any cut"),
        sa.Column("payload_hash", sa.String(length=64), nullable=False),
        sa.Column("times_seen", sa.Integer(), server_default="1", nullable=False),
        sa.Column(
            "status",
            sa.String(length=20),
            server_default="open",
            nullable=False,
            comment="open | accepted | discarded",
        ),
        sa.Column("retried_at", sa.TIMESTAMP(timezone=True), nullable=True),
        sa.Column(
            "execution_id", sa.String(length=255), nullable=True, comment="the row it became, once accepted"
        ),
        sa.CheckConstraint(
            "status IN ('open', 'accepted', 'discarded')", name=op.f("telemetry_rejects_status_check")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("telemetry_rejects_pkey")),
        sa.UniqueConstraint(
            "source",
            "line_number",
            "payload_hash",
            name=op.f("telemetry_rejects_source_line_number_payload_hash_key"),
            postgresql_nulls_not_distinct=True,
        ),
    )
    op.create_table(
        "touched_cells",
        sa.Column(
            "site_id", sa.String(length=255), nullable=False, comment="as written, aliases not resolved"
        ),
        sa.Column("day", sa.Date(), nullable=False),
        sa.Column(
            "touched_at",
            sa.TIMESTAMP(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        comment="Outbox: append-only, no key; a refresh takes rows with DELETE ... RETURNING.",
    )
    op.create_table(
        "gate_verdicts",
        sa.Column("batch_id", sa.BigInteger(), nullable=False),
        sa.Column("gate", sa.String(length=100), nullable=False),
        sa.Column("verdict", sa.String(length=10), nullable=False),
        sa.Column("sentence", sa.Text(), nullable=False),
        sa.Column("offenders", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column(
            "details",
            postgresql.JSONB(astext_type=sa.Text()),
            server_default=sa.text("'{}'::jsonb"),
            nullable=False,
        ),
        sa.Column(
            "decided_at",
            sa.TIMESTAMP(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.CheckConstraint("verdict IN ('pass', 'fail', 'error')", name=op.f("gate_verdicts_verdict_check")),
        sa.ForeignKeyConstraint(
            ["batch_id"], ["refresh_batches.batch_id"], name=op.f("gate_verdicts_batch_id_fkey")
        ),
        sa.PrimaryKeyConstraint("batch_id", "gate", name=op.f("gate_verdicts_pkey")),
    )
    op.create_table(
        "promotion_decisions",
        sa.Column("decision_id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("batch_id", sa.BigInteger(), nullable=False),
        sa.Column("run_id", sa.String(length=255), nullable=False),
        sa.Column(
            "decided_at",
            sa.TIMESTAMP(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.Column("subject_kind", sa.String(length=20), nullable=False, comment="pattern | rule"),
        sa.Column("subject_id", sa.String(length=1024), nullable=False, comment="pattern_key or rule_id"),
        sa.Column("policy_name", sa.String(length=100), nullable=False),
        sa.Column("policy_hash", sa.String(length=64), nullable=False),
        sa.Column(
            "verdict",
            sa.String(length=30),
            nullable=False,
            comment="promote | hold | reject | keep | warn | quarantine",
        ),
        sa.Column("reason", sa.Text(), nullable=False, comment="one sentence: the deciding gate"),
        sa.Column(
            "gates",
            postgresql.JSONB(astext_type=sa.Text()),
            nullable=False,
            comment="[{gate, verdict, observed, required, sentence}] in order",
        ),
        sa.Column("evidence", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column(
            "decision_hash",
            sa.String(length=64),
            nullable=False,
            comment="of verdict, gates, policy: a new row on change",
        ),
        sa.Column(
            "confirmed_batch_id",
            sa.BigInteger(),
            nullable=False,
            comment="the last batch that came to the same decision; only its own batch may apply it",
        ),
        sa.CheckConstraint(
            "subject_kind IN ('pattern', 'rule')", name=op.f("promotion_decisions_subject_kind_check")
        ),
        sa.ForeignKeyConstraint(
            ["batch_id"], ["refresh_batches.batch_id"], name=op.f("promotion_decisions_batch_id_fkey")
        ),
        sa.PrimaryKeyConstraint("decision_id", name=op.f("promotion_decisions_pkey")),
    )
    op.create_index(
        "promotion_decisions_subject_idx",
        "promotion_decisions",
        ["subject_kind", "subject_id", "decision_id"],
        unique=False,
    )
    op.create_table(
        "rule_events",
        sa.Column("event_id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("rule_id", sa.String(length=255), nullable=False),
        sa.Column("rule_version", sa.Integer(), nullable=False),
        sa.Column("kind", sa.String(length=30), nullable=False),
        sa.Column("from_state", sa.String(length=20), nullable=False),
        sa.Column("to_state", sa.String(length=20), nullable=False),
        sa.Column(
            "definition",
            postgresql.JSONB(astext_type=sa.Text()),
            nullable=False,
            comment="incident_pattern, runbook_id, platform, source, …",
        ),
        sa.Column("content_hash", sa.String(length=64), nullable=False),
        sa.Column("actor", sa.String(length=255), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("policy_hash", sa.String(length=64), nullable=True),
        sa.Column("decision_id", sa.BigInteger(), nullable=True),
        sa.Column("batch_id", sa.BigInteger(), nullable=True),
        sa.Column("run_id", sa.String(length=255), nullable=True),
        sa.Column("certificate", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column(
            "occurred_at",
            sa.TIMESTAMP(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.ForeignKeyConstraint(
            ["batch_id"], ["refresh_batches.batch_id"], name=op.f("rule_events_batch_id_fkey")
        ),
        sa.ForeignKeyConstraint(
            ["decision_id"], ["promotion_decisions.decision_id"], name=op.f("rule_events_decision_id_fkey")
        ),
        sa.PrimaryKeyConstraint("event_id", name=op.f("rule_events_pkey")),
        comment="The ledger: append-only, the only thing that changes a rule's state.",
    )
    op.create_index("rule_events_rule_id_idx", "rule_events", ["rule_id", "event_id"], unique=False)
