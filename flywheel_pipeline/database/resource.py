"""The database as a Dagster resource: one engine per process and URL."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from functools import lru_cache

import dagster as dg
import sqlalchemy as sa

from flywheel_pipeline.database.engine import open_engine, resolve_url
from flywheel_pipeline.database.life import sign_of_life
from flywheel_pipeline.errors import DatabaseUnavailable


@lru_cache(maxsize=8)
def _engine(url: str) -> sa.Engine:
    return open_engine(url)


class FlywheelDatabase(dg.ConfigurableResource["FlywheelDatabase"]):
    """PostgreSQL that holds all of Flywheel's state.

    `url` empty: FLYWHEEL_DATABASE_URL, or the embedded server under FLYWHEEL_HOME, started if need be. In a run it also
    gives the run's sign of life, by which the sensor tells a run at work from one whose process was killed.
    """

    url: str = ""

    @property
    def engine(self) -> sa.Engine:
        """The engine of this process for this URL; connections are in UTC."""
        url = self.url or resolve_url().render_as_string(hide_password=False)
        return _engine(url)

    @contextmanager
    def yield_for_execution(self, context: dg.InitResourceContext) -> Generator[FlywheelDatabase, None, None]:
        """Give the run's sign of life while the resource is in use; outside a run there is none to give."""
        with ExitStack() as stack:
            if context.run is not None:
                try:
                    stack.enter_context(sign_of_life(self.engine, context.run.run_id))
                except (DatabaseUnavailable, sa.exc.OperationalError) as error:
                    # The first step says it in its own words; a resource that fails names no step.
                    if context.log is not None:
                        context.log.warning(f"This run gives no sign of life: {str(error).splitlines()[0]}")
            yield self
