"""POST /api/agent/executions: what lands, what is refused and how it is told, on a real database."""

from __future__ import annotations

import gzip
import json
import logging
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from agent_http import NDJSON, Api, bearer, enrol, iso, ndjson, post, scalar
from starlette.testclient import TestClient

from flywheel_pipeline.delivery.api.app import create_app
from flywheel_pipeline.delivery.api.connections import driver_of, speak_for
from flywheel_pipeline.delivery.api.limits import Buckets, Limits
from flywheel_pipeline.delivery.tokens import PREFIX, Caller
from flywheel_pipeline.telemetry import batch
from flywheel_pipeline.telemetry.aliases import add_site_alias
from flywheel_pipeline.telemetry.batch import parse_batch, take_batch
from flywheel_pipeline.telemetry.rejects import discard, retry
from flywheel_pipeline.telemetry.reporters import Reporter


def outcomes(answer: Any) -> list[str]:
    return [row["outcome"] for row in answer.json()["results"]]


def stored(engine: sa.Engine) -> dict[str, Any]:
    with engine.connect() as connection:
        return {
            row.execution_id: row
            for row in connection.execute(sa.text("SELECT * FROM execution_telemetry ORDER BY execution_id"))
        }


# -- what lands ----------------------------------------------------------------------------------------------------


def test_a_post_lands_under_the_appliance_of_its_token(api: Api) -> None:
    answer = api.send(post("exec-1"))
    assert answer.status_code == 200
    assert answer.json() == {
        "received": 1,
        "inserted": 1,
        "corrected": 0,
        "unchanged": 0,
        "rejected": 0,
        "results": [{"position": 0, "outcome": "inserted", "execution_id": "exec-1"}],
    }
    row = stored(api.engine)["exec-1"]
    assert (row.site_id, row.appliance_id) == ("site-a", "site-a-01")
    assert datetime.now(UTC) - row.created_at < timedelta(minutes=1)


@pytest.mark.parametrize("appliance", ["unknown", None, ""])
def test_an_older_agent_that_does_not_know_its_id_is_given_it(api: Api, appliance: str | None) -> None:
    assert outcomes(api.send(post("exec-1", appliance_id=appliance))) == ["inserted"]
    assert stored(api.engine)["exec-1"].appliance_id == "site-a-01"


@pytest.mark.parametrize("form", ["array", "ndjson", "ndjson gzip", "array gzip", "gzip in members", "ndjson crlf"])
def test_a_batch_lands_in_every_form(api: Api, form: str) -> None:
    rows = [post(f"exec-{number}", error_message="ü ] } , [") for number in range(7)]
    body = json.dumps(rows, indent=1).encode() if "array" in form else ndjson(rows)
    if "crlf" in form:
        body = b"\r\n" + body.replace(b"\n", b"\r\n\r\n") + b"\r\n"
    headers = {"Content_Type": "application/json" if "array" in form else f"{NDJSON}; charset=UTF-8"}
    if "gzip" in form:
        body = (
            gzip.compress(body[:100], mtime=0) + gzip.compress(body[100:]) if "members" in form else gzip.compress(body)
        )
        headers["Content_Encoding"] = "gzip"
    if form == "gzip in members":
        headers["Content_Type"] = NDJSON
    answer = api.send(body, **headers)
    assert (answer.status_code, answer.json()["inserted"]) == (200, 7)
    assert len(stored(api.engine)) == 7


def test_each_row_is_told_what_became_of_it(api: Api) -> None:
    api.send([post("known"), post("wrong")])
    late = post("wrong", success=False, status="failure")
    answer = api.send(
        [
            post("new"),
            post("known"),
            late,
            post("bad", success="yes"),
            late,
            post("new"),
            {**post("twice"), "reported_at": iso(-5)},
            post("twice", success=False, status="failure"),
        ]
    )
    # The second `new` is reported a moment later and says the same; the twin of the correction repeats it.
    assert outcomes(answer) == [
        "inserted",
        "unchanged",
        "corrected",
        "rejected",
        "unchanged",
        "unchanged",
        "inserted",
        "corrected",
    ]
    assert answer.status_code == 200
    assert answer.json()["received"] == 8
    assert answer.json()["results"][3]["reason_code"] == "wrong_type"
    assert "success must be true or false" in answer.json()["results"][3]["reason"]
    assert {name: row.success for name, row in stored(api.engine).items()} == {
        "new": True,
        "known": True,
        "wrong": False,
        "twice": False,
    }


def test_sending_a_batch_again_in_any_pieces_changes_nothing(api: Api) -> None:
    rows = [post(f"exec-{number}") for number in range(20)]
    assert outcomes(api.send(rows)) == ["inserted"] * 20
    before = stored(api.engine)
    assert outcomes(api.send(rows)) == ["unchanged"] * 20
    assert outcomes(api.send(rows[::-2])) == ["unchanged"] * 10
    assert outcomes(api.send(rows[3:4] * 5)) == ["unchanged"] * 5
    assert stored(api.engine) == before


def test_a_row_that_the_database_refuses_spoils_no_other(api: Api) -> None:
    with api.engine.begin() as connection:
        connection.exec_driver_sql(
            "INSERT INTO sealed_days (day, rows_purged, actor) VALUES ((now() - interval '40 days')::date, 1, 'dana')"
        )
    rows = [post(f"exec-{number}") for number in range(5)]
    rows[2] = post("sealed", started_at=iso(-40 * 24 * 60))
    answer = api.send(rows)
    assert outcomes(answer) == ["inserted", "inserted", "rejected", "inserted", "inserted"]
    assert answer.json()["results"][2]["reason_code"] == "refused_by_database"


# -- what is refused -----------------------------------------------------------------------------------------------


def test_refused_rows_are_kept_under_the_appliance_once_however_often_they_come(api: Api) -> None:
    bad = b'{"site_id": "site-a", "reported_at": "never", "execution": {}}'
    first = api.send(ndjson([bad, b"{", bad]), Content_Type=NDJSON)
    again = api.send(ndjson([b"{", bad]), Content_Type=NDJSON)
    assert first.status_code == 422
    assert first.json()["code"] == "all_rejected"
    ids = [row["reject_id"] for row in first.json()["results"]]
    assert ids[0] == ids[2] != ids[1]
    assert [row["reject_id"] for row in again.json()["results"]] == [ids[1], ids[0]]
    with api.engine.connect() as connection:
        kept = connection.execute(sa.text("SELECT * FROM telemetry_rejects ORDER BY id")).all()
    assert {(row.source, bytes(row.payload), row.status) for row in kept} == {
        ("appliance:site-a-01", bad, "open"),
        ("appliance:site-a-01", b"{", "open"),
    }


def test_a_single_post_that_is_refused_says_so_in_the_status(api: Api) -> None:
    answer = api.send(post("exec-1", started_at=iso(60)))
    assert answer.status_code == 422
    assert answer.json()["code"] == "future_event"
    assert answer.json()["results"][0]["outcome"] == "rejected"


def test_an_id_that_is_anothers_is_refused_without_telling_whose(api: Api) -> None:
    api.send(post("exec-1", site_id="site-b", hostname="SECRET-DC"), token=api.b)
    for row in (post("exec-1"), post("exec-1", hostname="SECRET-DC")):
        answer = api.send(row)
        assert answer.status_code == 422
        assert answer.json()["code"] == "conflicting_identity"
        assert "SECRET" not in answer.text
        assert "site-b" not in answer.text
    reasons = scalar(api.engine, "SELECT string_agg(reason, ' ') FROM telemetry_rejects")
    assert "was reported by another site" in reasons  # the operator finds it by its id; this session could not see it
    assert "SECRET" not in reasons
    assert stored(api.engine)["exec-1"].site_id == "site-b"


def test_neither_arrival_nor_a_retry_lets_a_row_land_for_another_site(api: Api) -> None:
    foreign = post("exec-1", site_id="site-b")
    soon = {**post("exec-2", site_id="site-b", started_at=iso(15)), "reported_at": iso(8)}
    assert [row["reason_code"] for row in api.send([foreign, soon]).json()["results"]] == [
        "foreign_site",
        "future_event",
    ]
    # Half an hour later the second one's only visible fault is gone.
    report = retry(api.engine, now=datetime.now(UTC) + timedelta(minutes=30))
    assert (report.accepted, dict(report.refused)) == (0, {"foreign_site": 2})
    assert stored(api.engine) == {}


def test_a_retry_lands_what_is_the_appliances_own_with_its_id_filled_in(api: Api) -> None:
    assert api.send({**post("exec-1", started_at=iso(15)), "reported_at": iso(8)}).json()["code"] == "future_event"
    report = retry(api.engine, now=datetime.now(UTC) + timedelta(minutes=30))
    assert report.accepted == 1
    assert stored(api.engine)["exec-1"].appliance_id == "site-a-01"


def test_a_colleague_of_the_same_site_may_be_named_and_nobody_else(api: Api) -> None:
    enrol(api.engine, "site-a-02", "site-a")
    answer = api.send(
        [
            post("e1", appliance_id="site-a-02"),
            post("e2", appliance_id="site-b-01"),
            post("e3", appliance_id="site-a-99"),
        ]
    )
    assert [row.get("reason_code") for row in answer.json()["results"]] == [
        None,
        "foreign_appliance",
        "foreign_appliance",
    ]


def test_a_renamed_site_reports_under_both_names_while_the_alias_holds(api: Api) -> None:
    now = datetime.now(UTC)
    with api.engine.begin() as connection:
        for old, begins, ends in (
            ("renamed", None, None),
            ("ended", None, now - timedelta(days=1)),
            ("to-come", now + timedelta(days=1), None),
        ):
            add_site_alias(connection, old, "site-a", begins, ends, actor="dana", reason="renamed")
    names = ["site-a", "renamed", "ended", "to-come", "Renamed"]
    answer = api.send([post(f"exec-{name}", site_id=name) for name in names])
    assert outcomes(answer) == ["inserted", "inserted", "rejected", "rejected", "rejected"]
    # And the other way round: a token that was issued before the renaming.
    token = enrol(api.engine, "old-01", "renamed")
    assert (
        outcomes(api.send([post("x1", site_id="site-a"), post("x2", site_id="renamed")], token=token))
        == ["inserted"] * 2
    )


@pytest.mark.parametrize(
    ("body", "headers", "status", "code"),
    [
        (b"", {}, 422, "empty_body"),
        (b" \n\n ", {"Content_Type": NDJSON}, 422, "empty_body"),
        (b"{}", {"Content_Type": "text/plain"}, 415, "unsupported_media_type"),
        (b"{}", {"Content_Type": "application/json; charset=utf-16"}, 415, "unsupported_media_type"),
        (b"{}", {"Content_Encoding": "br"}, 415, "unsupported_encoding"),
        (b"{}", {"Content_Encoding": "gzip, gzip"}, 415, "unsupported_encoding"),
        (b"{}", {"Content_Encoding": "gzip"}, 422, "invalid_gzip"),
        (gzip.compress(b"{}", mtime=0)[:-4], {"Content_Encoding": "gzip"}, 422, "invalid_gzip"),
        (gzip.compress(b"{}", mtime=0) + b"more", {"Content_Encoding": "gzip"}, 422, "invalid_gzip"),
        (gzip.compress(b"", mtime=0) * 100, {"Content_Encoding": "gzip"}, 422, "invalid_gzip"),
        (b"[{}, {]", {}, 422, "invalid_json"),
        (b"[{}", {}, 422, "invalid_json"),
        (b"[{}] {}", {}, 422, "invalid_json"),
        (b"[{},]", {}, 422, "invalid_json"),
        (b'["\xff"]', {}, 422, "invalid_utf8"),
        (b"[" * 200_000, {}, 422, "too_deep"),
        (b"{}" + b" " * (9 << 20), {}, 413, "body_too_large"),
        (gzip.compress(b"0" * (50 << 20), mtime=0), {"Content_Encoding": "gzip"}, 413, "inflated_body_too_large"),
        (b"[" + b"1," * 6000 + b"1]", {}, 413, "too_many_rows"),
        (b"1\n" * 6000, {"Content_Type": NDJSON}, 413, "too_many_rows"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_body_that_cannot_be_taken_says_why_and_what_to_do(
    api: Api, body: bytes, headers: dict[str, str], status: int, code: str
) -> None:
    answer = api.send(body, **headers)
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert answer.json()["reason"]
    assert answer.json()["hint"]
    kept = "reject_id" in answer.json()
    assert kept == (status == 422 and code != "empty_body")
    assert scalar(api.engine, "SELECT count(*) FROM telemetry_rejects") == kept
    assert stored(api.engine) == {}


def test_a_gzip_bomb_is_given_up_before_it_fills_the_memory(api: Api) -> None:
    import tracemalloc

    maker = zlib.compressobj(9, wbits=-15)
    megabyte = maker.compress(b"\0" * (1 << 20)) + maker.flush(zlib.Z_FULL_FLUSH)  # refers to nothing before it
    bomb = b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + megabyte * 2_000
    assert len(bomb) < 8 << 20
    unpacked = zlib.decompressobj(wbits=31).decompress(bomb, 3 << 20)
    assert unpacked == b"\0" * (3 << 20)
    tracemalloc.start()
    answer = api.send(bomb, Content_Encoding="gzip")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert answer.status_code == 413
    assert peak < 80 << 20  # of 2 GB


@pytest.mark.parametrize(
    ("row", "code"),
    [
        (
            b'{"site_id":"site-a","reported_at":"2026-01-01T00:00:00Z","execution":' + b'{"tags":' * 5_000,
            "invalid_json",
        ),
        (
            b'{"site_id":"site-a","reported_at":"2026-01-01T00:00:00Z","execution":{"error_step":'
            + b"9" * 100_000
            + b"}}",
            None,
        ),
        (b'{"site_id":"site-a\\u0000"}', None),
        (b"\x00", "nul_character"),
        (b'"\xed\xa0\x80"', None),
        (b'"\\ud800"', None),
        (b"null", "not_an_object"),
        (b"NaN", None),
        (b"1e999999", None),
        (b"x" * (1 << 21), "line_too_long"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_hostile_rows_go_to_the_rejects_and_their_neighbours_land(api: Api, row: bytes, code: str | None) -> None:
    answer = api.send(ndjson([post("e1"), row, post("e2")]), Content_Type=NDJSON)
    assert answer.status_code == 200
    assert outcomes(answer) == ["inserted", "rejected", "inserted"]
    refused = answer.json()["results"][1]
    assert code in (None, refused["reason_code"])
    assert len(answer.text) < 2_000
    size = scalar(api.engine, "SELECT payload_bytes FROM telemetry_rejects WHERE id = :id", id=refused["reject_id"])
    assert size == len(row)
    assert scalar(api.engine, "SELECT max(octet_length(payload)) FROM telemetry_rejects") <= 1 << 20


def test_nul_characters_inside_values_are_refused_not_stored(api: Api) -> None:
    answer = api.send([post("e1", error_message="a\x00b"), post("e2", tags={"k\x00": 1}), post("e3\x00")])
    assert [row["reason_code"] for row in answer.json()["results"]] == ["nul_character"] * 3


# -- back-pressure -------------------------------------------------------------------------------------------------


def test_too_many_requests_are_sent_away_and_told_when_to_come_back(engine: sa.Engine) -> None:
    token = enrol(engine, "site-a-01", "site-a")
    other = enrol(engine, "site-b-01", "site-b")
    limits = Limits(requests_per_second=1.0, rows_per_second=2.0)
    with TestClient(create_app(engine, limits)) as client:

        def send(rows: list[Any], by: str = token) -> Any:
            return client.post("/api/agent/executions", json=rows, headers=bearer(by))

        answers = [send([]) for _ in range(6)]
        assert [answer.status_code for answer in answers] == [200] * 4 + [429] * 2
        assert answers[-1].json()["code"] == "too_many_requests"
        assert int(answers[-1].headers["Retry-After"]) >= 1
        # Another appliance is not held back for it; its rows have a rate of their own.
        assert send([post(f"e{n}", "site-b") for n in range(20)], other).status_code == 200
        refused = send([post(f"f{n}", "site-b") for n in range(20)], other)
        assert (refused.status_code, refused.json()["code"]) == (429, "too_many_rows")
        assert int(refused.headers["Retry-After"]) >= 9
    assert scalar(engine, "SELECT count(*) FROM execution_telemetry") == 20


def test_what_an_appliance_has_waiting_among_the_rejects_is_bounded_and_says_so(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "KEPT_BYTES", 1 << 20)
    lines = [b"%d" % n + b"x" * 400_000 for n in range(4)]
    answers = [api.send(ndjson(lines[n : n + 2]), Content_Type=NDJSON) for n in (0, 2)]
    assert [a.status_code for a in answers] == [422, 422]
    query = "SELECT array_agg(octet_length(payload) ORDER BY id) FROM telemetry_rejects"
    assert scalar(api.engine, query) == [400_001, 400_001, 1_024, 1_024]
    assert scalar(api.engine, "SELECT array_agg(payload_bytes ORDER BY id) FROM telemetry_rejects") == [400_001] * 4
    cut = scalar(api.engine, "SELECT reason FROM telemetry_rejects WHERE octet_length(payload) = 1024 LIMIT 1")
    assert cut.startswith(answers[1].json()["results"][0]["reason"].partition(";")[0])
    assert "its first 1,024 bytes are kept, 1 MiB of this source wait for a decision already" in cut
    # What it sends again changes nothing, and a good row lands beside it; another appliance has room of its own.
    again = api.send(ndjson([*lines, json.dumps(post("e1")).encode()]), Content_Type=NDJSON)
    assert (again.status_code, again.json()["inserted"], again.json()["rejected"]) == (200, 1, 4)
    assert scalar(api.engine, query) == [400_001, 400_001, 1_024, 1_024]
    assert scalar(api.engine, "SELECT count(*) FROM telemetry_rejects WHERE reason = :cut", cut=cut) == 2
    api.send(ndjson(lines[:1]), api.b, Content_Type=NDJSON)
    assert scalar(api.engine, "SELECT octet_length(payload) FROM telemetry_rejects ORDER BY id DESC LIMIT 1") == 400_001
    # A row that was cut cannot be tried again, and keeps its reason; a decision makes room.
    ids = scalar(api.engine, "SELECT array_agg(id ORDER BY id) FROM telemetry_rejects")
    assert retry(api.engine).accepted == 0
    assert scalar(api.engine, "SELECT count(*) FROM telemetry_rejects WHERE reason = :cut", cut=cut) == 2
    with api.engine.begin() as connection:
        discard(connection, ids[:1])
    api.send(ndjson([b"y" * 400_000]), Content_Type=NDJSON)
    assert scalar(api.engine, "SELECT octet_length(payload) FROM telemetry_rejects ORDER BY id DESC LIMIT 1") == 400_000


_MANY_REJECTS = """
INSERT INTO telemetry_rejects (source, reason_code, reason, payload, payload_bytes, payload_hash, status, decided_at)
SELECT 'appliance:site-' || CASE WHEN mod(n, 2) = 0 THEN 'a' ELSE 'b' END || '-01', 'invalid_json', 'it is no JSON',
       convert_to('{' || n, 'UTF8'), length('{' || n), encode(sha256(convert_to('{' || n, 'UTF8')), 'hex'),
       CASE WHEN n <= 20 THEN 'open' WHEN mod(n, 3) = 0 THEN 'accepted' ELSE 'discarded' END,
       CASE WHEN n > 20 THEN now() END
FROM generate_series(1, 40000) AS n
"""


def rejects_read(connection: sa.Connection) -> int:
    """Rows of the rejects that this transaction read, by whatever way."""
    return int(
        connection.exec_driver_sql(
            "SELECT coalesce(seq_tup_read, 0) + coalesce(idx_tup_fetch, 0) FROM pg_stat_xact_user_tables "
            "WHERE relname = 'telemetry_rejects'"
        ).scalar_one()
    )


def test_a_refused_row_costs_no_more_for_the_rejects_that_were_decided(api: Api, api_login: sa.Engine) -> None:
    with api.engine.begin() as connection:
        connection.execute(sa.text(_MANY_REJECTS))
        connection.exec_driver_sql("ANALYZE telemetry_rejects")
    caller = Caller(1, "site-a-01", "site-a", frozenset({"site-a"}), checkin_due=False)
    payloads = [b"{new", b"{2", b"{40000"]  # unknown, open, decided
    for _ in range(7):  # from the fifth on the plan may be one for any values
        with api_login.connect() as connection:
            speak_for(driver_of(connection), caller)
            parsed = parse_batch(payloads, received_at=datetime.now(UTC))
            taken = take_batch(
                driver_of(connection),
                payloads,
                parsed,
                Reporter("site-a-01", caller.sites),
                received_at=datetime.now(UTC),
            )
            assert taken.counts == {"rejected": 3}
            assert 12 <= rejects_read(connection) < 200  # 10 are open, 19,990 of this source decided
            plan = "\n".join(
                connection.exec_driver_sql(
                    "EXPLAIN SELECT sum(octet_length(payload)) FROM telemetry_rejects "
                    "WHERE source = 'appliance:site-a-01' AND status = 'open'"
                ).scalars()
            )
            assert "telemetry_rejects_open_idx" in plan


def test_batches_taken_at_once_keep_the_bound_to_the_byte(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "KEPT_BYTES", 1 << 20)
    reporter = Reporter("site-a-01", frozenset({"site-a"}))

    def take(engine: sa.Engine, payload: bytes) -> None:
        with engine.begin() as connection:
            now = datetime.now(UTC)
            take_batch(
                driver_of(connection), [payload], parse_batch([payload], received_at=now), reporter, received_at=now
            )

    second = threading.Thread(target=take, args=(api.engine, b"2" + b"x" * 599_999))
    with api.engine.begin() as first:
        now = datetime.now(UTC)
        payload = b"1" + b"x" * 599_999
        take_batch(driver_of(first), [payload], parse_batch([payload], received_at=now), reporter, received_at=now)
        second.start()
        deadline = time.monotonic() + 30
        with api.engine.connect() as watcher:
            while second.is_alive() and time.monotonic() < deadline:
                waits = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
                if watcher.exec_driver_sql(waits).scalar_one():
                    break
                watcher.rollback()
        # Another appliance waits for nobody.
        api.send(ndjson([b"3" + b"x" * 599_999]), api.b, Content_Type=NDJSON)
    second.join()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: take(api.engine, b"%d" % n + b"y" * 199_999), range(10, 18)))
    kept = "SELECT array_agg(octet_length(payload) ORDER BY octet_length(payload) DESC) FROM telemetry_rejects WHERE source = "
    assert scalar(api.engine, kept + "'appliance:site-a-01'") == [600_000, 200_001, 200_001, *[1_024] * 7]
    assert scalar(api.engine, kept + "'appliance:site-b-01'") == [600_000]


def test_bytes_have_a_rate_too_also_those_that_are_no_rows(engine: sa.Engine) -> None:
    token = enrol(engine, "site-a-01", "site-a")
    with TestClient(create_app(engine, Limits(bytes_per_second=1_000.0))) as client:

        def send(content: bytes) -> Any:
            headers = bearer(token, **{"Content-Type": "application/json"})
            return client.post("/api/agent/executions", content=content, headers=headers)

        assert send(b"[" + b"x" * 20_000).status_code == 422  # the bucket was full: it is taken, and leaves a debt
        for content in (b"[" + b"y" * 20_000, json.dumps([post("e1")]).encode()):
            refused = send(content)
            assert (refused.status_code, refused.json()["code"]) == (429, "too_many_bytes")
            assert int(refused.headers["Retry-After"]) >= 9
    assert scalar(engine, "SELECT count(*) FROM telemetry_rejects") == 1


def test_refused_requests_count_too(engine: sa.Engine) -> None:
    token, other = enrol(engine, "site-a-01", "site-a"), enrol(engine, "site-b-01", "site-b")
    with TestClient(create_app(engine, Limits(requests_per_second=1.0, refusals_per_second=1.0))) as client:

        def ask(by: str, **query: str) -> tuple[int, str]:
            answer = client.get("/agent/sync", headers=bearer(by), params=query)
            return answer.status_code, answer.json()["code"]

        foreign = [ask(token, site_id="site-b") for _ in range(6)]
        assert foreign == [(403, "foreign_site")] * 4 + [(429, "too_many_requests")] * 2
        assert ask(other) == (503, "manifest_pending")
        guesses = [ask(f"{PREFIX}{n:043d}") for n in range(12)]
        assert guesses == [(401, "invalid_token")] * 10 + [(429, "too_many_refusals")] * 2
        # Its neighbours behind the same address go on; one that was never seen waits for its turn.
        assert ask(other) == (503, "manifest_pending")
        assert ask(enrol(engine, "site-b-02", "site-b")) == (429, "too_many_refusals")


def test_a_full_worker_sends_requests_away_without_reading_them(engine: sa.Engine) -> None:
    token = enrol(engine, "site-a-01", "site-a")
    with TestClient(create_app(engine, Limits(in_flight_per_appliance=1))) as client:
        worker = client.app.state.worker  # type: ignore[attr-defined]
        with worker.gate.entered("site-a-01"):
            refused = client.post("/api/agent/executions", json=[post("e1")], headers=bearer(token))
        assert (refused.status_code, refused.json()["code"]) == (429, "too_many_at_once")
        assert refused.headers["Retry-After"] == "1"
        assert client.post("/api/agent/executions", json=[post("e1")], headers=bearer(token)).status_code == 200
        assert worker.gate.inside == 0


def test_a_bucket_fills_at_its_rate_and_lets_one_large_batch_through_when_full() -> None:
    bucket = Buckets(rate=10.0, burst=20.0)
    assert bucket.take("a", 100) == 0  # more than ever fits, from a full bucket
    assert 7.5 < bucket.take("a", 1) <= 8.2  # 80 in debt
    assert bucket.take("b", 20) == 0
    assert 0 < bucket.take("b", 1) <= 0.1


# -- what the log says ---------------------------------------------------------------------------------------------


def test_what_the_log_says_of_a_failed_statement_holds_no_value_of_a_row_and_no_token(
    engine: sa.Engine, api_login: sa.Engine, caplog: pytest.LogCaptureFixture
) -> None:
    token = enrol(engine, "site-a-01", "site-a")
    with engine.begin() as connection:
        connection.exec_driver_sql(f"ALTER DATABASE {engine.url.database} SET lock_timeout = '100ms'")
    caplog.set_level(logging.DEBUG)
    with TestClient(create_app(api_login, Limits())) as client, engine.connect() as blocker, blocker.begin():
        blocker.exec_driver_sql("LOCK TABLE execution_telemetry IN SHARE MODE")
        rows = [post("of-a-clinic", hostname="HOST-OF-A-CLINIC")]
        answer = client.post("/api/agent/executions", json=rows, headers=bearer(token))
    assert (answer.status_code, answer.json()["code"]) == (503, "database_unavailable")
    ours = "\n".join(record.getMessage() for record in caplog.records if record.name.startswith("flywheel"))
    assert "the database cannot be used: canceling statement due to lock timeout" in ours
    for told in (ours, answer.text, caplog.text):
        assert [word for word in ("of-a-clinic", "HOST-OF", token[4:], "INSERT INTO") if word in told] == []
