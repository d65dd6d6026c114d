"""The database as a Dagster resource: one engine per process and URL."""

from __future__ import annotations

from functools import lru_cache

import dagster as dg
import sqlalchemy as sa

from flywheel_pipeline.database.engine import open_engine, resolve_url


@lru_cache(maxsize=8)
def _engine(url: str) -> sa.Engine:
    return open_engine(url)


class FlywheelDatabase(dg.ConfigurableResource["FlywheelDatabase"]):
    """PostgreSQL that holds all of Flywheel's state.

    `url` empty: FLYWHEEL_DATABASE_URL, or the embedded server under FLYWHEEL_HOME, started if need be.
    """

    url: str = ""

    @property
    def engine(self) -> sa.Engine:
        """The engine of this process for this URL; connections are in UTC."""
        url = self.url or resolve_url().render_as_string(hide_password=False)
        return _engine(url)
