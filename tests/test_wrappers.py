"""Putting speculation in front of a model's generate and taking it away: copies, and models inside others, too."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
from typing import Any

import peft
import pytest
import torch
import transformers

import specdec
from specdec.policies import FixedPolicy
from tests import tiny
from tests.tiny import Oracle, outcome, padded, prompt, quietly, same, texts

POLICY = FixedPolicy(12, 5, 6)


@pytest.fixture
def model() -> Any:
    return tiny.model()


def wrap(model: Any, drafter: Any = None, **arguments: Any) -> Any:
    return specdec.wrap(model, drafter or Oracle(), POLICY, on_unsupported="error", **arguments)


def knowing(model: Any, **arguments: Any) -> Oracle:
    """A drafter that knows what the model will write after the usual prompt."""
    return Oracle(texts(model.generate(prompt(), max_new_tokens=20, **arguments)))


def written(model: Any, **arguments: Any) -> list[list[int]]:
    return model.generate(prompt(), max_new_tokens=20, **arguments).tolist()


def test_a_wrapped_model_is_the_same_object_and_writes_the_same_faster(model: Any) -> None:
    plain, drafter = written(model), knowing(model)
    assert wrap(model, drafter) is model
    assert written(model) == plain
    assert specdec.stats(model).tokens_per_step > 2


def test_wrapping_changes_nothing_that_can_be_seen_of_generate(model: Any) -> None:
    signature, doc = inspect.signature(model.generate), model.generate.__doc__
    wrap(model)
    assert inspect.signature(model.generate) == signature
    assert model.generate.__doc__ == doc


def test_unwrap_gives_the_models_own_generate_back(model: Any) -> None:
    assert specdec.unwrap(wrap(model)) is model
    assert "generate" not in vars(model)
    assert model.generate.__func__ is type(model).generate


def test_unwrapping_a_model_that_is_not_wrapped_does_nothing(model: Any) -> None:
    before = dict(vars(model))
    assert specdec.unwrap(model) is model
    assert vars(model) == before


def test_wrapping_again_takes_the_new_parts_and_one_unwrap_undoes_it(model: Any) -> None:
    first, second = Oracle(), Oracle()
    wrap(wrap(model, first), second)
    written(model)
    assert first.calls == 0 < second.calls
    specdec.unwrap(model)
    assert "generate" not in vars(model)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_wrap_that_fails_leaves_the_model_as_it_was(model: Any, wrapped: bool) -> None:
    if wrapped:
        wrap(model)
    before = vars(model).get("generate")
    with pytest.raises(ValueError, match="nonesuch"):
        specdec.wrap(model, drafter="nonesuch")
    assert vars(model).get("generate") is before


def test_stats_of_a_model_that_is_not_wrapped_say_what_to_do(model: Any) -> None:
    with pytest.raises(ValueError, match=r"not wrapped; call specdec\.wrap"):
        specdec.stats(model)


class TestSpeculating:
    def test_it_ends_with_the_block(self, model: Any) -> None:
        plain, drafter = written(model), knowing(model)
        with specdec.speculating(model, drafter, POLICY, on_unsupported="error") as inside:
            assert inside is model
            assert written(model) == plain
            assert specdec.stats(model).accepted > 0
        assert "generate" not in vars(model)

    def test_it_ends_with_an_error_inside_the_block(self, model: Any) -> None:
        with pytest.raises(KeyError), specdec.speculating(model):
            raise KeyError
        assert "generate" not in vars(model)

    def test_inside_a_wrapped_model_the_outer_parts_come_back(self, model: Any) -> None:
        outer, inner = Oracle(), Oracle()
        wrap(model, outer)
        ours = model.generate
        with specdec.speculating(model, inner, POLICY):
            written(model)
            steps = specdec.stats(model).steps
        assert outer.calls == 0 < inner.calls
        assert model.generate is ours
        assert specdec.stats(model).steps == 0 < steps

    def test_one_inside_another(self, model: Any) -> None:
        outer, inner = Oracle(), Oracle()
        with specdec.speculating(model, outer, POLICY):
            with specdec.speculating(model, inner, POLICY):
                written(model)
            assert outer.calls == 0 < inner.calls
            written(model)
            assert outer.calls > 0
        assert "generate" not in vars(model)


class TestSpeculate:
    """``Speculate`` as ``custom_generate``, without wrapping."""

    @pytest.mark.parametrize("arguments", [{}, {"do_sample": True}, {"repetition_penalty": 1.3}], ids=str)
    def test_it_writes_the_same(self, model: Any, arguments: dict[str, Any]) -> None:
        torch.manual_seed(1)
        plain = model.generate(**padded(9, 5), max_new_tokens=20, **arguments)
        loop = specdec.Speculate(Oracle(texts(plain, padded(9, 5)["attention_mask"])), POLICY, on_unsupported="error")
        torch.manual_seed(1)
        ours = model.generate(**padded(9, 5), max_new_tokens=20, custom_generate=loop, **arguments)
        assert ours.tolist() == plain.tolist()
        assert loop.stats.accepted > 0

    def test_it_counts_over_calls_and_models(self, model: Any) -> None:
        loop = specdec.Speculate("ngram", POLICY)
        for each in (model, model, tiny.gpt2()):
            each.generate(prompt(), max_new_tokens=5, custom_generate=loop)
        assert loop.stats.generations == 3

    def test_what_it_cannot_do_it_leaves_to_plain_decoding(self, model: Any) -> None:
        arguments: dict[str, Any] = {"use_cache": False, "do_sample": True}
        torch.manual_seed(0)
        plain = written(model, **arguments)
        torch.manual_seed(0)
        loop = specdec.Speculate()
        with pytest.warns(specdec.SpecdecWarning, match="use_cache=False"):
            assert written(model, custom_generate=loop, **arguments) == plain
        assert loop.stats.plain_generations == 1

    def test_or_says_so(self, model: Any) -> None:
        with pytest.raises(ValueError, match="use_cache=False"):
            written(model, custom_generate=specdec.Speculate(on_unsupported="error"), use_cache=False)

    def test_beam_search_is_not_left_to_sampling(self, model: Any) -> None:
        with pytest.raises(ValueError, match="beam_search"):
            written(model, custom_generate=specdec.Speculate(), num_beams=3)


class TestCopies:
    def test_a_deep_copy_is_wrapped_for_itself_and_has_its_own_weights(self, model: Any) -> None:
        plain = written(model)
        twin = copy.deepcopy(wrap(model))
        with torch.no_grad():
            twin.lm_head.weight.neg_()
        specdec.unwrap(changed := copy.deepcopy(twin))
        assert written(twin) == written(changed) != plain
        assert specdec.stats(twin).generations == 1
        assert specdec.stats(model).generations == 0
        specdec.unwrap(twin)
        assert written(model) == plain
        assert specdec.stats(model).generations == 1

    def test_a_deep_copy_of_a_wrapped_model_with_a_generate_of_its_own(self, model: Any) -> None:
        model.generate = functools.partial(model.generate, max_new_tokens=5)
        twin = copy.deepcopy(specdec.wrap(model))
        specdec.unwrap(twin)
        assert twin.generate.func.__self__ is twin

    def test_a_shallow_copy_shares_weights_and_writes_the_same(self, model: Any) -> None:
        plain = written(model)
        twin = copy.copy(wrap(model))
        assert written(twin) == plain
        specdec.unwrap(twin)
        assert written(twin) == plain
        assert specdec.stats(model) is not None

    def test_a_wrapped_model_can_be_pickled(self, model: Any) -> None:
        plain = written(model)
        twin = pickle.loads(pickle.dumps(specdec.wrap(model)))
        assert written(twin) == plain
        assert specdec.stats(twin).generations == 1

    def test_saving_a_wrapped_model_saves_the_model_alone(self, model: Any, tmp_path: Any) -> None:
        plain, names = written(model), list(model.state_dict())
        wrap(model)
        assert list(model.state_dict()) == names
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path)
        assert "generate" not in vars(loaded)
        assert written(loaded) == plain
        assert not any("specdec" in file.read_text() for file in tmp_path.glob("*.json"))


class TestOwnGenerate:
    """Something stands at ``model.generate`` already."""

    def test_a_partial_with_defaults_keeps_them(self, model: Any) -> None:
        model.generate = functools.partial(model.generate, max_new_tokens=7)
        plain, own = model.generate(prompt()), model.generate
        with quietly(), specdec.speculating(model, Oracle(texts(plain)), POLICY):
            assert model.generate(prompt()).tolist() == plain.tolist()
        assert model.generate is own

    def test_a_decoding_loop_from_the_hub_goes_on_decoding(self, model: Any) -> None:
        def loop(model: Any, inputs: torch.Tensor, times: int = 2) -> torch.Tensor:
            return torch.cat([inputs] * times, dim=1)

        model.generate = functools.partial(loop, model=model)
        specdec.wrap(model)
        with pytest.warns(specdec.SpecdecWarning, match="generate of its own"):
            assert model.generate(inputs=prompt(), times=3).shape == (1, 27)
        assert specdec.stats(model).plain_generations == 1


class TestCompiledForward:
    def test_passes_come_in_few_widths(self) -> None:
        model, widths = tiny.model(), set()
        plain = model.generate(prompt(), max_new_tokens=24, do_sample=False)
        model.register_forward_pre_hook(
            lambda module, args, kwargs: widths.add(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        model.forward = torch.compile(model.forward, backend="eager")
        # CPU kernels, which fit heads this narrow on some machines, would try widths of their own.
        settings = {"policy": FixedPolicy(10, 5, 4), "cpu_kernels": False}
        with specdec.speculating(model, **settings, on_unsupported="error"):
            ours = model.generate(prompt(), max_new_tokens=24, do_sample=False)
        assert ours.tolist() == plain.tolist()
        prompts = {prompt().shape[1], 7}  # this one and the self-test's
        assert widths - prompts <= {1, 2, 4, 8, 16, 32}
        assert widths & {4, 8, 16}


class TestPeft:
    @pytest.fixture
    def adapted(self, model: Any) -> Any:
        """A model with two LoRA adapters that change what it writes."""
        config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        torch.manual_seed(0)
        adapted = peft.get_peft_model(model, config, adapter_name="a")
        adapted.add_adapter("b", config)
        return adapted.eval()

    def without(self, adapted: Any) -> list[list[int]]:
        with adapted.disable_adapter():
            return written(adapted)

    def test_adapters_switched_and_disabled_between_calls(self, adapted: Any) -> None:
        plain = {}
        for name in ("a", "b"):
            adapted.set_adapter(name)
            plain[name] = written(adapted)
        plain[""] = self.without(adapted)
        assert len({str(each) for each in plain.values()}) == 3
        wrap(adapted, Oracle([row for each in plain.values() for row in each]))
        for name in ("a", "b", "a"):
            adapted.set_adapter(name)
            assert written(adapted) == plain[name]
        assert self.without(adapted) == plain[""]
        assert specdec.stats(adapted).generations == 4
        assert specdec.stats(adapted).accepted > 0

    def test_the_base_wrapped_first(self, model: Any) -> None:
        before = written(wrap(model))
        config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        adapted = peft.get_peft_model(model, config).eval()
        ours = written(adapted)
        specdec.unwrap(model)
        assert ours == written(adapted) != before
        assert specdec.stats(wrap(model)).generations == 0

    def test_an_adapter_for_each_row(self, adapted: Any) -> None:
        arguments = {**padded(9, 6), "adapter_names": ["b", "a"], "max_new_tokens": 20}
        plain, alone = adapted.generate(**arguments), written(adapted)
        known = [*texts(plain, arguments["attention_mask"]), *alone]
        with quietly(), specdec.speculating(adapted, Oracle(known), POLICY):
            for _ in range(2):
                assert adapted.generate(**arguments).tolist() == plain.tolist()
                assert written(adapted) == alone
            assert specdec.stats(adapted).accepted > 0
            assert adapted.generate(**arguments, use_cache=False).tolist() == plain.tolist()
            assert written(adapted) == alone  # nothing of the call that fell back is left in the adapters

    def test_unwrapping_the_adapted_model(self, adapted: Any) -> None:
        specdec.unwrap(wrap(adapted))
        assert "generate" not in vars(adapted)

    def test_prompt_tuning(self, model: Any) -> None:
        torch.manual_seed(0)
        tuned = peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
        with quietly():
            plain = tuned.generate(input_ids=prompt(), max_new_tokens=20)
            with specdec.speculating(tuned, Oracle(texts(plain)), POLICY):
                assert tuned.generate(input_ids=prompt(), max_new_tokens=20).tolist() == plain.tolist()


def test_a_compiled_module(model: Any) -> None:
    plain, drafter = written(model), knowing(model)
    compiled = torch.compile(model)
    assert wrap(compiled, drafter) is compiled
    assert written(compiled) == plain
    assert specdec.stats(compiled).accepted > 0
    assert specdec.stats(compiled) is specdec.stats(model)
    specdec.unwrap(compiled)
    assert "generate" not in vars(model)


def test_a_model_placed_by_accelerate(model: Any, tmp_path: Any) -> None:
    model.save_pretrained(tmp_path)
    placed = type(model).from_pretrained(tmp_path, device_map="cpu")
    same(placed, {"input_ids": prompt()}, max_new_tokens=15)


def test_a_model_with_a_layer_left_on_disk(model: Any, tmp_path: Any) -> None:
    model.save_pretrained(tmp_path)
    names = ("model.embed_tokens", "model.layers.0", "model.rotary_emb", "model.norm", "lm_head")
    places = {**dict.fromkeys(names, "cpu"), "model.layers.1": "disk"}
    spread = type(model).from_pretrained(tmp_path, device_map=places, offload_folder=tmp_path / "offload")
    assert spread.model.layers[1].mlp.up_proj.weight.device.type == "meta"
    same(spread, {"input_ids": prompt()}, max_new_tokens=15)


def test_a_pipeline_around_a_wrapped_model(model: Any) -> None:
    tokenizer = tiny.tokenizer()

    def answer() -> str:
        torch.manual_seed(0)  # pipelines sample unless told otherwise
        pipeline = transformers.pipeline("text-generation", model, tokenizer=tokenizer, device="cpu")
        return pipeline("what now?", max_new_tokens=20)[0]["generated_text"]

    plain = answer()
    wrap(model, Oracle([tokenizer(plain).input_ids]))
    assert answer() == plain
    assert specdec.stats(model).accepted > 0


class TestBadArguments:
    @pytest.mark.parametrize("model", [None, "gpt2", object(), 3])
    def test_what_is_no_model(self, model: Any) -> None:
        for function in (specdec.wrap, specdec.unwrap, specdec.stats):
            with pytest.raises(TypeError, match=f"got {type(model).__name__}"):
                function(model)

    @pytest.mark.parametrize("base", ["linear", "headless", "own"])
    def test_modules_that_do_not_generate_as_transformers_do(self, base: str) -> None:
        class Own(torch.nn.Module):
            def generate(self, x: int) -> int:
                return x

        config = transformers.LlamaConfig(**tiny.SIZES)
        module = {
            "linear": lambda: torch.nn.Linear(2, 2),
            "headless": lambda: transformers.LlamaModel(config),
            "own": Own,
        }
        with pytest.raises(TypeError, match="give a transformers model"):
            specdec.wrap(module[base]())

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"drafter": "nonesuch"}, ValueError, "known names are .*ngram"),
            ({"drafter": 3}, TypeError, "draft\\(contexts, budgets\\)"),
            ({"drafter": None}, TypeError, "drafter: got None"),
            ({"policy": "nonesuch"}, ValueError, "policy='nonesuch'"),
            ({"policy": 8}, TypeError, "budget\\(contexts\\)"),
            ({"verifier": "nonesuch"}, ValueError, "verifier='nonesuch'"),
            ({"verifier": 8}, (TypeError, ValueError), "verifier"),
            ({"on_unsupported": "warn"}, ValueError, "'fallback' or 'error'"),
            ({"on_unsupported": None}, ValueError, "'fallback' or 'error'"),
            ({"on_unsupported": ["error"]}, ValueError, "'fallback' or 'error'"),
        ],
        ids=str,
    )
    def test_parts(self, model: Any, arguments: dict[str, Any], error: Any, message: str) -> None:
        for door in (functools.partial(specdec.wrap, model), specdec.Speculate):
            with pytest.raises(error, match=message):
                door(**arguments)

    def test_too_many_positional_arguments(self, model: Any) -> None:
        plain = outcome(lambda: model.generate(*[None] * 20))
        wrap(model)
        assert outcome(lambda: model.generate(*[None] * 20))[0] is plain[0] is TypeError
