"""The page, in a browser: Chromium, where one is on the PATH, by Playwright."""

from __future__ import annotations

import hashlib
import io
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

from dmd2.service.http.guard import Rules
from dmd2.weights.manifest import DEFAULT, read_manifest
from tests.service.cog.cog_server import START, wait_for
from tests.service.http.fake import FakeService, fake_app, listening
from tests.service.http.serve_process import ServeProcess

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH")]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProcess]:
    server = ServeProcess(tmp_path_factory.mktemp("page"))
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def visit(browser: Browser, url: str, but: str = "(?!)", clock: bool = False) -> Iterator[Page]:
    """A new visitor's page. Whatever the browser complains of (scripts, the Content-Security-Policy) fails the test.

    Args:
        but: a pattern of complaints that are right.
        clock: the page's own, which the test may move on, or hold.
    """
    with browser.new_context(viewport={"width": 1200, "height": 800}, accept_downloads=True) as context:
        context.set_default_timeout(1000 * START)
        expect.set_options(timeout=1000 * START)
        page = context.new_page()
        if clock:
            page.clock.install()
        complaints: list[str] = []
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        elsewhere: list[str] = []
        page.on("request", lambda request: elsewhere.append(request.url))
        page.goto(url)
        expect(page.locator("#status")).not_to_have_text("Connecting …")
        yield page
        assert [text for text in complaints if not re.search(but, text)] == []
        assert [one for one in elsewhere if not one.startswith((url, "blob:", "data:"))] == []


@pytest.fixture
def page(browser: Browser, server: ServeProcess) -> Iterator[Page]:
    """Of the real server."""
    with visit(browser, server.url) as page:
        expect(page.locator("#status")).to_have_text("Type what you want to see.")
        yield page


def image(page: Page, steps: int) -> Locator:
    return page.locator(f"figure[data-steps='{steps}'] img")


def test_typing_changes_both_images_and_the_seed_and_the_steps_count(page: Page) -> None:
    page.keyboard.type("owl", delay=50)
    for steps in (1, 4):
        expect(image(page, steps)).to_have_attribute("data-prompt", "owl")
    before = image(page, 1).get_attribute("src")
    page.fill("input[name=seed]", "7")
    expect(image(page, 1)).not_to_have_attribute("src", before)
    page.check("input[name=steps][value='fewest']")
    expect(image(page, 4)).to_be_hidden()
    page.fill("textarea", "")
    expect(page.locator("#status")).to_have_text("Type what you want to see.")


def test_what_was_typed_and_kept_is_there_after_a_reload_and_can_be_downloaded(page: Page) -> None:
    page.keyboard.type("apple")
    expect(image(page, 4)).to_have_attribute("data-prompt", "apple")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#gallery li")).to_have_count(1)
    with page.expect_download() as download:
        page.keyboard.press("Alt+s")
    assert download.value.suggested_filename == "apple-0.png"
    with Image.open(io.BytesIO(Path(download.value.path()).read_bytes())) as found:
        assert (found.format, found.size) == ("PNG", read_manifest(DEFAULT).native_size)
    page.reload()
    expect(page.locator("textarea")).to_have_value("apple")
    expect(image(page, 1)).to_have_attribute("data-prompt", "apple")
    expect(page.locator("#gallery li")).to_have_count(1)
    page.click("#grid")
    expect(page.locator("#gallery li")).to_have_count(9)
    page.click("#gallery li:last-child button.remove")
    expect(page.locator("#gallery li")).to_have_count(8)
    page.fill("textarea", "cat")
    page.click("#gallery li:first-child button.open")
    expect(page.locator("textarea")).to_have_value("apple")
    expect(page.locator("input[name=seed]")).to_have_value("7")


def test_an_image_is_begun_with_and_a_painted_mask_keeps_the_rest(page: Page, tmp_path: Path) -> None:
    page.keyboard.type("owl")
    expect(image(page, 4)).to_have_attribute("data-prompt", "owl")
    Image.new("RGB", (128, 64), (255, 160, 0)).save(tmp_path / "orange.png")
    data = page.evaluate_handle(
        """async (bytes) => {
          const transfer = new DataTransfer();
          transfer.items.add(new File([new Uint8Array(bytes)], "orange.png", { type: "image/png" }));
          return transfer;
        }""",
        list((tmp_path / "orange.png").read_bytes()),
    )
    page.dispatch_event("body", "drop", {"dataTransfer": data})
    expect(image(page, 4)).to_have_attribute("data-from", "image")
    page.check("input[name=steps][value='most']")
    page.check("input[name=paint]")
    canvas = page.locator("canvas.mask")
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2 + 20, box["y"] + box["height"] / 2)
    page.mouse.up()
    expect(image(page, 4)).to_have_attribute("data-from", "mask")
    page.click("#copy summary")
    page.click("[data-copy=curl]")  # which would be of another image
    expect(page.locator("#status")).to_contain_text("Not copied")
    with page.expect_download() as download:
        page.click("#download")
    with Image.open(download.value.path()) as found:
        kept = found.convert("RGB").getpixel((1, 1))
        assert found.size[0] == 2 * found.size[1]
    assert isinstance(kept, tuple)
    assert max(abs(a - b) for a, b in zip(kept, (255, 160, 0), strict=True)) < 8  # by the mask, and the codec


def test_text_to_copy_names_what_is_on_the_screen(page: Page, server: ServeProcess) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"], origin=server.url)
    page.keyboard.type("it's")
    for kind in ("curl", "python", "openai"):
        page.click("#copy summary")  # it closes once something was copied
        page.click(f"[data-copy={kind}]")
        expect(page.locator("#copy")).not_to_have_attribute("open", "")
        text = page.evaluate("() => navigator.clipboard.readText()")
        assert server.url in text
        assert ("it's" in text) or (r"it'\''s" in text)
        if kind != "curl":
            compile(text, "<copied>", "exec")


def test_a_phone_shows_it_without_scrolling_sideways(page: Page) -> None:
    page.set_viewport_size({"width": 360, "height": 740})
    wide, window = page.evaluate("() => [document.documentElement.scrollWidth, window.innerWidth]")
    assert wide <= window


@pytest.mark.parametrize("key", ["abcdefgh/ijklmnop+qrs==", """a:b,c;"d"(e)@f<g>[h]?{i}\\'j'"""])
def test_any_key_that_the_server_takes_lets_the_page_in_at_once(browser: Browser, key: str) -> None:
    rules = Rules((hashlib.sha256(key.encode()).digest(),))
    with (
        listening(fake_app(rules=rules)) as url,
        visit(browser, url, "401|WebSocket", clock=True) as page,
    ):
        status = page.locator("#status")
        expect(status).to_have_text("This server wants an API key.")
        page.clock.pause_at(datetime.now() + timedelta(hours=1))
        vain: list[object] = []
        page.on("websocket", lambda socket: vain.append(socket))
        wait_for(lambda: page.clock.run_for(10_000) or len(vain) > 3, "more attempts of both lines")
        expect(status).to_have_text("This server wants an API key.")
        page.fill("input[name=key]", key[:-1])
        page.keyboard.press("Enter")
        expect(status).to_have_text("The server does not know this API key.")
        page.fill("input[name=key]", f" {key}")
        page.keyboard.press("Enter")
        expect(status).to_have_text("Type what you want to see.")
        page.fill("textarea", "owl")
        expect(image(page, 1)).to_have_attribute("data-prompt", "owl")  # without a wait: the page's clock stands


@pytest.mark.parametrize("begun", ["noise", "image"])
def test_a_full_queue_is_asked_again_when_it_says_and_for_what_is_newest(
    browser: Browser, begun: str, tmp_path: Path
) -> None:
    service = FakeService()
    app = fake_app(service, waiting=0)
    with listening(app) as url, visit(browser, url, "429", clock=True) as page:
        status = page.locator("#status")
        page.check("input[name=steps][value=fewest]")
        page.clock.pause_at(datetime.now() + timedelta(hours=1))
        admission = app.state.models.served["fake"].admission
        admission.running = 4  # as many as are let in
        if begun == "image":
            Image.new("RGB", (64, 64)).save(tmp_path / "black.png")
            page.set_input_files("input[name=image]", tmp_path / "black.png")
        page.fill("textarea", "owl")
        expect(status).to_have_text(re.compile(r"The queue is full; asking again in \d+ s …"))
        page.fill("textarea", "cat")
        page.fill("textarea", "dog")
        admission.running = 0
        assert not service.asked
        page.clock.run_for(300_000)
        expect(image(page, 1)).to_have_attribute("data-prompt", "dog")
        assert image(page, 1).get_attribute("data-from") == begun
        assert [request.prompt for request in service.asked] == ["dog"]


def test_a_rate_that_is_used_up_is_told(browser: Browser) -> None:
    with listening(fake_app(rules=Rules(per_minute=1))) as url, visit(browser, url) as page:
        page.check("input[name=steps][value=fewest]")
        page.fill("textarea", "owl")
        expect(image(page, 1)).to_have_attribute("data-prompt", "owl")
        page.fill("textarea", "cat")
        expect(page.locator("#status")).to_have_text(re.compile("The rate .* is used up; asking again in .* s …"))


def test_eight_seeds_begin_with_the_image_and_a_kept_one_is_opened_as_it_is(browser: Browser, tmp_path: Path) -> None:
    service = FakeService()
    Image.new("RGB", (64, 64)).save(tmp_path / "black.png")
    with listening(fake_app(service)) as url, visit(browser, url) as page:
        page.check("input[name=steps][value=most]")
        page.fill("input[name=seed]", "40")
        page.fill("textarea", "owl")
        page.set_input_files("input[name=image]", tmp_path / "black.png")
        page.fill("input[name=strength]", "0.4")
        page.click("#grid")
        expect(page.locator("#gallery li")).to_have_count(8)
        (eight,) = (request for request in service.asked if request.num_outputs == 8)
        assert (eight.image is not None, eight.prompt_strength, eight.seed) == (True, 0.4, 40)

        page.fill("input[name=strength]", "0.9")
        page.click("#drop-image")
        page.fill("textarea", "cat")
        expect(image(page, 4)).to_have_attribute("data-prompt", "cat")
        expect(image(page, 4)).to_have_attribute("data-from", "noise")
        page.keyboard.press("Control+Enter")
        expect(page.locator("#gallery li")).to_have_count(9)
        page.click("#gallery li:nth-child(2) button.open")  # the last of the eight
        expect(page.locator("#status")).to_contain_text("As it was kept.")
        expect(image(page, 4)).to_have_attribute("data-from", "image")
        for name, value in {"prompt": "owl", "seed": "47", "strength": "0.4"}.items():
            expect(page.locator(f"[name={name}]")).to_have_value(value)
        with page.expect_download() as download:
            page.click("#download")
        assert download.value.suggested_filename == "owl-47.png"
        with Image.open(download.value.path()) as found:
            assert found.getpixel((0, 0)) == (47, 0, 3)  # what the service had made of this seed and prompt
        assert 47 not in [request.seed for request in service.asked]

        page.set_input_files("input[name=image]", tmp_path / "black.png")
        expect(page.locator("#with-image")).to_be_visible()
        page.click("#gallery li:nth-child(1) button.open")  # which began without an image
        expect(image(page, 4)).to_have_attribute("data-prompt", "cat")
        expect(image(page, 4)).to_have_attribute("data-from", "noise")


def test_a_mask_may_be_a_file_without_a_mouse(browser: Browser, tmp_path: Path) -> None:
    service = FakeService()
    Image.new("RGB", (64, 64)).save(tmp_path / "black.png")
    Image.new("L", (32, 32), 255).save(tmp_path / "white.webp")
    with listening(fake_app(service)) as url, visit(browser, url) as page:
        page.check("input[name=steps][value=fewest]")
        page.fill("textarea", "owl")
        page.set_input_files("input[name=image]", tmp_path / "black.png")
        expect(image(page, 1)).to_have_attribute("data-from", "image")
        chooser = page.get_by_label("Mask: light where the image is to be made anew")
        page.focus("input[name=strength]")
        page.keyboard.press("Tab")
        expect(chooser).to_be_focused()
        chooser.set_input_files(tmp_path / "white.webp")
        expect(image(page, 1)).to_have_attribute("data-from", "mask")
        assert service.asked[-1].mask == (tmp_path / "white.webp").read_bytes()
        page.click("#clear-mask")
        expect(image(page, 1)).to_have_attribute("data-from", "image")
        expect(chooser).to_have_value("")


COLOURS = """() => {
  const behind = (one) => {
    const colour = getComputedStyle(one).backgroundColor;
    return colour === "rgba(0, 0, 0, 0)" ? behind(one.parentElement) : colour;
  };
  const written = (node) => node.nodeType === Node.TEXT_NODE && node.data.trim();
  const fields = "textarea, select, input:not([type=radio], [type=checkbox], [type=range])";
  const seen = [...document.querySelectorAll("body *")].filter((one) => one.checkVisibility());
  const texts = seen.filter((one) => one.matches(fields) || [...one.childNodes].some(written));
  return texts.map((one) => [one.outerHTML.slice(0, 60), getComputedStyle(one).color, behind(one)]);
}"""


def luminance(colour: str) -> float:
    """As WCAG defines it, of "rgb(1, 2, 3)"."""
    assert re.fullmatch(r"rgb\(\d+, \d+, \d+\)", colour)
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_can_be_read_in_light_and_in_the_dark(browser: Browser, scheme: str, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "black.png")
    with listening(fake_app()) as url, visit(browser, url) as page:
        page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
        page.fill("textarea", "owl")
        page.set_input_files("input[name=image]", tmp_path / "black.png")
        expect(image(page, 4)).to_have_attribute("data-from", "image")
        page.click("#keep")
        expect(page.locator("#gallery li")).to_have_count(1)
        page.click("#copy summary")
        backgrounds = set()
        for bad in (False, True):
            page.evaluate("(bad) => document.querySelector('#status').classList.toggle('bad', bad)", bad)
            found = page.evaluate(COLOURS)
            assert {"h1", "p", "label", "button", "textarea", "summary", "figcaption"} <= {
                html[1:].partition(" ")[0].partition(">")[0] for html, _, _ in found
            }
            for html, text, behind in found:
                dim, bright = sorted((luminance(text), luminance(behind)))
                assert (bright + 0.05) / (dim + 0.05) >= 4.5, (html, text, behind)
                backgrounds.add(behind)
        body = luminance(page.evaluate("() => getComputedStyle(document.body).backgroundColor"))
        assert body < 0.05 if scheme == "dark" else body > 0.9
        assert len(backgrounds) > 1  # the page's, and a card's
