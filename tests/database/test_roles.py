"""Least privilege on a real server: each role does its work and nothing else, and an appliance's session sees one site."""

from __future__ import annotations

import datetime as dt
import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection, Engine

from flywheel_pipeline.database import migrate, roles
from flywheel_pipeline.database.dagster_home import make_dagster_storage
from flywheel_pipeline.database.engine import open_engine
from flywheel_pipeline.database.tables import metadata
from flywheel_pipeline.telemetry.intake import import_file, post_execution

NOW = dt.datetime(2026, 2, 15, 12, tzinfo=dt.UTC)
_numbers = itertools.count(1)

#: Tables that only the owner and the roles that read all may touch; a new table must be placed here or in GRANTS.
READ_ONLY_FOR_ALL = {
    "schema_objects",
    "adoption_journal",
    "required_gates",
    "rule_transitions",
    "execution_corrections",
    "evidence_bundles",
    "execution_telemetry",
    "sealed_days",
    "reject_purges",
}


def post(site: str = "site-a", appliance: str = "site-a-01", **fields: object) -> dict[str, object]:
    return {
        "site_id": site,
        "reported_at": NOW.isoformat(),
        "execution": {
            "execution_id": f"r-{next(_numbers):06d}",
            "appliance_id": appliance,
            "runbook_id": "L1-SSH-001",
            "hostname": "h1",
            "platform": "linux",
            "incident_type": "ssh_config",
            "success": True,
            "resolution_level": "L1",
            "started_at": (NOW - dt.timedelta(minutes=5)).isoformat(),
            **fields,
        },
    }


@contextmanager
def as_role(engine: Engine, role: str, **session: str) -> Iterator[Connection]:
    """A transaction under a role, with the settings of the agent API's sessions; rolled back."""
    with engine.connect() as connection, connection.begin() as transaction:
        connection.exec_driver_sql(f"SET LOCAL ROLE {role}")
        for name, value in session.items():
            connection.execute(
                sa.text("SELECT set_config(:name, :value, true)"), {"name": f"flywheel.{name}", "value": value}
            )
        yield connection
        transaction.rollback()


def refused(connection: Connection, statement: str) -> bool:
    """Whether the database refuses a statement for want of a right."""
    savepoint = connection.begin_nested()
    try:
        connection.exec_driver_sql(statement)
    except sa.exc.DBAPIError as error:
        savepoint.rollback()
        if not isinstance(error.orig, psycopg.errors.InsufficientPrivilege):
            raise
        return True
    savepoint.rollback()
    return False


@pytest.fixture
def two_sites(engine: Engine) -> Engine:
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "INSERT INTO sites (site_id) VALUES ('site-a'), ('site-b'); "
            "INSERT INTO appliances (appliance_id, site_id) VALUES ('site-a-01', 'site-a'), ('site-a-02', 'site-a'), ('site-b-01', 'site-b'); "
            "INSERT INTO manifest_entries (entry_hash, rule_id, rule_version, entry) SELECT site_id, site_id, 1, '{}' FROM sites; "
            "INSERT INTO manifest_contents (content_hash, manifest_hash, entry_ids, withheld, rule_count, rule_ids, rule_versions) "
            "SELECT rule_id, repeat('0', 64), ARRAY[entry_id], '[]', 0, '{}', '{}' FROM manifest_entries; "
            "INSERT INTO appliance_manifests (appliance_id, site_id, content_hash, batch_id) "
            "SELECT appliance_id, site_id, site_id, 1 FROM appliances; "
            "INSERT INTO appliance_commands (appliance_id, command_type) SELECT appliance_id, 'sync_promoted_rule' FROM appliances; "
            "INSERT INTO site_aliases (alias, site_id, actor, reason) VALUES ('old-a', 'site-a', 'Dana', 'renamed'), ('old-b', 'site-b', 'Dana', 'renamed'); "
            "INSERT INTO appliance_tokens (appliance_id, site_id, token_hash, issued_by, reason) "
            "VALUES ('site-a-01', 'site-a', repeat('a', 64), 'Dana', 'first')"
        )
    for site, appliance in (("site-a", "site-a-01"), ("site-b", "site-b-01"), ("old-a", "site-a-01")):
        assert post_execution(engine, post(site, appliance), received_at=NOW).outcome == "inserted"
    return engine


def test_a_second_upgrade_changes_no_grant_and_a_foreign_one_is_taken_back(engine: Engine) -> None:
    assert migrate.upgrade(engine).changes == ()
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "GRANT UPDATE ON rule_events TO flywheel_pipeline; REVOKE SELECT ON patterns FROM flywheel_reader"
        )
        assert {s.role: (s.missing, s.surplus) for s in roles.states(connection)} == {
            roles.INTAKE: (0, 0),
            roles.PIPELINE: (0, 1),
            roles.AGENT_API: (0, 0),
            roles.READER: (1, 0),
        }
    assert migrate.upgrade(engine).changes == (
        "grants of flywheel_pipeline: 0 given, 1 taken",
        "grants of flywheel_reader: 1 given, 0 taken",
    )
    assert migrate.upgrade(engine).changes == ()


def test_every_table_is_somebodys_or_on_the_list_of_those_that_nobody_writes() -> None:
    written = {table for tables in roles.GRANTS.values() for table in tables}
    assert set(metadata.tables) - written - READ_ONLY_FOR_ALL - roles.SECRET_TABLES == set()
    assert written <= set(metadata.tables)


@pytest.mark.parametrize("role", list(roles.MEANING))
@pytest.mark.parametrize(
    "table",
    [
        "rule_events",
        "human_acts",
        "promotion_decisions",
        "policy_activations",
        "execution_corrections",
        "scope_quarantines",
        "policy_documents",
        "alert_events",
        "reject_purges",
    ],
)
def test_nobody_updates_or_deletes_what_is_kept_for_auditors(engine: Engine, role: str, table: str) -> None:
    with as_role(engine, role) as connection:
        column = {
            "execution_corrections": "execution_id",
            "policy_documents": "policy_name",
            "alert_events": "title",
            "reject_purges": "actor",
        }.get(table, "reason")
        assert refused(connection, f"DELETE FROM {table}")
        assert refused(connection, f"UPDATE {table} SET {column} = 'x'")
        assert refused(connection, f"TRUNCATE {table} CASCADE")
        assert refused(connection, f"ALTER TABLE {table} DISABLE TRIGGER ALL")
        assert refused(connection, "CREATE TABLE public.mine (id int)")


def test_the_agent_role_touches_no_rule_ledger_token_or_alias(two_sites: Engine) -> None:
    with as_role(two_sites, roles.AGENT_API, site_id="site-a", appliance_id="site-a-01") as connection:
        for table in (
            "l1_rules",
            "rule_events",
            "patterns",
            "appliance_tokens",
            "human_acts",
            "rule_scorecard",
            "executions",
        ):
            assert refused(connection, f"SELECT * FROM {table}"), table
        for statement in (
            "UPDATE l1_rules SET enabled = true",
            "INSERT INTO rule_events DEFAULT VALUES",
            "DELETE FROM execution_telemetry",
            "UPDATE appliance_manifests SET tombstones = '[]'",
            "UPDATE manifest_contents SET entry_ids = '{}'",
            "UPDATE manifest_entries SET entry = '{}'",
            "SELECT * FROM rule_manifests",
            "UPDATE appliances SET site_id = 'site-b'",
            "UPDATE site_aliases SET site_id = 'site-b'",
            "UPDATE appliance_commands SET params = '{}'",
            "INSERT INTO appliance_commands (appliance_id, command_type) VALUES ('site-a-01', 'x')",
            "INSERT INTO touched_cells (site_id, day) VALUES ('site-b', now())",
        ):
            assert refused(connection, statement), statement


def test_an_appliances_session_sees_its_own_site_and_nothing_of_another(two_sites: Engine) -> None:
    def seen(connection: Connection) -> dict[str, list[str]]:
        return {
            table: sorted(connection.exec_driver_sql(f"SELECT {column} FROM {table}").scalars())
            for table, column in (
                ("execution_telemetry", "site_id"),
                ("appliances", "appliance_id"),
                ("appliance_manifests", "appliance_id"),
                ("manifest_contents", "content_hash"),
                ("manifest_entries", "entry_hash"),
                ("appliance_commands", "appliance_id"),
                ("sites", "site_id"),
                ("site_aliases", "alias"),
            )
        }

    with as_role(two_sites, roles.AGENT_API, site_id="site-a", appliance_id="site-a-01") as connection:
        own = ["site-a-01"]
        assert seen(connection) == {
            "execution_telemetry": ["old-a", "site-a"],
            "appliances": ["site-a-01", "site-a-02"],
            "appliance_manifests": own,
            "manifest_contents": ["site-a"],
            "manifest_entries": ["site-a"],
            "appliance_commands": own,
            "sites": ["site-a"],
            "site_aliases": ["old-a"],
        }
        for table in ("appliances", "appliance_commands"):
            column = "status"
            assert connection.exec_driver_sql(f"UPDATE {table} SET {column} = {column}").rowcount == 1
    with as_role(two_sites, roles.AGENT_API) as connection:  # a session that says for whom it speaks sees something
        assert all(rows == [] for rows in seen(connection).values())
    with two_sites.connect() as connection:  # and the owner sees all, as before
        assert len(seen(connection)["execution_telemetry"]) == 3


def test_an_appliances_session_cannot_write_for_another_site_or_take_over_its_execution(two_sites: Engine) -> None:
    with two_sites.connect() as connection:
        theirs = connection.exec_driver_sql(
            "SELECT execution_id FROM execution_telemetry WHERE site_id = 'site-b'"
        ).scalar_one()
    insert = (
        "INSERT INTO execution_telemetry (execution_id, site_id, appliance_id, runbook_id, hostname, success) "
        "VALUES ('{id}', '{site}', '{appliance}', 'L1-SSH-001', 'h', true)"
    )
    with as_role(two_sites, roles.AGENT_API, site_id="site-a", appliance_id="site-a-01") as connection:
        assert not refused(connection, insert.format(id="mine", site="site-a", appliance="site-a-01"))
        assert not refused(connection, insert.format(id="mine", site="old-a", appliance="unknown"))
        assert refused(connection, insert.format(id="x", site="site-b", appliance="site-a-01"))
        assert refused(connection, insert.format(id="x", site="site-a", appliance="site-b-01"))
        assert not refused(connection, insert.format(id="x", site="site-a", appliance="site-a-02"))  # a colleague
        assert refused(connection, insert.format(id="x", site="site-a", appliance="site-a-99"))
        takeover = insert.format(id=theirs, site="site-a", appliance="site-a-01")
        assert refused(
            connection, f"{takeover} ON CONFLICT (execution_id) DO UPDATE SET success = false, site_id = 'site-a'"
        )
        assert (
            connection.exec_driver_sql(
                "UPDATE execution_telemetry SET success = false WHERE site_id = 'site-b'"
            ).rowcount
            == 0
        )
        assert refused(connection, "UPDATE execution_telemetry SET site_id = 'site-b'")


def test_a_name_that_was_or_will_be_the_sites_opens_nothing_today(two_sites: Engine) -> None:
    with two_sites.begin() as connection:
        connection.exec_driver_sql(
            "INSERT INTO site_aliases (alias, site_id, actor, reason, valid_from, valid_to) VALUES "
            "('ended', 'site-a', 'Dana', 'sold', '-infinity', now() - interval '1 hour'), "
            "('coming', 'site-a', 'Dana', 'bought', now() + interval '1 hour', 'infinity'); "
            "INSERT INTO sites (site_id) VALUES ('ended'), ('coming'); "
            "INSERT INTO appliances (appliance_id, site_id) VALUES ('ended-01', 'ended'), ('coming-01', 'coming')"
        )
    for site in ("ended", "coming"):
        assert post_execution(two_sites, post(site, f"{site}-01"), received_at=NOW).outcome == "inserted"
    insert = (
        "INSERT INTO execution_telemetry (execution_id, site_id, appliance_id, runbook_id, hostname, success) "
        "VALUES ('{site}', '{site}', '{appliance}', 'L1-SSH-001', 'h', true)"
    )
    seen = "SELECT DISTINCT site_id FROM execution_telemetry ORDER BY 1"
    with as_role(two_sites, roles.AGENT_API, site_id="site-a", appliance_id="site-a-01") as connection:
        assert list(connection.exec_driver_sql(seen).scalars()) == ["old-a", "site-a"]
        assert list(connection.exec_driver_sql("SELECT site_id FROM sites").scalars()) == ["site-a"]
        for site in ("ended", "coming"):
            assert refused(connection, insert.format(site=site, appliance="site-a-01"))
        assert not refused(connection, insert.format(site="old-a", appliance="site-a-01"))
    for site in ("ended", "coming"):  # and who has that name now does not see who had it, or will
        with as_role(two_sites, roles.AGENT_API, site_id=site, appliance_id=f"{site}-01") as connection:
            assert list(connection.exec_driver_sql(seen).scalars()) == [site]
            assert list(connection.exec_driver_sql("SELECT appliance_id FROM appliances").scalars()) == [f"{site}-01"]
            assert refused(connection, insert.format(site="site-a", appliance=f"{site}-01"))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    site=st.text(max_size=30).filter(lambda s: "\x00" not in s),
    appliance=st.text(max_size=30).filter(lambda s: "\x00" not in s),
)
def test_no_text_in_the_session_settings_opens_another_site(two_sites: Engine, site: str, appliance: str) -> None:
    site, appliance = site.encode("utf-8", "replace").decode(), appliance.encode("utf-8", "replace").decode()
    with as_role(two_sites, roles.AGENT_API, site_id=site, appliance_id=appliance) as connection:
        rows = {"site-a": 2, "old-a": 2, "site-b": 1}.get(site, 0)
        assert connection.exec_driver_sql("SELECT count(*) FROM execution_telemetry").scalar_one() == rows
        own = {"site-a-01", "site-a-02", "site-b-01"} & {appliance}
        colleagues = {
            "site-a": {"site-a-01", "site-a-02"},
            "old-a": {"site-a-01", "site-a-02"},
            "site-b": {"site-b-01"},
        }
        seen = set(connection.exec_driver_sql("SELECT appliance_id FROM appliances").scalars())
        assert seen == own | colleagues.get(site, set())
        assert connection.exec_driver_sql("UPDATE appliances SET status = status").rowcount == len(own)


def under(engine: Engine, role: str) -> Engine:
    """An engine whose every session has the role from its start."""
    return open_engine(engine.url.update_query_dict({"options": f"-crole={role}"}))


def test_intake_works_under_its_role_and_sees_no_rule(engine: Engine, tmp_path: Path) -> None:
    limited = under(engine, roles.INTAKE)
    assert post_execution(limited, post(), received_at=NOW).outcome == "inserted"
    assert post_execution(limited, b"no json", received_at=NOW).outcome == "rejected"
    file = tmp_path / "posts.ndjson"
    file.write_text("\n".join(json.dumps(post()) for _ in range(5)) + "\n{bad\n")
    report = import_file(limited, file, received_at=NOW)
    assert (report.inserted, report.rejected) == (5, 1)
    with limited.connect() as connection:
        assert connection.exec_driver_sql("SELECT current_user").scalar_one() == roles.INTAKE
        for table in ("l1_rules", "rule_events", "patterns", "appliance_tokens", "touched_cells"):
            assert refused(connection, f"SELECT * FROM {table}")
    limited.dispose()


def test_a_reader_reads_every_relation_but_tokens_and_writes_none(engine: Engine) -> None:
    with as_role(engine, roles.READER) as connection:
        relations = connection.exec_driver_sql(
            "SELECT relname::text FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'v') ORDER BY 1"
        ).scalars()
        closed = [relation for relation in list(relations) if refused(connection, f"SELECT * FROM {relation} LIMIT 1")]
        assert closed == ["appliance_tokens"]
        for table in metadata.tables:
            assert refused(connection, f"DELETE FROM {table}"), table


@pytest.fixture(scope="module")
def owner_login(new_login: Callable[..., str]) -> str:
    """A login that may make roles and is nobody else's equal: as an owner of the schema is on a server of others."""
    return new_login("the_owner", options="CREATEROLE")


@pytest.fixture(scope="module")
def pipeline_login(new_login: Callable[..., str]) -> str:
    return new_login("the_pipeline", roles.PIPELINE)


@pytest.fixture
def owner(empty_engine: Engine, owner_login: str) -> Iterator[Engine]:
    """An empty database of that owner, as the owner."""
    with empty_engine.begin() as connection:
        name = empty_engine.url.database
        connection.exec_driver_sql(f'ALTER DATABASE "{name}" OWNER TO {owner_login}')
    login = open_engine(empty_engine.url.set(username=owner_login))
    yield login
    login.dispose()


def dagster_tables(engine: Engine) -> dict[str, str]:
    """Dagster's tables and whose they are."""
    with engine.connect() as connection:
        found = connection.exec_driver_sql(
            "SELECT relname, pg_get_userbyid(relowner) AS whose FROM pg_class "
            "WHERE relnamespace = 'dagster'::regnamespace AND relkind = 'r'"
        )
        return {row.relname: row.whose for row in found}


def test_an_owner_upgrades_beside_tables_that_dagster_made_as_the_pipelines_login(
    owner: Engine, pipeline_login: str
) -> None:
    migrate.upgrade(owner)
    pipeline = open_engine(owner.url.set(username=pipeline_login))
    assert make_dagster_storage(pipeline)
    assert set(dagster_tables(owner).values()) == {pipeline_login}
    assert migrate.upgrade(owner).changes == ()
    assert not make_dagster_storage(owner)
    pipeline.dispose()


def test_the_tables_that_an_upgrade_has_dagster_make_are_open_to_the_roles(
    owner: Engine, owner_login: str, empty_engine: Engine
) -> None:
    migrate.upgrade(owner)
    assert make_dagster_storage(owner)
    assert not make_dagster_storage(owner)
    tables = dagster_tables(owner)
    assert set(tables.values()) == {owner_login}
    assert len(tables) > 15
    with as_role(empty_engine, roles.PIPELINE) as connection:
        for table in tables:
            assert not refused(connection, f"SELECT * FROM dagster.{table}; DELETE FROM dagster.{table}")
        assert not refused(connection, "INSERT INTO dagster.kvs (key, value) VALUES ('a', 'b')")
        assert not refused(connection, "UPDATE dagster.kvs SET value = 'c'")
        assert not refused(connection, "SELECT nextval('dagster.event_logs_id_seq')")
    with as_role(empty_engine, roles.READER) as connection:
        for table in tables:
            assert not refused(connection, f"SELECT * FROM dagster.{table}")
            assert refused(connection, f"DELETE FROM dagster.{table}")
        assert refused(connection, "CREATE TABLE dagster.mine ()")
    for role in (roles.INTAKE, roles.AGENT_API):
        with as_role(empty_engine, role) as connection:
            assert refused(connection, "SELECT * FROM dagster.runs")


def test_an_upgrade_opens_the_tables_of_dagster_that_a_release_before_it_left_closed(
    owner: Engine, empty_engine: Engine
) -> None:
    migrate.upgrade(owner)
    make_dagster_storage(owner)
    with owner.begin() as connection:
        connection.exec_driver_sql(
            f"REVOKE USAGE ON SCHEMA dagster FROM {roles.READER}; REVOKE SELECT ON dagster.runs FROM {roles.READER}; "
            f"REVOKE INSERT ON dagster.runs FROM {roles.PIPELINE}"
        )
    assert migrate.upgrade(owner).changes == (
        f"schema dagster opened to {roles.PIPELINE}",
        f"schema dagster opened to {roles.READER}",
    )
    assert migrate.upgrade(owner).changes == ()
    with as_role(empty_engine, roles.READER) as connection:
        assert not refused(connection, "SELECT * FROM dagster.runs")
