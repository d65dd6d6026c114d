"""Posts and files into a real database."""

from __future__ import annotations

import csv
import json
import threading
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from posts import NOW, SITE, failed, line, ndjson, post, rows, scalar

from flywheel_pipeline.errors import DatabaseUnavailable, SchemaMismatch, UsageError
from flywheel_pipeline.telemetry import intake
from flywheel_pipeline.telemetry.contract import LINE_LIMIT_BYTES
from flywheel_pipeline.telemetry.intake import IntakeReport, import_file, post_execution

#: Databases are made once a test, so examples of one test share one; each empties it first.
EXAMPLES = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


def take(engine: sa.Engine, path: Path, **options: Any) -> IntakeReport:
    report = import_file(engine, path, **{"received_at": NOW, **options})
    assert report.read == report.inserted + report.corrected + report.unchanged + report.rejected
    assert report.rejected == report.reasons.total()
    return report


def figures(report: IntakeReport) -> tuple[int, int, int, int]:
    return report.inserted, report.corrected, report.unchanged, report.rejected


def empty(engine: sa.Engine) -> None:
    with engine.begin() as connection:
        for table in ("execution_telemetry", "telemetry_rejects"):
            connection.execute(sa.text(f"DELETE FROM {table}"))


def flat(*posts: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"site_id": p["site_id"], "reported_at": p["reported_at"], **p["execution"]} for p in posts]


def write_csv(path: Path, table: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(table[0]))
        writer.writeheader()
        for row in table:
            writer.writerow({k: json.dumps(v) if isinstance(v, dict | list) else v for k, v in row.items()})
    return path


# --------------------------------------------------------------------------------------------------
# Posts
# --------------------------------------------------------------------------------------------------


def test_a_post_is_inserted_once_and_then_recognised(engine: sa.Engine):
    assert post_execution(engine, post(), received_at=NOW).outcome == "inserted"
    stored = rows(engine)
    assert stored["exec-1"]["created_at"] == NOW
    later = NOW + timedelta(minutes=30)
    assert post_execution(engine, line(post()), received_at=later).outcome == "unchanged"
    assert rows(engine) == stored
    assert scalar(engine, "SELECT count(*) FROM execution_corrections") == 0


def test_a_resent_execution_corrects_the_first_and_its_history_is_kept(engine: sa.Engine):
    post_execution(engine, post(), received_at=NOW)
    corrected = failed(reported=5, state_after={"protection": "off"}, failure_type="environment_difference")
    assert post_execution(engine, corrected, received_at=NOW).outcome == "corrected"
    row = rows(engine)["exec-1"]
    assert (row["success"], row["status"], row["error_message"]) == (
        False,
        "failure",
        "Phase 'verify' failed",
    )
    assert row["state_after"] == {"protection": "off"}
    with engine.connect() as connection:
        before, after = connection.execute(sa.text("SELECT before, after FROM execution_corrections")).one()
    assert before["success"] is True
    assert after["success"] is False
    assert after["failure_type"] == "environment_difference"
    assert "hostname" not in after


def test_a_version_that_arrives_late_does_not_undo_a_newer_one(engine: sa.Engine):
    post_execution(engine, failed(reported=5), received_at=NOW)
    stored = rows(engine)
    assert post_execution(engine, post(reported=0), received_at=NOW).outcome == "unchanged"
    assert rows(engine) == stored


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (post(reported=5, hostname="NVWS02"), "NVWS02"),
        (post(reported=5, site_id="lakeside-family-clinic"), "lakeside-family-clinic"),
        (post(reported=5, started_at="2026-02-15T08:00:00Z"), "started_at"),
    ],
)
def test_an_execution_cannot_change_its_site_host_or_start(engine: sa.Engine, other: dict[str, Any], named: str):
    post_execution(engine, post(), received_at=NOW)
    stored = rows(engine)
    result = post_execution(engine, other, received_at=NOW)
    assert (result.outcome, result.reason_code) == ("rejected", "conflicting_identity")
    assert named in (result.reason or "")
    assert rows(engine) == stored


def test_a_bad_post_is_answered_with_its_reason_and_kept(engine: sa.Engine):
    result = post_execution(engine, post(success="yes"), received_at=NOW)
    assert (result.outcome, result.reason_code) == ("rejected", "wrong_type")
    assert "execution.success" in (result.reason or "")
    with engine.connect() as connection:
        stored = connection.execute(sa.text("SELECT * FROM telemetry_rejects")).mappings().one()
    assert stored["id"] == result.reject_id
    assert (stored["source"], stored["line_number"], stored["status"]) == ("http", None, "open")
    assert json.loads(bytes(stored["payload"])) == post(success="yes")


def test_a_post_over_the_limit_keeps_its_start_and_its_length(engine: sa.Engine):
    huge = line(post(error_message="x" * 10_000_000))
    assert post_execution(engine, huge, received_at=NOW).reason_code == "line_too_long"
    assert scalar(engine, "SELECT octet_length(payload) FROM telemetry_rejects") == LINE_LIMIT_BYTES
    assert scalar(engine, "SELECT payload_bytes FROM telemetry_rejects") == len(huge)


def test_a_post_may_hold_times_as_values(engine: sa.Engine):
    native = post(started_at=datetime(2026, 2, 15, 9, tzinfo=UTC))
    assert post_execution(engine, native, received_at=NOW).outcome == "inserted"
    assert rows(engine)["exec-1"]["started_at"] == datetime(2026, 2, 15, 9, tzinfo=UTC)


# --------------------------------------------------------------------------------------------------
# NDJSON: bad input
# --------------------------------------------------------------------------------------------------


def test_each_bad_line_is_rejected_with_its_number_and_every_good_line_lands(engine: sa.Engine, tmp_path: Path):
    missing = post("exec-missing")
    del missing["execution"]["execution_id"]
    path = ndjson(
        tmp_path / "day.ndjson",
        post("exec-1"),
        post("exec-unknown", colour="red"),
        post("exec-type", success="true"),
        missing,
        post("exec-future", started_at="2027-01-01T00:00:00Z"),
        post("exec-old", started_at="1999-01-01T00:00:00Z"),
        b'{"site_id": "' + b"x" * 10_000_000 + b'"}',
        line(post("exec-utf8")).replace(b"NVDC01", b"NV\xff\xfe"),
        line(post("exec-nul")).replace(b"NVDC01", b"NV\x00"),
        post("exec-nul-escaped", error_message="a\0b"),
        b"[1, 2]",
        b"",
        post("exec-2"),
    )
    with path.open("ab") as file:
        file.write(line(post("exec-cut"))[:-30])
    report = take(engine, path)
    assert rows(engine).keys() == {"exec-1", "exec-2"}
    assert report.read == 13
    with engine.connect() as connection:
        found = connection.execute(
            sa.text("SELECT line_number, reason_code, source FROM telemetry_rejects ORDER BY line_number")
        ).all()
    assert [tuple(row) for row in found] == [
        (2, "unknown_field", "day.ndjson"),
        (3, "wrong_type", "day.ndjson"),
        (4, "missing_execution_id", "day.ndjson"),
        (5, "future_event", "day.ndjson"),
        (6, "too_old", "day.ndjson"),
        (7, "line_too_long", "day.ndjson"),
        (8, "invalid_utf8", "day.ndjson"),
        (9, "nul_character", "day.ndjson"),
        (10, "nul_character", "day.ndjson"),
        (11, "not_an_object", "day.ndjson"),
        (14, "truncated", "day.ndjson"),
    ]
    assert len(report.reject_ids) == report.rejected == 11
    assert report.reasons == Counter(row.reason_code for row in found)


def test_a_line_of_ten_megabytes_is_cut_but_its_length_and_hash_are_of_the_whole(engine: sa.Engine, tmp_path: Path):
    take(engine, ndjson(tmp_path / "a.ndjson", b"x" * 10_000_000, post()))
    take(engine, ndjson(tmp_path / "a.ndjson", b"x" * 9_999_999 + b"y", post()))
    assert scalar(engine, "SELECT max(octet_length(payload)) FROM telemetry_rejects") == LINE_LIMIT_BYTES
    assert scalar(engine, "SELECT count(DISTINCT payload_hash) FROM telemetry_rejects") == 2
    assert rows(engine).keys() == {"exec-1"}


@pytest.mark.parametrize("length", [LINE_LIMIT_BYTES - 1, LINE_LIMIT_BYTES, LINE_LIMIT_BYTES + 1, LINE_LIMIT_BYTES + 2])
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b""])
def test_lines_around_the_limit_never_swallow_their_neighbours(
    engine: sa.Engine, tmp_path: Path, length: int, end: bytes
):
    padding = length - len(line(post("exec-long", error_message="")))
    long = line(post("exec-long", error_message="x" * padding))
    path = tmp_path / "a.ndjson"
    path.write_bytes(line(post("exec-1")) + b"\n" + long + end)
    if end:
        path.write_bytes(path.read_bytes() + line(post("exec-2")) + end)
    report = take(engine, path)
    expected = {"exec-1"} | ({"exec-2"} if end else set()) | ({"exec-long"} if length <= LINE_LIMIT_BYTES else set())
    assert rows(engine).keys() == expected
    assert report.reasons == Counter() if length <= LINE_LIMIT_BYTES else Counter(line_too_long=1)


def test_a_whole_last_line_without_a_newline_counts(engine: sa.Engine, tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + line(post("exec-1")) + b"\r\n\r\n" + line(post("exec-2")))
    assert figures(take(engine, path)) == (2, 0, 0, 0)


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_no_rows_and_no_error(engine: sa.Engine, tmp_path: Path, content: bytes):
    path = tmp_path / "quiet.ndjson"
    path.write_bytes(content)
    assert take(engine, path).read == 0


def test_a_value_that_only_the_database_refuses_costs_that_row_alone(engine: sa.Engine, tmp_path: Path):
    with engine.begin() as connection:
        connection.execute(sa.text("ALTER TABLE execution_telemetry ADD CHECK (hostname <> 'BANNED') NOT VALID"))
    many = [post(f"exec-{n}", hostname="BANNED" if n in (7, 40) else "NVDC01") for n in range(64)]
    report = take(engine, ndjson(tmp_path / "a.ndjson", *many))
    assert figures(report) == (62, 0, 0, 2)
    assert report.reasons == Counter(refused_by_database=2)
    assert scalar(engine, "SELECT string_agg(line_number::text, ',' ORDER BY id) FROM telemetry_rejects") == "8,41"


# --------------------------------------------------------------------------------------------------
# Files as a whole
# --------------------------------------------------------------------------------------------------


def test_a_file_that_cannot_be_read_as_a_whole_is_refused_in_a_sentence(engine: sa.Engine, tmp_path: Path):
    (tmp_path / "day.xlsx").write_bytes(b"PK")
    (tmp_path / "folder.ndjson").mkdir()
    (tmp_path / "empty.csv").write_bytes(b"")
    (tmp_path / "latin.csv").write_bytes(b"site_id,h\xf6st\n")
    (tmp_path / "empty.parquet").write_bytes(b"")
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and no more")
    for name, words in [
        ("missing.ndjson", "There is no file"),
        ("missing.xlsx", "There is no file"),
        ("folder.ndjson", "is not a file"),
        ("day.xlsx", "unknown suffix '.xlsx'"),
        ("empty.csv", "is empty"),
        ("latin.csv", "not UTF-8"),
        ("empty.parquet", "cannot be read as Parquet"),
        ("cut.parquet", "cannot be read as Parquet"),
    ]:
        with pytest.raises(UsageError, match=words) as refusal:
            import_file(engine, tmp_path / name)
        assert refusal.value.exit_code == 2
    assert scalar(engine, "SELECT count(*) FROM telemetry_rejects") == 0


def test_a_database_without_tables_says_what_to_do(empty_engine: sa.Engine, tmp_path: Path):
    path = ndjson(tmp_path / "a.ndjson", post())
    with pytest.raises(SchemaMismatch) as refusal:
        import_file(empty_engine, path)
    assert "flywheel db upgrade" in (refusal.value.hint or "")


def test_a_database_that_cannot_be_reached_is_one_sentence(tmp_path: Path):
    engine = sa.create_engine(f"postgresql+psycopg://nobody@/none?host={tmp_path}")
    with pytest.raises(DatabaseUnavailable) as refusal:
        post_execution(engine, post())
    assert "\n" not in refusal.value.message


def test_progress_speaks_after_each_chunk_and_ends_at_one(
    engine: sa.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(intake, "CHUNK_RECORDS", 10)
    path = ndjson(tmp_path / "a.ndjson", *(post(f"exec-{n}") for n in range(25)))
    told: list[tuple[int, float]] = []
    take(engine, path, progress=lambda read, fraction: told.append((read, fraction)))
    assert [read for read, _ in told] == [10, 20, 25]
    assert told[-1][1] == 1.0
    assert all(0 < fraction <= 1 for _, fraction in told)


def test_a_crash_between_chunks_is_healed_by_importing_again(
    engine: sa.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(intake, "CHUNK_RECORDS", 10)
    path = ndjson(tmp_path / "a.ndjson", *(post(f"exec-{n}") for n in range(25)), post("bad", colour="red"))

    class Killed(Exception):
        pass

    def kill(read: int, _: float) -> None:
        if read == 20:
            raise Killed

    with pytest.raises(Killed):
        take(engine, path, progress=kill)
    assert len(rows(engine)) == 20
    assert figures(take(engine, path)) == (5, 0, 20, 1)


# --------------------------------------------------------------------------------------------------
# CSV
# --------------------------------------------------------------------------------------------------


def test_csv_rows_are_the_same_rows(engine: sa.Engine, tmp_path: Path):
    awkward = post("exec-2", error_message='line one\nline "two", and more', tags={"a": [1, None]})
    plain = post("exec-1")
    take(engine, ndjson(tmp_path / "a.ndjson", plain, awkward))
    stored = rows(engine)
    plain["execution"].update(error_message=None, tags=None)
    report = take(engine, write_csv(tmp_path / "a.csv", flat(plain, awkward)))
    assert figures(report) == (0, 0, 2, 0)
    empty(engine)
    assert take(engine, tmp_path / "a.csv").inserted == 2
    assert rows(engine) == stored


def test_an_export_of_the_table_by_postgresql_can_be_imported(engine: sa.Engine, tmp_path: Path):
    take(engine, ndjson(tmp_path / "a.ndjson", post("exec-1", cost_usd=0.0125), failed("exec-2", tags=["a"])))
    stored = rows(engine)
    with engine.connect() as connection:
        cursor = connection.connection.driver_connection.cursor()
        with cursor.copy("COPY execution_telemetry TO STDOUT (FORMAT csv, HEADER)") as copy:
            (tmp_path / "export.csv").write_bytes(b"".join(bytes(part) for part in copy))
    assert figures(take(engine, tmp_path / "export.csv")) == (0, 0, 2, 0)
    empty(engine)
    assert figures(take(engine, tmp_path / "export.csv")) == (2, 0, 0, 0)
    assert rows(engine) == stored


@pytest.mark.parametrize(
    ("header", "named"),
    [
        ("site_id,execution_id,hostname,runbook_id,success,colour", "unknown 'colour'"),
        ("site_id,execution_id,hostname,runbook_id", "missing 'success'"),
        ("site_id;execution_id;hostname;runbook_id;success", "unknown"),
        ("site_id,site_id,execution_id,hostname,runbook_id,success", "given twice: 'site_id'"),
    ],
)
def test_a_csv_with_the_wrong_header_imports_nothing(engine: sa.Engine, tmp_path: Path, header: str, named: str):
    (tmp_path / "a.csv").write_text(f"{header}\n{SITE},exec-1,NVDC01,L1-X,true\n")
    with pytest.raises(UsageError, match=named):
        import_file(engine, tmp_path / "a.csv")
    assert rows(engine) == {}


CSV_HEADER = "site_id,execution_id,hostname,runbook_id,success,resolution_level,error_message,tags"


def test_bad_csv_rows_are_rejected_with_their_line_and_good_rows_land(engine: sa.Engine, tmp_path: Path):
    good = f"{SITE},{{}},NVDC01,L1-FIREWALL-001,t,L1,,"
    lines = [
        CSV_HEADER.encode(),
        good.format("exec-1").encode(),
        f"{SITE},exec-short,NVDC01".encode(),
        (good.format("exec-long") + ",,,").encode(),
        f"{SITE},exec-bool,NVDC01,L1-X,perhaps,L1,,".encode(),
        f"{SITE},,NVDC01,L1-X,t,L1,,".encode(),
        f"{SITE},exec-json,NVDC01,L1-X,t,L1,,{{not json".encode(),
        good.format("exec-latin").replace("NVDC01", "NVD\u00d6").encode("latin-1"),
        good.format("exec-nul").replace("NVDC01", "NV\0").encode(),
        f'{SITE},exec-quote,NVDC01,L1-X,t,L1,"never closed,'.encode(),
        good.format("exec-2").encode(),
        b"",
        f'{SITE},exec-3,NVDC01,L1-X,f,L1,"two\nlines, ""quoted""",'.encode(),
        good.format("exec-4").encode(),
        f'{SITE},exec-stray,"NV"DC01,L1-X,t,L1,,'.encode(),
    ]
    (tmp_path / "a.csv").write_bytes(b"\r\n".join(lines) + b"\r\n" + f'{SITE},exec-cut,"NV'.encode())
    report = take(engine, tmp_path / "a.csv")
    stored = rows(engine)
    assert stored.keys() == {"exec-1", "exec-2", "exec-3", "exec-4"}
    assert stored["exec-3"]["error_message"] == 'two\nlines, "quoted"'
    with engine.connect() as connection:
        found = connection.execute(
            sa.text("SELECT line_number, reason_code FROM telemetry_rejects ORDER BY line_number")
        )
        assert [tuple(row) for row in found] == [
            (3, "wrong_field_count"),
            (4, "wrong_field_count"),
            (5, "wrong_type"),
            (6, "missing_execution_id"),
            (7, "wrong_type"),
            (8, "invalid_utf8"),
            (9, "nul_character"),
            (10, "invalid_csv"),
            (16, "invalid_csv"),
            (17, "truncated"),
        ]
    assert report.rejected == 10


def test_a_quote_that_never_closes_costs_one_line_of_a_long_file(engine: sa.Engine, tmp_path: Path):
    good = [f"{SITE},exec-{n},NVDC01,L1-FIREWALL-001,t,L1,," for n in range(3_000)]
    text = [CSV_HEADER, f'{SITE},exec-bad,NVDC01,L1-X,t,L1,"oops,', *good, f'{SITE},exec-bad2,"N,L1-X,t,L1,,']
    (tmp_path / "a.csv").write_text("\n".join(text) + "\n")
    assert figures(take(engine, tmp_path / "a.csv")) == (3_000, 0, 0, 2)


def test_a_csv_field_of_a_megabyte_is_read_and_a_larger_record_rejected(engine: sa.Engine, tmp_path: Path):
    wide = [
        {**flat(post(name))[0], "error_message": "x" * length}
        for name, length in (("exec-1", 900_000), ("exec-2", LINE_LIMIT_BYTES), ("exec-3", 5))
    ]
    report = take(engine, write_csv(tmp_path / "a.csv", wide))
    assert report.reasons == Counter(line_too_long=1)
    assert rows(engine).keys() == {"exec-1", "exec-3"}


def test_a_row_without_reported_at_can_repeat_but_not_correct(engine: sa.Engine, tmp_path: Path):
    undated = {key: value for key, value in flat(post())[0].items() if key != "reported_at"}
    path = write_csv(tmp_path / "a.csv", [undated])
    assert figures(take(engine, path)) == (1, 0, 0, 0)
    assert figures(take(engine, path, received_at=NOW + timedelta(days=1))) == (0, 0, 1, 0)
    changed = write_csv(tmp_path / "b.csv", [{**undated, "success": "false", "status": "failure"}])
    assert take(engine, changed).reasons == Counter(undated_correction=1)
    assert rows(engine)["exec-1"]["success"] is True
    assert figures(take(engine, ndjson(tmp_path / "a.ndjson", failed()))) == (0, 1, 0, 0)
    assert figures(take(engine, path)) == (0, 0, 1, 0)
    assert rows(engine)["exec-1"]["success"] is False


# --------------------------------------------------------------------------------------------------
# Parquet
# --------------------------------------------------------------------------------------------------


def test_parquet_rows_are_the_same_rows(engine: sa.Engine, tmp_path: Path):
    posts = [post("exec-1", error_message=None, retry_count=None), failed("exec-2", retry_count=2)]
    take(engine, ndjson(tmp_path / "a.ndjson", *posts))
    stored = rows(engine)
    pq.write_table(pa.Table.from_pylist(flat(*posts)), tmp_path / "a.parquet")
    assert figures(take(engine, tmp_path / "a.parquet")) == (0, 0, 2, 0)
    empty(engine)
    assert figures(take(engine, tmp_path / "a.parquet")) == (2, 0, 0, 0)
    assert rows(engine) == stored


def test_a_frame_written_by_pandas_can_be_imported(engine: sa.Engine, tmp_path: Path):
    frame = pd.DataFrame(flat(post("exec-1", retry_count=2), failed("exec-2")))
    for column in ("started_at", "completed_at", "reported_at"):
        frame[column] = pd.to_datetime(frame[column], format="ISO8601").astype("datetime64[ns, UTC]")
    for column in ("state_before", "executed_steps"):
        frame[column] = frame[column].map(json.dumps)
    assert frame["retry_count"].dtype == float
    frame.to_parquet(tmp_path / "a.parquet")
    assert figures(take(engine, tmp_path / "a.parquet")) == (2, 0, 0, 0)
    stored = rows(engine)
    assert (stored["exec-1"]["retry_count"], stored["exec-2"]["retry_count"]) == (2, None)
    assert stored["exec-1"]["completed_at"] == datetime(2026, 2, 15, 9, 0, 42, 500_000, tzinfo=UTC)
    assert stored["exec-1"]["executed_steps"] == ["resume", "verify"]


def test_bad_parquet_rows_are_rejected_with_their_row_number(engine: sa.Engine, tmp_path: Path):
    table = flat(*(post(f"exec-{n}") for n in range(6)))
    table[1]["execution_id"] = None
    table[2]["confidence"] = 3.0
    table[3]["started_at"] = "2031-01-01T00:00:00Z"
    columns = pa.Table.from_pylist(table)
    names = pa.array([row["hostname"].encode() for row in table[:5]] + [b"NV\xff"], pa.binary())
    columns = columns.set_column(columns.schema.get_field_index("hostname"), "hostname", names.view(pa.string()))
    pq.write_table(columns, tmp_path / "a.parquet")
    report = take(engine, tmp_path / "a.parquet")
    assert rows(engine).keys() == {"exec-0", "exec-4"}
    assert report.reasons == Counter(missing_execution_id=1, out_of_range=1, future_event=1, invalid_utf8=1)
    assert (
        scalar(engine, "SELECT string_agg(line_number::text, ',' ORDER BY line_number) FROM telemetry_rejects")
        == "2,3,4,6"
    )


def test_a_parquet_file_with_wrong_columns_imports_nothing(engine: sa.Engine, tmp_path: Path):
    pq.write_table(pa.table({"site_id": ["a"], "colour": ["red"]}), tmp_path / "a.parquet")
    with pytest.raises(UsageError, match="unknown 'colour'"):
        import_file(engine, tmp_path / "a.parquet")


# --------------------------------------------------------------------------------------------------
# Order, repetition, loss
# --------------------------------------------------------------------------------------------------

_versions = st.lists(
    st.builds(
        lambda number, minute, ok, level: (post if ok else failed)(
            f"exec-{number}", reported=minute, resolution_level=level
        ),
        st.integers(0, 3),
        st.integers(0, 3),
        st.booleans(),
        st.sampled_from(["L1", "L2"]),
    ),
    min_size=1,
    max_size=12,
)


@EXAMPLES
@given(posts=_versions, data=st.data())
def test_any_order_repetition_and_division_of_the_posts_leaves_the_same_rows(
    engine: sa.Engine,
    tmp_path_factory: pytest.TempPathFactory,
    posts: list[dict[str, Any]],
    data: st.DataObject,
):
    folder = tmp_path_factory.mktemp("posts")
    empty(engine)
    take(engine, ndjson(folder / "all.ndjson", *posts))
    expected = rows(engine)
    empty(engine)
    again = data.draw(st.lists(st.sampled_from(posts), max_size=6))
    shuffled = data.draw(st.permutations(posts + again))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(shuffled)), max_size=4)))
    for number, (start, end) in enumerate(zip([0, *cuts], [*cuts, len(shuffled)], strict=True)):
        take(engine, ndjson(folder / f"{number}.ndjson", *shuffled[start:end]))
    assert rows(engine) == expected


@EXAMPLES
@given(posts=_versions)
def test_importing_a_file_again_changes_nothing_at_all(
    engine: sa.Engine, tmp_path_factory: pytest.TempPathFactory, posts: list[dict[str, Any]]
):
    path = ndjson(tmp_path_factory.mktemp("posts") / "a.ndjson", *posts)
    empty(engine)
    take(engine, path)
    stored = rows(engine)
    history = scalar(engine, "SELECT count(*) FROM execution_corrections")
    versions = scalar(engine, "SELECT string_agg(xmin::text, ',' ORDER BY id) FROM execution_telemetry")
    report = take(engine, path, received_at=NOW + timedelta(days=1))
    assert figures(report) == (0, 0, len(posts), 0)
    assert rows(engine) == stored
    assert scalar(engine, "SELECT count(*) FROM execution_corrections") == history
    assert scalar(engine, "SELECT string_agg(xmin::text, ',' ORDER BY id) FROM execution_telemetry") == versions


@EXAMPLES
@given(data=st.data())
def test_bad_lines_never_cost_a_good_one(
    engine: sa.Engine, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
):
    bad = st.sampled_from([b"{", b"\xff\xfe", b"\x00", b"[]", line(post(success=3)), line(post("", hostname="x"))])
    noise = st.binary(min_size=1, max_size=40).filter(
        lambda raw: not raw.isspace() and b"\n" not in raw and not raw.startswith(b"\xef\xbb\xbf")
    )
    bad_lines = data.draw(st.lists(bad | noise, max_size=8))
    good_lines = [line(post(f"exec-{n}")) for n in range(data.draw(st.integers(0, 6)))]
    mixed = data.draw(st.permutations(bad_lines + good_lines))
    empty(engine)
    report = take(engine, ndjson(tmp_path_factory.mktemp("mixed") / "a.ndjson", *mixed))
    assert figures(report) == (len(good_lines), 0, 0, len(bad_lines))
    assert rows(engine).keys() == {f"exec-{n}" for n in range(len(good_lines))}
    numbers = [n for n, raw in enumerate(mixed, 1) if raw not in good_lines]
    with engine.connect() as connection:
        stored = connection.execute(sa.text("SELECT line_number, payload FROM telemetry_rejects ORDER BY 1")).all()
    assert [row.line_number for row in stored] == numbers
    assert [bytes(row.payload) for row in stored] == [mixed[n - 1].rstrip(b"\r") for n in numbers]


def test_the_steps_between_versions_in_one_file_are_all_in_the_history(engine: sa.Engine, tmp_path: Path):
    path = ndjson(
        tmp_path / "a.ndjson",
        failed(reported=10, error_message="second"),
        post(reported=20),
        failed(reported=0, error_message="first"),
        post(reported=20),
    )
    report = take(engine, path)
    assert figures(report) == (1, 2, 1, 0)
    with engine.connect() as connection:
        steps = connection.execute(
            sa.text("SELECT before->>'error_message', after->>'error_message' FROM execution_corrections ORDER BY id")
        ).all()
    assert [tuple(step) for step in steps] == [("first", "second"), ("second", None)]


def test_a_row_that_repeats_a_refused_one_is_refused_with_it(engine: sa.Engine, tmp_path: Path):
    take(engine, ndjson(tmp_path / "a.ndjson", post()))
    other = post(reported=5, hostname="NVWS02")
    report = take(engine, ndjson(tmp_path / "b.ndjson", other, other))
    assert report.reasons == Counter(conflicting_identity=2)


def test_an_import_fires_few_statements_however_many_rows(engine: sa.Engine, tmp_path: Path):
    with engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE statements (at timestamptz DEFAULT clock_timestamp())"))
        connection.execute(
            sa.text(
                "CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS "
                "'BEGIN INSERT INTO statements DEFAULT VALUES; RETURN NULL; END'"
            )
        )
        connection.execute(
            sa.text(
                "CREATE TRIGGER note AFTER INSERT OR UPDATE ON execution_telemetry "
                "FOR EACH STATEMENT EXECUTE FUNCTION note()"
            )
        )
    posts = [post(f"exec-{n}") for n in range(500)] + [failed(f"exec-{n}", reported=5) for n in range(100)]
    take(engine, ndjson(tmp_path / "a.ndjson", *posts))
    assert scalar(engine, "SELECT count(*) FROM statements") == 2


def test_importers_of_the_same_rows_at_once_agree_and_do_not_deadlock(engine: sa.Engine, tmp_path: Path):
    first = [post(f"exec-{n}") for n in range(200)]
    second = [failed(f"exec-{n}", reported=5) for n in range(200)]
    paths = [
        ndjson(tmp_path / "a.ndjson", *first, *second),
        ndjson(tmp_path / "b.ndjson", *reversed(second), *first),
        ndjson(tmp_path / "c.ndjson", *first[::-1]),
        ndjson(tmp_path / "d.ndjson", *second),
    ]
    reports: list[IntakeReport] = []
    failures: list[BaseException] = []

    def run(path: Path) -> None:
        try:
            reports.append(take(engine, path))
        except BaseException as error:  # noqa: BLE001 - handed to the test, which fails with it
            failures.append(error)

    threads = [threading.Thread(target=run, args=(path,)) for path in paths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert sum(report.inserted for report in reports) == 200
    assert sum(report.rejected for report in reports) == 0
    assert {row["success"] for row in rows(engine).values()} == {False}
    assert len(rows(engine)) == 200
