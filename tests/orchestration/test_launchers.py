"""Launcher and executor by configuration: what dagster.yaml says, what loads, what is refused, and what stays unloaded."""

from __future__ import annotations

import subprocess
import sys
import uuid
from pathlib import Path

import dagster as dg
import kubernetes_validate
import pytest
import sqlalchemy as sa
import yaml
from dagster._config import process_config, validate_config

from flywheel_pipeline.build import build_defs
from flywheel_pipeline.database.dagster_home import dagster_environment, instance_config, write_dagster_home
from flywheel_pipeline.database.settings import Settings
from flywheel_pipeline.errors import UsageError
from flywheel_pipeline.orchestration import celery_app
from flywheel_pipeline.orchestration.executors import chosen_executor
from flywheel_pipeline.orchestration.nodes import node_command
from flywheel_pipeline.serve import write_workspace

BROKER = "redis://:s3cr3t@redis:6379/0"
IMAGE = "registry.example/flywheel:0.1.0"


def settings(home: Path, **given: object) -> Settings:
    return Settings(home=home, **given)  # type: ignore[arg-type]


def test_one_host_has_no_queue_and_dagsters_own_launcher(tmp_path: Path) -> None:
    said = instance_config(settings(tmp_path))
    assert "run_launcher" not in said
    assert said["run_coordinator"]["class"] == "DefaultRunCoordinator"
    assert said["run_monitoring"]["poll_interval_seconds"] == 30


def test_celery_loads_watches_its_workers_and_leaves_a_slot_to_the_minute_path(
    engine: sa.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = settings(tmp_path, run_launcher="celery", celery_broker_url=BROKER, run_slots=5)
    home = write_dagster_home(chosen, engine.url)
    assert "s3cr3t" not in (home / "dagster.yaml").read_text()
    for name, value in dagster_environment(chosen, engine.url).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FLYWHEEL_CELERY_BROKER_URL", BROKER)
    with dg.DagsterInstance.from_config(str(home)) as instance:
        launcher = instance.run_launcher
        assert type(launcher).__name__ == "WatchedCeleryRunLauncher"
        assert launcher.supports_check_run_worker_health
        assert launcher.celery.conf.worker_disable_prefetch
        assert launcher.celery.conf.broker_url == BROKER
        queue = instance.get_concurrency_config().run_queue_config
        assert queue is not None
        assert queue.max_concurrent_runs == 5
        assert [dict(limit) for limit in queue.tag_concurrency_limits] == [{"key": "dagster/backfill", "limit": 4}]
        assert instance.run_monitoring_max_resume_run_attempts == 0
        assert instance.run_retries_enabled
        # Half a minute for the poll, the lock of a host that is gone, and the pings.
        assert instance.run_monitoring_poll_interval_seconds == 5


def test_launcher_and_worker_speak_of_one_application(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLYWHEEL_CELERY_BROKER_URL", BROKER)
    made = celery_app.app
    assert "execute_job" in made.tasks
    assert made.conf.worker_disable_prefetch
    assert made.conf.worker_max_tasks_per_child == 1
    assert made.conf.task_default_queue == celery_app.QUEUE
    monkeypatch.delenv("FLYWHEEL_CELERY_BROKER_URL")
    with pytest.raises(UsageError, match="FLYWHEEL_CELERY_BROKER_URL"):
        celery_app.make_application()


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ({"run_launcher": "celery"}, "FLYWHEEL_CELERY_BROKER_URL is not set"),
        ({"run_launcher": "k8s"}, "FLYWHEEL_K8S_IMAGE is not set"),
        (
            {"run_launcher": "celery", "celery_broker_url": BROKER, "executor": "multiprocess"},
            "may start no others",
        ),
    ],
)
def test_a_launcher_without_what_it_needs_is_refused(tmp_path: Path, given: dict[str, str], missing: str) -> None:
    with pytest.raises(UsageError, match=missing):
        write_dagster_home(settings(tmp_path, **given), sa.make_url("postgresql+psycopg://host/db"))
    assert not (tmp_path / "dagster" / "dagster.yaml").exists()


def test_a_worker_is_refused_where_celery_is_not_the_launcher_and_an_unknown_part_everywhere(tmp_path: Path) -> None:
    for part, reason in (("worker", "FLYWHEEL_RUN_LAUNCHER is default"), ("demon", "no part 'demon'")):
        with pytest.raises(UsageError, match=reason):
            node_command(settings(tmp_path), part, tmp_path / "workspace.yaml", concurrency=1, name="w")


def test_the_minute_path_stays_in_one_process_and_backfills_go_where_the_setting_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FLYWHEEL_EXECUTOR", "multiprocess")
    defs = build_defs()
    found = {name: defs.resolve_job_def(name).executor_def.name for name in ("pipeline", "pipeline_nightly")}
    assert set(found.values()) == {"in_process"}
    assert defs.resolve_job_def("backfill_days").executor_def.name == "multiprocess"
    monkeypatch.setenv("FLYWHEEL_EXECUTOR", "k8s")
    assert chosen_executor().name == "k8s"
    monkeypatch.setenv("FLYWHEEL_EXECUTOR", "threads")
    with pytest.raises(UsageError, match="FLYWHEEL_EXECUTOR"):
        chosen_executor()


def test_ui_and_daemon_ask_a_code_server_where_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "dagster").mkdir()
    near = yaml.safe_load(write_workspace(settings(tmp_path)).read_text())
    assert near["load_from"][0]["python_module"]["module_name"] == "flywheel_pipeline.definitions"
    far = yaml.safe_load(write_workspace(settings(tmp_path, code_server="code:4000")).read_text())
    assert far["load_from"] == [{"grpc_server": {"host": "code", "port": 4000, "location_name": "flywheel"}}]


def test_the_job_that_the_cluster_would_be_given_is_valid_kubernetes(tmp_path: Path) -> None:
    """Validated, not run: there is no cluster here."""
    from dagster_k8s import K8sRunLauncher
    from dagster_k8s.client import DagsterKubernetesClient
    from dagster_k8s.job import construct_dagster_k8s_job, get_job_name_from_run_id

    said = instance_config(settings(tmp_path, run_launcher="k8s", k8s_image=IMAGE))["run_launcher"]
    processed = process_config(K8sRunLauncher.config_type(), said["config"])
    assert processed.success, processed.errors
    kubeconfig = tmp_path / "kubeconfig"
    cluster = {"name": "c", "cluster": {"server": "https://127.0.0.1:1"}}
    context = {"name": "c", "context": {"cluster": "c", "user": "u"}}
    users = [{"name": "u", "user": {}}]
    kubeconfig.write_text(
        yaml.safe_dump(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "clusters": [cluster],
                "contexts": [context],
                "users": users,
                "current-context": "c",
            }
        )
    )
    launcher = K8sRunLauncher(**{**processed.value, "load_incluster_config": False, "kubeconfig_file": str(kubeconfig)})
    assert isinstance(launcher._api_client, DagsterKubernetesClient)
    run = dg.DagsterRun(job_name="backfill_days", run_id=str(uuid.uuid4()))
    context_of_run = launcher.get_container_context_for_run(run)
    job = construct_dagster_k8s_job(
        job_config=context_of_run.get_k8s_job_config(IMAGE, launcher),
        user_defined_k8s_config=context_of_run.run_k8s_config,
        args=["dagster", "api", "execute_run", "{}"],
        job_name=get_job_name_from_run_id(run.run_id),
        pod_name=get_job_name_from_run_id(run.run_id),
        component="run_worker",
    )
    document = launcher._api_client.batch_api.api_client.sanitize_for_serialization(job)
    kubernetes_validate.validate(document, "1.33", strict=True)
    (container,) = document["spec"]["template"]["spec"]["containers"]
    assert container["image"] == IMAGE
    assert {"secretRef": {"name": "flywheel"}} in container["envFrom"]
    assert document["spec"]["backoffLimit"] == 0, "retries are Dagster's, once"


def test_an_option_that_the_launcher_does_not_have_is_found(tmp_path: Path) -> None:
    """The validation above can fail."""
    from dagster_k8s import K8sRunLauncher

    said = instance_config(settings(tmp_path, run_launcher="k8s", k8s_image=IMAGE))["run_launcher"]["config"]
    assert not validate_config(dg.Shape(K8sRunLauncher.config_type()), {**said, "jobImage": IMAGE}).success


def test_one_host_loads_nothing_of_several() -> None:
    seen = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, flywheel_pipeline.definitions, flywheel_pipeline.cli; "
            "print(*sorted({'celery', 'dagster_celery', 'dagster_k8s', 'kubernetes', 'redis'} & set(sys.modules)))",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert seen.stdout.split() == []
