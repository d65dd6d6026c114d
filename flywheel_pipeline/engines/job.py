"""One computation of an engine: what it reads, what it makes, and the contract that every engine keeps.

Belongs here: the job and the engine's interface. Does not belong here: any engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pyarrow as pa

from flywheel_pipeline.archive.layout import Archive, ArchiveFile
from flywheel_pipeline.engines.dialects import Dialect
from flywheel_pipeline.engines.plan import TIME_COLUMNS, Plan, Step


@dataclass(frozen=True)
class Job:
    """What to compute, from what.

    `archived` are the files of archived days, `live` a Parquet file of the same columns with the rows of the other days
    (times without a zone, in UTC); `tables` the scope and small tables of PostgreSQL by name; `sites` the only sites in
    scope where they are few, else None; `scratch` an empty folder that is removed afterwards.
    """

    plan: Plan
    preamble: tuple[str, ...]
    archive: Archive | None
    archived: tuple[ArchiveFile, ...]
    live: Path | None
    tables: Mapping[str, pa.Table]
    sites: tuple[str, ...] | None
    scratch: Path

    @property
    def secrets(self) -> tuple[str, ...]:
        """Words that open the archive; an engine names files by their whole URL."""
        return self.archive.secrets if self.archive is not None else ()


class ComputeEngine(Protocol):
    """Something other than PostgreSQL that computes the models of cell day."""

    @property
    def name(self) -> str:
        """Its name, as in FLYWHEEL_ENGINE."""

    @property
    def dialect(self) -> Dialect:
        """The SQL that it speaks."""

    def check(self) -> None:
        """Refuse early, before anything is taken or written.

        Raises:
            EngineNotInstalled: its package, or what it needs, is missing.
            EngineUnreachable: it does not answer.
        """

    def compute(self, job: Job) -> Iterator[tuple[Step, Iterator[pa.RecordBatch]]]:
        """Compute the plan's steps and give the rows of those that land, each to be read to the end before the next.

        Raises:
            EngineError: it failed; nothing was written outside the scratch folder.
        """


def telemetry_select(columns: tuple[str, ...]) -> str:
    """Return the select list of telemetry out of Parquet, in either engine's SQL: times lose their zone, which is UTC."""
    kind = "TIMESTAMP_NTZ"
    return ", ".join(f"CAST({name} AS {kind}) AS {name}" if name in TIME_COLUMNS else name for name in columns)
