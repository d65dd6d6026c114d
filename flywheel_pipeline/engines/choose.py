"""Which engine computes: by the run's config or the command line, else by FLYWHEEL_ENGINE.

Belongs here: from a name to a computation that is ready to use. Does not belong here: any engine; none is imported before it
is chosen.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from flywheel_pipeline.database.settings import Settings, get_settings
from flywheel_pipeline.errors import UsageError

if TYPE_CHECKING:
    import dagster as dg

    from flywheel_pipeline.engines.job import ComputeEngine
    from flywheel_pipeline.engines.spark import Launcher
    from flywheel_pipeline.engines.work import Computation
    from flywheel_pipeline.sql_models.loader import ModelGraph

ENGINES = ("postgres", "duckdb", "spark")


def chosen_computation(
    name: str | None = None, *, settings: Settings | None = None, launcher: Launcher | None = None
) -> Computation | None:
    """Return the computation by this engine over the archive of the settings; None: PostgreSQL computes.

    Args:
        name: the engine; None takes that of the settings.
        settings: None reads the environment.
        launcher: how the driver of Spark is started; None: as a process of this one.

    Raises:
        UsageError: there is no engine of that name.
        ArchiveUrlRefused: the settings' archive cannot be used.
    """
    settings = settings or get_settings()
    name = name or settings.engine
    if name not in ENGINES:
        raise UsageError(f"There is no engine {name!r}.", hint=f"Choose one of {', '.join(ENGINES)}.")
    if name == "postgres":
        return None
    from flywheel_pipeline.archive.configured import configured_archive
    from flywheel_pipeline.engines.work import Computation

    return Computation(_engine(name, settings, launcher), configured_archive(settings))


def refuse_unportable(graph: ModelGraph) -> None:
    """Refuse the models at load where the settings name an engine that cannot compute them faithfully.

    Raises:
        NotPortable: naming the model and the construct.
    """
    name = get_settings().engine
    if name != "postgres":
        from flywheel_pipeline.engines.plan import build_plan

        build_plan(graph, name)


def _engine(name: str, settings: Settings, launcher: Launcher | None) -> ComputeEngine:
    if name == "duckdb":
        from flywheel_pipeline.engines.duck import DuckEngine

        return DuckEngine()
    from flywheel_pipeline.engines.spark import SparkEngine

    if launcher is None:
        return SparkEngine(settings.spark_master)
    # Not public, and what the public client raises where its process fails; the pin on dagster is exact.
    from dagster._core.errors import DagsterPipesExecutionError

    return SparkEngine(settings.spark_master, launcher, (DagsterPipesExecutionError,))


def pipes_launcher(context: dg.AssetExecutionContext) -> Launcher:
    """Return a launcher that starts the driver of Spark through Dagster Pipes: its lines stand in the run's log."""

    def launch(command: Sequence[str]) -> None:
        import dagster as dg

        with warnings.catch_warnings():
            # The client itself reads a property that is in preview; our pin on dagster is exact, so it cannot change.
            warnings.simplefilter("ignore", dg.PreviewWarning)
            dg.PipesSubprocessClient().run(context=context, command=list(command))

    return launch
