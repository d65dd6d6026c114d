"""The shape of the graph, held against a snapshot: a gate renamed, dropped or unhooked would be vacuously true.

After a wanted change: FLYWHEEL_UPDATE_SNAPSHOT=1 python -m pytest tests/pipeline/test_graph_snapshot.py, and read the
difference that it makes.
"""

from __future__ import annotations

import datetime as dt
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import sqlalchemy as sa
import yaml

from flywheel_pipeline.aggregates.assets import FEEDBACK
from flywheel_pipeline.archive.assets import ARCHIVE_CHECKS
from flywheel_pipeline.asset_page import TEMPO_TAG, TEMPOS, code_version
from flywheel_pipeline.build import CONTRACT_CHECKS, NIGHTLY_JOB, PIPELINE_JOB, build_defs
from flywheel_pipeline.database.column_words import idle_words
from flywheel_pipeline.sql_models.loader import load_models
from flywheel_pipeline.telemetry.checks import NIGHTLY_CHECKS
from flywheel_pipeline.telemetry.quality import FRESH_WITHIN

SNAPSHOT = Path(__file__).with_name("graph_snapshot.yaml")
GROUPS = {"telemetry", "aggregates", "candidates", "promotion", "delivery", "health", "archive", "simulation"}
#: The job that promotes, and what may be left out of it: days are backfilled by hand, the backtest costs seconds.
NO_TABLE = {
    "rule_quarantines",
    "policy_backtest",
    "day_backfill",
    "telemetry_archive",
}  # what a run did, not rows of a relation
LEFT_OUT = {
    PIPELINE_JOB: {"day_backfill", "policy_backtest", "telemetry_archive"},
    NIGHTLY_JOB: {"day_backfill", "telemetry_archive"},
}


@pytest.fixture(scope="module")
def definitions() -> dg.Definitions:
    return build_defs()


@pytest.fixture(scope="module")
def nodes(definitions: dg.Definitions) -> dict[str, Any]:
    return {node.key.to_user_string(): node for node in definitions.resolve_asset_graph().asset_nodes}


@pytest.fixture(scope="module")
def checks(definitions: dg.Definitions) -> dict[str, dg.AssetCheckSpec]:
    return {
        f"{spec.asset_key.to_user_string()}.{spec.name}": spec
        for definition in definitions.asset_checks or ()
        if isinstance(definition, dg.AssetChecksDefinition)
        for spec in definition.check_specs
    }


def windows(node: Any) -> list[float] | None:
    """After which age of its last materialization the asset's badge warns and fails, in hours."""
    policy = node.freshness_policy_or_from_metadata
    if policy is None:
        return None
    return [
        window.to_timedelta().total_seconds() / 3600
        for window in (policy.warn_window, policy.fail_window)
        if window is not None
    ]


def shape(definitions: dg.Definitions, nodes: dict[str, Any], checks: dict[str, dg.AssetCheckSpec]) -> dict[str, Any]:
    """Return what a user of the graph relies on, as plain data in a stable order."""
    repository = definitions.get_repository_def()
    jobs = {}
    for job in repository.get_all_jobs():
        if job.name.startswith("__"):
            continue
        layer = job.asset_layer
        jobs[job.name] = {
            "assets": sorted(key.to_user_string() for key in layer.executable_asset_keys),
            "checks": sorted(
                f"{key.asset_key.to_user_string()}.{key.name}" for key in layer.asset_graph.asset_check_keys
            ),
            "executor": job.executor_def.name,
        }
    return {
        "assets": {
            name: {
                "group": node.group_name,
                "deps": sorted(key.to_user_string() for key in node.parent_keys),
                "owners": sorted(node.owners),
                "kinds": sorted(node.kinds),
                "made_here": node.is_materializable,
                "partitioned": node.is_partitioned,
                "tempo": node.tags.get(TEMPO_TAG),
                "stale_after_hours": windows(node),
            }
            for name, node in sorted(nodes.items())
        },
        "checks": {name: {"blocking": spec.blocking} for name, spec in sorted(checks.items())},
        "jobs": dict(sorted(jobs.items())),
        "sensors": {
            sensor.name: {"status": sensor.default_status.value, "jobs": sorted(t.job_name for t in sensor.targets)}
            for sensor in sorted(repository.sensor_defs, key=lambda s: s.name)
        },
        "schedules": {
            schedule.name: {
                "status": schedule.default_status.value,
                "job": schedule.job_name,
                "cron": schedule.cron_schedule,
                "timezone": schedule.execution_timezone,
            }
            for schedule in sorted(repository.schedule_defs, key=lambda s: s.name)
        },
    }


def test_the_graph_is_the_one_in_the_snapshot(
    definitions: dg.Definitions, nodes: dict[str, Any], checks: dict[str, dg.AssetCheckSpec]
) -> None:
    found = shape(definitions, nodes, checks)
    if os.environ.get("FLYWHEEL_UPDATE_SNAPSHOT"):
        SNAPSHOT.write_text(yaml.safe_dump(found, sort_keys=False, width=120, default_flow_style=None), "utf-8")
    assert found == yaml.safe_load(SNAPSHOT.read_text("utf-8"))


def test_the_blocking_checks_are_exactly_the_gates_that_the_database_requires(
    checks: dict[str, dg.AssetCheckSpec], engine: sa.Engine
) -> None:
    with engine.connect() as connection:
        required = set(connection.exec_driver_sql("SELECT gate FROM required_gates").scalars())
    assert len(required) == 5
    assert {spec.name for spec in checks.values() if spec.blocking} == required


def test_every_gate_stands_upstream_of_the_ledger(nodes: dict[str, Any], checks: dict[str, dg.AssetCheckSpec]) -> None:
    upstream: set[str] = set()
    waiting = ["rule_events"]
    while waiting:
        for parent in nodes[waiting.pop()].parent_keys:
            if parent.to_user_string() not in upstream:
                upstream.add(parent.to_user_string())
                waiting.append(parent.to_user_string())
    gates = {spec.asset_key.to_user_string() for spec in checks.values() if spec.blocking}
    assert gates <= upstream
    # Quarantines must not wait for a gate: none of the gated assets stands before them, except within the refresh.
    assert not gates & {key.to_user_string() for key in nodes["rule_quarantines"].parent_keys}


def test_no_check_and_no_asset_is_left_out_of_the_jobs_that_promote(
    definitions: dg.Definitions, nodes: dict[str, Any], checks: dict[str, dg.AssetCheckSpec]
) -> None:
    at_night = {
        f"{key.asset_key.to_user_string()}.{key.name}" for key in (*CONTRACT_CHECKS, *NIGHTLY_CHECKS, *ARCHIVE_CHECKS)
    }
    assert not {name for name, spec in checks.items() if spec.blocking} & at_night
    jobs = shape(definitions, nodes, checks)["jobs"]
    made_here = {name for name, node in nodes.items() if node.is_materializable}
    for job, absent in LEFT_OUT.items():
        assert made_here - set(jobs[job]["assets"]) == absent
    assert set(jobs[NIGHTLY_JOB]["checks"]) == checks.keys()
    assert checks.keys() - set(jobs[PIPELINE_JOB]["checks"]) == at_night


def test_every_job_runs_in_one_process_and_everything_that_ticks_is_on(
    definitions: dg.Definitions, nodes: dict[str, Any], checks: dict[str, dg.AssetCheckSpec]
) -> None:
    found = shape(definitions, nodes, checks)
    assert {job["executor"] for job in found["jobs"].values()} == {"in_process"}
    assert found["sensors"]
    assert found["schedules"]
    for ticking in (*found["sensors"].values(), *found["schedules"].values()):
        assert ticking["status"] == "RUNNING"


def test_every_asset_says_what_it_is_whose_and_where(nodes: dict[str, Any]) -> None:
    for name, node in nodes.items():
        assert node.group_name in GROUPS, name
        first_sentence = (node.description or "").split("\n\n")[0]
        assert len(first_sentence) > 40, f"{name} is described by {first_sentence!r}"
        assert node.description.strip().endswith("."), name
        assert node.owners, name
        assert all(owner.startswith("team:") for owner in node.owners), name
        assert node.kinds, name
        assert node.tags[TEMPO_TAG], name


def test_every_asset_shows_its_columns_and_each_column_what_it_means(nodes: dict[str, Any]) -> None:
    for name, node in nodes.items():
        if name in NO_TABLE:
            continue
        assert node.metadata["dagster/table_name"].startswith("public."), name
        columns = node.metadata["dagster/column_schema"].columns
        assert columns, name
        for column in columns:
            assert column.type, (name, column.name)
            assert column.description, (name, column.name)
    assert idle_words() == []


def test_every_asset_made_here_names_its_code_by_version_and_place(nodes: dict[str, Any]) -> None:
    made_here = {name: node for name, node in nodes.items() if node.is_materializable}
    models = load_models().models
    for name, node in made_here.items():
        (reference,) = node.metadata["dagster/code_references"].code_references
        path = Path(reference.file_path)
        assert path.parent.name == node.group_name, name
        if name in models:
            continue
        assert node.code_version == code_version(str(path.parent)), name
        # The line is that of the function: name or decorator.
        lines = path.read_text("utf-8").splitlines()[reference.line_number - 1 :]
        head = next(line for line in lines if line.lstrip().startswith("def "))
        assert f"def {reference.label}(" in head, name


def test_a_room_has_another_code_version_when_a_file_of_it_changes(tmp_path: Path) -> None:
    def version(text: str, file: str = "a.py") -> str:
        code_version.cache_clear()
        (tmp_path / file).write_text(text)
        return code_version(str(tmp_path))

    first = version("x = 1")
    assert version("x = 1") == first
    assert version("x = 2") != first
    assert version("x = 1") == first
    assert version("floor: 0.9", "policies.yaml") != first
    code_version.cache_clear()


def test_what_somebody_waits_for_has_an_age_at_which_its_badge_warns_and_fails(nodes: dict[str, Any]) -> None:
    by_hand = {name for name, tempo in TEMPOS.items() if tempo.name == "by_hand"}
    assert TEMPOS.keys() <= nodes.keys()
    for name, node in nodes.items():
        found = windows(node)
        if name in by_hand:
            assert found is None, name
        else:
            assert found is not None, name
            warn, fail = found
            assert 1 <= warn < fail, name
    # The badge of the log is red exactly when the gate on its age no longer lets anything be promoted.
    assert windows(nodes["execution_telemetry"]) == [6, FRESH_WITHIN.total_seconds() / 3600]


def test_every_sql_model_shows_its_columns_its_sql_and_a_link_to_its_file(nodes: dict[str, Any]) -> None:
    for name, model in load_models().models.items():
        metadata = nodes[name].metadata
        columns = metadata["dagster/column_schema"].columns
        assert [column.name for column in columns] == list(model.columns)
        assert all(column.description for column in columns), name
        assert model.sql in metadata["sql"].value
        (reference,) = metadata["dagster/code_references"].code_references
        assert Path(reference.file_path).read_text("utf-8").find(model.sql[:40]) > 0
        assert metadata["dagster/table_name"] == f"public.{name}"
        assert nodes[name].code_version == model.content_hash[:12]


def test_the_graph_draws_every_read_of_a_model_except_those_that_would_close_a_circle(nodes: dict[str, Any]) -> None:
    for name, model in load_models().models.items():
        drawn = {key.to_user_string() for key in nodes[name].parent_keys}
        if name in (
            "rule_manifests",
            "deployments",
            "overdue_deployments",
            "appliance_drift",
        ):  # drawn downstream of what they list
            continue
        assert drawn == set(model.dependencies) - FEEDBACK, name


def test_checks_are_named_as_statements_and_described(checks: dict[str, dg.AssetCheckSpec]) -> None:
    for name, spec in checks.items():
        assert spec.description, name
        assert spec.description.endswith("."), name
        assert ("Required for promotion." in spec.description) == spec.blocking, name


def test_jobs_sensors_and_schedules_say_what_they_do(definitions: dg.Definitions) -> None:
    repository = definitions.get_repository_def()
    for job in repository.get_all_jobs():
        assert job.name.startswith("__") or job.description, job.name
    for ticking in (*repository.sensor_defs, *repository.schedule_defs):
        assert ticking.description, ticking.name


def test_runs_that_a_clock_or_a_person_starts_say_so_in_a_tag(definitions: dg.Definitions) -> None:
    repository = definitions.get_repository_def()
    for schedule in repository.schedule_defs:
        requests = schedule.evaluate_tick(
            dg.build_schedule_context(scheduled_execution_time=dt.datetime(2026, 2, 16, 3, 30, tzinfo=dt.UTC))
        ).run_requests
        assert [r.tags["flywheel/trigger"] for r in requests or ()] == ["nightly"], schedule.name
    human = [job for job in repository.get_all_jobs() if job.name.startswith("human_")]
    assert human
    for job in human:
        assert job.run_tags["flywheel/act"] == job.name.removeprefix("human_")
        assert job.run_tags["flywheel/trigger"] == "human_act"


def test_loading_the_code_location_imports_nothing_heavy_and_opens_no_connection() -> None:
    program = (
        "import json, socket, sys\n"
        "def refuse(*_): raise AssertionError('a connection at import')\n"
        "socket.socket.connect = refuse\n"
        "import flywheel_pipeline.definitions\n"
        "print(json.dumps(sorted(name.partition('.')[0] for name in sys.modules)))\n"
    )
    environment = {**os.environ, "FLYWHEEL_DATABASE_URL": "postgresql://nobody@127.0.0.1:1/none"}
    answer = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment, timeout=120
    )
    imported = set(json.loads(answer.stdout))
    assert "dagster" in imported
    heavy = {"great_expectations", "pandas", "numpy", "matplotlib", "pyarrow", "scipy", "alembic", "typer", "rich"}
    assert not heavy & imported
