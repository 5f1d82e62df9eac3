"""How the page's files are served, and that nothing in them leaves the server."""

import re
from html.parser import HTMLParser

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from kvfold.server.page import load_assets, mount_page


@pytest.fixture(scope="module")
def client() -> TestClient:
    app = FastAPI()
    mount_page(app)
    return TestClient(app)


def paths() -> list[str]:
    return ["/", *(f"/static/{name}" for name in sorted(load_assets()))]


@pytest.mark.parametrize("path", paths())
def test_headers_are_strict_and_files_are_revalidated(client: TestClient, path: str) -> None:
    response = client.get(path)
    assert response.status_code == 200
    policy = dict(part.split(" ", 1) for part in response.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert {policy[name] for name in ("script-src", "style-src", "connect-src", "img-src")} == {"'self'"}
    assert response.headers["x-content-type-options"] == "nosniff"
    assert "no-cache" in response.headers["cache-control"]
    tag = response.headers["etag"]
    for known in (tag, f'"other", W/{tag}', "*"):
        unchanged = client.get(path, headers={"If-None-Match": known})
        assert (unchanged.status_code, unchanged.content) == (304, b"")
        assert unchanged.headers["etag"] == tag
    assert client.get(path, headers={"If-None-Match": '"other"'}).content == response.content
    head = client.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(len(response.content))


def test_content_types(client: TestClient) -> None:
    types = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
    for path in paths():
        expected = types[path.rsplit(".", 1)[1] if "." in path else "html"]
        assert client.get(path).headers["content-type"].startswith(expected)


@pytest.mark.parametrize("name", ["missing.js", "..%2Fpage.py", "%2e%2e/page.py", "index.html%00", "a/b.js"])
def test_only_the_pages_own_files_are_served(client: TestClient, name: str) -> None:
    assert client.get(f"/static/{name}").status_code == 404


def test_the_page_is_not_part_of_the_api_document(client: TestClient) -> None:
    assert client.get("/openapi.json").json()["paths"] == {}


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.inline: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = dict(attrs)
        self.links |= {value for name in ("src", "href") if (value := names.get(name))}
        if tag == "style" or (tag == "script" and "src" not in names):
            self.inline.append(tag)
        self.inline += [name for name in names if name == "style" or name.startswith("on")]


def test_the_page_refers_to_its_own_files_only_and_has_nothing_inline() -> None:
    assets = load_assets()
    parser = _Links()
    parser.feed(assets["index.html"].body.decode())
    assert parser.inline == []
    used = {link.removeprefix("static/") for link in parser.links if not link.startswith("#")}
    sources = {name: asset.body.decode() for name, asset in assets.items()}
    for name, source in sources.items():
        if name.endswith(".js"):
            used |= set(re.findall(r'from "\./([^"]+)"', source))
        outside = set(re.findall(r"https?://[^\"'\s>)]+", source)) - {"http://www.w3.org/2000/svg"}
        assert outside == set(), name
        assert not re.search(
            r"@import|url\(|innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b", source
        ), name
    assert used == set(assets) - {"index.html"}
