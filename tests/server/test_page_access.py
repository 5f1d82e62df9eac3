"""The page for everybody: by keyboard alone, on a small screen, in the dark, for a screen reader."""

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect

from .browser import ScriptedApi, answer, chromium, serve_files, visit

VIEWS = ("chat", "compare", "monitor")

# The WCAG contrast of each visible text with the nearest background behind it, computed from what the browser shows.
CONTRAST = """() => {
  const parse = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((part) => part / 255)
    .map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4))
    .reduce((sum, part, index) => sum + part * [0.2126, 0.7152, 0.0722][index], 0);
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const texts = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    const box = element.getBoundingClientRect();
    if (!texts || box.width < 2 || !element.checkVisibility()) continue;
    let behind = element;
    while (behind && parse(getComputedStyle(behind).backgroundColor)[3] === 0) behind = behind.parentElement;
    const style = getComputedStyle(element);
    const text = light(parse(element instanceof SVGElement ? style.fill : style.color));
    const ground = light(parse(getComputedStyle(behind ?? document.body).backgroundColor));
    const ratio = (Math.max(text, ground) + 0.05) / (Math.min(text, ground) + 0.05);
    found.push([ratio, element.outerHTML.slice(0, 120)]);
  }
  return found;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serve_files() as url:
        yield url


def fill_views(page: Page) -> None:
    """Bring text into each view, an alert and a notice included."""
    page.get_by_label("Message").fill("Hello")
    page.get_by_label("Message").press("Enter")
    expect(page.locator(".figures")).to_be_visible()
    page.get_by_role("tab", name="Compare").click()
    page.get_by_role("button", name="Compare", exact=True).click()
    expect(page.locator(".side .figures")).to_have_count(2)
    page.get_by_role("tab", name="Monitor").click()
    expect(page.locator("#method-rows tr")).to_have_count(2)
    expect(page.locator("canvas[width]")).to_be_visible()


def scripted() -> ScriptedApi:
    long = "word " * 60 + "x" * 300
    return ScriptedApi(chat=lambda body: (200, answer(long, body["kv"] * 9, method=body["kv"])))


def test_everything_is_reached_by_keyboard(browser: Browser, url: str) -> None:
    api = ScriptedApi()
    with visit(browser, url, before=api.install) as page:
        focused = page.locator(":focus")
        page.keyboard.press("Tab")
        expect(focused).to_have_text("Skip to content")
        expect(focused).to_be_in_viewport()
        page.keyboard.press("Tab")
        for key, name in (
            ("ArrowRight", "Compare"),
            ("End", "Monitor"),
            ("ArrowRight", "Chat"),
            ("ArrowLeft", "Monitor"),
        ):
            page.keyboard.press(key)
            expect(focused).to_have_text(name)
            expect(focused).to_have_attribute("aria-selected", "true")
            expect(page.get_by_role("tabpanel", name=name)).to_be_visible()
            expect(page.get_by_role("tabpanel")).to_have_count(1)
        page.keyboard.press("Home")
        for _ in range(12):  # to the message, past what lies before it
            page.keyboard.press("Tab")
            # A focus ring: no element may take the focus unseen.
            style = "one => [getComputedStyle(one).outlineStyle, getComputedStyle(one.parentElement).boxShadow]"
            outline, around = focused.evaluate(style)
            assert outline != "none" or around != "none"
            if focused.get_attribute("id") == "chat-text":
                break
        page.keyboard.type("First")
        page.keyboard.press("Shift+Enter")
        page.keyboard.type("second")
        page.keyboard.press("Enter")
        expect(page.locator(".figures")).to_be_visible()
        expect(focused).to_have_id("chat-text")
        assert api.bodies[0]["messages"][0]["content"] == "First\nsecond"
        expect(page.locator("#announcer")).to_have_text("Hello")


def test_the_skip_link_goes_to_the_open_view(browser: Browser, url: str) -> None:
    with visit(browser, f"{url}#/monitor", before=ScriptedApi().install) as page:
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        expect(page.locator(":focus")).to_have_id("monitor")
        expect(page.get_by_role("tab", name="Monitor")).to_have_attribute("aria-selected", "true")


@pytest.mark.parametrize("width", [320, 360, 768])
def test_no_view_scrolls_sideways(browser: Browser, url: str, width: int) -> None:
    with visit(browser, url, before=scripted().install, viewport={"width": width, "height": 640}) as page:
        fill_views(page)
        for view in VIEWS:
            page.locator(f"#tab-{view}").click()
            sizes = "all => all.map((one) => [one.scrollWidth - one.clientWidth, one.id])"
            over = page.locator(f"html, body, main, #{view}, #log").evaluate_all(sizes)
            assert [(extra, name) for extra, name in over if extra > 0] == []
        box = page.get_by_role("tab", name="Chat").bounding_box()
        assert box is not None
        assert box["height"] >= 24  # WCAG 2.2, target size


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_is_enough_in_both_colour_schemes(browser: Browser, url: str, scheme: str) -> None:
    api = scripted()
    with visit(browser, url, before=api.install, color_scheme=scheme) as page:
        red, green, blue = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
        assert (red + green + blue < 3 * 64) == (scheme == "dark")
        fill_views(page)
        page.get_by_role("tab", name="Chat").click()
        api.chat = lambda body: None
        api.ready = {"status": "failed", "reason": "The test said so.", "restarts": 1}
        page.get_by_label("Message").fill("Hello")
        page.get_by_label("Message").press("Enter")
        expect(page.locator("#alert")).to_be_visible()
        expect(page.locator("#notice")).to_be_visible()
        for view in VIEWS:
            page.locator(f"#tab-{view}").click()
            ratios = page.evaluate(CONTRAST)
            assert len(ratios) > 10
            assert [(ratio, text) for ratio, text in ratios if ratio < 4.5] == []


def test_nothing_moves_for_those_who_asked_for_that(browser: Browser, url: str) -> None:
    with visit(browser, url, before=ScriptedApi().install, reduced_motion="reduce") as page:
        page.locator("#log").evaluate(
            "log => { const one = document.createElement('article'); one.className = 'message writing';"
            " one.append(Object.assign(document.createElement('p'), { className: 'body' })); log.append(one); }"
        )
        name = page.locator(".writing .body").evaluate("body => getComputedStyle(body, '::after').animationName")
        assert name == "none"
