"""SlotCache against lists of tokens: what each row holds after passes, kept paths, growth and sliding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, MistralConfig, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

import specdec.cache
from specdec.cache import DummyLayer, SlotCache, SlotLayer
from specdec.kernels.move_rows import move_rows
from tests import tiny
from tests.tiny import padded, prompt, same

HEADS, WIDTH = 2, 3


@pytest.fixture(autouse=True)
def _small_growth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers that are soon too small, windows that soon slide."""
    monkeypatch.setattr(specdec.cache, "GROWTH", 8)


def states(rows: list[list[int]]) -> torch.Tensor:
    """Keys that say which token they are of: [rows, heads, tokens, width]."""
    tokens = torch.tensor(rows, dtype=torch.float32).view(len(rows), 1, -1, 1)
    return tokens.expand(-1, HEADS, -1, WIDTH) + torch.arange(HEADS * WIDTH).view(1, HEADS, 1, WIDTH) / 100


def feed(cache: SlotCache, rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Write the same tokens to every layer; what the first layer shows to attention."""
    shown = [cache.update(states(rows), states(rows) + 0.5, layer) for layer in range(len(cache.layers))]
    return shown[0]


def held(layer: SlotLayer) -> list[list[int]]:
    """The tokens of each row that attention is shown, read from their keys; values and heads must agree."""
    first = layer.get_mask_sizes(0)[1]
    rows = [(layer.keys[row, :, : n - first], layer.values[row, :, : n - first]) for row, n in enumerate(layer.lengths)]
    tokens = [keys[0, :, 0].long().tolist() for keys, _ in rows]
    for (keys, values), row in zip(rows, tokens, strict=True):
        assert torch.equal(keys, states([row])[0])
        assert torch.equal(values, keys + 0.5)
    return tokens


def cache_of(*windows: int | None) -> SlotCache:
    return SlotCache(layers=[SlotLayer(window) for window in windows])


class TestKeep:
    def test_a_path_moves_down_and_the_rest_is_forgotten(self) -> None:
        cache = cache_of(None)
        feed(cache, [[1, 2, 3]])
        feed(cache, [[10, 11, 12, 13, 14]])
        cache.keep([3], [[0, 2, 4]])
        assert held(cache.layers[0]) == [[1, 2, 3, 10, 12, 14]]
        assert cache.lengths == [6]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("windows", [(None, None, None), (None, 50, 6)])
    def test_paths_move_down_in_all_layers(
        self, windows: tuple[int | None, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """In one call where layers are alike, and one by one where they are not."""
        moved = list[int]()
        monkeypatch.setattr(specdec.cache, "move_rows", lambda *given: moved.append(1) or move_rows(*given))
        cache = cache_of(*windows)
        for layer in range(3):
            for rows in ([[1, 2, 3], [4, 5, 6]], [[10, 11, 12, 13], [20, 21, 22, 23]]):
                numbers = (states(rows) + 100 * layer).to(dtype)
                cache.update(numbers, numbers + 0.5, layer)
        cache.keep([3, 3], [[0, 2, 3], [1]])
        for layer, slots in enumerate(cache.slots):
            for row, tokens in enumerate(([1, 2, 3, 10, 12, 13], [4, 5, 6, 21])):
                expected = (states([tokens])[0] + 100 * layer).to(dtype)
                assert torch.equal(slots.buffers[0][row, :, : len(tokens)], expected)
                assert torch.equal(slots.buffers[1][row, :, : len(tokens)], expected + 0.5)
        assert len(moved) == (0 if dtype == torch.float32 else 3)

    def test_nothing_is_kept(self) -> None:
        cache = cache_of(None)
        feed(cache, [[1, 2], [3, 4]])
        feed(cache, [[10, 11], [12, 13]])
        cache.keep([2, 2], [[], [0]])
        assert held(cache.layers[0]) == [[1, 2], [3, 4, 12]]

    def test_the_next_pass_writes_behind_each_rows_own_end(self) -> None:
        cache = cache_of(None)
        feed(cache, [[1, 2], [3, 4]])
        feed(cache, [[10, 11, 12], [20, 21, 22]])
        cache.keep([2, 2], [[0, 2], [0]])
        keys, values = feed(cache, [[30, 31], [40, 41]])
        assert keys.shape == (2, HEADS, 6, WIDTH) == values.shape
        assert keys[0, 0, :, 0].long().tolist() == [1, 2, 10, 12, 30, 31]
        assert keys[1, 0, :5, 0].long().tolist() == [3, 4, 20, 40, 41]

    def test_slots_without_a_token_are_numbers(self) -> None:
        """A masked slot meets a zero weight, and zero times what is no number is no number."""
        cache = cache_of(None)
        feed(cache, [[1], [2]])
        feed(cache, [[10, 11], [20, 21]])
        cache.keep([1, 1], [[0, 1], []])
        assert torch.isfinite(torch.stack(feed(cache, [[30], [40]]))).all()

    @given(st.data())
    @settings(max_examples=40, deadline=None)
    def test_against_lists(self, data: st.DataObject) -> None:
        windows = data.draw(st.sampled_from([(None,), (5,), (None, 3), (1,)]))
        rows = data.draw(st.integers(1, 3))
        cache, texts, tokens = cache_of(*windows), [[] for _ in range(rows)], iter(range(10**6))

        def take(n: int) -> list[list[int]]:
            return [[next(tokens) for _ in range(n)] for _ in range(rows)]

        feed(cache, texts := take(data.draw(st.integers(1, 12))))
        for _ in range(data.draw(st.integers(1, 25))):
            base, new = [len(text) for text in texts], take(data.draw(st.integers(1, 9)))
            feed(cache, new)
            keep = st.lists(st.sampled_from(range(len(new[0]))), unique=True).map(sorted)
            paths = [data.draw(keep) for _ in range(rows)]
            cache.keep(base, paths)
            texts = [text + [row[i] for i in path] for text, row, path in zip(texts, new, paths, strict=True)]
            for window, layer in zip(windows, cache.layers, strict=True):
                assert layer.lengths == [len(text) for text in texts]
                assert layer.offset <= max(0, min(map(len, texts)) - (window or 10**6) + 1)  # what is still in reach
                first = layer.get_mask_sizes(0)[1]
                assert held(layer) == [text[first:] for text in texts]
                assert first == max(layer.offset, min(map(len, texts)) - (window or 10**6) + 1)


class TestMemory:
    def test_a_growing_cache_is_seldom_copied(self) -> None:
        cache, places = cache_of(None), set()
        feed(cache, [[0]])
        for length in range(1, 500):
            feed(cache, [[length]])
            cache.keep([length], [[0]])
            places.add((cache.layers[0]._keys.data_ptr(), cache.layers[0]._keys.shape))
        assert held(cache.layers[0]) == [list(range(500))]
        assert len({shape for _, shape in places}) < 12

    def test_rows_adopted_go_where_others_were_if_there_is_room(self) -> None:
        layer, buffers = SlotLayer(), list[torch.Tensor]()
        for length, dtype in ((20, torch.float32), (10, torch.float32), (500, torch.float32), (10, torch.float64)):
            rows = torch.arange(length, dtype=dtype)[None, None, :, None].expand(1, 2, -1, 4)
            layer.adopt(rows, rows + 1, 600)
            assert torch.equal(layer.keys, rows)
            assert torch.equal(layer.values, rows + 1)
            assert layer.keys.dtype == dtype
            buffers.append(layer.buffers[0])
        assert buffers[0] is buffers[1]
        assert len({id(each) for each in buffers}) == 3

    def test_a_window_keeps_a_cache_small(self) -> None:
        cache = cache_of(5)
        feed(cache, [[0]])
        for length in range(1, 300):
            feed(cache, [[length] * 4])
            cache.keep([length], [[2]])
        layer = cache.layers[0]
        assert layer._keys.shape[2] <= 5 + 4 * 8
        assert held(layer) == [list(range(296, 300))]
        assert layer.offset > 280
        assert layer.get_mask_sizes(4) == (4 + 4, 296)

    def test_the_slowest_row_decides_what_slides_out(self) -> None:
        cache = cache_of(5)
        feed(cache, [[0], [0]])
        for length in range(1, 50):
            feed(cache, [[length], [length]])
            cache.keep([length, 1], [[0], []])
        assert cache.layers[0].offset == 0
        assert held(cache.layers[0]) == [list(range(50)), [0]]


class TestOtherCaches:
    """Made from another cache, and handed back to it."""

    def filled(self, cache: DynamicCache, length: int, layers: int = 2) -> DynamicCache:
        for layer in range(layers):
            cache.update(states([list(range(length))]), states([list(range(length))]) + 0.5, layer)
        return cache

    def mistral(self) -> DynamicCache:
        return DynamicCache(config=MistralConfig(num_hidden_layers=2, sliding_window=6))

    @pytest.mark.parametrize("length", [1, 4, 5, 6, 20])
    @pytest.mark.parametrize("kind", ["full", "sliding"])
    def test_what_it_held_is_held(self, kind: str, length: int) -> None:
        theirs = self.filled(self.mistral() if kind == "sliding" else DynamicCache(), length)
        ours = SlotCache.of(theirs)
        assert ours is not None
        assert ours.lengths == [length]
        first = max(0, length - 5) if kind == "sliding" else 0
        for layer in ours.layers:
            assert layer.offset == first
            assert held(layer) == [list(range(first, length))]
        feed(ours, [[50, 51]])
        assert theirs.get_seq_length() == length
        assert theirs.layers[0].keys[0, 0, -1, 0] == length - 1  # copied, not shared

    @pytest.mark.parametrize("length", [1, 4, 9, 40])
    @pytest.mark.parametrize("kind", ["full", "sliding", "empty"])
    def test_what_it_holds_is_handed_back(self, kind: str, length: int) -> None:
        def fresh() -> DynamicCache:
            return {
                "full": lambda: DynamicCache(config=tiny.model().config),
                "sliding": self.mistral,
                "empty": DynamicCache,
            }[kind]()

        theirs = fresh() if kind == "empty" else self.filled(fresh(), 1)
        ours = SlotCache.of(theirs)
        assert ours is not None
        for token in range(ours.get_seq_length(), length):
            for layer in range(2):
                ours.update(states([[token, 99]]), states([[token, 99]]) + 0.5, layer)
            ours.keep([token], [[0]])
        ours.hand_back(theirs)
        plain = self.filled(fresh(), 1)
        for token in range(1, length):
            for layer in range(2):
                plain.update(states([[token]]), states([[token]]) + 0.5, layer)
        for _ in range(2):  # as it is, and after more was written to it
            assert theirs.get_seq_length() == plain.get_seq_length()
            for mine, other in zip(theirs.layers, plain.layers, strict=True):
                assert type(mine) is type(other)
                assert torch.equal(mine.keys, other.keys)
                assert torch.equal(mine.values, other.values)
                assert mine.get_mask_sizes(3) == other.get_mask_sizes(3)
            for cache in (theirs, plain):
                for layer in range(2):
                    cache.update(states([[70, 71]]), states([[70, 71]]), layer)

    @pytest.mark.parametrize("kind", ["full", "sliding"])
    def test_what_the_prompt_left_is_handed_back(self, kind: str) -> None:
        """Nothing was guessed, so nothing was kept or dropped yet."""
        theirs, plain = (self.mistral() if kind == "sliding" else DynamicCache() for _ in range(2))
        ours = SlotCache.of(theirs)
        assert ours is not None
        for cache in (ours, plain):
            for layer in range(2):
                cache.update(states([list(range(20))]), states([list(range(20))]) + 0.5, layer)
        ours.hand_back(theirs)
        for mine, other in zip(theirs.layers, plain.layers, strict=True):
            assert torch.equal(mine.keys, other.keys)
            assert torch.equal(mine.values, other.values)
            assert mine.get_seq_length() == other.get_seq_length()

    def test_kinds_of_layers(self) -> None:
        def of(*layers: Any) -> SlotCache | None:
            cache = DynamicCache()
            cache.layers = list(layers)
            return SlotCache.of(cache)

        without = [DummyLayer()] if DummyLayer else []  # older transformers have no layers without rows
        shared = of(DynamicLayer(), *without, DynamicSlidingWindowLayer(sliding_window=6))
        assert shared is not None
        assert [type(layer) for layer in shared.layers] == [SlotLayer, *map(type, without), SlotLayer]
        assert [layer.window for layer in shared.slots] == [None, 6]
        assert of(DynamicLayer(), LinearAttentionLayer()) is None
        assert SlotCache.of(StaticCache(config=tiny.model().config, max_cache_len=8)) is None
        lazy = SlotCache.of(DynamicCache())
        assert lazy is not None
        assert lazy.layers == []

    def test_crop(self) -> None:
        cache = cache_of(None, 6)
        feed(cache, [[1, 2, 3, 4], [5, 6, 7, 8]])
        cache.crop(-3)
        assert [held(layer) for layer in cache.layers] == [[[1], [5]]] * 2
        assert cache.get_seq_length() == 1


class Offsets:
    """The greatest offset that any layer came to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.greatest = 0
        slide = SlotLayer._slide

        def spied(layer: SlotLayer) -> None:
            slide(layer)
            self.greatest = max(self.greatest, layer.offset)

        monkeypatch.setattr(SlotLayer, "_slide", spied)


@pytest.mark.parametrize(
    "batch", [{"input_ids": prompt()}, padded(9, 3), padded(30, 5, 12)], ids=["one", "two", "long"]
)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["sliding", "mixed"])
def test_a_text_many_times_longer_than_the_window(
    kind: str, attention: str, batch: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    mixed = {"layer_types": ["sliding_attention", "full_attention"], "head_dim": 8, "use_sliding_window": True}
    changes = {"sliding_window": 6, "attn_implementation": attention, **(mixed if kind == "mixed" else {})}
    model = tiny.model("Qwen3" if kind == "mixed" else "Mistral", **changes)
    offsets = Offsets(monkeypatch)
    same(model, batch, max_new_tokens=70, eos_token_id=None)
    assert offsets.greatest > batch["input_ids"].shape[1] + 30  # the whole prompt has slid out
