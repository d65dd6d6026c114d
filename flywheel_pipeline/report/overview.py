"""The report on the whole: the state of the flywheel and what was decided and delivered in a period.

Belongs here: the sections of that page and their queries. Does not belong here: how they look (`page`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from flywheel_pipeline.health.failing_rules import AT_LEAST, BELOW, FailingRule, failing_rules
from flywheel_pipeline.health.stored import Kept, kept_attributions
from flywheel_pipeline.promotion.bound import band
from flywheel_pipeline.promotion.funnel import read_funnel
from flywheel_pipeline.report import charts
from flywheel_pipeline.report.causes import attribution_blocks, cause_blocks
from flywheel_pipeline.report.page import Block, Column, Heading, Page, Prose, Section, Table, Tile, percent
from flywheel_pipeline.report.snapshot import Period, within_day, within_time
from flywheel_pipeline.status import read_status

RULES_SHOWN = 15
CAUSES_SHOWN = 6
DECISIONS_SHOWN = 150
LISTED = 50

DECISION_COLUMNS = (
    Column("decision_id", "no.", "number"),
    Column("decided_at", "decided", "time"),
    Column("verdict", "verdict", "state"),
    Column("subject_id", "subject", "code"),
    Column("reason", "because"),
    Column("policy_name", "policy"),
)
EVENT_COLUMNS = (
    Column("occurred_at", "entered", "time"),
    Column("rule_id", "rule", "code"),
    Column("rule_version", "version", "number"),
    Column("kind", "event"),
    Column("from_state", "from", "state"),
    Column("to_state", "to", "state"),
    Column("actor", "by"),
    Column("reason", "because"),
)


def rows_of(connection: sa.Connection, query: str, **values: Any) -> list[dict[str, Any]]:
    """Return the rows of a query."""
    return [dict(row) for row in connection.execute(sa.text(query), values).mappings()]


def plural(count: int, one: str, many: str = "") -> str:
    """Return a count with its word: `1 rule`, `2,140 rules`."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def overview(connection: sa.Connection, period: Period, facts: Mapping[str, str]) -> Page:
    """Return the page on the whole, in the caller's snapshot."""
    status = read_status(connection, top=RULES_SHOWN)
    telemetry, patterns, rules = status["telemetry"], status["patterns"], status["rules"]
    failing = failing_rules(connection)
    stale = telemetry["waiting_cells"]
    subtitle = (
        f"{plural(rules['enabled'], 'promoted rule')} in service, {rules['quarantined']:,} quarantined; "
        + (
            f"{plural(len(failing), 'rule')} in service fail{'s' if len(failing) == 1 else ''}. "
            if failing
            else "no rule in service fails. "
        )
        + (f"{plural(stale, 'site-day')} wait to be counted." if stale else "Everything reported is counted.")
    )
    return Page(
        "State of the flywheel",
        subtitle,
        {**facts, "Period": str(period), "Policy": status["policy"]["name"], **_batch(status)},
        (
            Tile("telemetry rows", telemetry["rows"], f"{telemetry['l1']:,} L1, {telemetry['not_l1']:,} other"),
            Tile(
                "reported successful",
                telemetry["successful"],
                percent(telemetry["successful"] / telemetry["rows"]) if telemetry["rows"] else "",
            ),
            Tile("patterns", patterns["total"], f"{patterns['promoted']:,} promoted, {patterns['pending']:,} pending"),
            Tile(
                "promoted rules",
                rules["promoted"],
                f"{rules['enabled']:,} enabled, {rules['quarantined']:,} quarantined",
            ),
            Tile("built-in rules", rules["builtin"], f"{rules['builtin_enabled']:,} enabled"),
            Tile("failing rules", len(failing), f"in service, below {BELOW:.0%}", "bad" if failing else "good"),
            Tile(
                "unresolved",
                telemetry["unresolved"],
                "executions of unknown rules",
                "bad" if telemetry["unresolved"] else "good",
            ),
            Tile(
                "open rejects",
                telemetry["open_rejects"],
                "posts refused, undecided",
                "bad" if telemetry["open_rejects"] else "good",
            ),
        ),
        (
            _volume(connection, period),
            _funnel(connection, status),
            _top(connection),
            _failing(failing, kept_attributions(connection, [r.rule_id for r in failing])),
            _decisions(connection, period),
            _deliveries(connection),
            _unresolved(connection),
            _gates(connection, status),
        ),
    )


def _batch(status: Mapping[str, Any]) -> dict[str, str]:
    batch = status["batch"]
    if batch is None:
        return {"Refreshed": "never"}
    return {"Refreshed": f"{batch['refreshed_at'][:16].replace('T', ' ')}, batch {batch['batch_id']}"}


def _volume(connection: sa.Connection, period: Period) -> Section:
    days = rows_of(
        connection,
        "SELECT day, sum(executions - synthetic)::bigint AS executions, sum(raw_successes)::bigint AS successes "  # noqa: S608
        f"FROM telemetry_daily_volume WHERE {within_day('day')} GROUP BY day ORDER BY day",
        **period.bounds,
    )
    blocks: list[Block] = [charts.volume(days)] if days else [Prose("No telemetry in this period.")]
    return Section("telemetry", "Telemetry", "What the agents reported in the period, by day.", blocks)


def _funnel(connection: sa.Connection, status: Mapping[str, Any]) -> Section:
    reached = rows_of(
        connection,
        """
        SELECT count(DISTINCT rule_id) FILTER (WHERE wanted) AS served,
               count(DISTINCT rule_id) FILTER (WHERE wanted AND state IN ('delivered', 'acknowledged', 'executed')) AS delivered,
               count(DISTINCT rule_id) FILTER (WHERE wanted AND state = 'executed') AS executed
        FROM deployments
        """,
    )[0]
    steps = [
        *(
            (label, count, charts.BLUE if label.startswith("patterns") else charts.GOOD)
            for label, count in read_funnel(connection).steps
        ),
        ("in the manifest of an appliance", reached["served"], charts.GOOD),
        ("delivered to an appliance", reached["delivered"], charts.GOOD),
        ("executed there since", reached["executed"], charts.GOOD),
    ]
    states = rows_of(
        connection,
        "SELECT source, state, count(*) AS rules, count(*) FILTER (WHERE enabled) AS enabled, "
        "coalesce(sum(match_count), 0)::bigint AS matches FROM l1_rules GROUP BY source, state ORDER BY source DESC, state",
    )
    return Section(
        "funnel",
        "Promotion funnel",
        "From a pattern of L2 to a rule that runs; as it stands now. One rule may stand for several patterns.",
        (
            charts.bars(
                steps,
                "Promotion funnel: " + ", ".join(f"{label} {n:,}" for label, n, _ in steps),
                "Blue: patterns. Green: promoted rules. What lies between two bars was not promoted, is out of service, or is under way.",
            ),
            Table(
                (
                    Column("source", "source"),
                    Column("state", "state", "state"),
                    Column("rules", "rules", "number"),
                    Column("enabled", "enabled", "number"),
                    Column("matches", "matches", "number"),
                ),
                states,
                caption="Rules by state",
            ),
            Table(
                (
                    Column("pattern", "pattern", "code"),
                    Column("verdict", "verdict", "state"),
                    Column("reason", "because"),
                ),
                status["held"][:LISTED],
                caption="Patterns that wait",
                of=len(status["held"]),
            ),
            Table(
                (
                    Column("rule_id", "rule", "code"),
                    Column("at", "since (UTC)"),
                    Column("actor", "by"),
                    Column("reason", "because"),
                ),
                [{**row, "at": (row["at"] or "")[:16]} for row in status["quarantined"][:LISTED]],
                caption="Quarantined rules",
                of=len(status["quarantined"]),
            ),
        ),
    )


_RULE_COLUMNS = (
    Column("rule_id", "rule", "code"),
    Column("state", "state", "state"),
    Column("runbook_id", "runbook", "code"),
    Column("matches", "matches", "number"),
    Column("raw_successes", "successes", "number"),
    Column("raw_failures", "failures", "number"),
    Column("success_rate", "success rate", "rate"),
    Column("rated_rate", "where it could", "rate"),
    Column("episode_rate", "of episodes", "rate"),
    Column("lower", "at least", "rate"),
    Column("sites", "sites", "number"),
)


def _top(connection: sa.Connection) -> Section:
    blocks: list[Block] = []
    for source, caption in (("promoted", "Promoted rules"), ("builtin", "Built-in rules")):
        found = rows_of(
            connection,
            "SELECT rule_id, state, runbook_id, matches, raw_successes, raw_failures, success_rate, rated_rate, "
            "rated_episodes, successful_episodes, episode_rate, sites, count(*) OVER () AS of FROM rule_scorecard "
            "WHERE source = :source AND matches > 0 ORDER BY matches DESC, rule_id LIMIT :top",
            source=source,
            top=RULES_SHOWN,
        )
        for row in found:
            n, s = int(row["rated_episodes"] or 0), int(row["successful_episodes"] or 0)
            row["lower"] = band(s, n - s)[0] if n else None
        blocks.append(
            Table(
                _RULE_COLUMNS, found, caption=caption, empty="None has matched yet.", of=found[0]["of"] if found else 0
            )
        )
    return Section(
        "rules",
        "Top rules",
        "By matches, all time. Success rate: as reported. Where it could: verified successes among the executions it could "
        "have fixed. Of episodes: host-days healed for good; at least: the lower end of that rate at every look together "
        "(95 %), by the e-value that promotes.",
        blocks,
    )


def _failing(failing: Sequence[FailingRule], kept: Mapping[str, Kept]) -> Section:
    blocks: list[Block] = []
    if not failing:
        blocks.append(Prose("No rule in service fails.", "good"))
    for rule in failing[:CAUSES_SHOWN]:
        blocks.append(
            Heading(
                rule.rule_id,
                f"{percent(rule.rate)} of {rule.matches:,} matches, runs {rule.runbook_id or 'no runbook'}",
            )
        )
        blocks.append(Prose(rule.sentence, "bad"))
        blocks += cause_blocks(rule.rule_id, rule.steps, rule.errors)
        answer = kept.get(rule.rule_id)
        blocks += attribution_blocks({"sentence": answer.sentence, **answer.result} if answer else None)
    if len(failing) > CAUSES_SHOWN:
        blocks.append(
            Table(
                (
                    Column("rule_id", "rule", "code"),
                    Column("matches", "matches", "number"),
                    Column("rate", "success rate", "rate"),
                    Column("sentence", "why"),
                ),
                [
                    {"rule_id": r.rule_id, "matches": r.matches, "rate": r.rate, "sentence": r.sentence}
                    for r in failing[CAUSES_SHOWN : CAUSES_SHOWN + LISTED]
                ],
                caption="Further failing rules",
                of=len(failing) - CAUSES_SHOWN,
            )
        )
    return Section(
        "failing",
        "Failing rules",
        f"Rules in service that heal fewer than {BELOW:.0%} of at least {AT_LEAST} matches, most failures first, and why. "
        "Error templates hold no host, account or address.",
        blocks,
    )


def _decisions(connection: sa.Connection, period: Period) -> Section:
    verdicts = rows_of(
        connection,
        "SELECT verdict, count(*) AS decisions, count(DISTINCT subject_id) AS subjects, min(decided_at) AS first, "  # noqa: S608
        f"max(decided_at) AS last FROM promotion_decisions WHERE {within_time('decided_at')} GROUP BY verdict "
        "ORDER BY decisions DESC, verdict",
        **period.bounds,
    )
    decisions = rows_of(
        connection,
        "SELECT decision_id, decided_at, verdict, subject_id, reason, policy_name, count(*) OVER () AS of "  # noqa: S608
        f"FROM promotion_decisions WHERE {within_time('decided_at')} ORDER BY decision_id DESC LIMIT :shown",
        **period.bounds,
        shown=DECISIONS_SHOWN,
    )
    events = rows_of(
        connection,
        "SELECT event_id, occurred_at, rule_id, rule_version, kind, from_state, to_state, actor, reason, "  # noqa: S608
        f"count(*) OVER () AS of FROM rule_events WHERE {within_time('occurred_at')} ORDER BY event_id DESC LIMIT :shown",
        **period.bounds,
        shown=DECISIONS_SHOWN,
    )
    acts = rows_of(
        connection,
        "SELECT acted_at, act, subject_id, actor, reason, count(*) OVER () AS of FROM human_acts "  # noqa: S608
        f"WHERE {within_time('acted_at')} ORDER BY act_id DESC LIMIT :shown",
        **period.bounds,
        shown=LISTED,
    )
    return Section(
        "decisions",
        "Decisions of the period",
        "Each verdict with the gate that decided it; what changed a rule's state; what people did. Newest first. A decision "
        "is a new row only where it differs from the one before.",
        (
            Table(
                (
                    Column("verdict", "verdict", "state"),
                    Column("decisions", "decisions", "number"),
                    Column("subjects", "subjects", "number"),
                    Column("first", "first", "time"),
                    Column("last", "last", "time"),
                ),
                verdicts,
                caption="By verdict",
                empty="Nothing was decided in this period.",
            ),
            Table(
                (
                    Column("acted_at", "at", "time"),
                    Column("act", "act"),
                    Column("subject_id", "subject", "code"),
                    Column("actor", "by"),
                    Column("reason", "because"),
                ),
                acts,
                caption="What people did",
                of=acts[0]["of"] if acts else 0,
            ),
            Table(EVENT_COLUMNS, events, caption="Ledger", of=events[0]["of"] if events else 0),
            Table(DECISION_COLUMNS, decisions, caption="Decisions", of=decisions[0]["of"] if decisions else 0),
        ),
    )


def _deliveries(connection: sa.Connection) -> Section:
    deployed = rows_of(
        connection,
        """
        SELECT rule_id, rule_version, count(*) AS appliances,
               count(*) FILTER (WHERE state = 'withheld') AS withheld,
               count(*) FILTER (WHERE wanted AND state = 'promoted') AS promoted,
               count(*) FILTER (WHERE wanted AND state = 'queued') AS queued,
               count(*) FILTER (WHERE wanted AND state = 'delivered') AS delivered,
               count(*) FILTER (WHERE wanted AND state = 'acknowledged') AS acknowledged,
               count(*) FILTER (WHERE wanted AND state = 'executed') AS executed,
               count(*) OVER () AS of
        FROM deployments WHERE wanted OR state = 'withheld'
        GROUP BY rule_id, rule_version ORDER BY rule_id, rule_version LIMIT :shown
        """,
        shown=2 * LISTED,
    )
    withheld = rows_of(
        connection,
        "SELECT withheld_reason, count(DISTINCT rule_id) AS rules, count(DISTINCT appliance_id) AS appliances FROM deployments "
        "WHERE state = 'withheld' GROUP BY withheld_reason ORDER BY appliances DESC, withheld_reason LIMIT :shown",
        shown=LISTED,
    )
    commands = rows_of(
        connection,
        "SELECT command_type, status, count(*) AS commands, count(DISTINCT appliance_id) AS appliances, min(created_at) AS oldest, "
        "max(created_at) AS newest FROM appliance_commands GROUP BY command_type, status ORDER BY command_type, status",
    )
    manifests = rows_of(
        connection,
        "SELECT count(*) AS manifests, count(DISTINCT site_id) AS sites, count(DISTINCT manifest_hash) AS distinct_sets FROM rule_manifests",
    )[0]
    return Section(
        "deliveries",
        "Deliveries",
        f"{plural(manifests['manifests'], 'manifest')} at {plural(manifests['sites'], 'site')}, of "
        f"{plural(manifests['distinct_sets'], 'different rule set')}. How far each promoted rule in them got, by appliances: "
        "promoted, queued, delivered, acknowledged and executed are five different things, and withheld is a sixth.",
        (
            Table(
                (
                    Column("rule_id", "rule", "code"),
                    Column("rule_version", "version", "number"),
                    Column("appliances", "appliances", "number"),
                    Column("withheld", "withheld", "number"),
                    Column("promoted", "not queued", "number"),
                    Column("queued", "queued", "number"),
                    Column("delivered", "delivered", "number"),
                    Column("acknowledged", "acknowledged", "number"),
                    Column("executed", "executed", "number"),
                ),
                deployed,
                caption="Promoted rules on appliances",
                empty="No promoted rule is in a manifest.",
                of=deployed[0]["of"] if deployed else 0,
            ),
            Table(
                (
                    Column("withheld_reason", "why it cannot run there"),
                    Column("rules", "rules", "number"),
                    Column("appliances", "appliances", "number"),
                ),
                withheld,
                caption="Withheld",
            ),
            Table(
                (
                    Column("command_type", "command", "code"),
                    Column("status", "status", "state"),
                    Column("commands", "commands", "number"),
                    Column("appliances", "appliances", "number"),
                    Column("oldest", "oldest", "time"),
                    Column("newest", "newest", "time"),
                ),
                commands,
                caption="Commands",
            ),
        ),
    )


def _unresolved(connection: sa.Connection) -> Section:
    found = rows_of(
        connection,
        "SELECT rule_id, executions, raw_successes, sites, first_seen, last_seen, count(*) OVER () AS of "
        "FROM unresolved_rule_ids WHERE executions > 0 ORDER BY executions DESC, rule_id LIMIT :shown",
        shown=LISTED,
    )
    return Section(
        "unresolved",
        "Unresolved ids",
        "Rule ids that telemetry names and the registry does not know: counted and listed, never dropped. "
        "`flywheel aliases add-rule` resolves one that is another name of a known rule.",
        (
            Table(
                (
                    Column("rule_id", "id", "code"),
                    Column("executions", "executions", "number"),
                    Column("raw_successes", "successes", "number"),
                    Column("sites", "sites", "number"),
                    Column("first_seen", "first", "time"),
                    Column("last_seen", "last", "time"),
                ),
                found,
                empty="None: every execution is of a known rule.",
                of=found[0]["of"] if found else 0,
            ),
        ),
    )


def _gates(connection: sa.Connection, status: Mapping[str, Any]) -> Section:
    batch = status["batch"]
    found = rows_of(
        connection,
        "SELECT g.gate, coalesce(v.verdict, 'missing') AS verdict, coalesce(v.sentence, g.question) AS sentence, v.offenders "
        "FROM required_gates AS g LEFT JOIN gate_verdicts AS v ON v.gate = g.gate AND v.batch_id = :batch ORDER BY g.gate",
        batch=batch["batch_id"] if batch else 0,
    )
    return Section(
        "gates",
        "Required gates",
        f"Without a pass of each, nothing is promoted; as judged in batch {batch['batch_id']}."
        if batch
        else "No batch was refreshed yet.",
        (
            Table(
                (
                    Column("gate", "gate", "code"),
                    Column("verdict", "verdict", "state"),
                    Column("sentence", "what was found"),
                    Column("offenders", "offenders", "number"),
                ),
                found,
            ),
        ),
    )
