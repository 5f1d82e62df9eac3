"""The OpenAPI document against the live server: what it says is what is answered."""

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.server.running import RunningServer

CHECKS: list[Any] = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
]
BODIES = ["/v1/chat/completions", "/v1/completions", "/v1/tokenize", "/cluster/roles"]
PLAIN = ["/v1/models", "/v1/models/{name}", "/health", "/ready", "/metrics", "/stats", "/pool"]
LONGEST = 4  # tokens of an answer: a body without a limit would get all that the model has room for


@pytest.fixture(scope="module")
def schema(server: RunningServer) -> Any:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def bounded(examples: int) -> settings:
    return settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        phases=(Phase.generate,),  # a failure is shown as it was found: shrinking would take minutes
        suppress_health_check=list(HealthCheck),
    )


def check(case: Any) -> None:
    if isinstance(case.body, dict) and case.path.endswith("completions"):
        case.body.setdefault("max_tokens", LONGEST)
        if isinstance(case.body["max_tokens"], int) and case.body["max_tokens"] > LONGEST:
            case.body["max_tokens"] = LONGEST
    case.call_and_validate(checks=CHECKS, timeout=60)


def test_every_operation_is_tested(schema: Any) -> None:
    found = {(result.ok().method.upper(), result.ok().path) for result in schema.get_all_operations()}
    assert found == {*(("POST", path) for path in BODIES), *(("GET", path) for path in PLAIN)}


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("mode", list(GenerationMode), ids=str)
def test_bodies(schema: Any, server: RunningServer, path: str, mode: GenerationMode) -> None:
    @given(case=schema[path]["POST"].as_strategy(generation_mode=mode))
    @bounded(40)
    def run(case: Any) -> None:
        check(case)

    run()
    server.wait_idle()


@pytest.mark.parametrize("path", PLAIN)
def test_plain_routes(schema: Any, path: str) -> None:
    @given(case=schema[path]["GET"].as_strategy())
    @bounded(3)
    def run(case: Any) -> None:
        check(case)

    run()


@pytest.mark.parametrize("path", BODIES[:2])
def test_streams_are_documented(schema: Any, path: str) -> None:
    body = {"model": "tiny", "max_tokens": LONGEST, "stream": True}
    body |= {"prompt": "A page"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "A page"}]}
    case = schema[path]["POST"].Case(body=body, media_type="application/json")
    response = case.call_and_validate(checks=CHECKS[:-1])
    assert response.headers["content-type"][0].startswith("text/event-stream")


@pytest.mark.parametrize("path", [*BODIES, *PLAIN])
def test_no_status_is_documented_that_is_never_sent(schema: Any, path: str) -> None:
    """FastAPI would document 422, which this server answers as 400."""
    for operation in schema.raw_schema["paths"][path].values():
        assert "422" not in operation["responses"]
