"""The archive as a user meets it: the job and its check in the graph, `flywheel archive`, and the purge that asks it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import sqlalchemy as sa
from graph_runs import QUIET, Environment, Flywheel

from flywheel_pipeline.archive.assets import ARCHIVE_JOB
from flywheel_pipeline.archive.layout import Archive
from flywheel_pipeline.build import build_defs
from flywheel_pipeline.database.resource import FlywheelDatabase


@pytest.fixture
def at_home(
    played_copy: sa.Engine, environment: Environment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """The played day, counted, in the environment; return the folder that an archive may take."""
    with environment(played_copy, tmp_path / "home"):
        monkeypatch.delenv("FLYWHEEL_ARCHIVE_URL", raising=False)
        yield tmp_path / "archive"


def run_job(engine: sa.Engine) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run the job; return the asset's metadata, and the check's with its outcome under `passed`."""
    definitions = build_defs(
        resources={"database": FlywheelDatabase(url=engine.url.render_as_string(hide_password=False))}
    )
    with dg.DagsterInstance.ephemeral() as instance:
        result = definitions.resolve_job_def(ARCHIVE_JOB).execute_in_process(instance=instance, run_config=dict(QUIET))
    assert result.success
    (made,) = result.asset_materializations_for_node("telemetry_archive")
    (check,) = result.get_asset_check_evaluations()
    return (
        {key: value.value for key, value in made.metadata.items()},
        {"passed": check.passed, **{key: value.value for key, value in check.metadata.items()}},
    )


def test_the_job_exports_the_history_and_checks_that_nothing_is_missing(
    at_home: Path, played_copy: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, check = run_job(played_copy)
    assert made == {"archive": "none is set: FLYWHEEL_ARCHIVE_URL is empty"}
    assert (check["passed"], check["archived_days"], check["all_time_rows"]) == (True, 0, 13_135)

    monkeypatch.setenv("FLYWHEEL_ARCHIVE_URL", at_home.as_uri())
    made, check = run_job(played_copy)
    archive = Archive.open(at_home)
    assert made["days_exported"] == made["days_archived"] == len(archive.days()) > 20
    assert made["rows_exported"] == 13_135
    assert "2026-02-15" in made["preview"]
    assert check["passed"]
    assert (check["live_rows"], check["archived_days"], check["days_to_export"]) == (13_135, len(archive.days()), 0)

    day = archive.days()[0]
    archive.fs.rm_file(archive.full_path(archive.manifest(day).files("executions")[0].path))
    archive.fs.rm_file(archive.full_path(archive.manifest_path(archive.days()[-1])))
    made, check = run_job(played_copy)  # what is still in the database is exported again
    assert (made["days_exported"], check["passed"]) == (2, True)


def test_the_command_exports_lists_verifies_sweeps_and_says_what_is_wrong(
    at_home: Path, run_command: Flywheel, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = run_command("archive", "list")
    assert (answer.code, "Set FLYWHEEL_ARCHIVE_URL" in answer.err) == (2, True)
    monkeypatch.setenv("FLYWHEEL_ARCHIVE_URL", "nowhere://dana:hunter2@x/y")
    answer = run_command("archive", "export")
    assert (answer.code, "unknown scheme 'nowhere'" in answer.err) == (9, True)
    assert "hunter2" not in answer.err
    monkeypatch.setenv("FLYWHEEL_ARCHIVE_URL", str(at_home))
    answer = run_command("archive", "verify")
    assert (answer.code, "There is no archive at" in answer.err) == (9, True)

    refused = run_command("db", "purge", "2026-02-10", "--actor", "dana", "--yes")
    assert refused.code == 9
    assert "is not in the archive" in refused.err
    exported = run_command("archive", "export", "--to", "2026-02-09", "--json").json
    assert sum(day["rows"] for day in exported["exported"]) > 1000
    assert exported["exported"][-1]["day"] == "2026-02-09"
    assert run_command("archive", "export", "--to", "2026-02-09").out.startswith("Nothing to export")
    days = {day["day"]: day for day in run_command("archive", "list", "--json").json["days"]}
    assert (days["2026-02-09"]["state"], days["2026-02-10"]["state"]) == ("archived", "due")
    assert "wait for an export" in run_command("archive", "list").out

    purged = run_command("db", "purge", "2026-02-10", "--actor", "dana", "--yes")
    assert purged.code == 0
    assert "the archive stay" in purged.out
    days = {day["day"]: day for day in run_command("archive", "list", "--json").json["days"]}
    assert (days["2026-02-09"]["state"], days["2026-02-09"]["live_rows"]) == ("sealed", 0)
    assert run_command("doctor").code == 0

    verified = run_command("archive", "verify", "--json")
    assert (verified.code, verified.json["problems"]) == (0, [])
    assert verified.json["rows"] == sum(day["rows"] for day in exported["exported"])
    archive = Archive.open(at_home)
    file = archive.manifest(archive.days()[0]).files("executions")[0]
    assert file.local_path is not None
    content = file.local_path.read_bytes()
    file.local_path.write_bytes(content[:-1] + b"?")
    answer = run_command("archive", "verify")
    assert answer.code == 9
    assert "1 are not" in answer.out
    file.local_path.write_bytes(content)
    (file.local_path.parent / "20260101T000000Z-0-0.parquet").write_bytes(b"half of a file")
    assert run_command("archive", "sweep").out.startswith("0 files")
    assert (
        "1 files with 14 bytes could be removed" in run_command("archive", "sweep", "--grace-hours", 0, "--dry-run").out
    )
    swept = run_command("archive", "sweep", "--grace-hours", 0, "--json").json
    assert [remains["bytes"] for remains in swept["files"]] == [14]
    assert run_command("archive", "verify").code == 0
