"""The agent API as a real server with two workers: killed under load, revoked, scraped, and sent what is no HTTP."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from pathlib import Path

import httpx
import pytest
import sqlalchemy as sa
from agent_http import Api, bearer, enrol, free_port, give_manifest, post, rule, scalar, served

from flywheel_pipeline.delivery.tokens import revoke

pytestmark = [pytest.mark.daemon, pytest.mark.timeout(240)]


def raw(address: str, head: bytes, *, seconds: float = 20) -> bytes:
    """Send bytes and return what comes back until the server closes."""
    host, _, port = address.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=seconds) as connection:
        answer = b""
        try:
            connection.sendall(head)
            while piece := connection.recv(65536):
                answer += piece
        except ConnectionError:
            pass
        return answer


def test_a_server_with_two_workers(engine: sa.Engine, api_login: sa.Engine, tmp_path: Path) -> None:
    """One server for all of it: starting one costs more than the rest together."""
    a, b = enrol(engine, "site-a-01", "site-a"), enrol(engine, "site-b-01", "site-b")
    give_manifest(engine, "site-a-01", "site-a", [rule(1)])
    with served(api_login, tmp_path / "home", workers=2) as (address, process):
        # A worker is not one connection: every worker refuses a revoked token with the next request.
        clients = [httpx.Client(base_url=address, headers=bearer(b)) for _ in range(12)]
        assert {client.get("/agent/sync").status_code for client in clients} == {503}
        with engine.begin() as connection:
            revoke(connection, "site-b-01", actor="dana", reason="for the test")
        assert {client.get("/agent/sync").status_code for client in clients} == {401}

        # The counters are those of both workers, whichever answers.
        time.sleep(5.1)
        for client in clients[:6]:
            text = client.get("/metrics").text
            counted = [
                line for line in text.splitlines() if 'endpoint="/agent/sync"' in line and "_requests_total" in line
            ]
            assert sorted(float(line.split()[-1]) for line in counted) == [12, 12]
        answer = clients[0].get("/healthz")
        assert "server" not in answer.headers

        # What is no HTTP, or too much of it.
        assert raw(address, b"\x16\x03\x01\x02\x00\r\n\r\n").startswith(b"HTTP/1.1 400 ")
        assert raw(address, b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Big: " + b"a" * (1 << 20)).startswith(
            b"HTTP/1.1 400 "
        )
        large = b"POST /api/agent/executions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nAuthorization: Bearer "
        large += a.encode() + b"\r\nContent-Length: 999999999999\r\n\r\n"
        assert raw(address, large).startswith(b"HTTP/1.1 413 ")
        endless = large.replace(b"Content-Length: 999999999999", b"Transfer-Encoding: chunked")
        assert raw(address, endless + (b"100000\r\n" + b" " * (1 << 20) + b"\r\n") * 9).startswith(b"HTTP/1.1 413 ")

        _killed_under_load(address, a, engine, process.pid)
        log = (tmp_path / "home" / "serve.log").read_text()
    for secret in (a, b, a[4:], b[4:]):
        assert secret not in log


def _killed_under_load(address: str, token: str, engine: sa.Engine, supervisor: int) -> None:
    """Kill -9 of everything while three senders post: every row that was answered for is in the database."""
    answered: set[str] = set()
    sent = [0, 0, 0]
    failures: list[str] = []

    def sender(number: int) -> None:
        try:
            send(number)
        except BaseException as error:  # noqa: BLE001 (shown by the test: a thread ends without a word)
            failures.append(repr(error))

    def send(number: int) -> None:
        with httpx.Client(base_url=address, headers=bearer(token), timeout=20) as client:
            while True:
                names = [f"kill-{number}-{sent[number]}-{row}" for row in range(20)]
                sent[number] += 1
                try:
                    answer = client.post("/api/agent/executions", json=[post(name) for name in names])
                except httpx.HTTPError:
                    return
                if answer.status_code == 429:
                    continue
                if answer.status_code != 200:
                    failures.append(f"{answer.status_code} {answer.text[:300]}")
                    return
                answered.update(row["execution_id"] for row in answer.json()["results"])

    threads = [threading.Thread(target=sender, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 60
    while len(answered) < 600 and not failures and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(supervisor, signal.SIGKILL)
    for thread in threads:
        thread.join(30)
    assert failures == []
    assert not any(thread.is_alive() for thread in threads)
    with engine.connect() as connection:
        landed = set(connection.exec_driver_sql("SELECT execution_id FROM execution_telemetry").scalars())
    assert len(answered) >= 600
    assert answered <= landed
    # A batch that was cut off landed whole or not at all.
    unanswered = landed - answered
    assert len(unanswered) % 20 == 0
    assert scalar(engine, "SELECT count(*) FROM touched_cells") > 0


def test_workers_end_with_a_supervisor_that_was_killed(engine: sa.Engine, tmp_path: Path) -> None:
    with served(engine, tmp_path / "home", workers=2) as (address, process):
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            try:
                httpx.get(f"{address}/healthz", timeout=2)
            except httpx.HTTPError:
                break
            time.sleep(0.2)
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"{address}/healthz", timeout=2)


def test_a_port_in_use_is_said_so(api: Api, tmp_path: Path) -> None:
    from flywheel_pipeline.database.settings import Settings
    from flywheel_pipeline.delivery.api.server import serve
    from flywheel_pipeline.errors import PortInUse

    port = free_port()
    with socket.create_server(("127.0.0.1", port)), pytest.raises(PortInUse) as refused:
        serve(Settings(home=tmp_path), host="127.0.0.1", port=port, workers=1)
    assert str(port) in refused.value.message
    assert "--port 8001" in str(refused.value.hint)
