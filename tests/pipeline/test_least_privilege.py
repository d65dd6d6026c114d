"""The whole graph by the roles of the least privilege: telemetry by the one, a run by the other, nothing by neither."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from graph_runs import Environment, Flywheel, Graph

from flywheel_pipeline.database import roles
from flywheel_pipeline.database.engine import open_engine
from flywheel_pipeline.doctor import examine


def test_a_run_needs_no_more_than_the_role_of_the_pipeline_has(graph: Graph):
    owner = graph.engine.url.username
    with graph.engine.begin() as connection:
        # Every session of this database begins as the role, as one does that logs in as its member.
        connection.exec_driver_sql(
            f"ALTER ROLE {owner} IN DATABASE {graph.engine.url.database} SET role = '{roles.PIPELINE}'"
        )
    graph.engine.dispose()
    assert graph.value("SELECT current_user") == roles.PIPELINE

    result = graph.run()
    failed = [event.step_key for event in result.all_events if event.is_step_failure]
    assert (result.success, failed) == (True, [])
    assert set(graph.verdicts().values()) == {"pass"}
    assert graph.promotions()
    assert graph.value("SELECT count(*) FROM appliance_commands") > 0

    assert [found.invariant for found in examine(graph.engine) if not found.finding.passed] == []

    with pytest.raises(sa.exc.ProgrammingError, match="permission denied"):
        graph.execute("UPDATE l1_rules SET state = 'fleet'")
    with pytest.raises(sa.exc.ProgrammingError, match="permission denied"):
        graph.execute("INSERT INTO l1_rules (rule_id) VALUES ('R-OWN')")
    with pytest.raises(sa.exc.ProgrammingError, match="permission denied"):
        graph.execute("DELETE FROM rule_events")
    with graph.engine.connect() as connection:
        connection.exec_driver_sql("SET ROLE NONE")
        connection.exec_driver_sql(f"SET ROLE {roles.READER}")
        with pytest.raises(sa.exc.ProgrammingError, match="permission denied"):
            connection.exec_driver_sql("UPDATE execution_telemetry SET success = true")


@pytest.fixture
def as_reader(
    run_command: Flywheel, engine: sa.Engine, reader_login: str, environment: Environment, tmp_path: Path
) -> Iterator[Flywheel]:
    """The command of somebody whose login has the reader's role and nothing else."""
    login = open_engine(engine.url.set(username=reader_login))
    with environment(login, tmp_path / "home"):
        yield run_command
    login.dispose()


@pytest.mark.parametrize(
    ("command", "sentence", "hint"),
    [
        ("db check", "may not do this: permission denied for database", "connect as the owner of the tables"),
        ("backup FILE", "may not do this: permission denied for table appliance_tokens", "No role sees the tokens"),
        ("tokens list", "may not do this: permission denied for table appliance_tokens", "No role sees the tokens"),
        (
            "import POSTS",
            "permission denied for table telemetry_rejects",
            "to write it flywheel_intake or flywheel_pipeline: an administrator grants a role by `GRANT",
        ),
        (
            "freeze --actor dana --reason tested",
            "permission denied for table human_acts",
            "to write it flywheel_pipeline",
        ),
        ("run", "may not use Dagster's storage", "GRANT flywheel_pipeline TO the_reader"),
    ],
)
def test_what_a_login_may_not_do_is_one_sentence_with_the_role_that_may(
    as_reader: Flywheel, reader_login: str, tmp_path: Path, command: str, sentence: str, hint: str
) -> None:
    posts = tmp_path / "posts.ndjson"
    posts.write_text("{}\n", "utf-8")
    answer = as_reader(*command.replace("FILE", str(tmp_path / "b.dump")).replace("POSTS", str(posts)).split())
    assert (answer.code, answer.out) == (3, "")
    said, *advice = answer.err.strip().splitlines()
    assert said.startswith(f"Error: The login {reader_login} may not ")
    assert sentence in said
    assert hint in "".join(advice)
    assert len(advice) == 1
    assert "SELECT" not in answer.err  # and no SQL


def test_the_status_of_a_reader_goes_without_the_runs_and_says_so(as_reader: Flywheel) -> None:
    answer = as_reader("status", "--json")
    assert answer.code == 0
    assert answer.json["checks"] is None
    assert answer.json["telemetry"]["rows"] == 0
    plain = as_reader("status")
    assert plain.code == 0
    assert "Telemetry   0 rows" in plain.out
    for told in (answer, plain):
        assert told.err.strip() == (
            "The runs, and with them the checks, are not readable by this login: `flywheel db upgrade`, by the owner, "
            "makes and opens Dagster's tables."
        )


def test_a_reader_sees_the_checks_of_the_tables_that_an_upgrade_made(
    engine: sa.Engine, run_command: Flywheel, reader_login: str, environment: Environment, tmp_path: Path
) -> None:
    with environment(engine, tmp_path / "owner"):
        assert run_command("db", "upgrade", "--json").json == {"changes": ["the tables of Dagster"]}
        assert run_command("db", "upgrade", "--json").json == {"changes": []}
    login = open_engine(engine.url.set(username=reader_login))
    with environment(login, tmp_path / "reader"):
        answer = run_command("status", "--json")
    login.dispose()
    assert (answer.code, answer.err) == (0, "")
    assert {check["passed"] for check in answer.json["checks"]} == {None}
    assert len(answer.json["checks"]) > 30


def test_a_login_that_was_granted_nothing_is_told_what_it_takes_to_read(
    as_reader: Flywheel, engine: sa.Engine, reader_login: str
) -> None:
    with engine.begin() as connection:  # of this database alone
        connection.exec_driver_sql(f"REVOKE SELECT ON schema_objects FROM {roles.READER}")
    answer = as_reader("status")
    assert answer.code == 3
    assert "permission denied for table schema_objects" in answer.err
    assert (
        f"To read it takes flywheel_reader: an administrator grants a role by `GRANT flywheel_reader TO {reader_login}`"
        in (answer.err)
    )
