"""A pool's answers are those of ``generate``, whoever else is asking, failing or giving up at the same time."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

import specdec
from specdec import timing
from specdec.drafters import SuffixDrafter
from specdec.policies import FixedPolicy
from specdec.pool import PoolFull, SessionPool, engine
from specdec.pool.engine import TooLarge
from tests import tiny
from tests.tiny import Oracle, prompt, quietly

POLICY = FixedPolicy(12, 5, 6)
KINDS: dict[str, dict[str, Any]] = {"Llama": {}, "Mistral": {"sliding_window": 8}, "Gemma2": {"sliding_window": 6}}


@pytest.fixture(autouse=True)
def _no_long_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every pool times passes at first; how long they take is of no interest here."""
    monkeypatch.setattr(timing, "TIMING_SECONDS", 0.0)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.build("Llama").double()  # so that no choice hangs on how a pass of several rows is rounded


@pytest.fixture(scope="module")
def known(model: Any) -> Oracle:
    """A drafter that knows how a few prompts go on."""
    return Oracle([alone(model, prompt(9, seed=seed), max_new_tokens=80, eos_token_id=None) for seed in range(9)])


@contextmanager
def pool(model: Any, drafter: Any = None, **options: Any) -> Iterator[SessionPool]:
    """A pool that must be empty in the end: no rows, no KV slots, no thread."""
    made = SessionPool(model, drafter=drafter or Oracle(), **{"policy": POLICY, "max_rows": 4, **options})
    with made:
        yield made
    assert (made.rows_in_use, made.waiting, made.cache_bytes) == (0, 0, 0)
    assert not [thread for thread in threading.enumerate() if thread.name == "specdec pool"]


def alone(model: Any, ids: torch.Tensor, seed: int | None = None, **arguments: Any) -> list[int]:
    """What plain ``generate`` says."""
    if seed is not None:
        torch.manual_seed(seed)
    text: list[int] = model.generate(ids, **arguments)[0].tolist()
    return text


class Gate(BaseStreamer):
    """Calls something with the number of tokens that have come, the prompt not counted; may hold everything up."""

    def __init__(self, act: Callable[[int], Any]) -> None:
        self.act, self.tokens, self.ended = act, -1, 0

    def put(self, value: torch.Tensor) -> None:
        self.tokens += 1 if value.ndim == 1 or self.tokens < 0 else value.numel()
        self.act(self.tokens)

    def end(self) -> None:
        self.ended += 1


@contextmanager
def held(pool: SessionPool) -> Iterator[Any]:
    """A request that keeps the pool's thread where it is until the block ends."""
    reached, go_on = threading.Event(), threading.Event()

    def act(tokens: int) -> None:
        if tokens == 2:
            reached.set()
            go_on.wait(300)

    request = pool.submit(prompt(5, seed=77), max_new_tokens=12, streamer=Gate(act))
    reached.wait(300)
    try:
        yield request
    finally:
        go_on.set()


class Counting(LogitsProcessor):
    """Forbids as many tokens as it has been called: right only if called once per token, in order."""

    def __init__(self, fail_at: int = -1) -> None:
        self.calls, self.fail_at = 0, fail_at

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls == self.fail_at:
            raise ZeroDivisionError("by none")
        scores[:, 3 : 3 + self.calls % 40] = -torch.inf
        return scores


class StopAt(StoppingCriteria):
    """Ends the text at some length, or fails there."""

    def __init__(self, length: int, error: Exception | None = None) -> None:
        self.length, self.error = length, error

    def __call__(self, input_ids: torch.Tensor, scores: Any, **others: Any) -> torch.Tensor:
        if input_ids.shape[1] >= self.length and self.error is not None:
            raise self.error
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


def requests() -> list[tuple[torch.Tensor, Callable[[], dict[str, Any]]]]:
    """Prompts of many lengths, with whatever shapes an output; arguments are made anew for each call."""
    kinds: list[Callable[[int], dict[str, Any]]] = [
        lambda n: {"max_new_tokens": 5 + 3 * n},
        lambda n: {"max_new_tokens": 40, "do_sample": True, "temperature": 0.7, "seed": n},
        lambda n: {"max_new_tokens": 30, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        lambda n: {"max_new_tokens": 30, "logits_processor": [Counting()]},
        lambda n: {"max_new_tokens": 50, "eos_token_id": [*range(3, 13)]},
        lambda n: {"max_new_tokens": 50, "stopping_criteria": [StopAt(20 + n)]},
        lambda n: {"max_new_tokens": 25, "do_sample": True, "top_k": 9, "top_p": 0.9, "seed": 3 * n},
        lambda n: {"max_new_tokens": 1},
    ]
    asked = range(24)
    return [(prompt(2 + 5 * n % 31, seed=n), lambda n=n: kinds[n % len(kinds)](n)) for n in asked]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompt_tokens", [512, 4])
def test_outputs_are_those_of_generate(kind: str, prompt_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows join and leave at any step, at any length, prompts in one piece or in many."""
    monkeypatch.setattr(engine, "PROMPT_TOKENS", prompt_tokens)
    model = tiny.build(kind, **KINDS[kind]).double()
    expected = [alone(model, ids, **make()) for ids, make in requests()]
    with pool(model, Oracle(expected)) as many:
        answers = [many.submit(ids, **make()) for ids, make in requests()]
        assert [answer.result(60)[0].tolist() for answer in answers] == expected
        assert many.stats.level == "tree"
        assert many.stats.accepted > 50
        assert not many.stats.faults
        assert many.stats.generations == len(expected)
        assert sum(answer.stats.tokens for answer in answers) == many.stats.tokens
        assert not many.stats.plain_generations


def test_one_pass_serves_all_rows(model: Any) -> None:
    passes = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    with pool(model, policy=FixedPolicy(0)) as many, held(many):
        answers = [many.submit(prompt(9, seed=seed), max_new_tokens=20, eos_token_id=None) for seed in range(3)]
    hook.remove()
    assert all(answer.done() for answer in answers)
    assert max(rows for rows, _ in passes) == 4
    assert len([rows for rows, nodes in passes if nodes == 1]) < 3 * 20


def test_with_the_usual_parts_and_a_float32_model() -> None:
    """Kernels, merged drafters, measured costs; prompts whose choices are clear."""
    model = tiny.build("Llama", hidden_size=64, num_attention_heads=2, num_key_value_heads=1)
    asked, expected = [], []
    for seed in range(12):
        ids = prompt(4 + seed, seed=seed)
        output = model.generate(ids, max_new_tokens=40, output_logits=True, return_dict_in_generate=True)
        best = torch.stack([step[0].topk(2).values for step in output.logits])
        if float((best[:, 0] - best[:, 1]).min()) > 1e-3:
            asked.append(ids)
            expected.append(output.sequences.tolist())
    assert len(asked) > 3
    with SessionPool(model) as many:
        for _ in range(3):
            answers = [many.submit(ids, max_new_tokens=40) for ids in asked]
            assert [answer.result(60).tolist() for answer in answers] == expected


def test_scores_and_logits_are_returned(model: Any, known: Oracle) -> None:
    arguments = {"max_new_tokens": 20, "return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    plain = model.generate(prompt(9, seed=1), repetition_penalty=1.2, **arguments)
    with pool(model, known) as many, held(many):
        answer = many.submit(prompt(9, seed=1), repetition_penalty=1.2, **arguments)
    ours = answer.result()
    assert ours.sequences.tolist() == plain.sequences.tolist()
    for name in ("scores", "logits"):
        torch.testing.assert_close(torch.cat(getattr(ours, name)), torch.cat(getattr(plain, name)), rtol=0, atol=1e-5)
    assert ours.past_key_values is None
    assert ours.stats is answer.stats


class TestSampling:
    def test_a_seed_is_that_of_generate_in_any_company(self, model: Any) -> None:
        expected = [alone(model, prompt(9, seed=n), n, max_new_tokens=30, do_sample=True) for n in range(6)]
        for drafter in (Oracle(), Oracle(expected)):
            with pool(model, drafter, max_rows=3) as many:
                torch.manual_seed(5)
                asked = [many.submit(prompt(9, seed=n), seed=n, max_new_tokens=30, do_sample=True) for n in range(6)]
                others = [many.submit(prompt(5, seed=n), max_new_tokens=30, do_sample=True) for n in range(6)]
                assert [each.result(60)[0].tolist() for each in asked] == expected
                assert all(each.result(60) is not None for each in others)

    def test_without_a_seed_torchs_generator_is_drawn_from(self, model: Any, known: Oracle) -> None:
        expected = alone(model, prompt(9, seed=1), 7, max_new_tokens=30, do_sample=True)
        with pool(model, known) as many:
            torch.manual_seed(7)
            assert many.generate(prompt(9, seed=1), max_new_tokens=30, do_sample=True)[0].tolist() == expected

    def test_a_seed_leaves_torchs_generator_alone(self, model: Any, known: Oracle) -> None:
        state = torch.get_rng_state()
        with pool(model, known) as many:
            many.generate(prompt(9, seed=1), seed=3, max_new_tokens=30, do_sample=True)
            with quietly():
                many.generate(prompt(9, seed=1), seed=3, max_new_tokens=9, do_sample=True, num_return_sequences=2)
        assert torch.equal(torch.get_rng_state(), state)


class TestText:
    def test_text_comes_back_as_text(self, model: Any, known: Oracle) -> None:
        tokenizer = tiny.tokenizer()
        ids = tokenizer("hello", return_tensors="pt")["input_ids"]
        expected = tokenizer.decode(alone(model, ids, max_new_tokens=30)[5:], skip_special_tokens=True)
        with pool(model, known, tokenizer=tokenizer) as many:
            assert many.generate("hello", max_new_tokens=30) == expected
            assert "".join(many.stream("hello", max_new_tokens=30)) == expected

    def test_stop_strings(self, model: Any, known: Oracle) -> None:
        tokenizer = tiny.tokenizer()
        text = tokenizer.decode(alone(model, prompt(9, seed=2), max_new_tokens=60))
        stop = text[30:32]
        expected = alone(model, prompt(9, seed=2), max_new_tokens=60, stop_strings=[stop], tokenizer=tokenizer)
        with pool(model, known, tokenizer=tokenizer) as many:
            assert many.generate(prompt(9, seed=2), max_new_tokens=60, stop_strings=[stop])[0].tolist() == expected
        assert len(expected) < 69

    def test_text_needs_a_tokenizer(self, model: Any) -> None:
        with pool(model) as many, pytest.raises(ValueError, match="no tokenizer"):
            many.generate("hello")

    def test_ids_stream_as_ids(self, model: Any, known: Oracle) -> None:
        expected = alone(model, prompt(9, seed=2), max_new_tokens=30)
        with pool(model, known) as many:
            assert [*many.stream(prompt(9, seed=2), max_new_tokens=30)] == expected[9:]
            assert [*many.stream(prompt(9, seed=2)[0].tolist(), max_new_tokens=30)] == expected[9:]

    def test_a_stream_that_is_left_is_cancelled(self, model: Any) -> None:
        with pool(model) as many:
            stream = many.stream(prompt(9), max_new_tokens=400, eos_token_id=None)
            next(stream)
            stream.close()
            many.drain(30)
            assert many.outcomes == {"cancelled": 1}

    def test_a_stream_raises_what_its_generation_raises(self, model: Any) -> None:
        with pool(model) as many, pytest.raises(ZeroDivisionError):
            [*many.stream(prompt(9), max_new_tokens=40, logits_processor=[Counting(fail_at=7)])]


class TestGivingUp:
    def test_cancelled_midway(self, model: Any, known: Oracle) -> None:
        """The row is freed at once, and those beside it go on as if nothing had been."""
        expected = alone(model, prompt(9, seed=1), max_new_tokens=60)
        with pool(model, known) as many:
            with held(many) as other:
                asked: list[Any] = []
                gate = Gate(lambda tokens: tokens == 5 and asked[0].cancel())
                asked.append(many.submit(prompt(9), max_new_tokens=400, eos_token_id=None, streamer=gate))
                beside = many.submit(prompt(9, seed=1), max_new_tokens=60)
            assert beside.result(30)[0].tolist() == expected
            assert other.result(30) is not None
            many.drain(30)
            assert many.outcomes == {"finished": 2, "cancelled": 1}
        with pytest.raises(CancelledError):
            asked[0].result()
        assert gate.tokens < 20
        assert gate.ended == 1

    def test_cancelled_while_waiting(self, model: Any) -> None:
        with pool(model, max_rows=1) as many, held(many):
            waiting = [many.submit(prompt(), max_new_tokens=5) for _ in range(3)]
            assert waiting[1].cancel()
        assert [each.cancelled() for each in waiting] == [False, True, False]
        assert waiting[2].result().shape == (1, 14)

    def test_a_finished_request_cannot_be_cancelled(self, model: Any) -> None:
        with pool(model) as many:
            request = many.submit(prompt(), max_new_tokens=5)
            request.result(30)
            assert not request.cancel()

    def test_time_out_while_writing(self, model: Any, known: Oracle) -> None:
        with pool(model, known) as many:
            gate = Gate(lambda tokens: threading.Event().wait(0.02))
            late = many.submit(prompt(9), timeout=0.3, max_new_tokens=400, eos_token_id=None, streamer=gate)
            beside = many.submit(prompt(9, seed=1), max_new_tokens=60)
            assert beside.result(30)[0].tolist() == alone(model, prompt(9, seed=1), max_new_tokens=60)
            with pytest.raises(TimeoutError, match=r"within 0\.3 seconds"):
                late.result(30)
            assert 0 < gate.tokens < 400
            assert many.outcomes == {"finished": 1, "late": 1}

    def test_time_out_while_waiting(self, model: Any) -> None:
        with pool(model, max_rows=1) as many:
            with held(many):
                late = many.submit(prompt(), timeout=0.01, max_new_tokens=5)
                threading.Event().wait(0.05)
            with pytest.raises(TimeoutError):
                late.result(30)

    def test_time_out_of_a_request_that_runs_alone(self, model: Any) -> None:
        with pool(model) as many, quietly():
            late = many.submit(prompt(9, 2), timeout=0.2, max_new_tokens=490, eos_token_id=None)
            with pytest.raises(TimeoutError):
                late.result(30)
            assert many.generate(prompt(), max_new_tokens=5).shape == (1, 14)


class TestLimits:
    def test_a_full_pool_says_so(self, model: Any) -> None:
        with pool(model, max_rows=1, max_waiting=2) as many:
            with held(many):
                waiting = [many.submit(prompt(), max_new_tokens=5) for _ in range(2)]
                with pytest.raises(PoolFull, match="2 requests wait for 1 rows"):
                    many.submit(prompt(), max_new_tokens=5)
                waiting[0].cancel()
                many.submit(prompt(), max_new_tokens=5)
            many.drain(30)
            assert many.outcomes == {"finished": 3, "cancelled": 1}

    def test_first_come_first_served(self, model: Any) -> None:
        order = []
        with pool(model, max_rows=1) as many, held(many):
            for n in range(5):
                many.submit(prompt(), max_new_tokens=5 - n).add_done_callback(lambda _, n=n: order.append(n))
        assert order == [0, 1, 2, 3, 4]

    def test_memory_is_waited_for(self, model: Any) -> None:
        """Requests are let in as far as they fit, whatever they may grow to."""
        expected = [alone(model, prompt(9, seed=n), max_new_tokens=40 + n) for n in range(8)]
        bytes_of_token = 2 * 2 * 2 * 8 * 8  # layers, keys and values, heads, width, float64
        most = bytes_of_token * 4000
        seen = []
        with pool(model, max_cache_bytes=most, max_rows=8) as many:
            note = lambda tokens: seen.append((many.rows_in_use, many.cache_bytes))  # noqa: E731
            asked = [many.submit(prompt(9, seed=n), max_new_tokens=40 + n, streamer=Gate(note)) for n in range(8)]
            assert [each.result(30)[0].tolist() for each in asked] == expected
        rows, held = (max(each) for each in zip(*seen, strict=True))
        assert 1 < rows < 8
        assert held <= most

    def test_what_would_never_fit_is_refused(self, model: Any) -> None:
        with pool(model, max_cache_bytes=600_000) as many:
            for _ in range(2):
                with pytest.raises(TooLarge, match=r"up to 489 tokens need \d+ bytes of KV rows"):
                    many.generate(prompt(), max_new_tokens=480)
                assert many.generate(prompt(), max_new_tokens=4).shape == (1, 13)

    @pytest.mark.parametrize("limits", [{"max_rows": 0}, {"max_waiting": 0}, {"max_cache_bytes": 0}])
    def test_limits_that_make_no_sense(self, model: Any, limits: dict[str, int]) -> None:
        with pytest.raises(ValueError, match="limits are 1 at least"):
            SessionPool(model, **limits)


class Breaking(Oracle):
    """Raises at every third call."""

    def draft(self, contexts: Any, budgets: Any) -> Any:
        if self.calls % 3 == 2:
            self.calls += 1
            raise ZeroDivisionError("by none")
        return super().draft(contexts, budgets)


class TestFaults:
    def test_one_that_fails_takes_no_other_with_it(self, model: Any, known: Oracle) -> None:
        def breaks(tokens: int) -> None:
            if tokens == 6:
                raise OSError("nobody listens")

        bad: dict[str, tuple[type[Exception], dict[str, Any]]] = {
            "processor": (ZeroDivisionError, {"logits_processor": [Counting(fail_at=7)]}),
            "first token": (ZeroDivisionError, {"logits_processor": [Counting(fail_at=1)]}),
            "criterion": (KeyError, {"stopping_criteria": [StopAt(17, KeyError("end"))]}),
            "streamer": (OSError, {"streamer": Gate(breaks)}),
            "argument": (ValueError, {"nonsense": 3}),
            "no number": (RuntimeError, {"do_sample": True, "sequence_bias": {(5,): float("nan")}}),
        }
        expected = [alone(model, prompt(9, seed=n), max_new_tokens=50) for n in range(6)]
        with pool(model, known, max_rows=9) as many:
            with held(many):
                good, failing = [], []
                for n, (_, arguments) in enumerate(bad.values()):
                    good.append(many.submit(prompt(9, seed=n), max_new_tokens=50))
                    failing.append(many.submit(prompt(9, seed=n), **{"max_new_tokens": 50, **arguments}))
                failing.append(many.submit([5, 999, 5], max_new_tokens=5))
            for (name, (error, _)), request in zip([*bad.items(), ("token", (ValueError, {}))], failing, strict=True):
                assert isinstance(request.exception(30), error), name
            assert [each.result(30)[0].tolist() for each in good] == expected
            assert many.outcomes == {"finished": 7, "failed": 7}

    def test_a_drafter_that_raises(self, model: Any, known: Oracle) -> None:
        expected = [alone(model, prompt(9, seed=n), max_new_tokens=50) for n in range(6)]
        with quietly(), pool(model, Breaking(expected)) as many:
            answers = [many.submit(prompt(9, seed=n), max_new_tokens=50) for n in range(6)]
            assert [each.result(30)[0].tolist() for each in answers] == expected
            assert many.stats.fault_count > 3
            assert many.stats.accepted > 20

    def test_a_pass_that_raises_fails_its_rows_and_no_later_ones(self, model: Any, known: Oracle) -> None:
        with pool(model, known) as many:
            fail = [True]

            def breaks(module: Any, args: Any, kwargs: Any) -> None:
                if len(kwargs["input_ids"]) == 3 and fail[0]:
                    raise MemoryError("full")

            hook = model.register_forward_pre_hook(breaks, with_kwargs=True)
            with held(many) as other:
                asked = [many.submit(prompt(9, seed=n), max_new_tokens=50) for n in range(2)]
            assert [type(each.exception(30)) for each in (other, *asked)] == [MemoryError] * 3
            hook.remove()
            expected = alone(model, prompt(9), max_new_tokens=50)
            assert many.generate(prompt(9), max_new_tokens=50)[0].tolist() == expected

    def test_rows_of_no_numbers_leave_nothing_behind(self, model: Any, known: Oracle) -> None:
        """Whoever is given the slots of a row that was poisoned meets none of it."""
        lengths = (80, 40, 40, 40)
        expected = [alone(model, prompt(9, seed=n), max_new_tokens=length) for n, length in enumerate(lengths)]
        with pool(model, known, max_rows=2) as many:

            def poison(tokens: int) -> None:
                rows = [row.request for row in many._engine.rows]
                if tokens == 20 and rows.index(asked[0]) == len(rows) - 1 > 0:
                    for layer in many._engine.batch.cache.slots:
                        layer._keys[len(rows) - 1] = layer._values[len(rows) - 1] = torch.nan
                    poisoned.append(True)

            asked, poisoned = list[Any](), list[bool]()
            with held(many):
                good = [many.submit(prompt(9), max_new_tokens=80)]
                asked.append(
                    many.submit(prompt(9, seed=5), max_new_tokens=30, streamer=Gate(poison), eos_token_id=None)
                )
                good += [many.submit(prompt(9, seed=n), max_new_tokens=40) for n in (1, 2, 3)]
            assert [each.result(30)[0].tolist() for each in good] == expected
            assert asked[0].done()
            assert poisoned

    @pytest.mark.parametrize("asks", [lambda many: many, lambda many: many.session()], ids=["pool", "session"])
    def test_waiting_for_oneself_is_an_error(self, model: Any, asks: Callable[[Any], Any]) -> None:
        with pool(model) as many:
            gate = Gate(lambda tokens: asks(many).generate(prompt()))
            with pytest.raises(RuntimeError, match="wait for itself"):
                many.generate(prompt(), streamer=gate)


class TestAlone:
    """What cannot be a row of a batch is answered all the same."""

    @pytest.mark.parametrize(
        ("why", "arguments"),
        [
            ("several sequences", {"num_return_sequences": 2, "do_sample": True, "seed": 4}),
            ("beam", {"num_beams": 3}),
            ("inputs_embeds|embeddings", {"inputs_embeds": torch.ones(1, 4, 32, dtype=torch.float64)}),
            ("positions", {"max_new_tokens": 600}),
            ("prompt_lookup", {"prompt_lookup_num_tokens": 3}),
            ("hidden", {"attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1]])}),
        ],
    )
    def test_by_the_ordinary_path(self, model: Any, known: Oracle, why: str, arguments: dict[str, Any]) -> None:
        def ask(generate: Callable[..., Any]) -> Any:
            given = {"max_new_tokens": 12, **arguments}
            return generate(prompt(9, seed=1), **given)

        seed = arguments.get("seed")
        expected = ask(lambda ids, seed=None, **given: (torch.manual_seed(seed or 0), model.generate(ids, **given))[1])
        with quietly(), pool(model, known) as many, held(many):
            beside = many.submit(prompt(9, seed=2), max_new_tokens=30)
            answer = ask(many.submit)
        assert answer.result().tolist() == expected.tolist(), seed
        assert beside.result()[0].tolist() == alone(model, prompt(9, seed=2), max_new_tokens=30)
        assert any("ran alone" in reason for reason in many.stats.reasons)
        assert [reason for reason in many.stats.reasons if __import__("re").search(why, reason)], many.stats.reasons

    def test_models_that_take_chains_only(self) -> None:
        model = tiny.build("Mamba").double()
        expected = [alone(model, prompt(9, seed=n), max_new_tokens=20) for n in range(3)]
        with quietly(), pool(model) as many:
            answers = [many.submit(prompt(9, seed=n), max_new_tokens=20) for n in range(3)]
            assert [each.result(60)[0].tolist() for each in answers] == expected

    def test_a_caches_rows_are_the_callers(self, model: Any) -> None:
        from transformers import DynamicCache

        cache, ids = DynamicCache(config=model.config), prompt(9)
        model(input_ids=ids[:, :5], past_key_values=cache)
        with quietly(), pool(model) as many:
            answer = many.generate(ids, past_key_values=cache, max_new_tokens=10)
        assert answer[0].tolist() == alone(model, ids, max_new_tokens=10)
        assert cache.get_seq_length() == 18


class TestAsyncio:
    def test_many_tasks(self, model: Any, known: Oracle) -> None:
        expected = [alone(model, prompt(9, seed=n), max_new_tokens=30) for n in range(8)]

        async def ask(many: SessionPool) -> list[Any]:
            return await asyncio.gather(*(many.agenerate(prompt(9, seed=n), max_new_tokens=30) for n in range(8)))

        with pool(model, known) as many:
            assert [answer[0].tolist() for answer in asyncio.run(ask(many))] == expected

    def test_a_cancelled_task_frees_its_row(self, model: Any) -> None:
        async def ask(many: SessionPool) -> None:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(many.agenerate(prompt(), max_new_tokens=400, eos_token_id=None), 0.1)

        with pool(model) as many:
            asyncio.run(ask(many))
            many.drain(30)
            assert many.outcomes == {"cancelled": 1}

    def test_streams(self, model: Any, known: Oracle) -> None:
        async def read(many: SessionPool, seed: int) -> list[int]:
            return [token async for token in many.astream(prompt(9, seed=seed), max_new_tokens=30)]

        async def ask(many: SessionPool) -> list[list[int]]:
            return await asyncio.gather(*(read(many, seed) for seed in range(4)))

        with pool(model, known) as many:
            got = asyncio.run(ask(many))
        assert got == [alone(model, prompt(9, seed=seed), max_new_tokens=30)[9:] for seed in range(4)]

    def test_a_stream_that_is_left_is_cancelled(self, model: Any) -> None:
        async def read(many: SessionPool) -> None:
            stream = many.astream(prompt(9), max_new_tokens=400, eos_token_id=None)
            await anext(stream)
            await stream.aclose()

        with pool(model) as many:
            asyncio.run(read(many))
            many.drain(30)
            assert many.outcomes == {"cancelled": 1}

    def test_errors_are_raised(self, model: Any) -> None:
        async def ask(many: SessionPool) -> None:
            with pytest.raises(ZeroDivisionError):
                await many.agenerate(prompt(9), max_new_tokens=40, logits_processor=[Counting(fail_at=7)])
            with pytest.raises(ZeroDivisionError):
                async for _ in many.astream(prompt(9), max_new_tokens=40, logits_processor=[Counting(fail_at=7)]):
                    pass

        with pool(model) as many:
            asyncio.run(ask(many))


class TestClosing:
    def test_those_taken_are_answered(self, model: Any) -> None:
        with pool(model, max_rows=1) as many:
            answers = [many.submit(prompt(), max_new_tokens=20) for _ in range(5)]
        assert all(each.result(0).shape == (1, 29) for each in answers)
        with pytest.raises(ValueError, match="closed"):
            many.generate(prompt())
        many.close()

    def test_or_cancelled(self, model: Any) -> None:
        many = SessionPool(model, drafter=Oracle(), policy=POLICY, max_rows=1)
        answers = [many.submit(prompt(), max_new_tokens=400, eos_token_id=None) for _ in range(5)]
        many.close(cancel=True)
        assert all(each.cancelled() for each in answers)
        assert many.rows_in_use == many.cache_bytes == many.waiting == 0

    def test_an_error_in_the_block_cancels(self, model: Any) -> None:
        def leave(many: SessionPool) -> None:
            with many:
                answers.append(many.submit(prompt(), max_new_tokens=400, eos_token_id=None))
                raise KeyError

        answers: list[Any] = []
        with pytest.raises(KeyError):
            leave(SessionPool(model, drafter=Oracle(), policy=POLICY))
        assert answers[0].cancelled()

    def test_draining_ends_in_time_or_says_so(self, model: Any) -> None:
        with pool(model) as many:
            with held(many), pytest.raises(TimeoutError, match="1 requests"):
                many.drain(0.05)
            many.drain(30)


class TestMemory:
    def test_drafters_learn_from_finished_rows(self, model: Any) -> None:
        with pool(model, SuffixDrafter(min_probability=0.0)) as many:
            first = many.submit(prompt(9, seed=3), max_new_tokens=60, eos_token_id=None)
            first.result(30)
            again = many.submit(prompt(9, seed=3), max_new_tokens=60, eos_token_id=None)
            assert again.result(30).tolist() == first.result().tolist()
        assert again.stats.steps < first.stats.steps

    def test_no_namespace_sees_anothers_text(self, model: Any) -> None:
        drafted: set[int] = set()

        class Seen(SuffixDrafter):
            def draft(self, contexts: Any, budgets: Any) -> Any:
                trees = super().draft(contexts, budgets)
                for context, tree in zip(contexts, trees, strict=True):
                    if context.namespace == "ours":
                        drafted.update(set(tree.tokens[1:].tolist()) - set(context.tokens.tolist()))
                return trees

        with pool(model, Seen(min_probability=0.0)) as many:
            for namespace in ("theirs", "ours"):
                answers = [
                    many.submit(prompt(9, seed=3), max_new_tokens=60, eos_token_id=None, namespace=namespace)
                    for _ in range(2 if namespace == "theirs" else 1)
                ]
                [each.result(30) for each in answers]
        assert not drafted


def test_sessions_of_a_pool(model: Any, known: Oracle) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}|{% endfor %}"
    ids = tokenizer("hello|", return_tensors="pt")["input_ids"]
    expected = tokenizer.decode(alone(model, ids, max_new_tokens=30)[6:], skip_special_tokens=True)
    with pool(model, known, tokenizer=tokenizer) as many, many.session("ours") as session:
        assert session.chat([{"role": "user", "content": "hello"}], max_new_tokens=30) == expected
        assert session.generate("hello|", max_new_tokens=30) == expected
        assert "".join(session.stream("hello|", max_new_tokens=30)) == expected
        assert [turn.tokens for turn in session.turns] == [30, 30]
        session.close()
        with pytest.raises(ValueError, match="closed"):
            session.generate("hello|")


def test_a_wrapped_model_stays_wrapped_and_is_not_in_the_way(known: Oracle) -> None:
    model = tiny.build("Llama").double()
    expected = alone(model, prompt(9), max_new_tokens=30)
    specdec.wrap(model, drafter=known, policy=POLICY)
    with pool(model, known) as many:
        assert many.generate(prompt(9), max_new_tokens=30)[0].tolist() == expected
    assert not specdec.stats(model).steps
    assert model.generate(prompt(9), max_new_tokens=30)[0].tolist() == expected


def test_what_is_no_model() -> None:
    with pytest.raises(TypeError, match="give a transformers model"):
        SessionPool("gpt2")  # type: ignore[arg-type]
