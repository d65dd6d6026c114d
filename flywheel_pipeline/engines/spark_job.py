"""The driver of one Spark job: `python -m flywheel_pipeline.engines.spark_job SCRATCH`, started by Dagster Pipes or alone.

Belongs here: a Spark session over the files of a job. Does not belong here: the database, of which it knows nothing.

Small tables, live days and results go through this process, results a piece at a time; the archive is read by the workers, so
its URL must mean the same there. No Python runs on a worker. Tasks of a lost worker run again elsewhere, which is Spark's own
doing.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

from flywheel_pipeline.archive.layout import hide
from flywheel_pipeline.engines.spark import FAILURE_FILE, JOB_FILE

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

#: Equal digits ask for these: times in UTC without a zone, old dates as they are, no silent overflow, and text of a model
#: that looks like a variable of Spark's (`${env:HOME}`) left alone.
_CONFIGURATION = {
    "spark.sql.session.timeZone": "UTC",
    "spark.sql.timestampType": "TIMESTAMP_NTZ",
    "spark.sql.ansi.enabled": "true",
    "spark.sql.parquet.datetimeRebaseModeInRead": "CORRECTED",
    "spark.sql.parquet.int96RebaseModeInRead": "CORRECTED",
    "spark.sql.execution.arrow.pyspark.enabled": "true",
    "spark.sql.caseSensitive": "false",
    "spark.sql.variable.substitute": "false",
    "spark.driver.maxResultSize": "0",
    "spark.ui.enabled": "false",
    "spark.ui.showConsoleProgress": "false",
}


def run(scratch: Path, say: Any = print) -> None:
    """Compute the steps of the job in `scratch` and write those that land beside it, as Parquet files.

    Args:
        scratch: a folder with `job.json` and the files that it names.
        say: called with a line for each step.
    """
    job = json.loads((scratch / JOB_FILE).read_text(encoding="utf-8"))
    # Its log names files by their whole URL.
    with _session(job["master"], scratch, quiet=bool(job["secrets"])) as session:
        _spread(session, job)
        for statement in job["preamble"]:
            session.sql(statement)
        for name in job["tables"]:
            # Each is small and read often: held by the driver, sent along with the plan.
            session.createDataFrame(pq.read_table(scratch / f"table_{name}.parquet")).createOrReplaceTempView(name)
        _telemetry(session, job).createOrReplaceTempView("execution_telemetry")
        for step in job["steps"]:
            frame = session.sql(step["sql"]).persist()
            frame.createOrReplaceTempView(step["name"])
            if step["lands"]:
                rows = _bring(frame, scratch / f"{step['name']}.parquet", job["piece_rows"])
                say(f"{step['name']}: {rows:,} rows")
            if step["name"] not in job["read"]:
                frame.unpersist()


def _bring(frame: DataFrame, target: Path, piece_rows: int) -> int:
    """Write the rows of a persisted frame to one Parquet file here, so many at once; return how many."""
    from pyspark.sql import functions as F

    pieces = -(-frame.count() // piece_rows)
    if pieces <= 1:
        table = frame.toArrow()
        pq.write_table(table, target)
        return int(table.num_rows)
    columns = frame.columns
    piece = F.pmod(F.xxhash64(*columns), F.lit(pieces)).alias("_piece")
    # Rows of a piece lie together in what is persisted, and Spark passes over the rest by its statistics.
    cut = frame.select("*", piece).repartition(pieces, "_piece").sortWithinPartitions("_piece").persist()
    rows = 0
    with contextlib.ExitStack() as stack:
        stack.callback(cut.unpersist)
        writer = None
        for number in range(pieces):
            table = cut.where(F.col("_piece") == number).select(*columns).toArrow()
            writer = writer or stack.enter_context(pq.ParquetWriter(target, table.schema))
            writer.write_table(table)
            rows += table.num_rows
    return rows


@contextlib.contextmanager
def _session(master: str, scratch: Path, *, quiet: bool) -> Iterator[SparkSession]:
    from pyspark.sql import SparkSession

    # Of 1 GB, which is Spark's own, too little is left for results where this process computes too; spark-defaults.conf may say more.
    os.environ.setdefault("SPARK_DRIVER_MEMORY", "3g")
    builder = SparkSession.builder.master(master).appName("flywheel")
    # Unless told, Spark makes a folder for tables, of which there are none, wherever its driver was started.
    builder = builder.config("spark.sql.warehouse.dir", (scratch / "warehouse").resolve().as_uri())
    for name, value in _CONFIGURATION.items():
        builder = builder.config(name, value)
    session = builder.getOrCreate()
    session.sparkContext.setLogLevel("OFF" if quiet else "WARN")
    try:
        yield session
    finally:
        session.stop()


def _spread(session: SparkSession, job: dict[str, Any]) -> None:
    """As many shuffle partitions as there are cores twice over, or 64 MB each: Spark's own 200 cost a small day minutes."""
    if session.conf.get("spark.sql.shuffle.partitions") == "200":
        partitions = max(2 * session.sparkContext.defaultParallelism, job["bytes"] // (64 << 20), 2)
        session.conf.set("spark.sql.shuffle.partitions", str(partitions))


def _telemetry(session: SparkSession, job: dict[str, Any]) -> Any:
    frames = []
    if job["archived"]:
        paths = [url.replace("s3://", "s3a://", 1) for url in job["archived"]]
        frames.append(session.read.parquet(*paths).selectExpr(*_columns(job)))
    if job["live"]:
        frames.append(session.createDataFrame(pq.read_table(job["live"])).selectExpr(*_columns(job)))
    if not frames:
        from flywheel_pipeline.archive.columns import schema

        nothing = schema("executions").empty_table().select(job["telemetry"])
        frames.append(session.createDataFrame(nothing).selectExpr(*_columns(job)))
    telemetry = frames[0] if len(frames) == 1 else frames[0].unionByName(frames[1])
    return telemetry if job["sites"] is None else telemetry.where(telemetry.site_id.isin(job["sites"]))


def _columns(job: dict[str, Any]) -> list[str]:
    return [part.strip() for part in job["select"].split(", ")]


def end_with_parent() -> None:
    """End this process, and with it its JVM, when the one that started it is gone: nobody would take the result."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)  # without a word: whoever would hear it is gone

    threading.Thread(target=watch, name="flywheel-spark-parent", daemon=True).start()


class SparkFailed(Exception):
    """What Spark said of a job whose archive is opened by a secret, without it; its own error repeats that in many places."""


def main() -> int:
    """Run the job of the folder given; say why in `failure.json` where it fails."""
    end_with_parent()
    scratch = Path(sys.argv[1])
    if "DAGSTER_PIPES_CONTEXT" in os.environ:
        from dagster_pipes import open_dagster_pipes

        with open_dagster_pipes() as pipes:
            _run_and_say(scratch, pipes.log.info)
    else:
        _run_and_say(scratch, print)
    return 0


def _run_and_say(scratch: Path, say: Any) -> None:
    from py4j.protocol import Py4JError
    from pyspark.errors import PySparkException

    secrets = json.loads((scratch / JOB_FILE).read_text(encoding="utf-8"))["secrets"]
    try:
        run(scratch, say)
        return
    except Exception as error:
        message = hide(_said(error), secrets)
        if isinstance(error, (PySparkException, Py4JError, OSError)):
            (scratch / FAILURE_FILE).write_text(json.dumps({"message": message}), encoding="utf-8")
        if not secrets:
            raise
    # Out here nothing is being handled, which Dagster Pipes would tell along with it.
    raise SparkFailed(message)


def _said(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if line.startswith(("Caused by:", "["))] or lines or [type(error).__name__]
    return told[0].removeprefix("Caused by:").strip()[:500]


if __name__ == "__main__":
    raise SystemExit(main())
