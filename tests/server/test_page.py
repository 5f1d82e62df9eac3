"""The page in a real browser against a real server with a tiny model."""

import json
from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Browser, Locator, Page, Route, expect

from .browser import chromium, visit
from .running import RunningServer

PROMPT = "A page belongs to"
SECONDS = 120_000  # ms, for what an engine has to do first

# Presses the visible stop button as soon as `selector` has text: before any answer of some length can be complete.
STOP_AT_FIRST_TEXT = """([selector, button]) => {
  const observer = new MutationObserver(() => {
    if (!document.querySelector(selector)?.textContent) return;
    observer.disconnect();
    document.getElementById(button).click();
  });
  observer.observe(document.body, { subtree: true, childList: true, characterData: true });
}"""

# Counts how many different lengths the text of `selector` has on its way.
COUNT_STEPS = """(selector) => {
  window.steps = new Set();
  new MutationObserver(() => window.steps.add(document.querySelector(selector)?.textContent.length))
    .observe(document.body, { subtree: true, childList: true, characterData: true });
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def page(browser: Browser, server: RunningServer) -> Iterator[Page]:
    with visit(browser, server.url) as page:
        expect(page.locator("#status")).to_have_text("Ready")
        yield page


def ask(page: Page, text: str, tokens: int, temperature: str = "0") -> None:
    page.locator("#chat-max").fill(str(tokens))
    page.locator("#chat-temperature").fill(temperature)
    page.get_by_label("Message").fill(text)
    page.get_by_label("Message").press("Enter")


def ignore_eos(route: Route) -> None:
    """Answers as long as asked for: which token a model of random weights takes differs between processors."""
    route.continue_(post_data=json.dumps({**route.request.post_data_json, "ignore_eos": True}))


def fact(figures: Locator, name: str) -> str:
    """The value of one of an answer's figures."""
    return figures.locator("div", has=figures.page.locator("dt", has_text=name)).locator("dd").inner_text()


@pytest.mark.parametrize("method", ["none", "zeroc(bits=4)"])
def test_an_answer_is_streamed_and_is_what_the_api_says(page: Page, server: RunningServer, method: str) -> None:
    page.get_by_label("Compression method").select_option(method)
    page.evaluate(COUNT_STEPS, ".assistant .body")
    ask(page, PROMPT, 200)
    figures = page.locator(".figures")
    expect(figures).to_be_visible(timeout=SECONDS)
    body = {
        "model": "tiny",
        "kv": method,
        "messages": [{"role": "user", "content": PROMPT}],
        "max_completion_tokens": 200,
        "temperature": 0,
    }
    with server.client() as client:
        expected = client.post("/v1/chat/completions", json=body).json()
    text = page.locator(".assistant .body").evaluate("body => body.textContent")
    assert text == expected["choices"][0]["message"]["content"]
    usage = expected["usage"]
    assert fact(figures, "Method") == method
    assert fact(figures, "Compression") == f"{usage['kv']['compression']:.2f}\u00d7"
    assert fact(figures, "Tokens") == f"{usage['prompt_tokens']} in, {usage['completion_tokens']} out"
    steps = page.evaluate("[...window.steps]")
    assert any(0 < length < len(text) for length in steps)
    expect(page.locator("#alert")).to_be_hidden()


def test_stop_ends_the_request_and_keeps_the_text(page: Page, server: RunningServer) -> None:
    page.route("**/v1/chat/completions", ignore_eos)
    page.evaluate(STOP_AT_FIRST_TEXT, [".assistant .body", "chat-stop"])
    ask(page, PROMPT, 400)
    expect(page.locator(".figures")).to_contain_text("stopped by you", timeout=SECONDS)
    expect(page.locator(".assistant .body")).not_to_be_empty()
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    assert server.wait_idle()["running"] == 0
    ask(page, "And then?", 4)  # the conversation goes on from there
    expect(page.locator(".figures")).to_have_count(2, timeout=SECONDS)
    expect(page.locator("#alert")).to_be_hidden()


def test_compare_runs_two_methods_at_once(page: Page) -> None:
    page.get_by_role("tab", name="Compare").click()
    page.locator("#compare-text").fill(PROMPT * 8)
    page.locator("#compare-max").fill("64")
    page.get_by_role("button", name="Compare", exact=True).click()
    figures = page.locator(".side .figures")
    expect(figures).to_have_count(2, timeout=SECONDS)
    assert [fact(figures.nth(index), "Method") for index in (0, 1)] == ["none", "zeroc(bits=4)"]
    for index in (0, 1):
        assert "B" in fact(figures.nth(index), "KV cache")
        assert "tok/s" in fact(figures.nth(index), "Speed")
    shown = page.locator(".side .body").all_text_contents()
    texts = [text.removesuffix("ends here") for text in shown]
    verdict = page.locator("#verdict").inner_text()
    assert ("identical" in verdict) == (texts[0] == texts[1])
    marks = page.locator(".side mark").count()
    assert marks == (0 if texts[0] == texts[1] else 2)


def test_compare_of_a_method_with_itself_is_identical(page: Page) -> None:
    page.get_by_role("tab", name="Compare").click()
    page.locator("#compare-right").select_option("none")
    page.locator("#compare-temperature").fill("1")
    page.locator("#compare-max").fill("16")
    page.get_by_role("button", name="Compare", exact=True).click()
    expect(page.locator("#verdict")).to_contain_text("identical", timeout=SECONDS)


def test_the_monitor_shows_the_servers_figures(page: Page, server: RunningServer) -> None:
    page.get_by_role("tab", name="Monitor").click()
    expect(page.locator("#method-rows th")).to_have_text(["none", "zeroc(bits=4)"])
    for title in ("KV memory", "Requests", "Throughput", "Time to first token"):
        expect(page.get_by_role("img", name=title)).to_be_visible()
    with server.client() as client:
        pages = client.get("/pool").json()["pages"]
    expect(page.locator("#pool")).to_contain_text(f"of {pages:,} pages used")
    expect(page.get_by_role("img", name="Map of the page pool. Share of cells: none")).to_be_visible()


def test_an_error_of_the_api_is_shown_in_its_words(page: Page, server: RunningServer) -> None:
    ask(page, PROMPT, 100_000)
    body = {"messages": [{"role": "user", "content": PROMPT}], "max_completion_tokens": 100_000}
    with server.client() as client:
        message = client.post("/v1/chat/completions", json=body).json()["error"]["message"]
    expect(page.get_by_role("alert")).to_contain_text(message, ignore_case=True)
    expect(page.get_by_label("Message")).to_have_value(PROMPT)


def test_the_engine_dies_and_comes_back_and_dies_for_good(
    browser: Browser, start_server: Callable[..., RunningServer]
) -> None:
    server = start_server("--kv-memory", "8MiB")
    with visit(browser, server.url) as page:
        expect(page.locator("#status")).to_have_text("Ready")
        ask(page, PROMPT, 4)
        expect(page.locator(".figures")).to_have_count(1, timeout=SECONDS)
        server.kill_engine()
        server.wait_ready()
        expect(page.locator("#status")).to_have_text("Ready")
        ask(page, "Again", 4)
        expect(page.locator(".figures")).to_have_count(2, timeout=SECONDS)
        server.kill_engine()
        expect(page.locator("#status")).to_have_text("Failed", timeout=SECONDS)
        ask(page, "Is anybody there?", 4)
        expect(page.get_by_role("alert")).to_contain_text("engine")
        expect(page.get_by_label("Message")).to_have_value("Is anybody there?")
        server.stop()
        expect(page.locator("#status")).to_have_text("Server unreachable")
        page.get_by_role("button", name="Send").click()
        expect(page.get_by_role("alert")).to_contain_text("The server cannot be reached.")
        expect(page.get_by_label("Message")).to_have_value("Is anybody there?")


def test_with_an_api_key_the_browser_logs_in(browser: Browser, start_server: Callable[..., RunningServer]) -> None:
    server = start_server("--kv-memory", "8MiB", "--api-key", "open sesame", wait=False)
    with visit(browser, server.url, http_credentials={"username": "", "password": "open sesame"}) as page:
        expect(page.locator("#status")).to_have_text("Ready", timeout=SECONDS)
        ask(page, PROMPT, 4)
        expect(page.locator(".figures")).to_be_visible(timeout=SECONDS)
