"""The contract of the pattern candidates.

Belongs here: its expectations, as data. Does not belong here: how a contract is judged (`contracts.adapter`).
"""

from __future__ import annotations

from datetime import datetime
from typing import Final

from flywheel_pipeline.contracts.declared import Contract, Expectation


def _not_more(part: str, whole: str, why: str) -> Expectation:
    return Expectation(
        "expect_column_pair_values_a_to_be_greater_than_b",
        {"column_A": whole, "column_B": part, "or_equal": True, "ignore_row_if": "either_value_is_missing"},
        why,
    )


def candidate_expectations(_as_of: datetime) -> tuple[Expectation, ...]:
    """What the gates take for granted of a candidate."""
    return (
        Expectation(
            "expect_table_row_count_to_be_between",
            {"min_value": 1},
            "No candidates: L2 healed nothing yet, or its rows do not arrive.",
            "warning",
        ),
        Expectation("expect_column_values_to_be_unique", {"column": "pattern_key"}, "Two candidates share a rule."),
        Expectation("expect_column_values_to_not_be_null", {"column": "pattern_key"}, "No rule can be tied to it."),
        *(
            Expectation(
                "expect_column_values_to_match_regex",
                {"column": name, "regex": r"\S"},
                f"A blank {name} matches nothing.",
            )
            for name in ("incident_type", "runbook_id")
        ),
        Expectation(
            "expect_column_values_to_be_in_set",
            {"column": "platform", "value_set": ["windows", "linux", "macos", "unknown"]},
            "The catalogue knows no runbook for that platform.",
        ),
        Expectation(
            "expect_column_values_to_be_in_set",
            {"column": "status", "value_set": ["pending", "approved", "promoted", "rejected"]},
            "No code decides about that status.",
        ),
        Expectation(
            "expect_column_values_to_be_between", {"column": "executions", "min_value": 0}, "A count below nothing."
        ),
        Expectation(
            "expect_column_values_to_be_between", {"column": "excluded", "min_value": 0}, "A count below nothing."
        ),
        *(
            Expectation(
                "expect_column_values_to_be_between",
                {"column": name, "min_value": 0, "max_value": 1},
                f"{name} is a fraction; a gate would compare percent with it.",
            )
            for name in ("raw_rate", "selection_share")
        ),
        _not_more("raw_successes", "executions", "More successes than executions."),
        _not_more("excluded", "executions", "More exclusions than executions."),
        _not_more("successful_episodes", "rated_episodes", "More healed host-days than rated ones."),
        _not_more("chosen_episodes", "type_episodes", "Chosen more often than the drift occurred."),
        _not_more("first_at", "last_at", "Its last execution lies before its first."),
        Expectation(
            "expect_column_values_to_be_null",
            {"column": "rate_over_nothing"},
            "A rate over nothing is null, never a number.",
        ),
        Expectation(
            "expect_column_values_to_be_null",
            {"column": "approved_but_cannot_run"},
            "A person approved a runbook that cannot be served.",
        ),
        Expectation(
            "expect_column_values_to_not_be_null",
            {"column": "id_of_observed", "mostly": 0.99},
            "Observed in telemetry and not written to patterns: nothing will decide about it.",
            "warning",
        ),
    )


CANDIDATES: Final = Contract(
    asset="pattern_candidates",
    title="Pattern candidates",
    scope="all candidates",
    query="""
        SELECT pattern_key, incident_type, runbook_id, platform, status, executions, raw_successes, raw_rate, excluded,
          rated_episodes, successful_episodes, chosen_episodes, type_episodes, selection_share, first_at, last_at,
          CASE WHEN executions = 0 THEN raw_rate END AS rate_over_nothing,
          CASE WHEN status = 'approved' THEN runbook_problem END AS approved_but_cannot_run,
          CASE WHEN executions = 0 THEN 'never observed' ELSE pattern_id END AS id_of_observed
        FROM pattern_candidates ORDER BY pattern_key
    """,
    key=("pattern_key",),
    expectations=candidate_expectations,
)
