"""The contract of the rule registry.

Belongs here: its expectations, as data. Does not belong here: how a contract is judged (`contracts.adapter`), and the
fold of the ledger, which the check `registry_equals_ledger` recomputes.
"""

from __future__ import annotations

from datetime import datetime
from typing import Final

from flywheel_pipeline.contracts.declared import Contract, Expectation

_STATES = ["proposed", "shadow", "canary", "ring", "fleet", "quarantined", "retired"]


def rule_expectations(_as_of: datetime) -> tuple[Expectation, ...]:
    """What delivery and health take for granted of a rule."""
    return (
        Expectation("expect_table_row_count_to_be_between", {"min_value": 1}, "Not even the built-in rules are known."),
        Expectation("expect_column_values_to_be_unique", {"column": "rule_id"}, "Two rules under one id."),
        Expectation(
            "expect_column_values_to_match_regex", {"column": "rule_id", "regex": r"\S"}, "A blank id names no rule."
        ),
        Expectation(
            "expect_column_values_to_be_in_set",
            {"column": "state", "value_set": _STATES},
            "No transition leads out of that state.",
        ),
        Expectation(
            "expect_column_values_to_be_null",
            {"column": "enabled_unlike_state"},
            "Served although its state says no, or the other way round: somebody wrote past the ledger.",
        ),
        Expectation(
            "expect_column_values_to_be_null",
            {"column": "problem_in_service"},
            "A rule in service whose runbook cannot run fails on every host.",
        ),
        Expectation(
            "expect_column_values_to_be_null",
            {"column": "matches_everything"},
            "A rule in service without conditions fires on every incident.",
        ),
        Expectation(
            "expect_column_values_to_be_null",
            {"column": "out_of_service_unsigned"},
            "A rule out of service keeps its reason, actor and time, or the next migration revives it.",
        ),
        Expectation(
            "expect_column_values_to_be_in_set",
            {"column": "source", "value_set": ["builtin", "promoted"]},
            "Delivery orders rules by source.",
        ),
        Expectation(
            "expect_column_values_to_be_in_set",
            {"column": "platform_in_service", "value_set": ["windows", "linux", "macos"]},
            "A rule in service for no known platform matches no host.",
        ),
        Expectation(
            "expect_column_values_to_match_regex",
            {"column": "content_hash", "regex": "^[0-9a-f]{64}$"},
            "A manifest cannot prove which content was delivered.",
        ),
        Expectation(
            "expect_column_values_to_be_between", {"column": "rule_version", "min_value": 1}, "Versions begin at 1."
        ),
        *(
            Expectation(
                "expect_column_values_to_be_between", {"column": name, "min_value": 0}, "A counter below nothing."
            )
            for name in ("success_count", "failure_count")
        ),
        Expectation(
            "expect_column_pair_values_to_be_equal",
            {"column_A": "match_count", "column_B": "counted"},
            "Matches are not successes plus failures: a counter drifted.",
        ),
        Expectation(
            "expect_column_values_to_be_between",
            {"column": "success_rate", "min_value": 0, "max_value": 1},
            "The rate of a rule is a fraction.",
        ),
        Expectation(
            "expect_column_values_to_be_null",
            {"column": "rate_over_nothing"},
            "A rate over nothing is null, never a number.",
        ),
        Expectation(
            "expect_column_values_to_be_between",
            {"column": "confidence", "min_value": 0, "max_value": 1},
            "Confidence is a fraction; percent was stored.",
            "warning",
        ),
        Expectation(
            "expect_column_values_to_not_be_null",
            {"column": "pattern_of_promoted", "mostly": 0.5},
            "Most promoted rules cannot be traced to the pattern they came from.",
            "warning",
        ),
    )


RULES: Final = Contract(
    asset="l1_rules",
    title="Rule registry",
    scope="all rules of the registry",
    query="""
        SELECT rule_id, state, source, content_hash, rule_version, success_count, failure_count, match_count,
          success_count + failure_count AS counted, success_rate, confidence,
          CASE WHEN enabled IS DISTINCT FROM flywheel_state_is_enabled(state) THEN state END AS enabled_unlike_state,
          CASE WHEN enabled THEN flywheel_runbook_problem(runbook_id, platform) END AS problem_in_service,
          CASE WHEN enabled AND flywheel_conditions_empty(incident_pattern) THEN incident_pattern::text END
            AS matches_everything,
          CASE WHEN state IN ('quarantined', 'retired') AND
              (coalesce(state_reason, '') !~ '\\S' OR coalesce(state_actor, '') !~ '\\S' OR state_at IS NULL)
            THEN state END AS out_of_service_unsigned,
          CASE WHEN enabled THEN coalesce(platform, 'none') END AS platform_in_service,
          CASE WHEN match_count = 0 THEN success_rate END AS rate_over_nothing,
          CASE WHEN source <> 'promoted' THEN 'built in' ELSE pattern_key END AS pattern_of_promoted
        FROM l1_rules ORDER BY rule_id
    """,
    key=("rule_id",),
    expectations=rule_expectations,
)
