"""Limits of a request and of a caller, and the counters that hold them.

Belongs here: figures, the token bucket, the gate of requests in flight. Does not belong here: the limits of a row
(`telemetry.contract`). Buckets and gates live in one event loop and one worker, so they need no locks; a figure per
appliance is therefore divided by the number of workers, among which connections spread evenly.
"""

from __future__ import annotations

import math
import time
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from flywheel_pipeline.delivery.api.problems import busy
from flywheel_pipeline.delivery.tokens import digest


@dataclass(frozen=True, slots=True)
class Limits:
    """What one worker takes.

    Bytes are of one request: `body_bytes` as sent, `inflated_bytes` after gzip, `small_body_bytes` where no rows are
    expected. `body_seconds` is the time a body may take to arrive. The rates are of one appliance and all workers; rows
    are counted with their bytes, inflated. `refusals_per_second` is of one address: tokens that do not hold.
    """

    body_bytes: int = 8 << 20
    inflated_bytes: int = 16 << 20
    small_body_bytes: int = 32 << 10
    rows: int = 5_000
    body_seconds: float = 30.0
    in_flight: int = 16
    in_flight_per_appliance: int = 2
    requests_per_second: float = 50.0
    rows_per_second: float = 5_000.0
    bytes_per_second: float = 4 << 20
    refusals_per_second: float = 10.0
    workers: int = 1


class Buckets:
    """A token bucket for each key: `rate` units a second, `burst` at once; a unit is a request, a row or a byte."""

    _KEPT = 50_000

    def __init__(self, rate: float, burst: float) -> None:
        self._rate = rate
        self._burst = burst
        self._levels: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, key: str, units: float = 1.0) -> float:
        """Take units; returns 0, or how many seconds to wait if there are not enough (nothing is taken then).

        More units than the burst are granted once the bucket is full: they leave it in debt.
        """
        now = time.monotonic()
        level = self._level(key, now)
        missing = min(units, self._burst) - level
        if missing <= 0:
            level -= units
        self._levels[key] = (level, now)
        self._levels.move_to_end(key)
        if len(self._levels) > self._KEPT:
            self._levels.popitem(last=False)
        return max(missing / self._rate, 0.0)

    def wait(self, key: str) -> float:
        """How many seconds until there is a unit to take; nothing is taken."""
        return max((min(1.0, self._burst) - self._level(key, time.monotonic())) / self._rate, 0.0)

    def _level(self, key: str, now: float) -> float:
        level, since = self._levels.get(key, (self._burst, now))
        return min(self._burst, level + (now - since) * self._rate)


@dataclass(slots=True)
class Gate:
    """Requests in flight: at most `limit` in all and `limit_per_key` for one key. Who does not fit is sent away."""

    limit: int
    limit_per_key: int
    _inside: Counter[str] = field(default_factory=Counter)

    @property
    def inside(self) -> int:
        """How many are in."""
        return self._inside.total()

    @contextmanager
    def entered(self, key: str) -> Iterator[None]:
        """Be inside while the block runs.

        Raises:
            Problem: 429, all places are taken.
        """
        if self._inside[key] >= self.limit_per_key:
            raise busy("too_many_at_once", f"{self.limit_per_key} requests of this appliance are being worked on.", 1)
        if self.inside >= self.limit:
            raise busy("busy", f"{self.limit} requests are being worked on.", 1)
        self._inside[key] += 1
        try:
            yield
        finally:
            self._inside[key] -= 1
            if not self._inside[key]:
                del self._inside[key]


class Rates:
    """The rate limits of appliances and addresses in this worker."""

    _KNOWN = 50_000

    def __init__(self, limits: Limits) -> None:
        requests = limits.requests_per_second / limits.workers
        rows = limits.rows_per_second / limits.workers
        size = limits.bytes_per_second / limits.workers
        refusals = limits.refusals_per_second / limits.workers
        self._requests = Buckets(requests, max(requests * 4, 1.0))
        self._rows = Buckets(rows, max(rows * 10, 1.0))
        self._bytes = Buckets(size, max(size * 10, 1.0))
        self._refusals = Buckets(refusals, max(refusals * 10, 1.0))
        self._known: OrderedDict[str, None] = OrderedDict()

    def request(self, appliance_id: str) -> None:
        """Count a request. Raises Problem (429) above the rate."""
        if wait := self._requests.take(appliance_id):
            raise busy("too_many_requests", "This appliance sends more requests than it may.", math.ceil(wait))

    def rows(self, appliance_id: str, rows: int, size: int) -> None:
        """Count rows and their bytes. Raises Problem (429) above either rate."""
        if wait := self._rows.take(appliance_id, rows):
            raise busy("too_many_rows", "This appliance sends more rows than it may.", math.ceil(wait))
        if wait := self._bytes.take(appliance_id, size):
            raise busy("too_many_bytes", "This appliance sends more bytes than it may.", math.ceil(wait))

    def may_ask(self, address: str, token: str) -> None:
        """Let a token be looked up, unless too many from this address did not hold.

        One that held before in this worker is always looked up: behind one address there may be a whole clinic.

        Raises:
            Problem: 429.
        """
        if (wait := self._refusals.wait(address)) and digest(token) not in self._known:
            raise busy("too_many_refusals", "Too many tokens from this address did not hold.", math.ceil(wait))

    def refused(self, address: str, token: str) -> None:
        """Count a token that did not hold."""
        self._known.pop(digest(token), None)
        self._refusals.take(address)

    def held(self, token: str) -> None:
        """Remember a token that held; what it may do is asked anew each time."""
        hashed = digest(token)
        self._known[hashed] = None
        self._known.move_to_end(hashed)
        if len(self._known) > self._KNOWN:
            self._known.popitem(last=False)
