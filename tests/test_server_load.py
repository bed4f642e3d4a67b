"""Sixty-four clients with requests made from the OpenAPI, right and wrong: promised answers, and nothing stays."""

from __future__ import annotations

import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import httpx
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode

from specdec import timing
from tests import served
from tests.served import FOR_EVER, NAME

TOKEN = "a token"
PROMISED = {200, 400, 401, 404, 405, 408, 413, 429, 503, 504}
CHECKS = ("not_a_server_error", "status_code_conformance", "response_schema_conformance")
GENERATED = settings(deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))


def cases(url: str, examples: int) -> list[Any]:
    """Requests to every operation: as the schema has them, and against it."""
    found: list[Any] = []
    for operation in schemathesis.openapi.from_url(f"{url}/openapi.json").get_all_operations():
        for mode in GenerationMode:
            collect(operation.ok(), mode, examples, found)
    return found


def collect(operation: Any, mode: GenerationMode, examples: int, found: list[Any]) -> None:
    @seed(0)
    @settings(GENERATED, max_examples=examples)
    @given(case=operation.as_strategy(generation_mode=mode))
    def take(case: Any) -> None:
        if isinstance(case.body, dict) and "model" in case.body and len(found) % 4:
            case.body["model"] = NAME  # any other is soon refused
        found.append(case)

    with suppress(Unsatisfiable):  # nothing about an operation without parameters can be wrong
        take()


def play(url: str, examples: int) -> Counter[int]:
    """Send them all, 64 at a time, some by clients that do not wait; the statuses."""
    asked = cases(url, examples)
    random.Random(0).shuffle(asked)

    def send(i: int) -> int:
        case, headers = asked[i], {"Authorization": f"Bearer {TOKEN}" if i % 16 else "Bearer wrong"}
        try:
            response = case.call(headers=headers, timeout=0.05 if i % 8 == 5 else FOR_EVER)
        except requests.Timeout:
            if i % 8 == 5:
                return 0
            raise
        assert response.status_code in PROMISED, (case.as_curl_command(), response.text)
        checks = [schemathesis.checks.CHECKS.get_one(name) for name in CHECKS]
        case.validate_response(response, checks=checks)
        return int(response.status_code)

    with ThreadPoolExecutor(64) as clients:
        return Counter(clients.map(send, range(len(asked))))


@pytest.mark.parametrize("examples", [12, pytest.param(150, marks=pytest.mark.slow)])
def test_every_answer_is_one_that_is_promised(examples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "TIMING_SECONDS", 0.0)
    limits = {"max_rows": 8, "max_waiting": 16, "max_new_tokens": 24, "max_body_bytes": 100_000, "timeout": FOR_EVER}
    with served.served(served.model(), [TOKEN], **limits) as made:
        statuses = play(made.url, examples)
        assert all(statuses[status] > 0 for status in (200, 400, 401)), statuses
        made.settle()
        assert not made.service._predictions._expected
        assert made.memory.bytes_used <= made.memory.max_bytes
        assert made.pool.outcomes["failed"] == 0
        assert made.pool.stats.fault_count == 0
        # It still writes what it wrote.
        asked = {"model": NAME, "prompt": "abc", "temperature": 0}
        headers = {"Authorization": f"Bearer {TOKEN}"}
        answer = httpx.post(f"{made.url}/v1/completions", json=asked, headers=headers, timeout=FOR_EVER)
        ids = made.pool.generate(made.pool.tokenizer.encode("abc"), max_new_tokens=16, do_sample=False)[0, 3:]
        assert answer.json()["choices"][0]["text"] == made.pool.tokenizer.decode(ids, skip_special_tokens=True)


def test_sixty_four_at_once_get_what_each_gets_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "TIMING_SECONDS", 0.0)
    with served.served(served.model(), max_rows=8) as made:

        def ask(i: int) -> str:
            asked = {"model": NAME, "prompt": f"text {i % 16}", "temperature": 0, "max_tokens": 10 + i % 4}
            answer = httpx.post(f"{made.url}/v1/completions", json=asked, timeout=FOR_EVER)
            text: str = answer.json()["choices"][0]["text"]
            return text

        with ThreadPoolExecutor(64) as clients:
            together = list(clients.map(ask, range(64)))
        assert together == 4 * list(map(ask, range(16)))
