"""A drafting model's KV rows: of each text what has been committed, then the tree that is being grown behind it."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from specdec import trees
from specdec.attention import switched
from specdec.cache import SlotCache, SlotLayer
from specdec.drafters.acceptance_head import AcceptanceHead
from specdec.drafters.trimmed_head import TrimmedHead, kept_only
from specdec.masks import Reach, additive
from specdec.model import Form, Pass, reaches
from specdec.short_stack import ShortStack
from specdec.streaming_cache import StreamingCache
from specdec.trees.sampling import Level

SHORT = 64  # nodes of all rows up to which a pass may go straight through a model's quick layers
PIECE = 512  # tokens of a text that one pass reads at most, so that its mask stays small
SINKS = 4  # first tokens that are held whatever the window
NO_TREE = Level(np.zeros(1, np.int64), np.array([-1]), 0)


@dataclass(slots=True, eq=False)
class Text:
    """What one row holds.

    Attributes:
        tokens: committed ones.
        tree: nodes that have been fed behind them; its root is the last of the tokens.
        rows: whose row it is; None once it has left.
        chance: that the last node to be fed is accepted, by an acceptance head; 1 where there is none.
    """

    rows: Rows | None
    tokens: Int[np.ndarray, " held"] = field(default_factory=lambda: np.zeros(0, np.int64))
    tree: Level = NO_TREE
    chance: float = 1.0

    @property
    def slots(self) -> int:
        """Slots in use."""
        return len(self.tokens) + len(self.tree.tokens) - 1

    def common(self, tokens: Int[np.ndarray, " length"]) -> int:
        """How many committed tokens a text begins with."""
        n = min(len(self.tokens), len(tokens))
        differ = np.flatnonzero(self.tokens[:n] != tokens[:n])
        return int(differ[0]) if len(differ) else n

    def settle(self, tokens: Int[np.ndarray, " length"]) -> tuple[int, list[int]]:
        """Hold only what a text begins with, its last token left out: slots to keep, and nodes behind them."""
        base, path = min(self.common(tokens), len(tokens) - 1), list[int]()
        if len(self.tokens) == base > 0:
            found = trees.follow(self.tree.tokens, self.tree.parents, tokens[base:-1])
            base, path = base - 1, found.tolist()
        self.tokens, self.tree, self.chance = tokens[: base + len(path)], NO_TREE, 1.0
        return base, path


@dataclass(frozen=True, slots=True)
class Nodes:
    """What one row is fed in a pass.

    Attributes:
        tokens, positions: of each node.
        base: slots of the row that all of them see.
        seen: which of the slots behind those each sees, the new ones last.
        places: positions of what those slots hold.
    """

    tokens: Int[np.ndarray, " nodes"]
    positions: Int[np.ndarray, " nodes"]
    base: int
    seen: Bool[np.ndarray, "nodes behind"]
    places: Int[np.ndarray, " behind"]

    @property
    def causal(self) -> bool:
        """Whether each sees all that was fed before it."""
        nodes, behind = self.seen.shape
        return bool((self.seen == np.tri(nodes, behind, behind - nodes, dtype=np.bool_)).all())

    @classmethod
    def chain(cls, tokens: Int[np.ndarray, " length"], start: int, stop: int) -> Nodes:
        """Tokens ``start`` to ``stop`` of a text, behind those before."""
        positions = np.arange(start, stop)
        return cls(tokens[start:stop], positions, start, np.tri(stop - start, dtype=np.bool_), positions)

    @classmethod
    def level(cls, level: Level, length: int) -> Nodes:
        """The newest nodes of a tree behind ``length`` tokens, of which the last is its root."""
        positions = length - 1 + trees.depths(level.parents)
        seen = trees.ancestor_matrix(level.parents)[level.start :, 1:]
        return cls(level.tokens[level.start :], positions[level.start :], length, seen, positions[1:])


class Rows:
    """Texts that a drafting model reads together, each from its own beginning, without padding.

    A tree grows level by level: each pass feeds the newest nodes alone, which see their ancestors' rows. Of a tree, the
    rows of what is committed later stay; no token of a text is fed twice as long as its row lives.

    Args:
        module: a transformers causal LM, in evaluation mode.
        form: what its self-test found; at level "tree".
        n: how many rows to begin with; they hold nothing.
        head: judges the nodes that are fed; None for nobody.
        window: newest tokens that are held, beside the first four; None for all. For one text. Layers with windows or
            chunks of their own see what of theirs is held.

    Attributes:
        texts: one per row.
        device: where the module is.
        ids: tokens that logits are of; None where the module's head says all.
    """

    def __init__(
        self, module: Any, form: Form, n: int = 1, head: AcceptanceHead | None = None, window: int | None = None
    ) -> None:
        self.module, self.form, self.head, self.window = module, form, head, window
        self.device: torch.device = module.device  # to ask it takes a while
        self.takes_last = "logits_to_keep" in inspect.signature(self.module.forward).parameters
        self.config = module.config.get_text_config(decoder=True)
        says = module.get_output_embeddings()
        self.ids = says.kept.cpu().numpy() if isinstance(says, TrimmedHead) else None
        self.cache = self._empty()
        self.texts = [Text(self) for _ in range(n)]

    def _empty(self) -> SlotCache:
        # No windows of layers' own: levels count as slots, not as tokens. Masks say how far back is seen.
        if self.window is not None:
            return StreamingCache(SINKS, self.window)
        return SlotCache(layer_class_to_replicate=SlotLayer)

    @property
    def dropped(self) -> int:
        """Tokens behind the first ones that are held no more."""
        return self.cache.slots[0].offset if self.cache.slots else 0

    def settle(self, texts: Sequence[Int[np.ndarray, " length"]]) -> None:
        """Forget what these texts, one per row, do not begin with, and their last tokens."""
        settled = [row.settle(tokens) for row, tokens in zip(self.texts, texts, strict=True)]
        if self.dropped and settled[0][0] < self.dropped + SINKS:  # what it begins with is not held: read it anew
            self.cache, self.texts[0].tokens, settled = self._empty(), texts[0][:0], [(0, [])]
        self.cache.keep([base for base, _ in settled], [path for _, path in settled])

    def read(self, texts: Sequence[Int[np.ndarray, " length"]]) -> Float[Tensor, "rows vocab"]:
        """Hold these texts, one per row; of what is held already nothing is fed again. Returns what follows each."""
        self.settle(texts)
        while max(len(text) - row.slots for row, text in zip(self.texts, texts, strict=True)) > PIECE:
            self._read(texts, PIECE, 1)  # the last pass is to have something of each text
        lengths = [len(text) - row.slots for row, text in zip(self.texts, texts, strict=True)]
        logits = self._read(texts, 0, 1 + max(lengths) - min(lengths))
        return torch.stack([logits[row, length - 1 - max(lengths)] for row, length in enumerate(lengths)])

    def _read(
        self, texts: Sequence[Int[np.ndarray, " length"]], left: int, last: int
    ) -> Float[Tensor, "rows last vocab"]:
        """Feed the next tokens of each text, but none of its last ``left``."""
        starts = [row.slots for row in self.texts]
        stops = [max(at, min(at + PIECE, len(text) - left)) for at, text in zip(starts, texts, strict=True)]
        logits = self._pass([Nodes.chain(*each) for each in zip(texts, starts, stops, strict=True)], last).logits
        for row, text, stop in zip(self.texts, texts, stops, strict=True):
            row.tokens = text[:stop]
        return logits

    def grow(self, levels: Sequence[Level | None]) -> list[Float[Tensor, "level vocab"]]:
        """Feed the newest nodes of each row's tree, whose older ones have been fed; returns what follows them."""
        nothing = np.zeros(0, np.int64)
        new = [
            Nodes(nothing, nothing, row.slots, np.zeros((0, 0), np.bool_), nothing)
            if level is None
            else Nodes.level(level, len(row.tokens))
            for row, level in zip(self.texts, levels, strict=True)
        ]
        after = self._pass(new, max(len(nodes.tokens) for nodes in new), hidden=self.head is not None)
        for row, (text, level) in enumerate(zip(self.texts, levels, strict=True)):
            text.tree = level or text.tree
            if level is not None and self.head is not None and after.hidden is not None:
                text.chance = float(self.head.chance(after.hidden[row, len(new[row].tokens) - 1]))
        return [after.logits[row, : len(nodes.tokens)] for row, nodes in enumerate(new)]

    @torch.no_grad()
    def _pass(self, new: Sequence[Nodes], last: int, hidden: bool = False) -> Pass:
        """One pass; logits, in float32, and hidden states, if wanted, of the ``last`` columns at least."""
        slots, lengths = [row.slots for row in self.texts], [len(nodes.tokens) for nodes in new]
        tokens, positions = np.zeros((2, len(new), max(lengths)), np.int64)
        for row, nodes in enumerate(new):
            tokens[row, : lengths[row]], positions[row, : lengths[row]] = nodes.tokens, nodes.positions
        ids, places = torch.from_numpy(tokens).to(self.device), torch.from_numpy(positions).to(self.device)
        with nullcontext() if self.ids is None else kept_only():
            said = None if hidden or tokens.size > SHORT else self._straight(ids, places, new, slots)
            if said is None:
                after = self._own_pass(ids, places, self._mask(new, slots, max(lengths)), last, hidden)
            else:
                after = Pass(said[:, -last:].float())
        self.cache.keep(slots, [range(length) for length in lengths])
        return after

    def _straight(self, ids: Tensor, positions: Tensor, new: Sequence[Nodes], slots: Sequence[int]) -> Tensor | None:
        """Logits of all nodes without what transformers does around the layers, where they can be had so."""
        stack = vars(self.module.base_model).get("forward")
        if not isinstance(stack, ShortStack) or stack.model is not self.module or self.form.per_type:
            return None
        if set((reaches(self.config) or {}).values()) != {Reach()}:  # where no mask is due, it would see too far
            return None
        width = ids.shape[1]
        return stack.logits(ids, self._mask(new, slots, width, always=width > 1), positions, self.cache)

    def _own_pass(self, ids: Tensor, positions: Tensor, mask: Any, last: int, hidden: bool) -> Pass:
        """The module's own."""
        options: dict[str, Any] = {"logits_to_keep": last} if self.takes_last else {}
        if hidden:
            options["output_hidden_states"] = True
        ours = mask is not None and self.form.attention != "own"
        with switched(self.config) if ours else nullcontext():
            outputs = self.module(
                input_ids=ids,
                position_ids=positions,
                attention_mask=mask,
                past_key_values=self.cache,
                use_cache=True,
                return_dict=True,
                **options,
            )
        return Pass(outputs.logits[:, -last:].float(), outputs.hidden_states[-1][:, -last:] if hidden else None)

    def _mask(self, new: Sequence[Nodes], slots: Sequence[int], width: int, always: bool = False) -> Any:
        """Who sees which slots, in the module's form; None where a causal mask says so too, unless ``always``."""
        known = reaches(self.config)
        assert known is not None, "a module at tree level has only layer types that are known"
        causal = len(set(slots)) == 1 and all(nodes.causal and len(nodes.tokens) == width for nodes in new)
        # Slots do not tell how far away their tokens are, once some between them have been dropped.
        if causal and not always and (not self.dropped or set(known.values()) == {Reach()}):
            return None
        masks = {name: self._mask_for(new, slots, width, reach) for name, reach in known.items()}
        return masks if self.form.per_type else next(iter(masks.values()))

    def _mask_for(self, new: Sequence[Nodes], slots: Sequence[int], width: int, reach: Reach) -> Tensor:
        dropped = self.dropped
        held = np.arange(max(slots) - dropped)
        held[SINKS:] += dropped
        mask = np.zeros((len(new), 1, width, max(slots) + width - dropped), np.bool_)
        for row, nodes in enumerate(new):
            n, base, end = len(nodes.tokens), nodes.base - dropped, nodes.base + nodes.seen.shape[1] - dropped
            places = np.concatenate([held[:base], nodes.places])
            mask[row, 0, :n, :base] = True
            mask[row, 0, :n, base:end] = nodes.seen
            mask[row, 0, :n, :end] &= _within(nodes.positions[:, None], places, reach)
            spare = np.arange(n, width)
            mask[row, 0, spare, slots[row] - dropped + spare] = True  # what fills a row up sees itself
        allowed = torch.from_numpy(mask).to(self.device)
        return additive(allowed, self.module.dtype) if self.form.additive else allowed

    def join(self, other: Rows) -> None:
        """Take over another's only row, which has been read."""
        (text,) = other.texts
        self.cache.join(other.cache)
        text.rows = self
        self.texts.append(text)

    def leave(self, text: Text) -> None:
        """Forget one of several rows; the last takes its place."""
        row = self.texts.index(text)
        self.cache.leave(row)
        self.texts[row] = self.texts[-1]
        self.texts.pop()
        text.rows = None


def _within(own: np.ndarray, other: np.ndarray, reach: Reach) -> np.ndarray:
    """Whether tokens at some positions see those at others, as far as distance goes."""
    seen: np.ndarray = np.ones((len(own), len(other)), np.bool_)
    if reach.window is not None:
        seen = own - other < reach.window
    if reach.chunk is not None:
        seen = own // reach.chunk == other // reach.chunk
    return seen
