"""What cannot be done speculatively runs as plain ``generate``, untouched, and says why once; or raises if asked to."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import transformers
from transformers import GenerationConfig

import specdec
from specdec.policies import FixedPolicy
from tests import tiny
from tests.tiny import Oracle, outcome, prompt, quietly

POLICY = FixedPolicy(8, 4, 4)
RICH = {"return_dict_in_generate": True}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.model()


def run(model: Any, **arguments: Any) -> Any:
    torch.manual_seed(0)
    return outcome(lambda: model.generate(prompt(), **{"max_new_tokens": 8, **arguments}))


def said(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(each.message) for each in caught if issubclass(each.category, specdec.SpecdecWarning)]


CASES = [
    ({"num_beams": 3}, "beam_search"),
    ({"num_beams": 2, "do_sample": True}, "beam_sample"),
    ({"generation_config": GenerationConfig(num_beams=3, max_new_tokens=8)}, "beam_search"),
    ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive_search"),
    ({"dola_layers": "high"}, "dola_generation"),
    ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens="),
    ({"generation_config": GenerationConfig(prompt_lookup_num_tokens=3)}, "prompt_lookup_num_tokens="),
    ({"assistant_model": tiny.model(num_hidden_layers=1)}, "assistant_model="),
    ({"assistant_early_exit": 1}, "assistant_early_exit="),
    ({"custom_generate": specdec.Speculate()}, "custom_generate="),
    ({"use_cache": False}, "use_cache=False"),
    ({"output_attentions": True, **RICH}, "attentions"),
    ({"output_hidden_states": True, **RICH}, "hidden states"),
    ({"past_key_values": "static"}, "StaticCache"),
]


@pytest.mark.parametrize(("arguments", "reason"), CASES, ids=[f"{reason}{n}" for n, (_, reason) in enumerate(CASES)])
class TestFallback:
    def arguments(self, model: Any, arguments: dict[str, Any]) -> dict[str, Any]:
        if arguments.get("past_key_values") == "static":
            return {"past_key_values": transformers.StaticCache(config=model.config, max_cache_len=32)}
        return arguments

    def test_it_is_plain_generate_and_is_said_once(self, model: Any, arguments: dict[str, Any], reason: str) -> None:
        plain = run(model, **self.arguments(model, arguments))
        with specdec.speculating(model, Oracle(), POLICY):
            with pytest.warns(specdec.SpecdecWarning, match=reason) as caught:
                assert run(model, **self.arguments(model, arguments)) == plain
            assert len(said(list(caught))) == 1
            with warnings.catch_warnings(record=True) as again:
                warnings.simplefilter("always")
                assert run(model, **self.arguments(model, arguments)) == plain
            assert said(again) == []
            assert specdec.stats(model).plain_generations == 2
            assert specdec.stats(model).tokens == 0
            assert any(reason in text for text in specdec.stats(model).reasons)

    def test_or_raises(self, model: Any, arguments: dict[str, Any], reason: str) -> None:
        with (
            specdec.speculating(model, Oracle(), POLICY, on_unsupported="error"),
            pytest.raises(ValueError, match=f"specdec cannot run this.*{reason}"),
        ):
            model.generate(prompt(), max_new_tokens=8, **self.arguments(model, arguments))


def test_attentions_and_hidden_states_come_out_as_from_plain_generate(model: Any) -> None:
    arguments = {"output_attentions": True, "output_hidden_states": True, "max_new_tokens": 5, **RICH}
    plain = model.generate(prompt(), **arguments)
    with quietly(), specdec.speculating(model, Oracle(), POLICY, cpu_kernels=False):
        ours = model.generate(prompt(), **arguments)
    assert list(ours) == list(plain)
    for mine, theirs in zip(ours.hidden_states, plain.hidden_states, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_several_reasons_are_each_said(model: Any) -> None:
    with specdec.speculating(model, Oracle(), POLICY), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for arguments in ({"num_beams": 2}, {"use_cache": False}, {"num_beams": 3}):
            run(model, **arguments)
        assert len(said(caught)) == 2
        assert specdec.stats(model).plain_generations == 3


def test_beams_that_the_model_asks_for() -> None:
    model = tiny.model()
    model.generation_config.num_beams = 3
    plain = run(model)
    with quietly(), specdec.speculating(model, Oracle(), POLICY):
        assert run(model) == plain
        assert specdec.stats(model).plain_generations == 1


@pytest.mark.parametrize(
    "default",
    [
        {"max_time": 1e-9},
        {"use_cache": False},
        {"token_healing": True},
        {"repetition_penalty": 1.5},
        {"num_beams": 3},
        {"do_sample": True, "num_return_sequences": 2},
        {"return_dict_in_generate": True, "output_attentions": True},
        {"forced_eos_token_id": 5},
    ],
    ids=str,
)
def test_defaults_of_the_model_do_not_reach_its_self_test(default: dict[str, Any]) -> None:
    model = tiny.model()
    model.generation_config.update(**default)
    before = model.generation_config.to_dict()
    explicit = {
        "max_time": 100.0, "use_cache": True, "token_healing": False, "num_beams": 1, "num_return_sequences": 1,
        "return_dict_in_generate": False,
    }  # fmt: skip
    with specdec.speculating(model, Oracle(), POLICY, on_unsupported="error"):
        model.generate(prompt(), max_new_tokens=4, **explicit)
        assert specdec.stats(model).level == "tree"
    assert model.generation_config.to_dict() == before


def test_an_encoder_decoder_model() -> None:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    config = transformers.T5Config(vocab_size=97, decoder_start_token_id=0, **sizes)
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(config).eval()
    plain = run(model)
    with specdec.speculating(model), pytest.warns(specdec.SpecdecWarning, match="encoder-decoder"):
        assert run(model) == plain
    with specdec.speculating(model, on_unsupported="error"), pytest.raises(ValueError, match="encoder-decoder"):
        model.generate(prompt())


def test_a_model_in_training_mode_and_out_of_it() -> None:
    model = tiny.model(attention_dropout=0.3).train()
    plain = run(model)
    specdec.wrap(model, Oracle(), POLICY)
    with pytest.warns(specdec.SpecdecWarning, match="training mode"):
        assert run(model) == plain
    model.eval()
    run(model)
    assert specdec.stats(model).level == "tree"
    assert (specdec.stats(model).generations, specdec.stats(model).plain_generations) == (1, 1)


def test_token_healing(model: Any) -> None:
    tokenizer = healer()
    ids = torch.tensor([[10, 11, 12, 3]])

    def run() -> Any:
        return outcome(lambda: model.generate(ids, token_healing=True, tokenizer=tokenizer, max_new_tokens=6))

    plain = run()
    with specdec.speculating(model, Oracle(), POLICY), pytest.warns(specdec.SpecdecWarning, match="healing"):
        assert run() == plain
    assert isinstance(plain, list)


def healer() -> Any:
    """A tokenizer in which one token begins another."""
    from tokenizers import Tokenizer, decoders, models

    words = ["<pad>", "<s>", "</s>", "a", "b", "ab", " ", *(chr(200 + i) for i in range(90))]
    spelling = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [("a", "b")]))
    spelling.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=spelling, pad_token="<pad>", bos_token="<s>")


def test_a_quantized_cache_ends_as_it_does_plainly(model: Any) -> None:
    """With the tokens where its backend is installed, else with the same error."""
    plain = run(model, cache_implementation="quantized")
    with quietly(), specdec.speculating(model, Oracle(), POLICY):
        assert run(model, cache_implementation="quantized") == plain


def test_the_next_call_speculates_again(model: Any) -> None:
    plain = model.generate(prompt(), max_new_tokens=20)
    with quietly(), specdec.speculating(model, Oracle(plain.tolist()), POLICY):
        run(model, num_beams=2)
        assert model.generate(prompt(), max_new_tokens=20).tolist() == plain.tolist()
        assert specdec.stats(model).accepted > 0
