"""Whatever ``generate`` takes and returns: arguments, configurations, stopping rules, processors and rich outputs."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

import specdec
from specdec.core import Budget, DraftTree
from specdec.policies import FixedPolicy
from tests import tiny
from tests.tiny import Oracle, both, outcome, padded, prompt, same

POLICY = FixedPolicy(12, 5, 6)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.model()


@pytest.fixture(params=["oracle", "auto"])
def drafter(request: pytest.FixtureRequest) -> str | None:
    """What to hand to ``same``: a drafter's name, or None for an Oracle."""
    return None if request.param == "oracle" else request.param


class Seen(LogitsProcessor):
    """Remembers every prefix it was called with, and biases by how often: wrong if called too often or out of order."""

    def __init__(self) -> None:
        self.prefixes: list[Any] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.prefixes.append(input_ids.tolist())
        scores[:, 3 + len(self.prefixes) % 90] += 4
        return scores


class StopAt(StoppingCriteria):
    """Ends rows at a total length, and remembers what it saw."""

    def __init__(self, length: int, every_row: bool = True) -> None:
        self.length, self.every_row, self.seen = length, every_row, []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.seen.append(input_ids.tolist())
        done = torch.full((len(input_ids),), input_ids.shape[1] >= self.length)
        return done if self.every_row else done & (torch.arange(len(input_ids)) == 0)


class Whole(Oracle):
    """Guesses as much of the truth as its budget's depth allows, and nothing else."""

    def tree(self, tokens: np.ndarray, budget: Budget) -> DraftTree:
        true = self.known(tokens)[: budget.depth].tolist()
        return DraftTree.chain(int(tokens[-1]), true, [1.0] * len(true), "whole")


class TestArguments:
    @pytest.mark.parametrize(
        "arguments",
        [
            {},
            {"attention_mask": torch.ones(1, 9, dtype=torch.long)},
            {"generation_config": GenerationConfig(max_new_tokens=12, repetition_penalty=1.2)},
            {"generation_config": GenerationConfig(max_new_tokens=12), "do_sample": True},
            {"max_length": 21},
            {"max_new_tokens": 1},
            {"max_new_tokens": 2},
            {"min_new_tokens": 12, "max_new_tokens": 15, "eos_token_id": 18},
            {"num_return_sequences": 3, "do_sample": True, "max_new_tokens": 12},
            {"negative_prompt_ids": prompt(5, seed=3), "guidance_scale": 1.7, "max_new_tokens": 12},
            {
                "prefix_allowed_tokens_fn": lambda row, ids: [3 + (5 * len(ids) + i) % 90 for i in range(8)],
                "max_length": 24,
            },
            {"position_ids": torch.arange(9)[None] + 4, "max_new_tokens": 12},
            {"prefill_chunk_size": 4, "max_new_tokens": 12},
            {"output_attentions": True, "max_new_tokens": 12},
            {"logits_to_keep": 2, "max_new_tokens": 12},
        ],
        ids=lambda arguments: ",".join(arguments) or "none",
    )
    def test_one_prompt(self, model: Any, drafter: str | None, arguments: dict[str, Any]) -> None:
        result = both(model, {"input_ids": prompt(), **arguments}, drafter=drafter)
        assert result.ours.tolist() == result.plain.tolist()
        assert result.stats.fault_count == 0
        assert result.stats.accepted or drafter or arguments.get("max_new_tokens", 9) < 3

    @pytest.mark.parametrize(
        "arguments",
        [{}, {"prefill_chunk_size": 4}, {"do_sample": True, "num_return_sequences": 2}, {"eos_token_id": [70, 18]}],
        ids=str,
    )
    def test_a_padded_batch(self, model: Any, drafter: str | None, arguments: dict[str, Any]) -> None:
        if "num_return_sequences" in arguments:
            drafter = "auto"
        same(model, padded(9, 4, 7), drafter=drafter, max_new_tokens=16, **arguments)

    def test_positional_ones(self, model: Any) -> None:
        def run() -> Any:
            rules = StoppingCriteriaList([StopAt(15)])
            return model.generate(prompt(), GenerationConfig(max_new_tokens=20), LogitsProcessorList([Seen()]), rules)

        plain = run()
        with specdec.speculating(model, Oracle(plain.tolist()), POLICY, on_unsupported="error"):
            assert run().tolist() == plain.tolist()
            assert specdec.stats(model).accepted > 0

    def test_no_prompt_at_all(self, model: Any, drafter: str | None) -> None:
        same(model, {}, drafter=drafter, max_new_tokens=12)

    @pytest.mark.parametrize("rows", [1, 2])
    @pytest.mark.parametrize("ids", [False, True])
    def test_embeddings(self, model: Any, drafter: str | None, rows: int, ids: bool) -> None:
        batch = padded(9, 4)
        arguments = {"inputs_embeds": model.get_input_embeddings()(batch["input_ids"])[:rows]}
        arguments |= {"attention_mask": batch["attention_mask"][:rows]}
        arguments |= {"input_ids": batch["input_ids"][:rows]} if ids else {}
        if rows == 2 and not ids:
            drafter = "auto"  # an Oracle could not tell the rows apart by what they have written
        same(model, arguments, drafter=drafter, max_new_tokens=15)

    def test_defaults_from_the_model(self, drafter: str | None) -> None:
        model = tiny.model()
        model.generation_config.update(repetition_penalty=1.3, do_sample=True, top_k=5, temperature=0.7)
        model.generation_config.update(max_new_tokens=17, eos_token_id=[70, 18])
        result = same(model, {"input_ids": prompt()}, drafter=drafter)
        assert result.plain.tolist() != model.generate(prompt(), do_sample=False, repetition_penalty=1.0).tolist()

    def test_nothing_of_the_callers_is_changed(self, model: Any) -> None:
        config, rules, ids = GenerationConfig(max_new_tokens=8), StoppingCriteriaList(), prompt()
        before = config.to_dict()
        with specdec.speculating(model, Oracle(), POLICY):
            model.generate(
                ids, generation_config=config, stopping_criteria=rules, stop_strings="QX", tokenizer=tiny.tokenizer()
            )
        assert config.to_dict() == before
        assert not rules
        assert ids.tolist() == prompt().tolist()

    def test_inference_mode_and_back(self, model: Any) -> None:
        plain = model.generate(prompt(), max_new_tokens=15)
        with specdec.speculating(model, Oracle(plain.tolist()), POLICY):
            with torch.inference_mode():
                assert model.generate(prompt(), max_new_tokens=15).tolist() == plain.tolist()
            assert model.generate(prompt(), max_new_tokens=15).tolist() == plain.tolist()

    def test_gradients_are_not_kept(self, model: Any) -> None:
        with specdec.speculating(model, Oracle(), POLICY):
            output = model.generate(prompt(), max_new_tokens=4, return_dict_in_generate=True, output_logits=True)
        assert not any(logits.requires_grad for logits in output.logits)


class TestBadInput:
    """What plain ``generate`` raises or does, ours raises or does."""

    @pytest.mark.parametrize(
        "arguments",
        [
            {"input_ids": torch.zeros(1, 0, dtype=torch.long)},
            {"input_ids": prompt(), "max_new_tokens": 0},
            {"input_ids": prompt(), "max_new_tokens": -1},
            {"input_ids": prompt(), "max_length": 5},
            {"input_ids": prompt(), "nonesuch": 3},
            {"input_ids": "text"},
            {"input_ids": prompt().float()},
            {"input_ids": prompt() + 200},
            {"input_ids": prompt()[0]},
            {"input_ids": prompt(), "do_sample": True, "temperature": -1.0},
            {"input_ids": prompt(), "stop_strings": "x"},
            {"input_ids": prompt(), "generation_config": GenerationConfig(stop_strings=["x"])},
            {"input_ids": prompt(), "logits_processor": [lambda ids: ids]},
            {"input_ids": prompt(), "num_return_sequences": 2},
        ],
        ids=lambda arguments: ",".join(arguments),
    )
    def test_the_same_error(self, model: Any, arguments: dict[str, Any]) -> None:
        plain = outcome(lambda: model.generate(**arguments))
        assert isinstance(plain[0], type)
        with specdec.speculating(model, Oracle(), POLICY, on_unsupported="error"):
            assert outcome(lambda: model.generate(**arguments)) == plain

    def test_a_prompt_beyond_learnt_positions(self) -> None:
        model = tiny.gpt2()
        plain = outcome(lambda: model.generate(prompt(65), max_new_tokens=4))
        with specdec.speculating(model, Oracle(), POLICY):
            assert outcome(lambda: model.generate(prompt(65), max_new_tokens=4)) == plain
        assert plain[0] is IndexError

    def test_a_prompt_beyond_rotary_positions(self) -> None:
        same(tiny.model(max_position_embeddings=16), {"input_ids": prompt(20)}, max_new_tokens=12)
        same(tiny.model(max_position_embeddings=16), {"input_ids": prompt(12)}, max_new_tokens=12)

    @pytest.mark.parametrize("drafter", [Oracle(), "auto"])
    @pytest.mark.parametrize("do_sample", [False, True])
    def test_logits_that_are_not_numbers(self, drafter: Any, do_sample: bool) -> None:
        model = tiny.model()

        def run() -> Any:
            torch.manual_seed(0)
            return outcome(lambda: model.generate(prompt(), do_sample=do_sample, max_new_tokens=6))

        specdec.wrap(model, drafter, POLICY, on_unsupported="error")
        run()  # the self-test is done while the model is sound
        with torch.no_grad():
            model.lm_head.weight[40] = float("nan")
        ours = run()
        specdec.unwrap(model)
        assert ours == run()
        assert ours[0] is RuntimeError if do_sample else ours[0][-6:] == [40] * 6

    def test_logits_that_are_all_alike(self) -> None:
        model = tiny.model()
        with torch.no_grad():
            model.lm_head.weight.zero_()
        for drafter in (None, "auto"):
            both(model, {"input_ids": prompt()}, drafter=drafter, max_new_tokens=6)


class TestStopping:
    @pytest.mark.parametrize("where", ["argument", "list", "config", "model", "model beside a config"])
    def test_stop_strings(self, drafter: str | None, where: str) -> None:
        model, tokenizer = tiny.model(), tiny.tokenizer()
        free = model.generate(prompt(), max_new_tokens=20)
        string = tokenizer.decode(free[0, 14:17])
        arguments: dict[str, Any] = {"tokenizer": tokenizer, "max_new_tokens": 20}
        match where:
            case "argument":
                arguments["stop_strings"] = string
            case "list":
                arguments["stop_strings"] = ["~~~~", string]
            case "config":
                arguments = {
                    "tokenizer": tokenizer,
                    "generation_config": GenerationConfig(max_new_tokens=20, stop_strings=string),
                }
            case "model":
                model.generation_config.stop_strings = string
            case "model beside a config":
                model.generation_config.stop_strings = string
                arguments = {"tokenizer": tokenizer, "generation_config": GenerationConfig(max_new_tokens=20)}
        known = Oracle(free.tolist()) if drafter is None else drafter
        result = same(model, {"input_ids": prompt()}, drafter=known, **arguments)
        assert result.plain.shape[1] == 17

    def test_stop_strings_beside_a_rule(self, model: Any) -> None:
        tokenizer = tiny.tokenizer()
        string = tokenizer.decode(model.generate(prompt(), max_new_tokens=20)[0, 14:17])
        for length in (13, 30):
            result = same(
                model,
                lambda length=length: {"input_ids": prompt(), "stopping_criteria": [StopAt(length)]},
                stop_strings=string,
                tokenizer=tokenizer,
                max_new_tokens=20,
            )
            assert result.plain.shape[1] == min(length, 17)

    @pytest.mark.parametrize("length", range(11, 15))
    def test_a_rule_in_the_middle_of_a_draft(self, model: Any, length: int) -> None:
        free = model.generate(prompt(), max_new_tokens=20)
        rules: list[StopAt] = []

        def make() -> dict[str, Any]:
            rules.append(StopAt(length))
            return {"input_ids": prompt(), "stopping_criteria": StoppingCriteriaList(rules[-1:])}

        result = same(model, make, drafter=Whole(free.tolist()), max_new_tokens=20)
        assert result.ours.shape[1] == length
        assert rules[-1].seen == rules[0].seen  # once per token, on what was committed
        assert result.stats.steps == 2  # the prompt's, and one whose draft reached further

    def test_a_rule_for_one_row_of_a_batch(self, model: Any) -> None:
        same(model, lambda: {**padded(9, 4), "stopping_criteria": [StopAt(13, False)]}, max_new_tokens=16)

    def test_every_place_of_an_end_token(self, model: Any) -> None:
        free = model.generate(prompt(), max_new_tokens=14, eos_token_id=None)
        ends = [[96, token] for token in free[0, 9:].tolist()]
        plain = [model.generate(prompt(), max_new_tokens=14, eos_token_id=end).tolist() for end in ends]
        with specdec.speculating(model, Oracle(free.tolist()), POLICY, on_unsupported="error"):
            ours = [model.generate(prompt(), max_new_tokens=14, eos_token_id=end).tolist() for end in ends]
            assert specdec.stats(model).accepted > 0
        assert ours == plain
        assert len({len(row) for (row,) in plain}) > 8

    def test_no_time(self, model: Any) -> None:
        result = both(model, {"input_ids": prompt()}, max_new_tokens=20, max_time=0.0)
        assert result.ours.tolist() == result.plain.tolist()
        assert result.ours.shape[1] == 10

    @pytest.mark.parametrize("arguments", [{}, {"repetition_penalty": 1.1}], ids=str)
    def test_time_is_looked_at_after_every_token(
        self, model: Any, arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """By a clock that ticks when it is looked at."""
        free = model.generate(prompt(), max_new_tokens=20, **arguments)
        ticks = iter(range(10_000))
        with specdec.speculating(model, Oracle(free.tolist()), POLICY):
            model.generate(prompt(), max_new_tokens=2)
            monkeypatch.setattr(time, "time", lambda: float(next(ticks)))
            ours = model.generate(prompt(), max_new_tokens=20, max_time=6.5, **arguments)
            stats = specdec.stats(model)
        plain = model.generate(prompt(), max_new_tokens=20, max_time=6.5, **arguments)
        assert ours.tolist() == plain.tolist()
        assert ours.shape[1] == 16
        assert stats.accepted > 0


class TestProcessors:
    @pytest.mark.parametrize("do_sample", [False, True])
    @pytest.mark.parametrize("batch", [padded(9), padded(9, 4)], ids=["one", "two"])
    def test_one_that_remembers_is_called_as_by_plain_generate(
        self, model: Any, batch: dict[str, Any], do_sample: bool
    ) -> None:
        seen: list[Seen] = []

        def make() -> dict[str, Any]:
            seen.append(Seen())
            return {**batch, "logits_processor": LogitsProcessorList(seen[-1:])}

        same(model, make, do_sample=do_sample, max_new_tokens=16)
        assert seen[-1].prefixes == seen[0].prefixes

    def test_an_error_in_one_comes_through_and_the_next_call_is_sound(self, model: Any) -> None:
        class Raises(LogitsProcessor):
            def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
                if input_ids.shape[1] == 14:
                    raise ArithmeticError
                return scores

        plain = model.generate(prompt(), max_new_tokens=16)
        with specdec.speculating(model, Oracle(plain.tolist()), POLICY):
            with pytest.raises(ArithmeticError):
                model.generate(prompt(), logits_processor=[Raises()], max_new_tokens=16)
            assert model.generate(prompt(), max_new_tokens=16).tolist() == plain.tolist()


RICH = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "max_new_tokens": 16}


class TestRichOutput:
    @pytest.mark.parametrize("batch", [padded(9), padded(9, 4, 7)], ids=["one", "three"])
    @pytest.mark.parametrize(
        "arguments",
        [{}, {"do_sample": True, "top_k": 9}, {"repetition_penalty": 1.3, "eos_token_id": [70, 18]}],
        ids=str,
    )
    def test_everything_in_it(
        self, model: Any, drafter: str | None, batch: dict[str, Any], arguments: dict[str, Any]
    ) -> None:
        plain, ours, _ = same(model, batch, drafter=drafter, **RICH, **arguments)
        assert type(ours) is type(plain)
        assert list(ours) == list(plain)
        for name in ("scores", "logits"):
            assert len(ours[name]) == len(plain[name])
            for mine, theirs in zip(ours[name], plain[name], strict=True):
                torch.testing.assert_close(mine, theirs, atol=2e-4, rtol=1e-4)
        assert_same_cache(ours.past_key_values, plain.past_key_values)

    @pytest.mark.parametrize("wanted", ["output_scores", "output_logits", "neither"])
    def test_only_what_was_asked_for(self, model: Any, wanted: str) -> None:
        arguments = {wanted: True} if wanted != "neither" else {}
        plain, ours, _ = same(
            model, {"input_ids": prompt()}, return_dict_in_generate=True, max_new_tokens=9, **arguments
        )
        assert list(ours) == list(plain)

    def test_without_the_dictionary_nothing_is_kept(self, model: Any) -> None:
        assert isinstance(same(model, {"input_ids": prompt()}, output_scores=True, max_new_tokens=9).ours, torch.Tensor)

    @pytest.mark.parametrize("kind", ["Llama", "Mistral"])
    def test_its_cache_serves_a_next_call(self, kind: str) -> None:
        model = tiny.model(kind, **({"sliding_window": 6} if kind == "Mistral" else {}))
        outputs = both(model, {"input_ids": prompt()}, **RICH)
        later = []
        for output in (outputs.plain, outputs.ours):
            ids = torch.cat([output.sequences, prompt(4, seed=5)], dim=1)
            later.append(model.generate(ids, past_key_values=output.past_key_values, max_new_tokens=12).tolist())
        assert later[0] == later[1]

    def test_the_statistics_of_this_generation(self, model: Any) -> None:
        with specdec.speculating(model, Oracle(), POLICY):
            for _ in range(2):
                output = model.generate(prompt(), **RICH)
            assert output.stats.tokens == output.sequences.shape[1] - 9
            assert specdec.stats(model).tokens == 2 * output.stats.tokens

    def test_a_static_cache_is_not_what_is_promised(self, model: Any) -> None:
        """Its rows cannot be moved, so ours are kept in a cache of another kind; the tokens are the same."""
        same(model, {"input_ids": prompt()}, cache_implementation="static", max_new_tokens=12)


def assert_same_cache(ours: DynamicCache, plain: DynamicCache) -> None:
    assert type(ours) is type(plain)
    assert ours.get_seq_length() == plain.get_seq_length()
    for mine, theirs in zip(ours.layers, plain.layers, strict=True):
        assert type(mine) is type(theirs)
        torch.testing.assert_close(mine.keys, theirs.keys, atol=2e-4, rtol=1e-4)
        torch.testing.assert_close(mine.values, theirs.values, atol=2e-4, rtol=1e-4)
