"""The search page in a real browser, over the toy server: each thing it can do, on a wide screen and on a phone.

Debian's chromium is used, as ``/usr/bin/chromium``; where there is none, everything here is skipped.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright

from clasp.serve.editor import IndexEditor
from clasp.serve.upload_folder import UploadFolder
from toydata import COLOURS
from toysearch import png
from toyserver import HOSTILE_CAPTION, serving, toy_app, toy_service

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or ""
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="there is no chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    service = toy_service(tmp_path_factory.mktemp("page"))
    with serving(toy_app(service)) as url:
        yield url
    service.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    """A wide window; no error in a script, and no request to another place, goes unseen."""
    context = browser.new_context(viewport={"width": 1280, "height": 800}, base_url=address)
    opened = context.new_page()
    opened.set_default_timeout(10_000)
    errors: list[str] = []
    elsewhere: list[str] = []
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.on("console", lambda said: errors.append(said.text) if "Content Security Policy" in said.text else None)
    opened.on(
        "request", lambda asked: elsewhere.append(asked.url) if not asked.url.startswith((address, "blob:")) else None
    )
    yield opened
    context.close()
    assert not errors and not elsewhere


def search(page: Page, words: str) -> None:
    page.locator("#words").fill(words)
    page.keyboard.press("Enter")
    expect(page.locator("figure").first).to_be_visible()
    expect(page.locator("#progress")).to_be_hidden()


def colours(page: Page, count: int = 4) -> list[str]:
    expect(page.locator("figure").nth(count - 1)).to_be_visible()
    titles = [page.locator("figure .title").nth(place).inner_text() for place in range(count)]
    return [title.split()[1] for title in titles]


def test_browse_all_without_a_query(page: Page):
    page.goto("/")
    expect(page.locator("#status")).to_have_text("53 pictures")
    expect(page.locator("#run")).to_have_text("toys")
    for _ in range(8):
        page.mouse.wheel(0, 4000)
        if page.locator("figure").count() == 53:
            break
        page.wait_for_timeout(150)
    expect(page.locator("figure")).to_have_count(53)
    expect(page.locator("figure .score")).to_have_count(0)
    assert page.locator(".tile img.shown").count() > 10, "thumbnails are drawn"
    expect(page.locator("figure .title", has_text=HOSTILE_CAPTION)).to_have_count(1)
    assert page.title() == "clasp" and page.locator("figure img").count() == 53, "captions are text"


def test_the_chip_of_a_quoted_phrase_is_what_is_subtracted(page: Page):
    page.goto("/?q=" + quote('purple -"blue", red'))
    page.get_by_role("button", name="Remove: without blue", exact=True).click()
    expect(page.locator("#words")).to_have_value("purple, red")


def test_words_minus_terms_copies_and_the_line(page: Page):
    page.goto("/")
    search(page, "yellow")
    expect(page).to_have_url(re.compile(r"\?q=yellow$"))
    assert set(colours(page)) == {"yellow"}
    expect(page.locator(".copies").first).to_have_text("+3")
    search(page, "purple")
    expect(page.locator(".below")).to_have_text(re.compile(r"^nothing is close: .* \(p = 0\.\d+\)$"))
    expect(page.locator("figure.far")).to_have_count(page.locator("figure").count())
    assert "blue" in colours(page)
    search(page, "purple -blue")
    assert "blue" not in colours(page)
    page.get_by_role("button", name="Remove: without blue").click()
    expect(page.locator("#words")).to_have_value("purple")
    assert "blue" in colours(page)
    page.go_back()
    expect(page.locator("#words")).to_have_value("purple -blue")
    page.reload()
    assert "blue" not in colours(page)
    search(page, 'red^2 blue^-1 "x^y"')
    expect(page.locator(".chip")).to_have_text(["red × 2", "without blue × 1"])
    page.get_by_role("button", name="Remove: without blue").click()
    expect(page.locator("#words")).to_have_value('red^2 "x^y"')
    page.locator("#words").fill("dog^x")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("the weight in 'dog^x' is not a number; type dog^2")
    expect(page.locator(".chip")).to_have_count(0)
    search(page, "red")
    expect(page.locator(".below")).to_have_text("Below this line nothing is close")
    assert page.locator(".below").evaluate("line => line.previousElementSibling.className") == ""


def test_images_by_upload_paste_and_drop(page: Page, tmp_path: Path):
    page.goto("/")
    file = tmp_path / "green.png"
    file.write_bytes(png(COLOURS["green"]))
    page.locator("#file").set_input_files(file)
    assert set(colours(page)) == {"green"}
    expect(page.get_by_role("img", name="the image you search by")).to_be_visible()
    page.get_by_role("button", name="Remove the image").click()
    expect(page.locator("#status")).to_have_text("53 pictures")
    for kind in ("paste", "drop"):
        page.evaluate(
            """([kind, bytes]) => {
                const held = new DataTransfer()
                held.items.add(new File([new Uint8Array(bytes)], "a.png", { type: "image/png" }))
                const made = kind === "paste" ? new ClipboardEvent(kind, { clipboardData: held, bubbles: true })
                    : new DragEvent(kind, { dataTransfer: held, bubbles: true, cancelable: true })
                document.body.dispatchEvent(made)
            }""",
            [kind, list(png(COLOURS["black"]))],
        )
        expect(page.locator("figure .title").first).to_contain_text("black")
        page.get_by_role("button", name="Remove the image").click()
        expect(page.locator("#status")).to_have_text("53 pictures")
    page.locator("#file").set_input_files(file)
    expect(page.locator("figure .title").first).to_contain_text("green")
    search(page, "green -yellow")  # words and image together
    expect(page.get_by_role("img", name="the image you search by")).to_be_visible()
    expect(page.locator("figure .title").first).to_contain_text("green")
    search(page, "yellow")
    expect(page.get_by_label("The image counts")).to_have_value("1")
    page.get_by_label("The image counts").select_option("against")
    expect(page.locator("figure .title").first).to_contain_text("yellow")
    assert "green" not in colours(page, 10)
    search(page, "")  # without words the picture counts for itself again
    expect(page.locator("figure .title").first).to_contain_text("green")
    (tmp_path / "text.txt").write_text("no picture")
    page.locator("#file").set_input_files(tmp_path / "text.txt")
    expect(page.get_by_role("alert")).to_have_text(re.compile("text.txt is no picture"))


def test_several_images_with_weights_as_chips(page: Page, tmp_path: Path):
    for name in ("green", "blue", "red"):
        (tmp_path / f"{name}.png").write_bytes(png(COLOURS[name]))
    page.goto("/")
    page.locator("#file").set_input_files([tmp_path / "green.png", tmp_path / "blue.png"])
    expect(page.locator(".chip.picture img")).to_have_count(2)
    assert set(colours(page, 8)) == {"green", "blue"}
    page.get_by_label("Image 1 counts").select_option("against")
    expect(page.locator(".chip.picture.minus")).to_have_count(1)
    expect(page.locator("figure .title").first).to_contain_text("blue")
    assert "green" not in colours(page, 8)
    page.locator("#file").set_input_files(tmp_path / "red.png")  # a further one joins them
    expect(page.locator(".chip.picture")).to_have_count(3)
    page.get_by_label("Image 3 counts").select_option("twice")
    expect(page.locator("figure .title").first).to_contain_text("red")
    search(page, "yellow")
    expect(page.locator(".chip.picture")).to_have_count(3)
    for name in ("Remove image 3", "Remove image 1"):
        page.get_by_role("button", name=name).click()
    expect(page.get_by_label("The image counts")).to_have_value("1")
    search(page, "")
    assert set(colours(page)) == {"blue"}
    (tmp_path / "text.txt").write_text("no picture")
    page.locator("#file").set_input_files([tmp_path / "red.png", tmp_path / "text.txt"])
    expect(page.get_by_role("alert")).to_have_text(re.compile("text.txt is no picture"))
    expect(page.locator(".chip.picture")).to_have_count(1)


def test_only_close_hits(page: Page):
    page.goto("/")
    expect(page.get_by_role("button", name="Only close hits")).to_be_hidden()
    search(page, "red")
    expect(page.locator(".below")).to_have_count(1)
    page.get_by_role("button", name="Only close hits").press("Enter")
    expect(page.locator(".below")).to_have_count(0)
    expect(page.locator("figure.far")).to_have_count(0)
    expect(page.locator("figure").first).to_be_visible()
    expect(page).to_have_url(re.compile("only_close=true"))
    page.reload()
    expect(page.get_by_role("button", name="Only close hits")).to_have_attribute("aria-pressed", "true")
    expect(page.locator(".below")).to_have_count(0)
    page.locator("#words").fill("purple")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text(
        "nothing is close: the best hit scores like a random caption does"
    )
    page.get_by_role("button", name="Only close hits").click()
    expect(page.locator("figure.far").first).to_be_visible()
    expect(page).not_to_have_url(re.compile("only_close"))
    page.goto("/?only_close=true")  # without words nothing is left out
    expect(page.locator("#status")).to_have_text("53 pictures")


def test_like_and_unlike_move_the_query(page: Page):
    page.goto("/?q=yellow")
    before = colours(page, 20)
    liked = before.index("green")
    figure = page.locator("figure").nth(liked)
    figure.hover()
    figure.get_by_role("button", name=re.compile("^More like this")).click()
    expect(page.locator("#chips")).to_contain_text("like this")
    expect(page).to_have_url(re.compile("like="))
    expect(page.locator('.mark[aria-pressed="true"]')).to_have_count(1)
    assert colours(page, 20).index("green") < liked
    page.locator("figure").first.hover()
    page.locator("figure").first.get_by_role("button", name=re.compile("^Less like this")).click()
    expect(page.locator("#chips li")).to_have_count(2)
    page.locator("#chips button").first.click()
    expect(page.locator("#chips li")).to_have_count(1)
    expect(page.locator("#chips")).to_contain_text("unlike this")


def test_filters(page: Page):
    page.goto("/?q=red")
    page.locator("#filters summary").click()
    page.locator("#filter-field").select_option("camera")
    values = page.locator("#filter-values option").evaluate_all("all => all.map(each => each.value)")
    assert sorted(values) == ["Leica", "Nikon"]
    page.locator("#filter-value").fill("Leica")
    page.get_by_role("button", name="Add filter").click()
    expect(page.locator("#chips")).to_contain_text("camera=Leica")
    expect(page).to_have_url(re.compile("where=camera%3DLeica"))
    assert page.locator("figure").count() < 30
    page.goto("/?q=red&where=folder=nowhere")
    expect(page.get_by_role("alert")).to_contain_text("No picture passes these filters.")
    expect(page.get_by_role("link", name="Browse the whole collection", exact=True)).to_be_visible()
    page.goto("/?q=red&where=lens=5")
    expect(page.get_by_role("alert")).to_contain_text("no entry has the field 'lens'; there are folder")


def test_the_large_view_by_keyboard(page: Page):
    page.goto("/")
    expect(page.locator("figure").first).to_be_visible()
    page.keyboard.press("/")
    expect(page.locator("#words")).to_be_focused()
    page.keyboard.type("green")
    page.keyboard.press("Enter")
    expect(page.locator("figure .title").first).to_contain_text("green")
    page.keyboard.press("ArrowDown")
    expect(page.locator(".tile").first).to_be_focused()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    viewer = page.get_by_role("dialog")
    expect(viewer).to_be_visible()
    second = page.locator("figure .title").nth(1).text_content() or ""
    expect(page.locator("#viewer-captions")).to_have_text(second)
    expect(page.locator("#viewer-facts")).to_contain_text("/pictures/")
    expect(page.locator("#viewer-facts")).to_contain_text("camera")
    expect(page.locator("#neighbours img")).to_have_count(6)
    expect(page.locator("#why-title")).to_contain_text("Why this is a hit")
    expect(page.locator("#why .best")).to_have_text("green")
    expect(page.locator("#why dt")).to_have_count(6)
    expect(page.locator("#viewer-delete")).to_be_hidden()
    expect(page).to_have_url(re.compile("show="))
    name = page.locator("#viewer-name").inner_text()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#viewer-name")).not_to_have_text(name)
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#viewer-name")).to_have_text(name)
    page.reload()
    expect(page.locator("#viewer-name")).to_have_text(name)
    page.keyboard.press("Escape")
    expect(viewer).to_be_hidden()
    expect(page).not_to_have_url(re.compile("show="))
    page.locator(".tile").first.click()
    page.get_by_role("button", name="More like this", exact=True).click()
    expect(viewer).to_be_hidden()
    expect(page.locator("#chips")).to_contain_text("like this")
    assert set(colours(page)) == {"green"}


def test_add_and_remove_a_picture(browser: Browser, tmp_path: Path):
    service = toy_service(tmp_path / "server")
    editor = IndexEditor(service, UploadFolder(tmp_path / "uploads"))
    (tmp_path / "new one.png").write_bytes(png(COLOURS["purple"]))
    with serving(toy_app(service, editor=editor)) as url:
        context = browser.new_context(base_url=url)
        page = context.new_page()
        page.on("dialog", lambda asked: asked.accept())
        page.goto("/")
        expect(page.locator("#status")).to_have_text("53 pictures")
        page.set_input_files("#file", tmp_path / "new one.png")
        page.get_by_role("button", name="Add this picture to the collection").click()
        expect(page.locator("figure .title").first).to_contain_text("new-one-")
        page.locator(".tile").first.click()
        expect(page.locator("#viewer-facts")).to_contain_text("bytes")
        expect(page.locator("#why-title")).to_have_text("Nearest captions")
        page.get_by_role("button", name="Remove from the index").click()
        expect(page.locator("figure .title").first).not_to_contain_text("new-one-")
        page.goto("/")
        expect(page.locator("#status")).to_have_text("53 pictures")
        context.close()
    service.close()
    assert list((tmp_path / "uploads").iterdir()) == []


def test_errors_and_a_slow_server_are_shown(page: Page):
    page.goto("/")
    search_route = re.compile(r"/api/search\?")

    def slow(route: Route) -> None:
        time.sleep(0.8)
        route.continue_()

    page.route(search_route, slow)
    page.locator("#words").fill("red")
    page.keyboard.press("Enter")
    expect(page.locator("#progress")).to_be_visible()
    expect(page.locator("#progress")).to_be_hidden()
    page.unroute(search_route)
    page.route(search_route, lambda route: route.abort())
    page.locator("#words").fill("blue")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("The server does not answer.")
    page.unroute(search_route)
    page.get_by_role("button", name="Try again").click()
    assert set(colours(page)) == {"blue"}
    answers = iter([429])

    def busy(route: Route) -> None:
        if next(answers, None):
            route.fulfill(status=429, headers={"retry-after": "1"}, json={"error": "wait"})
        else:
            route.continue_()

    page.route(search_route, busy)
    search(page, "black")
    expect(page.locator("figure .title").first).to_contain_text("black")
    page.locator("#words").fill("red -red")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("cancels itself out")
    expect(page.get_by_role("button", name="Try again")).to_be_hidden()


def test_phone_and_dark(browser: Browser, address: str):
    context = browser.new_context(viewport={"width": 390, "height": 780}, color_scheme="dark", base_url=address)
    page = context.new_page()
    page.goto("/?q=red")
    expect(page.locator("figure").first).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390, "nothing is wider than the screen"
    box = page.locator("#form").bounding_box()
    assert box is not None and box["x"] >= 8 and box["x"] + box["width"] <= 382
    red, green, blue = map(
        int, re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor"))[:3]
    )
    assert max(red, green, blue) < 60
    page.locator(".tile").first.click()
    expect(page.locator("#viewer-image")).to_be_visible()
    close = page.get_by_role("button", name="Close", exact=True).bounding_box()
    assert close is not None and close["y"] < 100
    page.get_by_role("button", name="Close", exact=True).click()
    expect(page.get_by_role("dialog")).to_be_hidden()
    context.close()
