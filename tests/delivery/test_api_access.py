"""Tokens: who is let in, for which site, until when; and a hostile appliance that tries to be another."""

from __future__ import annotations

import itertools
import json
import unicodedata
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from agent_http import NDJSON, Api, bearer, enrol, give_manifest, iso, ndjson, post, rule, scalar

from flywheel_pipeline.database import roles
from flywheel_pipeline.delivery.tokens import PREFIX, digest, issue, list_tokens, revoke, rotate
from flywheel_pipeline.errors import UsageError

SIGNED = {"actor": "dana", "reason": "for the test"}
ENDPOINTS = [
    ("POST", "/api/agent/executions"),
    ("GET", "/agent/sync"),
    ("POST", "/api/agent/commands/6a1b1f0e-0000-4000-8000-000000000000/ack"),
    ("POST", "/api/agent/state"),
]


# -- tokens --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "path"), ENDPOINTS)
def test_without_a_token_that_holds_nothing_is_answered(api: Api, method: str, path: str) -> None:
    wrong = [
        {},
        {"Authorization": ""},
        {"Authorization": "Bearer "},
        {"Authorization": f"Basic {api.a}"},
        {"Authorization": api.a},
        {"Authorization": f"Bearer {api.a}x"},
        {"Authorization": f"Bearer {api.a[:-1]}"},
        {"Authorization": f"Bearer {api.a.swapcase()}"},
        {"Authorization": f"Bearer {digest(api.a)}"},
        {"Authorization": f"Bearer {PREFIX}{'A' * 43}"},
        {"Authorization": f"Bearer {'A' * 10_000}"},
        {"Authorization": f"Bearer {api.a}, Bearer {api.b}"},
        {"X-Api-Key": api.a},
        {"Cookie": f"token={api.a}; Authorization=Bearer {api.a}"},
    ]
    for headers in wrong:
        answer = api.client.request(method, path, headers=headers, params={"token": api.a, "access_token": api.a})
        assert answer.status_code == 401, headers
        assert answer.headers["WWW-Authenticate"].startswith('Bearer realm="flywheel"')
        assert answer.json()["code"] in ("missing_token", "invalid_token")
        assert api.a not in answer.text


def test_two_tokens_in_one_request_are_refused(api: Api) -> None:
    headers = [("Authorization", f"Bearer {api.a}"), ("Authorization", f"Bearer {api.b}")]
    assert api.client.get("/agent/sync", headers=headers).status_code == 401


def test_a_token_is_kept_as_its_hash_alone(api: Api) -> None:
    with api.engine.connect() as connection:
        rows = connection.execute(sa.text("SELECT * FROM appliance_tokens")).mappings().all()
        listed = list_tokens(connection)
    assert {row["token_hash"] for row in rows} == {digest(api.a), digest(api.b)}
    assert api.a.removeprefix(PREFIX) not in str(rows)
    assert "token_hash" not in str(listed)
    assert len(api.a) == len(PREFIX) + 43


def test_a_revoked_token_is_refused_with_the_next_request(api: Api) -> None:
    assert api.sync().status_code == 503  # let in: there is no manifest yet
    with api.engine.begin() as connection:
        assert len(revoke(connection, "site-a-01", **SIGNED)) == 1
    assert (api.sync().status_code, api.sync().json()["code"]) == (401, "revoked_token")
    assert api.sync(api.b).status_code == 503
    with pytest.raises(UsageError, match="has no token that holds"), api.engine.begin() as connection:
        revoke(connection, "site-a-01", **SIGNED)


def test_an_expired_token_is_refused(api: Api) -> None:
    token = enrol(api.engine, "site-a-01", "site-a", expires_in=timedelta(days=1))
    assert api.sync(token).status_code == 503
    with api.engine.begin() as connection:
        connection.execute(
            sa.text("UPDATE appliance_tokens SET expires_at = now() WHERE token_hash = :hash"), {"hash": digest(token)}
        )
    assert (api.sync(token).status_code, api.sync(token).json()["code"]) == (401, "expired_token")


def test_a_rotation_ends_the_old_token_at_once_or_after_a_grace(api: Api) -> None:
    with api.engine.begin() as connection:
        second = rotate(connection, "site-a-01", grace=timedelta(hours=1), **SIGNED).token
    assert [api.sync(token).status_code for token in (api.a, second)] == [503, 503]
    with api.engine.begin() as connection:
        third = rotate(connection, "site-a-01", **SIGNED)
    assert third.revoked == 2
    assert [api.sync(token).status_code for token in (api.a, second, third.token)] == [401, 401, 503]
    with api.engine.connect() as connection:
        assert [row.state for row in list_tokens(connection, "site-a-01", ended=True)] == [
            "revoked",
            "revoked",
            "holds",
        ]


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ("UPDATE appliances SET status = 'retired' WHERE appliance_id = 'site-a-01'", "retired_appliance"),
        ("DELETE FROM appliances WHERE appliance_id = 'site-a-01'", "retired_appliance"),
        ("UPDATE appliances SET site_id = 'site-b' WHERE appliance_id = 'site-a-01'", "moved_appliance"),
    ],
)
def test_a_token_ends_with_its_appliance(api: Api, change: str, code: str) -> None:
    with api.engine.begin() as connection:
        connection.exec_driver_sql(change)
    assert (api.sync().status_code, api.sync().json()["code"]) == (403, code)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"appliance_id": "nobody", **SIGNED}, "No appliance is called nobody"),
        ({"appliance_id": "site-a-01", "site_id": "site-b", **SIGNED}, "is registered at site site-a, not at site-b"),
        ({"appliance_id": "site-a-01", "actor": " ", "reason": "x"}, "actor must not be blank"),
        ({"appliance_id": "site-a-01", "actor": "x", "reason": ""}, "reason must not be blank"),
        ({"appliance_id": "new\n", "site_id": "site-a", **SIGNED}, "no name for appliance"),
        ({"appliance_id": "site-a-01", "expires_in": timedelta(0), **SIGNED}, "expired already"),
    ],
)
def test_a_token_that_makes_no_sense_is_not_issued(api: Api, arguments: dict[str, Any], words: str) -> None:
    appliance = arguments.pop("appliance_id")
    with pytest.raises(UsageError, match=words), api.engine.begin() as connection:
        issue(connection, appliance, **arguments)
    assert scalar(api.engine, "SELECT count(*) FROM appliance_tokens") == 2


def test_a_sign_of_life_is_recorded_by_our_clock_and_once_a_minute(api: Api) -> None:
    assert scalar(api.engine, "SELECT status FROM appliances WHERE appliance_id = 'site-a-01'") == "offline"
    api.sync()
    first = scalar(api.engine, "SELECT last_checkin FROM appliances WHERE appliance_id = 'site-a-01'")
    assert scalar(api.engine, "SELECT now() - :at < interval '1 minute'", at=first)
    assert scalar(api.engine, "SELECT status FROM appliances WHERE appliance_id = 'site-a-01'") == "online"
    api.sync()
    assert scalar(api.engine, "SELECT last_checkin FROM appliances WHERE appliance_id = 'site-a-01'") == first


def test_the_login_of_the_api_sees_nothing_before_it_speaks_for_an_appliance(api: Api, api_login: sa.Engine) -> None:
    give_manifest(api.engine, "site-a-01", "site-a", [rule(1)])
    assert api.send([post("x-1"), {"no": "post"}]).status_code == 200
    with api.engine.begin() as connection:
        connection.exec_driver_sql(
            "INSERT INTO appliance_commands (appliance_id, command_type) VALUES ('site-a-01', 'sync_promoted_rule'); "
            "INSERT INTO site_aliases (alias, site_id, actor, reason) VALUES ('old-a', 'site-a', 'Dana', 'renamed')"
        )
    held = set(roles.GRANTS[roles.AGENT_API]) - {"sealed_days", "schema_objects"}
    with api_login.connect() as connection:
        for table in sorted(held):
            assert scalar(api.engine, f"SELECT count(*) FROM {table}") > 0, table
            assert connection.exec_driver_sql(f"SELECT count(*) FROM {table}").scalar_one() == 0, table
        assert connection.exec_driver_sql("UPDATE appliances SET status = 'offline'").rowcount == 0
    for statement in ("SELECT count(*) FROM appliance_tokens", "SELECT count(*) FROM l1_rules", "DELETE FROM sites"):
        with (
            api_login.connect() as connection,
            pytest.raises(sa.exc.ProgrammingError, match="permission denied"),
        ):
            connection.exec_driver_sql(statement)


def test_nobody_else_may_ask_whose_a_token_is(api: Api) -> None:
    for function in roles.FUNCTIONS[roles.AGENT_API]:
        may = {
            role: scalar(
                api.engine,
                "SELECT has_function_privilege(:role, oid, 'EXECUTE') FROM pg_proc WHERE proname = :name",
                role=role,
                name=function,
            )
            for role in roles.MEANING
        }
        assert may == {role: role == roles.AGENT_API for role in roles.MEANING}, function


# -- a hostile appliance -------------------------------------------------------------------------------------------

OTHERS = ("site-b", "site-b-01")


def disguises(name: str) -> list[Any]:
    """Ways to write a name that somebody might take for it."""
    percent = "".join(f"%{byte:02x}" for byte in name.encode())
    full_width = "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in name)
    return [
        name,
        name.upper(),
        name.title(),
        f" {name}",
        f"{name} ",
        f"{name}\t",
        f"{name}\n",
        f"{name}\r\n",
        f"\u200b{name}",
        f"{name}\u200d",
        f"\ufeff{name}",
        name.replace("-", "\u2010"),
        name.replace("-", "\u2212"),
        name.replace("s", "\u017f"),
        name.replace("i", "\u0131"),
        name.replace("e", "\u0435"),
        unicodedata.normalize("NFKD", full_width),
        full_width,
        percent,
        percent.replace("%", "%25"),
        f"{name}%00",
        f"{name}\\u0000",
        f"site-a,{name}",
        f"site-a/../{name}",
        f"{name}' OR '1'='1",
        f"site-a' UNION SELECT '{name}",
        f"{name}--",
        f"{name};",
        "%",
        "_" * len(name),
        "*",
        f"{{{name}}}",
        [name],
        {"$eq": name},
        {"site_id": name},
    ]


def attempts() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(method, path, request) of each try; all with the token of site-a-01."""
    numbers = itertools.count()
    places = [
        lambda v: {**post("x"), "site_id": v},
        lambda v: {**post("x"), "execution": {**post("x")["execution"], "site_id": v}},
        lambda v: {**post("x", appliance_id=v)},
        lambda v: {**post("x", site_id="site-a", appliance_id=v, hostname="b-host")},
        lambda v: {**post("x")["execution"], "site_id": v, "reported_at": iso()},
    ]
    for name, place in itertools.product(OTHERS, places):
        for disguise in disguises(name):
            row = place(disguise)
            target = row.get("execution", row)
            target["execution_id"] = f"hostile-{next(numbers)}"
            for body, kind in ((json.dumps(row).encode(), "application/json"), (ndjson([row]), NDJSON)):
                yield "POST", "/api/agent/executions", {"content": body, "headers": {"Content-Type": kind}}
        # Twice the same key: whatever a proxy reads first, we read one of them and hold that.
        twice = json.dumps(post(f"hostile-{next(numbers)}"))
        for first, second in (("site-a", name), (name, "site-a")):
            body = twice.replace('"site_id": "site-a"', f'"site_id": "{first}", "site_id": "{second}"')
            yield "POST", "/api/agent/executions", {"content": body, "headers": {"Content-Type": "application/json"}}
    for name, key in itertools.product(OTHERS, ("site_id", "appliance_id")):
        for disguise in disguises(name):
            text = disguise if isinstance(disguise, str) else json.dumps(disguise)
            yield "GET", "/agent/sync", {"params": {key: text}}
            yield "GET", "/agent/sync", {"params": [(key, "site-a" if key == "site_id" else "site-a-01"), (key, text)]}
            yield "GET", "/agent/sync", {"params": [(key, text), (key, "site-a" if key == "site_id" else "site-a-01")]}
            yield "GET", "/agent/sync", {"params": {f"{key}[]": text, key.upper(): text}}
            state = {"agent_version": "6.6.6", key: disguise}
            yield "POST", "/api/agent/state", {"json": state}
            yield "POST", "/api/agent/state", {"json": {"agent_version": "6.6.6"}, "params": {key: text}}
            if text.isascii() and text.isprintable():
                for header in ("X-Site-Id", "X-Appliance-Id", "X-Forwarded-User", "X-Original-URL", "Cookie", "Host"):
                    yield "GET", "/agent/sync", {"headers": {header: text.strip() or "x"}}
    for command in ("{command}", "{COMMAND}", "%7B{command}%7D", "{command}%00", "../commands/{command}", "{command};"):
        for body in (b"", b"{}", b'{"failure":"no"}'):
            for key in ("appliance_id", "site_id"):
                path = f"/api/agent/commands/{command}/ack?{key}=" + OTHERS[key == "appliance_id"]
                yield "POST", path, {"content": body, "headers": {"Content-Type": "application/json"}}
                yield "POST", path.partition("?")[0], {"content": body, "headers": {"Content-Type": "application/json"}}


def of_site_b(engine: sa.Engine) -> list[Any]:
    """Everything that is site-b's, row versions included."""
    found: list[Any] = []
    with engine.connect() as connection:
        for query in (
            "SELECT xmin::text, * FROM appliances WHERE appliance_id = 'site-b-01'",
            "SELECT xmin::text, * FROM appliance_commands WHERE appliance_id = 'site-b-01'",
            "SELECT xmin::text, * FROM appliance_manifests WHERE appliance_id = 'site-b-01'",
            "SELECT xmin::text, * FROM execution_telemetry WHERE site_id <> 'site-a' OR appliance_id <> 'site-a-01'",
            "SELECT xmin::text, * FROM telemetry_rejects WHERE source <> 'appliance:site-a-01'",
            "SELECT xmin::text, * FROM appliance_tokens",
        ):
            found += connection.execute(sa.text(query)).all()
    return found


def test_a_hostile_appliance_neither_reads_nor_writes_anything_of_another_site(api: Api) -> None:
    give_manifest(api.engine, "site-a-01", "site-a", [rule(1)])
    give_manifest(api.engine, "site-b-01", "site-b", [{**rule(2), "name": "CROWN-JEWEL"}])
    with api.engine.begin() as connection:
        command = connection.exec_driver_sql(
            "INSERT INTO appliance_commands (appliance_id, command_type, params) "
            "VALUES ('site-b-01', 'sync_promoted_rule', '{\"note\": \"CROWN-JEWEL\"}') RETURNING id::text"
        ).scalar_one()
    api.send(post("b-1", site_id="site-b", hostname="CROWN-JEWEL"), token=api.b)
    assert "CROWN-JEWEL" in api.sync(api.b).text  # there is something to steal
    before = of_site_b(api.engine)
    assert len(before) == 6

    tried = 0
    for method, path, request in attempts():
        path = path.replace("{command}", command).replace("{COMMAND}", command.upper())
        headers = {**request.pop("headers", {}), "Authorization": f"Bearer {api.a}"}
        answer = api.client.request(method, path, headers=headers, **request)
        tried += 1
        assert answer.status_code < 500, (path, request, answer.text)
        assert "CROWN-JEWEL" not in answer.text, (path, request)
        named = str(request.get("params", ""))
        if answer.status_code == 200 and path == "/agent/sync" and ("'site_id'" in named or "'appliance_id'" in named):
            pytest.fail(f"answered although it names another: {request}")
    assert tried >= 1_000
    assert of_site_b(api.engine) == before
    # What it may do was done all the while: the test would see writes if there were any.
    assert api.send(post("a-1")).status_code == 200
    assert scalar(api.engine, "SELECT count(*) FROM telemetry_rejects") > 300


def test_commands_of_others_and_of_nobody_are_answered_alike(api: Api) -> None:
    with api.engine.begin() as connection:
        theirs = connection.exec_driver_sql(
            "INSERT INTO appliance_commands (appliance_id, command_type) VALUES ('site-b-01', 'x') RETURNING id::text"
        ).scalar_one()
    answers = [
        api.client.post(f"/api/agent/commands/{name}/ack", headers=bearer(api.a))
        for name in (theirs, "6a1b1f0e-0000-4000-8000-000000000000")
    ]
    assert [answer.status_code for answer in answers] == [404, 404]
    assert answers[0].content == answers[1].content
