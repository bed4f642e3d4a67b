"""Sample and match: walk from the root, choosing each token as ``generate`` would, while the tree has guessed it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from copy import copy

import numpy as np
import torch
from jaxtyping import Float, Float32, Int

from specdec import trees
from specdec.core import Context, DraftTree, Verdict
from specdec.kernels.topk import topk
from specdec.model import Model
from specdec.sampling import Group, Sampler
from specdec.statistics import Stats


class PathwiseVerifier:
    """The default verifier: exact for any tree whose guesses do not look at the target's random draw.

    One pass over all trees; then, row by row from the root: process that node's logits with the tokens committed so
    far, choose, commit, ask the stopping rules, and descend if a child carries the chosen token. Every committed
    token is the target's own choice, drawn in plain ``generate``'s order.

    Choosing as the target does and matching the choice against the draft is how copied references (Yang et al. 2023,
    arXiv 2304.04487) and tries (Zhao et al. 2023, arXiv 2312.12728) are verified.
    """

    lossless = True

    def begin(
        self,
        model: Model,
        sampler: Sampler,
        stats: Stats,
        topk: int = 0,
        hidden: bool = False,
        likelihood: bool = False,
    ) -> PathwiseVerifier:
        """A verifier for one generation.

        Args:
            topk, hidden: what its drafters want to learn from.
            likelihood: whether verdicts shall say how probable the ``topk`` candidates are.
        """
        bound = copy(self)
        bound.model, bound.sampler, bound.stats = model, sampler, stats
        bound.topk, bound.hidden, bound.likelihood = topk, hidden, likelihood
        bound.meanwhile = lambda: None
        bound.sources = stats.sources = [[] for _ in sampler.generated]
        return bound

    model: Model
    sampler: Sampler
    stats: Stats
    topk: int
    hidden: bool
    likelihood: bool
    meanwhile: Callable[[], None]  # what the host does while a pass is under way
    sources: list[list[str]]

    def first(self, contexts: Sequence[Context], logits: Float[torch.Tensor, "rows last vocab"]) -> list[Verdict]:
        """Choose each row's first token from the logits of its prompt's last position, and learn from the others."""
        roots = [DraftTree.root(int(context.tokens[-1]) if len(context.tokens) else 0) for context in contexts]
        with self.stats.clock("walk"):
            candidates: list[np.ndarray | None] = [None] * len(roots)
            for group in self.sampler.abreast():
                self._walk(group, roots, logits[:, -1:], candidates)
            return [self._of_prompt(row, context, logits[row]) for row, context in enumerate(contexts)]

    def _of_prompt(self, row: int, context: Context, logits: Float[torch.Tensor, "last vocab"]) -> Verdict:
        last = min(len(logits), len(context.tokens))
        tokens = context.tokens[len(context.tokens) - last :]
        tree = DraftTree.chain(tokens[0], tokens[1:], [1.0] * (last - 1), "") if last else DraftTree.root(0)
        candidates = topk(logits[-last:].float(), self.topk).cpu().numpy() if self.topk and last else None
        first = np.array(self.sampler.generated[row][:1], np.int64)
        likely = self._likelihood(candidates, logits[-last:])
        return Verdict(tree, np.arange(len(tree)), first, candidates, prompt=True, likelihood=likely)

    def verify(self, contexts: Sequence[Context], batch: Sequence[DraftTree]) -> list[Verdict]:
        """One target pass over every tree; keeps the accepted paths' KV rows. Rows that have ended get no tokens."""
        batch = self._with_padding(batch)
        return self._by_graph(batch) or self._by_pass(batch)

    def _by_graph(self, batch: Sequence[DraftTree]) -> list[Verdict] | None:
        """Pass, walk and kept rows at once, with one copy to the device and one back; None where that cannot be."""
        graphs = self.model.graphs
        if graphs is None or self.hidden or self.likelihood or not self.sampler.quick:
            return None
        with self.stats.clock("verify"):
            graphed = graphs.ready(self.model, batch, max(1, self.topk), self.stats)
            if graphed is None:
                return None
            start = time.perf_counter()
            judge = graphed.launch(batch, self.model.lengths)
        self.meanwhile()
        with self.stats.clock("verify"):
            judged = judge()
        seconds = time.perf_counter() - start
        with self.stats.clock("walk"):
            steps = [
                self._descend(group, batch[row], judged.paths[row], judged.candidates[row, :, 0])
                for row, group in enumerate(self.sampler.groups)
            ]
        self.model.advance([path for path, _ in steps])
        candidates = [
            judged.candidates[row, : len(tree)] if self.topk and steps[row][0] else None
            for row, tree in enumerate(batch)
        ]
        return [
            Verdict(tree, np.array(path, np.int64), np.array(tokens, np.int64), best, seconds=seconds)
            for tree, (path, tokens), best in zip(batch, steps, candidates, strict=True)
        ]

    def _by_pass(self, batch: Sequence[DraftTree]) -> list[Verdict]:
        """The pass, then the walk, then the rows that are kept."""
        start = time.perf_counter()
        with self.stats.clock("verify"):
            result = self.model.forward(batch, self.hidden)
        self.meanwhile()
        with self.stats.clock("verify"):
            result.wait()
        seconds = time.perf_counter() - start
        with self.stats.clock("walk"):
            candidates = self._candidates(batch, result.logits)
            walk = self._walk_quick if self.sampler.quick else self._walk
            guessed = self.sampler.quick or any(len(tree) > 1 for tree in batch)
            groups = self.sampler.groups if guessed else self.sampler.abreast()
            steps = dict(pair for group in groups for pair in walk(group, batch, result.logits, candidates))
            likely = [self._likelihood(*pair) for pair in zip(candidates, result.logits, strict=True)]
        with self.stats.clock("cache"):
            self.model.keep([path for path, _ in (steps[row] for row in range(len(batch)))])
        return [
            Verdict(
                tree,
                np.array(steps[row][0], np.int64),
                np.array(steps[row][1], np.int64),
                candidates[row],
                result.hidden[row, : len(tree)] if result.hidden is not None else None,
                seconds,
                likelihood=likely[row],
            )
            for row, tree in enumerate(batch)
        ]

    def _with_padding(self, batch: Sequence[DraftTree]) -> list[DraftTree]:
        """In lockstep, rows that have ended go on as padding; guess that, so that they hold nobody up."""
        batch = list(batch)
        for group in self.sampler.groups:
            if len(group) > 1 and self.sampler.pad is not None and self.sampler.ends:
                deepest = max(int(trees.depths(batch[row].parents).max()) for row in group)
                padding = [int(self.sampler.pad)] * deepest
                for row in group:
                    if self.sampler.finished[row]:
                        batch[row] = DraftTree.chain(int(batch[row].tokens[0]), padding, [1.0] * deepest, "padding")
        return batch

    def _candidates(
        self, batch: Sequence[DraftTree], logits: Float[torch.Tensor, "rows nodes vocab"]
    ) -> list[Int[np.ndarray, "nodes k"] | None]:
        if not self.topk:
            return [None] * len(batch)
        best = topk(logits.flatten(0, 1), self.topk).cpu().numpy().reshape(*logits.shape[:2], -1)
        return [None if self.sampler.finished[row] else best[row, : len(tree)] for row, tree in enumerate(batch)]

    def _likelihood(
        self, candidates: Int[np.ndarray, "nodes k"] | None, logits: Float[torch.Tensor, "nodes vocab"]
    ) -> Float32[np.ndarray, "nodes k"] | None:
        if not self.likelihood or candidates is None:
            return None
        logits = logits[: len(candidates)].float()
        best = logits.gather(-1, torch.from_numpy(candidates).to(logits.device))
        probability: np.ndarray = (best - logits.logsumexp(-1, keepdim=True)).exp().cpu().numpy()
        return probability

    def _walk_quick(
        self, group: Group, batch: Sequence[DraftTree], logits: torch.Tensor, candidates: Sequence[np.ndarray | None]
    ) -> list[tuple[int, tuple[list[int], list[int]]]]:
        """Greedy and nothing between argmax and token: compare the whole tree at once, on the host."""
        (row,) = group
        tree, best = batch[row], candidates[row]
        if self.sampler.finished[row]:
            return [(row, ([], []))]
        top = topk(logits[row, : len(tree)].float(), 1).cpu().numpy() if best is None else best
        return [(row, self._descend(group, tree, trees.greedy_path(tree.tokens, tree.parents, top[:, 0]), top[:, 0]))]

    def _descend(
        self, group: Group, tree: DraftTree, accepted: Int[np.ndarray, " path"], choices: Int[np.ndarray, " nodes"]
    ) -> tuple[list[int], list[int]]:
        """Commit what the target chose after each accepted node, until a rule ends the row; its path and tokens."""
        (row,) = group
        if self.sampler.finished[row]:
            return [], []
        self.stats.judge("match")
        path, tokens = accepted.tolist(), list[int]()
        for i, node in enumerate(path):
            tokens.append(int(choices[node]))
            self.sources[row].append(tree.source[path[i + 1]] if i + 1 < len(path) else "")
            if self.sampler.commit_quick(group, tokens[-1]):
                break
        return path[: len(tokens)], tokens

    def _walk(
        self, group: Group, batch: Sequence[DraftTree], logits: torch.Tensor, candidates: Sequence[np.ndarray | None]
    ) -> list[tuple[int, tuple[list[int], list[int]]]]:
        """Node by node; the rows of a group go down together, as far as all of them have guessed right."""
        paths: dict[int, list[int]] = {row: [] for row in group}
        tokens: dict[int, list[int]] = {row: [] for row in group}
        nodes = dict.fromkeys(group, 0)
        self.stats.judge("match", sum(not self.sampler.finished[row] for row in group))
        while not self.sampler.over(group) and min(nodes.values()) >= 0:
            for row in group:
                paths[row].append(nodes[row])
            chosen = self.sampler.choose(group, torch.stack([logits[row, nodes[row]] for row in group]))
            for row, token in zip(group, chosen.tolist(), strict=True):
                tokens[row].append(token)
                nodes[row] = trees.child(batch[row].tokens, batch[row].parents, nodes[row], token)
                self.sources[row].append(batch[row].source[nodes[row]] if nodes[row] >= 0 else "")
            self.sampler.commit(group, chosen)
        return [(row, (paths[row], tokens[row])) for row in group]
