"""Errors as OpenAI's API shows them: `{"error": {"message", "type", "param", "code"}}` with a fitting status."""

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from kvfold.errors import EngineDiedError, EngineNotReadyError, KvfoldError, TransferError


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """What every error looks like."""

    error: ErrorBody


class APIError(Exception):
    """An answer that is no success."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers
        self.body = error_body(status, message, param, code)


_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The JSON of an error."""
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def as_api_error(error: KvfoldError) -> APIError:
    """Users' mistakes are a 400; a lost engine is a 500, one that is not there yet a 503."""
    if isinstance(error, EngineNotReadyError):
        return APIError(503, str(error), code="engine_not_ready", headers={"Retry-After": "5"})
    if isinstance(error, TransferError):
        return APIError(500, str(error), code="transfer_failed")
    if isinstance(error, EngineDiedError):
        return APIError(500, str(error), code="engine_died")
    return APIError(400, str(error))


def add_error_handlers(app: FastAPI) -> None:
    """Every error of the application in the one shape."""

    @app.exception_handler(APIError)
    async def _api(request: Request, error: APIError) -> JSONResponse:
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(KvfoldError)
    async def _kvfold(request: Request, error: KvfoldError) -> JSONResponse:
        known = as_api_error(error)
        return JSONResponse(known.body, known.status, known.headers)

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        message, param = _explain(error)
        return JSONResponse(error_body(400, message, param), 400)

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        message = error.detail
        if error.status_code == 400:  # FastAPI's own words for a body that the JSON parser chokes on
            message = "the body cannot be read; send JSON in UTF-8 with numbers and nesting of ordinary size"
        if error.status_code == 404:
            message = f"there is no {request.url.path}; see /docs for what there is"
        return JSONResponse(error_body(error.status_code, str(message)), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def _defect(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse(error_body(500, "the server failed; its log says why"), 500)


def _explain(error: RequestValidationError) -> tuple[str, str | None]:
    """One sentence about the first thing that is wrong, and the field it is in."""
    first = error.errors()[0]
    where = [str(part) for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        return "the body is not valid JSON", None
    if not where:
        return "the body must be a JSON object with content type application/json", None
    param = where[0]
    field = ".".join(part for part in where if not _is_type(part))
    if first["type"] == "missing":
        return f"{field} is missing", param
    if first["type"] == "none_required":
        return f"{field} is not supported; leave it out", param
    return f"{field}: {first['msg'][0].lower()}{first['msg'][1:]}", param


def _is_type(part: str) -> bool:
    """Whether a part of a location names a member of a union and not a field."""
    return not part.replace("_", "").isalnum() or part in ("str", "int", "float", "bool", "list", "NamedTool")
