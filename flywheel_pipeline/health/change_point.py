"""Since when a rule fails: one change of its daily rate, by a binomial log-likelihood scan, and what happened that day.

Belongs here: pure functions on daily counts and on events. Does not belong here: reading them (`why`).
"""

from __future__ import annotations

import datetime as dt
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

MIN_DAYS = 3  # on either side: a change seen on fewer days is a bad day
MIN_EXECUTIONS = 20  # on either side
MIN_CHANGE = 0.05  # of the rate, a fraction: less is not worth a sentence
ALPHA = 0.01
WITHIN_DAYS = 1  # of the change: what is joined to it
RESAMPLES = 999


@dataclass(frozen=True)
class Event:
    """Something that happened on a day: `kind` is agent, policy or ledger."""

    day: dt.date
    kind: str
    what: str
    sites: int | None = None


@dataclass(frozen=True)
class ChangePoint:
    """The day from which on the rate is another one.

    Attributes:
        day: the first day of the new rate.
        before, after: success rates, fractions; executions_before, executions_after: what they rest on.
        gain: log-likelihood of two rates over that of one.
        p_value: share of reshuffles of the days with a change as large.
        events: what happened within a day of it.
    """

    day: dt.date
    before: float
    after: float
    executions_before: int
    executions_after: int
    gain: float
    p_value: float
    events: tuple[Event, ...] = ()


def find_change(
    days: Sequence[tuple[dt.date, int, int]], *, alpha: float = ALPHA, seed: int = 20260215
) -> ChangePoint | None:
    """Find the day on which the success rate changed, if one did beyond chance.

    Days are the clusters: the scan's best gain is held against its best gain over the same days in any other order, so
    neither bursts within a day nor the choice among all days makes a change.

    Args:
        days: (day, executions, failures), each day once; days without executions may be missing.
        alpha: probability of finding a change where there is none.
        seed: of the reshuffles.
    """
    import numpy as np

    ordered = sorted((day, n, f) for day, n, f in days if n > 0)
    if len(ordered) < 2 * MIN_DAYS:
        return None
    n = np.array([row[1] for row in ordered], dtype=np.float64)
    f = np.array([row[2] for row in ordered], dtype=np.float64)
    n_all, f_all = n.sum(), f.sum()
    if f_all in (0, n_all):
        return None

    def likelihood(
        failures: np.typing.NDArray[np.float64], executions: np.typing.NDArray[np.float64]
    ) -> np.typing.NDArray[np.float64]:
        rate = np.clip(failures / np.maximum(executions, 1), 1e-12, 1 - 1e-12)
        value: np.typing.NDArray[np.float64] = failures * np.log(rate) + (executions - failures) * np.log1p(-rate)
        return value

    def gains(order: np.typing.NDArray[np.int64]) -> np.typing.NDArray[np.float64]:
        before_n, before_f = n[order].cumsum(axis=-1)[..., :-1], f[order].cumsum(axis=-1)[..., :-1]
        value = likelihood(before_f, before_n) + likelihood(f_all - before_f, n_all - before_n)
        value -= likelihood(np.array(f_all), np.array(n_all))
        place = np.arange(1, n.size)
        enough = (place >= MIN_DAYS) & (n.size - place >= MIN_DAYS)
        enough = enough & (before_n >= MIN_EXECUTIONS) & (n_all - before_n >= MIN_EXECUTIONS)
        found: np.typing.NDArray[np.float64] = np.where(enough, value, 0.0)
        return found

    observed = gains(np.arange(n.size))
    place = int(observed.argmax())
    if observed[place] <= 0:
        return None
    before_n, before_f = int(n[: place + 1].sum()), int(f[: place + 1].sum())
    after_n, after_f = int(n_all) - before_n, int(f_all) - before_f
    before, after = 1 - before_f / before_n, 1 - after_f / after_n
    if abs(after - before) < MIN_CHANGE:
        return None
    rng = np.random.default_rng(seed)
    shuffled = np.argsort(rng.random((RESAMPLES, n.size)), axis=1)
    larger = int((gains(shuffled).max(axis=1) >= observed[place]).sum())
    p_value = (1 + larger) / (RESAMPLES + 1)
    if p_value > alpha:
        return None
    return ChangePoint(ordered[place + 1][0], before, after, before_n, after_n, float(observed[place]), p_value)


def agent_upgrades(first_seen: Iterable[tuple[str, str | None, dt.date]]) -> list[Event]:
    """The days on which releases reached sites that had run another one, as one event a release and day.

    Args:
        first_seen: (site, agent version, first day of it there); null versions are passed over.
    """
    by_site: dict[str, list[tuple[dt.date, str]]] = defaultdict(list)
    for site, version, day in first_seen:
        if version is not None:
            by_site[site].append((day, version))
    reached: Counter[tuple[dt.date, str]] = Counter()
    for versions in by_site.values():
        begun = min(day for day, _ in versions)
        reached.update((day, version) for day, version in versions if day > begun)
    return [
        Event(day, "agent", f"agent {version} reached {sites} site{'' if sites == 1 else 's'}", sites)
        for (day, version), sites in sorted(reached.items())
    ]


def join_events(change: ChangePoint, events: Iterable[Event]) -> tuple[Event, ...]:
    """The events within a day of the change: upgrades of most sites first, then policy and ledger."""
    near = [event for event in events if abs((event.day - change.day).days) <= WITHIN_DAYS]
    return tuple(sorted(near, key=lambda e: (e.kind != "agent", -(e.sites or 0), e.day, e.what)))
