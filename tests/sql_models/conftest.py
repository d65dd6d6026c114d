"""A folder for small models, and a database with tables and routines but no models.

Belongs here: fixtures of this room. Does not belong here: assertions.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import sqlalchemy as sa
from model_folder import ModelFolder

from flywheel_pipeline.database import declared
from flywheel_pipeline.database.tables import metadata


@pytest.fixture
def folder(tmp_path: Path) -> ModelFolder:
    """An empty folder of models."""
    root = tmp_path / "models"
    root.mkdir()
    return ModelFolder(root)


@pytest.fixture
def bare_engine(empty_engine: sa.Engine) -> sa.Engine:
    """A database with the declared tables and routines, without any model."""
    with empty_engine.begin() as connection:
        metadata.create_all(connection)
        for routine in declared.routines():
            declared.execute_routine(connection, routine)
    return empty_engine
