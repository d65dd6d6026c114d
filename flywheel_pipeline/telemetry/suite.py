"""The contracts of the telemetry log and of the runbook catalogue.

Belongs here: their expectations, as data. Does not belong here: what may enter (`contract` refuses that first) and
how a contract is judged (`contracts.adapter`).
"""

from __future__ import annotations

from datetime import datetime
from typing import Final

import sqlalchemy as sa

from flywheel_pipeline.contracts.declared import Contract, Expectation
from flywheel_pipeline.database.tables import execution_telemetry
from flywheel_pipeline.telemetry.contract import CLOCK_TOLERANCE, OLDEST, REQUIRED_COLUMNS

#: Rows of the log that are looked at: about 1.5 seconds of validation.
LATEST_ROWS: Final = 20_000
_COLUMNS: Final = ", ".join(c.name for c in execution_telemetry.c if not isinstance(c.type, sa.JSON))


def telemetry_expectations(as_of: datetime) -> tuple[Expectation, ...]:
    """Identity, vocabulary, ranges and clocks of `execution_telemetry` as of `as_of` (aware)."""
    required = sorted(REQUIRED_COLUMNS | {"created_at", "event_at", "appliance_id"})
    return (
        Expectation("expect_table_row_count_to_be_between", {"min_value": 1}, "No rows prove nothing."),
        Expectation("expect_column_values_to_be_unique", {"column": "execution_id"}, "A row counts twice."),
        *(
            Expectation("expect_column_values_to_not_be_null", {"column": name}, f"Nothing counts without {name}.")
            for name in required
        ),
        *(
            Expectation(
                "expect_column_values_to_match_regex",
                {"column": name, "regex": r"\S"},
                f"A blank {name} names nothing.",
            )
            for name in ("execution_id", "site_id", "hostname", "runbook_id")
        ),
        Expectation(
            "expect_column_values_to_be_in_set",
            {"column": "resolution_level", "value_set": ["L1", "L2", "L3"]},
            "A row of no level enters neither a rule's counters nor a pattern's.",
        ),
        Expectation(
            "expect_column_values_to_be_between",
            {"column": "event_at", "min_value": as_of - OLDEST, "max_value": as_of + CLOCK_TOLERANCE},
            "A row without a credible event time is left out of every figure.",
        ),
        Expectation(
            "expect_column_pair_values_a_to_be_greater_than_b",
            {
                "column_A": "completed_at",
                "column_B": "started_at",
                "or_equal": True,
                "ignore_row_if": "either_value_is_missing",
            },
            "It ends before it begins.",
        ),
        Expectation(
            "expect_column_values_to_be_between",
            {"column": "duration_seconds", "min_value": 0},
            "A negative duration spoils every mean.",
        ),
        Expectation(
            "expect_column_values_to_be_between",
            {"column": "confidence", "min_value": 0, "max_value": 1},
            "Confidence is a fraction; percent was sent.",
        ),
        Expectation(
            "expect_column_values_to_not_be_null",
            {"column": "incident_type", "mostly": 0.99},
            "L2 rows without an incident type become patterns of the type unknown.",
            "warning",
        ),
        Expectation(
            "expect_column_values_to_not_be_null",
            {"column": "platform", "mostly": 0.95},
            "A pattern of unknown platform has no runbook in the catalogue.",
            "warning",
        ),
        Expectation(
            "expect_column_values_to_be_in_set",
            {"column": "status", "value_set": ["success", "failure", "partial"], "mostly": 0.95},
            "A status that nobody knows classifies nothing.",
            "warning",
        ),
        Expectation(
            "expect_column_values_to_not_be_null",
            {"column": "agent_version", "mostly": 0.5},
            "Failures of one agent release cannot be told from those of the runbook.",
            "info",
        ),
    )


TELEMETRY: Final = Contract(
    asset="execution_telemetry",
    title="Execution telemetry",
    scope=f"the latest {LATEST_ROWS:,} rows of the log",
    query=f"SELECT {_COLUMNS} FROM execution_telemetry ORDER BY id DESC LIMIT :rows",  # noqa: S608 (declared columns)
    parameters={"rows": LATEST_ROWS},
    key=("execution_id",),
    expectations=telemetry_expectations,
)


def catalogue_expectations(_as_of: datetime) -> tuple[Expectation, ...]:
    """What a runbook needs before a rule may name it."""
    return (
        Expectation("expect_table_row_count_to_be_between", {"min_value": 1}, "Without a catalogue no rule can run."),
        Expectation("expect_column_values_to_be_unique", {"column": "runbook_id"}, "Two scripts under one id."),
        Expectation("expect_column_values_to_not_be_null", {"column": "runbook_id"}, "No rule can name it."),
        Expectation(
            "expect_column_values_to_be_null",
            {"column": "placeholder"},
            "A placeholder in the catalogue would be served as if a script stood behind it.",
        ),
        Expectation(
            "expect_column_values_to_not_be_null",
            {"column": "platform"},
            "A runbook without a platform can be served to none.",
        ),
        Expectation(
            "expect_column_values_to_be_in_set",
            {"column": "platform", "value_set": ["windows", "linux", "macos"]},
            "No host reports that platform, so the runbook matches none.",
        ),
        Expectation(
            "expect_column_values_to_match_regex", {"column": "name", "regex": r"\S"}, "Nobody can tell what it does."
        ),
        Expectation(
            "expect_column_values_to_not_be_null", {"column": "is_disruptive"}, "Policy asks whether it disrupts."
        ),
        Expectation(
            "expect_column_values_to_be_between",
            {"column": "steps_in_service", "min_value": 1},
            "An enabled runbook without steps does nothing and reports success.",
        ),
        Expectation(
            "expect_column_values_to_not_be_null",
            {"column": "category", "mostly": 0.95},
            "High-risk classes are told by category.",
            "warning",
        ),
        Expectation(
            "expect_column_values_to_not_be_null",
            {"column": "check_type", "mostly": 0.95},
            "Nobody can see which drift it heals.",
            "warning",
        ),
        Expectation(
            "expect_column_values_to_be_in_set",
            {"column": "severity", "value_set": ["critical", "high", "medium", "low", "info"]},
            "Agents order rules by a severity they do not know.",
            "warning",
        ),
        Expectation(
            "expect_column_values_to_not_be_null",
            {"column": "version"},
            "A changed script cannot be told from the old one.",
            "info",
        ),
    )


CATALOGUE: Final = Contract(
    asset="runbooks",
    title="Runbook catalogue",
    scope="the whole catalogue",
    query="""
        SELECT runbook_id, name, category, check_type, platform, severity, is_disruptive, version,
          CASE WHEN flywheel_is_placeholder(runbook_id) THEN runbook_id END AS placeholder,
          CASE WHEN enabled THEN
            CASE jsonb_typeof(steps) WHEN 'array' THEN jsonb_array_length(steps) ELSE 0 END
          END AS steps_in_service
        FROM runbooks ORDER BY runbook_id
    """,
    key=("runbook_id",),
    expectations=catalogue_expectations,
)
