"""The replay adds up: figures, patterns, rules and network effects, recomputed from the posts alone."""

from __future__ import annotations

import functools
import importlib.resources
import itertools
import json
import random
import re
from collections import Counter, defaultdict
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from flywheel_pipeline.database import tables
from flywheel_pipeline.simulation.replay import (
    CROSSING_PATTERNS,
    EVENING_AS_OF,
    GOLDEN,
    GOLDEN_MORNING,
    HELD_PATTERNS,
    MORNING_AS_OF,
    Replay,
    build_replay,
    write_ndjson,
)
from flywheel_pipeline.simulation.replay_patterns import PENDING
from flywheel_pipeline.simulation.replay_streams import split
from flywheel_pipeline.simulation.replay_telemetry import CORRECTIONS

Post = dict[str, Any]
_PSEUDO = re.compile(r"^(AUTO-|L2-|ESC-|UNASSIGNED-|ESCALATE$|general$|unknown$)")


def seed(name: str) -> list[dict[str, Any]]:
    path = importlib.resources.files("flywheel_pipeline.database").joinpath(f"seeds/{name}.yaml")
    rows: list[dict[str, Any]] = yaml.safe_load(path.read_text("utf-8"))
    return rows


@functools.cache
def shared_replay() -> Replay:
    return build_replay()


@pytest.fixture(scope="module")
def replay() -> Replay:
    return shared_replay()


@pytest.fixture(scope="module")
def catalogue() -> dict[str, str]:
    return {row["runbook_id"]: row["platform"] for row in seed("runbooks")}


def final_executions(posts: list[Post]) -> list[dict[str, Any]]:
    """What the intake must end with: per execution_id the version with the latest reported_at."""
    latest: dict[str, Post] = {}
    for post in posts:
        execution_id = post["execution"]["execution_id"]
        known = latest.get(execution_id)
        if known is None or at(post["reported_at"]) > at(known["reported_at"]):
            latest[execution_id] = post
    return [post["execution"] for post in latest.values()]


def at(stamp: str) -> datetime:
    return datetime.fromisoformat(stamp)


def rule_of(execution: dict[str, Any]) -> str:
    return str(execution.get("rule_id") or execution["runbook_id"])


def runbook_of_l2(execution: dict[str, Any]) -> str:
    return re.sub(r"^L2-run_(windows_|linux_)?runbook:", "", str(execution["runbook_id"]))


def telemetry_figures(executions: list[dict[str, Any]], replay: Replay) -> dict[str, int]:
    promoted = {rule["rule_id"] for rule in replay.rules}
    builtin = {rule["rule_id"] for rule in seed("builtin_rules")}
    l1 = [rule_of(e) for e in executions if e["resolution_level"] == "L1"]
    return {
        "rows": len(executions),
        "l1": len(l1),
        "not_l1": len(executions) - len(l1),
        "successful": sum(e["success"] for e in executions),
        "unresolved": sum(rule not in promoted | builtin for rule in l1),
        "l1_promoted": sum(rule in promoted for rule in l1),
        "l1_builtin": sum(rule in builtin for rule in l1),
    }


def test_the_morning_adds_up_to_the_golden_figures(replay: Replay) -> None:
    figures = telemetry_figures(final_executions(replay.morning_posts), replay)
    assert figures == GOLDEN_MORNING["telemetry"]
    assert (figures["rows"], figures["l1"], figures["successful"]) == (13_131, 12_221, 8_741)


def test_the_evening_adds_up_to_the_golden_figures(replay: Replay) -> None:
    figures = telemetry_figures(final_executions(replay.morning_posts + replay.evening_posts), replay)
    assert figures == GOLDEN["telemetry"]
    assert figures == {
        "rows": 13_135,
        "l1": 12_221,
        "not_l1": 914,
        "successful": 8_745,
        "unresolved": 0,
        "l1_promoted": 3_527,
        "l1_builtin": 8_694,
    }


def test_five_promoted_rules_ran_and_the_other_twelve_never_did(replay: Replay) -> None:
    promoted = {rule["rule_id"] for rule in replay.rules}
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for execution in final_executions(replay.morning_posts):
        if execution["resolution_level"] == "L1":
            counts[rule_of(execution)][0] += 1
            counts[rule_of(execution)][1] += execution["success"]
    assert {rule: tuple(c) for rule, c in counts.items() if rule in promoted} == {
        "RB-AUTO-FIREWALL": (166, 166),
        "RB-AUTO-SSH_CONF": (20, 20),
        "RB-AUTO-AUDIT_PO": (24, 16),
        "RB-AUTO-BACKUP_S": (260, 146),
        "RB-AUTO-BITLOCKE": (3057, 917),
    }
    for golden in GOLDEN["top_rules"] + GOLDEN["builtin_rules"]:
        matches, successes = counts[golden["rule_id"]]
        assert (matches, successes, matches - successes) == (
            golden["matches"],
            golden["successes"],
            golden["failures"],
        )


def test_bitlocker_failures_rank_as_the_evidence_of_that_day(replay: Replay) -> None:
    causes = {
        "cannot do it": r"Trusted Platform Module|not available on this edition",
        "not encrypted": r"Drive not encrypted - manual intervention required",
        "placeholder": r"Runbook not found: AUTO-BITLOCKER_STATUS\. Available: \[",
        "cmdlet or volume": r"No encryptable volumes|WMI query failed|ProtectionStatus=0|Phase 'verify'",
        "unreachable": r"401 - invalid content type|5985: connect: connection refused|timed out after 60s",
    }
    counts: Counter[str] = Counter()
    for execution in final_executions(replay.morning_posts):
        if rule_of(execution) == "RB-AUTO-BITLOCKE" and not execution["success"]:
            (cause,) = [c for c, words in causes.items() if re.search(words, execution["error_message"])]
            counts[cause] += 1
    assert [cause for cause, _ in counts.most_common()] == list(causes)
    assert counts.total() == 2140


def test_two_builds_are_equal() -> None:
    assert build_replay() == build_replay()


@given(st.integers(0, 2**32))
@settings(max_examples=5, deadline=None)
def test_the_order_of_arrival_does_not_matter(shuffle_seed: int) -> None:
    replay = shared_replay()
    posts = replay.morning_posts + replay.evening_posts
    random.Random(shuffle_seed).shuffle(posts)
    assert telemetry_figures(final_executions(posts), replay) == GOLDEN["telemetry"]


def test_versions_of_one_execution_agree_on_their_identity_and_never_tie(replay: Replay) -> None:
    versions: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    identities: dict[str, set[tuple[str, ...]]] = defaultdict(set)
    for post in replay.morning_posts:
        execution = post["execution"]
        versions[execution["execution_id"]][post["reported_at"]].add(json.dumps(execution, sort_keys=True))
        identities[execution["execution_id"]].add(
            (post["site_id"], execution["hostname"], execution["started_at"], execution["runbook_id"])
        )
    assert all(len(contents) == 1 for stamps in versions.values() for contents in stamps.values())
    assert all(len(identity) == 1 for identity in identities.values())


def test_a_dozen_executions_are_corrected_and_some_corrections_overtake(replay: Replay) -> None:
    contents: dict[str, set[str]] = defaultdict(set)
    arrivals: dict[str, list[Post]] = defaultdict(list)
    for post in replay.morning_posts:
        contents[post["execution"]["execution_id"]].add(json.dumps(post["execution"], sort_keys=True))
        arrivals[post["execution"]["execution_id"]].append(post)
    corrected = [execution_id for execution_id, versions in contents.items() if len(versions) > 1]
    assert len(corrected) == len(CORRECTIONS) == 12
    flipped = overtaken = stale = 0
    for execution_id in corrected:
        posts = arrivals[execution_id]
        final = max(posts, key=lambda post: at(post["reported_at"]))
        first = min(posts, key=lambda post: at(post["reported_at"]))
        flipped += first["execution"]["success"] != final["execution"]["success"]
        overtaken += posts.index(final) == 0
        stale += posts[-1] == first and posts[0] == first
        assert first["execution"]["error_message"] != final["execution"]["error_message"]
    assert (flipped, overtaken, stale) == (10, 4, 4)


def test_executions_are_posted_late_repeatedly_and_out_of_order(replay: Replay) -> None:
    posts = replay.morning_posts
    lines = Counter(json.dumps(post, sort_keys=True) for post in posts)
    assert sum(count - 1 for count in lines.values()) > 100
    delays = [at(post["reported_at"]) - at(post["execution"]["completed_at"]) for post in posts]
    assert min(delays) >= timedelta(0)
    assert max(delays) <= timedelta(minutes=60)
    assert sum(delay > timedelta(minutes=5) for delay in delays) > 100
    stamps = [post["reported_at"] for post in posts]
    assert sum(a > b for a, b in itertools.pairwise(stamps)) > 100


def test_every_time_lies_before_the_clock_of_its_part_of_the_day(replay: Replay) -> None:
    for posts, since, until in (
        (replay.morning_posts, MORNING_AS_OF - timedelta(days=37), MORNING_AS_OF),
        (replay.evening_posts, MORNING_AS_OF, EVENING_AS_OF),
    ):
        for post in posts:
            execution = post["execution"]
            started, completed = at(execution["started_at"]), at(execution["completed_at"])
            assert since < started <= completed <= at(post["reported_at"]) < until
            assert completed - started == timedelta(seconds=execution["duration_seconds"])


def test_execution_ids_and_incident_ids_never_collide(replay: Replay) -> None:
    posts = replay.morning_posts + replay.evening_posts
    started = {(p["execution"]["execution_id"], p["execution"]["started_at"]) for p in posts}
    assert len(started) == 13_135
    assert len({p["execution"]["incident_id"] for p in posts}) == 13_135


def test_posts_use_only_columns_of_execution_telemetry(replay: Replay) -> None:
    columns = set(tables.execution_telemetry.c.keys()) - {
        "id",
        "site_id",
        "reported_at",
        "created_at",
        "event_at",
    }
    for post in replay.morning_posts + replay.evening_posts:
        assert set(post) == {"site_id", "reported_at", "execution"}
        assert set(post["execution"]) <= columns


def test_old_agents_put_the_rule_into_runbook_id_and_new_ones_name_it(replay: Replay) -> None:
    executions = final_executions(replay.morning_posts)
    new = [e for e in executions if e["agent_version"] in ("1.0.70", "1.0.74")]
    assert 100 < len(new) < 500
    for execution in new:
        assert ("rule_id" in execution) == (execution["resolution_level"] == "L1")
        assert not execution["runbook_id"].startswith(("L1-", "L2-", "RB-AUTO-"))
    for execution in executions:
        if execution["agent_version"] not in ("1.0.70", "1.0.74"):
            assert "rule_id" not in execution
            assert "action" not in execution
            if execution["resolution_level"] == "L1":
                assert execution["runbook_id"].startswith(("L1-", "RB-AUTO-"))


def test_an_agent_that_knows_the_action_never_calls_it_unknown(replay: Replay) -> None:
    rows = [
        e for e in final_executions(replay.morning_posts) if (e["error_message"] or "").startswith("Unknown action: ")
    ]
    assert {e["error_message"] for e in rows} == {"Unknown action: run_windows_runbook:RB-WIN-SEC-016"}
    assert all(int(e["agent_version"].rsplit(".", 1)[1]) < 70 for e in rows)


def test_agents_range_over_the_releases_of_that_winter(replay: Replay) -> None:
    versions = {e["agent_version"] for e in final_executions(replay.morning_posts)}
    assert {"1.0.18", "1.0.44", "1.0.56", "1.0.70", "1.0.74"} <= versions
    online = [a for a in replay.appliances if a["status"] == "online"]
    assert [(a["agent_version"]) for a in online] == ["1.0.56"]
    assert {a["site_id"] for a in replay.appliances} == {s["site_id"] for s in replay.sites}


def test_oldest_agents_send_no_appliance_id_and_the_others_their_own(replay: Replay) -> None:
    appliance_of = {a["site_id"]: a["appliance_id"] for a in replay.appliances}
    for post in replay.morning_posts:
        release = int(post["execution"]["agent_version"].rsplit(".", 1)[1])
        expected = appliance_of[post["site_id"]] if release >= 44 else None
        assert post["execution"].get("appliance_id") == expected


def test_successes_are_mostly_verified_some_unverified_a_few_contradicted(replay: Replay) -> None:
    verified = Counter(e["verification_passed"] for e in final_executions(replay.morning_posts) if e["success"])
    assert verified[True] > 0.85 * verified.total()
    assert 0.02 * verified.total() < verified[None] < 0.15 * verified.total()
    assert 5 <= verified[False] <= 60


def test_every_busy_rule_ran_on_several_hosts_and_both_sites(replay: Replay) -> None:
    seen: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for post in replay.morning_posts:
        if post["execution"]["resolution_level"] == "L1":
            seen[rule_of(post["execution"])].add((post["site_id"], post["execution"]["hostname"]))
    for rule, places in seen.items():
        assert len({site for site, _ in places}) == 2, rule
        assert len(places) >= 2, rule


def test_firewall_successes_mostly_hold_for_a_day(replay: Replay) -> None:
    events: dict[str, list[tuple[datetime, str]]] = defaultdict(list)
    for execution in final_executions(replay.morning_posts):
        if execution["incident_type"] == "firewall":
            events[execution["hostname"]].append((at(execution["started_at"]), rule_of(execution)))
    held = 0
    for attempts in events.values():
        attempts.sort()
        following = [moment for moment, _ in attempts[1:]] + [datetime.max.replace(tzinfo=MORNING_AS_OF.tzinfo)]
        for (moment, rule), next_moment in zip(attempts, following, strict=True):
            held += rule == "RB-AUTO-FIREWALL" and next_moment - moment > timedelta(hours=24)
    assert 140 <= held < 166


def test_there_are_56_patterns_of_which_43_are_promoted(replay: Replay) -> None:
    assert Counter(p["status"] for p in replay.patterns) == {"promoted": 43, "pending": 13}
    assert len({p["pattern_signature"] for p in replay.patterns}) == 56
    assert len({p["pattern_id"] for p in replay.patterns}) == 56
    rules = {rule["rule_id"] for rule in replay.rules}
    for pattern in replay.patterns:
        assert re.fullmatch(r"[0-9a-f]{16}", pattern["pattern_id"])
        assert pattern["pattern_signature"] == f"{pattern['incident_type']}:{pattern['runbook_id']}"
        assert pattern["success_count"] == pattern["occurrences"] > 0
        assert pattern["failure_count"] == 0
        if pattern["status"] == "promoted":
            cut = f"RB-AUTO-{pattern['incident_type'].upper()[:8]}"
            assert pattern["promoted_to_rule_id"] == cut
            assert cut in rules
        else:
            assert pattern["promoted_to_rule_id"] is None
    assert {p["promoted_to_rule_id"] for p in replay.patterns if p["status"] == "promoted"} == rules


def test_pattern_and_rule_rows_fit_their_tables(replay: Replay) -> None:
    for rows, table in (
        (replay.patterns, tables.patterns),
        (replay.rules, tables.l1_rules),
        (replay.sites, tables.sites),
        (replay.appliances, tables.appliances),
        (replay.evidence_bundles, tables.evidence_bundles),
    ):
        columns = {column.name for column in table.c if column.computed is None}
        assert all(set(row) <= columns for row in rows)


def test_no_l2_row_speaks_of_a_pattern_beyond_the_56(replay: Replay) -> None:
    known = {(p["incident_type"], p["runbook_id"], p["platform"]) for p in replay.patterns}
    for execution in final_executions(replay.morning_posts + replay.evening_posts):
        if execution["resolution_level"] == "L2":
            key = (execution["incident_type"], runbook_of_l2(execution), execution["platform"])
            assert key in known
            assert execution["pattern_signature"] == f"{key[0]}:{key[1]}"


def observed_patterns(posts: list[Post]) -> dict[str, tuple[int, int]]:
    """Signature -> (executions, successes) of L2."""
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for execution in final_executions(posts):
        if execution["resolution_level"] == "L2":
            count = counts[f"{execution['incident_type']}:{runbook_of_l2(execution)}"]
            count[0] += 1
            count[1] += execution["success"]
    return {signature: (count[0], count[1]) for signature, count in counts.items()}


def reasons_to_hold(pattern: dict[str, Any], counts: tuple[int, int], catalogue: dict[str, str]) -> list[str]:
    """The legacy gates, written down once more."""
    runbook_id, platform = pattern["runbook_id"], pattern["platform"]
    executions, successes = counts
    reasons = []
    if _PSEUDO.match(runbook_id):
        reasons.append("placeholder")
    elif runbook_id not in catalogue:
        reasons.append("not_in_catalogue")
    elif catalogue[runbook_id] != platform:
        reasons.append("wrong_platform")
    if executions < 5:
        reasons.append("too_few_occurrences")
    if successes < 0.9 * executions:
        reasons.append("success_rate")
    return reasons


def test_every_pending_pattern_is_held_for_its_one_reason(replay: Replay, catalogue: dict[str, str]) -> None:
    morning = observed_patterns(replay.morning_posts)
    evening = observed_patterns(replay.morning_posts + replay.evening_posts)
    pending = [p for p in replay.patterns if p["status"] == "pending"]
    assert {p["pattern_signature"] for p in pending} == {p.signature for p in PENDING}
    for pattern in pending:
        signature = pattern["pattern_signature"]
        if signature in CROSSING_PATTERNS:
            assert reasons_to_hold(pattern, morning[signature], catalogue) == ["too_few_occurrences"]
            assert reasons_to_hold(pattern, evening[signature], catalogue) == []
        else:
            assert reasons_to_hold(pattern, evening[signature], catalogue) == [HELD_PATTERNS[signature]]
    assert len(CROSSING_PATTERNS) == 3
    assert set(HELD_PATTERNS.values()) == {
        "placeholder",
        "not_in_catalogue",
        "wrong_platform",
        "too_few_occurrences",
        "success_rate",
    }


def test_the_last_four_rows_lift_three_patterns_over_five(replay: Replay) -> None:
    morning = observed_patterns(replay.morning_posts)
    evening = observed_patterns(replay.morning_posts + replay.evening_posts)
    assert len(replay.evening_posts) == 4
    assert sorted(morning[s] for s in CROSSING_PATTERNS) == [(3, 3), (4, 4), (4, 4)]
    assert [evening[s] for s in CROSSING_PATTERNS] == [(5, 5)] * 3
    assert {s for s in evening if evening[s] != morning.get(s)} == set(CROSSING_PATTERNS)


def test_most_l2_work_is_firewall_and_backup(replay: Replay) -> None:
    counts = observed_patterns(replay.morning_posts)
    assert counts["firewall:RB-WIN-SEC-001"] == (710, 710)
    assert counts["backup_status:RB-WIN-BACKUP-001"] == (100, 100)


def test_six_rules_can_run_and_eleven_point_at_placeholders(replay: Replay, catalogue: dict[str, str]) -> None:
    assert len({rule["rule_id"] for rule in replay.rules}) == 17
    assert all(rule["enabled"] for rule in replay.rules)
    assert all(rule[c] == 0 for rule in replay.rules for c in ("match_count", "success_count", "failure_count"))
    real = [rule for rule in replay.rules if not _PSEUDO.match(rule["runbook_id"])]
    assert len(real) == 6
    assert all(catalogue[rule["runbook_id"]] == rule["platform"] for rule in real)
    assert all(rule["runbook_id"].startswith("AUTO-") for rule in replay.rules if rule not in real)


def test_incident_patterns_come_in_every_shape_seen_in_the_wild(replay: Replay) -> None:
    shapes = {
        "conditions" if isinstance(rule["incident_pattern"], list) else next(iter(rule["incident_pattern"]))
        for rule in replay.rules
    }
    assert shapes == {"incident_type", "check_type", "conditions"}


def test_evidence_bundles_are_named_by_the_executions_they_prove(replay: Replay) -> None:
    executions = final_executions(replay.morning_posts + replay.evening_posts)
    named = {e["evidence_bundle_id"]: e for e in executions if "evidence_bundle_id" in e}
    assert {b["bundle_id"] for b in replay.evidence_bundles} == set(named)
    assert len(replay.evidence_bundles) == len(named) > 100
    for bundle in replay.evidence_bundles:
        assert named[bundle["bundle_id"]]["incident_id"] == bundle["incident_id"]


def test_ndjson_holds_one_post_a_line_and_reads_back_equal(replay: Replay, tmp_path: Path) -> None:
    path = tmp_path / "morning.ndjson"
    assert write_ndjson(path, replay.morning_posts) == len(replay.morning_posts)
    lines = path.read_bytes().split(b"\n")
    assert lines.pop() == b""
    assert [json.loads(line) for line in lines] == replay.morning_posts


@given(st.integers(0, 5000), st.lists(st.integers(1, 100), min_size=1, max_size=9))
def test_shares_add_up_and_follow_their_weights(total: int, weights: list[int]) -> None:
    named = {f"w{n}": weight for n, weight in enumerate(weights)}
    shares = split(total, named)
    assert sum(shares.values()) == total
    for name, weight in named.items():
        assert abs(shares[name] - total * weight / sum(weights)) < 1
