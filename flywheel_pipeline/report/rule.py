"""The report on one rule: what it did, on what evidence it stands, where it runs, and why it fails.

Belongs here: the sections of that page and their queries. Does not belong here: how they look (`page`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from flywheel_pipeline.errors import FlywheelError
from flywheel_pipeline.health.attribution import waterfall
from flywheel_pipeline.health.failing_rules import describe, failures_of, outcome_counts
from flywheel_pipeline.health.trend import alarm_state, cusum_by_day, rate_by_day, so_far
from flywheel_pipeline.promotion import certificate
from flywheel_pipeline.promotion.bound import band
from flywheel_pipeline.promotion.explain import explain_in
from flywheel_pipeline.promotion.policy import load_policy
from flywheel_pipeline.report import charts
from flywheel_pipeline.report.causes import attribution_blocks, cause_blocks
from flywheel_pipeline.report.overview import DECISION_COLUMNS, EVENT_COLUMNS, LISTED, RULES_SHOWN, rows_of
from flywheel_pipeline.report.page import Block, Column, Page, Prose, Section, Table, Tile, percent
from flywheel_pipeline.report.snapshot import Period, within_time


def rule_page(connection: sa.Connection, rule_id: str, period: Period, facts: Mapping[str, str]) -> Page:
    """Return the page on one rule, in the caller's snapshot.

    Raises:
        FlywheelError: there is no such rule.
    """
    found = explain_in(connection, rule_id)
    if found["subject_kind"] != "rule":
        raise FlywheelError(
            f"{rule_id} is a pattern, not a rule.", hint="`flywheel explain` shows a pattern; a report is on its rule."
        )
    rule = rows_of(connection, "SELECT * FROM rule_scorecard WHERE rule_id = :id", id=rule_id)[0]
    n, s = int(rule["rated_episodes"] or 0), int(rule["successful_episodes"] or 0)
    lower = band(s, n - s)[0] if n else None
    return Page(
        rule_id,
        found["summary"],
        {
            **facts,
            "Period": str(period),
            "Policy": found["policy"],
            "Runs": rule["runbook_id"] or "no runbook",
            "Platform": rule["platform"] or "any",
            "Version": str(rule["rule_version"]),
        },
        (
            Tile(
                "state",
                rule["state"],
                "in service" if rule["enabled"] else "not in service",
                "good" if rule["enabled"] else "bad",
            ),
            Tile("matches", rule["matches"], f"{rule['sites'] or 0:,} sites, all time"),
            Tile("successes", rule["raw_successes"], f"{rule['raw_failures'] or 0:,} failures, as reported"),
            Tile("success rate", percent(rule["success_rate"]), "as reported"),
            Tile("where it could", percent(rule["rated_rate"]), f"{rule['excluded'] or 0:,} executions not rated"),
            Tile("of episodes", percent(rule["episode_rate"]), f"{s:,} of {n:,} host-days"),
            Tile("at least", percent(lower), "of episodes, 95 %, at every look"),
        ),
        (
            _over_time(connection, rule_id, period),
            _cusum(connection, rule_id, rule, found["policy"]),
            _why(connection, rule_id, rule, found.get("why")),
            _evidence(found),
            _where(connection, rule_id),
            _history(
                connection,
                rule_id,
                rows_of(connection, "SELECT pattern_key FROM l1_rules WHERE rule_id = :id", id=rule_id)[0][
                    "pattern_key"
                ],
                period,
            ),
            _certificate(connection, rule_id),
        ),
    )


def _over_time(connection: sa.Connection, rule_id: str, period: Period) -> Section:
    days = rate_by_day(connection, rule_id, since=period.since, until=period.until)
    blocks: list[Block] = (
        [charts.rate_over_time(so_far(days))] if days else [Prose("It matched nothing in this period.")]
    )
    return Section("rate", "Success rate over time", "All versions of the rule, over the days of the period.", blocks)


def _cusum(connection: sa.Connection, rule_id: str, rule: Mapping[str, Any], policy_name: str) -> Section:
    policy = load_policy(policy_name)
    c = policy.demotion.cusum
    points = cusum_by_day(connection, rule_id, c)
    scopes = rows_of(
        connection,
        "SELECT scope_kind, scope_value, episodes, failures, w, w_peak, warned_at, alarmed_at, count(*) OVER () AS of "
        "FROM rule_cusum WHERE rule_id = :id AND policy_hash = :policy "
        "ORDER BY scope_kind = 'fleet' DESC, w DESC, scope_kind, scope_value LIMIT :shown",
        id=rule_id,
        policy=policy.policy_hash,
        shown=RULES_SHOWN,
    )
    blocks: list[Block] = []
    if points:
        state = alarm_state(max(p.w_peak for p in points), c)
        words = {"calm": "it never reached a limit", "warned": "it warned", "alarmed": "it alarmed"}[state]
        demotes = (
            "The policy spares built-in rules: nothing comes of it."
            if rule["source"] == "builtin" and policy.demotion.spare_builtin
            else "Under this policy a failing rule only warns."
            if policy.demotion.failing_rule == "warn"
            else "What alarms leaves service: the site, the agent release, or the rule."
        )
        blocks.append(
            Prose(
                f"W over the fleet stands at {points[-1].w:.2f} after {sum(p.episodes for p in points):,} rated episodes of "
                f"version {rule['rule_version']}; {words}. {demotes}",
                "good" if state == "calm" else "bad",
            )
        )
        blocks.append(charts.cusum(points, c, rule_id))
    else:
        blocks.append(Prose("No rated episode of this version yet: there is nothing to add up."))
    if scopes:
        blocks.append(
            Table(
                (
                    Column("scope_kind", "scope"),
                    Column("scope_value", "which", "code"),
                    Column("episodes", "episodes", "number"),
                    Column("failures", "failures", "number"),
                    Column("w", "W now", "number"),
                    Column("w_peak", "W at its highest", "number"),
                    Column("warned_at", "warned", "time"),
                    Column("alarmed_at", "alarmed", "time"),
                ),
                [{**row, "w": round(row["w"], 2), "w_peak": round(row["w_peak"], 2)} for row in scopes],
                caption="By scope",
                of=scopes[0]["of"],
            )
        )
    return Section(
        "cusum",
        "Did it get worse?",
        "The CUSUM of the version in service, all its days: evidence that its rate fell, episode by episode. "
        "Of a rule out of service: since that version entered it.",
        blocks,
    )


def _why(
    connection: sa.Connection, rule_id: str, rule: Mapping[str, Any], attribution: Mapping[str, Any] | None
) -> Section:
    classes = outcome_counts(connection, [rule_id]).get(rule_id, {})
    errors = failures_of(connection, [rule_id]).get(rule_id, [])
    blocks: list[Block] = []
    if classes:
        failing = not rule["success_rate"] or rule["success_rate"] < 0.9
        blocks.append(
            Prose(
                describe(rule_id, rule["raw_successes"], rule["matches"], rule["rated_rate"], errors),
                "bad" if failing else "good",
            )
        )
        blocks += cause_blocks(rule_id, waterfall(classes), errors)
        blocks += attribution_blocks(attribution)
    else:
        blocks.append(Prose("It has not matched yet."))
    return Section("why", "Why it fails", "All time. Error templates hold no host, account or address.", blocks)


def _evidence(found: Mapping[str, Any]) -> Section:
    decision = found["decision"]
    blocks: list[Block] = []
    if decision:
        blocks.append(Prose(f"{decision['verdict'].capitalize()}: {decision['reason']}"))
    blocks.append(
        Table(
            (
                Column("gate", "gate", "code"),
                Column("verdict", "verdict", "state"),
                Column("observed", "observed"),
                Column("required", "required"),
                Column("sentence", "in words"),
            ),
            found["gates"],
            caption="Gates, in order",
        )
    )
    if found["ladder"]:
        blocks.append(
            Table(
                (
                    Column("stage", "stage"),
                    Column("floor", "floor", "rate"),
                    Column("alpha", "alpha", "number"),
                    Column("log_e", "log E", "number"),
                    Column("verdict", "verdict", "state"),
                    Column("more_clean", "clean episodes still needed", "number"),
                ),
                found["ladder"],
                caption="The sequential test at each stage",
            )
        )
    blocks.append(
        Table(
            (Column("name", "figure"), Column("value", "value")),
            [
                {
                    "name": name.replace("_", " "),
                    "value": value
                    if isinstance(value, (int, float, str))
                    else json.dumps(value, ensure_ascii=False)[:400],
                }
                for name, value in (found["evidence"] or {}).items()
                if value is not None
            ],
            caption="What the gates were given",
        )
    )
    return Section(
        "evidence", "Evidence", f"The gates on the evidence of now, under the policy {found['policy']}.", blocks
    )


def _where(connection: sa.Connection, rule_id: str) -> Section:
    sites = rows_of(
        connection,
        """
        WITH placed AS (
          SELECT coalesce(site_id, '(gone)') AS site_id, count(*) AS appliances,
                 count(*) FILTER (WHERE state = 'withheld') AS withheld,
                 count(*) FILTER (WHERE state IN ('promoted', 'queued')) AS under_way,
                 count(*) FILTER (WHERE state = 'delivered') AS delivered,
                 count(*) FILTER (WHERE state = 'acknowledged') AS acknowledged,
                 count(*) FILTER (WHERE state = 'executed') AS executed
          FROM deployments WHERE rule_id = :id AND (wanted OR state = 'withheld') GROUP BY 1
        ), did AS (
          SELECT site_id, executions, raw_successes, last_at FROM rule_site_stats WHERE rule_id = :id AND executions > 0
        )
        SELECT coalesce(p.site_id, d.site_id) AS site_id, p.appliances, p.withheld, p.under_way, p.delivered, p.acknowledged,
               p.executed, d.executions AS matches, d.raw_successes::double precision / nullif(d.executions, 0) AS rate, d.last_at,
               count(*) OVER () AS of
        FROM placed AS p FULL JOIN did AS d ON d.site_id = p.site_id
        ORDER BY d.executions DESC NULLS LAST, 1 LIMIT :shown
        """,
        id=rule_id,
        shown=2 * LISTED,
    )
    withheld = rows_of(
        connection,
        "SELECT withheld_reason, count(*) AS appliances FROM deployments WHERE rule_id = :id AND state = 'withheld' "
        "GROUP BY withheld_reason ORDER BY appliances DESC, withheld_reason LIMIT :shown",
        id=rule_id,
        shown=LISTED,
    )
    return Section(
        "where",
        "Where it runs",
        "Appliances whose manifest holds it or that it is withheld from, by site, and what it did there. Built-in rules ship "
        "with the agent, so no appliance is counted for them.",
        (
            Table(
                (
                    Column("site_id", "site", "code"),
                    Column("appliances", "appliances", "number"),
                    Column("withheld", "withheld", "number"),
                    Column("under_way", "under way", "number"),
                    Column("delivered", "delivered", "number"),
                    Column("acknowledged", "acknowledged", "number"),
                    Column("executed", "executed", "number"),
                    Column("matches", "matches", "number"),
                    Column("rate", "success rate", "rate"),
                    Column("last_at", "last match", "time"),
                ),
                sites,
                empty="Nowhere: it is in no manifest and never matched.",
                of=sites[0]["of"] if sites else 0,
            ),
            Table(
                (Column("withheld_reason", "why it cannot run there"), Column("appliances", "appliances", "number")),
                withheld,
                caption="Withheld",
            ),
        ),
    )


def _history(connection: sa.Connection, rule_id: str, pattern_key: str | None, period: Period) -> Section:
    events = rows_of(
        connection,
        "SELECT event_id, occurred_at, rule_id, rule_version, kind, from_state, to_state, actor, reason, "  # noqa: S608
        "count(*) OVER () AS of FROM rule_events "
        f"WHERE rule_id = :id AND {within_time('occurred_at')} ORDER BY event_id DESC LIMIT :shown",
        id=rule_id,
        **period.bounds,
        shown=LISTED,
    )
    decisions = rows_of(
        connection,
        "SELECT decision_id, decided_at, verdict, subject_id, reason, policy_name, count(*) OVER () AS of "  # noqa: S608
        "FROM promotion_decisions WHERE ((subject_kind = 'rule' AND subject_id = :id) OR (subject_kind = 'pattern' AND "
        f"subject_id = :pattern)) AND {within_time('decided_at')} ORDER BY decision_id DESC LIMIT :shown",
        id=rule_id,
        pattern=pattern_key,
        **period.bounds,
        shown=LISTED,
    )
    acts = rows_of(
        connection,
        "SELECT acted_at, act, subject_id, actor, reason, count(*) OVER () AS of FROM human_acts "  # noqa: S608
        f"WHERE subject_id IN (:id, :pattern) AND {within_time('acted_at')} ORDER BY act_id DESC LIMIT :shown",
        id=rule_id,
        pattern=pattern_key,
        **period.bounds,
        shown=LISTED,
    )
    return Section(
        "history",
        "History",
        "What changed its state, what was decided about it and its pattern, and what people did. Newest first.",
        (
            Table(EVENT_COLUMNS, events, caption="Ledger", of=events[0]["of"] if events else 0),
            Table(DECISION_COLUMNS, decisions, caption="Decisions", of=decisions[0]["of"] if decisions else 0),
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
        ),
    )


def _certificate(connection: sa.Connection, rule_id: str) -> Section:
    lead = "What its last promotion rests on; recomputed while this page was written."
    rows = rows_of(
        connection,
        "SELECT event_id, occurred_at, certificate FROM rule_events WHERE rule_id = :id AND certificate IS NOT NULL "
        "AND jsonb_typeof(certificate) = 'object' ORDER BY event_id DESC LIMIT 1",
        id=rule_id,
    )
    if not rows:
        return Section(
            "certificate",
            "Certificate",
            lead,
            (Prose("There is none: it was not promoted by Flywheel (built-in, or imported from the system before)."),),
        )
    document = rows[0]["certificate"]
    problems = certificate.verify(document)
    verdict = (
        Prose(f"It does not hold: {'; '.join(problems)}.", "bad")
        if problems
        else Prose("It holds: its hashes fit, and its evidence under its policy recomputes to its verdict.", "good")
    )
    evidence = document.get("evidence") or {}
    facts = {
        "event": rows[0]["event_id"],
        "verdict": f"{document.get('verdict')} to {document.get('target_state')}",
        "because": document.get("reason"),
        "policy hash": document.get("policy_hash"),
        "content hash": document.get("content_hash"),
        "certificate hash": document.get("certificate_hash"),
        **{f"figure {name}": value for name, value in (document.get("figures") or {}).items()},
    }
    return Section(
        "certificate",
        "Certificate",
        lead,
        (
            verdict,
            Table(
                (Column("name", "what"), Column("value", "value", "code")),
                [{"name": name, "value": value} for name, value in facts.items() if value is not None],
            ),
            Table(
                (
                    Column("site_id", "site", "code"),
                    Column("successes", "successes", "number"),
                    Column("failures", "failures", "number"),
                    Column("hosts", "hosts", "number"),
                ),
                [
                    {key: site.get(key) for key in ("site_id", "successes", "failures", "hosts")}
                    for site in evidence.get("sites", [])[:LISTED]
                ],
                caption="Its evidence by site, capped",
                empty="It names no site.",
                of=len(evidence.get("sites", [])),
            ),
        ),
    )
