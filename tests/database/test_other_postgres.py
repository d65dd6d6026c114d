"""Any PostgreSQL of version 15 or later by URL: the oldest one that this machine has."""

from __future__ import annotations

import old_system
import pytest
import sqlalchemy as sa

from flywheel_pipeline.database import adopt, migrate
from flywheel_pipeline.database.engine import open_engine
from flywheel_pipeline.errors import DatabaseUnavailable


def test_upgrade_twice_and_check_on_another_postgresql(url: str) -> None:
    engine = open_engine(url)
    assert migrate.upgrade(engine).changes != ()
    assert migrate.upgrade(engine).changes == ()
    assert migrate.check(engine) == []
    with engine.begin() as connection:
        connection.execute(
            sa.text(
                "INSERT INTO execution_telemetry (execution_id, site_id, runbook_id, hostname, success) "
                "VALUES ('e1', 's1', 'L1-FIREWALL-001', 'ws01', true)"
            )
        )
        assert connection.execute(sa.text("SELECT count(*) FROM touched_cells")).scalar_one() == 1
    engine.dispose()


@pytest.mark.long
def test_an_adoption_and_its_undo_on_another_postgresql(url: str) -> None:
    postgres = open_engine(url).execution_options(isolation_level="AUTOCOMMIT")
    with postgres.connect() as connection:
        connection.exec_driver_sql("CREATE DATABASE old_system")
    postgres.dispose()
    engine = open_engine(postgres.url.set(database="old_system"))
    old_system.make(engine)
    catalog, contents = old_system.fingerprint(engine), old_system.contents(engine)
    adopt.apply(engine, actor="Dana", reason="the pilot is over")
    assert migrate.check(engine) == []
    with engine.connect() as connection:
        rates = "SELECT max(success_rate) FROM rule_rates"  # the view, with an index on what it reads, was made again
        assert connection.exec_driver_sql(rates).scalar_one() <= 1
    adopt.undo(engine)
    after = old_system.fingerprint(engine)
    for kind in catalog.keys() - {"columns"}:  # before PostgreSQL 17 a computed column comes back as the last one
        assert after[kind] == catalog[kind], kind
    assert [fact[:-1] for fact in after["columns"]] == [fact[:-1] for fact in catalog["columns"]]
    assert old_system.contents(engine) == contents
    engine.dispose()


def test_a_wrong_password_is_refused_without_showing_it(url: str) -> None:
    with pytest.raises(DatabaseUnavailable, match="password authentication failed") as refusal:
        open_engine(url.replace("p%40ss", "guess"))
    assert "guess" not in str(refusal.value)
