"""Publishing to 10,000 appliances with 500 promoted rules after one rule changes: manifests and commands together.

3,000 sites, ten agent releases, four reports of capabilities; ten of the rules are in a stage that reaches part of the
sites. Measured: a rule of the whole fleet gets a new version (every manifest changes), a rule of one canary leaves
service (only its cohort changes), and nothing changes. What is rewritten is counted by the rows' own versions (xmin),
and the commands are compared with a full count of what the manifests hold. Bar: 10 s each; CPU seconds stand beside,
since a busy machine stretches wall time.

    python benchmarks/bench_manifests.py [--quick]       # --quick: 2,000 appliances, 200 rules, the same bar
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable

import sqlalchemy as sa
from fleet import database, server

from flywheel_pipeline.delivery.publish import CommandReport, ManifestReport, queue_commands, write_manifests
from flywheel_pipeline.promotion.ledger import RuleEvent, append_events, definition, import_rules

BAR_SECONDS = 10.0
STAGED = 10

APPLIANCES = """
INSERT INTO appliances (appliance_id, site_id, agent_version, last_checkin, capabilities)
SELECT 'site-' || n % :sites || '-' || to_char(n, 'FM00000'), 'site-' || n % :sites,
  '1.0.' || (ARRAY[40, 56, 60, 66, 69, 70, 71, 72, 73, 74])[1 + n % 10], now(),
  CASE WHEN n % 40 = 0 THEN '["run_runbook"]'::jsonb WHEN n % 40 = 1 THEN '["run_windows_runbook"]'::jsonb
       WHEN n % 40 = 2 THEN '[]'::jsonb END
FROM generate_series(1, :appliances) AS n
"""
# What the commands should be, from the manifests alone: the slow way, for comparison.
DIFFERENCES = """
WITH wanted AS (
  SELECT m.appliance_id, e.rule_id, e.rule_version
  FROM manifest_contents c CROSS JOIN LATERAL unnest(c.entry_ids) AS n(entry_id) JOIN manifest_entries e USING (entry_id)
  JOIN appliance_manifests m USING (content_hash)
  WHERE e.entry ->> 'source' <> 'builtin'
),
commands AS (
  SELECT appliance_id, rule_id, rule_version, status FROM appliance_commands
  WHERE command_type = 'sync_promoted_rule' AND status <> 'superseded'
)
SELECT count(*) FROM wanted FULL JOIN commands USING (appliance_id, rule_id, rule_version)
WHERE commands.appliance_id IS NULL OR (wanted.appliance_id IS NULL AND commands.status <> 'acknowledged')
"""


def prepare(connection: sa.Connection, appliances: int, rules: int) -> None:
    """Make the fleet and the rules; the last ones are staged."""
    connection.execute(sa.text(APPLIANCES), {"appliances": appliances, "sites": max(appliances * 3 // 10, 1)})
    runbooks = connection.execute(sa.text("SELECT runbook_id, platform FROM runbooks ORDER BY runbook_id")).all()
    import_rules(
        connection,
        [
            {
                "rule_id": f"RB-AUTO-{n:04}",
                "incident_pattern": {"incident_type": f"type_{n}"},
                "runbook_id": runbooks[n % len(runbooks)].runbook_id,
                "platform": runbooks[n % len(runbooks)].platform,
                "enabled": True,
            }
            for n in range(rules)
        ],
        actor="benchmark",
        reason="a fleet of the size of the bar",
    )
    # Stages are the ledger's to set; here the registry is put into them directly, as a restore would.
    connection.exec_driver_sql("SET LOCAL session_replication_role = replica")
    connection.execute(
        sa.text(
            "UPDATE l1_rules SET state = CASE WHEN right(rule_id, 1) < '5' THEN 'canary' ELSE 'ring' END WHERE rule_id >= :first"
        ),
        {"first": f"RB-AUTO-{rules - STAGED:04}"},
    )


def change(connection: sa.Connection, rule_id: str, kind: str, state: str) -> None:
    """Append one event to the ledger: a quarantine."""
    rule = connection.execute(sa.text("SELECT * FROM l1_rules WHERE rule_id = :r"), {"r": rule_id}).one()
    content = definition(
        incident_pattern=rule.incident_pattern,
        runbook_id=rule.runbook_id,
        platform=rule.platform,
        source=rule.source,
        promoted_from_l2=rule.promoted_from_l2,
        pattern_key=rule.pattern_key,
        confidence=rule.confidence,
    )
    append_events(
        connection,
        [
            RuleEvent(
                rule_id,
                kind,
                rule.state,
                state,
                content,
                actor="benchmark",
                reason="one rule changes",
                rule_version=rule.rule_version,
            )
        ],
    )


def publish(connection: sa.Connection, name: str) -> tuple[ManifestReport, CommandReport]:
    """Publish as the asset does, under a batch of its own."""
    batch = connection.execute(
        sa.text(
            "INSERT INTO refresh_batches (run_id, policy_name, policy_hash) VALUES (:run, 'standard', repeat('0', 64)) "
            "RETURNING batch_id"
        ),
        {"run": name},
    ).scalar_one()
    return write_manifests(connection, batch), queue_commands(connection, batch)


def measure(quick: bool) -> bool:
    """Print a line per case; return whether every one met the bar."""
    appliances, rules = (2_000, 200) if quick else (10_000, 500)
    good = True
    with server() as embedded:
        engine = database(embedded, "manifests")
        with engine.begin() as connection:
            prepare(connection, appliances, rules)
        begun = time.perf_counter()
        with engine.begin() as connection:
            manifests, commands = publish(connection, "first")
        with engine.begin() as connection:
            # Half the fleet has fetched what waits.
            connection.exec_driver_sql(
                "UPDATE appliance_commands SET status = 'acknowledged', delivered_at = now(), told_at = now(), "
                "acknowledged_at = now() WHERE hashtext(appliance_id) & 1 = 0"
            )
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            contents = connection.exec_driver_sql("SELECT count(*) FROM manifest_contents").scalar_one()
            connection.exec_driver_sql("VACUUM (ANALYZE)")
            connection.exec_driver_sql("CHECKPOINT")
        print(
            f"  {manifests.appliances:,} appliances, {manifests.rules:,} entries, {contents} contents, "
            f"{commands.queued:,} commands: first publication and its statistics {time.perf_counter() - begun:.0f} s"
        )

        def new_version(connection: sa.Connection) -> None:
            connection.exec_driver_sql("SET LOCAL session_replication_role = replica")
            connection.exec_driver_sql(
                "UPDATE l1_rules SET rule_version = rule_version + 1 WHERE rule_id = 'RB-AUTO-0007'"
            )

        def withdrawn(connection: sa.Connection) -> None:
            change(connection, f"RB-AUTO-{rules - STAGED:04}", "quarantined", "quarantined")

        cases: list[tuple[str, Callable[[sa.Connection], None]]] = [
            ("a rule of the whole fleet changes", new_version),
            ("a rule of one canary is quarantined", withdrawn),
            ("nothing changes", lambda _: None),
        ]
        for name, act in cases:
            with engine.begin() as connection:
                act(connection)
            begun, cpu = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
            with engine.begin() as connection:
                manifests, commands = publish(connection, name)
                halfway = time.perf_counter()
            seconds = time.perf_counter() - begun
            used = resource.getrusage(resource.RUSAGE_SELF)
            with engine.connect() as connection:
                rewritten = connection.execute(
                    sa.text(
                        "SELECT count(*) FROM appliance_manifests WHERE batch_id = (SELECT max(batch_id) FROM refresh_batches)"
                    )
                ).scalar_one()
                off = connection.execute(sa.text(DIFFERENCES)).scalar_one()
            met = seconds <= BAR_SECONDS and off == 0
            good &= met
            print(
                f"{'ok  ' if met else 'MISS'} {name:<40} {seconds:6.2f} s (bar {BAR_SECONDS:.0f} s; python CPU "
                f"{used.ru_utime - cpu.ru_utime:.1f} s, commit {begun + seconds - halfway:.1f} s): "
                f"{manifests.written:,} of {manifests.appliances:,} manifests, {rewritten:,} rows rewritten, "
                f"{manifests.tombstones:,} tombstones, {commands.queued:,} queued, {commands.superseded:,} superseded, "
                f"{commands.withdrawn:,} withdrawn; {off} differences from a full count"
            )
        engine.dispose()
    return good


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    raise SystemExit(0 if measure(parser.parse_args().quick) else 1)
