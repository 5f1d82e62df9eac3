"""The page at `/`: one small static app (chat, comparison, monitor) that talks to the API of the same server."""

import hashlib
from dataclasses import dataclass
from importlib.resources import files
from pathlib import PurePosixPath

from fastapi import APIRouter, FastAPI, HTTPException, Request, Response

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}

# Nothing from elsewhere, nothing inline, and no string of a model can ever become markup (trusted types).
_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)

_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    # Names carry no hash, so that a browser asks each time; unchanged files cost it an empty 304.
    "Cache-Control": "private, no-cache",
}


@dataclass(frozen=True)
class Asset:
    """A file of the page, in memory: `body`, its `content_type` and its `etag` (quoted)."""

    body: bytes
    content_type: str
    etag: str


def load_assets() -> dict[str, Asset]:
    """Every file of the page by its name, e.g. `index.html`."""
    assets = {}
    for entry in files("kvfold.server").joinpath("static").iterdir():
        content_type = _TYPES.get(PurePosixPath(entry.name).suffix)
        if content_type is not None:
            body = entry.read_bytes()
            assets[entry.name] = Asset(body, content_type, f'"{hashlib.sha256(body).hexdigest()[:24]}"')
    return assets


def mount_page(app: FastAPI) -> None:
    """Serve the page at `/` and its files at `/static/NAME` (GET and HEAD, outside the OpenAPI document).

    The files are read once, here, and held in memory: a request never reaches the file system.
    """
    assets = load_assets()
    router = APIRouter(include_in_schema=False)

    @router.api_route("/", methods=["GET", "HEAD"])
    async def page(request: Request) -> Response:
        return _respond(request, assets["index.html"])

    @router.api_route("/static/{name}", methods=["GET", "HEAD"])
    async def static(request: Request, name: str) -> Response:
        asset = assets.get(name)
        if asset is None:
            raise HTTPException(404, "The page has no such file.")
        return _respond(request, asset)

    app.include_router(router)


def _respond(request: Request, asset: Asset) -> Response:
    headers = {**_HEADERS, "ETag": asset.etag}
    known = {tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")}
    if asset.etag in known or "*" in known:
        return Response(status_code=304, headers=headers)
    return Response(asset.body, media_type=asset.content_type, headers=headers)
