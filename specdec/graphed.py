"""A model's greedy steps by graphs, from one generation to the next. Not yet run on a GPU."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from specdec.attention import switched
from specdec.cache import SlotCache, SlotLayer
from specdec.core import DraftTree, Unsupported
from specdec.graphs import (
    WIDTHS,
    CudaRecording,
    Forward,
    GraphedPass,
    Record,
    StaticSlots,
    feed,
    greedy_step,
    passed,
    split,
)
from specdec.masks import Reach
from specdec.model import Model, reaches
from specdec.statistics import Stats

SPARE = 1024  # slots are made by so many, so that somewhat longer texts need no new recordings
RESERVED = 1 << 30  # bytes of slots that are made at once for a text that may become long
BATCHES = 3  # sizes of batch for which slots and graphs are kept


class GraphedSteps:
    """The whole greedy steps of one model as recorded graphs, which outlive the generation that needed them first.

    What graphs read and write never moves. So they have slots for keys and values of their own, lent to one generation
    at a time; its rows move into them at its first step, and stay where the ordinary path finds them too: every step
    may go either way. Whatever does not fit takes the ordinary path, and so does a model of which a recording has
    failed, for good.

    Args:
        record: makes a recording of a function; None for CUDA graphs, on a GPU alone.

    Attributes:
        enabled: whether to use graphs at all; set to False by the first failure.
    """

    def __init__(self, record: Record | None = None) -> None:
        self.record, self.enabled = record, True
        self._free = threading.Lock()
        self._batches: dict[int, GraphedBatch] = {}
        self._facts: list[Any] | None = None

    @contextmanager
    def lent(self, model: Model, longest: int | None) -> Iterator[None]:
        """Inside the ``with`` block ``model.graphs`` is this, unless another generation uses it.

        Args:
            model: one that has started.
            longest: the most tokens that a row may come to hold, padding included; None where nothing says.
        """
        on_gpu = model.device.type == "cuda"
        if not (self.enabled and (self.record or on_gpu) and self._free.acquire(blocking=False)):
            yield
            return
        try:
            self._facts, self._longest = None, longest
            model.graphs = self
            yield
        finally:
            model.graphs = None
            self._free.release()

    def ready(self, model: Model, batch: Sequence[DraftTree], k: int, stats: Stats) -> GraphedPass | None:
        """What judges such trees, and tells ``k`` candidates of each node; None where the ordinary path must.

        The first step of a generation moves its rows to slots that stay; the first over trees of some width records.
        ``model.advance`` is to follow in place of ``model.keep``.
        """
        if not self.enabled or max(map(len, batch)) > WIDTHS[-1]:
            return None
        try:
            with torch.inference_mode(False), torch.no_grad():  # else later generations could not write to the slots
                return self._ready(model, batch, k)
        except Exception as error:  # of whatever kind: a model that cannot be recorded decodes as it did before
            self.enabled = False
            self._batches.clear()
            model.advance([()] * len(batch))  # by nothing: a pass that broke off may have left the cache elsewhere
            text = str(error).splitlines()[0] if str(error) else ""
            stats.reason(f"steps are not recorded as graphs: {type(error).__name__}: {text}")
            return None

    def _ready(self, model: Model, batch: Sequence[DraftTree], k: int) -> GraphedPass | None:
        rows = len(batch)
        if self._facts is None:
            if not fits(model):
                model.graphs = None
                return None
            self._facts = facts(model, k)
            self._batches = {n: known for n, known in self._batches.items() if known.facts == self._facts}
        known, need = self._batches.get(rows), max(model.lengths) + WIDTHS[-1]
        if known is None or known.capacity < need:
            known = self._made(model, need)
            known.take(model)
            known.try_out(model, batch)
        elif not known.holds(model.cache):
            known.take(model)
        known.graphed.prepare(batch, model.lengths)
        return known.graphed

    def _made(self, model: Model, need: int) -> GraphedBatch:
        """New slots, of which ``need`` are needed for each row at once."""
        assert isinstance(model.cache, SlotCache), "the model fits"
        assert self._facts is not None, "they are found first"
        rows = len(model.lengths)
        before = self._batches.pop(rows, None)
        while len(self._batches) >= BATCHES:
            self._batches.pop(next(iter(self._batches)))
        affordable = max(RESERVED // (rows * model.cache.bytes_of_token), 2 * need)
        wanted = affordable if self._longest is None else min(affordable, self._longest + WIDTHS[-1])
        capacity = max(need, wanted, 2 * before.capacity if before else 0)
        record = self.record or partial(CudaRecording, pool=torch.cuda.graph_pool_handle())
        made = GraphedBatch(model, self._facts, -(-capacity // SPARE) * SPARE, record)
        self._batches[rows] = made
        return made

    def give_back(self, cache: SlotCache) -> None:
        """Move a cache's rows out of the slots, for whoever keeps them after the generation."""
        if any(batch.holds(cache) for batch in self._batches.values()):
            for layer in cache.slots:
                layer.move_to(*(torch.empty_like(rows) for rows in (layer.keys, layer.values)))


class GraphedBatch:
    """Slots for so many rows, what else stays for a generation, and the graphs that work on them.

    Args:
        model: one that fits, whose rows are like those to come; it is not held on to.
        facts: that the graphs take for granted; the first is how many candidates they tell.
        capacity: slots per row.
        record: makes a recording.
    """

    def __init__(self, model: Model, facts: list[Any], capacity: int, record: Record) -> None:
        assert isinstance(model.cache, SlotCache), "the model fits"
        assert model.shift is not None, "the model fits"
        self.facts, self.capacity, rows = facts, capacity, len(model.lengths)
        self.layers = [
            StaticSlots(*(like.new_zeros(rows, like.shape[1], capacity, like.shape[3]) for like in layer.buffers))
            for layer in model.cache.slots
        ]
        self.starts = torch.zeros(rows, dtype=torch.int64, device=model.device)
        self.shift = torch.zeros_like(model.shift)
        self.forward = forward_over(model, self.layers, self.starts, self.shift)
        step = greedy_step(self.forward, self.layers, facts[0])
        self.graphed = GraphedPass(step, rows, model.device, WIDTHS, record)

    def holds(self, cache: Cache) -> bool:
        """Whether a cache's rows lie in these slots."""
        return isinstance(cache, SlotCache) and cache.slots[0].buffers[0] is self.layers[0].keys

    def take(self, model: Model) -> None:
        """Move a model's rows into these slots."""
        assert isinstance(model.cache, SlotCache), "the model fits"
        assert model.shift is not None, "the model fits"
        model.settle()
        for layer, slots in zip(model.cache.slots, self.layers, strict=True):
            layer.move_to(slots.keys, slots.values)
        self.shift.copy_(model.shift)
        self.starts.zero_()
        if model.visible is not None:
            self.starts.copy_((model.visible.long().cumsum(-1) == 0).sum(-1))

    def try_out(self, model: Model, batch: Sequence[DraftTree]) -> None:
        """Raise Unsupported unless a pass as graphs make it says what the ordinary one does."""
        theirs = model.forward(batch).logits.float()
        model.advance([()] * len(batch))
        fed = feed(batch, model.lengths, theirs.shape[1]).to(model.device)
        ours = passed(self.forward, self.layers, *split(fed)).float()
        allowed = torch.finfo(model.module.dtype).eps ** 0.5 * float(
            (theirs - theirs.mean(-1, keepdim=True)).abs().max()
        )
        if not (error := float((ours - theirs).abs().max())) <= allowed:
            raise Unsupported(f"logits differ by {error:.2g} from an ordinary pass (allowed {allowed:.2g})")


def forward_over(model: Model, layers: Sequence[StaticSlots], starts: Tensor, shift: Tensor) -> Forward:
    """A model's pass on tensors alone, that writes to ``layers``; it keeps neither the model nor its module alive.

    Args:
        starts: padding before each row's first token.
        shift: from a token's place in its row to the position that the model knows it by.
    """
    module, config, form = weakref.ref(model.module), model.config, model.form
    types = [*(reaches(config) or ())]
    rest = {**model.extras, model.cache_name: Cache(layers=list(layers)), "use_cache": True, "return_dict": True}
    if model.takes_all_logits:
        rest["logits_to_keep"] = 0

    def forward(tokens: Tensor, positions: Tensor, bits: Tensor, lengths: Tensor) -> Tensor:
        ends = torch.stack([lengths, starts], -1)[:, None].expand(-1, tokens.shape[1], -1)
        mask = torch.cat([bits, ends], -1)[:, None]  # as masks.tree_bits
        masks = dict.fromkeys(types, mask) if form.per_type else mask
        target: Any = module()
        with switched(config):
            outputs = target(input_ids=tokens, position_ids=shift + positions, attention_mask=masks, **rest)
        logits: Tensor = outputs.logits
        return logits

    return forward


def fits(model: Model) -> bool:
    """Whether a generation's tree passes can be graphs: all layers see the whole text, through our attention by bits.

    Hooks and adapters are Python that a replay would pass over, and may change from one step to the next.
    """
    module, cache, known = model.module, model.cache, reaches(model.config)
    return (
        isinstance(cache, SlotCache)
        and len(cache.slots) == len(cache.layers)
        and all(layer.is_initialized and layer.device == model.device for layer in cache.slots)
        and set((known or {}).values()) == {Reach()}
        and all(layer.window is None and not layer.offset and _for_triton(layer) for layer in cache.slots)
        and model.takes_bits
        and model.shift is not None
        and all(value is None or isinstance(value, (bool, int, float, str)) for value in model.extras.values())
        and all(parameter.device == model.device for parameter in module.parameters())
        and not any(map(_hooked, module.modules()))
    )


def _for_triton(layer: SlotLayer) -> bool:
    keys, values = layer.buffers
    return keys.shape[3] == values.shape[3] <= 256 and keys.element_size() in (2, 4)  # else attention reads lengths


def _hooked(part: Any) -> bool:
    adapted = isinstance(getattr(type(part), "disable_adapters", None), property)
    return adapted or bool(part._forward_hooks or part._forward_pre_hooks)


def facts(model: Model, k: int) -> list[Any]:
    """What recordings take for granted, ``k`` first; where any of it has changed, they must be made anew."""
    module, shift = model.module, model.shift
    tensors = [(tensor.data_ptr(), tensor.dtype) for tensor in (*module.parameters(), *module.buffers())]
    layers = [(type(part), id(vars(part).get("forward"))) for part in module.modules()]
    around = torch.is_autocast_enabled(model.device.type), torch.get_float32_matmul_precision()
    inputs = model.form, model.cache_name, model.extras, None if shift is None else shift.ndim
    return [k, inputs, tensors, layers, around]
