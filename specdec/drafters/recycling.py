"""Token Recycling: what the target ranked high before is what it may choose next."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import cast

import numpy as np
from jaxtyping import Float, Int

from specdec import trees
from specdec.calibration import Acceptance
from specdec.core import Budget, Context, DraftTree
from specdec.drafters import recycling_file
from specdec.drafters import recycling_numba as kernels
from specdec.drafters.adjacency import Adjacency, count_ranks
from specdec.drafters.namespaces import Namespaces
from specdec.drafters.recycling_template import paper_template

LEVELS = 8  # depths told apart when ranks are counted; deeper nodes count as the last
Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]  # tokens, parents and path probability
Template = tuple[Int[np.ndarray, " nodes"], Int[np.ndarray, " nodes"]]


class RecyclingDrafter:
    """Unfolds, from the last token, what the target's own candidates after each token were when it was last fed.

    Every verdict updates the rows of all its tokens, rejected guesses and the prompt's own pass included, and what is
    learnt serves all later contexts of the same namespace. The tree is grown best first within the budget, with the
    acceptance of each rank and depth learnt on line, or filled into a fixed template.

    It wants ``k`` candidates per node; its guesses are chosen, not sampled. A namespace takes 4 * k bytes per row for
    token ids up to the largest seen. Of ids for which ``max_bytes`` has no room nothing is learnt: vocabularies mostly
    give frequent tokens low ones. Threads may share a drafter.

    Luo et al., "Turning Trash into Treasure: Accelerating Inference of Large Language Models with Token Recycling"
    (arXiv 2408.08696).

    Args:
        k: candidates kept per token.
        template: ``None`` to grow by budget, ``"paper"`` for the 80 nodes of "2.2.2", or ``(parents, ranks)``, parents
            first, with node 0 the root, as of a shape of ``trees.optimal``. The budget cuts a template's least likely
            nodes.
        namespaces: how many namespaces are kept; the least recently used is forgotten.
        vocab: rows to allocate at once; more are added when larger token ids are seen.
        max_bytes: memory for what is learnt in each namespace, and for the rates of all of them. The default is room
            for the first million of token ids with 8 candidates each.

    Raises:
        ValueError: k or namespaces below 1, too few bytes for a row, or a template that is no tree.
    """

    name = "recycling"
    hidden = False
    ahead = True

    def __init__(
        self,
        k: int = 8,
        template: str | Template | None = None,
        namespaces: int = 16,
        vocab: int = 0,
        max_bytes: int = 32 << 20,
    ):
        if k < 1:
            raise ValueError(f"k must be at least 1, got k={k}")
        self.k = self.topk = k
        self.max_bytes = max_bytes
        self._template = None if template is None else _checked(template)
        self._ranks = Acceptance(prior(k), weight=8.0)
        most = self._most = (max_bytes - self._ranks.bytes_used) // (4 * k)
        if most < 1:
            raise ValueError(
                f"max_bytes={max_bytes} has no room for a row of k={k} candidates; give a megabyte or more"
            )
        self._memories = Namespaces(lambda: Adjacency.empty(vocab, k, most), namespaces)

    def draft(self, contexts: Sequence[Context], budgets: Sequence[Budget]) -> list[DraftTree]:
        """One tree per context, within its budget; the root alone where its token was never fed."""
        memories = [self._catch_up(context) for context in contexts]
        roots = [int(context.tokens[-1]) for context in contexts]
        return [self._tree(*each) for each in zip(memories, roots, budgets, strict=True)]

    def reset(self, namespace: str | None = None) -> None:
        """Forget one namespace, or everything that was learnt."""
        self._memories.forget(namespace)
        if namespace is None:
            self._ranks = Acceptance(prior(self.k), weight=8.0)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything that was learnt to ``path``, which changes at once or, on OSError, not at all."""
        matrices = {namespace: memory.copy() for namespace, memory in self._memories.items().items()}
        recycling_file.write(path, self.k, matrices, **self._ranks.counts())

    def load(self, path: str | os.PathLike[str]) -> None:
        """Replace everything that was learnt by what ``save`` wrote, where there is room; on an error nothing changes.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it was not written by ``save``, with this k, or it is damaged.
        """
        matrices, counts = recycling_file.read(path, self.k)
        ranks = Acceptance(prior(self.k), weight=8.0)
        ranks.accepted[:], ranks.offered[:] = counts["accepted"], counts["offered"]
        self._ranks = ranks
        self._memories.replace({name: Adjacency(matrix, self._most) for name, matrix in matrices.items()})

    @property
    def acceptance(self) -> Float[np.ndarray, " k"]:
        """How often the candidate of each rank came next, at all depths of all texts so far.

        What ``optimal_shape`` and ``fastest_shape`` make the best template for such texts of; before any text, what
        another model's answers gave.
        """
        counts = self._ranks.counts()
        accepted, offered = (counts[name].reshape(LEVELS, self.k).sum(0) for name in ("accepted", "offered"))
        rates: np.ndarray = accepted / offered
        return rates / max(1.0, float(rates.sum()))  # ranks that rows often lack were offered less often than others

    @property
    def bytes_used(self) -> int:
        """Bytes held for all namespaces and for what was learnt about ranks."""
        return self._ranks.bytes_used + self._memories.bytes_used

    def _catch_up(self, context: Context) -> Adjacency:
        """Learn from what was committed and judged since the last call, each once."""
        memory, tokens = self._memories[context.namespace], context.tokens
        length, steps = context.scratch.get(self, (0, -1))
        if 0 < length < len(tokens):
            root = tokens[length - 1]
            count_ranks(memory.matrix, root, tokens[length:], self._ranks.accepted, self._ranks.offered)
        if context.verdict is not None and context.steps > steps:
            memory.learn(context.verdict)
        if context.finished:
            context.scratch.pop(self, None)
        else:
            context.scratch[self] = len(tokens), context.steps
        return memory

    def _tree(self, memory: Adjacency, root: int, budget: Budget) -> DraftTree:
        if budget.nodes <= 0:
            return DraftTree.root(root)
        if self._template is None:
            tokens, parents, probability = self._grown(memory, root, budget)
        else:
            tokens, parents, probability = self._filled(self._template, memory, root, budget)
        return DraftTree(tokens, parents, probability, (self.name,) * len(tokens))

    def _grown(self, memory: Adjacency, root: int, budget: Budget) -> Arrays:
        limits = budget.nodes, budget.depth, budget.width, float(budget.least)
        with memory.lock:
            return cast(Arrays, kernels.unfold(memory.matrix, self._ranks.accepted, self._ranks.offered, root, limits))

    def _filled(self, template: Template, memory: Adjacency, root: int, budget: Budget) -> Arrays:
        with memory.lock:
            tokens, parents, nodes = trees.expand_template(memory.matrix, *template, root)
        levels = np.minimum(trees.depths(parents) - 1, LEVELS - 1)
        probability = self._ranks.paths(parents, levels * self.k + template[1][nodes])
        kept = trees.prune(parents, probability, budget.nodes, budget.depth, budget.width, budget.least)
        return trees.select(tokens, parents, probability, kept)


def prior(k: int) -> Float[np.ndarray, " kinds"]:
    """How likely each rank is before anything is learnt, for ``LEVELS`` levels one after the other.

    Rounded from a 135M model's greedy answers: the first rank is surer the deeper its parent was accepted, and the
    others fall off as a power of their rank, alike at all depths.
    """
    rates = np.tile(0.35 / np.arange(1, k + 1) ** 1.7, (LEVELS, 1))
    rates[:, 0] = np.minimum(0.38 + 0.06 * np.arange(LEVELS), 0.7)
    return rates.ravel()


def _checked(template: str | Template) -> Template:
    if isinstance(template, str):
        if template != "paper":
            raise ValueError(f'template must be None, "paper" or (parents, ranks), got {template!r}')
        return paper_template()
    parents, ranks = (np.array(array, np.int64) for array in template)
    n = len(parents)
    if parents.ndim != 1 or ranks.shape != parents.shape or n == 0:
        raise ValueError(f"a template has as many parents as ranks, got shapes {parents.shape} and {ranks.shape}")
    if parents[0] != -1 or not np.all((parents[1:] >= 0) & (parents[1:] < np.arange(1, n))) or np.any(ranks[1:] < 0):
        raise ValueError(
            "a template has parent -1 for node 0, and for each other an earlier node, and no negative rank"
        )
    return parents, ranks
