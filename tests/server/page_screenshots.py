"""Screenshots of the page for the README, taken from a running server under a load of its own making.

    kvfold serve --kv none --kv "zeroc(bits=4)" --kv-memory 96MiB --port 8000
    python -m tests.server.page_screenshots http://127.0.0.1:8000 docs/images --seconds 150

Writes page-chat.png, page-compare.png, page-monitor.png, page-monitor-dark.png and page-phone.png.
"""

import argparse
import random
import threading
from pathlib import Path

import httpx
from playwright.sync_api import Browser, Page, expect

from .browser import chromium, visit

QUESTION = "What is a lighthouse for, and how does it work?"
# A long system prompt, as servers see them, so that there is something to compress.
ROOMS = "\n".join(
    f"Room {n}: a model of a ship of 18{n + 20}, drawn maps, and a lamp of its time." for n in range(1, 31)
)
SYSTEM = f"You are a friendly guide in a museum of the sea. Answer in short sentences. The museum has:\n{ROOMS}"
TOPICS = ("the sea", "a long journey", "mountains", "an old library", "rain in a big city", "the history of bread")
PATIENCE = 300_000  # ms for an answer under load


def load(url: str, stop: threading.Event, seed: int) -> None:
    """One client that asks, waits for its answer and asks again, with prompts of all lengths and pauses between."""
    chance = random.Random(seed)
    with httpx.Client(base_url=url, timeout=600) as client:
        methods = [method["kv"] for method in client.get("/stats").json()["methods"]]
        while not stop.is_set():
            filler = " ".join(
                f"{chance.choice(TOPICS)} and {chance.choice(TOPICS)};" for _ in range(chance.randint(20, 90))
            )
            body = {
                "kv": methods[seed % len(methods)],
                "messages": [{"role": "user", "content": f"Tell a story about {filler}"}],
                "max_tokens": chance.randint(30, 90),
                "temperature": 1,
            }
            client.post("/v1/chat/completions", json=body)
            stop.wait(chance.uniform(0, 6))


def shoot_chat(page: Page, path: Path, tokens: int) -> None:
    """A conversation of one answer, under the last of the server's methods."""
    picker = page.locator("#chat-kv")
    expect(picker.locator("option").first).to_be_attached()
    if not picker.is_visible():
        page.get_by_text("Settings").click()
    picker.select_option(index=picker.locator("option").count() - 1)
    page.locator("#chat-temperature").fill("0")
    page.locator("#chat-max").fill(str(tokens))
    page.locator("#chat-system").fill(SYSTEM)
    if page.viewport_size is not None and page.viewport_size["width"] < 860:
        page.get_by_text("Settings").click()
    page.get_by_label("Message").fill(QUESTION)
    page.get_by_label("Message").press("Enter")
    expect(page.locator(".figures")).to_be_visible(timeout=PATIENCE)
    page.screenshot(path=path)


def shoot_monitor(browser: Browser, url: str, folder: Path, seconds: float) -> None:
    """The charts and the pool under a load that grows for `seconds`, light and dark."""
    stop = threading.Event()
    clients = [threading.Thread(target=load, args=(url, stop, seed)) for seed in range(6)]
    with visit(browser, f"{url}/#/monitor", viewport={"width": 1200, "height": 1420}) as page:
        for client in clients:
            client.start()
            page.wait_for_timeout(seconds * 1000 / len(clients))
        for scheme, name in (("light", "page-monitor.png"), ("dark", "page-monitor-dark.png")):
            page.emulate_media(color_scheme=scheme)
            page.wait_for_timeout(2500)  # until the next reading has been drawn
            page.screenshot(path=folder / name)
    stop.set()
    for client in clients:
        client.join()


def main() -> None:
    """Take them all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=150, help="of load before the monitor is shown")
    given = parser.parse_args()
    desktop = {"width": 1200, "height": 760}
    with chromium() as browser:
        with visit(browser, given.url, viewport=desktop) as page:
            shoot_chat(page, given.folder / "page-chat.png", 120)
        with visit(browser, given.url, viewport={"width": 360, "height": 720}, color_scheme="dark") as page:
            shoot_chat(page, given.folder / "page-phone.png", 60)
        with visit(browser, f"{given.url}/#/compare", viewport=desktop) as page:
            page.get_by_role("button", name="Use a long example").click()
            page.locator("#compare-max").fill("80")
            page.get_by_role("button", name="Compare", exact=True).click()
            expect(page.locator(".side .figures")).to_have_count(2, timeout=PATIENCE)
            page.screenshot(path=given.folder / "page-compare.png")
        shoot_monitor(browser, given.url, given.folder, given.seconds)


if __name__ == "__main__":
    main()
