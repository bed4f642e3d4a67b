"""A causal LM with its KV rows: one pass over a batch of trees, then keep one path of each."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, StaticCache
from transformers.generation.configuration_utils import GenerationConfig

from specdec.attention import Attention, switched
from specdec.cache import SlotCache, SlotLayer
from specdec.core import DraftTree, Unsupported
from specdec.masks import Layout, Reach, additive, hides, tree_bits, tree_mask
from specdec.offloaded_cache import slots_of
from specdec.shared_prefix import SharedCache, copies, hooked, one_of, spread
from specdec.short_stack import NOWHERE_HIDDEN, ShortStack
from specdec.straight_pass import StraightPass

if TYPE_CHECKING:
    from specdec.graphed import GraphedSteps

Level = Literal["tree", "chain", "plain"]
OURS = ("input_ids", "attention_mask", "position_ids", "use_cache", "logits_to_keep", "return_dict")
CACHES = ("past_key_values", "cache_params")
WIDTHS = (1, 2, 4, 8, 16, 32, 64, 128)  # of passes of a compiled model, which compiles anew for every other width


@dataclass(frozen=True, slots=True)
class Form:
    """How a module takes a draft in one pass; found by the self-test in ``attach``.

    Attributes:
        level: "tree" any tree; "chain" one path, in plain causal order; "plain" nothing but single tokens.
        per_type: whether it takes one mask per layer type, in a dict, or one for all layers.
        additive: whether masks are added to scores (eager attention) or say True where to attend (sdpa).
        reason: why no higher level.
        attention: what tree passes go through: the model's "own" attention, or ours, which is handed a "mask" that
            says True where to attend, or "bits".
    """

    level: Level
    per_type: bool = False
    additive: bool = False
    reason: str = ""
    attention: Attention = "own"


def reaches(config: Any) -> dict[str, Reach] | None:
    """How far each of a text model's layer types looks back, by name; None where a type is not known here."""
    window, chunk = getattr(config, "sliding_window", None), getattr(config, "attention_chunk_size", None)
    known = {"full_attention": Reach(), "sliding_attention": Reach(window), "chunked_attention": Reach(chunk=chunk)}
    types = getattr(config, "layer_types", None)
    if types is None:
        types = ["sliding_attention" if window else "chunked_attention" if chunk else "full_attention"]
    return {name: known[name] for name in dict.fromkeys(types)} if set(types) <= set(known) else None


@dataclass(slots=True)
class Pass:
    """What one target pass gives: logits [rows, nodes, vocab], and hidden states [rows, nodes, width] if asked for."""

    logits: Float[torch.Tensor, "rows nodes vocab"]
    hidden: Float[torch.Tensor, "rows nodes width"] | None = None

    def wait(self) -> None:
        """Wait for the device: else who takes the time would know only when the pass was asked for."""
        if self.logits.is_cuda:
            torch.cuda.current_stream(self.logits.device).synchronize()


class Model:
    """One generation's hold on a causal LM. The same class serves as target and as small drafter.

    The cache holds every committed token but the last, of each row. Made by ``start``; ``forward`` adds the nodes of
    a batch of trees behind it, ``keep`` settles which of them stay.

    Args:
        module: a transformers causal LM, in evaluation mode.
        form: what its self-test found.

    Attributes:
        graphs: for whole steps at once, while they are lent to this generation.
    """

    graphs: GraphedSteps | None = None
    _advanced = False  # further than the cache knows
    _looked = False  # whether the module has been asked for the next
    _direct: StraightPass | None = None  # without what is around the layers

    def __init__(self, module: nn.Module, form: Form) -> None:
        self.module: Any = module
        self.form = form
        self.config = module.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
        self.takes_all_logits = "logits_to_keep" in inspect.signature(self.module.forward).parameters
        self.widths = WIDTHS if compiled(self.module) else ()

    def start(
        self,
        input_ids: Int[torch.Tensor, "rows prompt"],
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        logits: int = 1,
    ) -> Float[torch.Tensor, "rows last vocab"]:
        """Run the prompt as ``generate`` would and take hold of its cache. Rows that are copies are run once.

        Args:
            model_kwargs: as ``generate`` hands them to a decoding loop; changed in place.
            logits: how many of the prompt's last positions to return logits for; the model may return fewer or more.

        Raises:
            Unsupported: the cache is of a kind that cannot be taken back after a rejected draft.
        """
        self._take_cache(model_kwargs)
        if logits > 1 and "logits_to_keep" in model_kwargs:
            model_kwargs["logits_to_keep"] = logits
        once = self._once(input_ids, model_kwargs)
        prompt, inputs = (input_ids[:1], one_of(model_kwargs)) if once else (input_ids, model_kwargs)
        outputs = self.module._prefill(prompt, generation_config, inputs)
        model_kwargs = self.module._update_model_kwargs_for_generation(outputs, model_kwargs)
        cache = model_kwargs.get(self.cache_name)
        if not isinstance(cache, Cache):
            raise Unsupported(f"{type(self.module).__name__} keeps no transformers Cache (got {type(cache).__name__})")
        # Some models drop the cache they were given and make another for a long prompt.
        if self.form.level == "tree" and not isinstance(cache, SlotCache):
            cache = slots_of(cache)
        if cache is None:
            raise Unsupported(f"{type(self.module).__name__} makes a cache of its own that cannot hold trees")
        self.cache: Cache = cache
        after: torch.Tensor = outputs.logits
        if once:
            assert isinstance(cache, SlotCache), "of trees"
            after = spread(after, cache, len(input_ids))
        self._learn_inputs(input_ids, model_kwargs)
        return after

    def _once(self, input_ids: torch.Tensor, model_kwargs: dict[str, Any]) -> bool:
        """Whether reading one row of the prompt is reading all of them."""
        inputs = {name: value for name, value in model_kwargs.items() if name != self.cache_name}
        able = self.form.level == "tree" and self.users_cache is None
        return able and copies(input_ids, inputs) and not hooked(self.module)

    def _take_cache(self, model_kwargs: dict[str, Any]) -> None:
        self.cache_name = next((name for name in CACHES if model_kwargs.get(name) is not None), CACHES[0])
        cache = model_kwargs.get(self.cache_name)
        self.users_cache = cache if getattr(cache, "_is_user_defined", False) else None
        if self.users_cache is None and isinstance(cache, StaticCache):
            cache = DynamicCache(config=self.config)
        self.foreign: Cache | None = cache  # what the rows are handed back in
        slots = slots_of(cache) if isinstance(cache, Cache) else None
        if slots is not None:
            model_kwargs[self.cache_name] = slots
        elif self.form.level == "tree" or self.users_cache is not None or type(cache) not in (DynamicCache, NoneType):
            raise Unsupported(f"drafts cannot be taken back from a {type(cache).__name__} of {_kinds(cache)}")

    def _learn_inputs(self, input_ids: torch.Tensor, model_kwargs: dict[str, Any]) -> None:
        """See what ``generate`` would feed next, and keep all of it that does not change from step to step."""
        rows = input_ids.shape[0]
        longer = torch.cat([input_ids, input_ids.new_zeros(rows, 1)], dim=-1)
        inputs = self.module.prepare_inputs_for_generation(longer, next_sequence_length=1, **model_kwargs)
        self.lengths = self._cache_lengths(longer)
        self.prompt_length = self.lengths[0]
        mask = model_kwargs.get("attention_mask")
        if mask is not None and mask.shape[1] - 1 != self.lengths[0]:
            raise Unsupported("the cache holds tokens that the attention mask does not show (prompt tuning?)")
        self.visible = mask[:, :-1].bool() if hides(mask) else None
        self.takes_bits = self.form.attention == "bits" and (self.visible is None or _padded_left(self.visible))
        positions = inputs.get("position_ids")
        self.shift = None if positions is None else positions - self.lengths[0]
        self.extras = {name: value for name, value in inputs.items() if name not in (*OURS, *CACHES, "inputs_embeds")}
        self.device = inputs["input_ids"].device

    def _cache_lengths(self, longer: torch.Tensor) -> list[int]:
        if isinstance(self.cache, SlotCache):
            return self.cache.lengths if len(self.cache.lengths) == len(longer) else self.cache.lengths * len(longer)
        try:
            length = self.cache.get_seq_length()
        except ValueError:  # a cache of recurrent states alone counts nothing
            length = longer.shape[1] - 1
        return [length] * len(longer)

    @torch.no_grad()
    def forward(self, batch: Sequence[DraftTree], hidden: bool = False) -> Pass:
        """One target pass over every node of every row's tree; row i of the result is what follows node i."""
        self.settle()
        layout = Layout.of(batch, self._width(batch)).to(self.device)
        self._batch, self._base = batch, list(self.lengths)
        if not isinstance(self.cache, SlotCache) and layout.tokens.shape[1] > 1:
            self._snapshot = _states(self.cache)
        if not hidden and (said := self._straight(layout)) is not None:
            return Pass(said)
        outputs = self._run(layout, hidden)
        return Pass(outputs.logits, outputs.hidden_states[-1] if hidden else None)

    def _straight(self, layout: Layout) -> torch.Tensor | None:
        """Logits without what transformers does around the layers, where they can be had so."""
        if not self._looked:
            self._looked, self._direct = True, self._found_straight()
        if self._direct is None or self.shift is None or type(self.cache) is not SlotCache:
            return None
        positions = self.shift.numpy() + np.array(self.lengths)[:, None] + layout.depth.numpy()
        return self._direct.logits(layout.tokens.numpy(), positions, self._seen(layout, self.cache), self.cache)

    def _found_straight(self) -> StraightPass | None:
        """How to pass by what transformers does around the layers, if the module as it is now allows that."""
        stack = vars(getattr(self.module, "base_model", self.module)).get("forward")
        if not isinstance(stack, ShortStack) or stack.model is not self.module or self.extras or self.widths:
            return None
        far = self.shift is not None and self.shift.ndim == 2 and list((reaches(self.config) or {}).values())
        return stack.straight() if far == [Reach()] else None

    def _seen(self, layout: Layout, cache: SlotCache) -> Bool[np.ndarray, "rows nodes slots"]:
        """Which slots of layers that look back without limit each node may look at; of no rows where it is all."""
        (rows, nodes), longest, slots = layout.tokens.shape, max(self.lengths), cache.slots[0]
        hidden = None if self.visible is None or self.visible.numpy().all() else self.visible
        if hidden is not None or min(self.lengths) < longest or rows > 1 < nodes:
            columns, offset = slots.get_mask_sizes(nodes)
            return tree_mask(layout, self.lengths, Reach(), columns, offset, hidden)[:, 0].contiguous().numpy()
        if nodes == 1:
            return NOWHERE_HIDDEN
        seen = np.ones((1, nodes, longest - slots.offset + nodes), np.bool_)
        seen[0, :, -nodes:] = layout.ancestors[0].numpy()
        return seen

    def _width(self, batch: Sequence[DraftTree]) -> int:
        n = max(map(len, batch))
        return next((width for width in self.widths if width >= n), n)

    def _run(self, layout: Layout, hidden: bool = False) -> Any:
        inputs: dict[str, Any] = {"input_ids": layout.tokens, self.cache_name: self.cache, "use_cache": True}
        inputs |= {name: _widened(name, value, layout.tokens.shape[1]) for name, value in self.extras.items()}
        if (mask := self._mask(layout)) is not None:
            inputs["attention_mask"] = mask
        if self.shift is not None:
            inputs["position_ids"] = self._positions(layout, self.shift)
        if self.takes_all_logits:
            inputs["logits_to_keep"] = 0
        if hidden:
            inputs["output_hidden_states"] = True
        own = self._causal(layout) or self.form.attention == "own"
        with nullcontext() if own else switched(self.config, self.cache):
            return self.module(**inputs, return_dict=True)

    def _positions(self, layout: Layout, shift: torch.Tensor) -> Int[torch.Tensor, "... rows nodes"]:
        depth = layout.depth
        if self.form.level != "tree":
            depth = torch.arange(depth.shape[1], device=depth.device).expand_as(depth)
        return shift + torch.tensor(self.lengths, device=depth.device)[:, None] + depth

    def _causal(self, layout: Layout) -> bool:
        """Whether the model's own causal mask, that of plain generate, is right for a pass."""
        if self.form.level != "tree" or isinstance(self.cache, SharedCache):
            return self.form.level != "tree"
        return layout.tokens.shape[1] == 1 and len(set(self.lengths)) == 1

    def _mask(self, layout: Layout) -> Any:
        rows, nodes = layout.tokens.shape
        if self._causal(layout):
            if self.visible is None:
                return None
            new = self.visible.new_ones(rows, self.lengths[0] + nodes - self.visible.shape[1])
            return torch.cat([self.visible, new], dim=-1)
        known = reaches(self.config)
        assert known is not None, "a module at tree level has only layer types that are known"
        masks = {name: self._mask_for(layout, name, reach) for name, reach in known.items()}
        return masks if self.form.per_type else next(iter(masks.values()))

    def _mask_for(self, layout: Layout, name: str, reach: Reach) -> torch.Tensor:
        assert isinstance(self.cache, SlotCache), "only its rows can hold trees"
        types = getattr(self.config, "layer_types", None) or [name]
        layers = [layer for layer, kind in zip(self.cache.layers, types, strict=False) if kind == name]
        slots = next((layer for layer in layers if isinstance(layer, SlotLayer)), self.cache.slots[0])
        columns, offset = slots.get_mask_sizes(layout.tokens.shape[1])
        if self.takes_bits:
            return tree_bits(layout, self.lengths, reach, offset, self.visible)
        mask = tree_mask(layout, self.lengths, reach, columns, offset, self.visible)
        return additive(mask, self.module.dtype) if self.form.additive else mask

    @torch.no_grad()
    def keep(self, paths: Sequence[Sequence[int]]) -> None:
        """Of the last pass, keep each row's path, root first; an empty path leaves the row as it was before."""
        whole = all(len(path) == self._width(self._batch) for path in paths)
        if isinstance(self.cache, SlotCache):
            if not (whole and _grows(self.cache)):
                self.cache.keep(self._base, paths)
        elif not whole:
            self._replay(paths)
        self.lengths = [base + len(path) for base, path in zip(self._base, paths, strict=True)]

    def advance(self, paths: Sequence[Sequence[int]]) -> None:
        """As ``keep``, after a step by a graph, which has moved the rows itself and does not ask the cache."""
        self.lengths = [length + len(path) for length, path in zip(self.lengths, paths, strict=True)]
        self._advanced = True

    def settle(self) -> None:
        """Tell the cache how far its rows have advanced."""
        if self._advanced and isinstance(self.cache, SlotCache):
            self.cache.keep(self.lengths, [()] * len(self.lengths))
        self._advanced = False

    def _replay(self, paths: Sequence[Sequence[int]]) -> None:
        """Recurrent states cannot be cut back: restore those before the pass and run the kept tokens again."""
        _restore(self.cache, self._snapshot)
        kept = [tree.tokens[list(path)] for tree, path in zip(self._batch, paths, strict=True)]
        assert len({len(tokens) for tokens in kept}) == 1, "rows of a model with recurrent states move in lockstep"
        chains = [DraftTree.chain(tokens[0], tokens[1:], [1.0] * (len(tokens) - 1), "") for tokens in kept]
        self._run(Layout.of(chains, len(kept[0])).to(self.device))

    def finish(self, missing: Sequence[Sequence[int]]) -> Cache:
        """The cache as plain ``generate`` would leave it, after each row's ``missing`` tokens are fed too.

        The user's own cache object where one was given, else one of the kind ``generate`` makes.
        """
        if any(missing):
            chains = [DraftTree.chain(row[0], row[1:], [1.0] * len(row[1:]), "") if row else ROOT for row in missing]
            self.forward(chains)
            self.keep([range(len(row)) for row in missing])
        self.settle()
        if isinstance(self.cache, SlotCache) and self.graphs is not None:
            self.graphs.give_back(self.cache)
        if isinstance(self.cache, SlotCache) and self.foreign is not None:
            self.cache.hand_back(self.foreign)
            return self.foreign
        return self.cache


ROOT = DraftTree.root(0)


def compiled(module: Any) -> bool:
    """Whether a module's passes run compiled by torch."""
    return getattr(module, "_compiled_call_impl", None) is not None or hasattr(
        module.forward, "_torchdynamo_orig_callable"
    )


def _grows(cache: SlotCache) -> bool:
    """Whether after a pass that is kept whole there is nothing to do: no layer drops what is out of reach."""
    return all(type(layer) is SlotLayer and layer.window is None for layer in cache.slots)


def _padded_left(visible: torch.Tensor) -> bool:
    """Whether what is hidden of each row stands before all that is not."""
    return bool((visible.long().cummax(-1).values == visible).all())


def _kinds(cache: Any) -> str:
    return ", ".join(sorted({type(layer).__name__ for layer in getattr(cache, "layers", [])})) or "no layers"


def _widened(name: str, value: Any, nodes: int) -> Any:
    """Inputs that have one entry per token are as wide as the pass."""
    per_token = name.endswith("token_type_ids") or name == "cache_position"
    if not per_token or not isinstance(value, torch.Tensor):
        return value
    return value[..., -1:].expand(*value.shape[:-1], nodes)  # some releases of transformers hand the prompt's on, too


def _states(cache: Cache) -> list[dict[str, Any]]:
    """A snapshot of a cache whose layers hold more than keys and values.

    Keys and values are kept by reference, since such layers grow by making new tensors; the rest, which is written
    in place and does not grow with the text, is copied.
    """
    return [{name: _copied(name, value) for name, value in vars(layer).items()} for layer in cache.layers]


def _copied(name: str, value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied("", item) for key, item in value.items()}
    if isinstance(value, list):
        return [_copied("", item) for item in value]
    return value.clone() if isinstance(value, torch.Tensor) and name not in ("keys", "values") else value


def _restore(cache: Cache, states: list[dict[str, Any]]) -> None:
    for layer, state in zip(cache.layers, states, strict=True):
        vars(layer).clear()
        vars(layer).update(state)
