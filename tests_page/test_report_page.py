"""The HTML report in a real browser: it requests nothing, fits a phone, follows dark, and folds nothing out on paper.

Debian's chromium is used, as for the search page; where there is none, everything here is skipped.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect, sync_playwright

from clasp.analysis.record import analyses_json
from clasp.commands.report import write_report
from toyreports import HOSTILE, retrieval_rows, toy_analysis, write_run
from toyresults import multilingual, result

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or ""
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="there is no chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of two runs with everything in it, hostile names included."""
    folder = tmp_path_factory.mktemp("report")
    one = write_run(folder / "one", [*retrieval_rows(), *multilingual(), result("zeroshot", data=HOSTILE)])
    two = write_run(folder / ("long_name_" * 12), retrieval_rows(0.6), batch_size=32, trained=80)
    (one / "analysis.json").write_text(analyses_json([toy_analysis(data=HOSTILE)]))
    write_report([one, two], folder / "report.html")
    return folder / "report.html"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1100])
def test_it_fits_and_requests_nothing(browser: Browser, file: Path, width: int, scheme: str):
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)  # type: ignore[arg-type]
    page, seen, requested = context.new_page(), [], []
    page.on("console", lambda said: seen.append(said.text))
    page.on("dialog", lambda dialog: seen.append(dialog.message))
    page.on("request", lambda asked: requested.append(asked.url))
    page.goto(file.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") == width, "only tables scroll sideways"
    assert requested == [file.as_uri()] and not seen
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 26)"}[scheme]
    for name in ("Training loss", "Mutual k-NN of every", "mean recall, per cent over seconds"):
        assert page.locator(f'svg[aria-label^="{name}"]').count() == 1
    cut = page.locator(".wide", has=page.locator("caption", has_text="Runs")).first
    wide = cut.evaluate("region => region.scrollWidth - region.clientWidth")
    shown = cut.evaluate("region => getComputedStyle(region).backgroundAttachment")
    assert shown == "local, local, scroll, scroll" and (wide > 0 or width > 390), "a table that is cut says so"
    first = page.locator("details").first
    first.locator("summary").click()
    expect(first.locator("table")).to_be_visible()
    context.close()


def test_at_1200_pixels_a_chart_is_beside_a_table_of_610(browser: Browser, file: Path):
    page = browser.new_page(viewport={"width": 1200, "height": 800})
    page.goto(file.as_uri())
    placed = page.evaluate("""[...document.querySelectorAll(".beside:has(> figure)")].map(each => {
        const [table, chart] = [each.querySelector(".wide"), each.querySelector("figure")];
        table.style.width = "610px";
        return chart.getBoundingClientRect().left >= table.getBoundingClientRect().right;
    })""")
    assert placed and all(placed)
    page.close()


def test_on_paper_it_is_light_and_without_navigation(browser: Browser, file: Path):
    context = browser.new_context(color_scheme="dark")
    page = context.new_page()
    page.goto(file.as_uri())
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    expect(page.locator("nav")).to_be_hidden()
    page.set_viewport_size({"width": 688, "height": 1000})  # what @page leaves of A4
    assert page.evaluate("document.documentElement.scrollWidth") == 688, "nothing is cut off"
    assert page.pdf(format="A4").startswith(b"%PDF")
    context.close()
