"""What each column means, for readers of the Dagster UI: the words that no comment in the database says.

Belongs here: one short line a column of the tables that stand in the asset graph. Does not belong here: what a comment
of `tables.py` says already; that is a part of the schema and comes first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import sqlalchemy as sa

#: By column name, in whichever table it stands.
_COMMON: Final[Mapping[str, str]] = {
    "id": "number of the row",
    "actor": "who did it: a person's name, or the part of Flywheel",
    "agent_version": "release of the agent",
    "appliance_id": "the appliance",
    "batch_id": "the batch that wrote it; its run, policy and clock stand in refresh_batches",
    "confidence": "how sure the planner was, a fraction; it decides nothing",
    "content_hash": "sha256 of the rule's content",
    "created_at": "when the row was written",
    "decision_id": "the decision that it rests on",
    "enabled": "whether it may be used",
    "event_id": "position in the ledger",
    "incident_type": "what drifted",
    "kind": "what happened",
    "occurred_at": "when it happened",
    "platform": "windows, linux or macos; null: any",
    "policy_hash": "the policy it was judged by, by the hash of its values",
    "reason": "why, in one sentence",
    "rule_id": "the rule",
    "rule_version": "its version: another content is another version",
    "run_id": "the Dagster run",
    "runbook_id": "the script that runs",
    "site_id": "the site",
    "status": "where it stands",
    "updated_at": "when the row was last changed",
}

_BY_TABLE: Final[Mapping[str, Mapping[str, str]]] = {
    "execution_telemetry": {
        "incident_id": "the incident that was healed",
        "site_id": "the site, under the name of that day",
        "hostname": "the host it ran on; it stays within its site",
        "platform": "as the agent reported it",
        "started_at": "when the attempt began, by the agent's clock",
        "completed_at": "when it ended, by the agent's clock",
        "duration_seconds": "how long it took",
        "success": "whether the agent reports success; verification may say otherwise",
        "status": "the agent's word for the outcome",
        "verification_passed": "whether a second look found the drift gone; null: nobody looked",
        "resolution_level": "L1: a rule; L2: a language model; L3: a person",
        "state_before": "what was found",
        "state_after": "what was left",
        "state_diff": "what changed",
        "executed_steps": "the steps of the script that ran",
        "error_message": "the error as reported; redacted before it leaves its site",
        "error_step": "the step that failed, from 1",
        "error_traceback": "its trace, where one was sent",
        "failure_type": "the agent's class of the error",
        "retry_count": "how often it was tried before",
        "was_correct_runbook": "a reviewer's answer",
        "was_correct_diagnosis": "a reviewer's answer",
        "manual_intervention_needed": "whether a person had to step in",
        "human_feedback": "a reviewer's words",
        "evidence_bundle_id": "the evidence that the agent kept of it",
        "tags": "whatever the agent adds",
        "cost_usd": "cost of the language model",
        "input_tokens": "tokens it read",
        "output_tokens": "tokens it wrote",
        "pattern_signature": "the pattern as the agent names it",
        "reasoning": "why the language model chose this script",
    },
    "runbooks": {
        "runbook_id": "the name by which rules call it",
        "name": "its title",
        "description": "what it does",
        "category": "its family; some families count as high risk in a policy",
        "check_type": "the check whose drift it heals",
        "severity": "how bad the drift is",
        "is_disruptive": "whether it interrupts the people at work: then a person approves",
        "requires_maintenance_window": "whether it must wait for one",
        "hipaa_controls": "the controls that it serves",
        "version": "its own version",
        "steps": "the script",
        "enabled": "whether it may run at all",
    },
    "appliances": {
        "agent_version": "release of its agent, which decides what it can run",
        "last_checkin": "when it was last heard of",
    },
    "alerts": {
        "kind": "check, run, quarantine, candidate or daemon",
        "severity": "critical, warning or info",
        "title": "what it is about, in a few words",
        "sentence": "what was found, in one sentence",
        "times_raised": "how often it opened so far",
        "acknowledged_by": "who looks after it; null: nobody",
        "acknowledged_at": "since when somebody does",
        "acknowledged_reason": "what they said",
        "escalated_at": "when it was passed on, since nobody acknowledged; null: it was not",
    },
    "patterns": {
        "pattern_id": "its id in the system before",
        "pattern_signature": "its key as the agents write it",
        "description": "what it is, in words",
        "runbook_id": "the script that L2 chose",
        "platform": "windows, linux, macos or unknown",
        "proposed_rule": "the rule that it would become",
        "success_count": "executions that were reported as success",
        "failure_count": "executions that were reported as failure",
        "avg_resolution_time_ms": "mean duration, in milliseconds",
        "total_resolution_time_ms": "summed duration, in milliseconds",
        "status": "pending, approved, promoted or rejected; only the promotion room moves it",
        "promoted_at": "when it became a rule; null: it did not",
        "promoted_to_rule_id": "the rule that it became",
        "example_incidents": "a few incidents of it",
        "first_seen": "first execution",
        "last_seen": "newest execution",
    },
    "promotion_decisions": {
        "decision_id": "position among the decisions",
        "decided_at": "when it was decided",
        "policy_name": "the policy's name",
        "evidence": "the figures that the gates were given",
    },
    "rule_events": {
        "kind": "what happened: registered, imported, promoted, advanced, quarantined, readmitted, retired …",
        "from_state": "the state before",
        "to_state": "the state after",
        "certificate": "what a promotion rests on; `flywheel certificate verify` recomputes it",
    },
    "l1_rules": {
        "incident_pattern": "the incidents that it matches",
        "promoted_from_l2": "whether it was learned, not shipped with the agent",
        "match_count": "executions; set by the refresh",
        "success_count": "those reported as success; set by the refresh",
        "failure_count": "those reported as failure; set by the refresh",
        "state_reason": "why it is in its state",
        "state_actor": "who brought it there",
        "state_at": "since when",
        "last_event_id": "the event of the ledger that this row folds last",
    },
    "appliance_commands": {
        "id": "the command",
        "command_type": "sync_promoted_rule or withdraw_rule",
        "params": "what the appliance is handed",
        "status": "pending, delivered, acknowledged, failed, expired or superseded",
        "delivered_at": "when the appliance fetched it; null: not yet",
        "acknowledged_at": "when it answered; null: not yet",
        "expires_at": "when it is handed out again",
        "status_reason": "why it stands there",
    },
    "scope_quarantines": {
        "kind": "quarantined or lifted",
        "scope_kind": "site or agent_version",
    },
    "rule_attributions": {"computed_at": "when it was computed"},
}


def column_words(table: sa.Table) -> dict[str, str]:
    """Return what each column of a table means: the comment of its schema, else the words above.

    Raises:
        KeyError: a column that neither describes.
    """
    words = _BY_TABLE.get(table.name, {})
    return {column.name: column.comment or words.get(column.name) or _COMMON[column.name] for column in table.columns}


def idle_words() -> list[str]:
    """Return `table.column` of each entry above that describes no column, or one that has a comment: for a test."""
    from flywheel_pipeline.database import tables

    return [
        f"{name}.{column}"
        for name, words in _BY_TABLE.items()
        for column in words
        if (found := tables.metadata.tables[name].columns.get(column)) is None or found.comment
    ]
