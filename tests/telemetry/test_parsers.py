"""Large files: rows encoded as COPY takes them, lines parsed by processes, and processes that end too early."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st
from posts import NOW, failed, line, ndjson, post, rows, scalar
from psycopg import sql
from psycopg.copy import LibpqWriter
from pydantic import ValidationError

from flywheel_pipeline.telemetry import blocks, contract, files, intake, parsers
from flywheel_pipeline.telemetry.contract import COLUMNS, LINE_LIMIT_BYTES, ParsedRow, parse_line
from flywheel_pipeline.telemetry.encoding import HEADER, TRAILER, JsonText, bigint_field, encoder, staged
from flywheel_pipeline.telemetry.intake import IntakeReport, import_file
from flywheel_pipeline.telemetry.landing import TYPES, land
from flywheel_pipeline.telemetry.parsers import Parsers


def parsed(*posts: dict[str, Any]) -> list[ParsedRow]:
    found = [parse_line(line(one), None, received_at=NOW) for one in posts]
    return [row for row in found if isinstance(row, ParsedRow)]


FULL = post(
    "exec-full",
    state_before={"é": ["ü", None, 1.5, True]},
    state_after=[],
    tags="text",
    cost_usd=0.123456,
    input_tokens=2_147_483_647,
    error_step=-1,
    confidence=0.1,
    manual_intervention_needed=False,
    human_feedback="tab\tnewline\nback\\slash \\N 'quote' 漢字",
)

# --------------------------------------------------------------------------------------------------
# Encoding
# --------------------------------------------------------------------------------------------------


class Overheard(LibpqWriter):
    """Sends a COPY to the server and keeps what it sent."""

    sent = b""

    def write(self, data: Any) -> None:
        self.sent += bytes(data)
        super().write(data)


def test_encoded_rows_are_the_bytes_that_a_copy_by_psycopg_sends(engine: sa.Engine):
    batch = parsed(post("exec-1"), FULL, failed("exec-2", started_at=None, cost_usd=0))
    assert len(batch) == 3
    columns = sql.SQL(", ").join(map(sql.Identifier, COLUMNS))
    with engine.begin() as connection:
        raw = connection.connection.driver_connection
        assert isinstance(raw, psycopg.Connection)
        cursor = raw.cursor()
        cursor.adapters.register_dumper(None, JsonText)
        writer = Overheard(cursor)
        copy_in = sql.SQL("COPY execution_telemetry ({}) FROM STDIN (FORMAT binary)").format(columns)
        with cursor.copy(copy_in, writer=writer) as copy:
            copy.set_types(TYPES)
            for row in batch:
                copy.write_row(row.values)
    encode = encoder(TYPES)
    encoded = [encode(row.values) for row in batch]
    assert all(isinstance(row, bytes) for row in encoded)
    assert writer.sent == HEADER + b"".join(row for row in encoded if isinstance(row, bytes)) + TRAILER


def test_single_fields_are_read_from_the_bytes_of_a_row():
    encode = encoder(["text", "timestamptz", "int8", "int8"])
    row = encode(("né", NOW, None, -7))
    assert isinstance(row, bytes)
    since_2000 = NOW - NOW.replace(year=2000, month=1, day=1, hour=0)
    assert bigint_field(row, 1) == since_2000 / timedelta(microseconds=1)
    assert (bigint_field(row, 2), bigint_field(row, 3)) == (None, -7)
    with_two = encoder(["int8", "int8", "text", "timestamptz", "int8", "int8"])((5, 2, "né", NOW, None, -7))
    assert staged(row, 5, 2) == with_two


def test_a_row_that_has_no_bytes_is_refused_alone(engine: sa.Engine):
    good, bad, other = parsed(post("exec-1"), post("exec-2"), post("exec-3"))
    values = list(bad.values)
    values[COLUMNS.index("human_feedback")] = "a\0b"
    with engine.begin() as connection:
        raw = connection.connection.driver_connection
        assert isinstance(raw, psycopg.Connection)
        landed = land(raw, [good, bad._replace(values=tuple(values)), other], tell=True)
    assert {position: reject.reason_code for position, reject in landed.refused.items()} == {1: "refused_by_database"}
    assert landed.changed == {0: "inserted", 2: "inserted"}
    assert rows(engine).keys() == {"exec-1", "exec-3"}


def test_land_tells_which_rows_it_changed(engine: sa.Engine):
    with engine.begin() as connection:
        raw = connection.connection.driver_connection
        assert isinstance(raw, psycopg.Connection)
        land(raw, parsed(post("known"), post("same")))
        batch = parsed(
            post("new"), failed("known", reported=5), post("same"), failed("twice", reported=5), post("twice")
        )
        landed = land(raw, batch, tell=True)
    assert landed.changed == {0: "inserted", 1: "corrected", 3: "corrected", 4: "inserted"}


def test_text_lands_the_same_whatever_encoding_the_connection_has(engine: sa.Engine):
    with engine.begin() as connection:
        raw = connection.connection.driver_connection
        assert isinstance(raw, psycopg.Connection)
        raw.execute("SET LOCAL client_encoding TO 'LATIN1'")
        assert land(raw, parsed(FULL)).inserted == 1
    assert rows(engine)["exec-full"]["human_feedback"] == FULL["execution"]["human_feedback"]


_values = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["L1", "1"])
_names = st.sampled_from([*contract.FlatRow.model_fields, "colour"])
_near_posts = st.builds(lambda changes: post(**changes), st.dictionaries(_names, _values, max_size=2))
_near_flat = st.builds(
    lambda changes: {"site_id": "a", **post()["execution"], **changes}, st.dictionaries(_names, _values, max_size=2)
)


def _problems(error: ValidationError) -> list[tuple[Any, str]]:
    """Where and what, except how a value that is no object is called."""
    return [(one["loc"], one["msg"]) for one in error.errors() if one["type"] not in ("dict_type", "model_type")]


@given(_near_posts | _near_flat | _values)
def test_lines_are_read_as_the_declared_models_read_them(value: Any):
    raw = line(value)
    for model, read in ((contract.ExecutionPost, contract._read_post), (contract.FlatRow, contract._read_flat)):
        told: ValidationError | None = None
        try:
            expected = model.model_validate_json(raw)
        except ValidationError as error:
            told = error
        if told is not None:
            with pytest.raises(ValidationError) as found:
                read(raw)
            assert _problems(found.value) == _problems(told)
            continue
        fields = dict(expected.__dict__)
        if "execution" in fields:
            fields["execution"] = expected.execution.__dict__
        assert read(raw) == fields


# --------------------------------------------------------------------------------------------------
# Processes
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def teams(monkeypatch: pytest.MonkeyPatch) -> list[Parsers]:
    """Every NDJSON file is parsed by two processes in blocks of 4 kB, and they are waited for; collects them."""
    found: list[Parsers] = []
    parse = Parsers.parse

    def once_ready(self: Parsers, raw: Iterable[blocks.RawBlock]) -> Iterator[Any]:
        found.append(self)
        self.wait_until_ready()
        return parse(self, raw)

    monkeypatch.setattr(files, "PROCESSES_FROM_BYTES", 0)
    monkeypatch.setattr(files, "process_count", lambda: 2)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 4_096)
    monkeypatch.setattr(Parsers, "parse", once_ready)
    return found


def rejects(engine: sa.Engine) -> list[tuple[Any, ...]]:
    columns = "line_number, reason_code, reason, payload, payload_bytes, payload_hash, times_seen"
    with engine.connect() as connection:
        found = connection.execute(sa.text(f"SELECT {columns} FROM telemetry_rejects ORDER BY line_number")).all()
    return [tuple(row) for row in found]


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_until_gone(pids: Iterable[int]) -> None:
    deadline = time.monotonic() + 20
    while any(map(alive, pids)):
        assert time.monotonic() < deadline, "a parsing process outlived the import"
        time.sleep(0.02)


def pids(team: Parsers) -> list[int]:
    found = [process.pid for process in team.processes]
    assert all(found)
    return [pid for pid in found if pid]


def difficult_file(path: Path) -> Path:
    lines = [b"\xef\xbb\xbf" + line(post("exec-bom"))]
    for number in range(150):
        lines += [line(post(f"exec-{number}"))]
        if number % 10 == 0:
            lines += [b"", b"  \r", b"{", b"\xff\xfe", line(post(f"exec-{number}", success=3)), b"[]"]
            lines += [line(post(f"exec-{number}")) + b"\r", line(failed(f"exec-{number - 5}", reported=5))]
            lines += [line(post("exec-known", reported=number, hostname="OTHER"))]
    lines.insert(40, b"x" * (LINE_LIMIT_BYTES + 5))
    lines.insert(60, line(post("exec-wide", error_message="y" * (LINE_LIMIT_BYTES - 1_500))))
    path.write_bytes(b"\n".join(lines) + b"\n" + line(post("exec-cut"))[:-9])
    return path


def test_processes_leave_the_same_rows_and_rejects_as_one_process_alone(
    engine: sa.Engine, tmp_path: Path, teams: list[Parsers], monkeypatch: pytest.MonkeyPatch
):
    path = difficult_file(tmp_path / "a.ndjson")
    found: list[tuple[IntakeReport, Any, Any]] = []
    for count in (0, 2):
        monkeypatch.setattr(files, "process_count", lambda count=count: count)
        with engine.begin() as connection:
            connection.execute(sa.text("DELETE FROM execution_telemetry"))
            connection.execute(sa.text("TRUNCATE telemetry_rejects RESTART IDENTITY"))
        import_file(engine, ndjson(tmp_path / "known.ndjson", post("exec-known")), received_at=NOW)
        report = import_file(engine, path, received_at=NOW)
        found.append((report, rows(engine), rejects(engine)))
    alone, together = found
    assert teams[-1].by_processes > 20
    assert [len(team.processes) for team in teams] == [0, 0, 2, 2]
    assert together == alone
    assert together[0].rejected == 15 * 5 + 2
    again = import_file(engine, path, received_at=NOW)
    assert (again.inserted, again.corrected) == (0, 0)
    assert rows(engine) == together[1]


@pytest.mark.parametrize("victims", [[0], [1], [0, 1]])
def test_a_parsing_process_that_is_killed_costs_no_row(
    engine: sa.Engine,
    tmp_path: Path,
    teams: list[Parsers],
    victims: list[int],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    monkeypatch.setattr(intake, "CHUNK_RECORDS", 20)
    path = ndjson(tmp_path / "a.ndjson", *(post(f"exec-{number}") for number in range(400)))

    def kill(_: int, __: float) -> None:
        for number in victims:
            if alive(pids(teams[0])[number]):
                os.kill(pids(teams[0])[number], signal.SIGKILL)

    with caplog.at_level(logging.WARNING):
        report = import_file(engine, path, received_at=NOW, progress=kill)
    assert (report.read, report.inserted, report.rejected) == (400, 400, 0)
    assert rows(engine).keys() == {f"exec-{number}" for number in range(400)}
    assert teams[0].by_processes > 0
    assert sum("ended before its time" in one.message for one in caplog.records) == len(victims)
    wait_until_gone(pids(teams[0]))


def test_an_interrupted_import_leaves_no_process_and_is_finished_by_importing_again(
    engine: sa.Engine, tmp_path: Path, teams: list[Parsers], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(intake, "CHUNK_RECORDS", 20)
    path = ndjson(tmp_path / "a.ndjson", *(post(f"exec-{number}") for number in range(200)))

    def interrupt(read: int, _: float) -> None:
        if read >= 60:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_file(engine, path, received_at=NOW, progress=interrupt)
    wait_until_gone(pids(teams[0]))
    landed = scalar(engine, "SELECT count(*) FROM execution_telemetry")
    assert 60 <= landed < 200
    report = import_file(engine, path, received_at=NOW)
    assert (report.inserted, report.unchanged) == (200 - landed, landed)
    assert rows(engine).keys() == {f"exec-{number}" for number in range(200)}


def test_a_file_that_is_cut_while_it_is_read_is_parsed_as_it_was(tmp_path: Path, teams: list[Parsers]):
    path = ndjson(tmp_path / "a.ndjson", *(post(f"exec-{number}") for number in range(60)))
    with path.open("rb") as file, parsers.parsers(file, NOW, TYPES, 2) as team:
        raw = list(blocks.cut(file, 1_000))
        os.truncate(path, 5_000)
        found = list(team.parse(raw))
    assert [name for _, lines in found for name in lines.execution_ids] == [f"exec-{number}" for number in range(60)]
    assert len(raw) > 5


def test_no_parsing_process_outlives_a_killed_import(tmp_path: Path):
    path = ndjson(tmp_path / "a.ndjson", post())
    program = (
        "import sys, time, datetime\n"
        "from flywheel_pipeline.telemetry.parsers import parsers\n"
        "with open(sys.argv[1], 'rb') as file:\n"
        "    with parsers(file, datetime.datetime.now(datetime.UTC), ['text'], 2) as team:\n"
        "        team.wait_until_ready()\n"
        "        print(*(process.pid for process in team.processes), flush=True)\n"
        "        time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True) as importing:
        assert importing.stdout is not None
        children = [int(word) for word in importing.stdout.readline().split()]
        assert len(children) == 2
        assert all(map(alive, children))
        importing.kill()
    wait_until_gone(children)
