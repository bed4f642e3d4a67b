"""A picture of a report page: ``python benchmarks/screenshot.py REPORT.html docs/report.png``.

Needs selenium, Chromium and its driver (Debian: chromium, chromium-driver).
"""

from __future__ import annotations

import argparse
import base64
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
DESK = (1280, 1600)


def main() -> None:
    """Write the picture that the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--size", type=int, nargs=2, default=DESK, metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--at", default="", help="id of the section to begin at")
    parser.add_argument("--step", type=int, help="step of the trace to show")
    arguments = parser.parse_args()
    with browser() as driver:
        show(driver, arguments.page, arguments.size[0], arguments.size[1], arguments.dark, arguments.at)
        if arguments.step is not None:
            go(driver, arguments.step)
        arguments.picture.write_bytes(picture(driver))


def missing() -> str:
    """What is not installed that a browser needs; empty where all is there."""
    needed = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return f"not installed: {', '.join(needed)}" if needed else ""


@contextmanager
def browser() -> Iterator[Any]:
    """A Chromium without a window, with a profile of its own, that keeps a log of its requests."""
    from selenium import webdriver

    with tempfile.TemporaryDirectory() as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = str(shutil.which("chromium"))
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
        try:
            yield driver
        finally:
            driver.quit()


def show(driver: Any, page: Path, width: int, height: int, dark: bool = False, at: str = "") -> None:
    """Load a page in a window of that size and wait until its trace, if any, is drawn."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    driver.get("about:blank")  # else a change of the part after # alone would not load the page anew
    driver.get(page.resolve().as_uri() + (f"#{at}" if at else ""))
    wait(driver, "const v = document.getElementById('viewer'); return !v || v.dataset.ready !== undefined")
    if at:  # the browser has gone there before all was drawn
        driver.execute_script("document.getElementById(arguments[0]).scrollIntoView({behavior: 'instant'})", at)


def go(driver: Any, step: int) -> None:
    """Move the viewer's slider."""
    move = "const s = document.getElementById('slider'); s.value = arguments[0]; s.dispatchEvent(new Event('input'))"
    driver.execute_script(move, step)


def wait(driver: Any, script: str) -> None:
    """Until a script returns true; half a minute at most."""
    from selenium.webdriver.support.wait import WebDriverWait

    WebDriverWait(driver, 30, poll_frequency=0.05).until(lambda driver: driver.execute_script(script))


def picture(driver: Any) -> bytes:
    """What the window shows, as PNG."""
    return base64.b64decode(driver.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})["data"])


if __name__ == "__main__":
    main()
