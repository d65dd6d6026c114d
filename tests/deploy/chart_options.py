"""The options of Dagster's Helm chart that our values use, as the chart documents them, and how values are held against them.

The chart cannot be fetched here; these are the names in its `values.yaml` and in the models that its `values.schema.json`
is made from (dagster-io/dagster, helm/dagster, read in November 2026). `ANY` stands for what the chart passes on as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

ANY: Any = object()
TEXT, WHOLE, YES_NO = (str,), (int,), (bool,)
IMAGE = {"repository": TEXT, "tag": TEXT, "pullPolicy": ("Always", "IfNotPresent", "Never")}
SECRETS = [{"name": TEXT}]
PLACED: dict[str, Any] = {
    "image": IMAGE,
    "env": [{"name": TEXT, "value": TEXT}],
    "envConfigMaps": SECRETS,
    "envSecrets": SECRETS,
    "podSecurityContext": ANY,
    "securityContext": ANY,
    "resources": {"requests": ANY, "limits": ANY},
    "nodeSelector": ANY,
    "affinity": ANY,
    "tolerations": ANY,
    "annotations": ANY,
    "labels": ANY,
    "volumes": ANY,
    "volumeMounts": ANY,
}
PURGE = {"purgeAfterDays": ANY}
THREADS = {"useThreads": YES_NO, "numWorkers": WHOLE, "numSubmitWorkers": WHOLE}
CHART: dict[str, Any] = {
    "global": {"postgresqlSecretName": TEXT, "dagsterHome": TEXT, "serviceAccountName": TEXT},
    "generatePostgresqlPasswordSecret": YES_NO,
    "generateCeleryConfigSecret": YES_NO,
    "postgresql": {
        "enabled": YES_NO,
        "postgresqlScheme": TEXT,
        "postgresqlHost": TEXT,
        "postgresqlUsername": TEXT,
        "postgresqlPassword": TEXT,
        "postgresqlDatabase": TEXT,
        "postgresqlParams": ANY,
        "service": {"port": WHOLE},
    },
    "dagsterWebserver": {
        **PLACED,
        "replicaCount": WHOLE,
        "service": {"type": TEXT, "port": WHOLE, "annotations": ANY},
        "enableReadOnly": YES_NO,
        "pathPrefix": TEXT,
    },
    "dagster-user-deployments": {
        "enabled": YES_NO,
        "enableSubchart": YES_NO,
        "deployments": [
            {
                **PLACED,
                "name": TEXT,
                "port": WHOLE,
                "dagsterApiGrpcArgs": [TEXT],
                "includeConfigInLaunchedRuns": {"enabled": YES_NO},
            }
        ],
    },
    "runLauncher": {
        "type": ("K8sRunLauncher", "CeleryK8sRunLauncher", "CustomRunLauncher"),
        "config": {
            "k8sRunLauncher": {
                "image": IMAGE,
                "imagePullPolicy": ("Always", "IfNotPresent", "Never"),
                "jobNamespace": TEXT,
                "loadInclusterConfig": YES_NO,
                "envConfigMaps": SECRETS,
                "envSecrets": SECRETS,
                "envVars": [TEXT],
                "labels": ANY,
                "failPodOnRunFailure": YES_NO,
            }
        },
    },
    "dagsterDaemon": {
        **PLACED,
        "enabled": YES_NO,
        "heartbeatTolerance": WHOLE,
        "runCoordinator": {
            "enabled": YES_NO,
            "type": ("QueuedRunCoordinator", "CustomRunCoordinator"),
            "config": {
                "queuedRunCoordinator": {
                    "maxConcurrentRuns": WHOLE,
                    "dequeueIntervalSeconds": WHOLE,
                    "dequeueNumWorkers": WHOLE,
                    "dequeueUseThreads": YES_NO,
                    "tagConcurrencyLimits": [{"key": TEXT, "limit": WHOLE, "value": ANY}],
                }
            },
        },
        "runMonitoring": ANY,
        "runRetries": ANY,
        "sensors": THREADS,
        "schedules": THREADS,
    },
    "retention": {"enabled": YES_NO, "sensor": PURGE, "schedule": PURGE, "autoMaterialize": PURGE},
    "additionalInstanceConfig": ANY,
    "computeLogManager": {"type": TEXT, "config": ANY},
    "telemetry": {"enabled": YES_NO},
    "rabbitmq": {"enabled": YES_NO},
    "redis": {"enabled": YES_NO},
    "flower": {"enabled": YES_NO},
}


def misfits(values: Any, options: Any = CHART, path: str = "values") -> Iterator[str]:
    """Name every value for which the chart has no option, or one of another kind."""
    if options is ANY:
        return
    if isinstance(options, dict):
        if not isinstance(values, dict):
            yield f"{path} is no mapping"
            return
        for key, value in values.items():
            if key not in options:
                yield f"{path}.{key}: the chart has no such option"
            else:
                yield from misfits(value, options[key], f"{path}.{key}")
    elif isinstance(options, list):
        if not isinstance(values, list):
            yield f"{path} is no list"
            return
        for number, value in enumerate(values):
            yield from misfits(value, options[0], f"{path}[{number}]")
    elif isinstance(options[0], str):
        if values not in options:
            yield f"{path} is {values!r}, none of {', '.join(options)}"
    elif type(values) is not options[0]:
        yield f"{path} is {values!r}, no {options[0].__name__}"
