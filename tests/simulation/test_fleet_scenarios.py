"""The traps of the old system, each lived by a simulated fleet day by day on a real database: what must not happen."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa
from fleet_lab import Lived, live

from flywheel_pipeline.promotion.acts import act
from flywheel_pipeline.simulation.fleet import database, lab
from flywheel_pipeline.simulation.fleet.scenario import load_scenario
from flywheel_pipeline.simulation.fleet.stream import DAY_MS, FleetStream


def _own_rules(lived: Lived, *incident_types: str) -> list[str]:
    """The rules of these patterns, each of which has exactly one."""
    found = [lived.pattern(t)["rules"] for t in incident_types]
    assert [len(rules) for rules in found] == [1] * len(incident_types)
    return [rules[0] for rules in found]


def test_types_that_share_eight_characters_become_two_rules_with_their_own_counts(engine: sa.Engine) -> None:
    lived = live(engine, "collision_8_characters")
    assert lived.wrong == []
    spooler, w32time = _own_rules(lived, "service_spooler", "service_w32time")
    assert spooler != w32time
    assert "service_spooler"[:8] == "service_w32time"[:8]  # what the old system made of both
    served = dict(lived.rows("SELECT rule_id, match_count FROM l1_rules WHERE source = 'promoted' AND enabled"))
    planted = {rule["rule_id"]: rule["executions"] for rule in lived.truth["rules"]}
    assert set(served) == {spooler, w32time}
    assert served == planted
    assert min(served.values()) > 0
    statuses = dict(lived.rows("SELECT incident_type, status FROM patterns"))
    assert statuses == {"service_spooler": "promoted", "service_w32time": "promoted", "service_wuauserv": "pending"}


@pytest.mark.long
def test_a_placeholder_leaves_service_and_the_good_rule_of_the_same_form_stays(engine: sa.Engine) -> None:
    lived = live(engine, "placeholder_beside_rule")
    assert lived.wrong == []
    assert lived.rule("RB-AUTO-AUDIT_PO")["state"] == "fleet"
    assert lived.history.days[0].quarantined == ("RB-AUTO-DEFENDER",)
    assert "placeholder" in lived.rule("RB-AUTO-DEFENDER")["reason"]
    assert all("placeholder" in reason for reason in lived.reasons("backup_status"))
    assert lived.planted("backup_status")["reported_successes"] == lived.planted("backup_status")["executions"] > 20
    served = lived.value(
        "SELECT count(*) FROM rule_manifests WHERE strpos(rules::text, :runbook) > 0", runbook=":AUTO-"
    )
    assert served == 0


def test_a_success_only_past_decides_nothing(engine: sa.Engine) -> None:
    lived = live(engine, "success_only")
    assert lived.wrong == []
    told = lived.rows("SELECT occurrences, success_count FROM patterns WHERE incident_type = 'audit_policy'")
    assert told == [(120, 120)]
    assert lived.pattern("audit_policy")["state"] == "none"
    assert any("rejected" in reason for reason in lived.reasons("audit_policy"))
    assert lived.pattern("service_spooler")["state"] == "canary"


@pytest.mark.long
def test_a_day_that_arrives_twice_counts_once(engine: sa.Engine) -> None:
    lived = live(engine, "replayed_batch")
    assert lived.wrong == []
    counts, landed = lived.truth["counts"], lived.history.landed
    assert counts["replays"] > 100
    assert counts["duplicates"] > 30
    assert counts["late"] > 60
    assert landed.read == counts["deliveries"]
    assert landed.inserted == counts["executions"]
    assert landed.unchanged == counts["duplicates"] + counts["replays"]


def test_successes_that_turn_into_failures_change_every_counter_and_promote_nothing(engine: sa.Engine) -> None:
    lived = live(engine, "late_flip")
    assert lived.wrong == []
    corrections = lived.truth["counts"]["corrections"]
    assert corrections > 200
    assert lived.value("SELECT count(*) FROM execution_corrections WHERE before ? 'success'") == corrections
    # Corrected after 40 hours, a bad runbook looked perfect for a day: into shadow, where nothing runs, and no further.
    assert "rejected" in lived.reasons("service_spooler")[1]
    assert list(lived.pattern("service_spooler")["stages"]) == ["shadow"]
    assert lived.pattern("audit_policy")["stages"] == {}


@pytest.mark.long
def test_a_pattern_that_two_appliances_report_is_one_rule_for_both(engine: sa.Engine) -> None:
    lived = live(engine, "two_appliances")
    assert lived.wrong == []
    (rule_id,) = _own_rules(lived, "audit_policy")
    assert lived.value("SELECT count(*) FROM patterns") == 1
    reporting = lived.value("SELECT count(DISTINCT appliance_id) FROM execution_telemetry")
    assert reporting == lived.value("SELECT count(*) FROM appliances") == 40
    by_site = lived.rows(
        "SELECT site_id, count(*) FROM rule_manifests WHERE rules @> jsonb_build_array(jsonb_build_object('id', CAST(:id AS text))) "
        "GROUP BY site_id",
        id=rule_id,
    )
    assert by_site
    assert all(appliances == 2 for _, appliances in by_site)
    ran = lived.value("SELECT count(DISTINCT appliance_id) FROM executions WHERE rule_id = :id", id=rule_id)
    assert ran == 2 * len(by_site)


def test_a_renamed_site_takes_its_history_with_it(engine: sa.Engine) -> None:
    lived = live(engine, "renamed_site")
    assert lived.wrong == []
    names = {row.site_id for row in lived.rows("SELECT DISTINCT site_id FROM execution_telemetry")}
    assert {"sim-001", "sim-riverside"} <= names  # raw rows keep the name they came with
    assert lived.value("SELECT count(DISTINCT site_id) FROM episodes") == 12
    assert lived.value("SELECT count(*) FROM episodes WHERE site_id = 'sim-001'") == 0
    stranded = lived.value("SELECT count(*) FROM execution_telemetry WHERE site_id = 'sim-001'")
    carried = lived.value("SELECT count(*) FROM executions WHERE site_id = 'sim-riverside'")
    assert carried == lived.truth["counts"]["sites"]["sim-riverside"] > stranded > 0


@pytest.mark.long
def test_nothing_is_promoted_that_a_tenth_of_the_agents_could_not_run(engine: sa.Engine) -> None:
    lived = live(engine, "stale_agent")
    assert lived.wrong == []
    upgraded = 3
    for day in lived.history.days[: upgraded - 1]:
        assert day.moved == ()
        (held,) = day.held.values()
        assert held == ("hold", "90% of the appliances can run it; the others' agents are too old.")
    assert lived.pattern("audit_policy")["stages"]["shadow"]["day"] >= upgraded
    outcomes = lived.planted("audit_policy")["outcomes"]
    assert outcomes["agent_unsupported"] > 10
    assert lived.pattern("audit_policy")["observed_rate"] >= 0.97  # "Unknown action" counts against no runbook


def test_rules_that_fail_from_the_start_or_from_one_day_on_leave_service_and_a_good_one_stays(
    engine: sa.Engine,
) -> None:
    lived = live(engine, "always_bad_rule")
    assert lived.wrong == []
    always, turned = lived.rule("RB-AUTO-BITLOCKE"), lived.rule("RB-AUTO-AUDIT_PO")
    assert always["quarantine_delay_days"] <= 1
    assert (turned["bad_from_day"], turned["quarantined_day"]) == (2, 3)
    assert 0 < turned["quarantine_delay_executions"] <= 32
    assert lived.pattern("bitlocker_status")["state"] == "none"
    served = {
        row[0] for row in lived.rows("SELECT DISTINCT r ->> 'id' FROM rule_manifests, jsonb_array_elements(rules) r")
    }
    assert "RB-AUTO-SPOOLER" in served
    assert not served & {"RB-AUTO-BITLOCKE", "RB-AUTO-AUDIT_PO"}


@pytest.mark.long
def test_a_fix_that_is_reverted_within_the_day_is_no_success(engine: sa.Engine) -> None:
    lived = live(engine, "flapping_host")
    assert lived.wrong == []
    planted = lived.planted("audit_policy")
    assert planted["reported_successes"] == planted["executions"] > 400  # 100 % of the executions
    assert lived.pattern("audit_policy")["observed_rate"] <= 0.5
    assert lived.pattern("audit_policy")["stages"] == {}


def test_lab_rows_teach_nothing(engine: sa.Engine) -> None:
    lived = live(engine, "synthetic_rows")
    assert lived.wrong == []
    counts = lived.truth["counts"]["outcomes"]
    assert counts["synthetic"] > 3 * (counts["success"] + counts["failure"])
    assert lived.pattern("audit_policy")["stages"] == {}
    assert lived.value("SELECT count(*) FROM patterns WHERE incident_type = 'service_spooler'") == 0
    assert (
        lived.value("SELECT sum(raw_successes) FROM pattern_candidates")
        == lived.planted("audit_policy")["reported_successes"]
    )


@pytest.mark.long
def test_a_blanket_reenable_revives_nothing(engine: sa.Engine) -> None:
    lived = live(engine, "blanket_reenable")
    assert lived.wrong == []
    (done,) = [a for day in lived.history.days for a in day.acts]
    assert (done["act"], done["done"]) == ("blanket_reenable", False)
    assert "only what its ledger says" in done["message"]
    states = dict(lived.rows("SELECT rule_id, state FROM l1_rules WHERE source = 'promoted' AND pattern_key IS NULL"))
    assert states == {"RB-AUTO-BITLOCKE": "quarantined", "RB-AUTO-BACKUP_S": "quarantined"}
    assert lived.value("SELECT count(*) FROM rule_manifests WHERE rules::text ~ 'RB-AUTO-(BITLOCKE|BACKUP_S)'") == 0
    # The control: a person may bring a changed rule back, and then the ledger says so.
    (report,) = act(
        engine, "readmit", ["RB-AUTO-BACKUP_S"], actor="dana", reason="another runbook",
        change={"runbook_id": "RB-WIN-LOGGING-001"},
    )  # fmt: skip
    assert report.done


def test_a_runbook_that_l2_chose_only_where_it_works_is_held_by_its_selection_share(engine: sa.Engine) -> None:
    lived = live(engine, "choice_bias")
    assert lived.wrong == []
    assert all(
        "a rule would fire on all of them" in reason
        for day in lived.history.days[:-1]  # on the last one nothing arrived any more
        for _, reason in day.held.values()
    )
    assert lived.pattern("audit_policy")["observed_rate"] >= 0.95


@pytest.mark.long
def test_in_rough_weather_nothing_is_lost_counted_twice_or_let_in(engine: sa.Engine) -> None:
    lived = live(engine, "rough_weather")
    assert lived.wrong == []
    counts, landed = lived.truth["counts"], lived.history.landed
    assert len(counts["invalid"]) == 11
    assert counts["unregistered"]["L1-LOGGING-LOCAL-7"] > 20
    assert {"unverified", "unreachable", "agent_unsupported", "failure", "success"} <= counts["outcomes"].keys() | {
        "agent_unsupported"
    }
    assert (
        landed.read == counts["deliveries"] == landed.inserted + landed.corrected + landed.unchanged + landed.rejected
    )
    assert landed.rejected == sum(counts["invalid"].values())


# ------------------------------------------------------------------------------------------------------- campaigns

#: Every table and view in which a campaign could show, with the columns that count its rows on purpose.
_FIGURES = (
    "rule_daily_stats", "rule_month_stats", "rule_site_stats", "rule_scorecard", "rule_hosts", "unresolved_rule_ids",
    "pattern_daily_stats", "pattern_month_stats", "pattern_site_stats", "pattern_candidates", "pattern_evidence", "patterns",
    "l1_rules", "rule_events", "rule_manifests", "appliance_commands", "deployments", "promotion_decisions", "sites",
    "appliances",
)  # fmt: skip
_BOOKKEEPING = {
    "synthetic",
    "updated_at",
    "built_at",
    "batch_id",
    "confirmed_batch_id",
    "id",
    "counted_at",
    "refreshed_at",
}


def _production(engine: sa.Engine) -> dict[str, list[str]]:
    """Every figure of production: the rows of each table in which anything but campaign rows is counted."""
    found: dict[str, list[str]] = {}
    with engine.connect() as connection:
        for table in _FIGURES:
            rows = []
            for row in connection.execute(sa.text(f"SELECT * FROM {table}")).mappings():
                counts = [row[name] for name in ("executions", "matches", "match_count", "episodes") if name in row]
                if table.endswith(("_stats", "_hosts", "_ids")) and not any(counts):
                    continue  # a line of campaign rows alone: it counts nothing
                rows.append(repr(sorted((k, v) for k, v in row.items() if k not in _BOOKKEEPING)))
            found[table] = sorted(rows)
    return found


def _clinics(name: str, **changes: Any) -> Any:
    """A scenario on sites with the names of real ones."""
    scenario = load_scenario(name)
    clinics = tuple(f"clinic-{n + 1}" for n in range(scenario.fleet.sites))
    return scenario.model_copy(update={"fleet": scenario.fleet.model_copy(update={"site_ids": clinics}), **changes})


def test_a_full_spectrum_campaign_on_the_hosts_of_production_changes_no_figure(engine: sa.Engine) -> None:
    lived = live(engine, _clinics("collision_8_characters", days=3, settle_days=1))
    assert [p["state"] for p in lived.scored["patterns"]] == ["canary", "canary", "none"]
    before = _production(engine)

    campaign = _clinics("full_spectrum")
    stream = FleetStream(campaign.model_copy(update={"start": load_scenario("collision_8_characters").start}), 3)
    with engine.connect() as connection:
        assert database.require_simulation_database(connection, campaign.campaign) is False
    clock = lived.history.days[-1].clock
    at = stream.scenario.begins.fromisoformat(clock)
    landed = database.deliver(engine, stream.rest(), source="campaign", received_at=at)
    assert landed.rejected == 0
    lab.pass_in_process(engine, "after-the-campaign")

    counts = stream.truth.document()["counts"]
    assert landed.inserted == counts["executions"] == counts["outcomes"]["synthetic"] > 100
    types = lived.value(
        "SELECT count(DISTINCT (incident_type, platform)) FROM execution_telemetry WHERE chaos_campaign_id = 'chaos-full-spectrum'"
    )
    assert types == len(campaign.drifts) == 38
    shared = lived.value("SELECT count(*) FROM episodes WHERE synthetic > 0 AND executions > 0")
    assert shared > 0  # the campaign ran beside real incidents, on the same hosts, days, types and runbooks
    assert _production(engine) == before


@pytest.mark.long
def test_a_campaign_alone_promotes_nothing_and_is_not_suppressed(engine: sa.Engine) -> None:
    lived = live(engine, "full_spectrum")
    assert lived.wrong == []
    assert lived.truth["counts"]["outcomes"] == {"synthetic": lived.truth["counts"]["executions"]}
    assert all(day.moved == () and day.quarantined == () for day in lived.history.days)
    assert lived.value("SELECT count(*) FROM execution_telemetry WHERE chaos_campaign_id IS NULL") == 0
    assert lived.value("SELECT count(*) FROM execution_telemetry WHERE error_message LIKE '%suppression%'") == 0


def test_a_campaign_does_not_make_silent_production_look_fresh(engine: sa.Engine) -> None:
    lived = live(engine, _clinics("collision_8_characters", days=1, settle_days=2))
    assert lived.history.days[-1].unmet_gates == {"telemetry_freshness": "fail"}
    campaign = _clinics("full_spectrum")
    stream = FleetStream(
        campaign.model_copy(update={"days": 3, "start": load_scenario("collision_8_characters").start}), 3
    )
    at = stream.scenario.begins.fromisoformat(lived.history.days[-1].clock)
    database.deliver(engine, stream.advance(stream.begin_ms + 3 * DAY_MS), source="campaign", received_at=at)
    assert lived.value("SELECT max(created_at) FROM execution_telemetry") > at.fromtimestamp(
        at.timestamp() - 3600, at.tzinfo
    )
    assert lab.pass_in_process(engine, "after-the-campaign")["unmet_gates"] == {"telemetry_freshness": "fail"}


@pytest.mark.parametrize("campaign", [None, "chaos-1"])
@pytest.mark.long
def test_a_database_of_production_takes_campaigns_only(engine: sa.Engine, campaign: str | None) -> None:
    from flywheel_pipeline.errors import UsageError

    stream = FleetStream(load_scenario("flapping_host"), 1)
    with engine.begin() as connection:
        connection.execute(sa.text("INSERT INTO appliances (appliance_id, site_id) VALUES ('north-1', 'north')"))
    with pytest.raises(UsageError, match="north, which no simulation made"):
        database.put_fleet(engine, stream, as_of=stream.scenario.begins)
    with engine.connect() as connection:
        if campaign is None:
            with pytest.raises(UsageError):
                database.require_simulation_database(connection, campaign)
        else:
            assert database.require_simulation_database(connection, campaign) is False
        assert connection.execute(sa.text("SELECT count(*) FROM sites")).scalar_one() == 0
