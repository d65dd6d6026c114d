"""The API against its own OpenAPI document: requests that schemathesis makes up from it, good and broken ones."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import requests
import schemathesis
from agent_http import Api, bearer
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import CHECKS, load_all_checks
from schemathesis.generation import GenerationMode

from flywheel_pipeline.delivery.api.headers import SECURITY_HEADERS

load_all_checks()
# Status, media type and body of each answer are those the document tells of.
CONFORMANCE = [
    CHECKS.get_one(name)
    for name in ("status_code_conformance", "content_type_conformance", "response_schema_conformance")
]
VARIED = {
    ("POST", "/api/agent/executions"),
    ("GET", "/agent/sync"),
    ("POST", "/api/agent/commands/{command_id}/ack"),
    ("POST", "/api/agent/state"),
}


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["good", "broken"])
def test_no_request_fails_the_server_and_each_answer_is_as_documented(api: Api, mode: GenerationMode) -> None:
    schema = schemathesis.openapi.from_dict(api.client.get("/openapi.json").json())
    operations: list[Any] = [found.ok() for found in schema.get_all_operations()]
    seen: Counter[tuple[str, str]] = Counter()

    for operation in operations:
        key = (operation.method.upper(), operation.path)
        if key in VARIED:
            _ask(api, operation, mode)
            seen[key] += 1
    assert seen.keys() == VARIED


def _ask(api: Api, operation: Any, mode: GenerationMode) -> None:
    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=12,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def answered(case: Any) -> None:
        told = case.as_transport_kwargs(base_url="http://testserver", headers=bearer(api.a))
        told.pop("cookies", None)
        prepared = requests.Request(**told).prepare()
        response = api.client.request(
            prepared.method or "", prepared.url or "", headers=dict(prepared.headers), content=prepared.body
        )
        # No manifest was built here: that is an answer of sync, and no failure.
        assert response.status_code < 500 or (operation.path, response.status_code) == ("/agent/sync", 503)
        case.validate_response(response, checks=CONFORMANCE)
        for name, _ in SECURITY_HEADERS:
            assert len(response.headers.get_list(name.decode())) == 1
        if response.status_code >= 400:
            assert {"code", "reason", "hint"} <= response.json().keys()

    answered()
