"""Data Docs: what they show, and that they need no network."""

from __future__ import annotations

import re
import shutil
import threading
from datetime import UTC, datetime
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import sqlalchemy as sa

from flywheel_pipeline.build import build_defs
from flywheel_pipeline.contracts.data_docs import Judged, write_data_docs
from flywheel_pipeline.contracts.declared import Expectation, ExpectationResult
from flywheel_pipeline.contracts.defs import DATA_DOCS_JOB
from flywheel_pipeline.contracts.registry import CONTRACTS
from flywheel_pipeline.database.resource import FlywheelDatabase
from flywheel_pipeline.promotion.suite import RULES

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
AT = datetime(2026, 2, 15, 12, tzinfo=UTC)
HOSTILE = '<script src="http://evil.invalid/x.js"></script><img src=http://evil.invalid/y>'


class Links(HTMLParser):
    """Every attribute by which a page makes a browser load something, and the tags that run code."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            if name in ("src", "srcset", "href", "data", "poster", "action", "background") and value:
                self.loads.append(value)


def read(page: Path) -> Links:
    links = Links()
    links.feed(page.read_text("utf-8"))
    return links


def assert_offline(folder: Path) -> None:
    for page in folder.iterdir():
        links = read(page)
        assert not {"script", "iframe", "object", "embed", "base", "img"} & links.tags, page
        for target in links.loads:
            assert target == "data:," or re.fullmatch(r"[a-z0-9_]+\.html", target), (page, target)
            if target != "data:,":
                assert (folder / target).is_file()
        text = page.read_text("utf-8")
        assert "@import" not in text
        assert "url(" not in text


def hostile() -> Judged:
    expectation = Expectation("expect_column_values_to_be_null", {"column": HOSTILE}, HOSTILE)
    results = [
        ExpectationResult(expectation.name, False, "critical", HOSTILE, 1, (HOSTILE,), why=HOSTILE),
        ExpectationResult(expectation.name, False, "critical", "", error=HOSTILE, why=HOSTILE),
    ]
    return Judged(RULES, [expectation, expectation], results, 2)


def test_the_job_writes_a_page_for_each_contract_and_links_it_from_the_asset(
    engine: sa.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLYWHEEL_HOME", str(tmp_path))
    database = FlywheelDatabase(url=engine.url.render_as_string(hide_password=False))
    job = build_defs(resources={"database": database}).resolve_job_def(DATA_DOCS_JOB)
    with dg.DagsterInstance.ephemeral() as instance:
        result = job.execute_in_process(
            instance=instance, run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}
        )
        assert result.success
        folder = tmp_path / "data_docs"
        for contract in CONTRACTS:
            page = folder / f"{contract.asset}.html"
            (record,) = instance.fetch_observations(dg.AssetKey(contract.asset), limit=1).records
            observed: Any = record.asset_observation
            assert observed.metadata["data_docs"].value == str(page)
            assert observed.metadata["expectations"].value == len(contract.expectations(AT))
            text = page.read_text("utf-8")
            for expectation in contract.expectations(AT):
                assert expectation.why.replace("'", "&#x27;") in text
    assert {page.name for page in folder.iterdir()} == {"index.html", *(f"{c.asset}.html" for c in CONTRACTS)}
    index = (folder / "index.html").read_text("utf-8")
    # An empty log proves nothing; the catalogue and the built-in rules stand in every database.
    assert index.count("broken</span>") == 2
    assert index.count("hold</span>") == 2
    assert_offline(folder)


def test_no_value_of_the_data_makes_a_page_load_or_run_anything(tmp_path: Path) -> None:
    index = write_data_docs([hostile()], tmp_path, at=AT)
    assert index == tmp_path / "index.html"
    assert_offline(tmp_path)
    text = (tmp_path / "l1_rules.html").read_text("utf-8")
    assert text.count("&lt;script") >= 5
    assert "2 of 2 broken" in text
    assert 'class="result error"' in text
    assert "default-src 'none'" in text


def test_a_second_build_replaces_the_pages_and_leaves_nothing_else(tmp_path: Path) -> None:
    write_data_docs([hostile()], tmp_path, at=AT)
    good = ExpectationResult("a values to be null", True, "critical", "0 of 2 rows break it", 0)
    expectation = Expectation("expect_column_values_to_be_null", {"column": "a"}, "It must be null.")
    write_data_docs([Judged(RULES, [expectation], [good], 2)], tmp_path, at=AT)
    assert sorted(page.name for page in tmp_path.iterdir()) == ["index.html", "l1_rules.html"]
    assert "all 1 hold" in (tmp_path / "l1_rules.html").read_text("utf-8")


@pytest.mark.browser
def test_a_browser_asks_for_the_pages_and_for_nothing_else(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no chromium with chromedriver on this machine; .ci/run installs them")
    from selenium import webdriver

    write_data_docs([hostile()], tmp_path, at=AT)
    asked: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_arguments: Any) -> None:
            asked.append(self.path)

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver))
    try:
        browser.get(f"http://127.0.0.1:{server.server_port}/index.html")
        browser.find_element("link text", "Rule registry").click()
        assert "2 of 2 broken" in browser.find_element("tag name", "body").text
        requested = re.findall(r'"Network\.requestWillBeSent".*?"url":"([^"]+)"', str(browser.get_log("performance")))
        assert browser.get_log("browser") == []
    finally:
        browser.quit()
        server.shutdown()
    assert set(asked) == {"/index.html", "/l1_rules.html"}
    assert not [url for url in requested if "evil" in url]
