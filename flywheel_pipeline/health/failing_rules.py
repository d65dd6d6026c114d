"""Rules in service that fail: how many, at which rate, with which errors, and what to do.

Belongs here: the query and the sentence of the failing-rules check. Does not belong here: templates and
waterfall (`attribution`), nor taking a rule out of service (`promotion`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from flywheel_pipeline.health.attribution import (
    ADVICE,
    ErrorTemplate,
    WaterfallStep,
    error_templates,
    percent,
    waterfall,
)
from flywheel_pipeline.health.templates import merge

BELOW = 0.5  # fraction: a rule that heals fewer than half of what it matches does more harm than an escalation
AT_LEAST = 20  # executions: below that a rate says little (20 of 20 has a 95 % lower bound of 83 %)
TOP_ERRORS = 5


@dataclass(frozen=True)
class FailingRule:
    """A rule in service whose raw success rate is below the floor.

    Attributes:
        matches: executions that are not synthetic; successes, failures: as reported; rate: successes /
            matches.
        rated_rate: fraction of verified successes among the executions it could have fixed; None over
            nothing.
        top_errors: (template, executions) of its failures, most first; at most five.
        errors: the same with class, hosts and share, all of them.
        steps: the waterfall from raw to adjusted rate.
        sentence: what fails, where most of it comes from, and what to do.
    """

    rule_id: str
    source: str | None
    runbook_id: str | None
    matches: int
    successes: int
    failures: int
    rate: float
    rated_rate: float | None
    top_errors: tuple[tuple[str, int], ...]
    errors: tuple[ErrorTemplate, ...]
    steps: tuple[WaterfallStep, ...]
    sentence: str


def failing_rules(conn: sa.Connection, *, below: float = BELOW, at_least: int = AT_LEAST) -> list[FailingRule]:
    """The enabled rules, promoted and built-in, that succeed too seldom.

    Args:
        conn: any connection; nothing is written.
        below: floor of the raw success rate, a fraction; a rule exactly on it is not failing.
        at_least: executions that a rule needs before it is judged, at least 1.

    Returns:
        Most failures first; ties by rule id.

    Raises:
        ValueError: a floor outside [0, 1], or `at_least` below 1.
    """
    if not 0.0 <= below <= 1.0:
        raise ValueError(f"the floor is a fraction in [0, 1], not {below}")
    if at_least < 1:
        raise ValueError("a rate needs at least one execution")
    rows = conn.execute(
        sa.text(
            """
            SELECT rule_id, source, runbook_id, matches, raw_successes, raw_failures, success_rate, rated_rate
            FROM rule_scorecard
            WHERE enabled AND matches >= :at_least AND success_rate < :below
            ORDER BY raw_failures DESC, rule_id
            """
        ),
        {"at_least": at_least, "below": below},
    ).all()
    if not rows:
        return []
    ids = [row.rule_id for row in rows]
    causes, classes = failures_of(conn, ids), outcome_counts(conn, ids)
    found = []
    for row in rows:
        errors = causes.get(row.rule_id, [])
        steps = waterfall(classes.get(row.rule_id, {}))
        found.append(
            FailingRule(
                rule_id=row.rule_id,
                source=row.source,
                runbook_id=row.runbook_id,
                matches=row.matches,
                successes=row.raw_successes,
                failures=row.raw_failures,
                rate=row.success_rate,
                rated_rate=row.rated_rate,
                top_errors=tuple((e.template, e.count) for e in errors[:TOP_ERRORS]),
                errors=tuple(errors),
                steps=tuple(steps),
                sentence=describe(row.rule_id, row.raw_successes, row.matches, row.rated_rate, errors),
            )
        )
    return found


def failures_of(conn: sa.Connection, rule_ids: Iterable[str]) -> dict[str, list[ErrorTemplate]]:
    """The failures of each rule by template, most first; rules without failures are missing.

    A failure is what was not reported as a success; synthetic rows are left out.
    """
    rows = conn.execute(
        sa.text(
            """
            SELECT rule_id, outcome_class, error_message, hostname, count(*) AS executions
            FROM executions
            WHERE level = 'L1' AND rule_id = ANY(:ids) AND NOT success AND outcome_class <> 'synthetic'
            GROUP BY rule_id, outcome_class, error_message, hostname
            """
        ),
        {"ids": list(rule_ids)},
    ).all()
    by_rule: dict[str, list[tuple[str, str | None, str, int]]] = defaultdict(list)
    for rule_id, *failure in rows:
        by_rule[rule_id].append((failure[0], failure[1], failure[2], failure[3]))
    return {rule_id: error_templates(failures, merge=merge) for rule_id, failures in by_rule.items()}


def outcome_counts(conn: sa.Connection, rule_ids: Iterable[str]) -> dict[str, dict[str, tuple[int, int]]]:
    """By rule and outcome class: (executions, those reported as success), without synthetic rows."""
    rows = conn.execute(
        sa.text(
            """
            SELECT rule_id, outcome_class, count(*), count(*) FILTER (WHERE success)
            FROM executions
            WHERE level = 'L1' AND rule_id = ANY(:ids) AND outcome_class <> 'synthetic'
            GROUP BY rule_id, outcome_class
            """
        ),
        {"ids": list(rule_ids)},
    ).all()
    counts: dict[str, dict[str, tuple[int, int]]] = defaultdict(dict)
    for rule_id, outcome_class, executions, successes in rows:
        counts[rule_id][outcome_class] = (executions, successes)
    return dict(counts)


def describe(
    rule_id: str, successes: int, matches: int, rated_rate: float | None, errors: Sequence[ErrorTemplate]
) -> str:
    """The sentence of an alert: the rates, the class of most failures with its top error, the advice."""
    text = f"{rule_id} succeeded in {successes:,} of {matches:,} executions ({percent(successes / matches)})"
    text += f"; where it could, {percent(rated_rate)}." if rated_rate is not None else "; none of them could be rated."
    if not errors:
        return text
    by_class: dict[str, int] = defaultdict(int)
    for error in errors:
        by_class[error.outcome_class] += error.count
    failures = sum(by_class.values())
    worst = min(by_class, key=lambda c: (-by_class[c], c))
    top = next(e for e in errors if e.outcome_class == worst)
    return (
        f"{text} Of {failures:,} failures {by_class[worst]:,} ({percent(by_class[worst] / failures)}) are "
        f"{worst.replace('_', ' ')}, most often “{top.template}” ({top.count:,} on {top.hosts} host"
        f"{'' if top.hosts == 1 else 's'}): {ADVICE[worst]}."
    )
