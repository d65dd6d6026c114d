"""Apache Spark, on any master by URL: past what one machine holds. The extra `spark`, and Java 17.

Belongs here: the job handed to a process of its own and its results read back. Does not belong here: what that process
does (`spark_job.py`), and Dagster's way of starting it (`assets.py` of the room that runs it).
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.parquet as pq

from flywheel_pipeline.engines.dialects import Dialect
from flywheel_pipeline.engines.errors import EngineError, EngineNotInstalled, EngineUnreachable
from flywheel_pipeline.engines.job import Job, telemetry_select
from flywheel_pipeline.engines.plan import Step

CONNECT_SECONDS = 5.0
JOB_FILE, FAILURE_FILE = "job.json", "failure.json"
BATCH_ROWS = 65_536
_MASTERS = re.compile(r"local(?:\[(?:\d+|\*)(?:, ?\d+)?\])?|yarn|k8s://\S+|spark://\S+")
_EXAMPLE = "Set FLYWHEEL_SPARK_MASTER to a URL such as spark://host:7077, or to local[*]."

#: Runs a command to its end; raises CalledProcessError, or what its own way of running says, where it fails.
Launcher = Callable[[Sequence[str]], None]


def launch_subprocess(command: Sequence[str]) -> None:
    """Run the command and wait; what it says goes to this process's standard error.

    Raises:
        CalledProcessError: it ended with another exit code than 0.
    """
    subprocess.run(list(command), check=True, stdout=sys.stderr)


@dataclass(frozen=True)
class SparkEngine:
    """Spark at `master`; `launch` starts the driver, by Dagster Pipes within a run.

    The driver brings results together `piece_rows` at a time, since a year of episodes takes more memory than it has.
    """

    master: str = "local[*]"
    launch: Launcher = field(default=launch_subprocess)
    failures: tuple[type[Exception], ...] = (subprocess.CalledProcessError,)
    piece_rows: int = 100_000

    name = "spark"
    dialect: Dialect = "spark"

    def check(self) -> None:
        """Raises EngineNotInstalled without pyspark or Java, EngineUnreachable for a master that is none or does not answer."""
        if importlib.util.find_spec("pyspark") is None:
            raise EngineNotInstalled(
                "The engine spark is not installed.", hint="Install the extra: pip install 'flywheel-pipeline[spark]'."
            )
        home = os.environ.get("JAVA_HOME", "")
        if shutil.which(os.path.join(home, "bin", "java") if home else "java") is None:
            raise EngineNotInstalled(
                "The engine spark needs Java 17, and there is no java on the PATH or in JAVA_HOME.",
                hint="Install a headless runtime, for example openjdk-17-jre-headless.",
            )
        check_master(self.master)

    def compute(self, job: Job) -> Iterator[tuple[Step, Iterator[pa.RecordBatch]]]:
        """Run the driver, which computes all steps, then give what it wrote.

        Raises:
            EngineError: Spark failed.
        """
        self._write(job)
        try:
            self.launch([sys.executable, "-m", "flywheel_pipeline.engines.spark_job", str(job.scratch)])
        except self.failures as error:
            said = "its driver ended without a word"
            with contextlib.suppress(FileNotFoundError):
                said = json.loads((job.scratch / FAILURE_FILE).read_text(encoding="utf-8"))["message"]
            raise EngineError(
                f"Spark at {self.master} could not compute the models: {said.rstrip('.')}.",
                hint="Nothing was written; correct that and try again, or use another FLYWHEEL_ENGINE.",
            ) from error
        for step in job.plan.landing:
            with pq.ParquetFile(job.scratch / f"{step.name}.parquet") as file:
                yield step, file.iter_batches(BATCH_ROWS)

    def _write(self, job: Job) -> None:
        for name, table in job.tables.items():
            pq.write_table(table, job.scratch / f"table_{name}.parquet")
        document = {
            "master": self.master,
            "preamble": list(job.preamble),
            "archived": [file.url for file in job.archived],
            "secrets": list(job.secrets),
            "live": str(job.live) if job.live else None,
            "bytes": sum(file.bytes for file in job.archived) + (job.live.stat().st_size if job.live else 0),
            "telemetry": list(job.plan.telemetry),
            "select": telemetry_select(job.plan.telemetry),
            "piece_rows": self.piece_rows,
            "sites": list(job.sites) if job.sites is not None else None,
            "tables": list(job.tables),
            "steps": [{"name": step.name, "sql": step.sql, "lands": step.lands} for step in job.plan.steps],
            "read": sorted(frozenset().union(*(step.reads for step in job.plan.steps))),
        }
        (job.scratch / JOB_FILE).write_text(json.dumps(document), encoding="utf-8")


def check_master(master: str) -> None:
    """Refuse a master URL that is none, and a standalone master of which nobody answers.

    Raises:
        EngineUnreachable: with the URL and the reason.
    """
    if not _MASTERS.fullmatch(master):
        raise EngineUnreachable(f"{master!r} is no URL of a Spark master.", hint=_EXAMPLE)
    if not master.startswith("spark://"):
        return
    reasons = []
    for address in master.removeprefix("spark://").split(","):
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit():
            raise EngineUnreachable(f"{master!r} names no host and port of a Spark master.", hint=_EXAMPLE)
        try:
            socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
        except OSError as error:
            reasons.append(f"{address}: {error.strerror or error}")
        else:
            return  # the one that is active answers; a standby is none the worse
    raise EngineUnreachable(
        f"The Spark master {master} cannot be reached ({'; '.join(reasons)}).",
        hint="Start it, or correct FLYWHEEL_SPARK_MASTER.",
    )
