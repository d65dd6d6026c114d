"""Pictures of the README, taken from the real UI: `make up` in one terminal, then `python docs/pictures.py`.

Needs Chromium and chromedriver (`.ci/run` installs them). Written are asset-graph.png and failing-rule.png beside this file.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

HERE = Path(__file__).parent
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--hide-scrollbars",
)


def main() -> None:
    """Open both pages, wait until they show what they are about, and save them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--url", default="http://127.0.0.1:3000")
    parser.add_argument("--out", type=Path, default=HERE)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as profile:
        chrome = webdriver.ChromeOptions()
        chrome.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or "chromium"
        for flag in (*FLAGS, f"--user-data-dir={profile}", "--window-size=1700,1000"):
            chrome.add_argument(flag)
        driver = webdriver.Chrome(options=chrome, service=webdriver.ChromeService(shutil.which("chromedriver")))
        try:
            take(driver, f"{options.url}/asset-groups", "promotion", options.out / "asset-graph.png")
            take(
                driver,
                f"{options.url}/assets/rule_quarantines?view=checks&checkDetail=no_failing_rules",
                "RB-AUTO-BITLOCKE",
                options.out / "failing-rule.png",
            )
        finally:
            driver.quit()


def take(driver: webdriver.Chrome, url: str, shows: str, path: Path) -> None:
    """Save the page once it shows this text and has come to rest."""
    driver.get(url)
    WebDriverWait(driver, 60).until(lambda d: shows in d.find_element(By.TAG_NAME, "body").text)
    time.sleep(3)  # the graph is laid out after its names are there
    driver.save_screenshot(str(path))
    print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
