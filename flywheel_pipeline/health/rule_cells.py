"""A rule's executions as arrays: read in one statement, packed by who ran them, and summed up here.

Belongs here: the packing, and sums by day, class, host and step. Does not belong here: which executions count (the model
`rule_failure_cells`) and the search for causes (`segments`). numpy is imported with this module, so import it inside the
function that needs it.

Half a million cells went through eight queries, each of which read and grouped them by texts again: two thirds of an
attribution. Here the database groups once and sends 28 bytes a cell; all sums are over integers.
"""

from __future__ import annotations

import datetime as dt
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import sqlalchemy as sa

from flywheel_pipeline.health import segments
from flywheel_pipeline.health.attribution import EXCLUDED_CLASSES, RATED_CLASSES
from flywheel_pipeline.health.segments import Bools, Cells, Ints, Profile

_CLASSES = ("", *EXCLUDED_CLASSES, *RATED_CLASSES)  # a class of another name is packed as the first of these
_EPOCH = dt.date(2000, 1, 1)
_PACKED = np.dtype(
    [
        ("day", ">i4"),
        ("outcome_class", ">i2"),
        ("has_step", ">i2"),
        ("step", ">i4"),
        ("executions", ">i8"),
        ("successes", ">i8"),
    ]
)
_READ = """
SELECT
  rule_id, site_id, hostname, agent_version, os, hardware,
  string_agg(
    int4send(day - DATE '2000-01-01')
    || int2send(coalesce(array_position(CAST(:classes AS text[]), outcome_class) - 1, 0)::smallint)
    || int2send((error_step IS NOT NULL)::integer::smallint)
    || int4send(coalesce(error_step, 0))
    || int8send(executions)
    || int8send(successes),
    ''::bytea
  ) AS packed
FROM rule_failure_cells
WHERE rule_id = ANY(:ids)
GROUP BY rule_id, site_id, hostname, agent_version, os, hardware
"""


@dataclass(frozen=True)
class RuleCells:
    """The cells of one rule: one entry a cell in each array, in the order of `profiles`.

    Attributes:
        profiles: (site, host, agent version, os, hardware), each once, sorted, what is not known last.
        profile: index of it; day: days since `first_day`; outcome_class: index of its name.
        step: the step that failed; has_step: whether it is known.
        executions, failures: counts; a failure is what was not reported as a success.
    """

    profiles: Sequence[Profile]
    first_day: dt.date
    profile: Ints
    day: Ints
    outcome_class: Ints
    step: Ints
    has_step: Bools
    executions: Ints
    failures: Ints

    def days(self) -> list[tuple[dt.date, int, int]]:
        """(day, executions, successes) of each day with executions, in order."""
        executions, failures = _sums(self.day, self.executions), _sums(self.day, self.failures)
        return [
            (self.first_day + dt.timedelta(days=int(day)), int(executions[day]), int(executions[day] - failures[day]))
            for day in np.flatnonzero(executions)
        ]

    def classes(self) -> dict[str, tuple[int, int]]:
        """(executions, those reported as success) by outcome class."""
        executions, failures = _sums(self.outcome_class, self.executions), _sums(self.outcome_class, self.failures)
        return {
            _CLASSES[code]: (int(executions[code]), int(executions[code] - failures[code]))
            for code in np.flatnonzero(executions)
        }

    def hosts(self) -> list[tuple[str, str, int, int]]:
        """(site, host, executions, failures) of each host."""
        executions, failures = _sums(self.profile, self.executions), _sums(self.profile, self.failures)
        found: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
        for (site, host, *_), n, f in zip(self.profiles, executions.tolist(), failures.tolist(), strict=True):
            found[site, host][0] += n
            found[site, host][1] += f
        return [(site, host, n, f) for (site, host), (n, f) in found.items()]

    def first_seen(self) -> list[tuple[str, str, dt.date]]:
        """(site, agent version, first day of it there)."""
        first = np.full(len(self.profiles), np.iinfo(np.int64).max)
        np.minimum.at(first, self.profile, self.day)
        found: dict[tuple[str, str], int] = {}
        for (site, _, version, *_), day in zip(self.profiles, first.tolist(), strict=True):
            if version is not None:
                found[site, version] = min(day, found.get((site, version), day))
        return [(site, version, self.first_day + dt.timedelta(days=day)) for (site, version), day in found.items()]

    def steps(self, rows: Bools | None = None) -> list[tuple[int | None, int]]:
        """(step, failures), the step None where no agent said; of these cells alone if `rows` are given."""
        failing = self.failures > 0
        if rows is not None:
            failing &= rows
        known = failing & self.has_step
        steps, of_cell = np.unique(self.step[known], return_inverse=True)
        counts = _sums(of_cell, self.failures[known]).tolist()
        found: list[tuple[int | None, int]] = list(zip(steps.tolist(), counts, strict=True))
        unknown = int(self.failures[failing & ~self.has_step].sum())
        return [*found, (None, unknown)] if unknown else found

    def searched(self, width: int, bucket_days: Sequence[dt.date]) -> Cells:
        """The cells that a search takes: days in buckets of `width`, classes and steps summed up."""
        key, of_cell = np.unique(self.profile * len(bucket_days) + self.day // width, return_inverse=True)
        profile, bucket = np.divmod(key, len(bucket_days))
        executions, failures = _sums(of_cell, self.executions), _sums(of_cell, self.failures)
        return segments.from_profiles(self.profiles, profile, bucket, executions, failures, bucket_days)

    def unsummed(self, width: int, bucket_days: Sequence[dt.date]) -> Cells:
        """The same with one entry for each of these cells, for `segments.matches`."""
        return segments.from_profiles(
            self.profiles, self.profile, self.day // width, self.executions, self.failures, bucket_days
        )


def read(connection: sa.Connection, rule_ids: Sequence[str]) -> dict[str, RuleCells]:
    """Read the cells of these rules; those without executions are missing."""
    found: dict[str, list[tuple[Profile, npt.NDArray[Any]]]] = defaultdict(list)
    for rule_id, site, host, agent_version, os, hardware, packed in connection.execute(
        sa.text(_READ), {"ids": list(rule_ids), "classes": list(_CLASSES)}
    ):
        found[rule_id].append(((site, host, agent_version, os, hardware), np.frombuffer(packed, _PACKED)))
    return {rule_id: _unpacked(parts) for rule_id, parts in found.items()}


def _unpacked(parts: list[tuple[Profile, npt.NDArray[Any]]]) -> RuleCells:
    parts.sort(key=lambda part: tuple((value is None, value or "") for value in part[0]))
    packed = np.concatenate([cells for _, cells in parts])

    def column(name: str) -> Ints:
        return packed[name].astype(np.int64)

    if not packed["outcome_class"].all():
        raise ValueError("unknown outcome class in rule_failure_cells")
    day = column("day")
    first = int(day.min())
    return RuleCells(
        profiles=[profile for profile, _ in parts],
        first_day=_EPOCH + dt.timedelta(days=first),
        profile=np.repeat(np.arange(len(parts)), [len(cells) for _, cells in parts]),
        day=day - first,
        outcome_class=column("outcome_class"),
        step=column("step"),
        has_step=packed["has_step"] != 0,
        executions=column("executions"),
        failures=column("executions") - column("successes"),
    )


def _sums(codes: Ints, counts: Ints) -> Ints:
    """Exact up to 2^53: more executions than anybody has."""
    return np.bincount(codes, weights=counts).astype(np.int64)
