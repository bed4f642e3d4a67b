"""What the server refuses, and how it says so; what it gives up; who sees whose text; how it ends."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from transformers.generation.streamers import BaseStreamer

from specdec import timing
from specdec.core import Budget, Context, DraftTree
from specdec.drafters import SuffixDrafter
from specdec.server.tenants import Tenants, namespace
from tests import served
from tests.served import NAME, Served
from tests.tiny import prompt

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]
ALICE, BOB = "alice's own", "bob's own"
LIMITS = {
    "max_rows": 2,
    "max_waiting": 3,
    "max_new_tokens": 900,
    "max_prompt_tokens": 100,
    "max_choices": 4,
    "max_body_bytes": 20_000,
    "body_seconds": 0.5,
}


@pytest.fixture(scope="module", autouse=True)
def _no_long_timing() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "TIMING_SECONDS", 0.0)
        yield


@pytest.fixture(scope="module")
def model() -> Any:
    return served.model()


@pytest.fixture(scope="module")
def running(model: Any) -> Iterator[Served]:
    """One server with narrow limits and two tenants."""
    with served.served(model, [ALICE, BOB], **LIMITS) as made:
        yield made


def post(running: Served, body: Any, path: str = CHAT, token: str = ALICE, **options: Any) -> httpx.Response:
    headers = {"Authorization": f"Bearer {token}"}
    if isinstance(body, dict):
        body = {"model": NAME, **({"messages": HELLO} if path == CHAT else {}), **body}
        return httpx.post(running.url + path, json=body, headers=headers, timeout=served.FOR_EVER, **options)
    headers["Content-Type"] = "application/json"
    return httpx.post(running.url + path, content=body, headers=headers, timeout=served.FOR_EVER, **options)


def fault(response: httpx.Response) -> tuple[int, str]:
    """Status and code of an error in OpenAI's form."""
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    return response.status_code, body["error"]["code"]


class Held(BaseStreamer):
    """Holds up the pool's thread at its second token, until told to go on."""

    def __init__(self) -> None:
        self.reached, self.go_on, self.seen = threading.Event(), threading.Event(), 0

    def put(self, value: torch.Tensor) -> None:
        self.seen += 1
        if self.seen == 2:
            self.reached.set()
            self.go_on.wait(served.FOR_EVER)

    def end(self) -> None:
        """Nothing is held back."""


class TestRefused:
    @pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/models", "/metrics", "/nowhere"])
    @pytest.mark.parametrize(
        "header",
        [None, "Bearer wrong", "Bearer", f"Basic {ALICE}", ALICE, f"Bearer {ALICE}x", "Bearer \xff"],
    )
    def test_a_wrong_token(self, running: Served, path: str, header: str | None) -> None:
        headers = {} if header is None else {"Authorization": header.encode("latin-1")}
        for answer in (
            httpx.get(running.url + path, headers=headers),
            httpx.post(running.url + path, content=b"x" * 70_000, headers=headers),
        ):
            assert fault(answer) == (401, "invalid_api_key")
            assert answer.headers["www-authenticate"] == "Bearer"

    def test_the_right_one(self, running: Served) -> None:
        for token in (ALICE, BOB):
            headers = {"authorization": f"bearer  {token}"}
            assert httpx.get(f"{running.url}/v1/models", headers=headers).status_code == 200
        assert httpx.get(f"{running.url}/health").status_code == 200

    @pytest.mark.parametrize(
        ("body", "param"),
        [
            ({"messages": []}, "messages"),
            ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages"),
            ({"temperature": 2.1}, "temperature"),
            ({"temperature": "1"}, "temperature"),
            ({"top_p": 0}, "top_p"),
            ({"max_tokens": 0}, "max_tokens"),
            ({"stop": ["a"] * 5}, "stop"),
            ({"stop": ""}, "stop"),
            ({"seed": 2**63}, "seed"),
            ({"presence_penalty": 2.5}, "presence_penalty"),
            ({"logit_bias": {"x": 1}}, "logit_bias"),
            ({"logit_bias": {"258": 1}}, "logit_bias"),
            ({"response_format": {"type": "json_schema"}}, "response_format"),
            ({"tool_choice": "required"}, "tool_choice"),
            ({"temprature": 1}, "temprature"),
            ({"n": 5}, "n"),
            ({"n": 10**30}, "n"),
            ({"top_logprobs": 2}, "top_logprobs"),
            ({"messages": [{"role": "user", "content": None}], "model": None}, "model"),
        ],
        ids=str,
    )
    def test_fields_that_make_no_sense(self, running: Served, body: dict[str, Any], param: str) -> None:
        answer = post(running, body)
        assert fault(answer)[0] == 400
        assert answer.json()["error"]["param"].split(".")[0] == param

    @pytest.mark.parametrize(
        "body", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 9000, b'{"model": NaN}', b'{"user": "\\ud800"}']
    )
    def test_bodies_that_are_no_requests(self, running: Served, body: bytes) -> None:
        assert fault(post(running, body))[0] == 400

    @pytest.mark.parametrize("where", ["content", "user", "tool", "stop", "prediction"])
    def test_half_a_character(self, running: Served, where: str) -> None:
        """JSON can spell it, UTF-8 cannot."""
        half = "\ud800"
        tool = {"type": "function", "function": {"name": "f", "parameters": {half: half}}}
        more = {
            "content": {"messages": [{"role": "user", "content": half}]},
            "user": {"user": half},
            "tool": {"tools": [tool]},
            "stop": {"stop": half},
            "prediction": {"prediction": {"type": "content", "content": half}},
        }[where]
        body = json.dumps({"model": NAME, "messages": HELLO, "max_tokens": 3, **more})
        assert fault(post(running, body.encode()))[0] == 400

    def test_another_model(self, running: Served) -> None:
        assert fault(post(running, {"model": "another"})) == (404, "model_not_found")

    def test_what_is_not_there(self, running: Served) -> None:
        headers = {"Authorization": f"Bearer {ALICE}"}
        assert fault(httpx.get(f"{running.url}/v1/nothing", headers=headers)) == (404, "http_404")
        answer = httpx.get(running.url + CHAT, headers=headers)
        assert fault(answer) == (405, "http_405")
        assert answer.headers["allow"] == "POST"

    def test_what_a_template_refuses(self, running: Served, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(running.pool.tokenizer, "chat_template", "{{ raise_exception('only poems') }}")
        answer = post(running, {})
        assert fault(answer) == (400, "invalid_value")
        assert "only poems" in answer.json()["error"]["message"]
        monkeypatch.setattr(running.pool.tokenizer, "chat_template", None)
        assert fault(post(running, {})) == (400, "no_chat_template")

    def test_too_much_text(self, running: Served) -> None:
        long = {"messages": [{"role": "user", "content": "a" * 95}]}
        assert fault(post(running, long)) == (400, "context_length_exceeded")
        assert fault(post(running, {"max_tokens": 901}))[0] == 400
        prompts = {"prompt": ["a"] * 5}
        assert fault(post(running, prompts, "/v1/completions"))[0] == 400

    def test_more_than_the_model_knows(self) -> None:
        with served.served(served.model(max_position_embeddings=32)) as made:
            answer = post(made, {"prompt": "a" * 20, "max_tokens": 13}, "/v1/completions")
            assert fault(answer) == (400, "context_length_exceeded")
            assert post(made, {"prompt": "a" * 20, "max_tokens": 12}, "/v1/completions").status_code == 200
            usage = post(made, {"messages": [{"role": "user", "content": "a" * 20}]}).json()["usage"]
            assert usage["total_tokens"] <= 32
            assert fault(post(made, {"prompt": "a" * 32}, "/v1/completions"))[0] == 400

    @pytest.mark.parametrize("prompt", ["", [], [[]], [""], [258], [-1], [[1, 10**12]], [1, "a"]], ids=str)
    def test_prompts_that_are_none(self, running: Served, prompt: Any) -> None:
        assert fault(post(running, {"prompt": prompt}, "/v1/completions"))[0] == 400

    def test_a_body_that_is_too_large(self, running: Served) -> None:
        assert fault(post(running, b" " * 20_001)) == (413, "body_too_large")
        pieces = iter([b" " * 5000] * 100)
        answer = httpx.post(running.url + CHAT, content=pieces, headers={"Authorization": f"Bearer {ALICE}"})
        assert fault(answer) == (413, "body_too_large")

    def test_a_body_that_does_not_come(self, running: Served) -> None:
        with socket.create_connection(running.socket.getsockname()) as line:
            line.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ALICE}\r\n".encode())
            line.sendall(b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{")
            line.settimeout(10)
            answer = http.client.HTTPResponse(line)
            answer.begin()
            assert answer.status == 408
            assert json.loads(answer.read())["error"]["code"] == "body_too_slow"

    def test_too_many_requests(self, running: Served) -> None:
        """And all of one request's answers are given up when some of them are too many."""
        held = Held()
        first = running.pool.submit(prompt(5), max_new_tokens=12, streamer=held)
        held.reached.wait(served.FOR_EVER)
        try:
            answer = post(running, {"n": 4, "max_tokens": 5})
            assert fault(answer) == (429, "rate_limit_exceeded")
            assert int(answer.headers["retry-after"]) > 0
        finally:
            held.go_on.set()
        first.result(30)
        running.settle()
        assert post(running, {"n": 3, "max_tokens": 5}).status_code == 200

    @pytest.mark.parametrize("stream", [False, True])
    def test_an_answer_that_takes_too_long(self, stream: bool) -> None:
        with served.served(served.slow(0.02), timeout=1.0) as made:
            answer = post(made, {"stream": stream})
            if stream:
                last = answer.text.strip().splitlines()[-1]
                assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
            else:
                assert fault(answer) == (504, "timeout")
            made.settle()
            assert made.pool.outcomes["late"] == 1


def test_tokens() -> None:
    assert Tenants(["a", "b"]).find(b"Bearer b") == b"b"
    assert Tenants(["a", "b"]).find(b"Bearer c") is None
    assert Tenants().find(b"") == b""
    for bad in ("", " a", "a\n", "é"):
        with pytest.raises(ValueError, match="a token is"):
            Tenants([bad])
    names = {namespace(token, user) for token in (b"a", b"b", b"ab") for user in (None, "b", "bb", "\0")}
    assert len(names) == 12


class Watched(SuffixDrafter):
    """Notes what is drafted, in which namespace."""

    def __init__(self) -> None:
        super().__init__(factor=4.0, min_probability=0.0)
        self.seen: dict[str, list[int]] = {}

    def draft(self, contexts: Any, budgets: Any) -> list[DraftTree]:
        trees = super().draft(contexts, budgets)
        for context, tree in zip(contexts, trees, strict=True):
            self.seen.setdefault(context.namespace, []).extend(tree.tokens[1:].tolist())
        return trees


class TestTenants:
    def test_no_text_of_one_is_drafted_for_another(self) -> None:
        """What A was told by the model is drafted for A again, and for nobody else, though all ask the same."""
        drafter = Watched()
        with served.served(served.model(), [ALICE, BOB], drafter=drafter) as made:
            question = {"max_tokens": 60, "temperature": 0, "messages": [{"role": "user", "content": "the secret"}]}
            for _ in range(2):
                answer = post(made, {**question, "user": "x"}).json()
            others = [
                post(made, question, token=BOB).json(),
                post(made, {**question, "user": "x"}, token=BOB).json(),
                post(made, {**question, "user": "y"}).json(),
                post(made, question).json(),
            ]
        canary = answer["choices"][0]["message"]["content"]
        assert all(other["choices"][0]["message"]["content"] == canary for other in others)
        mine = drafter.seen.pop(namespace(ALICE.encode(), "x"))
        assert len(mine) > 30
        assert answer["usage"]["specdec"]["tokens_per_step"] > 2
        alone = _drafted_by_itself(made, question)
        for other in (*others, *drafter.seen):
            if isinstance(other, dict):
                assert other["usage"]["specdec"]["tokens_per_step"] < 1.5
            else:
                assert drafter.seen[other] == alone
        assert len(drafter.seen) == 4

    def test_a_prediction_is_for_its_own_request_alone(self, running: Served) -> None:
        predictions = running.service._predictions
        text = [5, 6, 7, 8, 9, 10]
        with predictions.expecting("a", [5], text):
            for name, drafted in (("a", 4), ("b", 0), ("", 0)):
                context = Context([5], name)
                (tree,) = predictions.draft([context], [Budget(4, 4, 2)])
                assert len(tree) - 1 == drafted, name
        (tree,) = predictions.draft([Context([5], "a")], [Budget(4, 4, 2)])
        assert len(tree) == 1


def _drafted_by_itself(made: Served, question: dict[str, Any]) -> list[int]:
    """What the same drafter guesses for the same answer when nobody else has been there."""
    drafter = Watched()
    with served.served(made.model, [ALICE], drafter=drafter) as fresh:
        post(fresh, question)
    (drafted,) = drafter.seen.values()
    return drafted


class TestGivenUp:
    def test_a_stream_that_nobody_reads(self, running: Served) -> None:
        before = running.pool.outcomes["cancelled"]
        body = {"model": NAME, "messages": HELLO, "stream": True, "n": 2, "logit_bias": {}}
        headers = {"Authorization": f"Bearer {ALICE}"}
        with httpx.stream("POST", running.url + CHAT, json=body, headers=headers) as answer:
            next(answer.iter_lines())
        running.settle()
        assert running.pool.outcomes["cancelled"] == before + 2
        assert not running.service._predictions._expected

    def test_a_request_that_nobody_waits_for(self, running: Served) -> None:
        """While it waits behind others, or is being written."""
        before, held = running.pool.outcomes["cancelled"], Held()
        running.pool.submit(prompt(5), max_new_tokens=12, streamer=held)
        held.reached.wait(served.FOR_EVER)
        body = {"model": NAME, "messages": HELLO, "prediction": {"type": "content", "content": "abc"}}
        try:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(running.url + CHAT, json=body, headers={"Authorization": f"Bearer {ALICE}"}, timeout=0.3)
            deadline = time.monotonic() + 10
            while running.pool.outcomes["cancelled"] == before and time.monotonic() < deadline:
                time.sleep(0.01)
        finally:
            held.go_on.set()
        assert running.pool.outcomes["cancelled"] == before + 1
        running.settle()
        assert not running.service._predictions._expected


class TestTheEnd:
    def test_what_has_begun_is_finished_and_memory_is_saved(self, model: Any, tmp_path: Path) -> None:
        path = tmp_path / "memory"
        with served.served(model, save_to=path) as made:
            client = openai.OpenAI(base_url=f"{made.url}/v1", api_key="any", max_retries=0)
            asked = {"model": NAME, "messages": HELLO, "max_tokens": 300, "temperature": 0}
            stream = client.chat.completions.create(**asked, stream=True)
            text = next(stream).choices[0].delta.content
            stopping = threading.Thread(target=made.stop)
            stopping.start()
            chunks = [*stream]
            stopping.join()
            text += "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            assert chunks[-1].choices[0].finish_reason in ("length", "stop")
            with pytest.raises(openai.APIConnectionError):
                client.models.list()
        memory = served.memory()
        memory.load(path)
        assert memory.namespaces == [namespace(b"", None)]
        with served.served(model) as again:
            again.memory.load(path)
            client = openai.OpenAI(base_url=f"{again.url}/v1", api_key="any", max_retries=0)
            whole = client.chat.completions.create(**asked)
            assert whole.choices[0].message.content == text
            assert whole.usage.specdec["tokens_per_step"] > 3

    def test_who_comes_too_late(self, model: Any) -> None:
        with served.served(model) as made:
            made.server.should_exit = False
            made.pool.close()
            assert fault(post(made, {})) == (503, "shutting_down")

    def test_while_it_stops_nobody_new_is_let_in(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """On a connection that is still open."""
        with served.served(model) as made, httpx.Client() as client:
            assert client.get(f"{made.url}/v1/models").status_code == 200
            monkeypatch.setattr(made.server, "main_loop", None)  # it has been entered, and is left by its own clock
            made.server.should_exit = True
            answer = client.get(f"{made.url}/v1/models")
            assert fault(answer) == (503, "shutting_down")
