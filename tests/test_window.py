"""A small model that holds a window of the text: it drafts as a model over a StreamingCache, in constant memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from specdec.core import Budget, Context, DraftTree
from specdec.drafters import SmallModelDrafter
from specdec.drafters.model_rows import PIECE, SINKS
from specdec.masks import Reach
from specdec.model import reaches
from specdec.streaming_cache import StreamingCache
from tests import tiny

WINDOW = 128
BUDGET = Budget(12, 4, 3)
LATER = 3  # tokens that come after the rest of a text has been read
HYBRID = {**tiny.hybrids(96), "Mistral": {"sliding_window": 300}}  # of the last less is held


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.model(max_position_embeddings=4096)


@pytest.fixture(scope="module")
def drafter(model: Any) -> SmallModelDrafter:
    return SmallModelDrafter(model, "best-first", window=WINDOW, cpu_kernels=False)


def text(length: int, seed: int = 0) -> np.ndarray:
    return tiny.prompt(length, seed=seed)[0].numpy()


def draft(drafter: SmallModelDrafter, tokens: np.ndarray) -> DraftTree:
    drafter.reset()
    return drafter.draft([Context(tokens)], [BUDGET])[0]


def same(tree: DraftTree, other: DraftTree) -> bool:
    return bool(
        np.array_equal(tree.tokens, other.tokens)
        and np.array_equal(tree.parents, other.parents)
        and np.allclose(tree.probability, other.probability, atol=1e-5)
    )


@torch.no_grad()
def chance(model: Any, tokens: np.ndarray, path: list[int]) -> float:
    """A path's probability behind a text, by a model over a StreamingCache."""
    cache, ids, product = StreamingCache(SINKS, WINDOW), torch.from_numpy(tokens)[None], 1.0
    for piece in (ids[:, :-PIECE], ids[:, -PIECE:]):  # as rows are read
        logits = model(piece, past_key_values=cache).logits
    for token in path:
        product *= float(logits[0, -1].softmax(-1)[token])
        logits = model(torch.tensor([[token]]), past_key_values=cache).logits
    return product


def paths(tree: DraftTree) -> dict[int, list[int]]:
    """The tokens on the way to each node, itself the last."""
    found = dict[int, list[int]]({0: []})
    for node in range(1, len(tree)):
        found[node] = [*found[int(tree.parents[node])], int(tree.tokens[node])]
    return found


@torch.no_grad()
def masked_chance(model: Any, tokens: np.ndarray, path: list[int]) -> float:
    """A path's probability behind a text, by plain layers over all of it, each token shown what was held then."""
    n, before = len(tokens), len(tokens) - LATER
    ends = [*range(PIECE, before - PIECE, PIECE), before - PIECE, before, n + len(path)]
    first, dropped = np.zeros(n + len(path), np.int64), 0
    for start, end in zip([0, *ends[:-2], before - 1], ends, strict=True):  # a text's last token is fed again
        first[start:end] = dropped
        dropped = end - SINKS - WINDOW if end - dropped - SINKS - WINDOW > 64 else dropped
    own, other = np.arange(n + len(path))[:, None], np.arange(n + len(path))
    held = (other <= own) & ((other < SINKS) | (other >= SINKS + first[:, None]))
    masks = {name: torch.from_numpy(held & _near(own, other, reach))[None, None] for name, reach in known(model)}
    ids = torch.tensor([[*tokens, *path]])
    mask = masks if len(masks) > 1 else next(iter(masks.values()))
    law = model(ids, attention_mask=mask).logits[0, n - 1 : -1].softmax(-1)
    return float(law[range(len(path)), path].prod())


def known(model: Any) -> Any:
    """How far its kinds of layers look back."""
    return (reaches(model.config) or {}).items()


def _near(own: np.ndarray, other: np.ndarray, reach: Reach) -> Any:
    if reach.chunk:
        return own // reach.chunk == other // reach.chunk
    return own - other < (reach.window or len(other))


@pytest.mark.parametrize("length", [630, 767, 1500])  # a chunk of 96 ends with the token behind 767
@pytest.mark.parametrize("kind", HYBRID)
def test_layers_that_look_less_far_see_what_of_theirs_is_held(kind: str, length: int) -> None:
    model, tokens = tiny.build(kind, max_position_embeddings=4096, **HYBRID[kind]), text(length)
    drafter, before = SmallModelDrafter(model, "best-first", window=WINDOW, cpu_kernels=False), Context(tokens[:-LATER])
    drafter.draft([before], [BUDGET])
    before.finished = True
    drafter.draft([before], [Budget(0, 0, 0)])
    tree = drafter.draft([Context(tokens)], [BUDGET])[0]
    assert len(tree) == 13
    assert max(map(len, paths(tree).values())) > 1
    for node, path in paths(tree).items():
        assert tree.probability[node] == pytest.approx(masked_chance(model, tokens, path) if path else 1, rel=1e-3)


@pytest.mark.parametrize("length", [600, 700])
def test_drafts_as_a_model_over_a_streaming_cache(model: Any, drafter: SmallModelDrafter, length: int) -> None:
    tokens = text(length)
    tree = draft(drafter, tokens)
    assert not same(tree, draft(SmallModelDrafter(model, "best-first", cpu_kernels=False), tokens))
    for node, path in paths(tree).items():
        assert tree.probability[node] == pytest.approx(chance(model, tokens, path), rel=1e-3)


def test_drafts_as_the_whole_model_while_a_text_fits(model: Any, drafter: SmallModelDrafter) -> None:
    whole = SmallModelDrafter(model, "best-first", cpu_kernels=False)
    assert same(draft(drafter, text(100)), draft(whole, text(100)))


def test_holds_as_much_of_a_long_text_as_of_a_short_one(drafter: SmallModelDrafter) -> None:
    held = []
    for length in (1500, 3500):
        context = Context(text(length))
        drafter.draft([context], [BUDGET])
        row = drafter._keeper.text(context)
        assert row is not None
        assert row.rows is not None
        held.append(row.rows.cache.bytes)
    assert held[0] == held[1]


def test_begins_anew_where_what_a_text_begins_with_is_gone(drafter: SmallModelDrafter) -> None:
    """The row of a text that ended serves one that begins alike, if it can still be cut back to there."""
    long = Context(text(700))
    drafter.draft([long], [BUDGET])
    long.finished = True
    drafter.draft([long], [Budget(0, 0, 0)])
    tokens = np.concatenate([text(700)[:400], text(300, seed=1)])
    assert drafter._keeper._idle
    again = drafter.draft([Context(tokens)], [BUDGET])[0]
    assert not drafter._keeper._idle
    assert same(again, draft(drafter, tokens))


@pytest.mark.parametrize("tree", ["chain", "rsd-s"])
def test_output_is_plain_generates(model: Any, tree: Any) -> None:
    drafter = SmallModelDrafter(model, tree, window=WINDOW, cpu_kernels=False)
    arguments = {"attention_mask": torch.ones(2, 90, dtype=torch.long), "do_sample": tree != "chain", "top_k": 4}
    result = tiny.same(model, {"input_ids": tiny.prompt(90, 2)}, drafter=drafter, max_new_tokens=120, **arguments)
    assert 0 < result.stats.accepted < result.stats.drafted


@pytest.mark.slow
@pytest.mark.parametrize("heads", [2, 4], ids=["grouped", "one to one"])
def test_at_8k(heads: int) -> None:
    target = tiny.model(num_key_value_heads=heads, max_position_embeddings=1 << 14)
    drafter = SmallModelDrafter(target, "best-first", window=WINDOW, cpu_kernels=False)
    arguments = {"input_ids": tiny.prompt(8000), "max_new_tokens": 40, "min_new_tokens": 40}
    assert tiny.same(target, arguments, drafter=drafter).stats.drafted > 100


def test_arguments(model: Any) -> None:
    with pytest.raises(ValueError, match="window=8: give 128 or more"):
        SmallModelDrafter(model, window=8)
    with pytest.raises(ValueError, match="Lfm2ForCausalLM takes no trees"):
        SmallModelDrafter(tiny.model("Lfm2", layer_types=["conv", "full_attention"]), window=WINDOW)
