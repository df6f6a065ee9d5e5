"""Whatever fits the OpenAPI document, and much that does not: no 5xx, no answer that the document does not know.

`scripts/fuzz-api CASES` runs it with more cases than the suite has time for.
"""

from __future__ import annotations

import os
from collections import Counter

import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.service.http.fake import FakeService, fake_app, listening

CASES = int(os.environ.get("DMD2_FUZZ_CASES", "2000"))
CHECKS = [
    schemathesis.checks.not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]


def ask(operation: schemathesis.APIOperation, mode: GenerationMode, cases: int, statuses: Counter[str]) -> None:
    """So many cases of one route, that fit its schema or do not. Raises what `CHECKS` find."""
    # The others take texts for numbers.
    strict = mode is GenerationMode.NEGATIVE and operation.path == "/v1/images/generations"
    checks = [*CHECKS, negative_data_rejection] if strict else CHECKS

    @settings(
        max_examples=cases, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(operation.as_strategy(generation_mode=mode))
    def one(case: schemathesis.Case) -> None:
        response = case.call()
        statuses[f"{case.method} {case.path} {response.status_code}"] += 1
        case.validate_response(response, checks=checks)

    one()


def test_no_5xx_and_no_undocumented_answer() -> None:
    statuses: Counter[str] = Counter()
    app = fake_app(FakeService())
    # Before there is another thread: what this imports pytest rewrites, and CPython 3.11 may fail to parse in two.
    schema = schemathesis.openapi.from_dict(app.openapi())
    with listening(app) as url:
        schema.config.update(base_url=url)
        operations = [found.ok() for found in schema.get_all_operations()]
        posts = sum(bool(operation.body) for operation in operations)
        each = max(1, (CASES - len(operations) + posts) // (2 * posts - 1))
        for operation in operations:
            ask(operation, GenerationMode.POSITIVE, each if operation.body else 1, statuses)
            # In a form all that is given is a text, and schemathesis cannot make forms of files wrong.
            if operation.body and operation.path != "/v1/images/edits":
                ask(operation, GenerationMode.NEGATIVE, each, statuses)
    print(sum(statuses.values()), "cases", dict(statuses))
    assert {key for key in statuses if key.endswith(" 200")} >= {
        f"POST {path} 200" for path in ("/v1/images/generations", "/sdapi/v1/txt2img", "/sdapi/v1/options")
    }
