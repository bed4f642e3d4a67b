"""What is retrieved, for whom, and that a pass over it is attention over those tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from specdec import attention as our_attention
from specdec.cache import SlotCache, SlotLayer
from specdec.core import DraftTree
from specdec.drafters import middle
from specdec.drafters.middle import Middle, narrowed
from specdec.retrieval_cache import RetrievalCache, queries, select
from tests import tiny
from tests.long_context import started
from tests.tiny import padded, prompt

HEADS = {"grouped": 2, "one to one": 4}
HYBRID = tiny.hybrids(16)


def of_means(*means: tuple[float, ...], chunk: int = 2) -> torch.Tensor:
    """Keys of one head whose chunks have these means."""
    spread = torch.tensor([1.0, -1.0]).repeat_interleave(chunk // 2)[:, None]
    return torch.cat([torch.tensor([mean]) + spread for mean in means])[None]


class TestSelect:
    def test_g13(self) -> None:
        """The first chunk, then those that score best; the one that scores worst comes last."""
        keys, query = of_means((1, 0), (0, 2), (1, 0), (-1, 0), (0, 2), (2, 2)), torch.tensor([[1.0, 0.5]])
        assert (keys[0].view(6, 2, 2).mean(1) @ query[0]).tolist() == [1, 1, 1, -1, 1, 3]
        first, best, third = select(query, keys, 2, 3)[0].tolist()
        assert [first, best] == [0, 5]
        assert third in (1, 2, 4)
        assert select(query, keys, 2, 6)[0, -1] == 3

    def test_all_where_there_is_room(self) -> None:
        keys = of_means((1, 0), (0, 2), (1, 0))
        assert sorted(select(torch.ones(1, 2), keys, 2, 9)[0].tolist()) == [0, 1, 2]
        assert select(torch.ones(1, 2), keys[:, :1], 2, 9).shape == (1, 0)

    def test_a_head_of_its_own_for_each_head_of_keys(self) -> None:
        keys = of_means((0, 0), (9, 0), (0, 9)).expand(2, -1, -1)
        assert select(torch.tensor([[1.0, 0], [0, 1.0]]), keys, 2, 2)[:, 1].tolist() == [1, 2]

    def test_grouped_heads_have_an_equal_say(self) -> None:
        """One that wants the first chunk above all does not outvote three that want the last."""
        keys = of_means((0, 0), (9, 0), (0, 9))
        loud, soft = [1.0, 0], [0, 0.9]
        assert select(torch.tensor([loud, soft, soft, soft]), keys, 2, 2)[0, 1] == 2
        assert select(torch.tensor([loud, loud, loud, soft]), keys, 2, 2)[0, 1] == 1

    def test_scores_far_apart_do_not_vanish(self) -> None:
        keys = of_means((0, 0), (900, 0), (-300, 0), (-200, 0), (-900, 0))
        assert select(torch.tensor([[1.0, 0.0]]), keys, 2, 4)[0].tolist() == [0, 1, 3, 2]

    def test_against_the_formula(self) -> None:
        """Shares of attention that each of three heads pays to chunks' means, added up; two keys are left over."""
        random = np.random.default_rng(0)
        keys, query = random.normal(size=(2, 122, 16)), 3 * random.normal(size=(6, 16))
        chosen = select(torch.from_numpy(query).float(), torch.from_numpy(keys).float(), 3, 20)
        for head in range(2):
            means = [keys[head, 3 * i : 3 * i + 3].mean(0) for i in range(40)]
            scores = np.exp(query[3 * head : 3 * head + 3] @ np.transpose(means) / 4)
            shares = (scores / scores.sum(1, keepdims=True)).sum(0)
            best = sorted(range(1, 40), key=lambda i, shares=shares: -shares[i])
            assert chosen[head].tolist() == [0, *best[:19]]


@pytest.mark.parametrize("arguments", [{"budget": 8}, {"chunk": 0}])
def test_budgets_that_cannot_be(arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="two chunks at least"):
        RetrievalCache(SlotCache(layer_class_to_replicate=SlotLayer), **{"chunk": 8, **arguments})


def test_windows_alone_have_nothing_to_retrieve() -> None:
    with pytest.raises(ValueError, match="sliding windows"):
        RetrievalCache(SlotCache(layers=[SlotLayer(9)]))


def read(heads: int, budget: int, length: int = 200, **more: Any) -> tuple[Any, Middle]:
    """A model that has read a prompt, and a retrieval cache beside its own, built."""
    target = started(tiny.model(num_key_value_heads=heads, **more), prompt(length))
    level = Middle(target, 0, budget, 8)
    level.refresh(7, anew=True)
    return target, level


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_with_room_for_all_it_is_the_full_cache(heads: int, attention: str) -> None:
    target, level = read(heads, 400, attn_implementation=attention)
    tree = DraftTree.chain(7, [8, 9, 10], [1.0] * 3, "")
    torch.testing.assert_close(level.model.forward([tree]).logits, target.forward([tree]).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", HYBRID)
def test_layers_with_windows_or_chunks_hold_those(kind: str) -> None:
    """With room for all in the others it is the full cache, whatever was guessed, and as long as the text grows."""
    model, batch = tiny.build(kind, max_position_embeddings=2048, **HYBRID[kind]), padded(60, 9)
    for target, row in ((started(model, prompt(200)), 0), (started(model, **batch), 1)):
        level, before = Middle(target, row, 1600, 8), target.lengths[0]
        level.refresh(7, anew=True)
        tree = DraftTree(np.arange(7, 13), np.array([-1, 0, 1, 1, 2, 3]), np.ones(6, np.float32), ("",) * 6)
        chain = DraftTree.chain(7, range(5, 95), [1.0] * 90, "")
        for _ in range(5):
            ours, full = level.model.forward([tree]), target.forward([tree] * len(target.lengths))
            torch.testing.assert_close(ours.logits[0], full.logits[row], atol=1e-4, rtol=1e-4)
            level.model.keep([[0, 1, 3]])
            level.model.forward([chain])
            level.model.keep([range(91)])
            target.keep([[]] * len(target.lengths))
            target.forward([chain] * len(target.lengths))
            target.keep([range(91)] * len(target.lengths))
            level.refresh(7, anew=False)
        assert target.lengths[row] == level.cache.lengths[0] == before + 5 * 91
        windows = [layer for layer in level.cache.slots if layer.window is not None]
        assert {layer.keys.shape[2] for layer in windows} == {15}


def states(cache: Any) -> list[torch.Tensor]:
    """All that a cache of transformers' own holds, copied."""
    held = [each for layer in cache.layers for each in vars(layer).values()]
    flat = [each for some in held for each in (some.values() if isinstance(some, dict) else [some])]
    return [each.clone() for each in flat if isinstance(each, torch.Tensor)]


@pytest.mark.parametrize("kind", tiny.RECURRENT)
def test_layers_with_recurrent_states_go_on_from_copies_of_those(kind: str) -> None:
    """With room for all in the others it is the full cache, which stays as it is, whatever was guessed."""
    model = tiny.build(kind, max_position_embeddings=2048, **tiny.RECURRENT[kind])
    first, second = DraftTree.chain(7, [8, 9, 10], [1.0] * 3, ""), DraftTree.chain(9, [11, 12], [1.0] * 2, "")
    for target, row in ((started(model, prompt(200)), 0), (started(model, **padded(60, 33)), 1)):
        level, rows = Middle(target, row, 1600, 8), len(target.lengths)
        for anew in (True, False, False, True, False):
            before = states(target.cache)
            level.refresh(7, anew)
            ours = [level.model.forward([first]).logits[0]]
            level.model.keep([[0, 1]])
            ours.append(level.model.forward([second]).logits[0])
            level.model.keep([[0]])
            assert all(torch.equal(*each) for each in zip(before, states(target.cache), strict=True))
            for chain, logits, path in ((first, ours[0], [0, 1]), (second, ours[1], [0, 1, 2])):
                torch.testing.assert_close(target.forward([chain] * rows).logits[row], logits, atol=1e-4, rtol=1e-4)
                target.keep([path] * rows)


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_later_builds_ask_by_what_is_held(heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for all of a text that asks for what a pass over all of it asks for, whatever was guessed before."""
    target, level = read(heads, 400, 60)
    level.write(DraftTree.chain(7, [8, 9], [1.0] * 2, ""), 3, torch.Generator(), 0)
    target.forward([DraftTree.chain(7, range(20, 26), [1.0] * 6, "")])
    target.keep([range(6)])
    ours = dict[int, torch.Tensor]()
    monkeypatch.setattr(level.cache, "rebuild", ours.update)
    level.refresh(25, anew=True)
    with queries(target.config) as full:
        target.forward([DraftTree.root(25)])
    assert ours.keys() == full.keys()
    for number, query in full.items():
        torch.testing.assert_close(ours[number], query, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_a_draft_taken_back_leaves_the_same_bytes(heads: int) -> None:
    _, level = read(heads, 40)
    for path in ([], [0, 2], [0, 1]):
        before = [(layer.keys.clone(), layer.values.clone(), layer.offset) for layer in level.cache.slots]
        level.model.forward([DraftTree.chain(7, [8, 9], [1.0] * 2, "")])
        level.model.keep([path])
        level.refresh(7, anew=False)  # nothing was committed
        for layer, (keys, values, offset) in zip(level.cache.slots, before, strict=True):
            assert torch.equal(layer.keys, keys)
            assert torch.equal(layer.values, values)
            assert layer.offset == offset


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_holds_copies_of_the_chosen_rows_and_of_all_since(heads: int) -> None:
    target, level = read(heads, 32, 203)
    full, own, n = target.cache.slots[1], level.cache.slots[1], 4 * 8 + 3
    assert own.keys.shape[2] == n
    assert torch.equal(own.keys[0, :, :8], full.keys[0, :, :8])
    assert torch.equal(own.keys[0, :, -3:], full.keys[0, :, 200:203])
    level.write(DraftTree.chain(7, [8, 9], [1.0] * 2, ""), 3, torch.Generator(), 0)  # of which nothing stays
    target.forward([DraftTree.chain(7, [11, 12], [1.0] * 2, "")])
    target.keep([[0, 1]])
    level.refresh(12, anew=False)
    assert torch.equal(own.keys[0, :, n:], full.keys[0, :, 203:205])
    assert torch.equal(own.values[0, :, n:], full.values[0, :, 203:205])
    assert own.keys.shape[2] == n + 2
    buffer, before = own.buffers[0].data_ptr(), full.keys.clone()
    level.refresh(12, anew=True)
    assert own.keys.shape[2] == 32 + 5
    assert torch.equal(own.keys[0, :, :8], full.keys[0, :, :8])
    assert torch.equal(own.keys[0, :, -5:], full.keys[0, :, 200:205])
    assert torch.equal(own.values[0, :, -5:], full.values[0, :, 200:205])
    assert torch.equal(full.keys, before)
    assert own.buffers[0].data_ptr() == buffer  # where the rows before were


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_finds_a_planted_chunk(heads: int) -> None:
    """Keys that answer the query of the text's last token, far back: retrieved in their head alone."""
    target, level = read(heads, 24, 400)
    whole = narrowed(target, 0, middle.only_row(target.cache, 0))
    with queries(target.config) as noted:
        whole.forward([DraftTree.root(7)])
    first = noted[0][0, 0, 0]
    keys = target.cache.slots[0]._keys
    keys[0, 0, 160:168] = 9 * first / first.norm()
    level.refresh(7, anew=True)
    own = level.cache.slots[0].keys[0]
    assert torch.equal(own[0, 8:16], keys[0, 0, 160:168])
    assert not any(torch.equal(own[1, at : at + 8], keys[0, 1, 160:168]) for at in (8, 16))


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_a_pass_is_full_attention_with_the_other_tokens_masked(heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Head by head: a full pass whose attention is shown each head's own tokens alone."""
    target, level = read(heads, 40)
    chain = DraftTree.chain(7, [8, 9], [1.0] * 2, "")
    ours = level.model.forward([chain]).logits
    held = [layer.keys[0] for layer in level.cache.slots]
    calls = iter(range(9))

    def shown(query: Any, key: Any, value: Any, mask: Any, *more: Any) -> Any:
        layer = next(calls)
        seen = (key[0, :, :, None] == held[layer][:, None]).all(-1).any(-1)  # [kv_heads, slots]
        seen[:, -3:] = False
        own = seen.repeat_interleave(query.shape[1] // key.shape[1], 0)[None, :, None].expand(-1, -1, 3, -1).clone()
        own[..., -3:] = torch.ones(3, 3, dtype=torch.bool).tril()
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=own)

    monkeypatch.setattr(our_attention, "attend", shown)
    with our_attention.switched(target.config):
        full = narrowed(target, 0, target.cache).forward([chain]).logits
    assert next(calls) == 2
    torch.testing.assert_close(ours, full, atol=1e-4, rtol=1e-4)


def test_rows_of_a_batch_are_read_without_their_padding_and_left_as_they_are() -> None:
    model, batch = tiny.model(), padded(60, 33)
    target, alone = started(model, **batch), started(model, batch["input_ids"][1:, 27:])
    before = [layer.keys.clone() for layer in target.cache.slots]
    both = [Middle(target, 1, 16, 4), Middle(alone, 0, 16, 4)]
    tree = DraftTree.chain(7, [8, 9], [1.0] * 2, "")
    for level in both:
        level.refresh(7, anew=True)
    ours, theirs = (level.model.forward([tree]).logits for level in both)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert all(torch.equal(a, layer.keys) for a, layer in zip(before, target.cache.slots, strict=True))


def test_memory_is_the_same_for_any_length() -> None:
    sizes = {read(2, 64, length)[1].cache.bytes for length in (104, 200, 400)}
    assert len(sizes) == 1


def test_queries_are_noted_and_the_models_attention_given_back() -> None:
    model = tiny.model()
    with queries(model.config) as noted, torch.no_grad():
        inside = model(prompt()).logits
    assert sorted(noted) == [0, 1]
    assert noted[0].shape == (1, 4, 9, 8)
    assert model.config._attn_implementation == "sdpa"
    with torch.no_grad():
        torch.testing.assert_close(model(prompt()).logits, inside, atol=1e-4, rtol=1e-4)
