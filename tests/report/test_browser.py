"""The page in a real browser."""

import shutil

import pytest

from factpatch.report.page import as_html
from tests.report.conftest import fill


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver")
    driver, chromium = shutil.which("chromedriver"), shutil.which("chromium")
    if not (driver and chromium):
        pytest.skip("chromium and chromedriver are not installed (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.binary_location = chromium
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield opened
    opened.quit()


@pytest.fixture
def page(store, browser, tmp_path):
    fill(store, "grace", [0.5 + i / 1000 for i in range(150)], portability={"Reasoning": 0.1})
    path = tmp_path / "report.html"
    path.write_text(as_html(store), encoding="utf-8")
    browser.set_window_size(1280, 900)
    browser.get(path.as_uri())
    return browser


def column(page, table, number):
    script = """return [...document.querySelectorAll(arguments[0] + " tbody tr")].filter((row) => !row.hidden)
        .map((row) => row.cells[arguments[1]].innerText.split("\\n")[0])"""
    return page.execute_script(script, table, number)


def press(page, table, number):
    page.execute_script("document.querySelectorAll(arguments[0] + ' th button')[arguments[1]].click()", table, number)


def test_nothing_is_wrong_with_it(page):
    assert page.get_log("browser") == []
    assert page.execute_script("return performance.getEntriesByType('resource').length") == 0
    plots = page.execute_script(
        "return [...document.querySelectorAll('figure svg')].map((s) => s.getBoundingClientRect().height)"
    )
    assert len(plots) == 3
    assert min(plots) > 50


def test_tables_sort_by_number_and_by_name(page):
    first = "#tables table"
    assert column(page, "#tables .wide:nth-of-type(1) table", 0)[:2] == ["unedited", "rome"]
    press(page, first, 2)
    values = column(page, "#tables > .wide table", 2)[:4]
    assert values == sorted(values)
    press(page, first, 2)
    assert column(page, "#tables > .wide table", 2)[:4] == values[::-1]
    assert page.execute_script("return document.querySelector('#tables th[aria-sort]').ariaSort") == "descending"
    press(page, first, 4)
    assert column(page, "#tables > .wide table", 4)[3] == "–", "what has no number comes last"
    press(page, first, 4)
    assert column(page, "#tables > .wide table", 4)[3] == "–"


def test_the_list_of_edits_is_filtered_searched_and_shown_in_parts(page):
    def count():
        return page.execute_script("return document.getElementById('count').innerText")

    assert count() == "100 of 158", "under the open protocol"
    assert column(page, "#edits", 2)[:3] == ["–", "0.000", "0.000"], "failures first"
    page.execute_script("document.getElementById('more').click()")
    assert count() == "158 of 158"

    def choose(name, value):
        script = "const f = document.getElementsByName(arguments[0])[0]; f.value = arguments[1]; f.dispatchEvent(new Event('input'))"
        page.execute_script(script, name, value)

    choose("method", "rome")
    assert count() == "4 of 4"
    choose("text", "zsre-1")
    assert count() == "1 of 1"
    choose("method", "")
    choose("protocol", "survey")
    choose("text", "ZSRE-149")
    assert column(page, "#edits", 0) == ["grace"]


@pytest.mark.parametrize("width", [360, 1280])
def test_it_fits_the_screen(page, width):
    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500},
    )
    try:
        assert page.execute_script("return document.documentElement.scrollWidth") <= width
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.parametrize(("scheme", "is_dark"), [("light", False), ("dark", True)])
def test_light_and_dark(page, scheme, is_dark):
    page.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )

    def brightness(property_, selector):
        script = (
            "return getComputedStyle(document.querySelector(arguments[1]))[arguments[0]].match(/[0-9]+/g).slice(0, 3)"
        )
        return sum(map(int, page.execute_script(script, property_, selector)))

    assert (brightness("backgroundColor", "body") < 150) == is_dark
    assert (brightness("color", "figure svg") > 500) == is_dark
