"""What a target said once, said again: decoding without a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Int

from specdec import trees
from specdec.core import Context, DraftTree, Verdict


class RecordedVerifier:
    """A target that says what it said before: it accepts the longest path that the recorded answer spells.

    Args:
        recorded: the answer.
        topk: whether drafters ask for candidates. One is known after each accepted node, the token that came next;
            where none is, -1 stands. A real target ranks ``topk`` of them after every node, so what a drafter learns
            from candidates is understated.
    """

    def __init__(self, recorded: Int[np.ndarray, " response"], topk: int = 0) -> None:
        self.recorded, self.topk = recorded, topk

    def first(self, context: Context) -> Verdict:
        """The prompt's own pass, which chooses the first token; of the prompt's inner positions nothing is known."""
        return replace(self._judge(context, DraftTree.root(int(context.tokens[-1]))), prompt=True)

    def verify(self, contexts: Sequence[Context], batch: Sequence[DraftTree]) -> list[Verdict]:
        """One verdict per tree; the last ends with the answer, however far its tree goes on."""
        return [self._judge(context, tree) for context, tree in zip(contexts, batch, strict=True)]

    def _judge(self, context: Context, tree: DraftTree) -> Verdict:
        rest = self.recorded[len(context.tokens) - context.prompt_length :]
        path = trees.follow(tree.tokens, tree.parents, rest[:-1])
        tokens = np.append(tree.tokens[path[1:]], rest[len(path) - 1])
        if not self.topk:
            return Verdict(tree, path, tokens)
        candidates = np.full((len(tree), 1), -1, np.int64)
        candidates[path, 0] = tokens
        return Verdict(tree, path, tokens, candidates)
