"""TriForce's middle level: the target itself over a retrieval cache, for one sequence."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.cache_utils import Cache

from specdec import trees
from specdec.cache import SlotCache
from specdec.chain_retrieval_cache import ChainRetrievalCache, layer_of
from specdec.core import Choice, Context, DraftTree, Verdict
from specdec.kernels.topk import topk
from specdec.model import Model, reaches
from specdec.retrieval_cache import RetrievalCache, queries

SURE = 0.9  # how often the target is taken to agree before anything has been seen
WEIGHT = 0.12  # of the newest agreement or disagreement


class Middle:
    """One sequence's middle level.

    Args:
        target: the model that holds the sequence among others.
        row: which of its rows.
        budget, chunk: of its ``RetrievalCache``, or ``ChainRetrievalCache`` where the target has recurrent states.

    Attributes:
        text: what the first level is shown: what has been committed, then what has been written; None at first.
        choice: how the target's tokens are chosen; None where nobody said.
        chains: whether no other trees can be judged, nor drafted.
        agreed: how often the target has agreed lately, 0 to 1.
        built_at: the text's length when the cache was built last; None before.
        builds, passes: how often the cache has been built, and passes over it.
    """

    text: Context | None = None
    choice: Choice | None = None
    built_at: int | None = None
    chains = False

    def __init__(self, target: Model, row: int, budget: int, chunk: int) -> None:
        self.target, self.row = target, row
        padding = 0 if target.visible is None else int((target.visible[row].long().cumsum(-1) == 0).sum())
        kind = RetrievalCache if isinstance(target.cache, SlotCache) else ChainRetrievalCache
        self.cache: RetrievalCache | ChainRetrievalCache = kind(target.cache, row, padding, budget, chunk)
        self.chains = isinstance(self.cache, ChainRetrievalCache)
        self.model = narrowed(target, row, self.cache)
        if all(reach.chunk is None for reach in (reaches(target.config) or {}).values()):
            self.model.visible = None  # what it hides is not held; but chunks are counted from where that ends
        self.agreed, self.builds, self.passes = SURE, 0, 0
        self._guessed, self._guessed_at = list[int](), 0

    @property
    def length(self) -> int:
        """Tokens in the target's cache, padding included."""
        return self.target.lengths[self.row]

    def refresh(self, root: int, anew: bool) -> None:
        """Hold what the target has committed by now; built ``anew``, for the queries of the text's last token."""
        if self.built_at is not None:
            self.cache.follow()
        self.model.lengths = [self.length]
        if anew:
            self.cache.rebuild(self._queries(root))
            self.builds, self.built_at, self.agreed = self.builds + 1, self.length, max(self.agreed, SURE)

    def _queries(self, root: int) -> dict[int, Tensor]:
        """What a text's last token asks for in every layer, by a pass that leaves no trace.

        The first time it goes over all there is; later over what is held, which costs a fraction of that and asks for
        much the same.
        """
        over = self.model
        if self.built_at is None:
            over = narrowed(self.target, self.row, only_row(self.target.cache, self.row))
        with queries(self.target.config) as noted:
            over.forward([DraftTree.root(root)])
        return noted

    def write(
        self, tree: DraftTree, most: int, generator: torch.Generator, candidates: int
    ) -> tuple[Verdict, list[Float[Tensor, " vocab"]]]:
        """One pass: judge a tree by sample and match, which writes 1 to ``most`` tokens.

        Returns:
            what was written, with the likeliest ``candidates`` at every node, and the scores that each was chosen by.
        """
        logits = self.model.forward([tree]).logits[0, : len(tree)].float()
        self.passes += 1
        node, path, tokens, scores = 0, list[int](), list[int](), list[Tensor]()
        while node >= 0 and len(tokens) < most:
            path.append(node)
            scores.append(self._processed(logits[node], tokens))
            tokens.append(chosen(scores[-1], self.samples, generator))
            node = trees.child(tree.tokens, tree.parents, node, tokens[-1])
        self.model.keep([path])
        best = topk(logits, candidates).cpu().numpy() if candidates else None
        return Verdict(tree, np.array(path), np.array(tokens), best), scores

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn, since their draft is to be judged by the law that they were drawn from."""
        return self.choice is not None and self.choice.sample

    def _processed(self, logits: Float[Tensor, " vocab"], more: Sequence[int]) -> Float[Tensor, " vocab"]:
        """Logits after those of the target's processors that may be shown what is only guessed."""
        if self.choice is None or not self.choice.processors:
            return logits
        assert self.text is not None, "it is shown to the first level before"
        ids = torch.tensor([[*self.text.tokens.tolist(), *more]], device=logits.device)
        processed: Tensor = self.choice.processors(ids, logits[None].clone())
        return processed[0]

    def guessed(self, tokens: Sequence[int], length: int) -> None:
        """Remember a draft behind ``length`` tokens."""
        self._guessed, self._guessed_at = list(tokens), length

    def learn(self, tokens: Int[np.ndarray, " length"]) -> None:
        """Count what became of the last draft, once."""
        for guess, token in zip(self._guessed, tokens[self._guessed_at :].tolist(), strict=False):
            self.agreed += WEIGHT * ((guess == token) - self.agreed)
            if guess != token:
                break
        self._guessed = []


def chosen(
    scores: Float[Tensor, " vocab"], samples: bool, generator: torch.Generator, without: int | None = None
) -> int:
    """A token, the likeliest or one that is drawn; ``without`` one, where it must be another. -1 if there is none."""
    if without is not None:
        scores = scores.clone()
        scores[without] = -torch.inf
        if scores.max() == -torch.inf:
            return -1
    if samples:
        return int(torch.multinomial(scores.softmax(-1).cpu(), 1, generator=generator))
    return int(scores.argmax())


def narrowed(target: Model, row: int, cache: Cache) -> Model:
    """The same model over one of its rows, held by another cache that counts its tokens alike."""
    one = copy(target)
    one.cache, one.lengths = cache, [target.lengths[row]]
    one.visible = None if target.visible is None else target.visible[row : row + 1]
    if target.shift is not None and target.shift.shape[-2] > 1:
        one.shift = target.shift[..., row : row + 1, :]
    one.extras = {name: _of_row(value, row, len(target.lengths)) for name, value in target.extras.items()}
    return one


def _of_row(value: Any, row: int, rows: int) -> Any:
    per_row = isinstance(value, torch.Tensor) and value.ndim > 0 and len(value) == rows
    return value[row : row + 1] if per_row else value


def only_row(cache: Cache, row: int) -> Cache:
    """One row of a cache, in the same buffers: what a pass writes behind it is written over by the next one."""
    if not isinstance(cache, SlotCache):
        return Cache(layers=[layer_of(layer, row) for layer in cache.layers])
    one = SlotCache(layers=[copy(layer) for layer in cache.layers])
    for layer in one.slots:
        layer.lengths = [layer.lengths[row]]
        layer._keys, layer._values = layer._keys[row : row + 1], layer._values[row : row + 1]
    return one
