"""GET /agent/sync, acknowledgements, state, health and metrics, in process on a real database."""

from __future__ import annotations

import json
from typing import Any

import pytest
import sqlalchemy as sa
from agent_http import Api, bearer, give_manifest, post, rule, scalar
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from flywheel_pipeline.delivery.api import sync as sync_module
from flywheel_pipeline.delivery.api.app import create_app
from flywheel_pipeline.delivery.api.headers import SECURITY_HEADERS
from flywheel_pipeline.delivery.api.metrics import GAUGES


def queue(engine: sa.Engine, appliance_id: str = "site-a-01", rule_id: str = "RB-AUTO-0001") -> str:
    """Queue a command as the pipeline does; returns its id."""
    with engine.begin() as connection:
        return str(
            connection.execute(
                sa.text(
                    "INSERT INTO appliance_commands (appliance_id, command_type, params, rule_id, rule_version) "
                    "VALUES (:appliance, 'sync_promoted_rule', jsonb_build_object('rule_id', CAST(:rule AS text)), :rule, 1) RETURNING id"
                ),
                {"appliance": appliance_id, "rule": rule_id},
            ).scalar_one()
        )


def status_of(engine: sa.Engine, command: str) -> str:
    return str(scalar(engine, "SELECT status FROM appliance_commands WHERE id = CAST(:id AS uuid)", id=command))


def acknowledge(api: Api, command: str, **options: Any) -> Any:
    return api.client.post(f"/api/agent/commands/{command}/ack", headers=bearer(api.a), **options)


def test_the_answer_has_the_agents_shape_and_what_is_new_beside_it(api: Api) -> None:
    rules = [rule(2), rule(1)]
    give_manifest(api.engine, "site-a-01", "site-a", rules)
    tombstone = {"rule_id": "RB-AUTO-0009", "version": 1, "reason": "it failed", "since": "2026-11-01T00:00:00Z"}
    with api.engine.begin() as connection:
        connection.execute(
            sa.text("UPDATE appliance_manifests SET tombstones = jsonb_build_array(CAST(:t AS jsonb))"),
            {"t": json.dumps(tombstone)},
        )
        connection.exec_driver_sql("UPDATE sites SET healing_tier = 'full' WHERE site_id = 'site-a'")
    answer = api.sync()
    body = answer.json()
    assert answer.status_code == 200
    assert body["rules"] == rules
    assert [body[key] for key in ("healing_tier", "count", "tombstones", "commands")] == ["full", 2, [tombstone], []]
    assert body["rule_versions"] == {"RB-AUTO-0001": 1, "RB-AUTO-0002": 1}
    assert body["version"] == body["manifest_hash"][:12]
    assert answer.headers["Cache-Control"] == "private, no-cache"


def test_a_matching_tag_is_answered_304_and_any_change_is_not(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    give_manifest(api.engine, "site-a-01", "site-a", [rule(1)])
    seen = [api.sync().headers["ETag"]]
    changes = [
        lambda: give_manifest(api.engine, "site-a-01", "site-a", [rule(1), rule(2)]),
        lambda: _run(api.engine, 'UPDATE appliance_manifests SET tombstones = \'[{"rule_id": "x"}]\''),
        lambda: _run(api.engine, "UPDATE sites SET healing_tier = 'standard'"),
        lambda: queue(api.engine),
        lambda: _run(api.engine, "UPDATE appliance_commands SET status = 'expired'"),
    ]
    for change in changes:
        change()
        fresh = api.sync(If_None_Match=seen[-1])
        assert fresh.status_code == 200
        seen.append(fresh.headers["ETag"])
        # A 304 never reads the rules.
        with monkeypatch.context() as patched:
            patched.setattr(sync_module, "_RULES", "SELECT 1/0")
            for tags in (
                seen[-1],
                f'"x", {seen[-1]}',
                f"W/{seen[-1]}",
                seen[-1].replace('"', "").join(['"', '-gzip"']),
            ):
                same = api.sync(If_None_Match=tags)
                assert (same.status_code, same.content) == (304, b"")
                assert same.headers["ETag"] == seen[-1]
    # The commands expired, so the tag is that of before them: equal content, equal tag.
    assert len(set(seen)) == len(seen) - 1
    assert seen[-1] == seen[-3]
    assert api.sync(If_None_Match="*").status_code == 200


def _run(engine: sa.Engine, statement: str) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql(statement)


def test_gzip_has_a_tag_of_its_own_and_the_same_content(api: Api) -> None:
    give_manifest(api.engine, "site-a-01", "site-a", [rule(number) for number in range(50)])
    plain, zipped = api.sync(), api.sync(Accept_Encoding="gzip")
    assert (zipped.headers["Content-Encoding"], plain.headers.get("Content-Encoding")) == ("gzip", None)
    assert plain.headers["ETag"] != zipped.headers["ETag"]
    assert zipped.json() == plain.json()
    assert int(zipped.headers["Content-Length"]) * 5 < int(plain.headers["Content-Length"])
    assert api.sync(If_None_Match=zipped.headers["ETag"], Accept_Encoding="gzip").status_code == 304


def test_a_command_is_delivered_by_the_answer_and_stays_in_it_until_it_is_answered(api: Api) -> None:
    give_manifest(api.engine, "site-a-01", "site-a", [rule(1)])
    command = queue(api.engine)
    first = api.sync()
    assert [item["id"] for item in first.json()["commands"]] == [command]
    assert first.json()["commands"][0]["params"] == {"rule_id": "RB-AUTO-0001"}
    assert status_of(api.engine, command) == "delivered"
    # The answer may have been lost on its way: the next one, without the tag, still has the command.
    assert api.sync().json() == first.json()
    assert api.sync(If_None_Match=first.headers["ETag"]).status_code == 304

    assert acknowledge(api, command).json() == {"id": command, "status": "acknowledged", "changed": True}
    assert acknowledge(api, command).json() == {"id": command, "status": "acknowledged", "changed": False}
    assert acknowledge(api, command, json={"failure": "no"}).json()["status"] == "acknowledged"
    after = api.sync(If_None_Match=first.headers["ETag"])
    assert (after.status_code, after.json()["commands"]) == (200, [])


def test_a_command_queued_again_is_told_again(api: Api) -> None:
    give_manifest(api.engine, "site-a-01", "site-a", [rule(1)])
    command = queue(api.engine)
    tag = api.sync().headers["ETag"]
    _run(
        api.engine,
        "UPDATE appliance_commands SET status = 'pending', delivered_at = NULL, expires_at = now() + interval '25 hours'",
    )
    assert api.sync(If_None_Match=tag).status_code == 200
    assert status_of(api.engine, command) == "delivered"


def test_a_failed_command_keeps_its_reason(api: Api) -> None:
    command = queue(api.engine)
    assert acknowledge(api, command, json={"failure": "Unknown action"}).json()["status"] == "failed"
    assert scalar(api.engine, "SELECT status_reason FROM appliance_commands") == "Unknown action"


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("commands/no-uuid/ack", b"{}", 422, "invalid_command_id"),
        ("commands/6a1b1f0e00004000800000000000000a/ack", b"{}", 422, "invalid_command_id"),
        ("commands/6a1b1f0e-0000-4000-8000-000000000000/ack", b"{}", 404, "no_such_command"),
        ("commands/6a1b1f0e-0000-4000-8000-000000000000/ack", b'{"failure": ""}', 422, "invalid_body"),
        ("commands/6a1b1f0e-0000-4000-8000-000000000000/ack", b'{"failure": "\\u0000"}', 422, "invalid_body"),
        ("commands/6a1b1f0e-0000-4000-8000-000000000000/ack", b'{"status": "done"}', 422, "invalid_body"),
        ("commands/6a1b1f0e-0000-4000-8000-000000000000/ack", b"[" * 10_000, 422, "invalid_body"),
        ("state", b"", 422, "invalid_body"),
        ("state", b"[]", 422, "invalid_body"),
        ("state", b'{"agent_version": 1}', 422, "invalid_body"),
        ("state", b'{"agent_version": "<b>"}', 422, "invalid_body"),
        ("state", b'{"agent_version": "1.0.70", "capabilities": ["rm -rf"]}', 422, "invalid_body"),
        ("state", b'{"agent_version": "1.0.70", "manifest_hash": "ABC"}', 422, "invalid_body"),
        ("state", b'{"agent_version": "1.0.70", "last_checkin": "2030-01-01"}', 422, "invalid_body"),
        ("state", b'{"agent_version": "1.0.70", "site_id": "site-b"}', 403, "foreign_site"),
        ("state", b'{"agent_version": "1.0.70", "appliance_id": "site-b-01"}', 403, "foreign_appliance"),
        ("state", b'{"agent_version": "' + b"1" * 40_000 + b'"}', 413, "body_too_large"),
    ],
)
def test_small_reports_are_held_to_their_form(api: Api, path: str, body: bytes, status: int, code: str) -> None:
    headers = bearer(api.a, **{"Content-Type": "application/json"})
    answer = api.client.post(f"/api/agent/{path}", content=body, headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert scalar(api.engine, "SELECT count(*) FROM appliances WHERE state_reported_at IS NOT NULL") == 0


def test_a_state_report_replaces_the_one_before_and_says_whether_it_is_what_is_wanted(api: Api) -> None:
    give_manifest(api.engine, "site-a-01", "site-a", [rule(1)])
    wanted = api.sync().json()["manifest_hash"]

    def report(**fields: Any) -> Any:
        return api.client.post(
            "/api/agent/state", json={"agent_version": "1.0.70", **fields}, headers=bearer(api.a)
        ).json()

    first = report(capabilities=["run_runbook:", "escalate", "run_runbook"], manifest_hash="0" * 64)
    assert (first["in_sync"], first["desired_manifest_hash"]) == (False, wanted)
    with api.engine.connect() as connection:
        row = connection.execute(sa.text("SELECT * FROM appliances WHERE appliance_id = 'site-a-01'")).one()
    assert (row.agent_version, row.capabilities, row.reported_manifest_hash) == (
        "1.0.70",
        ["escalate", "run_runbook"],
        "0" * 64,
    )
    assert row.state_reported_at.isoformat() == first["recorded_at"]
    assert row.last_checkin >= row.state_reported_at
    assert report(manifest_hash=wanted, site_id="site-a", appliance_id="site-a-01")["in_sync"] is True
    # What an agent stops reporting, after a downgrade say, is not believed of it any more.
    assert scalar(api.engine, "SELECT capabilities IS NULL FROM appliances WHERE appliance_id = 'site-a-01'")


def test_without_a_manifest_an_appliance_is_told_to_keep_what_it_has(api: Api) -> None:
    answer = api.sync()
    assert (answer.status_code, answer.json()["code"]) == (503, "manifest_pending")
    assert answer.headers["Retry-After"] == "60"


# -- for operators -------------------------------------------------------------------------------------------------


def test_every_answer_has_each_security_header_once_and_no_banner(api: Api) -> None:
    requests = [
        ("GET", "/healthz"),
        ("GET", "/openapi.json"),
        ("GET", "/docs"),
        ("GET", "/agent/sync"),
        ("DELETE", "/agent/sync"),
        ("OPTIONS", "/api/agent/executions"),
        ("POST", "/api/agent/executions"),
    ]
    for method, path in requests:
        answer = api.client.request(method, path)
        for name, value in SECURITY_HEADERS:
            assert answer.headers.get_list(name.decode()) == [value.decode()], (method, path)
        assert not {"server", "set-cookie", "access-control-allow-origin", "x-powered-by"} & set(answer.headers)
        assert answer.headers["Content-Type"].startswith("application/json")
    assert api.client.get("/docs").status_code == 404


def test_metrics_are_what_the_database_says(api: Api) -> None:
    api.send([post("e1"), post("e2", success="no")])
    queue(api.engine)
    _run(api.engine, "UPDATE appliances SET state_reported_at = now() WHERE appliance_id = 'site-a-01'")
    give_manifest(api.engine, "site-a-01", "site-a", [rule(1)])
    _run(
        api.engine,
        "INSERT INTO patterns (pattern_id, pattern_signature, incident_type, status, created_at) "
        "VALUES ('p', 'p', 'firewall', 'approved', now() - interval '1 day')",
    )
    with TestClient(create_app(api.engine), client=("127.0.0.1", 5)) as local:
        text = local.get("/metrics").text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    values = {name: families[name].samples[0].value for name in GAUGES if name in families}
    assert GAUGES.keys() - values.keys() == {"flywheel_last_promotion_age_seconds", "flywheel_last_refresh_age_seconds"}
    assert values["flywheel_stuck_candidates"] == 1
    assert values["flywheel_waiting_cells"] == 1
    assert values["flywheel_open_rejects"] == 1
    assert values["flywheel_commands_undelivered"] == 1
    assert values["flywheel_appliances_out_of_sync"] == 1
    assert 0 < values["flywheel_refresh_lag_seconds"] < 120
    assert any(
        sample.labels.get("endpoint") == "/api/agent/executions" for sample in families["flywheel_api_requests"].samples
    )


def test_metrics_are_not_for_appliances_nor_for_other_machines(api: Api) -> None:
    for headers in ({}, bearer(api.a)):
        with TestClient(create_app(api.engine), client=("192.0.2.1", 5)) as remote:
            assert remote.get("/metrics", headers=headers).status_code == 403
    with TestClient(create_app(api.engine), client=("127.0.0.1", 5)) as proxied:
        assert proxied.get("/metrics", headers={"X-Forwarded-For": "192.0.2.1"}).status_code == 403
    with TestClient(create_app(api.engine, metrics_token="s3cret"), client=("192.0.2.1", 5)) as remote:  # noqa: S106
        assert remote.get("/metrics", headers=bearer("s3cret")).status_code == 200
        assert remote.get("/metrics", headers=bearer("other")).status_code == 401
        assert remote.get("/metrics").status_code == 401


def test_health_says_what_is_wrong_and_not_where(empty_engine: sa.Engine, api: Api) -> None:
    assert api.client.get("/healthz").json() == {"status": "ok", "database": "reachable", "schema": "current"}
    with TestClient(create_app(empty_engine)) as client:
        answer = client.get("/healthz")
        assert (answer.status_code, answer.json()["code"]) == (503, "schema")
        assert answer.json()["hint"] == "Run `flywheel db upgrade`."
    nowhere = sa.create_engine("postgresql+psycopg://u:hidden@127.0.0.1:1/x", connect_args={"connect_timeout": 2})
    with TestClient(create_app(nowhere)) as client:
        answers = [client.get("/healthz"), client.get("/agent/sync", headers=bearer("fwa_" + "A" * 43))]
    for answer in answers:
        assert answer.status_code == 503
        assert "hidden" not in answer.text
        assert "127.0.0.1" not in answer.text


def test_connections_that_the_database_dropped_are_replaced_unnoticed(api: Api) -> None:
    give_manifest(api.engine, "site-a-01", "site-a", [rule(1)])
    for _ in range(2):
        assert [api.sync().status_code for _ in range(8)] == [200] * 8
        assert api.send(post("e1")).status_code == 200
        with api.engine.connect() as connection:
            connection.exec_driver_sql(
                "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
    assert [api.sync().status_code for _ in range(8)] == [200] * 8
    assert api.send(post("e2")).status_code == 200
