"""A cache that the caller hands in: read on from, and left as plain ``generate`` leaves it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, LogitsProcessor

import specdec
from specdec.policies import FixedPolicy
from tests import tiny
from tests.tiny import Oracle, prompt

POLICY = FixedPolicy(12, 5, 6)
SLIDING = {"sliding_window": 6}
MIXED = {"layer_types": ["sliding_attention", "full_attention"], "head_dim": 8}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("Llama", {}),
    "sliding": ("Mistral", SLIDING),
    "mixed": ("Qwen3", {**SLIDING, **MIXED, "use_sliding_window": True}),
}


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> Any:
    kind, changes = KINDS[request.param]
    return tiny.model(kind, **changes)


class Chat:
    """Three turns with one cache; what was written, and what the cache held after each."""

    def __init__(
        self, model: Any, cache: DynamicCache, rows: int = 1, only_new: bool = False, new: int = 12, **arguments: Any
    ) -> None:
        self.cache, self.texts, self.held = cache, [], []
        text, mask = prompt(9, rows), torch.ones(rows, 9, dtype=torch.long)
        if rows > 1:
            mask[1, :4] = 0
        for turn in range(3):
            fed = text[:, cache.get_seq_length() :] if only_new else text
            arguments |= {"attention_mask": mask, "past_key_values": cache, "max_new_tokens": new}
            output = model.generate(fed, return_dict_in_generate=turn == 1, **arguments)
            if turn == 1:
                assert output.past_key_values is cache
            written = tiny.sequences(output)[:, fed.shape[1] :]
            text = torch.cat([text, written], dim=1)
            assert cache.get_seq_length() == text.shape[1] - 1
            self.texts.append(text.tolist())
            self.held.append([(layer.keys.clone(), layer.values.clone()) for layer in cache.layers])
            text = torch.cat([text, prompt(5, rows, seed=turn + 1)], dim=1)
            mask = torch.cat([mask, mask.new_ones(rows, text.shape[1] - mask.shape[1])], dim=1)
        self.mask = mask


def compare(model: Any, drafter: Any = None, with_config: bool = True, **arguments: Any) -> specdec.Stats:
    """The same chat plainly and speculating; returns what was counted."""

    def cache() -> DynamicCache:
        return DynamicCache(config=model.config) if with_config else DynamicCache()

    plain = Chat(model, cache(), **arguments)
    skip = (plain.mask == 0).sum(-1).tolist()
    known = Oracle([row[n:] for row, n in zip(plain.texts[-1], skip, strict=True)])
    with specdec.speculating(model, drafter or known, POLICY, on_unsupported="error"):
        ours = Chat(model, cache(), **arguments)
        stats = specdec.stats(model)
    assert ours.texts == plain.texts
    for mine, theirs in zip(ours.held, plain.held, strict=True):
        for layer in zip(mine, theirs, strict=True):
            torch.testing.assert_close(*layer, atol=2e-4, rtol=1e-4)
    assert stats.generations == 3
    return stats


@pytest.mark.parametrize("drafter", [None, "auto"])
def test_three_turns(model: Any, drafter: Any) -> None:
    stats = compare(model, drafter, eos_token_id=None)
    assert stats.tokens == 36
    assert stats.accepted > 0 or drafter


def test_three_turns_that_end_early(model: Any) -> None:
    assert compare(model, eos_token_id=list(range(3, 90, 5))).tokens < 36


@pytest.mark.parametrize("new", [1, 2])
def test_turns_of_a_token_or_two(model: Any, new: int) -> None:
    """The prompt's own pass may be the only one."""
    assert compare(model, Oracle(), new=new, eos_token_id=None).tokens == 3 * new


def test_a_cache_that_does_not_know_the_model(model: Any) -> None:
    """It keeps everything, windows or not."""
    compare(model, with_config=False)


def test_only_the_new_tokens_are_passed(model: Any) -> None:
    """The mask still covers all."""
    compare(model, Oracle(), only_new=True)


@pytest.mark.parametrize("ends", [None, list(range(3, 90, 5))], ids=["free", "ending"])
def test_a_padded_batch(model: Any, ends: list[int] | None) -> None:
    """Rows that end early leave padding in the cache."""
    assert compare(model, rows=2, eos_token_id=ends).accepted > 0


def test_the_cache_is_left_alone_where_generation_fails(model: Any) -> None:
    class Raises(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            raise ArithmeticError

    plain = model.generate(prompt(), max_new_tokens=12)
    cache = DynamicCache(config=model.config)
    with specdec.speculating(model, Oracle(), POLICY, on_unsupported="error"):
        model.generate(prompt(), max_new_tokens=2, past_key_values=cache)
        with pytest.raises(ArithmeticError):
            model.generate(plain[:, :15], past_key_values=cache, logits_processor=[Raises()])
        assert cache.get_seq_length() == 10
        assert model.generate(plain[:, :13], max_new_tokens=8, past_key_values=cache).tolist() == plain.tolist()


def test_learnt_positions_count_what_the_cache_holds() -> None:
    """A draft behind a long cached text, of which only the last tokens are passed, does not leave the table."""
    model, ids = tiny.gpt2(), prompt(50)
    free = model.generate(ids, max_new_tokens=12, eos_token_id=None)

    class Deep(Oracle):
        def tree(self, tokens: Any, budget: Any) -> Any:
            depth = budget.depth if budget.nodes else 0
            return specdec.DraftTree.chain(int(tokens[-1]), [5] * depth, [1.0] * depth, "deep")

    def turn() -> list[list[int]]:
        cache = DynamicCache(config=model.config)
        model.generate(ids[:, :45], max_new_tokens=1, past_key_values=cache, eos_token_id=None)
        arguments = {"attention_mask": torch.ones(1, 50, dtype=torch.long), "past_key_values": cache}
        return model.generate(ids[:, 45:], max_new_tokens=100, eos_token_id=free[0, -1].item(), **arguments).tolist()

    plain = turn()
    with specdec.speculating(model, Deep(), FixedPolicy(8, 8, 2), on_unsupported="error"):
        assert turn() == plain
