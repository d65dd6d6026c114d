"""The declared schema: SQLAlchemy Core tables for everything that a migration creates.

Belongs here: production tables (their names and columns stay compatible with the system that Flywheel
replaces) and Flywheel's own state (outbox, batches, verdicts, ledger). Does not belong here: relations made
from `dbt_like_sql/` (their SQL declares them) and triggers (`database/routines/*.sql`).

Rates are fractions in [0, 1], and null over nothing. Times are TIMESTAMPTZ; a day is a UTC day of event time.
"""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg

NAMING = {
    "pk": "%(table_name)s_pkey",
    "uq": "%(table_name)s_%(column_0_N_name)s_key",
    "fk": "%(table_name)s_%(column_0_N_name)s_fkey",
    "ix": "%(table_name)s_%(column_0_N_name)s_idx",
    "ck": "%(table_name)s_%(constraint_name)s_check",
}
metadata = sa.MetaData(naming_convention=NAMING)

Text = sa.Text
Stamp = sa.TIMESTAMP(timezone=True)
NOW = sa.text("now()")


def _id() -> sa.Column[int]:
    return sa.Column("id", sa.BigInteger, sa.Identity(always=False), primary_key=True)


# --------------------------------------------------------------------------------------------------
# Production tables. Column names and meanings of the system that Flywheel replaces.
# --------------------------------------------------------------------------------------------------

execution_telemetry = sa.Table(
    "execution_telemetry",
    metadata,
    _id(),
    sa.Column("execution_id", sa.String(255), nullable=False, unique=True, comment="idempotency key"),
    sa.Column("incident_id", sa.String(255)),
    sa.Column("site_id", sa.String(255), nullable=False),
    sa.Column("appliance_id", sa.String(255), nullable=False, server_default="unknown"),
    sa.Column(
        "runbook_id",
        sa.String(255),
        nullable=False,
        comment="legacy agents: the RULE id on L1 rows, L2-<action> on L2 rows",
    ),
    sa.Column("rule_id", sa.String(255), comment="the L1 rule that matched, from agents that send it"),
    sa.Column("action", sa.String(255), comment="what the agent was told to do, from agents that send it"),
    sa.Column("hostname", sa.String(255), nullable=False),
    sa.Column("platform", sa.String(50)),
    sa.Column("incident_type", sa.String(255)),
    sa.Column("agent_version", sa.String(50)),
    sa.Column("started_at", Stamp),
    sa.Column("completed_at", Stamp),
    sa.Column("duration_seconds", sa.Double),
    sa.Column("success", sa.Boolean, nullable=False),
    sa.Column("status", sa.String(50)),
    sa.Column("verification_passed", sa.Boolean),
    sa.Column("confidence", sa.Double),
    sa.Column("resolution_level", sa.String(10)),
    sa.Column("state_before", pg.JSONB),
    sa.Column("state_after", pg.JSONB),
    sa.Column("state_diff", pg.JSONB),
    sa.Column("executed_steps", pg.JSONB),
    sa.Column("error_message", Text),
    sa.Column("error_step", sa.Integer),
    sa.Column("error_traceback", Text),
    sa.Column("failure_type", sa.String(100)),
    sa.Column("retry_count", sa.Integer),
    sa.Column("was_correct_runbook", sa.Boolean),
    sa.Column("was_correct_diagnosis", sa.Boolean),
    sa.Column("manual_intervention_needed", sa.Boolean),
    sa.Column("human_feedback", Text),
    sa.Column("evidence_bundle_id", sa.String(255)),
    sa.Column("tags", pg.JSONB),
    sa.Column("cost_usd", sa.Numeric(12, 6)),
    sa.Column("input_tokens", sa.Integer),
    sa.Column("output_tokens", sa.Integer),
    sa.Column("pattern_signature", sa.String(255)),
    sa.Column("reasoning", Text),
    sa.Column("chaos_campaign_id", sa.String(255), comment="set: a chaos or synthetic row; it counts nowhere"),
    sa.Column("created_at", Stamp, nullable=False, server_default=NOW, comment="arrival time"),
    sa.Column("reported_at", Stamp, comment="the agent's clock when it sent this version of the row"),
    sa.Column(
        "event_at",
        Stamp,
        sa.Computed("COALESCE(started_at, completed_at, created_at)", persisted=True),
        comment="event time: the start, or the best the agent sent",
    ),
    sa.Index("execution_telemetry_site_event_idx", "site_id", "event_at"),
)

patterns = sa.Table(
    "patterns",
    metadata,
    _id(),
    sa.Column("pattern_id", sa.String(255), nullable=False, unique=True),
    sa.Column("pattern_signature", sa.String(255), nullable=False, unique=True),
    sa.Column("description", Text),
    sa.Column("incident_type", sa.String(255), nullable=False),
    sa.Column("runbook_id", sa.String(255)),
    sa.Column("proposed_rule", pg.JSONB),
    sa.Column(
        "occurrences",
        sa.Integer,
        nullable=False,
        server_default="0",
        comment="imported patterns: as the old success-only stream reported it; else as observed",
    ),
    sa.Column("success_count", sa.Integer, nullable=False, server_default="0"),
    sa.Column("failure_count", sa.Integer, nullable=False, server_default="0"),
    sa.Column(
        "success_rate",
        sa.Double,
        sa.Computed(
            "CASE WHEN occurrences > 0 THEN success_count::double precision / occurrences * 100 END",
            persisted=True,
        ),
        comment="PERCENT, as in production; everything else here is a fraction",
    ),
    sa.Column("avg_resolution_time_ms", sa.Double),
    sa.Column("total_resolution_time_ms", sa.Double),
    sa.Column("status", sa.String(50), nullable=False, server_default="pending"),
    sa.Column("promoted_at", Stamp),
    sa.Column("promoted_to_rule_id", sa.String(255)),
    sa.Column("example_incidents", pg.JSONB),
    sa.Column("first_seen", Stamp),
    sa.Column("last_seen", Stamp),
    sa.Column("created_at", Stamp, nullable=False, server_default=NOW),
    sa.Column("platform", sa.String(50)),
    sa.Column("pattern_key", sa.String(1024), unique=True, comment="candidates.keys.pattern_key; null: unknown"),
    sa.Column("source", sa.String(50), nullable=False, server_default="imported", comment="imported | observed"),
    sa.CheckConstraint("status IN ('pending', 'approved', 'promoted', 'rejected')", name="status"),
)

l1_rules = sa.Table(
    "l1_rules",
    metadata,
    _id(),
    sa.Column("rule_id", sa.String(255), nullable=False, unique=True),
    sa.Column("incident_pattern", pg.JSONB, nullable=False),
    sa.Column("runbook_id", sa.String(255)),
    sa.Column("confidence", sa.Double),
    sa.Column("promoted_from_l2", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("enabled", sa.Boolean, nullable=False, server_default=sa.false(), comment="fold of rule_events"),
    sa.Column("created_at", Stamp, nullable=False, server_default=NOW),
    sa.Column("match_count", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("success_count", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("failure_count", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column(
        "success_rate",
        sa.Double,
        sa.Computed("CASE WHEN match_count > 0 THEN success_count::double precision / match_count END", persisted=True),
        comment="fraction; null over nothing",
    ),
    sa.Column("source", sa.String(50), nullable=False, server_default="promoted", comment="builtin | promoted"),
    sa.Column("updated_at", Stamp, nullable=False, server_default=NOW),
    sa.Column("platform", sa.String(50)),
    sa.Column("pattern_key", sa.String(1024), comment="the pattern this rule was promoted from, where known"),
    sa.Column("state", sa.String(20), nullable=False, comment="fold of rule_events"),
    sa.Column("rule_version", sa.Integer, nullable=False, server_default="1"),
    sa.Column("content_hash", sa.String(64), nullable=False),
    sa.Column("state_reason", Text),
    sa.Column("state_actor", sa.String(255)),
    sa.Column("state_at", Stamp),
    sa.Column("last_event_id", sa.BigInteger, nullable=False),
    sa.Column("rollout_step", sa.Integer, comment="step within canary or ring, 1 or 2; fold of rule_events"),
)

appliance_commands = sa.Table(
    "appliance_commands",
    metadata,
    sa.Column("id", pg.UUID(as_uuid=True), primary_key=True, server_default=sa.text("gen_random_uuid()")),
    sa.Column("appliance_id", sa.String(255), nullable=False),
    sa.Column("command_type", sa.String(100), nullable=False),
    sa.Column("params", pg.JSONB, nullable=False, server_default=sa.text("'{}'::jsonb")),
    sa.Column("status", sa.String(50), nullable=False, server_default="pending"),
    sa.Column("created_at", Stamp, nullable=False, server_default=NOW),
    sa.Column("delivered_at", Stamp),
    sa.Column("acknowledged_at", Stamp),
    sa.Column("expires_at", Stamp, server_default=sa.text("now() + interval '24 hours'")),
    sa.Column("rule_id", sa.String(255)),
    sa.Column("rule_version", sa.Integer),
    sa.Column("status_reason", Text),
    sa.Column("batch_id", sa.BigInteger),
    sa.Column(
        "told_at", Stamp, comment="when the appliance was first handed this command; null: it knows nothing of it"
    ),
    sa.Column(
        "withdrawn_at",
        Stamp,
        comment="sync commands: since when the rule version is in its manifest no more; null: it is, or never was",
    ),
    sa.Column("gone_at", Stamp, comment="when the appliance let us know that it runs the withdrawn version no more"),
    sa.UniqueConstraint("appliance_id", "command_type", "params"),
    sa.Index(
        "appliance_commands_unsettled_idx",
        "appliance_id",
        "status",
        postgresql_where=sa.text("status IN ('pending', 'delivered', 'expired')"),
    ),
    sa.Index(
        "appliance_commands_due_idx",
        "expires_at",
        postgresql_where=sa.text("status IN ('pending', 'delivered')"),
    ),
    sa.Index(
        "appliance_commands_tombstones_idx",
        "appliance_id",
        postgresql_where=sa.text("withdrawn_at IS NOT NULL AND gone_at IS NULL"),
    ),
    sa.Index(
        "appliance_commands_rule_key",
        "appliance_id",
        "rule_id",
        "rule_version",
        "command_type",
        unique=True,
        postgresql_where=sa.text("rule_id IS NOT NULL"),
    ),
    sa.CheckConstraint(
        "status IN ('pending', 'delivered', 'acknowledged', 'failed', 'expired', 'superseded')", name="status"
    ),
)

evidence_bundles = sa.Table(
    "evidence_bundles",
    metadata,
    _id(),
    sa.Column("bundle_id", sa.String(255), nullable=False, unique=True),
    sa.Column("appliance_id", sa.String(255), nullable=False),
    sa.Column("order_id", sa.String(255)),
    sa.Column("incident_id", sa.String(255)),
    sa.Column("check_type", sa.String(255)),
    sa.Column("outcome", sa.String(50)),
    sa.Column("pre_state", pg.JSONB),
    sa.Column("post_state", pg.JSONB),
    sa.Column("actions_taken", pg.JSONB),
    sa.Column("timestamp_start", Stamp),
    sa.Column("timestamp_end", Stamp),
    sa.Column("created_at", Stamp, nullable=False, server_default=NOW),
    sa.Index("evidence_bundles_appliance_id_idx", "appliance_id"),
    sa.Index("evidence_bundles_created_at_idx", "created_at"),
)

runbooks = sa.Table(
    "runbooks",
    metadata,
    _id(),
    sa.Column("runbook_id", sa.String(255), nullable=False, unique=True),
    sa.Column("name", sa.String(255), nullable=False),
    sa.Column("description", Text),
    sa.Column("category", sa.String(100)),
    sa.Column("check_type", sa.String(255)),
    sa.Column("platform", sa.String(50), comment="windows | linux | macos"),
    sa.Column("severity", sa.String(50)),
    sa.Column("is_disruptive", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("requires_maintenance_window", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("hipaa_controls", pg.JSONB),
    sa.Column("version", sa.String(50)),
    sa.Column("steps", pg.JSONB),
    sa.Column("enabled", sa.Boolean, nullable=False, server_default=sa.true()),
    sa.Column("created_at", Stamp, nullable=False, server_default=NOW),
)

sites = sa.Table(
    "sites",
    metadata,
    _id(),
    sa.Column("site_id", sa.String(255), nullable=False, unique=True),
    sa.Column("name", sa.String(255)),
    sa.Column("healing_tier", sa.String(50)),
    sa.Column("status", sa.String(50), nullable=False, server_default="active"),
    sa.Column("created_at", Stamp, nullable=False, server_default=NOW),
)

appliances = sa.Table(
    "appliances",
    metadata,
    _id(),
    sa.Column("appliance_id", sa.String(255), nullable=False, unique=True, comment="<site_id>-<MAC>"),
    sa.Column("site_id", sa.String(255), nullable=False),
    sa.Column("agent_version", sa.String(50)),
    sa.Column("last_checkin", Stamp),
    sa.Column("status", sa.String(50), nullable=False, server_default="online", comment="online | offline | retired"),
    sa.Column("capabilities", pg.JSONB, comment="action forms the agent reports; null: decided by its version"),
    sa.Column("created_at", Stamp, nullable=False, server_default=NOW),
    sa.Column("reported_manifest_hash", sa.String(64), comment="hash of the rule set the agent says it runs"),
    sa.Column("state_reported_at", Stamp, comment="when the agent last reported its state; null: never"),
    sa.Index("appliances_site_id_idx", "site_id"),
)

# --------------------------------------------------------------------------------------------------
# Telemetry room: outbox, rejects, corrections, identity
# --------------------------------------------------------------------------------------------------

touched_cells = sa.Table(
    "touched_cells",
    metadata,
    sa.Column("site_id", sa.String(255), nullable=False, comment="as written, aliases not resolved"),
    sa.Column("day", sa.Date, nullable=False),
    sa.Column("touched_at", Stamp, nullable=False, server_default=sa.text("clock_timestamp()")),
    sa.Column(
        "written",
        sa.Boolean,
        nullable=False,
        server_default=sa.true(),
        comment="false: to be recomputed, though no row of it was written",
    ),
    comment="Outbox: append-only, no key; a refresh takes rows with DELETE ... RETURNING.",
)

day_versions = sa.Table(
    "day_versions",
    metadata,
    sa.Column("day", sa.Date, primary_key=True),
    sa.Column("version", pg.UUID(as_uuid=True), nullable=False, server_default=sa.text("gen_random_uuid()")),
    sa.Column("noted_at", Stamp, nullable=False, server_default=sa.text("clock_timestamp()")),
    comment="The version of each day's telemetry: another one whenever written cells of it leave the outbox.",
)

telemetry_rejects = sa.Table(
    "telemetry_rejects",
    metadata,
    _id(),
    sa.Column("received_at", Stamp, nullable=False, server_default=NOW),
    sa.Column("source", Text, nullable=False, comment="file name, 'http' or the caller's word"),
    sa.Column("line_number", sa.BigInteger, comment="1-based, in the source"),
    sa.Column("reason_code", sa.String(50), nullable=False),
    sa.Column("reason", Text, nullable=False),
    sa.Column("payload", sa.LargeBinary, nullable=False, comment="raw bytes, cut at the declared limit"),
    sa.Column("payload_bytes", sa.BigInteger, nullable=False, comment="length before any cut"),
    sa.Column("payload_hash", sa.String(64), nullable=False),
    sa.Column("times_seen", sa.Integer, nullable=False, server_default="1"),
    sa.Column("status", sa.String(20), nullable=False, server_default="open", comment="open | accepted | discarded"),
    sa.Column("retried_at", Stamp),
    sa.Column("execution_id", sa.String(255), comment="the row it became, once accepted"),
    sa.Column("decided_at", Stamp, comment="when it was accepted or discarded; null: open, or nobody noted when"),
    sa.UniqueConstraint("source", "line_number", "payload_hash", postgresql_nulls_not_distinct=True),
    sa.CheckConstraint("status IN ('open', 'accepted', 'discarded')", name="status"),
    sa.Index("telemetry_rejects_open_idx", "source", postgresql_where=sa.text("status = 'open'")),
)

reject_purges = sa.Table(
    "reject_purges",
    metadata,
    _id(),
    sa.Column("purged_at", Stamp, nullable=False, server_default=NOW),
    sa.Column("actor", sa.String(255), nullable=False),
    sa.Column("decided_before", Stamp, nullable=False, comment="those decided before this went"),
    sa.Column("accepted", sa.BigInteger, nullable=False, comment="rows purged that had landed by a retry"),
    sa.Column("discarded", sa.BigInteger, nullable=False, comment="rows purged that had been given up"),
    comment="Which decided rejects were purged, by whom: the rejects here and these are all there ever were.",
)

execution_corrections = sa.Table(
    "execution_corrections",
    metadata,
    _id(),
    sa.Column("execution_id", sa.String(255), nullable=False),
    sa.Column("corrected_at", Stamp, nullable=False, server_default=sa.text("clock_timestamp()")),
    sa.Column("before", pg.JSONB, nullable=False, comment="the changed columns as they were"),
    sa.Column("after", pg.JSONB, nullable=False),
    sa.Index("execution_corrections_execution_id_idx", "execution_id"),
    comment="History of every UPDATE of a telemetry row, written by trigger.",
)

rule_aliases = sa.Table(
    "rule_aliases",
    metadata,
    _id(),
    sa.Column("alias", sa.String(255), nullable=False),
    sa.Column("rule_id", sa.String(255), nullable=False),
    sa.Column("valid_from", Stamp, nullable=False, server_default=sa.text("'-infinity'")),
    sa.Column("valid_to", Stamp, nullable=False, server_default=sa.text("'infinity'")),
    sa.Column("actor", sa.String(255), nullable=False),
    sa.Column("reason", Text, nullable=False),
    sa.Column("created_at", Stamp, nullable=False, server_default=NOW),
    sa.CheckConstraint("valid_from < valid_to AND alias <> rule_id", name="sane"),
    sa.UniqueConstraint("alias", "valid_from"),
)

site_aliases = sa.Table(
    "site_aliases",
    metadata,
    _id(),
    sa.Column("alias", sa.String(255), nullable=False),
    sa.Column("site_id", sa.String(255), nullable=False),
    sa.Column("valid_from", Stamp, nullable=False, server_default=sa.text("'-infinity'")),
    sa.Column("valid_to", Stamp, nullable=False, server_default=sa.text("'infinity'")),
    sa.Column("actor", sa.String(255), nullable=False),
    sa.Column("reason", Text, nullable=False),
    sa.Column("created_at", Stamp, nullable=False, server_default=NOW),
    sa.CheckConstraint("valid_from < valid_to AND alias <> site_id", name="sane"),
    sa.UniqueConstraint("alias", "valid_from"),
)

# --------------------------------------------------------------------------------------------------
# Aggregates room: outcome classes, batches, verdicts
# --------------------------------------------------------------------------------------------------

outcome_class_rules = sa.Table(
    "outcome_class_rules",
    metadata,
    sa.Column("rule_name", sa.String(100), primary_key=True),
    sa.Column("outcome_class", sa.String(30), nullable=False),
    sa.Column("field", sa.String(30), nullable=False, comment="the telemetry column the pattern is held against"),
    sa.Column("pattern", Text, nullable=False, comment="an ILIKE pattern"),
    sa.Column("description", Text, nullable=False),
    sa.Column("enabled", sa.Boolean, nullable=False, server_default=sa.true()),
    sa.CheckConstraint(
        "outcome_class IN ('synthetic', 'agent_unsupported', 'not_applicable', 'unreachable', 'escalated', "
        "'suppressed')",
        name="outcome_class",
    ),
    sa.CheckConstraint("field IN ('error_message', 'failure_type', 'status')", name="field"),
    sa.CheckConstraint("pattern <> '' AND pattern !~ '^%*$'", name="pattern"),
    comment="Error pattern -> outcome class. Classes rank in the order of the outcome_class check.",
)

sealed_days = sa.Table(
    "sealed_days",
    metadata,
    sa.Column("day", sa.Date, primary_key=True),
    sa.Column("sealed_at", Stamp, nullable=False, server_default=NOW),
    sa.Column("rows_purged", sa.BigInteger, nullable=False),
    sa.Column("actor", sa.String(255), nullable=False),
    sa.Column(
        "archived_generation", sa.String(64), comment="what the archive holds of it; null: nothing, it was purged"
    ),
    comment="Days whose telemetry was purged: their cells keep their figures and are recomputed no more.",
)

refresh_batches = sa.Table(
    "refresh_batches",
    metadata,
    sa.Column("batch_id", sa.BigInteger, sa.Identity(always=True), primary_key=True),
    sa.Column("run_id", sa.String(255), nullable=False, unique=True, comment="Dagster run id: one batch a run"),
    sa.Column("opened_at", Stamp, nullable=False, server_default=NOW),
    sa.Column("policy_name", sa.String(100), nullable=False),
    sa.Column("policy_hash", sa.String(64), nullable=False),
    sa.Column("as_of", Stamp, comment="clock of a replay; null: now"),
    sa.Column("refreshed_at", Stamp, comment="null: the aggregates were not refreshed in this batch"),
    sa.Column("refresh_seq", sa.BigInteger, comment="order of refreshes under the refresh lock"),
    sa.Column("cells_refreshed", sa.BigInteger),
    sa.Column("rows_written", sa.BigInteger),
    sa.Column("decided_at", Stamp),
    sa.Column("applied_at", Stamp),
)

required_gates = sa.Table(
    "required_gates",
    metadata,
    sa.Column("gate", sa.String(100), primary_key=True),
    sa.Column("question", Text, nullable=False),
    comment="Every gate here needs a verdict 'pass' in the batch before the database accepts a promotion.",
)

gate_verdicts = sa.Table(
    "gate_verdicts",
    metadata,
    sa.Column("batch_id", sa.BigInteger, primary_key=True),
    sa.Column("gate", sa.String(100), primary_key=True),
    sa.Column("verdict", sa.String(10), nullable=False),
    sa.Column("sentence", Text, nullable=False),
    sa.Column("offenders", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("details", pg.JSONB, nullable=False, server_default=sa.text("'{}'::jsonb")),
    sa.Column("decided_at", Stamp, nullable=False, server_default=sa.text("clock_timestamp()")),
    sa.ForeignKeyConstraint(["batch_id"], ["refresh_batches.batch_id"]),
    sa.CheckConstraint("verdict IN ('pass', 'fail', 'error')", name="verdict"),
)

# --------------------------------------------------------------------------------------------------
# Promotion room: policies in force, decisions, ledger
# --------------------------------------------------------------------------------------------------

policy_activations = sa.Table(
    "policy_activations",
    metadata,
    _id(),
    sa.Column("policy_name", sa.String(100), nullable=False),
    sa.Column("as_of", Stamp, comment="clock of a replay; null: real time"),
    sa.Column("actor", sa.String(255), nullable=False),
    sa.Column("reason", Text, nullable=False),
    sa.Column("activated_at", Stamp, nullable=False, server_default=sa.text("clock_timestamp()")),
    comment="Append-only; the last row is the policy in force. None: `standard`.",
)

promotion_decisions = sa.Table(
    "promotion_decisions",
    metadata,
    sa.Column("decision_id", sa.BigInteger, sa.Identity(always=True), primary_key=True),
    sa.Column("batch_id", sa.BigInteger, nullable=False),
    sa.Column("run_id", sa.String(255), nullable=False),
    sa.Column("decided_at", Stamp, nullable=False, server_default=sa.text("clock_timestamp()")),
    sa.Column("subject_kind", sa.String(20), nullable=False, comment="pattern | rule"),
    sa.Column("subject_id", sa.String(1024), nullable=False, comment="pattern_key or rule_id"),
    sa.Column("policy_name", sa.String(100), nullable=False),
    sa.Column("policy_hash", sa.String(64), nullable=False),
    sa.Column("verdict", sa.String(30), nullable=False, comment="promote | hold | reject | keep | warn | quarantine"),
    sa.Column("reason", Text, nullable=False, comment="one sentence: the deciding gate"),
    sa.Column("gates", pg.JSONB, nullable=False, comment="[{gate, verdict, observed, required, sentence}] in order"),
    sa.Column("evidence", pg.JSONB, nullable=False),
    sa.Column(
        "decision_hash",
        sa.String(64),
        nullable=False,
        comment="of verdict, gates, policy: a new row on change",
    ),
    sa.Column(
        "confirmed_batch_id",
        sa.BigInteger,
        nullable=False,
        comment="the last batch that came to the same decision; only its own batch may apply it",
    ),
    sa.ForeignKeyConstraint(["batch_id"], ["refresh_batches.batch_id"]),
    sa.CheckConstraint("subject_kind IN ('pattern', 'rule')", name="subject_kind"),
    sa.Index("promotion_decisions_subject_idx", "subject_kind", "subject_id", "decision_id"),
)

human_acts = sa.Table(
    "human_acts",
    metadata,
    sa.Column("act_id", sa.BigInteger, sa.Identity(always=True), primary_key=True),
    sa.Column("act", sa.String(20), nullable=False),
    sa.Column("subject_kind", sa.String(20), comment="pattern | rule; null for freeze and thaw"),
    sa.Column("subject_id", sa.String(1024)),
    sa.Column("actor", sa.String(255), nullable=False),
    sa.Column("reason", Text, nullable=False),
    sa.Column("acted_at", Stamp, nullable=False, server_default=sa.text("clock_timestamp()")),
    sa.CheckConstraint(
        "act IN ('approve', 'reject', 'quarantine', 'readmit', 'retire', 'freeze', 'thaw', 'lift', 'pause', 'resume', "
        "'abort')",
        name="act",
    ),
    sa.CheckConstraint("btrim(actor) <> '' AND btrim(reason) <> ''", name="signed"),
    sa.CheckConstraint("(act IN ('freeze', 'thaw')) = (subject_id IS NULL)", name="subject"),
    comment="What people decided, append-only. The last of freeze and thaw says whether promotion is frozen, the last of "
    "pause and resume whether a rule's rollout is.",
)

rule_transitions = sa.Table(
    "rule_transitions",
    metadata,
    sa.Column("kind", sa.String(30), primary_key=True),
    sa.Column("from_state", sa.String(20), primary_key=True, comment="'none' before the first event"),
    sa.Column("to_state", sa.String(20), primary_key=True),
    sa.Column("meaning", Text, nullable=False),
    comment="The legal edges of a rule's life; the ledger trigger refuses all others.",
)

rule_events = sa.Table(
    "rule_events",
    metadata,
    sa.Column("event_id", sa.BigInteger, sa.Identity(always=True), primary_key=True),
    sa.Column("rule_id", sa.String(255), nullable=False),
    sa.Column("rule_version", sa.Integer, nullable=False),
    sa.Column("kind", sa.String(30), nullable=False),
    sa.Column("from_state", sa.String(20), nullable=False),
    sa.Column("to_state", sa.String(20), nullable=False),
    sa.Column("definition", pg.JSONB, nullable=False, comment="incident_pattern, runbook_id, platform, source, …"),
    sa.Column("content_hash", sa.String(64), nullable=False),
    sa.Column("actor", sa.String(255), nullable=False),
    sa.Column("reason", Text, nullable=False),
    sa.Column("policy_hash", sa.String(64)),
    sa.Column("decision_id", sa.BigInteger),
    sa.Column("batch_id", sa.BigInteger),
    sa.Column("run_id", sa.String(255)),
    sa.Column("certificate", pg.JSONB),
    sa.Column("occurred_at", Stamp, nullable=False, server_default=sa.text("clock_timestamp()")),
    sa.Column(
        "rollout_step",
        sa.Integer,
        comment="step within canary or ring, 1 or 2; null: no step, or before there were any",
    ),
    sa.ForeignKeyConstraint(["decision_id"], ["promotion_decisions.decision_id"]),
    sa.ForeignKeyConstraint(["batch_id"], ["refresh_batches.batch_id"]),
    sa.Index("rule_events_rule_id_idx", "rule_id", "event_id"),
    comment="The ledger: append-only, the only thing that changes a rule's state.",
)

policy_documents = sa.Table(
    "policy_documents",
    metadata,
    sa.Column("policy_hash", sa.String(64), primary_key=True),
    sa.Column("policy_name", sa.String(100), nullable=False),
    sa.Column("document", pg.JSONB, nullable=False, comment="every value of the policy, defaults included"),
    sa.Column("recorded_at", Stamp, nullable=False, server_default=sa.text("clock_timestamp()")),
    comment="Append-only: what each policy hash on a batch or a decision stands for.",
)

# --------------------------------------------------------------------------------------------------
# Health room
# --------------------------------------------------------------------------------------------------

scope_quarantines = sa.Table(
    "scope_quarantines",
    metadata,
    sa.Column("event_id", sa.BigInteger, sa.Identity(always=True), primary_key=True),
    sa.Column("rule_id", sa.String(255), nullable=False),
    sa.Column("rule_version", sa.Integer, nullable=False),
    sa.Column("pattern_key", sa.String(1024), comment="of the rule, set by the database: copies of the rule share it"),
    sa.Column("content_hash", sa.String(64), nullable=False, comment="of the rule, set by the database"),
    sa.Column("kind", sa.String(20), nullable=False),
    sa.Column("scope_kind", sa.String(20), nullable=False),
    sa.Column("scope_value", sa.String(255), nullable=False, comment="a site id, or an agent version"),
    sa.Column("actor", sa.String(255), nullable=False),
    sa.Column("reason", Text, nullable=False),
    sa.Column("evidence", pg.JSONB, nullable=False, server_default=sa.text("'{}'::jsonb"), comment="W, n, window"),
    sa.Column("policy_hash", sa.String(64)),
    sa.Column("decision_id", sa.BigInteger),
    sa.Column("batch_id", sa.BigInteger),
    sa.Column("run_id", sa.String(255)),
    sa.Column("occurred_at", Stamp, nullable=False, server_default=sa.text("clock_timestamp()")),
    sa.ForeignKeyConstraint(["decision_id"], ["promotion_decisions.decision_id"]),
    sa.ForeignKeyConstraint(["batch_id"], ["refresh_batches.batch_id"]),
    sa.CheckConstraint("kind IN ('quarantined', 'lifted')", name="kind"),
    sa.CheckConstraint("scope_kind IN ('site', 'agent_version') AND btrim(scope_value) <> ''", name="scope"),
    sa.Index("scope_quarantines_scope_idx", "rule_id", "rule_version", "scope_kind", "scope_value", "event_id"),
    comment="Append-only: which part of the fleet a rule is kept from. The last event of a scope says whether it is.",
)

cusum_checkpoints = sa.Table(
    "cusum_checkpoints",
    metadata,
    sa.Column("policy_hash", sa.String(64), primary_key=True),
    sa.Column("rule_id", sa.String(255), primary_key=True),
    sa.Column("rule_version", sa.Integer, primary_key=True),
    sa.Column("scope_kind", sa.String(20), primary_key=True),
    sa.Column("scope_value", sa.String(255), primary_key=True),
    sa.Column(
        "until", Stamp, nullable=False, comment="episodes that began before it are in these figures; one for a rule"
    ),
    sa.Column("episodes", sa.BigInteger, nullable=False),
    sa.Column("failures", sa.BigInteger, nullable=False),
    sa.Column("w", sa.Double, nullable=False),
    comment="Where each CUSUM stood some days ago, so that a run need not begin at the version's first episode. "
    "Derived: deleted wherever an episode before it or a scope changes, and made anew.",
)

# --------------------------------------------------------------------------------------------------
# Delivery room
# --------------------------------------------------------------------------------------------------

appliance_manifests = sa.Table(
    "appliance_manifests",
    metadata,
    sa.Column("appliance_id", sa.String(255), primary_key=True),
    sa.Column("site_id", sa.String(255), nullable=False),
    sa.Column("batch_id", sa.BigInteger, nullable=False),
    sa.Column("built_at", Stamp, nullable=False, server_default=NOW),
    sa.Column(
        "tombstones",
        pg.JSONB,
        nullable=False,
        server_default=sa.text("'[]'::jsonb"),
        comment="promoted rules it was told of and must drop: {rule_id, version, reason, since}",
    ),
    sa.Column(
        "content_hash",
        sa.String(64),
        sa.ForeignKey("manifest_contents.content_hash"),
        nullable=False,
        comment="its row of manifest_contents",
    ),
    sa.Column("commanded_hash", sa.String(64), comment="the content that its commands were last brought in line with"),
    sa.Column("drift_since", Stamp, comment="since when the appliance has not reported this rule set; null: it has"),
    sa.Index("appliance_manifests_content_idx", "content_hash"),
    comment="Desired state: one row per appliance; its rules are those of its content.",
)

manifest_entries = sa.Table(
    "manifest_entries",
    metadata,
    sa.Column("entry_id", sa.BigInteger, sa.Identity(always=True), primary_key=True),
    sa.Column(
        "entry_hash", sa.String(64), nullable=False, unique=True, comment="SHA-256 of the entry as canonical JSON"
    ),
    sa.Column("rule_id", sa.String(255), nullable=False),
    sa.Column("rule_version", sa.Integer, nullable=False),
    sa.Column("entry", pg.JSONB, nullable=False, comment="the rule as the agent gets it"),
    sa.Index("manifest_entries_rule_id_idx", "rule_id"),
    comment="Each rule once in each form in which an agent gets it; contents of manifests name their entries.",
)

manifest_contents = sa.Table(
    "manifest_contents",
    metadata,
    sa.Column("content_hash", sa.String(64), primary_key=True, comment="of rules and withheld"),
    sa.Column("manifest_hash", sa.String(64), nullable=False),
    sa.Column(
        "entry_ids",
        sa.ARRAY(sa.BigInteger),
        nullable=False,
        comment="its rules in their order: rows of manifest_entries",
    ),
    sa.Column("withheld", pg.JSONB, nullable=False),
    sa.Column("rule_count", sa.Integer, nullable=False),
    sa.Column("rule_ids", sa.ARRAY(Text), nullable=False, comment="the promoted rules in it, by id"),
    sa.Column("rule_versions", sa.ARRAY(sa.Integer), nullable=False, comment="their versions, in the same order"),
    comment="Each content of a manifest once: thousands of appliances share a few, and two are compared by their lists.",
)

rule_conflicts = sa.Table(
    "rule_conflicts",
    metadata,
    sa.Column("incident_type", Text, primary_key=True),
    sa.Column("platform", sa.String(50), primary_key=True),
    sa.Column("winner_id", sa.String(255), primary_key=True, comment="the rule that the agent tries first"),
    sa.Column("loser_id", sa.String(255), primary_key=True, comment="the rule behind it"),
    sa.Column("winner_version", sa.Integer, nullable=False),
    sa.Column("loser_version", sa.Integer, nullable=False),
    sa.Column("kind", sa.String(20), nullable=False, comment="shadowed: the loser never fires; overlaps: it may"),
    sa.Column("same_runbook", sa.Boolean, nullable=False, comment="both run the same script: harmless"),
    sa.Column("appliances", sa.Integer, nullable=False, comment="manifests that hold both"),
    sa.Column("batch_id", sa.BigInteger, nullable=False),
    sa.CheckConstraint("kind IN ('shadowed', 'overlaps')", name="kind"),
    comment="Served rules that match the same incident on the same appliance: which one wins. Derived; rewritten on change.",
)

appliance_tokens = sa.Table(
    "appliance_tokens",
    metadata,
    sa.Column("token_id", sa.BigInteger, sa.Identity(always=True), primary_key=True),
    sa.Column("appliance_id", sa.String(255), nullable=False),
    sa.Column("site_id", sa.String(255), nullable=False, comment="the only site it may read and report for"),
    sa.Column("token_hash", sa.String(64), nullable=False, unique=True, comment="sha256 of the token, hex"),
    sa.Column("issued_at", Stamp, nullable=False, server_default=NOW),
    sa.Column("issued_by", sa.String(255), nullable=False),
    sa.Column("reason", Text, nullable=False),
    sa.Column("expires_at", Stamp, comment="null: until revoked"),
    sa.Column("revoked_at", Stamp),
    sa.Column("revoked_by", sa.String(255)),
    sa.Column("revoked_reason", Text),
    sa.Index("appliance_tokens_appliance_id_idx", "appliance_id"),
    sa.CheckConstraint("btrim(issued_by) <> '' AND btrim(reason) <> ''", name="signed"),
    sa.CheckConstraint(
        "(revoked_at IS NULL) = (revoked_by IS NULL) AND (revoked_at IS NULL) = (revoked_reason IS NULL)",
        name="revoked",
    ),
    comment="Bearer tokens of appliances, hashed; one that was issued is never deleted, only revoked.",
)

# --------------------------------------------------------------------------------------------------
# Health room: why rules fail
# --------------------------------------------------------------------------------------------------

rule_attributions = sa.Table(
    "rule_attributions",
    metadata,
    sa.Column("rule_id", sa.String(255), primary_key=True),
    sa.Column("evidence_hash", sa.String(64), nullable=False, comment="of the counts and the method it rests on"),
    sa.Column("matches", sa.BigInteger, nullable=False, comment="executions it rests on"),
    sa.Column("sentence", Text, nullable=False, comment="the causes in words; empty: none stands out"),
    sa.Column("result", pg.JSONB, nullable=False, comment="health.report.as_json, redacted"),
    sa.Column("page", Text, nullable=False, comment="the same as Markdown"),
    sa.Column("plots", pg.JSONB, nullable=False, comment="PNG data URIs by name"),
    sa.Column("batch_id", sa.BigInteger, comment="the batch that computed it; null: outside a run"),
    sa.Column("computed_at", Stamp, nullable=False, server_default=sa.text("clock_timestamp()")),
    comment="Why each failing rule fails, the latest answer only; a rule that no longer fails has no row.",
)

# --------------------------------------------------------------------------------------------------
# Health room: alerts and their outbox
# --------------------------------------------------------------------------------------------------

alerts = sa.Table(
    "alerts",
    metadata,
    sa.Column(
        "alert_key",
        sa.String(1100),
        primary_key=True,
        comment="check:… | run:… | quarantine:… | candidate:… | daemon:…",
    ),
    sa.Column("kind", sa.String(20), nullable=False),
    sa.Column("severity", sa.String(10), nullable=False),
    sa.Column("state", sa.String(10), nullable=False, comment="ok: never raised; open; recovered"),
    sa.Column("observed", sa.String(10), nullable=False, comment="pass | fail | error (could not be evaluated)"),
    sa.Column(
        "observed_at", Stamp, nullable=False, comment="of the newest observation folded in; older ones are ignored"
    ),
    sa.Column("title", Text, nullable=False),
    sa.Column("sentence", Text, nullable=False),
    sa.Column("details", pg.JSONB, nullable=False, comment="statement, offenders, command, run_id, asset …"),
    sa.Column("first_at", Stamp, comment="when this opening began"),
    sa.Column("last_at", Stamp, comment="last change of state"),
    sa.Column("times_raised", sa.Integer, nullable=False, server_default="0"),
    sa.Column("acknowledged_by", sa.String(255)),
    sa.Column("acknowledged_at", Stamp),
    sa.Column("acknowledged_reason", Text),
    sa.Column("escalated_at", Stamp),
    sa.CheckConstraint("kind IN ('check', 'run', 'quarantine', 'candidate', 'daemon')", name="kind"),
    sa.CheckConstraint("severity IN ('info', 'warning', 'critical')", name="severity"),
    sa.CheckConstraint("state IN ('ok', 'open', 'recovered')", name="state"),
    sa.CheckConstraint("observed IN ('pass', 'fail', 'error')", name="observed"),
    sa.CheckConstraint("(state = 'open') = (observed <> 'pass')", name="open"),
    comment="One row per thing that can alert, as last observed.",
)

alert_events = sa.Table(
    "alert_events",
    metadata,
    sa.Column("event_id", sa.BigInteger, sa.Identity(always=True), primary_key=True),
    sa.Column("alert_key", sa.String(1100), nullable=False),
    sa.Column("transition", sa.String(20), nullable=False),
    sa.Column("observed", sa.String(10), nullable=False),
    sa.Column("severity", sa.String(10), nullable=False),
    sa.Column("title", Text, nullable=False),
    sa.Column("sentence", Text, nullable=False),
    sa.Column("details", pg.JSONB, nullable=False),
    sa.Column("actor", sa.String(255)),
    sa.Column("reason", Text),
    sa.Column("occurred_at", Stamp, nullable=False),
    sa.Column("recorded_at", Stamp, nullable=False, server_default=sa.text("clock_timestamp()")),
    sa.ForeignKeyConstraint(["alert_key"], ["alerts.alert_key"]),
    sa.UniqueConstraint("alert_key", "transition", "occurred_at"),
    sa.CheckConstraint(
        "transition IN ('raised', 'changed', 'recovered', 'escalated', 'acknowledged')", name="transition"
    ),
    sa.CheckConstraint("transition <> 'acknowledged' OR (btrim(actor) <> '' AND btrim(reason) <> '')", name="signed"),
    comment="Changes of state of alerts, append-only.",
)

notifications = sa.Table(
    "notifications",
    metadata,
    sa.Column("notification_id", sa.BigInteger, sa.Identity(always=True), primary_key=True),
    sa.Column("event_id", sa.BigInteger, nullable=False),
    sa.Column("channel", sa.String(100), nullable=False, comment="alias; the URL is in the environment alone"),
    sa.Column("not_before", Stamp, nullable=False, comment="the end of quiet hours"),
    sa.Column("next_attempt_at", Stamp, nullable=False),
    sa.Column("attempts", sa.Integer, nullable=False, server_default="0"),
    sa.Column("claim", sa.Uuid, comment="the attempt at work; left behind by a sender that was killed"),
    sa.Column("claimed_until", Stamp),
    sa.Column(
        "in_doubt",
        sa.Boolean,
        nullable=False,
        server_default=sa.false(),
        comment="a killed sender may have delivered it",
    ),
    sa.Column("sent_at", Stamp),
    sa.Column("error", Text, comment="of the last attempt, redacted"),
    sa.Column("created_at", Stamp, nullable=False),
    sa.ForeignKeyConstraint(["event_id"], ["alert_events.event_id"]),
    sa.UniqueConstraint("event_id", "channel"),
    sa.CheckConstraint("(claim IS NULL) = (claimed_until IS NULL)", name="claim"),
    sa.Index("notifications_unsent_idx", "channel", "notification_id", postgresql_where=sa.text("sent_at IS NULL")),
    comment="The outbox: one row per event and channel, written with the event, delivered at least once.",
)

# --------------------------------------------------------------------------------------------------
# Bookkeeping of the house itself
# --------------------------------------------------------------------------------------------------

schema_objects = sa.Table(
    "schema_objects",
    metadata,
    sa.Column("kind", sa.String(20), primary_key=True, comment="routine | model | seed"),
    sa.Column("name", sa.String(255), primary_key=True),
    sa.Column("content_hash", sa.String(64), nullable=False),
    sa.Column("applied_at", Stamp, nullable=False, server_default=sa.text("clock_timestamp()")),
    comment="Routines, SQL models and seeds as last applied, by content hash.",
)

adoption_journal = sa.Table(
    "adoption_journal",
    metadata,
    sa.Column("entry_id", sa.BigInteger, sa.Identity(always=True), primary_key=True),
    sa.Column("kind", sa.String(20), nullable=False, comment="changed | accepted | saved | seeded | adopted | undone"),
    sa.Column(
        "subject", Text, nullable=False, comment="a table, table.column, or an object as `flywheel db check` names it"
    ),
    sa.Column("what", Text, nullable=False),
    sa.Column("why", Text, nullable=False),
    sa.Column("details", pg.JSONB, nullable=False, server_default=sa.text("'{}'::jsonb"), comment="what an undo needs"),
    sa.Column("actor", sa.String(255), nullable=False),
    sa.Column("recorded_at", Stamp, nullable=False, server_default=sa.text("clock_timestamp()")),
    comment="Append-only: what `flywheel adopt` changed, left as it was and saved. Empty where Flywheel made the database.",
)
