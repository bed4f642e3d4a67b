"""KV rows of what a query would attend to most, gathered from a cache that holds all of a text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import CacheLayerMixin
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from specdec.attention import attention, switched
from specdec.cache import SlotCache, SlotLayer

NOTING = "specdec-queries"


class RetrievalLayer(SlotLayer):
    """One layer's retrieved rows of one text: chunks chosen head by head, then all tokens since.

    A slot holds another token for every head; keys are rotated to their own place in the text already, so attention
    needs to know no more. As in any ``SlotLayer`` the newest token of a text of n is in slot ``n - offset - 1``.

    Args:
        full: the layer that holds all of the text; nothing of it is changed.
        row: which of its rows.
        padding: slots at its beginning that hold no text.
    """

    def __init__(self, full: SlotLayer, row: int = 0, padding: int = 0) -> None:
        super().__init__()
        self.full, self.row, self.padding = full, row, padding
        self.copied = 0  # tokens of the full cache that have been seen; what is behind them was only guessed

    def rebuild(self, query: Float[Tensor, "heads dim"], budget: int, chunk: int) -> None:
        """Choose anew what to hold, for a ``query`` of the layer's: ``budget`` tokens, and what no chunk is full of."""
        keys, values = self._rows(self.padding, query.device)
        chosen = select(query, keys[0], chunk, budget // chunk)
        tokens = (chosen[:, :, None] * chunk + torch.arange(chunk, device=chosen.device)).flatten(1)
        rest = keys.shape[2] // chunk * chunk
        held = [torch.cat([_gathered(rows, tokens), rows[:, :, rest:]], 2) for rows in (keys, values)]
        self.copied = self.full.lengths[self.row]
        self.adopt(held[0], held[1], self.copied)

    def follow(self) -> None:
        """Forget what was guessed, and copy the rows of what has been committed since."""
        self.lengths = [self.copied]
        keys, values = self._rows(self.copied - self.full.offset, self.device)
        if keys.shape[2]:
            self.update(keys, values)
        self.copied = self.full.lengths[self.row]
        self._show()

    def _rows(self, start: int, device: torch.device) -> tuple[Float[Tensor, "1 h n d"], Float[Tensor, "1 h n e"]]:
        """The text's rows in the full cache, from a slot on; brought to a device where they are on another."""
        end, row = self.full.lengths[self.row] - self.full.offset, slice(self.row, self.row + 1)
        return self.full._keys[row, :, start:end].to(device), self.full._values[row, :, start:end].to(device)


class WindowLayer(SlotLayer):
    """One text's rows in a layer with a sliding window or chunks: all that it looks back to, which is little already.

    Of a layer with chunks it holds as many rows as one has; masks hide those of the chunk before.

    Args:
        full: the layer that holds them; nothing of it is changed.
        row: which of its rows.
        padding: slots at its beginning that hold no text.
    """

    def __init__(self, full: SlotLayer, row: int = 0, padding: int = 0) -> None:
        super().__init__(full.window)
        self.full, self.row, self.padding = full, row, padding

    def follow(self) -> None:
        """Forget what was guessed, and hold what is in reach of the next token."""
        first, keys, values = self.full.rows(self.row)
        hidden = max(0, self.padding - first)
        self.adopt(keys[:, :, hidden:], values[:, :, hidden:], self.full.lengths[self.row])


class RetrievalCache(SlotCache):
    """A small cache beside a full one: the first chunk of a text, and those that a query scores highest.

    What it holds is exactly what the full cache holds of the same tokens: a pass over it is full attention with the
    other tokens masked, head by head. With a budget for all of the text it is full attention. Layers with sliding
    windows hold those, and layers with chunks as many rows as a chunk has. Nothing is held until ``rebuild``; after
    that, ``follow`` brings in what has been committed, and drafts may be written behind it.

    TriForce (Sun et al. 2024, arXiv 2404.11912), whose keys are rotated to their own place too. There the oldest
    retrieved chunks make room for new tokens; here new tokens come on top, until the cache is rebuilt.

    Args:
        full: the cache of all tokens; some of its layers look back without limit.
        row: which of its rows.
        padding: slots at its beginning that hold no text.
        budget: tokens held in every head, those since the last ``rebuild`` not among them.
        chunk: tokens that are chosen or not together.

    Raises:
        ValueError: a budget of less than two chunks, or a cache of such layers alone.
    """

    def __init__(self, full: SlotCache, row: int = 0, padding: int = 0, budget: int = 4096, chunk: int = 8) -> None:
        if chunk < 1 or budget < 2 * chunk:
            raise ValueError(f"budget={budget}, chunk={chunk}: give room for two chunks at least")
        if full.slots and all(layer.window is not None for layer in full.slots):
            raise ValueError("layers with sliding windows or chunks have nothing to retrieve")
        self.budget, self.chunk = budget, chunk
        super().__init__(layers=[_beside(layer, row, padding) for layer in full.layers])

    def rebuild(self, queries: dict[int, Float[Tensor, "1 heads nodes dim"]]) -> None:
        """Choose anew what to hold, by the last node's ``queries`` in each layer."""
        for number, layer in enumerate(self.layers):
            if isinstance(layer, RetrievalLayer) and layer.full.is_initialized:
                layer.rebuild(queries[number][0, :, -1], self.budget, self.chunk)
            elif isinstance(layer, WindowLayer) and layer.full.is_initialized:
                layer.follow()

    def follow(self) -> None:
        """Forget what was guessed, and copy the rows of what has been committed since."""
        for layer in self.layers:
            if isinstance(layer, RetrievalLayer | WindowLayer) and layer.is_initialized:
                layer.follow()


def _beside(layer: CacheLayerMixin, row: int, padding: int) -> CacheLayerMixin:
    """What stands beside a layer of the full cache; itself where it holds no rows."""
    if not isinstance(layer, SlotLayer):
        return layer
    return (RetrievalLayer if layer.window is None else WindowLayer)(layer, row, padding)


def select(
    query: Float[Tensor, "heads dim"], keys: Float[Tensor, "kv_heads n dim"], chunk: int, room: int
) -> Int[Tensor, "kv_heads kept"]:
    """The chunks that each head of keys is to hold: the first one, then the ``room - 1`` best, best first.

    A chunk's score is the query times the mean of its keys, which is the mean of the query times each. Query heads that
    share keys have an equal say: the share of its attention that each would pay to the means alone is added up. Only
    whole chunks count.
    """
    whole = keys.shape[1] // chunk
    grouped = query.float().view(len(keys), -1, query.shape[-1])
    each = grouped @ keys[:, : whole * chunk].float().mT
    scores = each.view(*each.shape[:2], whole, chunk).mean(-1) * keys.shape[-1] ** -0.5
    shares = scores.log_softmax(-1).logsumexp(1)
    best = shares[:, 1:].topk(max(0, min(room, whole) - 1), dim=-1).indices + 1
    return torch.cat([best.new_zeros(len(keys), min(1, whole)), best], 1)


def _gathered(rows: Float[Tensor, "1 h n d"], tokens: Int[Tensor, "h kept"]) -> Float[Tensor, "1 h kept d"]:
    heads = torch.arange(len(tokens), device=rows.device)[:, None]
    return rows[:, heads, tokens]


@contextmanager
def queries(config: Any) -> Iterator[dict[int, Float[Tensor, "rows heads nodes dim"]]]:
    """Inside the ``with`` block, the queries of the newest pass of the model of a text ``config``, by layer."""
    noted: dict[int, Tensor] = {}

    def noting(module: nn.Module, query: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        noted[int(module.layer_idx)] = query  # type: ignore[arg-type]
        return attention(module, query, *args, **kwargs)

    with switched(config):  # which gives the model its own attention back, too
        AttentionInterface.register(NOTING, noting)
        AttentionMaskInterface.register(NOTING, eager_mask)
        config._attn_implementation_internal = NOTING
        yield noted
