"""The whole graph by the roles of the least privilege: telemetry by the one, a run by the other, nothing by neither."""

from __future__ import annotations

import pytest
import sqlalchemy as sa
from graph_runs import Graph

from flywheel_pipeline.database import roles
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
