"""The command line as a user meets it: help, JSON, exit codes, and one sentence for each thing that goes wrong."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import typer
from graph_runs import Answer, CopyDatabase, Environment, Flywheel, PlayedDay, state_of

from flywheel_pipeline.cli.app import app
from flywheel_pipeline.simulation.replay import GOLDEN, Replay
from flywheel_pipeline.simulation.stage import is_played, stage_evening, stage_morning

SIGNED = ("--actor", "ops@clinic", "--reason", "tested")
PROMOTED = "RB-AUTO-defender_exclusions~RB-WIN-SEC-017~windows"


@pytest.fixture(scope="module")
def read_only(copy_database: CopyDatabase, played: PlayedDay) -> sa.Engine:
    """A copy of the played day that the tests of this module only read."""
    assert played.engine.url.database is not None
    return copy_database(played.engine.url.database)


@pytest.fixture
def flywheel(
    run_command: Flywheel, read_only: sa.Engine, environment: Environment, tmp_path: Path
) -> Iterator[Flywheel]:
    """The command on the played day, to read it."""
    with environment(read_only, tmp_path / "home"):
        yield run_command


@pytest.fixture
def flywheel_writing(
    run_command: Flywheel, played_copy: sa.Engine, environment: Environment, tmp_path: Path
) -> Iterator[Flywheel]:
    """The command on a copy of the played day that is this test's own."""
    with environment(played_copy, tmp_path / "home"):
        yield run_command


def _commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield path
    for name, child in sorted(getattr(command, "commands", {}).items()):
        yield from _commands(child, (*path, name))


ALL_COMMANDS = list(_commands(typer.main.get_command(app)))


@pytest.mark.parametrize("path", ALL_COMMANDS, ids=lambda path: " ".join(path) or "flywheel")
def test_every_command_explains_itself(run_command: Flywheel, path: tuple[str, ...]) -> None:
    answer = run_command(*path, "--help")
    assert answer.code == 0
    assert "Usage: flywheel" in answer.out
    # A sentence of its own below the usage line, and help for each option.
    assert len([line for line in answer.out.splitlines() if line.strip()]) >= 4


def test_the_help_lists_the_exit_codes_and_the_version_is_printed(run_command: Flywheel) -> None:
    assert "Exit codes: 0 done" in " ".join(run_command("--help").out.split())
    assert run_command("--version").out.strip().count(".") == 2


# -- reading -------------------------------------------------------------------------------------------------------


def test_status_as_json_is_one_object_with_the_golden_figures(flywheel: Flywheel) -> None:
    answer = flywheel("status", "--json")
    assert answer.code == 0
    found = answer.json
    for section in ("telemetry", "patterns", "rules"):
        assert found[section].items() >= GOLDEN[section].items()
    assert found["top_rules"][0].items() >= GOLDEN["top_rules"][0].items()
    assert found["top_rules"][0].keys() >= {"rule_id", "matches", "successes", "failures", "success_rate"}
    assert len(found["checks"]) > 10
    assert all(check.keys() >= {"asset", "name", "passed"} for check in found["checks"])
    assert {check["name"] for check in found["checks"] if check["passed"] is False} >= {"no_failing_rules"}


def test_status_on_the_terminal_says_the_same_in_words(flywheel: Flywheel) -> None:
    answer = flywheel("status")
    assert answer.code == 0
    assert "13,135 rows: 12,221 L1, 914 other; 8,745 reported successful" in answer.out
    assert "20 promoted: 9 enabled, 11 quarantined; 21 built-in" in answer.out
    assert "RB-AUTO-BITLOCKE" in answer.out
    assert "30%" in answer.out


@pytest.mark.parametrize(
    ("subject", "state", "words"),
    [
        ("RB-AUTO-BITLOCKE", "fleet", "917 of 3,057 matches succeeded (30%)"),
        ("RB-AUTO-PATCHING", "quarantined", "AUTO-PATCHING is a placeholder"),
        (PROMOTED, "fleet", "5 of 5"),
        ("lockout_policy~RB-WIN-SEC-003~windows", "pending", "Seen 3 times; 5 are needed."),
        ("lockout_policy:RB-WIN-SEC-003", "pending", "Seen 3 times; 5 are needed."),
        ("L1-SSH-001", "fleet", "447"),
    ],
)
def test_explain_says_why_with_the_gates_in_order(flywheel: Flywheel, subject: str, state: str, words: str) -> None:
    answer = flywheel("explain", subject, "--json")
    assert answer.code == 0
    assert answer.json["state"] == state
    assert words in answer.out
    assert [gate.keys() >= {"gate", "verdict", "observed", "required", "sentence"} for gate in answer.json["gates"]]
    assert words.split(";")[0] in " ".join(flywheel("explain", subject).out.split())


def test_explain_of_nothing_known_is_refused(flywheel: Flywheel) -> None:
    answer = flywheel("explain", "RB-AUTO-NOBODY", "--json")
    assert (answer.code, answer.out) == (1, "")
    assert "There is no rule or pattern RB-AUTO-NOBODY." in answer.err


def test_a_certificate_is_exported_and_recomputed_without_a_database(
    flywheel: Flywheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "certificate.json"
    assert flywheel("certificate", PROMOTED, "--out", file).code == 0
    monkeypatch.setenv("FLYWHEEL_DATABASE_URL", "postgresql://nobody@127.0.0.1:1/none")
    assert flywheel("certificate", "verify", file).code == 0
    assert flywheel("certificate", "verify", file, "--json").json == {"valid": True, "problems": []}
    text = file.read_text("utf-8")
    assert '"successes": 5' in text
    file.write_text(text.replace('"successes": 5', '"successes": 6'), "utf-8")
    forged = flywheel("certificate", "verify", file, "--json")
    assert forged.code == 1
    assert forged.json["problems"]
    file.write_bytes(b"\xff not json")
    assert flywheel("certificate", "verify", file).code == 1
    assert flywheel("certificate", "verify", tmp_path / "none.json").code == 2


def test_only_what_flywheel_promoted_has_a_certificate(flywheel: Flywheel, tmp_path: Path) -> None:
    answer = flywheel("certificate", "export", "L1-SSH-001", "--out", tmp_path / "c.json")
    assert answer.code == 1
    assert "has no certificate" in answer.err
    assert not (tmp_path / "c.json").exists()


def test_policies_are_listed_with_the_one_in_force(flywheel: Flywheel) -> None:
    listed = flywheel("policy", "list", "--json").json
    assert [row["name"] for row in listed if row["in_force"]] == ["legacy"]
    assert {row["name"] for row in listed} >= {"standard", "legacy", "high_risk"}
    assert flywheel("policy", "list").code == 0


def test_bare_counts_are_gated(flywheel: Flywheel) -> None:
    answer = flywheel("gate", 100, 0, "--floor", 0.9, "--alpha", 0.05, "--json")
    assert answer.code == 0
    assert answer.json["verdict"] == "promote"
    assert answer.json.keys() >= {"verdict", "log_e", "log_e_reject", "needed_clean"}
    assert flywheel("gate", 3, 0).code == 0
    for wrong in (("--floor", 1.5), ("--alpha", 0), ("--floor", "nan")):
        assert flywheel("gate", 100, 0, *wrong).code == 2


def test_the_schema_equals_the_declared_one_and_an_upgrade_changes_nothing(flywheel: Flywheel) -> None:
    assert flywheel("db", "check", "--json").json == {"differences": []}
    assert flywheel("db", "check").code == 0
    assert flywheel("db", "upgrade", "--json").json == {"changes": []}
    assert "nothing changed" in flywheel("db", "upgrade").out
    given = os.environ["FLYWHEEL_DATABASE_URL"]
    os.environ["FLYWHEEL_DATABASE_URL"] = f"{given}&password=hunter2"
    assert flywheel("db", "url").out.startswith("postgresql://flywheel")
    assert "password=***" in flywheel("db", "url").out
    assert "password=hunter2" in flywheel("db", "url", "--show-password").out
    os.environ["FLYWHEEL_DATABASE_URL"] = given
    environment = flywheel("db", "env")
    assert "export DAGSTER_HOME=" in environment.out
    assert environment.code == 0


def test_lists_are_json_too(flywheel: Flywheel) -> None:
    assert flywheel("rejects", "list", "--json").json == []
    assert flywheel("aliases", "list", "--json").json == []
    assert flywheel("rejects", "list", "--status", "nonsense").code == 2


# -- writing -------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_figure_that_is_off_fails_the_simulation(flywheel_writing: Flywheel, played_copy: sa.Engine) -> None:
    with played_copy.begin() as connection:
        connection.exec_driver_sql(
            "INSERT INTO execution_telemetry (execution_id, site_id, runbook_id, hostname, success, resolution_level, "
            "incident_type, platform, started_at, created_at) VALUES ('one-more', 'site-x', 'L1-SSH-001', 'h', true, 'L1', "
            "'ssh', 'linux', '2026-02-15 12:00Z', '2026-02-15 12:00Z')"
        )
    answer = flywheel_writing("simulate", "replay-2026-02-15", "--json")
    assert answer.code == 1
    assert answer.json["ok"] is False
    off = {line["figure"] for line in answer.json["figures"] if not line["ok"]}
    assert {"telemetry: rows", "telemetry: l1", "telemetry: successful", "L1-SSH-001: matches"} <= off
    # What came after the day is nobody's mistake where the day only has to be there.
    skipped = flywheel_writing("simulate", "replay-2026-02-15", "--unless-played")
    assert (skipped.code, skipped.out.strip()) == (0, "The day of 2026-02-15 was played before.")


def test_a_day_of_which_only_the_morning_was_staged_is_not_called_played(
    engine: sa.Engine, replay: Replay, tmp_path: Path
) -> None:
    for part, played in ((None, False), (stage_morning, False), (stage_evening, True)):
        if part is not None:
            part(engine, replay, tmp_path)
        with engine.connect() as connection:
            assert is_played(connection) is played


def test_a_run_reports_its_checks_and_fails_with_a_gate(flywheel_writing: Flywheel, played_copy: sa.Engine) -> None:
    answer = flywheel_writing("run", "--json")
    assert answer.code == 0
    assert answer.json["success"] is True
    assert {check["name"] for check in answer.json["checks"]} >= {"success_floor", "no_failing_rules"}
    # In real time the telemetry of that day is long stale.
    assert flywheel_writing("policy", "activate", "standard", *SIGNED).code == 0
    answer = flywheel_writing("run")
    assert answer.code == 1
    assert "telemetry_freshness" in answer.out
    assert "nothing was promoted past a failed gate" in answer.out
    with played_copy.connect() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM rule_events WHERE kind = 'promoted'").scalar_one() == 3


def test_a_rebuild_recomputes_to_the_same(flywheel_writing: Flywheel, played_copy: sa.Engine) -> None:
    before = state_of(played_copy)
    answer = flywheel_writing("rebuild", "--json")
    assert answer.code == 0
    assert answer.json["cells"] > 50
    assert (answer.json["rows_written"], answer.json["counters_changed"]) == (0, 0)
    assert flywheel_writing("rebuild", "--from", "2026-02-10", "--to", "2026-02-12").code == 0
    assert state_of(played_copy) == before
    assert flywheel_writing("rebuild", "--from", "2026-02-12", "--to", "2026-02-10").code == 2
    assert flywheel_writing("rebuild", "--from", "yesterday").code == 2


def test_human_acts_are_signed_and_each_is_done_or_refused_on_its_own(
    flywheel_writing: Flywheel, played_copy: sa.Engine
) -> None:
    answer = flywheel_writing("quarantine", "RB-AUTO-BITLOCKE", "RB-AUTO-NOBODY", *SIGNED, "--json")
    assert answer.code == 1
    assert [(report["subject"], report["done"]) for report in answer.json] == [
        ("RB-AUTO-BITLOCKE", True),
        ("RB-AUTO-NOBODY", False),
    ]
    assert flywheel_writing("explain", "RB-AUTO-BITLOCKE", "--json").json["state"] == "quarantined"
    assert flywheel_writing("readmit", "RB-AUTO-BITLOCKE", *SIGNED).code == 1  # the same content again
    changed = flywheel_writing("readmit", "RB-AUTO-BITLOCKE", "--runbook", "RB-WIN-SEC-006", *SIGNED, "--json")
    assert changed.json[0]["done"]
    assert flywheel_writing("retire", "RB-AUTO-PATCHING", *SIGNED).code == 0
    assert flywheel_writing("approve", "lockout_policy~RB-WIN-SEC-003~windows", *SIGNED).code == 0
    assert flywheel_writing("reject", "password_policy:RB-WIN-SEC-004", *SIGNED).code == 1  # a name, not a key
    assert flywheel_writing("reject", "password_policy~RB-WIN-SEC-004~windows", *SIGNED).code == 0
    assert flywheel_writing("freeze", *SIGNED, "--json").json[0]["message"] == "frozen"
    assert flywheel_writing("thaw", *SIGNED).code == 0
    with played_copy.connect() as connection:
        acts = connection.exec_driver_sql("SELECT act, actor, reason FROM human_acts ORDER BY act_id").all()
    assert [act.act for act in acts] == ["quarantine", "readmit", "retire", "approve", "reject", "freeze", "thaw"]
    assert {(act.actor, act.reason) for act in acts} == {("ops@clinic", "tested")}


@pytest.mark.parametrize(
    "unsigned",
    [
        (),
        ("--actor", "me"),
        ("--reason", "why"),
        ("--actor", " ", "--reason", "why"),
        ("--actor", "me", "--reason", ""),
    ],
)
@pytest.mark.parametrize("act", [("quarantine", "RB-AUTO-BITLOCKE"), ("freeze",), ("policy", "activate", "standard")])
def test_an_act_without_actor_or_reason_is_refused(
    flywheel: Flywheel, act: tuple[str, ...], unsigned: tuple[str, ...]
) -> None:
    assert flywheel(*act, *unsigned).code == 2


def test_an_alias_and_an_unknown_policy(flywheel_writing: Flywheel) -> None:
    assert flywheel_writing("aliases", "add-rule", "L1-SSH-OLD", "L1-SSH-001", *SIGNED).code == 0
    assert (
        flywheel_writing("aliases", "add-site", "clinic-old", "clinic-new", "--from", "2026-01-01", *SIGNED).code == 0
    )
    listed = flywheel_writing("aliases", "list", "--json").json
    assert [(row["kind"], row["alias"], row["stands_for"]) for row in listed] == [
        ("rule", "L1-SSH-OLD", "L1-SSH-001"),
        ("site", "clinic-old", "clinic-new"),
    ]
    assert flywheel_writing("aliases", "list").code == 0
    answer = flywheel_writing("policy", "activate", "generous", *SIGNED)
    assert answer.code == 8
    assert "There is no policy generous." in answer.err


# -- bad input -----------------------------------------------------------------------------------------------------


def _post(**changes: Any) -> dict[str, Any]:
    execution: dict[str, Any] = {
        "execution_id": "exec-good",
        "incident_id": "incident-1",
        "runbook_id": "L1-SSH-001",
        "hostname": "host-1",
        "platform": "linux",
        "incident_type": "ssh_config",
        "started_at": "2026-02-15T12:00:00+00:00",
        "completed_at": "2026-02-15T12:00:10+00:00",
        "success": True,
        "status": "success",
        "resolution_level": "L1",
    }
    execution.update(changes)
    return {"site_id": "site-1", "reported_at": "2026-02-15T12:01:00+00:00", "execution": execution}


def _without(key: str) -> dict[str, Any]:
    post = _post()
    del post["execution"][key]
    return post


BAD_LINES: dict[str, tuple[bytes, str]] = {
    "unknown_field": (json.dumps(_post(execution_id="exec-1", colour="red")).encode(), "colour"),
    "wrong_type": (json.dumps(_post(execution_id="exec-2", success="perhaps")).encode(), "success"),
    "missing_execution_id": (json.dumps(_without("execution_id")).encode(), "execution_id"),
    "future_event": (json.dumps(_post(execution_id="exec-3", started_at="2999-01-01T00:00:00+00:00")).encode(), "2999"),
    "line_too_long": (b'{"site_id": "' + b"x" * (10 * 1024 * 1024) + b'"}', ""),
    "invalid_utf8": (b'{"site_id": "\xff\xfe"}', ""),
    "invalid_json": (b'{"site_id": ', ""),
    "not_an_object": (b"[1, 2, 3]", ""),
}


def test_each_bad_row_goes_to_the_rejects_with_its_line_and_reason_and_the_good_rows_land(
    run_command: Flywheel, engine: sa.Engine, environment: Environment, tmp_path: Path
) -> None:
    good = [json.dumps(_post(execution_id=f"good-{n}")).encode() for n in range(3)]
    lines = [good[0], *(line for line, _ in BAD_LINES.values()), good[1], good[2]]
    truncated = json.dumps(_post(execution_id="cut-off")).encode()[:100]
    file = tmp_path / "mixed.ndjson"
    file.write_bytes(b"\n".join(lines) + b"\n" + truncated)
    with environment(engine, tmp_path / "home"):
        answer = run_command("import", file, "--json")
        assert answer.code == 5
        assert (answer.json["read"], answer.json["inserted"]) == (len(lines) + 1, 3)
        assert answer.json["rejected"] == len(BAD_LINES) + 1
        assert answer.json["reasons"] == dict.fromkeys((*BAD_LINES, "truncated"), 1)

        listed = {row["reason_code"]: row for row in run_command("rejects", "list", "--json").json}
        for number, (code, (_, word)) in enumerate(BAD_LINES.items(), start=2):
            assert listed[code]["line_number"] == number
            assert listed[code]["source"] == "mixed.ndjson"
            assert word in listed[code]["reason"]
        assert listed["truncated"]["line_number"] == len(lines) + 1

        again = run_command("import", file)
        assert again.code == 5
        assert f"{len(lines) + 1} rows read: 0 new, 0 corrections, 3 known already, 9 rejected." in again.out
        with engine.connect() as connection:
            ids = connection.exec_driver_sql("SELECT execution_id FROM execution_telemetry ORDER BY 1").scalars().all()
            rejects = connection.exec_driver_sql("SELECT count(*), min(times_seen) FROM telemetry_rejects").one()
        assert ids == ["good-0", "good-1", "good-2"]
        assert tuple(rejects) == (9, 2)

        retried = run_command("rejects", "retry", "--json")
        assert retried.code == 0
        assert (retried.json["tried"], retried.json["accepted"]) == (9, 0)
        assert run_command("rejects", "discard", listed["invalid_utf8"]["id"]).code == 0
        assert len(run_command("rejects", "list", "--json").json) == 8
        assert [r["reason_code"] for r in run_command("rejects", "list", "--status", "discarded", "--json").json] == [
            "invalid_utf8"
        ]


def test_a_purge_says_how_many_decided_rejects_went_and_the_open_ones_stay(
    flywheel_writing: Flywheel, played_copy: sa.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = tmp_path / "bad.ndjson"
    bad.write_text("".join(f"{{{n}\n" for n in range(6)))
    old, recent, undated, fourth, *_ = flywheel_writing("import", bad, "--json").json["reject_ids"]
    flywheel_writing("rejects", "discard", old, recent, undated, fourth)
    with played_copy.begin() as connection:
        for id_, days in ((old, 31), (recent, 29), (fourth, 31)):
            connection.exec_driver_sql(
                f"UPDATE telemetry_rejects SET decided_at = now() - interval '{days} days' WHERE id = {id_}"
            )
        connection.exec_driver_sql(f"UPDATE telemetry_rejects SET decided_at = NULL WHERE id = {undated}")

    def purge(before: str, *options: str) -> Answer:
        return flywheel_writing("db", "purge", before, "--actor", "dana", "--yes", *options)

    assert "Purged 0 rejects decided more than 90 days ago: 0 accepted, 0 discarded; open" in purge("2026-01-01").out
    monkeypatch.setenv("FLYWHEEL_REJECT_DAYS", "0")
    refused = purge("2026-01-01")
    assert (refused.code, "FLYWHEEL_REJECT_DAYS" in refused.err) == (2, True)
    monkeypatch.setenv("FLYWHEEL_REJECT_DAYS", "30")
    with played_copy.begin() as connection:  # a purge of telemetry that is refused takes no reject either
        connection.exec_driver_sql("INSERT INTO touched_cells (site_id, day) VALUES ('site-x', '2026-01-01')")
    assert purge("2026-01-01").code == 1
    with played_copy.begin() as connection:
        connection.exec_driver_sql("DELETE FROM touched_cells WHERE site_id = 'site-x'")
    told = purge("2026-01-01", "--json").json
    before = told["rejects"].pop("decided_before")
    assert before[:4].isdigit()
    assert told == {
        "before": "2026-01-01",
        "rows": 0,
        "days": {},
        "rejects": {"keep_days": 30, "accepted": 0, "discarded": 2},
    }
    with played_copy.begin() as connection:
        kept = connection.exec_driver_sql("SELECT id, status FROM telemetry_rejects WHERE source = 'bad.ndjson'").all()
        assert {row.id: row.status for row in kept}.items() >= {recent: "discarded", undated: "discarded"}.items()
        assert sum(row.status == "open" for row in kept) == 2
        assert old not in {row.id for row in kept}
        records = connection.exec_driver_sql("SELECT actor, accepted, discarded FROM reject_purges").all()
        assert [tuple(record) for record in records] == [("dana", 0, 2)]
    assert flywheel_writing("doctor").code == 0
    assert len(flywheel_writing("rejects", "list", "--json").json) == 2
    gone = flywheel_writing("rejects", "retry", old)
    assert (gone.code, f"No open reject has the id {old}" in gone.err) == (2, True)


def test_a_clean_file_exits_0_and_one_that_is_no_telemetry_is_refused(
    run_command: Flywheel, engine: sa.Engine, environment: Environment, tmp_path: Path
) -> None:
    file = tmp_path / "clean.jsonl"
    file.write_text(json.dumps(_post()) + "\n", "utf-8")
    (tmp_path / "notes.txt").write_text("hello", "utf-8")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 this is not parquet")
    (tmp_path / "folder.ndjson").mkdir()
    with environment(engine, tmp_path / "home"):
        assert run_command("import", file).code == 0
        for wrong in ("notes.txt", "broken.parquet", "folder.ndjson", "missing.ndjson"):
            answer = run_command("import", tmp_path / wrong)
            assert answer.code == 2, wrong
            assert wrong in answer.err


def _one_sentence(answer: Answer) -> str:
    """The message: one sentence after `Error:`, and at most one line of what to do; nothing on standard output."""
    lines = answer.err.strip().splitlines()
    assert answer.out == ""
    assert 1 <= len(lines) <= 2, answer.err
    assert lines[0].startswith("Error: ")
    assert lines[0].endswith(".")
    return lines[0]


@pytest.mark.parametrize("command", [("status", "--json"), ("run",), ("up",), ("db", "upgrade"), ("import", __file__)])
@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("postgresql://me:secret@127.0.0.1:1/fleet", "cannot be reached"),
        ("127.0.0.1:5432/fleet", "no scheme"),
        ("mysql://me:secret@127.0.0.1/fleet", "runs on PostgreSQL only"),
    ],
)
def test_a_database_that_cannot_be_used_is_one_sentence_and_exit_code_3(
    run_command: Flywheel,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    command: tuple[str, ...],
    url: str,
    sentence: str,
) -> None:
    monkeypatch.setenv("FLYWHEEL_HOME", str(tmp_path))
    monkeypatch.setenv("FLYWHEEL_DATABASE_URL", url)
    if command == ("up",):
        command = ("up", "--port", str(_free_port()))
    answer = run_command(*command)
    assert answer.code == 3
    assert sentence in _one_sentence(answer)
    assert "secret" not in answer.err


@pytest.mark.parametrize(
    "command", [("status",), ("run",), ("db", "upgrade"), ("freeze", *SIGNED), ("rejects", "list")]
)
def test_a_newer_schema_is_one_sentence_and_exit_code_4(
    run_command: Flywheel, engine: sa.Engine, environment: Environment, tmp_path: Path, command: tuple[str, ...]
) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE flywheel_alembic_version SET version_num = '9999'")
    with environment(engine, tmp_path):
        answer = run_command(*command)
    assert answer.code == 4
    assert "9999" in _one_sentence(answer)


def test_a_database_without_or_behind_this_releases_schema_is_told_to_upgrade(
    run_command: Flywheel, engine: sa.Engine, empty_engine: sa.Engine, environment: Environment, tmp_path: Path
) -> None:
    with environment(empty_engine, tmp_path):
        answer = run_command("status")
    assert answer.code == 4
    assert "holds no Flywheel schema yet" in _one_sentence(answer)
    assert "flywheel db upgrade" in answer.err
    # The release before this one had other text in a trigger and in a model.
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "UPDATE schema_objects SET content_hash = 'older' WHERE name IN ('30_ledger', 'episodes')"
        )
    with environment(engine, tmp_path):
        answer = run_command("run")
        assert answer.code == 4
        assert "routine 30_ledger" in _one_sentence(answer)
        assert "model episodes" in answer.err
        assert run_command("db", "upgrade").code == 0
        assert run_command("status").code == 0


def test_a_port_in_use_is_one_sentence_and_exit_code_6(flywheel: Flywheel) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        answer = flywheel("up", "--port", port)
    assert answer.code == 6
    assert f"Port {port} on 127.0.0.1 cannot be used" in _one_sentence(answer)


@pytest.mark.parametrize("port", ["0", "99999", "http"])
def test_a_port_that_is_none_is_a_usage_error(flywheel: Flywheel, port: str) -> None:
    assert flywheel("up", "--port", port).code == 2


def test_a_setting_that_is_not_usable_names_its_variable(
    run_command: Flywheel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLYWHEEL_UI_PORT", "many")
    answer = run_command("status")
    assert answer.code == 2
    assert "FLYWHEEL_UI_PORT" in _one_sentence(answer)


def test_another_telemetry_is_not_overwritten_by_the_replay(
    run_command: Flywheel, engine: sa.Engine, environment: Environment, replay: Replay, tmp_path: Path
) -> None:
    file = tmp_path / "own.ndjson"
    file.write_text(json.dumps(replay.evening_posts[0]) + "\n", "utf-8")
    with environment(engine, tmp_path / "home"):
        assert run_command("import", file).code == 0
        answer = run_command("simulate", "replay-2026-02-15")
    assert answer.code == 2
    assert "holds telemetry that is not the replay's" in _one_sentence(answer)


def test_a_reader_that_leaves_early_gets_no_traceback(
    read_only: sa.Engine, environment: Environment, tmp_path: Path
) -> None:
    with environment(read_only, tmp_path):
        program = "from flywheel_pipeline.cli import main; main()"
        command = [sys.executable, "-c", program, "status", "--json"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            process.stdout.close()
            assert b"Traceback" not in process.stderr.read()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
