r"""The agent API as `flywheel serve` with two workers: executions in, rules out.

Server, PostgreSQL and the senders (one process of plain sockets, HTTP written by hand) share the machine's cores.
Ingest: batches of 500 rows over 8 kept connections, one appliance each, for 60 s; a 429 is waited for as it says.
Afterwards the rows that were acknowledged are counted in the database. Sync: 200 appliances in turn over 16 connections,
every request with its own token; with the tag they have, then without (500 rules each, gzip as agents ask for it).
Bars: >= 5,000 rows/s, p99 <= 500 ms, none lost; >= 1,000 requests/s with a matching ETag; >= 200 whole manifests/s.

    python benchmarks/bench_api.py [--quick] [--seconds 60]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gzip
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import sqlalchemy as sa
import uvloop

from flywheel_pipeline.database import migrate
from flywheel_pipeline.database.embedded import EmbeddedServer
from flywheel_pipeline.database.engine import open_engine
from flywheel_pipeline.delivery.manifest import Manifest, manifest_hash
from flywheel_pipeline.delivery.publish import write_contents
from flywheel_pipeline.delivery.tokens import issue

ROWS_BAR, P99_BAR, MATCHING_BAR, WHOLE_BAR = 5_000, 0.5, 1_000, 200
BATCH, SENDERS, READERS, APPLIANCES, RULES = 500, 8, 16, 200, 500


@dataclass
class Tally:
    """What came back: statuses, seconds of each request, bytes, and the ids that were acknowledged."""

    statuses: Counter[int] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    received: int = 0
    acknowledged: int = 0
    tags: dict[str, str] = field(default_factory=dict)

    def p(self, fraction: float) -> float:
        """Quantile of the seconds."""
        ordered = sorted(self.seconds)
        return ordered[min(int(len(ordered) * fraction), len(ordered) - 1)] if ordered else float("nan")


class Line:
    """One kept connection: a request at a time, HTTP/1.1 by hand."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, head: str, body: bytes = b"") -> tuple[int, dict[str, str], bytes]:
        """Send a request; return status, headers and body of the answer."""
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port, limit=1 << 20)
        reader, writer = self._streams
        length = f"Content-Length: {len(body)}\r\n" if body else ""
        writer.write(f"{head}Host: bench\r\n{length}\r\n".encode() + body)
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        answer = await reader.readexactly(int(headers.get("content-length", "0")))
        if headers.get("connection") == "close":
            self.close()
        return int(first.split()[1]), headers, answer

    def close(self) -> None:
        """Close it."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


def template(site: str) -> bytes:
    """A row of 0.7 kB with a place for its id."""
    started = datetime.now(UTC) - timedelta(minutes=30)
    row = {
        "site_id": site,
        "reported_at": (started + timedelta(seconds=20)).isoformat(),
        "execution": {
            "execution_id": "%s",
            "incident_id": "inc-0123456789ab",
            "runbook_id": "L1-FIREWALL-001",
            "hostname": "ws01",
            "platform": "windows",
            "incident_type": "firewall",
            "agent_version": "1.0.70",
            "started_at": started.isoformat(),
            "completed_at": (started + timedelta(seconds=9)).isoformat(),
            "duration_seconds": 9.0,
            "success": True,
            "status": "success",
            "verification_passed": True,
            "confidence": 0.95,
            "resolution_level": "L1",
            "state_before": {"status": "non_compliant"},
            "state_after": {"status": "compliant"},
            "error_message": None,
            "retry_count": 0,
        },
    }
    return json.dumps(row).encode()


async def ingest(port: int, tokens: list[str], seconds: float) -> Tally:
    """Post batches until the time is over; every batch is sent until it is taken."""
    tally, end = Tally(), time.monotonic() + seconds

    async def sender(number: int) -> None:
        line, row, sent = Line(port), template(f"site-{number:03d}"), 0
        head = (
            "POST /api/agent/executions HTTP/1.1\r\nContent-Type: application/x-ndjson\r\n"
            f"Authorization: Bearer {tokens[number]}\r\n"
        )
        while time.monotonic() < end:
            body = b"\n".join(row % b"b-%d-%d-%d" % (number, sent, each) for each in range(BATCH))
            sent += 1
            while True:
                begun = time.perf_counter()
                status, headers, answer = await line.ask(head, body)
                tally.statuses[status] += 1
                if status != 429:
                    break
                await asyncio.sleep(float(headers["retry-after"]))
            tally.seconds.append(time.perf_counter() - begun)
            if status == 200:
                # The counts precede the rows' answers; parsing 500 of them would load the cores that are measured.
                counts = json.loads(answer[: answer.index(b',"results"')] + b"}")
                tally.acknowledged += counts["inserted"]
        line.close()

    await asyncio.gather(*(sender(number) for number in range(SENDERS)))
    return tally


async def ask_for_rules(port: int, tokens: list[str], seconds: float, tags: dict[str, str] | None) -> Tally:
    """Fetch manifests, each appliance in turn; with `tags`, saying which one it has."""
    tally, end, turn = Tally(), time.monotonic() + seconds, iter(range(1 << 62))

    async def reader() -> None:
        line = Line(port)
        while time.monotonic() < end:
            token = tokens[next(turn) % len(tokens)]
            head = f"GET /agent/sync HTTP/1.1\r\nAccept-Encoding: gzip\r\nAuthorization: Bearer {token}\r\n"
            if tags is not None:
                head += f"If-None-Match: {tags[token]}\r\n"
            begun = time.perf_counter()
            status, headers, answer = await line.ask(head)
            tally.seconds.append(time.perf_counter() - begun)
            tally.statuses[status] += 1
            tally.received += len(answer)
            if status == 200 and token not in tally.tags:
                tally.tags[token] = headers["etag"]
                assert json.loads(gzip.decompress(answer))["count"] == RULES
        line.close()

    await asyncio.gather(*(reader() for _ in range(READERS)))
    return tally


def sender_process(port: int, work: str, tokens: list[str], seconds: float) -> None:
    """The body of the process that sends; it prints its tally as JSON."""
    out: dict[str, Any] = {}

    async def run() -> None:
        acts: dict[str, Callable[[], Awaitable[Tally]]] = {
            "ingest": lambda: ingest(port, tokens, seconds),
            "sync": lambda: both(port, tokens, seconds, out),
        }
        begun = time.monotonic()
        tally = await acts[work]()
        out[work] = told(tally, time.monotonic() - begun)

    uvloop.run(run())
    sys.stdout.write(json.dumps(out))


async def both(port: int, tokens: list[str], seconds: float, out: dict[str, Any]) -> Tally:
    """Whole manifests first (they bring the tags), then with the tags."""
    first = await ask_for_rules(port, tokens, 2, None)  # every answer is made once
    while len(first.tags) < len(tokens):
        first.tags |= (await ask_for_rules(port, tokens, 1, None)).tags
    begun = time.monotonic()
    whole = await ask_for_rules(port, tokens, seconds, None)
    out["whole"] = told(whole, time.monotonic() - begun)
    begun = time.monotonic()
    matching = await ask_for_rules(port, tokens, seconds, first.tags)
    out["matching"] = told(matching, time.monotonic() - begun)
    return matching


def told(tally: Tally, elapsed: float) -> dict[str, Any]:
    """A tally as plain values."""
    return {
        "seconds": elapsed,
        "statuses": {str(status): count for status, count in tally.statuses.items()},
        "p50": tally.p(0.5),
        "p99": tally.p(0.99),
        "most": max(tally.seconds, default=0),
        "acknowledged": tally.acknowledged,
        "bytes": tally.received,
    }


@contextmanager
def served(url: str, home: Path, workers: int = 2) -> Iterator[int]:
    """`flywheel serve` on a free port, ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    command = [sys.executable, "-m", "flywheel_pipeline.cli", "serve", "--port", str(port), "--workers", str(workers)]
    environment = {**os.environ, "FLYWHEEL_HOME": str(home), "FLYWHEEL_DATABASE_URL": url}
    process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        deadline = time.monotonic() + 90
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=5):
                    break
            except (urllib.error.URLError, OSError):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
        yield port
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def enrol(engine: sa.Engine, appliances: int) -> list[str]:
    """Register appliances, each at a site of its own, with a manifest of its own of 500 rules; return their tokens."""
    tokens = []
    with engine.begin() as connection:
        for number in range(appliances):
            appliance, site = f"appliance-{number:03d}", f"site-{number:03d}"
            tokens.append(issue(connection, appliance, site_id=site, actor="bench", reason="benchmark").token)
            rules = [
                {
                    "id": f"RB-AUTO-{each:04d}",
                    "name": f"Runbook {each} of {site}",
                    "conditions": [{"field": "incident_type", "operator": "eq", "value": f"type_{each}"}],
                    "actions": [f"run_windows_runbook:RB-WIN-SEC-{each:03d}"],
                    "severity": "medium",
                    "cooldown_seconds": 300,
                    "max_retries": 1,
                    "source": "promoted",
                    "version": 1,
                }
                for each in range(RULES)
            ]
            manifest = Manifest(appliance, site, manifest_hash(rules), tuple(rules), ())
            connection.execute(
                sa.text(
                    "INSERT INTO appliance_manifests (appliance_id, site_id, content_hash, batch_id) "
                    "VALUES (:appliance, :site, :content, 1)"
                ),
                {"appliance": appliance, "site": site, "content": write_contents(connection, [manifest])[0]},
            )
    return tokens


def send(port: int, work: str, tokens: list[str], seconds: float) -> dict[str, Any]:
    """Run the senders in a process of their own; return what they tell."""
    asked = json.dumps({"port": port, "work": work, "tokens": tokens, "seconds": seconds})
    done = subprocess.run(
        [sys.executable, __file__, "--sender"], input=asked, stdout=subprocess.PIPE, text=True, check=True
    )
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def line(met: bool, text: str) -> bool:
    """Print a line of the table."""
    print(f"{'ok  ' if met else 'MISS'} api: {text}", flush=True)
    return met


def measure(engine: sa.Engine, port: int, tokens: list[str], seconds: float, reading: float) -> bool:
    """Measure and print; return whether the bars hold."""
    took = send(port, "ingest", tokens, seconds)["ingest"]
    with engine.connect() as connection:
        landed = connection.exec_driver_sql("SELECT count(*) FROM execution_telemetry").scalar_one()
    rate, refused = took["acknowledged"] / took["seconds"], {k: v for k, v in took["statuses"].items() if k != "200"}
    lost = took["acknowledged"] - landed
    met = line(
        rate >= ROWS_BAR and took["p99"] <= P99_BAR and lost == 0 and not set(refused) - {"429"},
        f"ingest {rate:,.0f} rows/s for {took['seconds']:.0f} s (bar {ROWS_BAR:,}), p50 {took['p50'] * 1e3:.0f} ms, "
        f"p99 {took['p99'] * 1e3:.0f} ms (bar {P99_BAR * 1e3:.0f}), {took['acknowledged']:,} acknowledged, "
        f"{landed:,} in the database, other answers {refused or 'none'}",
    )
    read = send(port, "sync", tokens, reading)
    for name, key, status, bar in (
        ("matching ETag", "matching", "304", MATCHING_BAR),
        (f"manifest of {RULES} rules", "whole", "200", WHOLE_BAR),
    ):
        told = read[key]
        right = told["statuses"].get(status, 0)
        met &= line(
            right / told["seconds"] >= bar and set(told["statuses"]) == {status},
            f"sync, {name}: {right / told['seconds']:,.0f} requests/s (bar {bar:,}), p99 {told['p99'] * 1e3:.0f} ms, "
            f"answers {told['statuses']}",
        )
    return met


def main() -> None:
    """Run the benchmark; exit 1 below a bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--sender", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.sender:
        asked = json.load(sys.stdin)
        sender_process(asked["port"], asked["work"], asked["tokens"], asked["seconds"])
        return
    home = Path(tempfile.mkdtemp(prefix="fw-bench-"))
    server = EmbeddedServer(home)
    server.ensure_running()
    try:
        engine = open_engine(server.url)
        migrate.upgrade(engine)
        tokens = enrol(engine, APPLIANCES)
        seconds, reading = (6, 3) if options.quick else (options.seconds, 10)
        with served(server.url.render_as_string(hide_password=False), home) as port:
            met = measure(engine, port, tokens, seconds, reading)
        engine.dispose()
    finally:
        server.remove()
        shutil.rmtree(home, ignore_errors=True)
    raise SystemExit(0 if met else 1)


if __name__ == "__main__":
    main()
