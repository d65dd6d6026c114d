"""The doctor: the twelve invariants of the house, examined from outside, read-only, on any database at this release.

Belongs here: one question per invariant, in plain SQL over the log, the ledger and what was delivered, sharing no text
with the models and no machinery with the refresh; and for each broken one the rows and the repair. Does not belong
here: repairing anything. The examination is one snapshot in one read-only transaction: it may run on production and on
a standby, beside writers and refreshes. What such a snapshot cannot show (that a replayed batch changes nothing, that a
killed process loses nothing) is proved by the fault suite; the doctor looks for what such a fault would leave behind.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from flywheel_pipeline.database import declared
from flywheel_pipeline.delivery.manifest import canonical_json, content_hash, manifest_hash
from flywheel_pipeline.promotion import certificate
from flywheel_pipeline.promotion.quality import registry_equals_ledger
from flywheel_pipeline.quality import Finding
from flywheel_pipeline.sql_models.loader import ModelGraph, load_models
from flywheel_pipeline.sql_models.relations import execute

SAMPLE = 20
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Diagnosis:
    """What was found about one invariant.

    Attributes:
        invariant: its number in the list of invariants, 1 to 12.
        statement: what must hold.
        finding: whether it does, and the rows that break it (at most 20 of them).
        repair: what to do about it; empty where it holds.
    """

    invariant: int
    statement: str
    finding: Finding
    repair: str


@dataclass(frozen=True)
class _Question:
    invariant: int
    statement: str
    ask: Callable[[sa.Connection], Iterator[dict[str, Any]]]
    repair: str


def examine(
    engine: sa.Engine,
    *,
    invariants: Sequence[int] = (),
    deep: bool = False,
    progress: Callable[[str], None] | None = None,
) -> list[Diagnosis]:
    """Examine the database; change nothing.

    Args:
        engine: the database, at the schema of this release.
        invariants: the numbers to examine; empty stands for all.
        deep: also compute each cell model anew over the whole log and hold it against its table: episodes and rates
            are proved too, at the cost of a rebuild (without writing).
        progress: called with each statement before it is examined.

    Returns:
        One diagnosis per invariant, in order of their numbers.
    """
    found = []
    with engine.connect().execution_options(isolation_level="REPEATABLE READ") as connection, connection.begin():
        connection.exec_driver_sql("SET TRANSACTION READ ONLY")
        for question in _QUESTIONS:
            if invariants and question.invariant not in invariants:
                continue
            if progress is not None:
                progress(question.statement)
            offenders = list(question.ask(connection))
            if question.invariant == 1 and deep:
                offenders += _cells_against_models(connection, load_models())
            found.append(_diagnose(question, offenders))
    return found


def _diagnose(question: _Question, offenders: list[dict[str, Any]]) -> Diagnosis:
    count = len(offenders)
    finding = Finding(
        passed=not offenders,
        sentence="It holds."
        if not offenders
        else f"{count} offender{'s' if count > 1 else ''}, first: {_spoken(offenders[0])}.",
        observed=f"{count} offenders",
        required="0 offenders",
        offenders=count,
        sample=offenders[:SAMPLE],
        figures={"offenders": count},
    )
    return Diagnosis(question.invariant, question.statement, finding, question.repair if offenders else "")


def _spoken(row: Row) -> str:
    return ", ".join(f"{key} {value}" for key, value in row.items() if value is not None)


def _rows(connection: sa.Connection, query: str, problem: str | None = None) -> list[dict[str, Any]]:
    return [
        {"problem": problem, **row} if problem is not None else dict(row)
        for row in execute(connection, query).mappings()
    ]


# A cell that waits in the outbox changed after the last refresh, with the day before it (a recurrence reaches back),
# under every name of its site; outbox and log are read in one snapshot. Sealed days have no log to recount from.
_MOVING = """
moving AS (
  SELECT site_id::text AS site_id, day FROM touched_cells
  UNION SELECT a.site_id, c.day FROM touched_cells AS c JOIN site_aliases AS a ON a.alias = c.site_id
),
settled AS (
  SELECT m.site_id, m.day - b.back AS day FROM moving AS m CROSS JOIN (VALUES (0), (1)) AS b (back)
)
"""
_READ_ANEW = """
log AS (
  SELECT coalesce(s.site_id, t.site_id)::text AS site_id, (t.event_at AT TIME ZONE 'UTC')::date AS day,
         upper(btrim(coalesce(t.resolution_level, ''))) AS said_level, t.rule_id, t.runbook_id, t.success, t.event_at,
         t.chaos_campaign_id IS NOT NULL OR coalesce(t.tags @> '{"synthetic": true}', false) OR EXISTS (
           SELECT FROM outcome_class_rules AS o
           WHERE o.enabled AND o.outcome_class = 'synthetic'
             AND CASE o.field WHEN 'error_message' THEN t.error_message WHEN 'failure_type' THEN t.failure_type
                 ELSE t.status END ILIKE o.pattern) AS synthetic
  FROM execution_telemetry AS t
  LEFT JOIN site_aliases AS s ON s.alias = t.site_id AND t.event_at >= s.valid_from AND t.event_at < s.valid_to
  WHERE t.event_at BETWEEN t.created_at - interval '730 days' AND t.created_at + interval '10 minutes'
),
levelled AS (
  SELECT l.*,
         CASE WHEN said_level IN ('L1', 'L2', 'L3') THEN said_level
              WHEN coalesce(rule_id, '') <> '' OR left(runbook_id, 3) = 'L1-' OR left(runbook_id, 8) = 'RB-AUTO-' THEN 'L1'
              WHEN left(runbook_id, 3) = 'L2-' THEN 'L2' ELSE 'unknown' END AS level
  FROM log AS l
),
named AS (
  SELECT v.*, coalesce(a.rule_id, v.named_rule)::text AS counted_rule
  FROM (
    SELECT l.*, CASE WHEN level = 'L1' THEN CASE WHEN coalesce(rule_id, '') <> '' THEN rule_id ELSE runbook_id END END
      AS named_rule
    FROM levelled AS l
  ) AS v
  LEFT JOIN rule_aliases AS a ON a.alias = v.named_rule AND v.event_at >= a.valid_from AND v.event_at < a.valid_to
)
"""
_COUNTERS = f"""
WITH {_MOVING}, {_READ_ANEW},
recounted AS (
  SELECT site_id, day, counted_rule AS rule_id, count(*) AS matches, count(*) FILTER (WHERE success) AS successes
  FROM named WHERE level = 'L1' AND NOT synthetic GROUP BY 1, 2, 3
),
counted AS (
  SELECT site_id, day, rule_id, executions AS matches, raw_successes AS successes FROM rule_daily_stats
  WHERE executions > 0 AND NOT EXISTS (SELECT FROM sealed_days AS d WHERE d.day = rule_daily_stats.day)
)
SELECT coalesce(r.site_id, c.site_id) AS site_id, coalesce(r.day, c.day) AS day, coalesce(r.rule_id, c.rule_id) AS rule_id,
       c.matches AS counted_matches, r.matches AS recounted_matches,
       c.successes AS counted_successes, r.successes AS recounted_successes
FROM recounted AS r FULL JOIN counted AS c ON (c.site_id, c.day, c.rule_id) = (r.site_id, r.day, r.rule_id)
WHERE (c.matches, c.successes) IS DISTINCT FROM (r.matches, r.successes)
  AND NOT EXISTS (SELECT FROM settled AS m WHERE (m.site_id, m.day) = (coalesce(r.site_id, c.site_id), coalesce(r.day, c.day)))
  AND NOT EXISTS (SELECT FROM sealed_days AS d WHERE d.day = coalesce(r.day, c.day))
ORDER BY 1, 2, 3
"""  # noqa: S608 (constants)
_SUMS = """
SELECT r.rule_id, r.match_count AS counted_matches, coalesce(sum(d.executions), 0)::bigint AS matches_of_its_days,
       r.success_count AS counted_successes, coalesce(sum(d.raw_successes), 0)::bigint AS successes_of_its_days,
       r.failure_count AS counted_failures, coalesce(sum(d.raw_failures), 0)::bigint AS failures_of_its_days
FROM l1_rules AS r LEFT JOIN rule_daily_stats AS d ON d.rule_id = r.rule_id
GROUP BY r.rule_id, r.match_count, r.success_count, r.failure_count
HAVING (r.match_count, r.success_count, r.failure_count) IS DISTINCT FROM
       (coalesce(sum(d.executions), 0), coalesce(sum(d.raw_successes), 0), coalesce(sum(d.raw_failures), 0))
ORDER BY r.rule_id
"""
# Every row of the log is counted once, or listed as having no credible time; synthetic ones in their own column.
_EVERY_ROW = f"""
WITH {_MOVING}, {_READ_ANEW},
recounted AS (
  SELECT site_id, day, count(*) AS executions, count(*) FILTER (WHERE synthetic) AS synthetic FROM levelled GROUP BY 1, 2
),
counted AS (
  SELECT site_id, day, sum(executions)::bigint AS executions, sum(synthetic)::bigint AS synthetic
  FROM telemetry_daily_volume AS v
  WHERE NOT EXISTS (SELECT FROM sealed_days AS d WHERE d.day = v.day) GROUP BY 1, 2
)
SELECT coalesce(r.site_id, c.site_id) AS site_id, coalesce(r.day, c.day) AS day,
       c.executions AS counted_executions, r.executions AS recounted_executions,
       c.synthetic AS counted_synthetic, r.synthetic AS recounted_synthetic
FROM recounted AS r FULL JOIN counted AS c ON (c.site_id, c.day) = (r.site_id, r.day)
WHERE c.COLUMN IS DISTINCT FROM r.COLUMN
  AND NOT EXISTS (SELECT FROM settled AS m WHERE (m.site_id, m.day) = (coalesce(r.site_id, c.site_id), coalesce(r.day, c.day)))
  AND NOT EXISTS (SELECT FROM sealed_days AS d WHERE d.day = coalesce(r.day, c.day))
ORDER BY 1, 2
"""  # noqa: S608 (constants)


def _counters(connection: sa.Connection) -> Iterator[dict[str, Any]]:
    """1. Per rule: match, success and failure counts equal a full recount from telemetry."""
    yield from _rows(connection, _COUNTERS, "a counter of a site-day differs from a recount of the log")
    yield from _rows(connection, _SUMS, "a rule's counter is not the sum of its days")
    yield from _rows(connection, _EVERY_ROW.replace("COLUMN", "executions"), "the log has another number of rows")


def _cells_against_models(connection: sa.Connection, graph: ModelGraph) -> list[dict[str, Any]]:
    """Hold every cell table against its model's own SELECT over everything; site-days that wait are left out."""
    found: list[dict[str, Any]] = []
    waits = connection.exec_driver_sql("SELECT EXISTS (SELECT FROM touched_cells)").scalar_one()
    for model in graph:
        if model.materialized != "cell" or (waits and "day" not in model.key):
            continue  # a roll-up of months or sites is compared when nothing waits
        columns, key = ", ".join(model.columns), ", ".join(model.key)
        live = ""
        if "day" in model.key:
            live = (
                "WHERE NOT EXISTS (SELECT FROM public.sealed_days AS d WHERE d.day = x.day) AND NOT EXISTS ("
                "SELECT FROM settled AS m WHERE (m.site_id, m.day) = (x.site_id, x.day))"
            )
        elif connection.exec_driver_sql("SELECT EXISTS (SELECT FROM sealed_days)").scalar_one():
            continue  # purged days are in the roll-up and no more in the log
        rows = execute(
            connection,
            f"WITH {_MOVING}, computed AS ({model.sql}), "  # noqa: S608 (our own model files)
            f"wanted AS (SELECT {columns} FROM computed AS x {live}), "
            f"kept AS (SELECT {columns} FROM public.{model.name} AS x {live}) "
            f"SELECT DISTINCT {key} FROM ((TABLE wanted EXCEPT ALL TABLE kept) UNION ALL (TABLE kept EXCEPT ALL TABLE wanted)) AS d",
        ).mappings()
        found += [{"problem": f"{model.name} differs from its model computed anew", **row} for row in rows]
    return found


def _attribution(connection: sa.Connection) -> Iterator[dict[str, Any]]:
    """2. Every L1 execution stands under a known rule or under the unresolved ids."""
    # Counted by rule first: asking for each row whether its rule is known took 7 s for 100,000 rows.
    gap = connection.execute(
        sa.text(
            f"WITH {_READ_ANEW}, "  # noqa: S608 (constants)
            "by_rule AS MATERIALIZED (SELECT counted_rule, day, count(*) AS n FROM named WHERE level = 'L1' AND NOT synthetic "
            "GROUP BY 1, 2), "
            "settled AS (SELECT counted_rule, sum(n) AS n FROM by_rule AS b WHERE NOT EXISTS ("
            "SELECT FROM touched_cells AS c WHERE c.day IN (b.day, b.day + 1)) GROUP BY 1) "
            "SELECT coalesce(sum(n), 0)::bigint AS l1, "
            "coalesce(sum(n) FILTER (WHERE EXISTS (SELECT FROM l1_rules AS r WHERE r.rule_id = counted_rule)), 0)::bigint "
            "AS attributed, "
            "coalesce(sum(n) FILTER (WHERE counted_rule IN (SELECT u.rule_id FROM unresolved_rule_ids AS u)), 0)::bigint "
            "AS unresolved FROM settled"
        )
    ).one()
    if gap.l1 != gap.attributed + gap.unresolved:
        yield {
            "problem": "L1 executions under no rule and in no list",
            "executions": gap.l1,
            "attributed": gap.attributed,
            "unresolved": gap.unresolved,
        }
    yield from _rows(
        connection,
        "SELECT u.rule_id, u.executions FROM unresolved_rule_ids AS u JOIN l1_rules AS r ON r.rule_id = u.rule_id",
        "an id is known and unresolved at once",
    )


_SERVED = """
SELECT m.appliance_id, e.rule ->> 'id' AS rule_id, (e.rule ->> 'version')::int AS version, a.action,
       substring(a.action from '^run_(?:windows_|linux_|macos_)?runbook:(.+)$') AS runbook_id
FROM rule_manifests AS m
CROSS JOIN LATERAL jsonb_array_elements(m.rules) AS e (rule)
CROSS JOIN LATERAL jsonb_array_elements_text(e.rule -> 'actions') AS a (action)
"""


def _placeholders(connection: sa.Connection) -> Iterator[dict[str, Any]]:
    """3. No placeholder, pseudo or non-catalogue runbook is enabled or served; no good rule is lost to that test."""
    yield from _rows(
        connection,
        "SELECT r.rule_id, r.runbook_id, r.platform FROM l1_rules AS r WHERE r.enabled AND NOT EXISTS ("
        "SELECT FROM runbooks AS b WHERE b.runbook_id = r.runbook_id AND b.enabled AND b.platform = r.platform) "
        "ORDER BY r.rule_id",
        "an enabled rule without an executable runbook",
    )
    yield from _rows(
        connection,
        f"SELECT s.appliance_id, s.rule_id, s.action FROM ({_SERVED}) AS s "  # noqa: S608 (a constant)
        "WHERE s.runbook_id IS NOT NULL AND NOT EXISTS (SELECT FROM runbooks AS b WHERE b.runbook_id = s.runbook_id AND b.enabled) "
        "ORDER BY 1, 2",
        "a served runbook that is not in the catalogue",
    )
    yield from _rows(
        connection,
        "SELECT r.rule_id, r.runbook_id, e.reason FROM l1_rules AS r JOIN rule_events AS e ON e.event_id = r.last_event_id "
        "JOIN runbooks AS b ON b.runbook_id = r.runbook_id AND b.enabled AND b.platform = r.platform "
        "WHERE r.state = 'quarantined' AND e.actor = 'flywheel' AND e.reason LIKE '%is a placeholder%' ORDER BY r.rule_id",
        "a good rule lost to the placeholder test",
    )


def _ledger(connection: sa.Connection) -> Iterator[dict[str, Any]]:
    """4. l1_rules equals the fold of rule_events; every promoted pattern has its own rule."""
    finding = registry_equals_ledger(connection)
    yield from (dict(row) for row in finding.sample)
    if finding.offenders > len(finding.sample):
        yield {"problem": f"and {finding.offenders - len(finding.sample)} more of this kind"}
    # Patterns merged into one rule by the system before are legal; the check patterns_and_rules_reconcile lists them.
    yield from _rows(
        connection,
        "SELECT coalesce(p.pattern_key, p.pattern_id) AS pattern, p.promoted_to_rule_id AS rule_id FROM patterns AS p "
        "WHERE p.status = 'promoted' AND NOT EXISTS (SELECT FROM l1_rules AS r WHERE r.rule_id = p.promoted_to_rule_id) "
        "ORDER BY 1",
        "a promoted pattern without a rule",
    )
    yield from _rows(
        connection,
        "SELECT e.rule_id, e.event_id, e.kind, e.from_state, e.to_state FROM rule_events AS e WHERE NOT EXISTS ("
        "SELECT FROM rule_transitions AS t WHERE (t.kind, t.from_state, t.to_state) = (e.kind, e.from_state, e.to_state)) "
        "ORDER BY e.event_id",
        "a step that is not legal",
    )
    yield from _rows(
        connection,
        "SELECT * FROM (SELECT rule_id, event_id, from_state, "
        "lag(to_state, 1, 'none') OVER (PARTITION BY rule_id ORDER BY event_id) AS stood FROM rule_events) AS e "
        "WHERE from_state <> stood ORDER BY event_id",
        "a step from a state in which the rule was not",
    )


def _decisions(connection: sa.Connection) -> Iterator[dict[str, Any]]:
    """5. Every decision carries policy hash, evidence and reasons; its certificate recomputes to the same verdict."""
    yield from _rows(
        connection,
        "SELECT decision_id, subject_id, verdict FROM promotion_decisions WHERE policy_hash !~ '^[0-9a-f]{64}$' "
        "OR btrim(reason) = '' OR jsonb_typeof(gates) <> 'array' OR gates = '[]' OR jsonb_typeof(evidence) <> 'object' "
        "ORDER BY decision_id",
        "a decision without policy, evidence or reasons",
    )
    # A gate that a later release requires is asked of later batches only: what counts is what this batch was told.
    yield from _rows(
        connection,
        "SELECT e.rule_id, e.event_id, e.batch_id FROM rule_events AS e WHERE e.kind IN ('promoted', 'advanced') AND ("
        "NOT EXISTS (SELECT FROM gate_verdicts AS v WHERE v.batch_id = e.batch_id) OR EXISTS ("
        "SELECT FROM gate_verdicts AS v JOIN required_gates AS g ON g.gate = v.gate "
        "WHERE v.batch_id = e.batch_id AND v.verdict <> 'pass')) ORDER BY e.event_id",
        "promoted past the gates of its batch",
    )
    for row in connection.execute(
        sa.text(
            "SELECT event_id, rule_id, kind, certificate, policy_hash FROM rule_events "
            "WHERE kind IN ('promoted', 'advanced') ORDER BY event_id"
        )
    ):
        problems = ["it has no certificate"] if row.certificate is None else certificate.verify(row.certificate)
        if not problems and row.certificate["policy_hash"] != row.policy_hash:
            problems = ["its certificate is of another policy"]
        if problems:
            yield {
                "problem": "; ".join(problems),
                "rule_id": row.rule_id,
                "event_id": row.event_id,
                "kind": row.kind,
            }


def _quarantines(connection: sa.Connection) -> Iterator[dict[str, Any]]:
    """6. A quarantined rule is in no manifest, and no bulk operation revives it."""
    yield from _rows(
        connection,
        f"SELECT s.appliance_id, s.rule_id, s.version, r.state FROM ({_SERVED}) AS s "  # noqa: S608 (a constant)
        "LEFT JOIN l1_rules AS r ON r.rule_id = s.rule_id "
        "WHERE r.state IS NULL OR r.state NOT IN ('canary', 'ring', 'fleet') OR NOT r.enabled ORDER BY 1, 2",
        "a rule out of service is served",
    )
    yield from _rows(
        connection,
        "SELECT r.rule_id, r.state FROM l1_rules AS r WHERE r.enabled AND ("
        "SELECT e.to_state FROM rule_events AS e WHERE e.rule_id = r.rule_id ORDER BY e.event_id DESC LIMIT 1"
        ") IN ('quarantined', 'retired') ORDER BY 1",
        "a quarantined rule is enabled",
    )
    # Sites alone: a release may be installed after the manifest was written, which the next delivery mends.
    yield from _rows(
        connection,
        "SELECT m.appliance_id, q.rule_id, q.scope_value AS site_id, q.since FROM quarantined_scopes AS q "
        "JOIN manifest_entries AS e ON e.rule_id = q.rule_id "
        "JOIN manifest_contents AS c ON c.entry_ids @> ARRAY[e.entry_id] "
        "JOIN appliance_manifests AS m ON m.content_hash = c.content_hash AND m.site_id = q.scope_value "
        "WHERE q.scope_kind = 'site' ORDER BY 1, 2",
        "a rule is served at a site where it is quarantined",
    )


_CONTENTS = """
SELECT c.content_hash, c.manifest_hash, flywheel_manifest_rules(c.entry_ids) AS rules, c.withheld, c.rule_count, min(m.appliance_id) AS appliance_id,
       count(m.appliance_id) AS appliances,
       ARRAY(SELECT jsonb_build_array(r.id, r.version) FROM unnest(c.rule_ids, c.rule_versions) AS r (id, version)) AS listed
FROM manifest_contents AS c LEFT JOIN appliance_manifests AS m ON m.content_hash = c.content_hash
GROUP BY c.content_hash
ORDER BY 6, 1
"""


def _delivery(connection: sa.Connection) -> Iterator[dict[str, Any]]:
    """7. Publishing twice creates no second command; manifests are deterministic and hashed."""
    yield from _rows(
        connection,
        "SELECT appliance_id, rule_id, rule_version, command_type, count(*) AS commands FROM appliance_commands "
        "WHERE rule_id IS NOT NULL GROUP BY 1, 2, 3, 4 HAVING count(*) > 1 ORDER BY 1, 2",
        "a command stands twice",
    )
    # Each content is hashed once, however many appliances have it; a foreign key holds their rows to it.
    for row in connection.execute(sa.text(_CONTENTS)):
        if manifest_hash(row.rules) != row.manifest_hash:
            problem = "a manifest does not have the hash it claims"
        elif content_hash(row.manifest_hash, canonical_json(row.withheld)) != row.content_hash:
            problem = "what a manifest withholds is not what its hash stands for"
        elif row.rule_count != len(row.rules) or sorted(row.listed) != sorted(
            [rule["id"], rule["version"]] for rule in row.rules if rule["source"] != "builtin"
        ):
            problem = "the rules listed beside a manifest are not those in it"
        else:
            continue
        yield {"problem": problem, "appliance_id": row.appliance_id, "appliances": row.appliances}
    yield from _rows(
        connection,
        "SELECT m.appliance_id, m.content_hash FROM appliance_manifests AS m WHERE NOT EXISTS "
        "(SELECT FROM manifest_contents AS c WHERE c.content_hash = m.content_hash) ORDER BY 1",
        "the content that a manifest names is gone",
    )
    yield from _rows(
        connection,
        "SELECT m.appliance_id, m.commanded_hash FROM appliance_manifests AS m WHERE m.commanded_hash IS NOT NULL AND NOT EXISTS "
        "(SELECT FROM manifest_contents AS c WHERE c.content_hash = m.commanded_hash) ORDER BY 1",
        "the content that commands were brought in line with is gone",
    )


def _synthetic(connection: sa.Connection) -> Iterator[dict[str, Any]]:
    """8. Synthetic and chaos rows change no production count, decision or manifest."""
    yield from _rows(connection, _EVERY_ROW.replace("COLUMN", "synthetic"), "synthetic rows are counted otherwise")
    yield from _rows(
        connection,
        "SELECT p.pattern_key, p.status FROM patterns AS p JOIN (SELECT pattern_key, sum(executions) AS executions, "
        "sum(synthetic) AS synthetic FROM pattern_site_stats GROUP BY pattern_key) AS s ON s.pattern_key = p.pattern_key "
        "WHERE p.status = 'promoted' AND p.source = 'observed' AND s.executions = 0 AND s.synthetic > 0 ORDER BY 1",
        "a pattern of synthetic rows alone was promoted",
    )


def _replays(connection: sa.Connection) -> Iterator[dict[str, Any]]:
    """9. Replaying, reordering or duplicating any batch changes nothing; a correction changes exactly its cells."""
    unique = connection.exec_driver_sql(
        "SELECT EXISTS (SELECT FROM pg_index AS i JOIN pg_attribute AS a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0] "
        "WHERE i.indrelid = 'public.execution_telemetry'::regclass AND i.indisunique AND i.indisvalid AND i.indnkeyatts = 1 "
        "AND i.indpred IS NULL AND a.attname = 'execution_id')"
    ).scalar_one()
    if not unique:
        yield {"problem": "execution_id is not unique: an execution may be counted twice"}
        yield from _rows(
            connection,
            "SELECT execution_id, count(*) AS rows FROM execution_telemetry GROUP BY 1 HAVING count(*) > 1 ORDER BY 2 DESC",
            "an execution stands twice",
        )
    # The last correction of a row names the value it has: else somebody changed it past the trigger.
    yield from _rows(
        connection,
        "SELECT DISTINCT ON (c.execution_id, k.key) c.execution_id, k.key AS column_name, k.value AS corrected_to, "
        "to_jsonb(t) -> k.key AS found FROM execution_corrections AS c "
        "CROSS JOIN LATERAL jsonb_each(c.after) AS k JOIN execution_telemetry AS t ON t.execution_id = c.execution_id "
        "WHERE k.key <> 'execution_id' AND NOT EXISTS (SELECT FROM execution_corrections AS n "
        "  WHERE n.execution_id = c.execution_id AND n.id > c.id AND n.after ? k.key) "
        "AND to_jsonb(t) -> k.key IS DISTINCT FROM k.value ORDER BY c.execution_id, k.key, c.id DESC",
        "a row changed without its correction on record",
    )


def _rates(connection: sa.Connection) -> Iterator[dict[str, Any]]:
    """10. Rates over nothing are null; fractions in data."""
    pairs = (
        ("rule_scorecard", "rule_id", "success_rate", "matches"),
        ("rule_scorecard", "rule_id", "rated_rate", "successes + failures"),
        ("rule_scorecard", "rule_id", "episode_rate", "rated_episodes"),
        ("l1_rules", "rule_id", "success_rate", "match_count"),
    )
    for relation, key, rate, of in pairs:
        yield from _rows(
            connection,
            f"SELECT '{relation}.{rate}' AS figure, {key}, {rate} AS rate, {of} AS over FROM {relation} "  # noqa: S608 (constants)
            f"WHERE ({rate} IS NULL) <> ({of} = 0) OR {rate} NOT BETWEEN 0 AND 1 ORDER BY 2",
            "a rate over nothing that is not null, or no fraction",
        )


def _rejects(connection: sa.Connection) -> Iterator[dict[str, Any]]:
    """11. What was refused stands in the rejects with its reason and its bytes; what was accepted is in the log."""
    yield from _rows(
        connection,
        "SELECT id AS reject_id, source, line_number FROM telemetry_rejects WHERE btrim(reason) = '' "
        "OR (octet_length(payload) = 0 AND payload_bytes > 0) OR octet_length(payload) > payload_bytes ORDER BY id",
        "a reject without its reason or its bytes",
    )
    yield from _rows(
        connection,
        "SELECT r.id AS reject_id, r.execution_id FROM telemetry_rejects AS r WHERE r.status = 'accepted' AND ("
        "r.execution_id IS NULL OR NOT EXISTS (SELECT FROM execution_telemetry AS t WHERE t.execution_id = r.execution_id)) "
        "AND NOT EXISTS (SELECT FROM sealed_days) ORDER BY r.id",
        "a reject that was accepted is not in the log",
    )


_TRIGGER = re.compile(r"CREATE (?:CONSTRAINT )?TRIGGER (\w+)\s+(?:BEFORE|AFTER)[^;]*?\sON (\w+)", re.DOTALL)


def declared_triggers() -> set[tuple[str, str]]:
    """Return the (trigger, table) pairs that the routines of this release create."""
    return {(match[1], match[2]) for routine in declared.routines() for match in _TRIGGER.finditer(routine.text)}


def _crashes(connection: sa.Connection) -> Iterator[dict[str, Any]]:
    """12. After a kill, a restart or two daemons all the above holds, and what guards it is in place."""
    live = {
        (row.tgname, row.relname): row.tgenabled
        for row in connection.exec_driver_sql(
            "SELECT t.tgname::text, c.relname::text, t.tgenabled::text FROM pg_trigger AS t JOIN pg_class AS c ON c.oid = t.tgrelid "
            "WHERE c.relnamespace = 'public'::regnamespace AND NOT t.tgisinternal"
        )
    }
    for name, table in sorted(declared_triggers()):
        state = live.get((name, table))
        if state is None or state == "D" or state == "R":
            yield {
                "problem": "a guard is missing" if state is None else "a guard is switched off",
                "trigger": name,
                "table": table,
            }
    yield from _rows(
        connection,
        "SELECT i.indexrelid::regclass::text AS index FROM pg_index AS i JOIN pg_class AS c ON c.oid = i.indrelid "
        "WHERE c.relnamespace = 'public'::regnamespace AND NOT i.indisvalid ORDER BY 1",
        "an index is not valid",
    )
    yield from _rows(
        connection,
        "SELECT gid, prepared, owner::text AS owner FROM pg_prepared_xacts WHERE database = current_database() ORDER BY prepared",
        "a prepared transaction waits, and holds its locks",
    )
    yield from _rows(
        connection,
        "SELECT refresh_seq, count(*) AS batches FROM refresh_batches WHERE refresh_seq IS NOT NULL "
        "GROUP BY 1 HAVING count(*) > 1 ORDER BY 1",
        "two refreshes claim one place in the order",
    )
    yield from _rows(
        connection,
        "SELECT e.decision_id, count(*) AS events FROM rule_events AS e WHERE e.decision_id IS NOT NULL "
        "AND e.kind IN ('promoted', 'advanced') GROUP BY 1 HAVING count(*) > 1 ORDER BY 1",
        "a decision was applied twice",
    )


_QUESTIONS: tuple[_Question, ...] = (
    _Question(
        1,
        "Counters equal a full recount from the log",
        _counters,
        "`flywheel rebuild` recomputes them from the log; then find who wrote past the triggers (invariant 12).",
    ),
    _Question(
        2,
        "Every L1 execution is attributed or listed as unresolved, and the two add up",
        _attribution,
        "`flywheel rebuild`; if the gap stays, `flywheel db check` says which view is not this release's.",
    ),
    _Question(
        3,
        "No placeholder or unknown runbook is enabled or served, and no good rule is lost to that test",
        _placeholders,
        "`flywheel quarantine RULE --actor --reason` and `flywheel run` take a bad one out; "
        "a good one comes back by `flywheel readmit`.",
    ),
    _Question(
        4,
        "l1_rules equals the fold of its ledger, and every promoted pattern has its own rule",
        _ledger,
        "The ledger is the truth: compare the rule with `flywheel explain RULE`; an event with actor and reason corrects it.",
    ),
    _Question(
        5,
        "Every decision carries policy, evidence and reasons, and its certificate recomputes",
        _decisions,
        "Quarantine the rule (`flywheel quarantine`) and ask who wrote to the ledger: the certificate was not made by this program.",
    ),
    _Question(
        6,
        "A quarantined rule is in no manifest",
        _quarantines,
        "`flywheel run` writes the manifests anew from the registry.",
    ),
    _Question(
        7,
        "No command stands twice, and every manifest has its own hash",
        _delivery,
        "`flywheel run` writes the manifests anew; a doubled command needs the unique index back: `flywheel db check`.",
    ),
    _Question(
        8,
        "Synthetic rows change no production figure",
        _synthetic,
        "`flywheel rebuild` recomputes the figures; quarantine what was promoted on synthetic rows.",
    ),
    _Question(
        9,
        "An execution counts once, and every correction is on record",
        _replays,
        "`flywheel db check` shows what became of the unique key and the trigger; then `flywheel rebuild`.",
    ),
    _Question(10, "Rates are fractions, and null over nothing", _rates, "`flywheel db upgrade` makes the views anew."),
    _Question(
        11,
        "Nothing that was refused is lost",
        _rejects,
        "`flywheel rejects list` shows the rows; what was deleted must be sent again by its source.",
    ),
    _Question(
        12,
        "What guards all this is in place",
        _crashes,
        "`flywheel db upgrade` and `flywheel db check`; a switched-off trigger: ALTER TABLE … ENABLE TRIGGER …, then `flywheel rebuild`.",
    ),
)
