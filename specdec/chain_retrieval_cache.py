"""Retrieved KV rows beside recurrent states: what TriForce's middle level holds of a model that has both."""

from __future__ import annotations

from copy import copy
from typing import Any

from jaxtyping import Float
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)

from specdec.cache import DummyLayer, SlotCache, SlotLayer
from specdec.retrieval_cache import RetrievalCache, RetrievalLayer

ROWS = DynamicLayer, LinearAttentionAndFullAttentionLayer  # layers that hold rows of all of a text


class StatesAndRetrievedRows(LinearAttentionAndFullAttentionLayer):  # type: ignore[misc]
    """One text's states and retrieved rows, for models whose layers have both; those retrieved are not changed.

    The newest token of a text of n is in slot ``n - offset - 1``, as in a ``RetrievalLayer``.

    Args:
        states: the layer whose states to hold, one row of it that nobody else writes to.
        rows: the rows.
    """

    def __init__(self, states: LinearAttentionAndFullAttentionLayer, rows: RetrievalLayer) -> None:
        self.__dict__.update(vars(states))
        self.keys, self.values, self.offset = rows.keys, rows.values, rows.offset

    def get_seq_length(self) -> int:
        """Tokens of the text."""
        return self.offset + int(self.keys.shape[-2])

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Slots that a pass over ``query_length`` tokens sees, and the token that the first of them counts as."""
        return int(self.keys.shape[-2]) + query_length, self.offset


class ChainRetrievalCache(Cache):  # type: ignore[misc]
    """As a ``RetrievalCache``, beside transformers' own cache of a model some of whose layers have recurrent states.

    ``rebuild`` and ``follow`` copy those states; what is written afterwards changes the copies. So a ``Model`` writes
    chains, and takes them back as it does on the full cache: it restores the states and reads anew what is kept.

    Args:
        full: the cache of all tokens, one that ``retrievable`` says yes to.
        row, padding, budget, chunk: as ``RetrievalCache``'s.
    """

    def __init__(self, full: Cache, row: int = 0, padding: int = 0, budget: int = 4096, chunk: int = 8) -> None:
        self.full, self.row = full, row
        held = [SlotLayer() if type(layer) in ROWS else layer for layer in full.layers]
        self.retrieved = RetrievalCache(SlotCache(layers=held), row, padding, budget, chunk)
        super().__init__(layers=list(self.retrieved.layers))

    def rebuild(self, queries: dict[int, Float[Tensor, "1 heads nodes dim"]]) -> None:
        """Choose anew what to hold, by the last node's ``queries`` in each layer, and copy the states."""
        self._look()
        self.retrieved.rebuild(queries)
        self._show()

    def follow(self) -> None:
        """Forget what was guessed, copy the rows of what has been committed since, and the states."""
        self._look()
        self.retrieved.follow()
        self._show()

    def _look(self) -> None:
        """See where the full cache's rows are by now."""
        for layer, ours in zip(self.full.layers, self.retrieved.layers, strict=True):
            if isinstance(ours, RetrievalLayer) and layer.is_initialized:
                ours.full._keys, ours.full._values, ours.full.is_initialized = layer.keys, layer.values, True
                ours.full.lengths = [layer.get_seq_length()] * len(layer.keys)

    def _show(self) -> None:
        """Hold copies of the full cache's states as they are by now."""
        for number, (layer, rows) in enumerate(zip(self.full.layers, self.retrieved.layers, strict=True)):
            if not isinstance(rows, RetrievalLayer):
                self.layers[number] = layer_of(layer, self.row)
            elif isinstance(layer, LinearAttentionLayer) and rows.is_initialized:
                self.layers[number] = StatesAndRetrievedRows(layer_of(layer, self.row), rows)


def retrievable(cache: Cache) -> bool:
    """Whether a cache of transformers' own is of recurrent states and of rows that go back without limit."""
    kinds = {type(layer) for layer in cache.layers} - {DummyLayer}
    known = kinds <= {LinearAttentionLayer, *ROWS} and not kinds.isdisjoint(ROWS)
    return known and kinds != {DynamicLayer} and not getattr(cache, "offloading", False)


def layer_of(layer: Any, row: int) -> Any:
    """One row of a layer of transformers' own: a pass over it leaves no trace in the layer."""
    one, only = copy(layer), slice(row, row + 1)
    if isinstance(layer, DynamicLayer) and layer.is_initialized:
        one.keys, one.values = layer.keys[only], layer.values[only]  # which longer ones replace
    if isinstance(layer, LinearAttentionLayer):  # which is written in place
        one.conv_states, one.recurrent_states = (
            {number: state if state is None else state[only].clone() for number, state in states.items()}
            for states in (layer.conv_states, layer.recurrent_states)
        )
    return one
