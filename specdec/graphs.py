"""Whole greedy steps as CUDA graphs: one copy in, one replay, one copy out. Not yet run on a GPU.

A graph has fixed shapes and addresses. So trees are padded to a few widths, with nodes that see only themselves; keys
and values lie in slots that never move; and all that differs from step to step goes in by one static buffer::

    layers = [StaticSlots(...), ...]                   # of a cache that the forward pass writes to
    step = greedy_step(forward, layers, k=8)           # on tensors alone, with nothing read back
    graphed = GraphedPass(step, rows=1, device=device)
    judged = graphed(trees, lengths)                   # accepted paths, whose rows have been moved already
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from specdec import trees
from specdec.core import DraftTree
from specdec.kernels.ancestors import ancestors
from specdec.kernels.dispatch import launching
from specdec.kernels.move_rows import move_rows
from specdec.kernels.topk import topk
from specdec.kernels.walk import walk

WIDTHS = (1, 2, 4, 8, 16, 32, 64, 128)  # of recorded passes; the root counts

Step = Callable[
    [Tensor, Tensor, Tensor, Tensor], Tensor
]  # tokens, parents, depth, lengths -> [rows, 1 + width (1 + k)]
Forward = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # tokens, positions, ancestors, lengths -> logits
Record = Callable[[Callable[[], Tensor]], "Recording"]


class Recording(Protocol):
    """A function recorded once: each ``replay`` computes ``out`` anew, at the same address."""

    out: Tensor

    def replay(self) -> None:
        """Run it again on what its inputs' buffers hold now."""
        ...


class CudaRecording:
    """What ``function`` launches on the current GPU, as a graph. It must give the same when it is run again at once.

    Args:
        function: reads nothing back to the host, and takes no tensors from it.
        pool: memory that several graphs work in, which must not run at once; each one's ``out`` is to be read before
            another is replayed. None for memory of its own.
    """

    def __init__(self, function: Callable[[], Tensor], pool: Any = None) -> None:
        here, side = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(here)
        with torch.cuda.stream(side):
            function()  # compiles kernels and makes libraries' workspaces, which a capture may not
        here.wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may go on allocating memory meanwhile, which a "global" capture would make an error.
            with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
                self.out = function()
        finally:
            torch.cuda.set_stream(here)  # a capture that fails would leave its own stream behind

    def replay(self) -> None:
        """Launch the whole graph."""
        self._graph.replay()


@dataclass(frozen=True, slots=True)
class Judged:
    """What one step says of a batch of trees, on the host.

    Attributes:
        paths: each row's accepted nodes, root first.
        bonus: the token that the target adds to each.
        candidates: the target's likeliest tokens after every node, best first, [rows, width, k]; entries of the
            nodes that fill up a tree mean nothing.
    """

    paths: list[Int[np.ndarray, " accepted"]]
    bonus: Int[np.ndarray, " rows"]
    candidates: Int[np.ndarray, "rows width k"]


class GraphedPass:
    """A step recorded once for each width of tree, and replayed.

    Args:
        step: a function of static tensors that reads nothing back to the host.
        rows: of the batch.
        device: where it runs.
        widths: of the recordings, ascending; each is made when it is first needed.
        record: makes a recording of a function.
    """

    def __init__(
        self,
        step: Step,
        rows: int,
        device: torch.device,
        widths: Sequence[int] = WIDTHS,
        record: Record = CudaRecording,
    ) -> None:
        self.step, self.rows, self.device, self.widths, self.record = step, rows, device, widths, record
        self._recordings: dict[int, tuple[Tensor, Tensor, Recording]] = {}

    def __call__(self, batch: Sequence[DraftTree], lengths: Sequence[int]) -> Judged:
        """Judge one tree per row; ``lengths`` are the rows' committed tokens in the cache.

        Raises:
            ValueError: a tree is wider than the widest recording, or there is not one tree per row.
        """
        return self.launch(batch, lengths)()

    def launch(self, batch: Sequence[DraftTree], lengths: Sequence[int]) -> Callable[[], Judged]:
        """Start what a call does; what is returned waits for it, and is to be called before the next start."""
        width = self.prepare(batch, lengths)
        host, fed, recording = self._recordings[width]
        _fill(host.numpy(), batch, lengths)
        fed.copy_(host, non_blocking=True)
        recording.replay()
        return lambda: _judged(recording.out.to("cpu", copy=True).numpy(), width)

    def prepare(self, batch: Sequence[DraftTree], lengths: Sequence[int]) -> int:
        """Make the recording for such trees, if there is none; its width. Raises as a call does."""
        widest = max(map(len, batch))
        width = next((width for width in self.widths if width >= widest), 0)
        if not width or len(batch) != self.rows:
            raise ValueError(f"got {len(batch)} trees of up to {widest} nodes; {self.rows} of {self.widths[-1]} fit")
        if width not in self._recordings:
            host = torch.empty(self.rows, 3 * width + 1, dtype=torch.int64, pin_memory=self.device.type == "cuda")
            _fill(host.numpy(), batch, lengths)  # the first runs must not leave the cache's slots
            fed = host.to(self.device, copy=True)
            with launching(fed):
                self._recordings[width] = host, fed, self.record(lambda: self.step(*split(fed)))
        return width

    def forget(self) -> None:
        """Drop all recordings: what they wrote to has moved."""
        self._recordings.clear()


def feed(batch: Sequence[DraftTree], lengths: Sequence[int], width: int) -> Int[Tensor, "rows fed"]:
    """All that a step needs to know of its trees, for one copy; ``split`` takes it apart."""
    fed = np.empty((len(batch), 3 * width + 1), np.int64)
    _fill(fed, batch, lengths)
    return torch.from_numpy(fed)


def split(fed: Int[Tensor, "rows fed"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, parents and depth of the nodes, and the rows' lengths: views."""
    tokens, parents, depth = fed[:, :-1].chunk(3, 1)
    return tokens, parents, depth, fed[:, -1]


def _fill(fed: np.ndarray, batch: Sequence[DraftTree], lengths: Sequence[int]) -> None:
    """Tokens, parents, depth and length of each row, side by side."""
    width = fed.shape[1] // 3
    tokens, parents, depth = (fed[:, i * width : (i + 1) * width] for i in range(3))
    tokens[:], parents[:], depth[:] = 0, -1, 0
    for row, tree in enumerate(batch):
        tokens[row, : len(tree)], parents[row, : len(tree)] = tree.tokens, tree.parents
        depth[row, : len(tree)] = trees.depths(tree.parents)
    fed[:, -1] = lengths


def _judged(out: np.ndarray, width: int) -> Judged:
    paths, bonus, candidates = out[:, :width], out[:, width], out[:, width + 1 :]
    return Judged([path[path >= 0] for path in paths], bonus, candidates.reshape(len(out), width, -1))


def greedy_step(forward: Forward, layers: Sequence[StaticSlots], k: int = 1) -> Step:
    """A whole greedy step on tensors: target pass, argmax, accept walk, and the accepted rows moved together.

    Args:
        forward: the target's logits [rows, width, vocab], given tokens, positions, ancestor bits and lengths.
        layers: of the cache that ``forward`` writes to; with room for a whole width behind each row's length.
        k: candidates per node, at least 1.
    """

    def step(tokens: Tensor, parents: Tensor, depth: Tensor, lengths: Tensor) -> Tensor:
        logits = passed(forward, layers, tokens, parents, depth, lengths)
        candidates = topk(logits.flatten(0, 1), k).view(*tokens.shape, k)
        paths, bonus = walk(tokens, parents, candidates[:, :, 0])
        for layer in layers:
            move_rows(layer.keys, layer.values, paths, lengths)
        return torch.cat([paths, bonus[:, None], candidates.flatten(1)], dim=1)

    return step


def passed(
    forward: Forward, layers: Sequence[StaticSlots], tokens: Tensor, parents: Tensor, depth: Tensor, lengths: Tensor
) -> Float[Tensor, "rows width vocab"]:
    """The target's pass alone, of which every layer is told where to write."""
    for layer in layers:
        layer.lengths = lengths
    return forward(tokens, lengths[:, None] + depth, ancestors(parents), lengths)


class StaticSlots(CacheLayerMixin):  # type: ignore[misc]
    """One layer's keys and values in slots that never move; a pass writes its nodes behind each row's length.

    Attention gets every slot and must know the lengths itself. The lengths are a tensor on the device, so that
    nothing about a pass depends on the host.

    Args:
        keys, values: [rows, heads, capacity, width], the committed tokens' first; written in place.
    """

    is_compileable = True

    def __init__(self, keys: Float[Tensor, "b h s d"], values: Float[Tensor, "b h s e"]) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True
        self.lengths = torch.zeros(len(keys), dtype=torch.int64, device=keys.device)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the slots are given."""

    def update(
        self, key_states: Float[Tensor, "b h n d"], value_states: Float[Tensor, "b h n e"], *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write a pass's keys and values; return all slots."""
        slots = self.lengths[:, None] + torch.arange(key_states.shape[2], device=self.lengths.device)
        rows = torch.arange(len(slots), device=slots.device)[:, None]
        self.keys[rows, :, slots] = key_states.transpose(1, 2)
        self.values[rows, :, slots] = value_states.transpose(1, 2)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """All slots, from the first."""
        return self.keys.shape[2], 0

    def get_seq_length(self) -> int:
        """Not known to the host; callers give positions themselves."""
        return 0

    def get_max_length(self) -> int:
        """The capacity."""
        return int(self.keys.shape[2])
