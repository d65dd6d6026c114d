"""Where a rule fails: the search for segments whose failures are more than chance, each with its counterfactual rate.

Belongs here: pure functions on cells (arrays). Does not belong here: reading cells (`why`), words and advice (`report`).
numpy is imported with this module, so import it inside the function that needs it.

How a false cause is kept out: the null is that hosts are exchangeable. Each round resamples it by giving every host the
history of another host of about its volume, rotated in time: bursts and dead hosts stay as they are, with their
volume; only their tie to site, release, os, hardware and time is cut. A segment is named where its studentized excess
is beyond the largest one of any segment in (almost) every resample, so the number of segments searched costs nothing.
What an agent did not send is null, which is never a cause.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Profile = tuple[str, str, str | None, str | None, str | None]  # site, host, agent version, os, hardware

#: What may be a condition, the most telling first: of two segments with the same rows the first is named.
DIMENSIONS: tuple[str, ...] = ("agent_version", "hardware", "os", "site")
MIN_EXECUTIONS = 20
MIN_HOSTS = 3
MIN_SHARE = 0.02  # of all failures: below that a cause is not worth a sentence
MAX_CAUSES = 6
MAX_BUCKETS = 60  # of time; up to two months a bucket is a day
ALPHA = 0.01  # of naming any segment in a fleet without a cause; measured: benchmarks/bench_attribution.py
KEEPS = 0.8  # of the excess: what a more precise segment must keep to be named instead of a wider one
_PACKED = float(1 << 26)  # executions x this + failures is exact in a float up to 67 million executions
PREFERS_SIMPLE = 0.93  # of the likelihood gain: one condition is named before two


@dataclass(frozen=True)
class Cells:
    """A rule's executions, counted by host and all that may tell where they fail.

    Attributes:
        codes: by dimension one code a cell, an index into `labels`; -1 where the agent did not say.
        labels: by dimension the values.
        host: code of the host, unique over sites; bucket: index of the time bucket.
        executions, failures: counts a cell.
        bucket_days: first day of each bucket.
    """

    codes: Mapping[str, Ints]
    labels: Mapping[str, Sequence[str]]
    host: Ints
    bucket: Ints
    executions: Ints
    failures: Ints
    bucket_days: Sequence[dt.date]

    def only(self, rows: Bools) -> Cells:
        """These cells alone."""
        return replace(
            self,
            codes={name: codes[rows] for name, codes in self.codes.items()},
            host=self.host[rows],
            bucket=self.bucket[rows],
            executions=self.executions[rows],
            failures=self.failures[rows],
        )


@dataclass(frozen=True)
class Condition:
    """One condition of a segment: `dimension` of DIMENSIONS equals `value`; or `since`, `until`, `on` the bucket of a day."""

    dimension: str
    value: str


@dataclass(frozen=True)
class Segment:
    """Executions that fail more than the others do, beyond chance.

    Attributes:
        conditions: one or two, all of which hold.
        executions, failures, hosts, sites: of the whole segment.
        excess: failures beyond what the rate outside predicts, among executions of no segment before it.
        share: fraction of all failures that would be gone if this and nothing else changed after those before it.
        rate: success rate inside.
        rate_if_fixed: success rate of the rule if this and all causes before it were fixed.
        rate_if_only_this_fixed: the same if this alone was.
        p_value: share of fleets without a cause in which some segment looks as bad.
        also: other values that hold for the same executions, as `dimension value`.
    """

    conditions: tuple[Condition, ...]
    executions: int
    failures: int
    hosts: int
    sites: int
    excess: float
    share: float
    rate: float
    rate_if_fixed: float
    rate_if_only_this_fixed: float
    p_value: float
    also: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Table:
    """Counts by profile (hosts alike in all dimensions) and bucket: what every family is summed up from."""

    by_bucket: Floats  # profiles x buckets
    whole: Floats  # profiles


@dataclass(frozen=True)
class _Profiles:
    """The distinct combinations of values, and which of them each cell has.

    Segments are sums over profiles, which are far fewer than cells: a resample of a big rule costs one pass over its
    cells, whatever the number of families.
    """

    codes: Mapping[str, Ints]  # by dimension, one a profile
    of_cell: Ints
    place: Ints  # of the cell in the table, flat
    count: int
    buckets: int

    @classmethod
    def of(cls, cells: Cells) -> _Profiles:
        key = np.zeros(len(cells.host), dtype=np.int64)
        for name in DIMENSIONS:
            key = key * (len(cells.labels[name]) + 1) + cells.codes[name] + 1
        _, first, of_cell = np.unique(key, return_index=True, return_inverse=True)
        buckets = len(cells.bucket_days)
        codes = {name: cells.codes[name][first] for name in DIMENSIONS}
        return cls(codes, of_cell, of_cell * buckets + cells.bucket, len(first), buckets)

    def table(self, place: Ints, weights: Floats) -> _Table:
        flat = np.bincount(place, weights=weights, minlength=self.count * self.buckets).astype(np.float64)
        by_bucket = flat.reshape(self.count, self.buckets)
        return _Table(by_bucket, by_bucket.sum(axis=1))


@dataclass(frozen=True)
class _Family:
    """Segments searched together: one group code a profile, and what each group means."""

    dimensions: tuple[str, ...]
    code: Ints  # by profile; -1: in no group
    values: int
    buckets: int  # > 0: a group is a value in a bucket, to be read singly, and summed to `since`, `until`, spans
    rows: Ints  # the profiles in a group, by group
    starts: Ints  # of each group that has any
    present: Ints  # those groups

    @classmethod
    def of(cls, dimensions: tuple[str, ...], code: Ints, values: int, buckets: int) -> _Family:
        order = np.argsort(code, kind="stable")
        rows = order[np.searchsorted(code[order], 0) :]
        present, starts = np.unique(code[rows], return_index=True)
        return cls(dimensions, code, values, buckets, rows, starts, present)

    @property
    def groups(self) -> int:
        return self.values * max(self.buckets, 1)

    @cached_property
    def spans(self) -> tuple[Ints, Ints]:
        """(first, last) bucket of each span with days before and after it; of time alone, else there are too many."""
        first, last = np.triu_indices(self.buckets if self.dimensions == ("time",) else 0, 1)
        inner = (first > 0) & (last < self.buckets - 1)
        return first[inner], last[inner]

    def spread(self, table: Floats) -> Floats:
        """Counts by value and bucket as those of `on`, `since`, `until` and spans, in a row."""
        since = table[:, ::-1].cumsum(axis=1)[:, ::-1]
        until = table.cumsum(axis=1)
        first, last = self.spans
        return np.concatenate([table.ravel(), since.ravel(), until.ravel(), until[0, last] - until[0, first - 1]])

    def count(self, table: _Table) -> Floats:
        source = table.by_bucket if self.buckets else table.whole
        summed = np.zeros((self.values, *source.shape[1:]))
        if len(self.rows):
            summed[self.present] = np.add.reduceat(source[self.rows], self.starts, axis=0)
        return self.spread(summed) if self.buckets else summed

    def hosts(self, cells: Cells, profiles: _Profiles, n_hosts: int) -> Floats:
        """Distinct hosts of each group."""
        code = self.code[profiles.of_cell]
        known = code >= 0
        if not self.buckets:
            pairs = _distinct(code[known] * n_hosts + cells.host[known])
            return np.bincount(pairs // n_hosts, minlength=self.values).astype(np.float64)
        keys = (code[known] * n_hosts + cells.host[known]) * self.buckets + cells.bucket[known]
        host, bucket = np.divmod(_distinct(keys), self.buckets)
        value = host // n_hosts
        shape = (self.values, self.buckets)

        def by_bucket(rows: Bools) -> Floats:
            flat = np.bincount(value[rows] * self.buckets + bucket[rows], minlength=self.groups)
            return flat.reshape(shape).astype(np.float64)

        changes = host[1:] != host[:-1]
        ends = np.ones(1 if len(host) else 0, dtype=bool)
        since = by_bucket(np.concatenate([changes, ends]))[:, ::-1].cumsum(axis=1)[:, ::-1]
        until = by_bucket(np.concatenate([ends, changes])).cumsum(axis=1)
        single = by_bucket(np.ones(len(host), dtype=bool))
        first, last = self.spans
        in_span = np.zeros(len(first))
        if len(first):
            there = np.zeros((n_hosts, self.buckets), dtype=bool)
            there[host, bucket] = True
            for begin in np.unique(first):
                rows = first == begin
                in_span[rows] = np.logical_or.accumulate(there[:, begin:], axis=1).sum(axis=0)[last[rows] - begin]
        return np.concatenate([single.ravel(), since.ravel(), until.ravel(), in_span])

    def conditions(self, group: int, cells: Cells) -> tuple[Condition, ...]:
        """What the group is, in words of the data."""
        if self.buckets:
            if group >= 3 * self.groups:
                first, last = (int(bound[group - 3 * self.groups]) for bound in self.spans)
                days = cells.bucket_days
                return (Condition("since", days[first].isoformat()), Condition("until", days[last].isoformat()))
            kind, within = divmod(group, self.groups)
            value, bucket = divmod(within, self.buckets)
            when = Condition(("on", "since", "until")[kind], cells.bucket_days[bucket].isoformat())
            if self.dimensions == ("time",):
                return (when,)
            name = self.dimensions[0]
            return (Condition(name, cells.labels[name][value]), when)
        if len(self.dimensions) == 1:
            return (Condition(self.dimensions[0], cells.labels[self.dimensions[0]][group]),)
        a, b = self.dimensions
        first, second = divmod(group, len(cells.labels[b]))
        return (Condition(a, cells.labels[a][first]), Condition(b, cells.labels[b][second]))


def matches(cells: Cells, conditions: Sequence[Condition]) -> Bools:
    """Which cells all the conditions hold for."""
    rows = np.ones(len(cells.host), dtype=bool)
    for condition in conditions:
        if condition.dimension in ("on", "since", "until"):
            bucket = list(cells.bucket_days).index(dt.date.fromisoformat(condition.value))
            rows &= {
                "on": cells.bucket == bucket,
                "since": cells.bucket >= bucket,
                "until": cells.bucket <= bucket,
            }[condition.dimension]
        else:
            labels = list(cells.labels[condition.dimension])
            code = labels.index(condition.value) if condition.value in labels else -2
            rows &= cells.codes[condition.dimension] == code
    return rows


def find_causes(
    cells: Cells, *, alpha: float = ALPHA, most: int = MAX_CAUSES, seed: int = 20260215, resamples: int | None = None
) -> list[Segment]:
    """Name the segments in which a rule fails beyond chance, greedily: each among what those before it leave.

    Args:
        cells: the rule's executions.
        alpha: probability of naming any segment where hosts do not differ by anything but chance and themselves.
        most: causes named at most.
        seed: of the resampling; the same cells and seed give the same answer.
        resamples: of the null; None takes 199, or 99 where there are very many cells.

    Returns:
        The causes, that with most excess failures first; empty where none is beyond chance.
    """
    found: list[tuple[tuple[Condition, ...], float, float, tuple[str, ...]]] = []
    if not len(cells.host) or not cells.failures.sum():
        return []
    rest = np.ones(len(cells.host), dtype=bool)
    total_failures = int(cells.failures.sum())
    rng = np.random.default_rng(seed)
    while len(found) < most:
        left = cells.only(rest)
        best = _best(left, total_failures, alpha, rng, resamples)
        if best is None:
            break
        found.append(best)
        rest &= ~matches(cells, best[0])
    return _with_counterfactuals(cells, found, total_failures)


def _distinct(keys: Ints) -> Ints:
    """The distinct keys, sorted; for these sizes a third of the time of numpy's hashing."""
    ordered = np.sort(keys)
    distinct: Ints = ordered[np.concatenate([np.ones(min(1, len(ordered)), dtype=bool), ordered[1:] != ordered[:-1]])]
    return distinct


def _families(cells: Cells, profiles: _Profiles) -> Iterator[_Family]:
    buckets = profiles.buckets
    codes = profiles.codes
    sizes = {name: len(cells.labels[name]) for name in DIMENSIONS}
    several = [name for name in DIMENSIONS if sizes[name]]
    for name in several:
        yield _Family.of((name,), codes[name], sizes[name], 0)
    if buckets > 1:
        yield _Family.of(("time",), np.zeros(profiles.count, dtype=np.int64), 1, buckets)
    for i, a in enumerate(several):
        for b in several[i + 1 :]:
            known = (codes[a] >= 0) & (codes[b] >= 0)
            code = np.where(known, codes[a] * sizes[b] + codes[b], -1)
            yield _Family.of((a, b), code, sizes[a] * sizes[b], 0)
        if buckets > 1:
            yield _Family.of((a, "time"), codes[a], sizes[a], buckets)


def _best(
    cells: Cells, total_failures: int, alpha: float, rng: np.random.Generator, resamples: int | None
) -> tuple[tuple[Condition, ...], float, float, tuple[str, ...]] | None:
    """The segment with most excess failures beyond chance: (conditions, excess, p value, the same by other names)."""
    n = cells.executions.astype(np.float64)
    f = cells.failures.astype(np.float64)
    n_all, f_all = float(n.sum()), float(f.sum())
    if n_all < 2 * MIN_EXECUTIONS or f_all < MIN_SHARE * total_failures:
        return None
    profiles = _Profiles.of(cells)
    families = list(_families(cells, profiles))
    n_hosts = int(cells.host.max()) + 1
    # Groups that may be named at all, of all families in one row of arrays.
    eligible, family_of, group_of, counts = [], [], [], []
    executions = profiles.table(profiles.place, n)
    for index, family in enumerate(families):
        size = family.count(executions)
        of_hosts = family.hosts(cells, profiles, n_hosts)
        ok = (size >= MIN_EXECUTIONS) & (of_hosts >= MIN_HOSTS) & (n_all - size >= MIN_EXECUTIONS)
        eligible.append(ok)
        groups = np.flatnonzero(ok)
        family_of.append(np.full(len(groups), index))
        group_of.append(groups)
        counts.append(size[groups])
    size = np.concatenate(counts)
    if not len(size):
        return None

    def by_segment(table: _Table) -> Floats:
        return np.concatenate([fam.count(table)[ok] for fam, ok in zip(families, eligible, strict=True)])

    def excess(inside: Floats, failed: Floats) -> Floats:
        return failed - inside * (f_all - failed) / np.maximum(n_all - inside, 1.0)

    failures_in = by_segment(profiles.table(profiles.place, f))
    observed = excess(size, failures_in)
    if not (observed >= MIN_SHARE * total_failures).any():
        return None
    rounds = resamples or (199 if len(n) <= 20_000 else 99)
    null = np.empty((rounds, len(size)))
    # Both counts in one number: each resample is summed up once.
    weights = [n * _PACKED + f] if n_all < _PACKED else [n, f]
    for i, tables in enumerate(_resampled(cells, profiles, rng, rounds, weights)):
        summed = [by_segment(table) for table in tables]
        if len(summed) == 1:
            inside = np.floor(summed[0] / _PACKED)
            summed = [inside, summed[0] - inside * _PACKED]
        null[i] = excess(*summed)
    overall = f_all / n_all
    binomial = np.sqrt(size * max(overall * (1 - overall), 1e-9) * n_all / (n_all - size))
    scale = np.maximum(null.std(axis=0), binomial)
    statistic = observed / scale
    largest = (null / scale).max(axis=1)
    p_values = (1 + (largest[:, None] >= statistic[None, :]).sum(axis=0)) / (rounds + 1)
    named = (p_values <= alpha) & (observed >= MIN_SHARE * total_failures)
    if not named.any():
        return None
    # Of the segments that keep most of the excess, the most precise one.
    keeps = named & (observed >= KEEPS * observed[named].max())
    families_of, groups_of = np.concatenate(family_of), np.concatenate(group_of)
    gain = _likelihood_gain(size, failures_in, n_all, f_all)
    conditions_in = np.array([len(family.dimensions) for family in families])[families_of]
    score = np.where(keeps, gain * np.where(conditions_in == 1, 1.0, PREFERS_SIMPLE), -np.inf)
    winner = int(score.argmax())
    conditions = families[families_of[winner]].conditions(int(groups_of[winner]), cells)
    return (
        conditions,
        float(observed[winner]),
        float(p_values[winner]),
        _also(cells, conditions),
    )


def _likelihood_gain(n: Floats, f: Floats, n_all: float, f_all: float) -> Floats:
    """Log-likelihood of two rates, inside and outside, over that of one."""

    def entropy(failures: Floats, executions: Floats) -> Floats:
        rate = np.clip(failures / executions, 1e-12, 1 - 1e-12)
        value: Floats = failures * np.log(rate) + (executions - failures) * np.log1p(-rate)
        return value

    whole = entropy(np.array([f_all]), np.array([n_all]))[0]
    gain: Floats = entropy(f, n) + entropy(f_all - f, n_all - n) - whole
    return gain


def _resampled(
    cells: Cells, profiles: _Profiles, rng: np.random.Generator, rounds: int, weights: Sequence[Floats]
) -> Iterator[list[_Table]]:
    """Tables of these weights under the null: each host's history, rotated, falls to another of about its volume."""
    order = np.lexsort((cells.bucket, cells.host))
    host = cells.host[order]
    starts = np.flatnonzero(np.r_[True, host[1:] != host[:-1]]).astype(np.int32)
    lengths = np.diff(np.r_[starts, len(host)]).astype(np.int32)
    ordinal = np.arange(len(host), dtype=np.int32) - np.repeat(starts, lengths)
    executions = cells.executions[order].astype(np.float64)
    weights = [weight[order] for weight in weights]
    place_of = profiles.place[order]
    ranks = np.argsort(np.argsort(np.add.reduceat(executions, starts), kind="stable"), kind="stable")
    strata = ranks * min(4, max(1, len(starts) // 20)) // len(starts)
    by_stratum = [np.flatnonzero(strata == s) for s in np.unique(strata)]
    for _ in range(rounds):
        heir = np.empty(len(starts), dtype=np.int64)
        for members in by_stratum:
            heir[members] = rng.permutation(members)
        shift = (rng.integers(0, 1 << 30, len(starts)) % lengths[heir]).astype(np.int32)
        at = np.repeat(starts[heir], lengths) + (ordinal + np.repeat(shift, lengths)) % np.repeat(
            lengths[heir], lengths
        )
        place = place_of[at]
        yield [profiles.table(place, weight) for weight in weights]


def _also(cells: Cells, conditions: tuple[Condition, ...]) -> tuple[str, ...]:
    """Other single values that hold for (nearly) the same executions."""
    rows = matches(cells, conditions)
    weight = cells.executions
    inside = int(weight[rows].sum())
    used = {c.dimension for c in conditions}
    same = []
    for name in DIMENSIONS:
        if name in used or not len(cells.labels[name]):
            continue
        codes = cells.codes[name]
        shared = np.bincount(codes[rows & (codes >= 0)], weights=weight[rows & (codes >= 0)], minlength=1)
        if not len(shared):
            continue
        code = int(shared.argmax())
        union = inside + int(weight[codes == code].sum()) - int(shared[code])
        if union and shared[code] / union >= 0.95:
            same.append(f"{name} {cells.labels[name][code]}")
    return tuple(same)


def _with_counterfactuals(
    cells: Cells, found: Sequence[tuple[tuple[Condition, ...], float, float, tuple[str, ...]]], total_failures: int
) -> list[Segment]:
    """Attach to each cause what the rule's rate would be without it.

    Causes overlap: an old agent on a machine without TPM fails either way. So each is given a probability of its own to
    make an execution fail, independent of the others and of the base rate (a noisy-or, fitted by EM on the counts of
    each combination of causes), and a fixed cause is left out of the product.
    """
    if not found:
        return []
    members = [matches(cells, conditions) for conditions, *_ in found]
    pattern = np.zeros(len(cells.host), dtype=np.int64)
    for i, rows in enumerate(members):
        pattern |= rows.astype(np.int64) << i
    n = np.bincount(pattern, weights=cells.executions, minlength=1 << len(found))
    f = np.bincount(pattern, weights=cells.failures, minlength=1 << len(found))
    holds = np.array([[(p >> i) & 1 for i in range(len(found))] for p in range(len(n))], dtype=np.float64)
    holds = np.column_stack([np.ones(len(n)), holds])  # the base rate is a cause that always holds
    chance = np.concatenate([[f[0] / n[0] if n[0] else 0.0], np.full(len(found), 0.5)])
    for _ in range(500):
        fails = 1 - np.exp((holds * np.log1p(-np.minimum(chance, 1 - 1e-9))).sum(axis=1))
        share = holds * chance / np.maximum(fails, 1e-12)[:, None]
        new = (f[:, None] * share).sum(axis=0) / np.maximum((n[:, None] * holds).sum(axis=0), 1e-12)
        done = np.abs(new - chance).max() < 1e-7
        chance = new
        if done:
            break

    def rate_without(fixed: set[int]) -> float:
        left = chance.copy()
        for i in fixed:
            left[i + 1] = 0.0
        fails = 1 - np.exp((holds * np.log1p(-np.minimum(left, 1 - 1e-9))).sum(axis=1))
        # What the fit leaves unexplained stays: only the change is the fit's.
        before = 1 - np.exp((holds * np.log1p(-np.minimum(chance, 1 - 1e-9))).sum(axis=1))
        gone = (n * (before - fails)).sum()
        return float(min(1.0, 1 - (total_failures - gone) / n.sum()))

    segments = []
    last = rate_without(set())
    for i, (conditions, excess, p_value, also) in enumerate(found):
        rows = members[i]
        executions, failures = int(cells.executions[rows].sum()), int(cells.failures[rows].sum())
        rate = rate_without(set(range(i + 1)))
        segments.append(
            Segment(
                conditions=conditions,
                executions=executions,
                failures=failures,
                hosts=len(np.unique(cells.host[rows])),
                sites=len(np.unique(cells.codes["site"][rows])),
                excess=excess,
                share=(rate - last) * float(n.sum()) / total_failures,
                rate=1 - failures / executions,
                rate_if_fixed=rate,
                rate_if_only_this_fixed=rate_without({i}),
                p_value=p_value,
                also=also,
            )
        )
        last = rate
    return segments


def from_rows(
    rows: Sequence[tuple[str, str, str | None, str | None, str | None, int, int, int]], bucket_days: Sequence[dt.date]
) -> Cells:
    """Build cells from (site, host, agent version, os, hardware, bucket, executions, failures), any order and grouping."""
    profiles: dict[Profile, int] = {}
    profile = np.fromiter((profiles.setdefault(row[:5], len(profiles)) for row in rows), np.int64, len(rows))
    bucket, executions, failures = (np.fromiter((row[i] for row in rows), np.int64, len(rows)) for i in (5, 6, 7))
    return from_profiles(list(profiles), profile, bucket, executions, failures, bucket_days)


def from_profiles(
    profiles: Sequence[Profile],
    profile: Ints,
    bucket: Ints,
    executions: Ints,
    failures: Ints,
    bucket_days: Sequence[dt.date],
) -> Cells:
    """Build cells from the profiles of hosts and arrays with one entry a cell; `profile` is an index.

    Each profile has cells. The order of the cells decides how hosts are numbered, and so what chance makes of them.
    """
    named = {"site": 0, "agent_version": 2, "os": 3, "hardware": 4}
    codes, labels = {}, {}
    for name in DIMENSIONS:
        values = [p[named[name]] for p in profiles]
        known = sorted({v for v in values if v is not None})
        index = {v: i for i, v in enumerate(known)}
        codes[name] = np.array([-1 if v is None else index[v] for v in values], np.int64)[profile]
        labels[name] = known
    hosts: dict[tuple[str, str], int] = {}
    host = np.array([hosts.setdefault(p[:2], len(hosts)) for p in profiles], np.int64)[profile]
    return Cells(
        codes=codes,
        labels=labels,
        host=host,
        bucket=bucket,
        executions=executions,
        failures=failures,
        bucket_days=list(bucket_days),
    )


def buckets(first: dt.date, last: dt.date, most: int = MAX_BUCKETS) -> tuple[int, list[dt.date]]:
    """Split a window into buckets of whole days: (days a bucket, first day of each)."""
    days = (last - first).days + 1
    width = -(-days // most)
    return width, [first + dt.timedelta(days=i) for i in range(0, days, width)]
