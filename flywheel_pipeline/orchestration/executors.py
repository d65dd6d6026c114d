"""The executor by configuration: where the steps of a run are executed.

The minute path (`pipeline`, `pipeline_nightly`) is always one process: its steps hand on what they found in it, and the
run's sign of life is that process's. FLYWHEEL_EXECUTOR is for the other assets' runs, backfills above all.
"""

from __future__ import annotations

import dagster as dg

from flywheel_pipeline.database.settings import Settings, get_settings
from flywheel_pipeline.errors import UsageError


def chosen_executor(settings: Settings | None = None) -> dg.ExecutorDefinition:
    """Return the executor that FLYWHEEL_EXECUTOR names; `in_process` unless it says otherwise.

    Raises:
        UsageError: `k8s` without the extra of that name.
    """
    name = (settings or get_settings()).executor
    if name == "multiprocess":
        return dg.multiprocess_executor
    if name == "k8s":
        try:
            from dagster_k8s import k8s_job_executor
        except ModuleNotFoundError as error:
            raise UsageError(
                "FLYWHEEL_EXECUTOR is k8s, and dagster-k8s is not installed.",
                hint="Install the extra: pip install 'flywheel-pipeline[k8s]', or unset FLYWHEEL_EXECUTOR.",
            ) from error
        return k8s_job_executor
    return dg.in_process_executor
