"""The page against an API whose answers are written here: errors, odd text, what it sends and draws."""

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from .browser import METHODS, ScriptedApi, answer, chromium, pieces, serve_files, sse, visit

Open = Callable[..., AbstractContextManager[Page]]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serve_files() as url:
        yield url


@pytest.fixture
def open_page(browser: Browser, url: str) -> Open:
    """`open_page(api, hash="", **context_options)`: the page with its API answered by `api`."""
    return lambda api, hash="", **options: visit(browser, url + hash, before=api.install, **options)


def error(message: str) -> str:
    return json.dumps({"error": {"message": message, "type": "server_error", "param": None, "code": None}})


def ask(page: Page, text: str) -> None:
    page.get_by_label("Message").fill(text)
    page.get_by_label("Message").press("Enter")


@pytest.mark.parametrize(
    ("reply", "sentence"),
    [
        ((503, error("The engine is being restarted.")), "The engine is being restarted."),
        ((502, "<html>Bad gateway</html>"), "The server answered 502 Bad Gateway."),
        ((200, sse({"error": {"message": "The engine died."}}, done=False)), "The engine died."),
        ((200, sse(*pieces("Half an"), {"error": {"message": "The engine died."}}, done=False)), "The engine died."),
        ((200, sse(*pieces("Half an"), done=False)), "The server closed the stream before the answer ended."),
        ((200, "data: {broken\n\n"), "The server sent a chunk that is not JSON."),
        (None, "The server cannot be reached."),
    ],
)
def test_an_error_is_shown_and_the_text_can_be_sent_again(
    open_page: Open, reply: tuple[int, str] | None, sentence: str
) -> None:
    api = ScriptedApi(chat=lambda body: reply)
    with open_page(api) as page:
        ask(page, "Is anybody there?")
        expect(page.get_by_role("alert")).to_contain_text(sentence)
        expect(page.get_by_label("Message")).to_have_value("Is anybody there?")
        api.chat = lambda body: (200, answer("Yes."))
        page.get_by_role("button", name="Send").click()
        expect(page.locator(".assistant:not(.broken) .body")).to_have_text("Yes.")
        expect(page.locator("#alert")).to_be_hidden()
        # The model is not shown the turn that failed.
        assert api.bodies[-1]["messages"] == [{"role": "user", "content": "Is anybody there?"}]


def test_the_conversation_and_the_settings_are_sent(open_page: Open) -> None:
    api = ScriptedApi()
    with open_page(api) as page:
        page.get_by_label("Compression method").select_option(METHODS[1])
        page.get_by_label("Max tokens").first.fill("12")
        page.get_by_label("Temperature").first.fill("0.25")
        page.get_by_label("System prompt").fill("Be brief.")
        ask(page, "One")
        expect(page.locator(".figures")).to_have_count(1)
        ask(page, "Two")
        expect(page.locator(".figures")).to_have_count(2)
        page.get_by_role("button", name="New chat").click()
        expect(page.locator(".message")).to_have_count(0)
        ask(page, "Three")
        expect(page.locator(".figures")).to_have_count(1)
    first, second, third = api.bodies
    assert first["model"] == "scripted"
    assert (first["kv"], first["max_completion_tokens"], first["temperature"]) == (METHODS[1], 12, 0.25)
    assert first["stream"] is True
    assert first["stream_options"] == {"include_usage": True}
    system = {"role": "system", "content": "Be brief."}
    past = [{"role": "user", "content": "One"}, {"role": "assistant", "content": "Hello"}]
    assert second["messages"] == [system, *past, {"role": "user", "content": "Two"}]
    assert third["messages"] == [system, {"role": "user", "content": "Three"}]


def test_settings_out_of_range_and_empty_messages_are_not_sent(open_page: Open) -> None:
    api = ScriptedApi()
    with open_page(api) as page:
        ask(page, "  \n ")
        page.get_by_label("Max tokens").first.fill("0")
        page.get_by_text("Settings").click()
        ask(page, "Hello")
        expect(page.locator("#chat-max")).to_be_focused()  # although its panel was closed
        page.get_by_label("Max tokens").first.fill("1")
        page.get_by_label("Message").press("Enter")
        expect(page.locator(".figures")).to_have_count(1)
    assert [body["max_completion_tokens"] for body in api.bodies] == [1]


def test_figures_of_an_answer(open_page: Open) -> None:
    with open_page(ScriptedApi(chat=lambda body: (200, answer("a ", "b", finish="length")))) as page:
        ask(page, "Go")
        figures = page.locator(".figures")
        for part in ("Methodnone", "KV cache1.5 KiB", "Compression4.00\u00d7", "TTFT", "7 in, 2 out", "at max tokens"):
            expect(figures).to_contain_text(part)


@pytest.mark.parametrize(
    "text", ["<img src=x onerror=alert(1)>", "a\n\n  b\tc", "שלום \U0001d518 👩‍🚀 \u0000", "x" * 2000]
)
def test_an_answer_is_shown_as_the_text_it_is(open_page: Open, text: str) -> None:
    with open_page(ScriptedApi(chat=lambda body: (200, answer(*text))), viewport={"width": 360, "height": 640}) as page:
        ask(page, text)
        expect(page.locator(".figures")).to_be_in_viewport()  # the view has followed the text
        assert page.locator(".assistant .body").evaluate("body => body.textContent") == text
        assert page.locator(".message img").count() == 0
        assert page.evaluate("document.documentElement.scrollWidth") == 360


@pytest.mark.parametrize(
    ("left", "right", "verdict", "marks"),
    [
        ("a dog barks", "a dot is", "The texts part after 4 characters (1 word).", ["dog", "dot"]),
        ("same", "same", "The texts are identical (4 characters).", []),
        ("one two", "one two three", "The texts part after 7 characters", ["ends here", " three"]),
        ("Yes", "No", "The texts differ from the first character.", ["Yes", "No"]),
        ("go 😀", "go 😁", "The texts part after 3 characters (1 word).", ["😀", "😁"]),
        ("日本語の文章", "日本語の文字", "The texts part after 5 characters", ["章", "字"]),
        ("", "", "No comparison: there is no text.", []),
    ],
)
def test_compare_marks_where_texts_part(open_page: Open, left: str, right: str, verdict: str, marks: list[str]) -> None:
    texts = dict(zip(METHODS, (left, right), strict=True))
    api = ScriptedApi(chat=lambda body: (200, answer(*texts[body["kv"]], method=body["kv"])))
    with open_page(api, "#/compare") as page:
        page.get_by_role("button", name="Compare", exact=True).click()
        expect(page.locator("#verdict")).to_contain_text(verdict)
        expect(page.locator(".side .figures")).to_have_count(2)
        assert page.locator(".side mark").all_text_contents() == marks
        shown = page.locator(".side .body").evaluate_all("all => all.map((one) => one.textContent)")
        assert [text.removesuffix("ends here") for text in shown] == [left, right]
    for name in ("messages", "seed", "temperature", "max_completion_tokens"):
        assert api.bodies[0][name] == api.bodies[1][name]


def test_compare_names_the_method_that_failed(open_page: Open) -> None:
    def chat(body: dict[str, Any]) -> tuple[int, str]:
        return (200, answer("fine")) if body["kv"] == METHODS[0] else (429, error("The queue is full."))

    with open_page(ScriptedApi(chat=chat), "#/compare") as page:
        page.get_by_role("button", name="Compare", exact=True).click()
        expect(page.get_by_role("alert")).to_have_text(f"{METHODS[1]}: The queue is full.")
        expect(page.locator("#verdict")).to_have_text("No comparison: an answer failed.")
        expect(page.locator(".side").first).to_contain_text("fine")


@pytest.mark.parametrize(
    ("status", "label"),
    [("starting", "Starting"), ("restarting", "Restarting"), ("draining", "Draining"), ("failed", "Failed")],
)
def test_the_pill_follows_the_server(open_page: Open, status: str, label: str) -> None:
    api = ScriptedApi()
    with open_page(api) as page:
        pill = page.locator("#status")
        expect(pill).to_have_text("Ready")
        api.ready = {"status": status, "reason": "Because of a test.", "restarts": 1}
        expect(pill).to_have_text(label)
        expect(page.locator("#notice")).to_contain_text("Because of a test.")
        api.ready = None
        expect(pill).to_have_text("Server unreachable")
        api.ready = {"status": "ready", "reason": None, "restarts": 1}
        expect(pill).to_have_text("Ready")
        expect(page.locator("#notice")).to_be_hidden()


def test_the_monitor_draws_what_the_api_says(open_page: Open) -> None:
    api = ScriptedApi()
    with open_page(api, "#/monitor") as page:
        expect(page.locator("#tiles")).to_contain_text("KV held4 KiB")
        expect(page.locator("#method-rows tr")).to_have_count(2)
        chart = page.get_by_role("img", name="KV memory")
        expect(chart.locator("path.line")).to_have_count(2)
        page.get_by_role("button", name="zeroc(bits=4)").click()
        expect(chart.locator("path.line")).to_have_count(1)
        chart.focus()
        chart.press("ArrowLeft")
        expect(page.locator(".chart .tip").first).to_contain_text("none2 KiB")
        share = "none 25.0 %, zeroc(bits=4) 25.0 %, prefix snapshots only 25.0 %, free 25.0 %"
        expect(page.get_by_role("img", name=f"Share of cells: {share}")).to_be_visible()
        page.locator("canvas").hover(position={"x": 20, "y": 4})
        expect(page.locator(".pool .tip")).to_have_text("Pages 2 to 3zeroc(bits=4), 50.0 % filled")


def test_a_hidden_page_asks_nothing(open_page: Open) -> None:
    api = ScriptedApi()
    with open_page(api, "#/monitor") as page:
        expect(page.locator("#status")).to_have_text("Ready")
        page.evaluate("Object.defineProperty(document, 'hidden', { value: true, configurable: true })")
        page.wait_for_timeout(2500)  # what was under way has ended, and no poll may follow
        api.calls.clear()
        page.wait_for_timeout(2500)
        assert api.calls == []
        page.evaluate("delete document.hidden; document.dispatchEvent(new Event('visibilitychange'))")
        with page.expect_request("**/stats"):
            pass


def test_the_pool_is_read_only_where_it_is_seen(open_page: Open) -> None:
    api = ScriptedApi()
    with open_page(api) as page:
        expect(page.locator("#status")).to_have_text("Ready")
        assert "pool" not in api.calls
        with page.expect_request("**/pool"):
            page.get_by_role("tab", name="Monitor").click()
