"""What a data engineer sees: the UI in headless Chromium, on the played day."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg
import pytest
from graph_runs import Environment, PlayedDay

from flywheel_pipeline.database.settings import Settings
from flywheel_pipeline.run import dagster_instance
from flywheel_pipeline.serve import Services, start
from flywheel_pipeline.sql_models.metadata import markdown_table, unlinked

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

pytestmark = [pytest.mark.browser, pytest.mark.daemon, pytest.mark.timeout(180)]

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CHROMEDRIVER = shutil.which("chromedriver")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--window-size=1600,1200",
)
ROOMS = ("telemetry", "archive", "aggregates", "candidates", "promotion", "delivery", "health")
LOCATION = "flywheel"
WAIT_SECONDS = 45


@pytest.fixture(scope="module")
def ui(played: PlayedDay, environment: Environment, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    """The webserver on the played day; no daemon, so nothing moves while somebody looks."""
    home = tmp_path_factory.mktemp("ui")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    with environment(played.engine, home):
        services = start(Settings(home=home), played.engine.url, host="127.0.0.1", port=port, daemon=False)
        try:
            yield services
        finally:
            services.stop()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    """Headless Chromium of the distribution; its profile is thrown away."""
    if CHROMIUM is None or CHROMEDRIVER is None:
        pytest.skip(
            "no chromium with chromedriver on this machine; .ci/run installs them (apt: chromium chromium-driver)"
        )
    from selenium import webdriver

    profile = tmp_path_factory.mktemp("profile")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(executable_path=CHROMEDRIVER, env={**os.environ, "HOME": str(profile)})
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    driver.quit()
    shutil.rmtree(profile, ignore_errors=True)


def wait_for_text(browser: Chrome, *texts: str) -> str:
    """Wait until the page shows all of these, and return its whole text."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.wait import WebDriverWait

    def shown(driver: Chrome) -> str | None:
        text = driver.find_element(By.TAG_NAME, "body").text
        return text if all(wanted in text for wanted in texts) else None

    from selenium.common.exceptions import StaleElementReferenceException, TimeoutException

    try:
        found = WebDriverWait(browser, WAIT_SECONDS, ignored_exceptions=[StaleElementReferenceException]).until(shown)
    except TimeoutException:
        text = browser.find_element(By.TAG_NAME, "body").text
        pytest.fail(f"{browser.current_url} does not show {[t for t in texts if t not in text]} but:\n{text[:3000]}")
    return str(found)


def graphql(browser: Chrome, query: str) -> dict[str, Any]:
    """What the webserver tells this page, asked from within it."""
    answer = browser.execute_async_script(
        "const [query, done] = arguments;"
        "fetch('/graphql', {method: 'POST', headers: {'Content-Type': 'application/json'},"
        " body: JSON.stringify({query})}).then(r => r.json()).then(done, e => done({errors: String(e)}))",
        query,
    )
    assert "errors" not in answer, answer
    return dict(answer["data"])


def errors_of(browser: Chrome) -> list[str]:
    """What the pages since the last look logged as an error."""
    return [
        entry["message"]
        for entry in browser.get_log("browser")
        if entry["level"] == "SEVERE" and "favicon" not in entry["message"]
    ]


def test_the_asset_graph_shows_every_room_each_asset_described_and_logs_no_error(ui: Services, browser: Chrome) -> None:
    browser.get(f"{ui.url}/asset-groups")
    text = wait_for_text(browser, *ROOMS)
    assert "default" not in text.split()
    told = graphql(
        browser, "{ assetNodes { assetKey { path } groupName description staleStatus owners { __typename } } }"
    )
    nodes = told["assetNodes"]
    assert len(nodes) >= 38
    assert {node["groupName"] for node in nodes} == set(ROOMS)
    assert [node["assetKey"] for node in nodes if len(node["description"] or "") < 40 or not node["owners"]] == []
    # Two runs made everything that a run of the minute makes; none of it is behind what it was made of, the log included.
    assert {node["assetKey"]["path"][0] for node in nodes if node["staleStatus"] != "FRESH"} <= {
        "policy_backtest",
        "day_backfill",
        "telemetry_archive",
    }
    assert errors_of(browser) == []


def test_the_badge_of_an_asset_says_how_fresh_it_is_and_when_it_will_not_be(ui: Services, browser: Chrome) -> None:
    browser.get(f"{ui.url}/assets/l1_rules")
    wait_for_text(
        browser,
        "Freshness policy",
        "Fails if more than 26 hours since last materialization",
        "Warns if more than 6 hours since last materialization",
        "flywheel/tempo: minute",
    )


def test_the_plot_of_a_materialization_is_drawn_and_its_numbers_are_plotted(ui: Services, browser: Chrome) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.wait import WebDriverWait

    for asset, name, words in (
        ("rule_cusum", "worst_rule", "success rate and CUSUM of RB-AUTO-BITLOCKE, alarmed"),
        ("l1_rules", "promotion_funnel", "patterns seen 56, patterns promoted 46"),
    ):
        browser.get(f"{ui.url}/assets/{asset}?view=events")
        wait_for_text(browser, name, "[Show Markdown]")
        row = browser.find_element(By.XPATH, f"//tr[td[normalize-space()='{name}']]")
        row.find_element(By.XPATH, ".//*[text()='[Show Markdown]']").click()
        drawn = WebDriverWait(browser, WAIT_SECONDS).until(
            lambda driver, words=words: driver.execute_script(
                "return [...document.images].filter(i => i.alt.includes(arguments[0]) && i.complete && i.naturalWidth)"
                ".map(i => [i.naturalWidth, i.src.slice(0, 22), i.src.length])[0]",
                words,
            )
        )
        assert drawn[0] > 300
        assert drawn[1] == "data:image/png;base64,"
        assert drawn[2] <= 30_000
    assert errors_of(browser) == []


def test_the_check_of_failing_rules_names_bitlocker_with_its_matches_rate_and_errors(
    ui: Services, browser: Chrome
) -> None:
    from selenium.webdriver.common.by import By

    browser.get(f"{ui.url}/assets/rule_quarantines?view=checks&checkDetail=no_failing_rules")
    wait_for_text(
        browser,
        "no_failing_rules",
        "non-blocking",
        "RB-AUTO-BITLOCKE",
        "succeeded in 917 of 3,057 executions (30.0 %)",
        "[Show Markdown]",
    )
    browser.find_element(By.XPATH, "//*[text()='[Show Markdown]']").click()
    text = wait_for_text(browser, "top errors")
    assert "3057" in text
    assert "540 x A compatible Trusted Platform Module" in text
    assert "L1-LIN-CRYPTO-001" in text


def test_an_asset_page_shows_what_it_is_whose_and_how_it_is_made(ui: Services, browser: Chrome) -> None:
    browser.get(f"{ui.url}/assets/rule_daily_stats")
    wait_for_text(
        browser,
        "What each L1 rule did at one site on one day",
        "Grain: one row per site, UTC day and L1 rule.",
        "data-platform",
        "public.rule_daily_stats",
        "rule_daily_stats.sql",
        "the L1 rule, aliases resolved",
        "rows_inserted",
        "preview",
    )


def test_the_launchpad_of_a_human_act_asks_for_actor_and_reason(ui: Services, browser: Chrome) -> None:
    browser.get(f"{ui.url}/locations/{LOCATION}/jobs/human_quarantine/playground")
    wait_for_text(browser, "quarantine_act", "actor", "reason")


def test_an_address_that_an_appliance_reports_is_text_in_the_ui(
    ui: Services, browser: Chrome, played: PlayedDay, environment: Environment, tmp_path: Path
) -> None:
    hostile = ["https://evil.example/pay", "www.evil.example", "dana@evil.example", "see <b>http://evil.example</b>"]
    with environment(played.engine, tmp_path / "home"), dagster_instance(played.engine.url) as instance:
        instance.report_runless_asset_event(
            dg.AssetMaterialization(
                "reported_addresses",  # of no asset of the graph: the played day stays as it is
                description=unlinked(f"Reported: {', '.join(hostile)}"),
                metadata={
                    "errors": dg.MetadataValue.md(
                        markdown_table([{"error": text} for text in hostile]) + "\n\nhttps://control.example/"
                    )
                },
            )
        )
    browser.get(f"{ui.url}/assets/reported_addresses?view=events")
    shown = wait_for_text(browser, "Reported: ", "https://control.example/")
    links = browser.execute_script("return [...document.querySelectorAll('a')].map(a => a.href)")
    assert "https://control.example/" in links  # the page does make links of addresses
    assert [link for link in links if "evil" in link] == []
    assert [text for text in hostile if text not in shown] == []


def test_no_page_logs_an_error_in_the_browser(ui: Services, browser: Chrome) -> None:
    for page in ("/asset-groups", "/assets/l1_rules", "/runs"):
        browser.get(f"{ui.url}{page}")
        wait_for_text(browser, "Overview")
        assert errors_of(browser) == []
