"""The report page in a headless Chromium: it loads in silence, steps, turns dark, and fits a phone.

Screenshots are kept in artefacts/page/.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import screenshot

from specdec.page import write_page
from tests import page_samples as samples
from tests.page_samples import HOSTILE

ROOT = Path(__file__).parent.parent
pytest.importorskip("selenium", reason="selenium is not installed")
if screenshot.missing():
    pytest.skip(screenshot.missing(), allow_module_level=True)

ARTEFACTS = ROOT / "artefacts" / "page"


@pytest.fixture(scope="module")
def driver():
    with screenshot.browser() as driver:
        yield driver


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    ARTEFACTS.mkdir(parents=True, exist_ok=True)
    write_page(folder / "both.html", samples.report(), samples.trace(folder / "trace.jsonl", rows=2))
    write_page(folder / "trace.html", None, samples.trace(folder / "trace.jsonl"))
    write_page(folder / "long.html", None, samples.trace(folder / "long.jsonl", tokens=10_000, nodes=16))
    return folder


@pytest.fixture
def viewer(driver, pages):
    """The page of a trace alone, just loaded."""
    screenshot.show(driver, pages / "trace.html", 1280, 1000)
    return driver


def by_id(driver, name):
    return driver.find_element("css selector", f"#{name}")


def step(driver):
    """The step that the page says it shows, after checking that the slider says so too."""
    said = by_id(driver, "says").text
    number = int(said.split()[1])
    assert by_id(driver, "slider").get_property("value") == str(number)
    return number


def last(driver):
    return int(by_id(driver, "slider").get_property("max"))


def press(driver, key):
    driver.switch_to.active_element.send_keys(key)


def keep(driver, name):
    (ARTEFACTS / f"{name}.png").write_bytes(screenshot.picture(driver))


def test_loads_without_errors_or_requests(driver, pages):
    for log in ("browser", "performance"):
        driver.get_log(log)
    screenshot.show(driver, pages / "both.html", 1280, 1600)
    keep(driver, "desk")
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith("data:")] == [(pages / "both.html").as_uri()]
    assert driver.get_log("browser") == []
    assert driver.title == "specdec: sample"


def test_an_error_would_be_noticed(driver, pages):
    """The control of the test above: a page that asks for something and fails is told."""
    page = pages / "wrong.html"
    page.write_text('<script>fail()</script><img src="none.png">')
    driver.get(page.as_uri())
    assert len(driver.get_log("browser")) == 2
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert (pages / "none.png").as_uri() in asked


def test_buttons_and_keys_step(viewer):
    from selenium.webdriver.common.keys import Keys

    assert step(viewer) == 1 or last(viewer) > 1
    by_id(viewer, "first").click()
    assert step(viewer) == 0
    assert not by_id(viewer, "back").is_enabled()
    by_id(viewer, "next").click()
    assert step(viewer) == 1
    for key, expected in ((Keys.ARROW_RIGHT, 2), (Keys.ARROW_RIGHT, 3), (Keys.ARROW_LEFT, 2), (Keys.END, last(viewer))):
        press(viewer, key)
        assert step(viewer) == expected
    press(viewer, Keys.HOME)
    assert step(viewer) == 0
    press(viewer, "?")
    assert by_id(viewer, "keys").is_displayed()
    press(viewer, Keys.ESCAPE)
    assert not by_id(viewer, "keys").is_displayed()


def test_a_token_and_the_slider_jump(viewer):
    from selenium.webdriver.common.keys import Keys

    token = viewer.find_elements("css selector", "#text [data-step]")[12]
    token.click()
    assert step(viewer) == int(token.get_attribute("data-step"))
    assert "now" in token.get_attribute("class").split()
    before = step(viewer)
    by_id(viewer, "slider").send_keys(Keys.ARROW_RIGHT)
    assert step(viewer) == before + 1
    assert "now" not in token.get_attribute("class").split()


def test_the_tree_shows_what_the_trace_says(viewer, pages):
    """Every step: its nodes with the accepted ones marked, the target's own token, and the text that it brought."""
    from specdec.trace import read_trace

    steps = read_trace(pages / "trace.jsonl").generations[0].of_row(0)
    samples_of = {(len(s.path) - 1, len(s.tokens) - 1): i for i, s in enumerate(steps)}
    assert {0, 3} <= {accepted for accepted, _ in samples_of}
    for number in samples_of.values():
        screenshot.go(viewer, number)
        expected = steps[number]
        assert len(viewer.find_elements("css selector", "#tree g")) == len(expected.tokens) + 1
        assert len(viewer.find_elements("css selector", "#tree g.on")) == len(expected.path)
        assert len(viewer.find_elements("css selector", "#tree g.own")) == 1
        assert len(viewer.find_elements("css selector", "#text .now")) == len(expected.committed)
        assert len(viewer.find_elements("css selector", "#node li")) == 2
        assert "✓" in viewer.find_element("css selector", "#node li.chosen").text


def test_nodes_are_reached_by_keys(viewer):
    from selenium.webdriver.common.keys import Keys

    while len(viewer.find_elements("css selector", "#tree g:not(.on)")) < 4:
        by_id(viewer, "next").click()
    own = viewer.find_element("css selector", "#tree g[tabindex='0']")
    viewer.execute_script("arguments[0].focus()", own)
    assert "the target's own" in by_id(viewer, "node").text
    press(viewer, Keys.ARROW_DOWN)
    said = by_id(viewer, "node").text
    assert "rejected, guessed by" in said
    assert "What the target wanted after" in said
    keep(viewer, "tree")


def test_generations_are_chosen(driver, pages):
    screenshot.show(driver, pages / "both.html", 1280, 1000)
    options = driver.find_elements("css selector", "#generation option")
    assert [option.text.endswith(f", row {row}") for row, option in enumerate(options)] == [True, True]
    before = by_id(driver, "text").text
    options[1].click()
    screenshot.wait(driver, "return document.getElementById('viewer').dataset.ready === '1'")
    assert by_id(driver, "text").text != before


def test_hostile_text_is_shown_and_does_nothing(viewer):
    assert HOSTILE in viewer.execute_script("return document.getElementById('text').textContent")
    assert viewer.find_elements("css selector", "img") == []
    assert viewer.title == "specdec: sample"


def test_the_table_sorts_and_filters(driver, pages):
    screenshot.show(driver, pages / "both.html", 1280, 1000)

    def column(number):
        rows = driver.find_elements("css selector", "#results tbody tr:not([hidden])")
        return [row.find_elements("css selector", "td, th")[number].text for row in rows]

    assert set(column(0)) == {"all"}
    assert len(column(0)) == 8
    head = driver.find_elements("css selector", "#results thead button")[2]
    driver.execute_script("arguments[0].click()", head)
    assert [float(x) for x in column(2)[:-1]] == sorted((float(x) for x in column(2)[:-1]), reverse=True)
    assert column(2)[-1] == "–"
    driver.find_element("css selector", "#by-baseline option:nth-child(2)").click()
    assert column(1) == ["auto+kernels"]


def test_dark_by_system_and_by_toggle(driver, pages):
    colour = "return getComputedStyle(document.body).backgroundColor"
    screenshot.show(driver, pages / "both.html", 1280, 1600, dark=True)
    dark = driver.execute_script(colour)
    keep(driver, "dark")
    by_id(driver, "theme").click()
    light = driver.execute_script(colour)
    screenshot.show(driver, pages / "both.html", 1280, 1600)
    assert driver.execute_script(colour) == light != dark
    by_id(driver, "theme").click()
    assert driver.execute_script(colour) == dark


@pytest.mark.parametrize("name", ["both", "long"])
def test_a_phone_needs_no_sideways_scrolling(driver, pages, name):
    screenshot.show(driver, pages / f"{name}.html", 390, 844, at="trace")
    keep(driver, f"phone-{name}")
    assert driver.execute_script("return document.documentElement.scrollWidth") == 390


def test_ten_thousand_tokens_load_and_step(driver, pages):
    from selenium.webdriver.common.keys import Keys

    screenshot.show(driver, pages / "long.html", 1280, 1000)
    tokens = "#text [data-step]"
    assert len(driver.find_elements("css selector", "#text > div")) > 20  # the browser lays out those in sight
    assert driver.execute_script(f"return document.querySelectorAll('{tokens}').length") >= 10_000
    by_id(driver, "next").click()
    press(driver, Keys.END)
    assert step(driver) == last(driver) > 3000
    seen = "const [t, p] = ['.now', '#text'].map((s) => document.querySelector(s).getBoundingClientRect());"
    screenshot.wait(driver, seen + "return p.top <= t.top && t.bottom <= p.bottom")
    keep(driver, "long")
    assert driver.get_log("browser") == []
