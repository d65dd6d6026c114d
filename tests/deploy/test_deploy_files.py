"""The files in deploy/: valid against the schemas there are, without secrets, and naming only what exists.

Nothing here was run: there is no container engine and no cluster on the machines of the tests. What can be known without
them is checked.
"""

from __future__ import annotations

import copy
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import typer
import yaml
from chart_options import misfits

from flywheel_pipeline import __version__
from flywheel_pipeline.cli.app import app
from flywheel_pipeline.database.dagster_home import instance_config
from flywheel_pipeline.database.settings import Settings
from flywheel_pipeline.orchestration.nodes import PARTS

REPOSITORY = Path(__file__).parents[2]
DEPLOY = REPOSITORY / "deploy"
FILES = sorted(path for path in DEPLOY.rglob("*") if path.is_file())
TEXTS = {path.relative_to(DEPLOY).as_posix(): path.read_text("utf-8") for path in FILES}
KUBERNETES = [
    (name, number)
    for name, text in TEXTS.items()
    if name.startswith("kubernetes/")
    for number, _ in enumerate(yaml.safe_load_all(text))
]
VERSIONS = ("1.30", "1.33", "1.36")


def compose() -> dict[str, Any]:
    return yaml.safe_load(TEXTS["compose.yaml"])


def values() -> dict[str, Any]:
    return yaml.safe_load(TEXTS["helm/values.yaml"])


def document(name: str, number: int) -> dict[str, Any]:
    return list(yaml.safe_load_all(TEXTS[name]))[number]


def walk(value: Any) -> Iterator[tuple[str, Any]]:
    """Every (key, value) below, lists and mappings alike."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield str(key), child
        yield from walk(child)


# -- Kubernetes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("name", "number"), KUBERNETES)
def test_every_manifest_is_valid_kubernetes_in_the_strict_sense(name: str, number: int, version: str) -> None:
    kubernetes_validate.validate(document(name, number), version, strict=True)


def test_a_manifest_with_a_misspelt_field_is_refused() -> None:
    """The validation above can fail."""
    wrong = document("kubernetes/agent-api.yaml", 1)
    wrong["spec"]["replica"] = wrong["spec"].pop("replicas")
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, VERSIONS[-1], strict=True)


@pytest.mark.parametrize(("name", "number"), KUBERNETES)
def test_every_pod_is_unprivileged_and_takes_its_secrets_by_name(name: str, number: int) -> None:
    pods = [child for key, child in walk(document(name, number)) if key == "template"]
    for pod in pods:
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
        assert pod["spec"]["automountServiceAccountToken"] is False
        for container in pod["spec"]["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["readOnlyRootFilesystem"] is True
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["limits"]["memory"]
            assert [source["secretRef"]["name"] for source in container["envFrom"]]


def test_a_service_finds_its_pods() -> None:
    _, deployment, service, budget = yaml.safe_load_all(TEXTS["kubernetes/agent-api.yaml"])
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    for selector in (
        service["spec"]["selector"],
        budget["spec"]["selector"]["matchLabels"],
        deployment["spec"]["selector"]["matchLabels"],
    ):
        assert selector.items() <= labels.items()
    ports = {port["name"] for port in deployment["spec"]["template"]["spec"]["containers"][0]["ports"]}
    assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports
    assert budget["spec"]["minAvailable"] < deployment["spec"]["replicas"]


# -- Helm ----------------------------------------------------------------------------------------------------------


def test_the_chart_has_an_option_for_every_value() -> None:
    assert list(misfits(values())) == []


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("dagsterDaemon", "replicaCount"), 2, "dagsterDaemon.replicaCount: the chart has no such option"),
        (("postgresql", "service", "port"), "5432", "is '5432', no int"),
        (("runLauncher", "type"), "CeleryRunLauncher", "none of K8sRunLauncher"),
        (("dagsterWebserver", "envSecrets"), {"name": "x"}, "is no list"),
    ],
)
def test_a_value_that_the_chart_does_not_know_is_named(path: tuple[str, ...], value: object, said: str) -> None:
    wrong = copy.deepcopy(values())
    place = wrong
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    assert [problem for problem in misfits(wrong) if said in problem]


def test_the_chart_is_told_what_our_own_dagster_yaml_says(tmp_path: Path) -> None:
    said = instance_config(Settings(home=tmp_path, run_launcher="k8s", k8s_image="x:1", run_slots=4))
    told = values()
    more = told["additionalInstanceConfig"]
    assert {key: said[key] for key in more} == more
    queue = told["dagsterDaemon"]["runCoordinator"]["config"]["queuedRunCoordinator"]
    ours = said["run_coordinator"]["config"]
    assert (queue["maxConcurrentRuns"], queue["dequeueIntervalSeconds"], queue["tagConcurrencyLimits"]) == (
        ours["max_concurrent_runs"],
        ours["dequeue_interval_seconds"],
        ours["tag_concurrency_limits"],
    )
    assert told["retention"]["sensor"]["purgeAfterDays"] == said["retention"]["sensor"]["purge_after_days"]
    assert told["retention"]["schedule"]["purgeAfterDays"] == said["retention"]["schedule"]["purge_after_days"]
    assert told["dagsterDaemon"]["sensors"] == {"useThreads": True, "numWorkers": said["sensors"]["num_workers"]}
    assert told["telemetry"]["enabled"] is said["telemetry"]["enabled"] is False
    # What the chart would write itself must not stand twice in one file.
    assert told["dagsterDaemon"]["runMonitoring"] == told["dagsterDaemon"]["runRetries"] == {"enabled": False}


# -- Compose -------------------------------------------------------------------------------------------------------


def test_every_service_waits_for_services_that_exist_and_mounts_volumes_that_exist() -> None:
    found = compose()
    for name, service in found["services"].items():
        waits = service.get("depends_on", {})
        assert set(waits) <= set(found["services"]), name
        for other, wanted in waits.items():
            if wanted["condition"] == "service_healthy":
                assert "healthcheck" in found["services"][other], f"{name} waits for the health of {other}"
        for volume in service.get("volumes", []):
            assert volume.partition(":")[0] in found["volumes"], name
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), f"{name} listens beyond this host: put a proxy with TLS before it"
        assert "image" in service, name
        assert not service.get("privileged"), name


def test_there_is_one_daemon_and_no_more_runs_than_workers_have_slots() -> None:
    services = compose()["services"]
    assert [name for name, service in services.items() if service["command"] == ["flywheel", "node", "daemon"]] == [
        "daemon"
    ]
    assert "replicas" not in services["daemon"].get("deploy", {})
    worker = services["worker"]
    concurrency = int(worker["command"][worker["command"].index("--concurrency") + 1])
    slots = int(worker["environment"]["FLYWHEEL_RUN_SLOTS"])
    assert slots <= concurrency * worker["deploy"]["replicas"]


def test_ours_run_as_nobody_in_particular_on_a_disk_they_cannot_write() -> None:
    for name, service in compose()["services"].items():
        if "build" in service:
            assert service["user"] == "10001:10001", name
            assert service["read_only"], name
            assert service["cap_drop"] == ["ALL"], name
            assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).samefile(
                DEPLOY / "Dockerfile"
            )


#: Settings that compose.yaml does not hand on, and why.
NOT_IN_COMPOSE = {
    "home": "the image says where it is",
    "prepare_statements": "there is no pooler",
    "ui_port": "as published",
    "api_port": "as published",
    "alert_rules": "a file: mount it, and name it",
    "executor": "with Celery a run is one process",
    "spark_master": "the image has no Java",
    **dict.fromkeys(
        ("k8s_image", "k8s_namespace", "k8s_service_account", "k8s_instance_config_map", "k8s_env_from"), "of clusters"
    ),
}


def test_compose_hands_on_every_setting_or_it_is_said_why_not() -> None:
    services = compose()["services"]
    given = {name for service in services.values() for name in service.get("environment", {})}
    settings = {name: f"FLYWHEEL_{name.upper()}" for name in Settings.model_fields}
    assert {name for name, variable in settings.items() if variable not in given} == set(NOT_IN_COMPOSE)
    # What decides how runs work reaches every part that executes them or lets people launch them.
    for part in ("code", "ui", "daemon", "worker"):
        for name in ("run_days", "engine", "archive_url", "archive_after_days"):
            assert settings[name] in services[part]["environment"], (part, name)
        assert {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"} <= set(services[part]["environment"])


def test_what_the_sizing_table_tells_to_set_can_be_set_by_compose() -> None:
    sizing = TEXTS["README.md"].partition("## Sizing")[2]
    named = set(re.findall(r"FLYWHEEL_[A-Z0-9_]+", sizing))
    assert "FLYWHEEL_RUN_DAYS" in named
    assert named <= set(compose()["services"]["worker"]["environment"])


def test_a_folder_that_a_service_mounts_is_made_by_the_image_for_its_user() -> None:
    made = " ".join(rest for word, rest in instructions() if word == "RUN" and "install -d" in rest).split()
    for service in compose()["services"].values():
        for volume in service["volumes"] if "build" in service else ():
            assert volume.split(":")[1] in made


# -- the image -----------------------------------------------------------------------------------------------------


def instructions() -> list[tuple[str, str]]:
    joined = re.sub(r"\\\n", " ", TEXTS["Dockerfile"])
    lines = [line for line in joined.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in lines]


def test_the_image_copies_what_exists_and_what_the_builder_is_given() -> None:
    given = {line[1:] for line in TEXTS["Dockerfile.dockerignore"].splitlines() if line.startswith("!")}
    copied = [shlex.split(rest)[:-1] for word, rest in instructions() if word == "COPY" and "--from" not in rest]
    sources = {source for line in copied for source in line}
    assert sources == given
    for source in sources:
        assert (REPOSITORY / source).exists(), source


def test_the_base_is_pinned_and_the_image_runs_as_somebody_unprivileged() -> None:
    words = instructions()
    (base,) = [rest for word, rest in words if word == "ARG"]
    assert re.fullmatch(r"PYTHON_IMAGE=docker\.io/library/python:3\.1[1-4]\.\d+-slim-[a-z]+", base)
    assert [rest.partition(" ")[0] for word, rest in words if word == "FROM"] == ["${PYTHON_IMAGE}", "${PYTHON_IMAGE}"]
    assert [rest for word, rest in words if word == "USER"] == ["10001:10001"]
    last = len(words) - 1 - [word for word, _ in reversed(words)].index("RUN")
    assert ("USER", "10001:10001") in words[last:], "nothing is done as root after it"
    assert not [rest for word, rest in words if word == "ADD" or "curl" in rest or "wget" in rest]
    assert sum("--require-hashes" in rest for _, rest in words) == 1


def test_the_lock_of_the_image_is_a_part_of_the_lock_of_everything() -> None:
    sys.path.insert(0, str(REPOSITORY / ".ci"))
    from audit import read_lock

    everything, _ = read_lock((REPOSITORY / "requirements-scale.lock").read_text("utf-8"))
    locked = {(pin.name, pin.version) for pin in everything}
    for name in ("requirements.lock", "build.lock"):
        pins, wrong = read_lock(TEXTS[name])
        assert wrong == []
        assert {(pin.name, pin.version) for pin in pins} <= locked
    image, _ = read_lock(TEXTS["requirements.lock"])
    names = {pin.name for pin in image}
    assert {"dagster", "dagster-celery", "dagster-k8s", "dagster-webserver", "duckdb", "psycopg", "s3fs"} <= names
    assert not names & {"pytest", "ruff", "mypy", "selenium", "pyspark", "moto", "uv"}


# -- all of it -----------------------------------------------------------------------------------------------------


def secrets_in(text: str) -> Iterator[str]:
    """What looks like a secret: a private key, a URL with a password, a variable or a manifest that is given one."""
    yield from re.findall(r"-----BEGIN [A-Z ]*PRIVATE KEY", text)
    for password in re.findall(r"\w+://[^\s:@/]*:([^\s@/]+)@", text):
        if not re.fullmatch(r"…|\$\{?\w+.*|password", password):
            yield password
    for key, value in re.findall(
        r"(?m)^\s*-?\s*([A-Z_]*(?:PASSWORD|TOKEN|SECRET|URLS)[A-Z_]*)[ \t]*[:=][ \t]*(\S.*)$", text
    ):
        if not value.startswith(("${", "…")):
            yield f"{key}={value}"
    yield from re.findall(r"kind: Secret|postgresqlPassword:.*", text)


@pytest.mark.parametrize("name", TEXTS)
def test_no_file_holds_a_secret(name: str) -> None:
    assert list(secrets_in(TEXTS[name])) == []


@pytest.mark.parametrize(
    "planted",
    [
        "FLYWHEEL_DATABASE_URL: postgresql://flywheel:hunter2@postgres/flywheel",
        "      POSTGRES_PASSWORD: hunter2",
        "kind: Secret",
        "-----BEGIN RSA PRIVATE KEY-----",
        "  postgresqlPassword: hunter2",
    ],
)
def test_a_planted_secret_is_found(planted: str) -> None:
    assert list(secrets_in(f"a: b\n{planted}\nc: d\n"))


def settings_named() -> set[str]:
    return {word for text in TEXTS.values() for word in re.findall(r"\bFLYWHEEL_[A-Z0-9_]+\b", text)}


def test_every_setting_that_is_named_exists() -> None:
    known = {f"FLYWHEEL_{name.upper()}" for name in Settings.model_fields}
    ours = known | {"FLYWHEEL_IMAGE", "FLYWHEEL_DAGSTER_URL"}  # compose's own variable; Dagster's URL, made from ours
    assert settings_named() - ours == set()
    assert {"FLYWHEEL_RUN_LAUNCHER", "FLYWHEEL_CELERY_BROKER_URL", "FLYWHEEL_CODE_SERVER"} <= settings_named()


def commands() -> Iterator[tuple[str, list[str]]]:
    for name, service in compose()["services"].items():
        if "build" in service:
            yield f"compose: {name}", service["command"]
    for name, number in KUBERNETES:
        for key, child in walk(document(name, number)):
            if key == "args":
                yield name, child


def test_every_command_that_a_container_runs_exists() -> None:
    root = typer.main.get_command(app)
    found = list(commands())
    assert len(found) >= 8
    # The chart and Dagster's launchers give whole commands as arguments, so the image may put nothing before them.
    assert not any(name == "ENTRYPOINT" for name, _ in instructions())
    for where, (program, *words) in found:
        assert program == "flywheel", where
        command: Any = root
        for word in words:
            if not hasattr(command, "commands"):
                break
            assert word in command.commands, f"{where}: {words}"
            command = command.commands[word]
        if words[0] == "node":
            assert words[1] in PARTS, where


def test_every_image_of_ours_is_of_this_release() -> None:
    said = re.findall(r"(?:registry\.example/flywheel|:-flywheel|-t flywheel):([\w.]+)", "\n".join(TEXTS.values()))
    said += re.findall(r"registry\.example/flywheel\n\s+tag: (\S+)", TEXTS["helm/values.yaml"])
    assert len(said) >= 8
    assert set(said) == {__version__}
    assert "upgrade-" + __version__.replace(".", "-") in TEXTS["kubernetes/migrations-job.yaml"]
