"""Where a model's positions end or change, and where a generation ends: no draft goes past."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import DynamicCache

import specdec
from specdec.core import Budget, Context, DraftTree
from specdec.limits import NEAR, UNLIMITED, positions_left, room, rotary_change, temperature_change
from specdec.policies import FixedPolicy
from tests import tiny
from tests.tiny import Oracle, both, padded, prompt, same

TRAINED = 32
FREE = {"eos_token_id": None}


class Deep(Oracle):
    """Guesses as deep as it may, always, and remembers how deep that was."""

    def __init__(self) -> None:
        super().__init__()
        self.depths: list[int] = []

    def tree(self, tokens: np.ndarray, budget: Budget) -> DraftTree:
        depth = budget.depth if budget.nodes else 0
        self.depths.append(depth)
        return DraftTree.chain(int(tokens[-1]), [5] * depth, [1.0] * depth, "deep")


def rotary(kind: str, model: str = "Llama") -> Any:
    """A model trained on 32 positions that rotates those beyond otherwise."""
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0}
    if kind == "dynamic":
        return tiny.model(model, max_position_embeddings=TRAINED, rope_parameters=rope)
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0]}
    rope["original_max_position_embeddings"] = TRAINED
    return tiny.model(
        model, max_position_embeddings=128, original_max_position_embeddings=TRAINED, rope_parameters=rope
    )


def until(length: int) -> dict[str, Any]:
    """Arguments that end a generation at a length that ``generate`` does not know beforehand."""
    return {"stopping_criteria": [lambda ids, scores: torch.full((len(ids),), ids.shape[1] >= length)], **FREE}


CHANGING = [("longrope", "Llama"), ("longrope", "Phi3"), ("dynamic", "Llama")]


@pytest.fixture(params=CHANGING, ids="-".join)
def changing(request: pytest.FixtureRequest) -> Any:
    return rotary(*request.param)


class TestRotaryEmbeddingsThatChange:
    """Beyond the trained length a pass over several tokens would rotate them otherwise than single passes do."""

    def equal(self, model: Any, arguments: Any, **more: Any) -> specdec.Stats:
        result = both(model, arguments, on_unsupported="fallback", **more, **FREE)
        assert result.ours.tolist() == result.plain.tolist()
        return result.stats

    def test_a_text_that_stays_below(self, changing: Any) -> None:
        assert same(changing, {"input_ids": prompt(12)}, max_new_tokens=TRAINED - 12, **FREE).stats.tokens == 20

    @pytest.mark.filterwarnings("ignore::specdec.SpecdecWarning")
    @pytest.mark.parametrize("new", [13, 14, 30])
    def test_a_text_that_passes_it(self, changing: Any, new: int) -> None:
        self.equal(changing, {"input_ids": prompt(20)}, max_new_tokens=new)
        self.equal(changing, {"input_ids": prompt(20)}, max_new_tokens=new, do_sample=True)

    @pytest.mark.filterwarnings("ignore::specdec.SpecdecWarning")
    def test_a_text_that_begins_above(self, changing: Any) -> None:
        stats = self.equal(changing, {"input_ids": prompt(TRAINED + 4)}, max_new_tokens=20)
        rope = changing.config.rope_parameters["rope_type"]
        assert (stats.accepted > 0) == (rope == "longrope")  # which changes but once

    @pytest.mark.filterwarnings("ignore::specdec.SpecdecWarning")
    def test_rows_that_pass_it_one_after_another(self, changing: Any) -> None:
        self.equal(changing, padded(20, 12, 6), max_new_tokens=40)

    @pytest.mark.filterwarnings("ignore::specdec.SpecdecWarning")
    @pytest.mark.parametrize("new", [10, 20, 40])
    def test_a_prompt_of_embeddings(self, changing: Any, new: int) -> None:
        self.equal(changing, {"inputs_embeds": changing.get_input_embeddings()(prompt(20))}, max_new_tokens=new)

    @pytest.mark.filterwarnings("ignore::specdec.SpecdecWarning")
    @pytest.mark.parametrize("only_new", [False, True])
    def test_a_conversation_that_passes_it(self, changing: Any, only_new: bool) -> None:
        def second_turn() -> dict[str, Any]:
            cache = DynamicCache(config=changing.config)
            first = changing.generate(prompt(20), max_new_tokens=1, past_key_values=cache, **FREE)
            text = torch.cat([first, prompt(5, seed=1)], dim=1)
            mask = torch.ones_like(text)
            return {"input_ids": text[:, 20:] if only_new else text, "attention_mask": mask, "past_key_values": cache}

        self.equal(changing, second_turn, max_new_tokens=20)

    def test_the_reason_is_said(self, changing: Any) -> None:
        with specdec.speculating(changing), pytest.warns(specdec.SpecdecWarning, match="may pass 32 tokens"):
            changing.generate(prompt(20), max_new_tokens=13)


@pytest.mark.parametrize("kind", ["linear", "yarn", "default"])
def test_rotary_embeddings_that_do_not_change(kind: str) -> None:
    same(rotary(kind), {"input_ids": prompt(20)}, max_new_tokens=40, **FREE)


class TestLearntPositions:
    """The table has 64."""

    def test_to_the_last_one(self) -> None:
        assert same(tiny.gpt2(), {"input_ids": prompt(20)}, max_new_tokens=44, **FREE).plain.shape == (1, 64)

    def test_no_draft_leaves_the_table(self) -> None:
        drafter = Deep()
        result = same(tiny.gpt2(), {"input_ids": prompt(50), **until(63)}, drafter=drafter, max_new_tokens=500)
        assert result.plain.shape[1] == 63
        assert drafter.depths[0] == 5 > drafter.depths[-2] > 0

    def test_where_the_prompt_came_as_embeddings(self) -> None:
        model = tiny.gpt2()
        embeddings = {"inputs_embeds": model.get_input_embeddings()(prompt(50)), **until(13)}
        same(model, embeddings, drafter=Deep(), max_new_tokens=500)

    def test_with_padding(self) -> None:
        same(tiny.gpt2(), {**padded(50, 40), **until(63)}, drafter=Deep(), max_new_tokens=500)
        same(tiny.gpt2(), padded(50, 40), drafter=Deep(), max_new_tokens=14, **FREE)

    def test_an_offset_in_the_table(self) -> None:
        sizes = {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.6, "max_position_embeddings": 64}
        config = transformers.OPTConfig(**{**tiny.SIZES, **sizes})
        torch.manual_seed(0)
        same(transformers.OPTForCausalLM(config).eval(), {"input_ids": prompt(20)}, max_new_tokens=44, **FREE)


def test_no_draft_is_longer_than_what_may_still_come() -> None:
    drafter, model = Deep(), tiny.model()
    with specdec.speculating(model, drafter, FixedPolicy(8, 8, 2), on_unsupported="error"):
        model.generate(prompt(), max_new_tokens=12, **FREE)
    assert drafter.depths[0] == 8
    assert drafter.depths[-2:] == [1, 0]  # the last-but-one token and the goodbye: nothing is guessed for the last


def test_nor_where_the_prompt_is_padded() -> None:
    drafter, model = Deep(), tiny.model()
    with specdec.speculating(model, drafter, FixedPolicy(8, 8, 2), on_unsupported="error"):
        model.generate(**{name: value[1:] for name, value in padded(9, 4).items()}, max_new_tokens=12, **FREE)
    assert drafter.depths[0] == 8
    assert drafter.depths[-2:] == [1, 0]


def contexts(*lengths: int) -> list[Context]:
    return [Context(np.zeros(length, np.int64)) for length in lengths]


class TestRoom:
    NONE = SimpleNamespace()

    def left(
        self, config: Any, max_length: int | None, lengths: Sequence[int], padding: Any, earlier: int = 0
    ) -> list[int]:
        texts = contexts(*lengths)
        return list(map(room(config, max_length, texts, padding, earlier), texts))

    def test_to_the_end_of_the_generation(self) -> None:
        assert self.left(self.NONE, 20, [10, 19, 20], [0, 0, 0]) == [9, 0, -1]

    def test_padding_counts_toward_the_length(self) -> None:
        assert self.left(self.NONE, 20, [10, 6], [0, 4]) == [9, 9]

    def test_to_the_last_position(self) -> None:
        config = SimpleNamespace(max_position_embeddings=12)
        assert self.left(config, None, [10, 6], [0, 4]) == [2, 6]
        assert self.left(config, None, [10], [0], earlier=1) == [1]
        assert self.left(config, 12, [10], [0]) == [1]

    def test_no_limit_at_all(self) -> None:
        assert self.left(self.NONE, None, [10], [0]) == [UNLIMITED]

    def test_positions(self) -> None:
        config = SimpleNamespace(max_position_embeddings=12)
        assert [positions_left(config, length) for length in (1, 11, 12, 13)] == [11, 1, 0, UNLIMITED]
        assert positions_left(self.NONE, 5) == UNLIMITED


@pytest.mark.parametrize(
    ("rope", "length", "max_length", "earlier", "change"),
    [
        (None, 10, None, 0, None),
        ({"rope_type": "default"}, 10, 500, 0, None),
        ({"rope_type": "longrope", "original_max_position_embeddings": 32}, 10, 32, 0, None),
        ({"rope_type": "longrope", "original_max_position_embeddings": 32}, 10, 33, 0, 32),
        ({"rope_type": "longrope", "original_max_position_embeddings": 32}, 10, None, 0, 32),
        ({"rope_type": "longrope", "original_max_position_embeddings": 32}, 10, 32, 1, 32),
        ({"rope_type": "longrope", "original_max_position_embeddings": 32}, 33, 40, 0, None),
        ({"rope_type": "longrope", "original_max_position_embeddings": 32}, 10, 40, 23, None),
        ({"rope_type": "dynamic"}, 10, 64, 0, None),
        ({"rope_type": "dynamic"}, 10, 65, 0, 64),
        ({"rope_type": "dynamic"}, 70, 80, 0, 64),
        ({"full_attention": {"rope_type": "longrope", "original_max_position_embeddings": 16}}, 10, 20, 0, 16),
        ({"full_attention": {"rope_type": "default"}, "sliding_attention": {"rope_type": "dynamic"}}, 10, 65, 0, 64),
    ],
)
def test_rotary_changes(rope: Any, length: int, max_length: int | None, earlier: int, change: int | None) -> None:
    config = SimpleNamespace(rope_parameters=rope, max_position_embeddings=64)
    assert rotary_change(config, length, max_length, earlier) == change


@pytest.mark.parametrize(
    ("tuned", "length", "max_length", "earlier", "change"),
    [
        (True, 10, 8191 - NEAR, 0, None),
        (True, 10, 8192 - NEAR, 0, 8192),
        (True, 10, 8191 - NEAR, 1, 8192),
        (True, 10, None, 0, 8192),
        (True, 8191, 8200, 0, 8192),
        (True, 8192, 9000, 0, None),
        (True, 100, 7000, 8092, None),
        (False, 10, 9000, 0, None),
    ],
)
def test_temperature_changes(tuned: bool, length: int, max_length: int | None, earlier: int, change: int) -> None:
    config = SimpleNamespace(attn_temperature_tuning=tuned, floor_scale=8192)
    assert temperature_change(config, length, max_length, earlier) == change
    assert temperature_change(SimpleNamespace(), length, max_length, earlier) is None


@pytest.mark.parametrize("scale", [64, 8192])
def test_where_queries_are_scaled_anew_nothing_is_drafted(scale: int) -> None:
    """A tree's nodes would be scaled by their places in the pass."""
    tuned = {"attn_temperature_tuning": True, "floor_scale": scale}
    model = tiny.build("Llama4Text", **tiny.hybrids(96)["Llama4Text"], **tuned)
    expected = model.generate(prompt(50), max_new_tokens=30, do_sample=False, **FREE)
    with specdec.speculating(model, Deep(), FixedPolicy(8, 8, 2)), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        got = model.generate(prompt(50), max_new_tokens=30, do_sample=False, **FREE)
        stats = specdec.stats(model)
    assert got.tolist() == expected.tolist()
    assert (stats.plain_generations, stats.drafted > 0) == ((1, False) if scale == 64 else (0, True))
    assert any("near 64 tokens" in str(each.message) for each in said) == (scale == 64)
