"""What the tests of the agent API share: posts dated now, appliances with tokens, the API in process and as a server.

Belongs here: set-up. Does not belong here: any assertion about the API.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import sqlalchemy as sa
from starlette.testclient import TestClient

from flywheel_pipeline.delivery.manifest import Manifest, manifest_hash
from flywheel_pipeline.delivery.publish import write_contents
from flywheel_pipeline.delivery.tokens import issue

NDJSON = "application/x-ndjson"


def iso(minutes: float = 0) -> str:
    """A time so many minutes from now, as agents write it."""
    return (datetime.now(UTC) + timedelta(minutes=minutes)).isoformat()


STARTED = iso(-60)


def post(execution_id: str, site_id: str = "site-a", **fields: Any) -> dict[str, Any]:
    """A post that keeps the contract, reported now."""
    execution = {
        "execution_id": execution_id,
        "runbook_id": "RB-AUTO-FIREWALL",
        "hostname": "ws01",
        "platform": "windows",
        "incident_type": "firewall",
        "started_at": STARTED,
        "success": True,
        "status": "success",
        "resolution_level": "L1",
        **fields,
    }
    return {"site_id": site_id, "reported_at": iso(), "execution": execution}


def ndjson(rows: Sequence[Mapping[str, Any] | bytes]) -> bytes:
    """Rows as NDJSON; bytes stand as they are."""
    return b"\n".join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows)


def enrol(engine: sa.Engine, appliance_id: str, site_id: str, **options: Any) -> str:
    """Register an appliance at a site and issue its token."""
    with engine.begin() as connection:
        return issue(
            connection, appliance_id, site_id=site_id, actor="dana", reason="enrolled for the test", **options
        ).token


def bearer(token: str, **headers: str) -> dict[str, str]:
    """Headers with this token."""
    return {"Authorization": f"Bearer {token}", **headers}


def give_manifest(engine: sa.Engine, appliance_id: str, site_id: str, rules: Sequence[Mapping[str, Any]]) -> None:
    """Let this be the appliance's desired state."""
    manifest = Manifest(appliance_id, site_id, manifest_hash(rules), tuple(map(dict, rules)), ())
    with engine.begin() as connection:
        [content] = write_contents(connection, [manifest])
        connection.execute(
            sa.text(
                """
                INSERT INTO appliance_manifests (appliance_id, site_id, content_hash, batch_id)
                VALUES (:appliance, :site, :content, 1)
                ON CONFLICT (appliance_id) DO UPDATE SET content_hash = excluded.content_hash, site_id = excluded.site_id
                """
            ),
            {"appliance": appliance_id, "site": site_id, "content": content},
        )


def rule(number: int) -> dict[str, Any]:
    """A rule as manifests hold it."""
    return {
        "id": f"RB-AUTO-{number:04d}",
        "name": f"Runbook {number}",
        "conditions": [{"field": "incident_type", "operator": "eq", "value": f"type_{number}"}],
        "actions": [f"run_windows_runbook:RB-WIN-SEC-{number:03d}"],
        "severity": "medium",
        "cooldown_seconds": 300,
        "max_retries": 1,
        "source": "promoted",
        "version": 1,
    }


def scalar(engine: sa.Engine, query: str, **values: Any) -> Any:
    """The one value of a query."""
    with engine.connect() as connection:
        return connection.execute(sa.text(query), values).scalar_one()


@dataclass
class Api:
    """The API in this process, and the appliances `site-a-01` and `site-b-01` with their tokens."""

    client: TestClient
    engine: sa.Engine
    a: str
    b: str

    def send(self, rows: Any, token: str | None = None, **headers: str) -> httpx.Response:
        """Post executions as JSON (or bytes as they are)."""
        content = rows if isinstance(rows, bytes) else json.dumps(rows).encode()
        known = {
            "Content-Type": "application/json",
            **{name.replace("_", "-"): value for name, value in headers.items()},
        }
        return self.client.post("/api/agent/executions", content=content, headers=bearer(token or self.a, **known))

    def sync(self, token: str | None = None, **headers: str) -> httpx.Response:
        """Ask for the manifest; without gzip unless asked for."""
        known = {"Accept-Encoding": "identity", **{name.replace("_", "-"): value for name, value in headers.items()}}
        return self.client.get("/agent/sync", headers=bearer(token or self.a, **known))


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def served(engine: sa.Engine, home: Path, workers: int = 1) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """`flywheel serve` as a user starts it, ready; its address and process. Killed at the end, group and all."""
    port = free_port()
    environment = {
        **os.environ,
        "FLYWHEEL_HOME": str(home),
        "FLYWHEEL_DATABASE_URL": engine.url.render_as_string(hide_password=False),
    }
    command = [sys.executable, "-m", "flywheel_pipeline.cli", "serve", "--port", str(port), "--workers", str(workers)]
    log = home / "serve.log"
    home.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 90
        while True:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=5):
                    break
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}", process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
