"""Rejection sampling: judge sampled guesses by how likely the drafter was to make them, and accept more of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float

from specdec import trees
from specdec.core import DraftTree
from specdec.sampling import Group
from specdec.verifiers.pathwise import PathwiseVerifier
from specdec.verifiers.rules import Chance, Drawn, Walk, decide, match, recursive, replay, traversal

Rule = Literal["auto", "chain", "iid", "swor", "block", "traversal"]
WALKING = {"match": match, "chain": recursive, "iid": recursive, "swor": recursive}


class RejectionVerifier(PathwiseVerifier):
    """Exact for trees whose siblings were drawn from a known law, and better on them than sample and match.

    It judges by ``tree.q``, the drafter's law after *its* processors and warpers, and by the target's law after those
    of ``generate``, evaluated on each path's own tokens. Greedy decoding, and trees that were not sampled, are left to
    ``PathwiseVerifier``, which is right for any tree.

    Args:
        rule: "chain" speculative sampling; "iid" recursive rejection of independent siblings; "swor" the same of
            siblings drawn without replacement; "block" block verification of chains; "traversal" its like for trees;
            "auto" for each tree the best there is. "block" and "traversal" look at nodes that may be rejected: with
            processors that are not known to remember nothing, "chain", "iid" or "swor" stands in for them.
        chance: where decisions come from.

    Raises:
        ValueError: an unknown rule; in ``verify``, for a tree that the rule cannot judge exactly ("auto" judges any).
    """

    walking: Mapping[str, Callable[[DraftTree, Chance], Walk]] = WALKING

    def __init__(self, rule: Rule = "auto", chance: Chance | None = None) -> None:
        if rule not in get_args(Rule):
            raise ValueError(f"RejectionVerifier(rule={rule!r}): give one of {', '.join(get_args(Rule))}")
        self.rule, self.chance = rule, chance or Drawn()

    def _walk(
        self, group: Group, batch: Sequence[DraftTree], logits: torch.Tensor, candidates: Sequence[np.ndarray | None]
    ) -> list[tuple[int, tuple[list[int], list[int]]]]:
        """As ``PathwiseVerifier``'s, but rules choose the tokens."""
        if not self.sampler.sample:
            return super()._walk(group, batch, logits, candidates)
        going = [row for row in group if not self.sampler.finished[row]]
        rules = {row: self._rule(batch[row], logits.shape[-1]) for row in going}
        if set(rules.values()) <= {"match"}:
            return super()._walk(group, batch, logits, candidates)
        for rule in rules.values():
            self.stats.judge(rule)
        walks = {
            row: self._begin(rules[row], row, batch[row], logits[row])
            if row in rules
            else replay(range(len(batch[row])), int(self.sampler.pad or 0))  # its tree is a chain of padding
            for row in group
        }
        asks = any(rule in self.walking for rule in rules.values()) or self.sampler.records
        return self._follow(group, batch, logits, walks, asks)

    def _follow(
        self,
        group: Group,
        batch: Sequence[DraftTree],
        logits: torch.Tensor,
        walks: dict[int, Walk],
        asks: bool,
    ) -> list[tuple[int, tuple[list[int], list[int]]]]:
        """Commit what the rows' walks choose, token by token, until one of them ends or a stopping rule does."""
        paths: dict[int, list[int]] = {row: [] for row in group}
        tokens: dict[int, list[int]] = {row: [] for row in group}
        nodes = {row: next(walk) for row, walk in walks.items()}
        while not self.sampler.over(group) and min(nodes.values()) >= 0:
            laws = logits[group, [nodes[row] for row in group]]
            if asks:
                laws = torch.softmax(self.sampler.process(group, laws), dim=-1)
            for row, law in zip(group, laws, strict=True):
                paths[row].append(nodes[row])
                nodes[row], token = _step(walks[row], batch[row], law)
                tokens[row].append(token)
            chosen = torch.tensor([tokens[row][-1] for row in group], device=self.sampler.ids.device)
            committed = self.sampler.padded(group, chosen)
            for row, token in zip(group, committed.tolist(), strict=True):
                if token != tokens[row][-1]:  # it ended on the way down: padding follows, which the tree did not guess
                    tokens[row][-1], nodes[row] = token, -1
                self.sources[row].append(batch[row].source[nodes[row]] if nodes[row] >= 0 else "")
            self.sampler.commit(group, committed)
        return [(row, (paths[row], tokens[row])) for row in group]

    def _rule(self, tree: DraftTree, vocab: int) -> str:
        """The name of the rule for a tree. Raises ValueError where there is none."""
        fault = _unsampled(tree, vocab)
        if fault is not None:
            if self.rule != "auto" and len(tree) > 1:
                raise ValueError(f"rule={self.rule!r} cannot judge a tree that {fault}; rule='auto' judges any")
            if tree.law is not None:
                self.stats.reason(f"a sampled tree is judged by sample and match: it {fault}")
            return "match"
        chain = trees.is_chain(tree.parents)
        rule = ("block" if chain else "traversal") if self.rule == "auto" else self.rule
        if not (chain or rule in ("traversal", tree.law)):
            kind = f"tree of several paths with law={tree.law!r}"
            raise ValueError(f"rule={rule!r} cannot judge a {kind}; rule='auto' judges any")
        if rule in self.walking or self.sampler.foresees:
            return rule
        instead = "chain" if chain else str(tree.law)
        if self.rule != "auto":
            self.stats.reason(f"{instead!r} judges in place of {rule!r}: a processor may remember what it was shown")
        return instead

    def _begin(self, rule: str, row: int, tree: DraftTree, logits: torch.Tensor) -> Walk:
        """The walk that a rule takes through one row's tree."""
        if rule != "match":
            assert tree.q is not None, "a rule is chosen for trees that it can judge"
            tree = replace(tree, q=tree.q.to(device=self.sampler.ids.device, dtype=torch.float32))
        if rule in self.walking:
            return self.walking[rule](tree, self.chance)

        def law(node: int) -> Float[torch.Tensor, " vocab"]:
            path = tree.tokens[_path(tree, node)[1:]]
            return torch.softmax(self.sampler.foresee(row, path, logits[node]), dim=-1)

        node, token = decide(traversal(tree, self.chance), law)
        return replay(_path(tree, node), token)


def _step(walk: Walk, tree: DraftTree, law: Float[torch.Tensor, " vocab"]) -> tuple[int, int]:
    """The next accepted node and its token; -1 and the token after the path where that has ended."""
    try:
        node = walk.send(law)
    except StopIteration as end:
        return -1, int(end.value)
    return node, int(tree.tokens[node])


def _path(tree: DraftTree, node: int) -> list[int]:
    """The nodes from the root down to ``node``."""
    path = []
    while node >= 0:
        path.append(node)
        node = int(tree.parents[node])
    return path[::-1]


def _unsampled(tree: DraftTree, vocab: int) -> str | None:
    """Why a tree cannot be judged by the law it was drawn from; None if it can."""
    if len(tree) == 1 or tree.law is None:
        return "says no law that it was drawn from"
    if tree.q is None or tree.q.shape[1:] != (vocab,):
        return f"has q of {0 if tree.q is None else tree.q.shape[-1]} tokens, where the target has {vocab}"
    return None
