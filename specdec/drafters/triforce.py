"""A hierarchy: any drafter, judged by the target over a small retrieved cache, judged by the target over all of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from specdec.cache import SlotCache, SlotLayer
from specdec.chain_retrieval_cache import retrievable
from specdec.core import Budget, Context, Drafter, DraftTree, Verdict
from specdec.drafters.middle import SURE, Middle, chosen
from specdec.drafters.small_model import SmallModelDrafter
from specdec.drafters.triforce_worth import Worth
from specdec.masks import Reach
from specdec.model import Model, reaches

LONGER = 256  # tokens beyond its budget after which a cache is built anew
OWN = 0x7219F0  # sets this drafter's random numbers apart from others' of the same seed


class TriForceDrafter:
    """Drafts with the target's own weights over a small part of a long text's KV rows, and with help in that.

    The middle level is the target over a ``RetrievalCache``. ``first`` guesses for it and is judged by sample and
    match, so what the middle level writes follows its own law exactly, whatever ``first`` guesses. What it writes is
    the draft, with that law where tokens are drawn, and any verifier judges it exactly over the full cache. The
    retrieval cache is built anew after every 256 tokens, and where the target has come to agree too rarely.

    A target with recurrent states is drafted chains, as everywhere: its middle level goes on from copies of them.

    It needs the target, which ``bind`` hands it. Where nobody does, or the target's rows cannot serve, as long as a
    text fits the budget, and where writing takes longer than it saves, the trees are ``first``'s own; see ``Worth``.

    TriForce (Sun et al. 2024, arXiv 2404.11912), without the resampling of its published code, which is not exact.

    Args:
        first: the first level: a ``SmallModelDrafter``, an ``NgramDrafter``, any. It is shown a text of its own,
            committed and written tokens; where the target disagrees that begins anew, and only a model's rows stay.
        budget: tokens retrieved, in every head of every layer without a window of its own.
        chunk: tokens that are retrieved together.
        guesses: nodes of ``first``'s trees at most.
        agreed: how often, 0 to 1, the target must have agreed lately, or the cache is built anew.
        name: what ``stats`` calls it.
        seed: of its random generator.
        clock: seconds, as ``time.perf_counter``.

    Raises:
        ValueError: a budget of less than two chunks, or a ``first`` that wants hidden states.
    """

    hidden = False

    def __init__(
        self,
        first: Drafter,
        budget: int = 4096,
        chunk: int = 8,
        guesses: int = 4,
        agreed: float = 0.65,
        name: str = "triforce",
        seed: int = 0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if chunk < 1 or budget < 2 * chunk:
            raise ValueError(f"budget={budget}, chunk={chunk}: give room for two chunks at least")
        if first.hidden:
            raise ValueError(f"{first.name} wants the target's hidden states, which the middle level does not give")
        self.first, self.topk, self.guesses = first, first.topk, guesses
        self.budget, self.chunk, self.agreed, self.name = budget, chunk, agreed, name
        # Not the seed itself: a target that starts from the same one would draw the very numbers of its draft.
        own = np.random.SeedSequence([seed, OWN]).generate_state(1, np.uint32)
        self.generator = torch.Generator().manual_seed(int(own[0]))
        self.clock, self.worth = clock, Worth()

    def bind(self, target: Model, contexts: Sequence[Context]) -> str:
        """Draft for these contexts, one for each row of the target, with the target itself.

        Returns:
            Why that cannot be; empty where it can.
        """
        reason = _unfit(target)
        if not reason:
            for row, context in enumerate(contexts):
                context.scratch[self] = Middle(target, row, self.budget, self.chunk)
        return reason

    def draft(self, contexts: Sequence[Context], budgets: Sequence[Budget]) -> list[DraftTree]:
        """One tree per context, within its budget: a chain, and other children of its nodes where there is room."""
        pairs = list(zip(contexts, budgets, strict=True))
        free = [pair for pair in pairs if self not in pair[0].scratch]
        others = iter(self.first.draft(*map(list, zip(*free, strict=True))) if free else [])
        return [self._draft(*pair, len(pairs)) if self in pair[0].scratch else next(others) for pair in pairs]

    def _draft(self, context: Context, budget: Budget, rows: int) -> DraftTree:
        middle: Middle = context.scratch[self]
        middle.learn(context.tokens)
        self.worth.learn(context, rows)
        middle.choice = context.choice
        if context.finished:
            del context.scratch[self]
        most = self._depth(budget, middle.agreed)
        if most < 1 and not context.finished:
            return DraftTree.root(int(context.tokens[-1]))
        text = middle.text = self._settled(middle.text, context)
        if context.finished or middle.length <= self.budget:
            return self.first.draft([text], [budget])[0]
        anew = self._due(context, middle)
        depth = self.worth.depth(context, most, max(SURE, middle.agreed), True) if anew else 0
        if not depth and middle.built_at is not None:  # what is held may still be worth more than nothing
            anew, depth = False, self.worth.depth(context, most, middle.agreed, False)
        if not depth:
            return self.first.draft([text], [budget])[0]
        start = self.clock()
        try:
            middle.refresh(int(context.tokens[-1]), anew)
            tree = self._written(context, text, middle, budget, depth)
        except BaseException:  # nobody knows what its rows hold now
            del context.scratch[self]
            raise
        self.worth.wrote(context, tree.tokens[1 : depth + 1].tolist(), anew, self.clock() - start)
        return tree

    @staticmethod
    def _depth(budget: Budget, agreed: float) -> int:
        """How deep a chain is worth it, where the target agrees so often. What has been drawn has no say in it."""
        depth = min(budget.depth, budget.nodes) if budget.width > 0 else 0
        while depth > 0 and agreed**depth < budget.least:
            depth -= 1
        return depth

    def _due(self, context: Context, middle: Middle) -> bool:
        """Whether the cache is to be built anew."""
        if middle.built_at is None:
            return True
        since = middle.length - middle.built_at
        return since >= LONGER or (middle.agreed < self.agreed and since >= self.worth.patience(context))

    def _written(self, context: Context, text: Context, middle: Middle, budget: Budget, depth: int) -> DraftTree:
        """Let the middle level write ``depth`` tokens behind a text, which grows by them; the draft they are."""
        tokens, scores = list[int](), list[Tensor]()
        while (left := depth - len(tokens)) > 0:
            width = 1 if middle.chains else self.guesses
            guesses = Budget(self.guesses if left > 1 else 0, min(self.guesses, left - 1), width)
            verdict, chosen_by = middle.write(
                self.first.draft([text], [guesses])[0], left, self.generator, self.first.topk
            )
            text.extend(verdict)
            tokens += verdict.tokens.tolist()
            scores += chosen_by
        middle.guessed(tokens, len(context.tokens))
        return self._tree(int(context.tokens[-1]), tokens, scores, middle, budget)

    def _tree(
        self, root: int, written: Sequence[int], scores: Sequence[Tensor], middle: Middle, budget: Budget
    ) -> DraftTree:
        """A chain, and behind it other children of its nodes, those of the first nodes first."""
        n, rate = len(written), middle.agreed
        tokens, parents = [root, *written], list(range(-1, n))
        probability = [rate**depth for depth in range(n + 1)]
        for node in range(min(n, budget.nodes - n) if budget.width > 1 and not middle.chains else 0):
            token = chosen(scores[node], middle.samples, self.generator, without=written[node])
            if token >= 0:
                tokens.append(token)
                parents.append(node)
                probability.append(probability[node] * (1 - rate) / 2)  # it is right about half the time if any is
        source = ("", *[self.name] * (len(tokens) - 1))
        tree = DraftTree(np.array(tokens), np.array(parents), np.array(probability, np.float32), source)
        if not middle.samples:
            return tree
        laws = torch.stack(list(scores)).softmax(-1)
        leaves = laws.new_zeros(len(tokens) - n, laws.shape[1])
        return replace(tree, q=torch.cat([laws, leaves]), law="swor")

    def _settled(self, text: Context | None, context: Context) -> Context:
        """A text for the first level that says what has been committed: the same one longer, or one anew."""
        tokens, verdict = context.tokens, context.verdict
        if text is not None and np.array_equal(text.tokens, tokens[: len(text.tokens)]):
            new = tokens[len(text.tokens) :]
            if len(new):
                judged = verdict is not None and len(verdict.tokens) == len(new)
                text.extend(verdict if judged and verdict is not None else _said(text, new))
        else:
            before, text = text, Context(tokens, context.namespace)
            text.prompt_length, text.verdict, text.steps = context.prompt_length, verdict, context.steps
            if before is not None and isinstance(self.first, SmallModelDrafter) and not self.first.translation:
                text.scratch = before.scratch  # it looks for what its rows and a text have in common
        text.choice = None if context.choice is None else replace(context.choice, sample=False)
        text.finished = context.finished
        return text


def _said(text: Context, new: Int[np.ndarray, " new"]) -> Verdict:
    """A verdict that commits tokens of which no more is known."""
    chain = DraftTree.chain(int(text.tokens[-1]), new[:-1].tolist(), [1.0] * (len(new) - 1), "")
    return Verdict(chain, np.arange(len(new)), new)


def _limits(config: Any, cache: SlotCache) -> str:
    """Why layers that look back as far as these cannot serve; empty if they can."""
    known = reaches(config) or {}
    if Reach() not in known.values():
        return "no layer of the target looks back without limit"
    types = getattr(config, "layer_types", None) or [*known] * len(cache.layers)
    for layer, name in zip(cache.layers, types, strict=False):
        if isinstance(layer, SlotLayer) and layer.window != (known[name].window or known[name].chunk):
            return "the target's rows are not held by the windows or chunks that its layers look back by"
    return ""


def _unfit(target: Model) -> str:
    """Why a target's rows cannot serve; empty if they can."""
    visible = target.visible
    if target.form.level == "tree" and isinstance(target.cache, SlotCache):
        if reason := _limits(target.config, target.cache):
            return reason
    elif not retrievable(target.cache):
        return "the target's cache holds neither trees nor rows without limit beside recurrent states"
    if visible is not None and not bool((visible.long().cummax(-1).values == visible).all()):
        return "the prompt has holes"
    if not getattr(target.module, "_can_set_attn_implementation", bool)():
        return "the target's attention does not show its queries"
    return ""
