"""GET /metrics and GET /healthz: what Prometheus and load balancers ask.

Belongs here: gauges, read from the database at the scrape; counters of requests, kept by prometheus-client in files that
all workers share (PROMETHEUS_MULTIPROC_DIR), so that any worker answers for all. Does not belong here: judging; alerts do.

/metrics tells of the whole fleet, so an appliance has no business there: it answers on the loopback interface, and
elsewhere to the bearer of FLYWHEEL_API_METRICS_TOKEN alone.
"""

from __future__ import annotations

import hmac
import ipaddress
import logging
import os
import threading
import time
from collections.abc import Iterator
from typing import Any, Final

import psycopg
import sqlalchemy as sa
from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flywheel_pipeline.database.current import require_current
from flywheel_pipeline.delivery.api.auth import bearer_token, unauthorized
from flywheel_pipeline.delivery.api.connections import first_line
from flywheel_pipeline.delivery.api.problems import Problem, json_response
from flywheel_pipeline.delivery.api.state import worker_of
from flywheel_pipeline.errors import FlywheelError

_log = logging.getLogger("flywheel.api")

REQUESTS: Final = Counter("flywheel_api_requests", "Requests answered.", ("endpoint", "method", "status"))
SECONDS: Final = Histogram(
    "flywheel_api_request_seconds",
    "From the head of a request to the last byte of its answer.",
    ("endpoint",),
    buckets=(0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
)
ROWS: Final = Counter("flywheel_api_rows", "Rows of executions answered for, by what became of them.", ("outcome",))

#: How long an answer is good for: whoever asks more often gets the same one, and the database is asked once.
METRICS_SECONDS: Final = 5.0
HEALTH_SECONDS: Final = 1.0

#: name -> help; the queries are those of flywheel_api_gauges() (`routines/65_agent_api.sql`).
GAUGES: Final[dict[str, str]] = {
    "flywheel_stuck_candidates": "Patterns approved, or decided to be promoted, and still not promoted after 15 minutes.",
    "flywheel_last_promotion_age_seconds": "Since the last promotion of any rule; no sample before the first.",
    "flywheel_rules_quarantined": "Rules in quarantine.",
    "flywheel_rules_enabled": "Promoted rules in service.",
    "flywheel_commands_undelivered": "Commands that no appliance fetched yet.",
    "flywheel_commands_undelivered_age_seconds": "Age of the oldest of them; 0 if there is none.",
    "flywheel_commands_unacknowledged": "Commands that were fetched and not answered yet.",
    "flywheel_unresolved_rule_ids": "Rule ids that telemetry names and the registry does not know.",
    "flywheel_unresolved_executions": "Executions of those ids.",
    "flywheel_refresh_lag_seconds": "Age of the oldest telemetry that the aggregates do not count yet; 0 if they count all.",
    "flywheel_waiting_cells": "Site-days that wait for the refresh.",
    "flywheel_last_refresh_age_seconds": "Since the last refresh of the aggregates; no sample before the first.",
    "flywheel_open_rejects": "Refused rows that wait for a decision.",
    "flywheel_appliances_out_of_sync": "Appliances that report another rule set than the one they should run.",
}


def read_gauges(connection: psycopg.Connection[Any]) -> dict[str, float | None]:
    """All gauges as of one moment (None: there is nothing to tell), within five seconds or not at all."""
    with connection.transaction():
        connection.execute("SET LOCAL statement_timeout = '5s'")
        return dict(connection.execute("SELECT name, value FROM flywheel_api_gauges()").fetchall())


class _Gauges(Collector):
    """The gauges of one scrape."""

    def __init__(self, values: dict[str, float | None]) -> None:
        self._values = values

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield those that have a value."""
        for name, value in self._values.items():
            if value is not None:
                yield GaugeMetricFamily(name, GAUGES[name], value=value)


class _Remembered:
    """An answer and when it was made."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._lock = threading.Lock()
        self._made = -seconds
        self._answer: Any = None

    def get(self, make: Any) -> Any:
        """The answer, made anew when it is older than it may be; who asks meanwhile waits for that one."""
        with self._lock:
            if time.monotonic() - self._made >= self._seconds:
                self._answer = make()
                self._made = time.monotonic()
            return self._answer


class Observed:
    """What one worker remembers of its answers to /metrics and /healthz."""

    def __init__(self, metrics_token: str | None) -> None:
        self.metrics_token = metrics_token
        self.metrics = _Remembered(METRICS_SECONDS)
        self.health = _Remembered(HEALTH_SECONDS)


async def metrics(request: Request) -> Response:
    """The gauges of the fleet and the counters of the API, in Prometheus' text format."""
    observed: Observed = request.app.state.observed
    _require_scraper(request, observed.metrics_token)

    def scrape(connection: psycopg.Connection[Any]) -> bytes:
        registry = CollectorRegistry()
        registry.register(_Gauges(read_gauges(connection)))
        counters = REGISTRY
        if os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
            counters = CollectorRegistry()
            MultiProcessCollector(counters)  # type: ignore[no-untyped-call]
        return generate_latest(registry) + generate_latest(counters)

    body = await worker_of(request).connections.read(
        lambda connection: observed.metrics.get(lambda: scrape(connection))
    )
    return Response(body, media_type=CONTENT_TYPE_LATEST)


def _require_scraper(request: Request, token: str | None) -> None:
    if token is not None:
        if not hmac.compare_digest(bearer_token(request).encode(), token.encode()):
            raise unauthorized("invalid_token", "The token is not that of the metrics.")
        return
    host = request.client.host if request.client else ""
    forwarded = any(name in request.headers for name in ("forwarded", "x-forwarded-for", "x-real-ip"))
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = False
    if forwarded or not local:
        raise Problem(
            403,
            "not_local",
            "Metrics are answered on this machine alone.",
            "Set FLYWHEEL_API_METRICS_TOKEN on the server and send it as bearer token.",
        )


async def health(request: Request) -> Response:
    """200 where the database is reachable and its schema this release's; 503 with the reason otherwise."""
    observed: Observed = request.app.state.observed

    def look(engine: sa.Engine) -> dict[str, str]:
        try:
            with engine.connect() as connection:
                require_current(connection)
        except FlywheelError as error:
            return {"code": "schema", "reason": error.message, "hint": error.hint or ""}
        except (sa.exc.OperationalError, sa.exc.ProgrammingError, sa.exc.TimeoutError) as error:
            # Whoever asks is told that, and not where the database is; the log has the rest.
            _log_unreachable(error)
            return {"code": "database", "reason": "The database cannot be used.", "hint": "See the server's log."}
        return {}

    problem = await worker_of(request).connections.compute(
        lambda: observed.health.get(lambda: look(worker_of(request).connections.engine))
    )
    if problem:
        return json_response({"status": "failing", **problem}, 503, {"Retry-After": "5"})
    return json_response({"status": "ok", "database": "reachable", "schema": "current"})


def _log_unreachable(error: Exception) -> None:
    _log.error("health: the database cannot be used: %s", first_line(error))


class Observation:
    """ASGI middleware: counts requests and their seconds by endpoint, of which there are few, never by path."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = time.perf_counter()
        status = "aborted"

        async def observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        try:
            await self._app(scope, receive, observed)
        finally:
            route = scope.get("route")
            endpoint = str(getattr(route, "path", "other"))
            method = scope["method"] if scope["method"] in ("GET", "POST") else "other"
            REQUESTS.labels(endpoint, method, status).inc()
            SECONDS.labels(endpoint).observe(time.perf_counter() - begun)
