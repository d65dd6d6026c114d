"""A simulated fleet as files: posts as agents send them, the fleet, and the planted truth beside them.

Belongs here: the layout of a scenario's directory, and pacing. Does not belong here: databases (`database`), HTTP
(`http`).

    posts.ndjson   one post a line, in the order of arrival; `flywheel import` reads it
    fleet.json     sites, appliances, standing rules, imported patterns, aliases; the runbooks that must exist
    truth.json     what was planted: rates, expectations, counts by outcome, pattern, rule and site
    rows.ndjson    which lines of posts.ndjson are corrections, duplicates, replays, late or invalid
    scenario.json  the scenario with all its defaults, and the seed
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Final

from flywheel_pipeline.errors import UsageError
from flywheel_pipeline.simulation.fleet.scenario import Scenario
from flywheel_pipeline.simulation.fleet.stream import DAY_MS, Delivery, FleetStream

POSTS: Final = "posts.ndjson"
ROWS: Final = "rows.ndjson"
TRUTH: Final = "truth.json"
FLEET: Final = "fleet.json"
SCENARIO: Final = "scenario.json"
RESULT: Final = "result.json"

#: (deliveries so far, fraction of the simulated time)
Progress = Callable[[int, float], None]
_TELL_EVERY: Final = 2_000


def paced(
    stream: FleetStream,
    deliveries: Iterator[Delivery],
    *,
    speed: float = 0.0,
    progress: Progress | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[Delivery]:
    """Hand deliveries on at their pace.

    Args:
        stream: where they come from.
        deliveries: in the order of arrival.
        speed: simulated seconds per second; 1 is real time, 0 is as fast as they are taken.
        progress: called now and then.
        sleep: how to wait, in seconds.
    """
    begun: tuple[float, int] | None = None
    span = max(stream.end_ms - stream.begin_ms, 1)
    for number, delivery in enumerate(deliveries, 1):
        if speed:
            if begun is None:
                begun = (time.monotonic(), delivery.at_ms)
            wait = begun[0] + (delivery.at_ms - begun[1]) / 1000 / speed - time.monotonic()
            if wait > 0:
                sleep(wait)
        yield delivery
        if progress is not None and number % _TELL_EVERY == 0:
            progress(number, min((delivery.at_ms - stream.begin_ms) / span, 1.0))


class Files:
    """The files of one directory, written line by line; `close` writes what stands beside them."""

    def __init__(self, directory: Path, stream: FleetStream) -> None:
        """Open the directory.

        Raises:
            UsageError: it holds posts already, or cannot be written.
        """
        self.directory = directory
        self._stream = stream
        self._line = 0
        if (directory / POSTS).exists():
            raise UsageError(
                f"{directory} holds a simulated fleet already.", hint="Name another directory, or remove it."
            )
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._posts: IO[bytes] = (directory / POSTS).open("wb")
            self._rows: IO[bytes] = (directory / ROWS).open("wb")
        except OSError as error:
            raise UsageError(f"{directory} cannot be written: {error.strerror}.") from error

    def write(self, delivery: Delivery) -> None:
        """Write one post, and a line on it where it is out of the ordinary."""
        self._line += 1
        self._posts.write(delivery.body + b"\n")
        if delivery.kind != "first" or delivery.late:
            row: dict[str, Any] = {"line": self._line, "execution_id": delivery.execution_id, "kind": delivery.kind}
            if delivery.late:
                row["late"] = True
            if delivery.code is not None:
                row["reason_code"] = delivery.code
            self._rows.write(json.dumps(row, separators=(",", ":")).encode() + b"\n")

    def close(self) -> None:
        """Close the lines and write fleet, truth and scenario."""
        self._posts.close()
        self._rows.close()
        stream = self._stream
        write_json(self.directory / FLEET, fleet_document(stream))
        write_json(self.directory / TRUTH, stream.truth.document())
        write_json(self.directory / SCENARIO, {**stream.scenario.model_dump(mode="json"), "seed": stream.seed})


def write_json(path: Path, document: Any) -> None:
    """Write one JSON document; the same document is the same bytes."""
    path.write_text(
        json.dumps(document, indent=1, ensure_ascii=False, default=str) + "\n", encoding="utf-8", newline="\n"
    )


def fleet_document(stream: FleetStream) -> dict[str, Any]:
    """Return fleet.json: the fleet at the end, and what must stand in the catalogue."""
    scenario = stream.scenario
    runbooks = sorted(
        {d.runbook for d in scenario.drifts}
        | {d.otherwise.runbook for d in scenario.drifts if d.otherwise is not None}
        | {d.rule.runbook for d in scenario.drifts if d.rule is not None and d.rule.runbook is not None}
    )
    return {**stream.fleet_rows(stream.end_ms), "site_aliases": aliases(stream, stream.end_ms), "runbooks": runbooks}


def aliases(stream: FleetStream, at_ms: int) -> list[dict[str, Any]]:
    """Return the site aliases that the pipeline knows at a time: alias is the old name, site_id the new one."""
    return [
        {"alias": stream.site_id(rename.site - 1, stream.begin_ms - 1), "site_id": rename.to}
        for rename in scenario_renames(stream.scenario)
        if at_ms >= stream.begin_ms + rename.alias_day * DAY_MS
    ]


def scenario_renames(scenario: Scenario) -> list[Any]:
    """Return the renames in the order of their days."""
    return sorted(scenario.fleet.renames, key=lambda rename: (rename.day, rename.site))


def read_truth(directory: Path) -> dict[str, Any]:
    """Read the planted truth of a directory.

    Raises:
        UsageError: there is none, or it is not of this form.
    """
    path = directory / TRUTH
    try:
        truth = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise UsageError(
            f"There is no {TRUTH} in {directory}.", hint="`flywheel simulate fleet --out DIR` writes one."
        ) from error
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(truth, dict) or truth.get("format") != 1:
        raise UsageError(f"{path} is no planted truth of this release.")
    return truth
