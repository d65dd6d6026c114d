"""Report and auditor's export of the golden day, as their readers meet them: figures, hostile strings, bytes, browser."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
import pytest
import sqlalchemy as sa
from graph_runs import CopyDatabase, Environment, Flywheel, PlayedDay

from flywheel_pipeline.aggregates.refresh import rebuild
from flywheel_pipeline.errors import UsageError
from flywheel_pipeline.health.trend import cusum_by_day, cusum_by_hour
from flywheel_pipeline.promotion.acts import act
from flywheel_pipeline.promotion.policy import load_policy
from flywheel_pipeline.report.audit import FILES, MANIFEST, export, verify
from flywheel_pipeline.report.build import write_report
from flywheel_pipeline.report.snapshot import Period, snapshot
from flywheel_pipeline.simulation.replay import GOLDEN

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

PROMOTED = "RB-AUTO-defender_exclusions~RB-WIN-SEC-017~windows"
HOSTILE_ID = "<script>window.pwned=1</script>"
HOSTILE_SITE = "'><svg onload=window.pwned=1>"
HOSTILE_ERROR = 'disk "onload="window.pwned=1" <img src=x onerror=window.pwned=1>'
HOSTILE_REASON = "</td><script>window.pwned=1</script>"


class Read(HTMLParser):
    """A page as its reader takes it: tiles {label: (value, note)}, tables {caption: rows}, text, and addresses."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tiles: dict[str, tuple[str, str]] = {}
        self.tables: dict[str, list[dict[str, str]]] = {}
        self.addresses: list[str] = []
        self.tags: set[str] = set()
        self.text = ""
        self._open: list[tuple[str, str]] = []
        self._parts: dict[str, str] = {}
        self._caption, self._cells, self._heads = "", [""], [""]
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.add(tag)
        self.addresses += [given[name] or "" for name in ("src", "href", "data", "action") if name in given]
        if tag in ("meta", "link", "img"):
            return
        self._open.append((tag, given.get("class") or ""))
        if tag == "table":
            self._caption, self._heads = "", []
        elif tag == "tr":
            self._cells = []
        elif tag in ("td", "th"):
            self._cells.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("meta", "link", "img"):
            return
        opened, kind = self._open.pop()
        assert opened == tag
        if kind.split(" ")[0] == "tile":
            self.tiles[self._parts["label"]] = (self._parts["value"], self._parts["note"])
            self._parts = {}
        elif tag == "thead":
            self._heads = self._cells
            self.tables.setdefault(self._caption, [])
        elif tag == "tr" and any(t == "tbody" for t, _ in self._open):
            self.tables[self._caption].append(dict(zip(self._heads, self._cells, strict=True)))

    def handle_data(self, data: str) -> None:
        tag, kind = self._open[-1] if self._open else ("", "")
        if tag == "style":
            return
        self.text += data
        if tag == "caption":
            self._caption += data
        elif any(t in ("td", "th") for t, _ in self._open) and data.strip():
            self._cells[-1] += data
        for name in ("label", "value", "note"):
            if kind.split(" ")[0] == name:
                self._parts[name] = self._parts.get(name, "") + data
        self._parts.setdefault("note", "")


@pytest.fixture(scope="module")
def day(copy_database: CopyDatabase, played: PlayedDay) -> sa.Engine:
    """A copy of the played day that the tests of this module only read."""
    assert played.engine.url.database is not None
    return copy_database(played.engine.url.database)


@pytest.fixture(scope="module")
def hostile(copy_database: CopyDatabase, played: PlayedDay) -> sa.Engine:
    """The played day, and agents and people that send markup in every string; counted."""
    assert played.engine.url.database is not None
    engine = copy_database(played.engine.url.database)
    with engine.begin() as connection:
        for number, (rule, error) in enumerate(
            [(HOSTILE_ID, HOSTILE_ERROR), *[("RB-AUTO-BITLOCKE", HOSTILE_ERROR)] * 900]
        ):
            connection.execute(
                sa.text(
                    "INSERT INTO execution_telemetry (execution_id, site_id, runbook_id, hostname, incident_type, success, "
                    "error_message, resolution_level, started_at) VALUES (:id, :site, :rule, :host, 'x', false, :error, 'L1', "
                    "'2026-02-15T10:00:00Z')"
                ),
                {"id": f"h{number}", "site": HOSTILE_SITE, "rule": rule, "host": f"h{number % 7}", "error": error},
            )
        connection.execute(
            sa.text(
                "INSERT INTO human_acts (act, subject_kind, subject_id, actor, reason) "
                "VALUES ('approve', 'rule', 'RB-AUTO-BITLOCKE', :actor, :reason)"
            ),
            {"actor": HOSTILE_SITE, "reason": HOSTILE_REASON},
        )
    rebuild(engine, site=HOSTILE_SITE)
    return engine


@pytest.fixture(scope="module")
def whole(day: sa.Engine, tmp_path_factory: pytest.TempPathFactory) -> Read:
    """The report on the whole, read."""
    file = tmp_path_factory.mktemp("report") / "report.html"
    write_report(day, file)
    return Read(file.read_text("utf-8"))


@pytest.fixture(scope="module")
def hostile_pages(hostile: sa.Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of both reports on the hostile database: report.html and rule.html."""
    directory = tmp_path_factory.mktemp("hostile")
    write_report(hostile, directory / "report.html")
    write_report(hostile, directory / "rule.html", rule="RB-AUTO-BITLOCKE")
    return directory


@pytest.fixture
def audited(day: sa.Engine, tmp_path: Path) -> Path:
    """An export of the day."""
    export(day, tmp_path / "audit", Period())
    return tmp_path / "audit"


def test_the_report_of_the_day_shows_the_golden_figures(whole: Read) -> None:
    read = whole
    telemetry, patterns, rules = GOLDEN["telemetry"], GOLDEN["patterns"], GOLDEN["rules"]
    assert read.tiles["telemetry rows"] == (
        f"{telemetry['rows']:,}",
        f"{telemetry['l1']:,} L1, {telemetry['not_l1']:,} other",
    )
    assert read.tiles["reported successful"][0] == f"{telemetry['successful']:,}"
    assert read.tiles["patterns"] == (
        str(patterns["total"]),
        f"{patterns['promoted']} promoted, {patterns['pending']} pending",
    )
    assert read.tiles["promoted rules"] == (
        str(rules["promoted"]),
        f"{rules['enabled']} enabled, {rules['quarantined']} quarantined",
    )
    assert read.tiles["built-in rules"][0] == str(rules["builtin"])
    assert read.tiles["unresolved"][0] == "0"
    assert read.tiles["failing rules"][0] == "3"
    for caption, golden in (("Promoted rules", GOLDEN["top_rules"]), ("Built-in rules", GOLDEN["builtin_rules"])):
        shown = {row["rule"]: row for row in read.tables[caption]}
        for rule in golden:
            row = shown[rule["rule_id"]]
            assert (row["matches"], row["successes"], row["failures"], row["success rate"]) == (
                f"{rule['matches']:,}",
                f"{rule['successes']:,}",
                f"{rule['failures']:,}",
                f"{rule['successes'] / rule['matches']:.1%}".replace("%", " %"),
            )
    assert [row["rule"] for row in read.tables["Promoted rules"]] == [r["rule_id"] for r in GOLDEN["top_rules"]]
    states = {(row["source"], row["state"]): row["rules"] for row in read.tables["Rules by state"]}
    assert states == {("promoted", "fleet"): "9", ("promoted", "quarantined"): "11", ("builtin", "fleet"): "21"}
    assert len(read.tables["Patterns that wait"]) == 10
    assert len(read.tables["Quarantined rules"]) == 11
    assert "RB-AUTO-BITLOCKE succeeded in 917 of 3,057 executions (30.0 %)" in read.text
    assert "L1-LIN-CRYPTO-001 succeeded in 0 of 729 executions" in read.text


def test_what_was_decided_and_delivered_stands_in_the_report(whole: Read, day: sa.Engine) -> None:
    read = whole
    with day.connect() as connection:

        def count(query: str) -> int:
            return int(connection.execute(sa.text(query)).scalar_one())

        assert len(read.tables["Decisions"]) == count("SELECT count(*) FROM promotion_decisions")
        assert len(read.tables["Ledger"]) == count("SELECT count(*) FROM rule_events")
        placed = read.tables["Promoted rules on appliances"]
        assert sum(int(row["executed"]) for row in placed) == count(
            "SELECT count(*) FROM deployments WHERE wanted AND state = 'executed'"
        )
        assert {row["rule"] for row in placed} >= {"RB-AUTO-BITLOCKE", PROMOTED}
        assert sum(int(row["commands"]) for row in read.tables["Commands"]) == count(
            "SELECT count(*) FROM appliance_commands"
        )


def test_a_period_bounds_what_happened_and_leaves_the_state_as_it_is(day: sa.Engine, tmp_path: Path) -> None:
    import datetime as dt

    before = Period(dt.date(2026, 1, 1), dt.date(2026, 1, 31))
    write_report(day, tmp_path / "report.html", period=before)
    read = Read((tmp_path / "report.html").read_text("utf-8"))
    with day.connect() as connection:
        events = connection.execute(
            sa.text("SELECT count(*) FROM rule_events WHERE occurred_at < '2026-02-01T00:00:00Z'")
        ).scalar_one()
    assert 0 < events == len(read.tables["Ledger"])
    assert "Decisions" not in read.tables
    assert "2026-01-01 to 2026-01-31" in read.text
    assert read.tiles["telemetry rows"][0] == "13,135"


def test_the_report_of_a_rule_shows_its_history_its_causes_and_its_certificate(day: sa.Engine, tmp_path: Path) -> None:
    write_report(day, tmp_path / "rule.html", rule="RB-AUTO-BITLOCKE")
    read = Read((tmp_path / "rule.html").read_text("utf-8"))
    assert (read.tiles["matches"][0], read.tiles["successes"][0], read.tiles["success rate"][0]) == (
        "3,057",
        "917",
        "30.0 %",
    )
    assert sum(int(row["matches"].replace(",", "")) for row in read.tables[""] if "site" in row) == 3057
    assert any(
        row.get("failures") == "540" and "Trusted Platform Module" in row["error"]
        for row in read.tables[""]
        if "error" in row
    )
    assert {row["gate"] for row in read.tables["Gates, in order"]} >= {"raw_rate"}
    assert len(read.tables["Ledger"]) == 1
    write_report(day, tmp_path / "promoted.html", rule=PROMOTED)
    promoted = Read((tmp_path / "promoted.html").read_text("utf-8"))
    assert "It holds: its hashes fit" in promoted.text
    assert "promoted" in {row["event"] for row in promoted.tables["Ledger"]}
    assert {row["verdict"] for row in promoted.tables["Decisions"]} >= {"promote"}


def test_the_cusum_and_the_figures_of_a_rule_are_those_of_the_models(day: sa.Engine, tmp_path: Path) -> None:
    policy = load_policy("legacy")
    with day.connect() as connection:
        scopes = [
            dict(row)
            for row in connection.execute(
                sa.text("SELECT * FROM rule_cusum WHERE policy_hash = :policy"), {"policy": policy.policy_hash}
            ).mappings()
        ]
        fleets = {row["rule_id"]: row for row in scopes if row["scope_kind"] == "fleet"}
        assert len(fleets) >= 5
        # The model's sums begin at a checkpoint where there is one: the same W now, its highest since then.
        checkpoints = set(connection.execute(sa.text("SELECT DISTINCT rule_id FROM cusum_checkpoints")).scalars())
        assert fleets.keys() - checkpoints
        assert fleets.keys() & checkpoints
        for rule_id, fleet in fleets.items():
            points = cusum_by_day(connection, rule_id, policy.demotion.cusum)
            assert sum(p.episodes for p in points) == fleet["episodes"]
            assert sum(p.failures for p in points) == fleet["failures"]
            assert points[-1].w == pytest.approx(fleet["w"])
            highest = max(p.w_peak for p in points)
            assert highest >= fleet["w_peak"] - 1e-9
            hours = cusum_by_hour(connection, rule_id, policy.policy_hash)
            assert all(hours[-1].w == pytest.approx(fleet["w"]) for _ in hours[:1])
            if rule_id not in checkpoints:
                assert highest == pytest.approx(fleet["w_peak"])
                assert max(p.w_peak for p in hours) == pytest.approx(fleet["w_peak"])
        card = (
            connection.execute(sa.text("SELECT * FROM rule_scorecard WHERE rule_id = 'RB-AUTO-BITLOCKE'"))
            .mappings()
            .one()
        )
    write_report(day, tmp_path / "rule.html", rule="RB-AUTO-BITLOCKE")
    read = Read((tmp_path / "rule.html").read_text("utf-8"))
    fleet = fleets["RB-AUTO-BITLOCKE"]
    assert fleet["w"] > policy.demotion.cusum.quarantine_at
    assert (
        f"W over the fleet stands at {fleet['w']:.2f} after {fleet['episodes']:,} rated episodes of version 1; it alarmed. "
        "Under this policy a failing rule only warns." in read.text
    )
    shown = {(row["scope"], row["which"]): row for row in read.tables["By scope"]}
    mine = {(row["scope_kind"], row["scope_value"]): row for row in scopes if row["rule_id"] == "RB-AUTO-BITLOCKE"}
    assert shown.keys() == mine.keys()
    for key, row in mine.items():
        assert (int(shown[key]["episodes"]), int(shown[key]["failures"])) == (row["episodes"], row["failures"])
        assert float(shown[key]["W now"]) == pytest.approx(row["w"], abs=0.01)
    for tile, figure in (
        ("success rate", card["success_rate"]),
        ("where it could", card["rated_rate"]),
        ("of episodes", card["episode_rate"]),
    ):
        assert read.tiles[tile][0] == f"{100 * figure:.1f} %"


def test_a_rule_out_of_service_still_shows_the_cusum_that_it_left_with(played_copy: sa.Engine) -> None:
    c = load_policy("legacy").demotion.cusum
    with played_copy.connect() as connection:
        before = cusum_by_day(connection, "RB-AUTO-BITLOCKE", c)
    (done,) = act(played_copy, "quarantine", ["RB-AUTO-BITLOCKE"], actor="dana", reason="it fails")
    assert done.done
    with played_copy.connect() as connection:
        left = connection.execute(
            sa.text("SELECT count(*) FROM rule_cusum WHERE rule_id = 'RB-AUTO-BITLOCKE'")
        ).scalar_one()
        assert left == 0, "the model watches rules in service alone"
        assert cusum_by_day(connection, "RB-AUTO-BITLOCKE", c) == before != []


def test_a_certificate_that_was_touched_is_said_to_fail(played_copy: sa.Engine, tmp_path: Path) -> None:
    with played_copy.begin() as connection:
        connection.exec_driver_sql("SET session_replication_role = replica")
        connection.execute(
            sa.text(
                "UPDATE rule_events SET certificate = jsonb_set(certificate, '{evidence,successes}', '4000') "
                "WHERE rule_id = :id AND certificate IS NOT NULL"
            ),
            {"id": PROMOTED},
        )
    write_report(played_copy, tmp_path / "rule.html", rule=PROMOTED)
    assert "It does not hold: its own hash does not fit" in Read((tmp_path / "rule.html").read_text("utf-8")).text
    export(played_copy, tmp_path / "audit", Period())
    (problem,) = verify(tmp_path / "audit").problems
    assert problem.startswith(f"certificates.parquet: the certificate of {PROMOTED}")


def test_hostile_strings_are_shown_and_add_no_element_and_no_address(hostile_pages: Path) -> None:
    for name in ("report.html", "rule.html"):
        html = (hostile_pages / name).read_text("utf-8")
        read = Read(html)
        assert HOSTILE_REASON in read.text
        assert "window.pwned=1" in read.text
        assert not read.tags & {"script", "svg", "iframe", "object", "embed"}
        assert all(address.startswith(("#", "data:image/svg+xml;base64,", "data:,")) for address in read.addresses)
        assert "http://" not in html
        assert "https://" not in html
    read = Read((hostile_pages / "report.html").read_text("utf-8"))
    assert [row["id"] for row in read.tables[""] if "id" in row] == [HOSTILE_ID]
    assert HOSTILE_SITE in read.text


def test_a_report_that_cannot_be_is_refused_and_leaves_no_file(
    run_command: Flywheel, day: sa.Engine, environment: Environment, tmp_path: Path
) -> None:
    with environment(day, tmp_path / "home"):
        for arguments, code, words in (
            (("RB-AUTO-NOBODY", "--out", tmp_path / "x.html"), 1, "There is no rule or pattern RB-AUTO-NOBODY."),
            (("lockout_policy~RB-WIN-SEC-003~windows", "--out", tmp_path / "x.html"), 1, "is a pattern, not a rule"),
            (("--out", tmp_path / "nowhere" / "x.html"), 2, "does not exist"),
            (("--out", tmp_path), 2, "is a directory"),
            (("--out", tmp_path / "x.html", "--from", "2026-02-15", "--to", "2026-02-01"), 2, "before it begins"),
        ):
            answer = run_command("report", *arguments)
            assert answer.code == code
            assert words in " ".join(answer.err.split())
        assert [path.name for path in tmp_path.iterdir() if path.suffix == ".html"] == []
        answer = run_command("report", "--out", tmp_path / "x.html", "--json")
        assert answer.json["bytes"] == (tmp_path / "x.html").stat().st_size


def test_nothing_can_be_written_while_a_report_is_read(day: sa.Engine) -> None:
    with snapshot(day) as connection, pytest.raises(sa.exc.InternalError, match="read-only transaction"):
        connection.exec_driver_sql("UPDATE sites SET name = name")


# -- the auditor's export ------------------------------------------------------------------------------------------


def test_two_exports_of_the_same_rows_are_the_same_bytes(day: sa.Engine, audited: Path, tmp_path: Path) -> None:
    export(day, tmp_path / "again", Period())
    names = sorted(path.name for path in audited.iterdir())
    assert names == sorted([MANIFEST, *(file.name for file in FILES)])
    for name in names:
        assert (audited / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_the_export_is_what_the_database_holds(day: sa.Engine, audited: Path) -> None:
    found = verify(audited)
    assert found.problems == ()
    assert found.certificates == 3
    ledger = pq.read_table(audited / "ledger.parquet").to_pylist()
    decisions = pq.read_table(audited / "decisions.parquet").to_pylist()
    certificates = pq.read_table(audited / "certificates.parquet").to_pylist()
    with day.connect() as connection:

        def rows(query: str) -> list[dict[str, Any]]:
            return [dict(row) for row in connection.execute(sa.text(query)).mappings()]

        kept = rows("SELECT * FROM rule_events ORDER BY event_id")
        assert [json.loads(row["definition"]) for row in ledger] == [row["definition"] for row in kept]
        for name in (
            "event_id",
            "occurred_at",
            "rule_id",
            "to_state",
            "actor",
            "reason",
            "decision_id",
            "content_hash",
        ):
            assert [row[name] for row in ledger] == [row[name] for row in kept], name
        decided = rows("SELECT * FROM promotion_decisions ORDER BY decision_id")
        assert [(json.loads(r["gates"]), json.loads(r["evidence"]), r["reason"]) for r in decisions] == [
            (r["gates"], r["evidence"], r["reason"]) for r in decided
        ]
        assert [json.loads(row["certificate"]) for row in certificates] == [
            row["certificate"] for row in kept if row["certificate"] is not None
        ]


@pytest.mark.parametrize("name", [file.name for file in FILES])
def test_a_changed_byte_is_found_and_its_file_named(audited: Path, name: str) -> None:
    content = bytearray((audited / name).read_bytes())
    content[len(content) // 2] ^= 1
    (audited / name).write_bytes(content)
    assert verify(audited).problems == (f"{name}: its SHA-256 is not that of the manifest: it was changed",)


def test_what_is_missing_added_cut_or_relabelled_is_named(audited: Path) -> None:
    noted = verify(audited).manifest_sha256
    assert verify(audited, expected=noted).problems == ()
    (audited / "note.txt").write_text("x")
    (audited / "ledger.parquet").unlink()
    cut = audited / "decisions.parquet"
    cut.write_bytes(cut.read_bytes()[:-1])
    document = json.loads((audited / MANIFEST).read_text())
    document["files"]["human_acts.parquet"]["rows"] += 1
    (audited / MANIFEST).write_text(json.dumps(document))
    found = verify(audited, expected=noted).problems
    assert [problem.partition(":")[0] for problem in found] == [
        MANIFEST,
        "note.txt",
        "decisions.parquet",
        "human_acts.parquet",
        "ledger.parquet",
    ]
    assert "it is missing" in found[-1]
    assert "it has 0 rows, not 1" in found[-2]


def test_a_file_and_manifest_changed_alike_are_found_by_the_noted_hash(
    day: sa.Engine, audited: Path, tmp_path: Path
) -> None:
    import datetime as dt

    noted = verify(audited).manifest_sha256
    export(day, tmp_path / "other", Period(until=dt.date(2026, 1, 31)))
    shutil.rmtree(audited)
    shutil.copytree(tmp_path / "other", audited)
    assert verify(audited).problems == ()
    (problem,) = verify(audited, expected=noted).problems
    assert problem.startswith("manifest.json: its SHA-256 is")


@pytest.mark.parametrize(
    "content", [b"{", b"[]", b'{"format": "flywheel-audit/1", "files": {"ledger.parquet": 1}}', b"\xff"]
)
def test_a_manifest_that_cannot_be_read_is_a_difference(audited: Path, content: bytes) -> None:
    (audited / MANIFEST).write_bytes(content)
    assert verify(audited).problems[0].startswith("manifest.json: it cannot be read")


def test_an_export_never_overwrites_what_is_no_export(day: sa.Engine, audited: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not empty"):
        export(day, audited, Period())
    (audited / "ledger.parquet").write_bytes(b"broken")
    export(day, audited, Period(), force=True)
    assert verify(audited).problems == ()
    (audited / "thesis.odt").write_text("mine")
    with pytest.raises(UsageError, match=r"holds thesis\.odt, which is of no export"):
        export(day, audited, Period(), force=True)
    assert (audited / "thesis.odt").read_text() == "mine"
    with pytest.raises(UsageError, match="is a file"):
        export(day, audited / "thesis.odt", Period(), force=True)
    with pytest.raises(UsageError, match="cannot be written"):
        export(day, tmp_path / "a" / "b", Period())


def test_the_export_as_a_user_meets_it(
    run_command: Flywheel, day: sa.Engine, environment: Environment, tmp_path: Path
) -> None:
    target = tmp_path / "audit"
    with environment(day, tmp_path / "home"):
        written = run_command("export", "audit", "--out", target, "--from", "2026-01-01", "--json")
        assert written.code == 0
        assert run_command("export", "audit", "--out", target).code == 2
    # Verification needs no database: the environment names none that answers.
    checked = run_command("export", "verify", target, "--sha256", written.json["manifest_sha256"], "--json")
    assert (checked.code, checked.json["whole"]) == (0, True)
    content = bytearray((target / "ledger.parquet").read_bytes())
    content[100] ^= 1
    (target / "ledger.parquet").write_bytes(content)
    answer = run_command("export", "verify", target)
    assert answer.code == 1
    assert "ledger.parquet: its SHA-256 is not that of the manifest" in answer.out
    assert run_command("export", "verify", tmp_path / "home").code == 2


# -- in the browser ------------------------------------------------------------------------------------------------

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CHROMEDRIVER = shutil.which("chromedriver")


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Chrome]:
    """Headless Chromium that logs every request; its profile is thrown away."""
    if CHROMIUM is None or CHROMEDRIVER is None:
        pytest.skip("no chromium with chromedriver on this machine; .ci/run installs them")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--disable-dev-shm-usage",
        "--window-size=1200,1600",
        f"--user-data-dir={tmp_path / 'profile'}",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(executable_path=CHROMEDRIVER, env={**os.environ, "HOME": str(tmp_path)})
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    driver.quit()


@pytest.mark.browser
def test_hostile_reports_run_nothing_ask_nothing_and_log_nothing_in_the_browser(
    hostile_pages: Path, browser: Chrome
) -> None:
    from selenium.webdriver.common.by import By

    for name, charts in (("report.html", 4), ("rule.html", 3)):
        browser.get((hostile_pages / name).as_uri())
        assert "window.pwned=1" in browser.find_element(By.TAG_NAME, "body").text
        assert browser.execute_script("return typeof window.pwned") == "undefined"
        drawn = browser.execute_script("return [...document.images].map(i => [i.complete, i.naturalWidth])")
        assert len(drawn) >= charts
        assert all(complete and width > 300 for complete, width in drawn)
        # Nothing stands beyond the page's width.
        assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
        assert browser.get_log("browser") == []
        messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
        asked = [
            message["params"]["request"]["url"]
            for message in messages
            # The browser's own first tab is no page of ours.
            if message["method"] == "Network.requestWillBeSent" and message["params"]["documentURL"].endswith(name)
        ]
        assert any(url.endswith(name) for url in asked)
        assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
