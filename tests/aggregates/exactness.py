"""Is every table exact? Asked three ways: plain Python, the models' own SELECTs over everything, the recount check.

Belongs here: the comparison and its message. Does not belong here: the recomputation (`plain_recount.py`).
"""

from __future__ import annotations

import functools

import plain_recount
import sqlalchemy as sa

from flywheel_pipeline.aggregates.recount import recount
from flywheel_pipeline.sql_models.loader import ModelGraph, load_models
from flywheel_pipeline.sql_models.relations import execute


@functools.cache
def graph() -> ModelGraph:
    """The models, read once per process."""
    return load_models()


def differences_from_models(connection: sa.Connection) -> dict[str, int]:
    """Rows in which a cell table and its model's own SELECT, run over everything, differ; by model, none if equal."""
    found = {}
    for model in graph():
        if model.materialized == "cell":
            columns = ", ".join(model.columns)
            live = "WHERE day NOT IN (SELECT day FROM sealed_days)" if "day" in model.key else ""
            rows = execute(
                connection,
                f"WITH computed AS ({model.sql}), kept AS (SELECT {columns} FROM public.{model.name} {live}) "
                f"SELECT count(*) FROM ((SELECT {columns} FROM computed EXCEPT ALL TABLE kept) "
                f"UNION ALL (TABLE kept EXCEPT ALL SELECT {columns} FROM computed)) d",
            ).scalar_one()
            if rows:
                found[model.name] = rows
    return found


def differences_from_python(connection: sa.Connection) -> dict[str, dict[str, object]]:
    """The first differences from the plain Python recomputation, by table; none if equal."""
    found: dict[str, dict[str, object]] = {}
    for name, wanted in plain_recount.expected(connection).items():
        kept = plain_recount.stored(connection, name, plain_recount.VALUES[name])
        if kept != wanted:
            keys = [key for key in {**kept, **wanted} if kept.get(key) != wanted.get(key)]
            found[name] = {str(key): {"kept": kept.get(key), "recounted": wanted.get(key)} for key in keys[:3]}
    return found


def assert_exact(engine: sa.Engine, *, python: bool = True) -> None:
    """Every table equals its recomputation; the outbox is empty, so nothing excuses a difference."""
    with engine.begin() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM touched_cells").scalar_one() == 0
        assert differences_from_models(connection) == {}
        if python:
            assert differences_from_python(connection) == {}
    counted = recount(engine)
    assert (counted.differences, counted.offenders) == (0, ())
