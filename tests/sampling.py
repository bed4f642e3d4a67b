"""Drafters that sample trees from laws of their own, and what a sampled output's law is to be compared with."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessorList

from specdec.core import Budget, Context, DraftTree
from specdec.trees import sampling
from specdec.verifiers import rules

from . import tiny

VOCAB = 5


def twins(root: int, branching: Sequence[int]) -> sampling.Growth:
    """Independent draws, of which each is a node of its own: siblings may carry the same token."""
    tree = sampling._Growing(root)
    for k in branching:
        logits = yield tree.level()
        drawn = torch.multinomial(logits.softmax(-1), k, replacement=True)
        tree.extend(logits, torch.arange(len(drawn)).repeat_interleave(k), drawn.flatten())
    return tree.sampled()


Grow = Callable[[int, int], sampling.Growth]  # from a root's token, to at most a depth
GROWTHS: dict[str, Grow] = {
    "chain": lambda root, depth: sampling.without_replacement(root, (1, 1)[:depth]),
    "tree": lambda root, depth: sampling.without_replacement(root, (2, 1)[:depth]),
    "beam": lambda root, depth: sampling.stochastic_beam(root, 3, min(depth, 2)),
    "merged": lambda root, depth: sampling.independent(root, (3, 2)[:depth]),
    "twins": lambda root, depth: twins(root, (3, 1)[:depth]),
}


def model(**changes: Any) -> Any:
    """A model of five tokens, whose every law is far from the next."""
    settings = {"eos_token_id": None, "bos_token_id": None, "pad_token_id": None, "initializer_range": 0.4}
    return tiny.model(vocab_size=VOCAB, **{**settings, **changes})


def grown(growth: sampling.Growth, logits: Callable[[np.ndarray], torch.Tensor]) -> sampling.Sampled:
    """A growth's tree, where ``logits`` says what follows each of some tokens."""
    level = next(growth)
    while True:
        try:
            level = growth.send(logits(level.tokens[level.start :]))
        except StopIteration as end:
            return end.value


class SampledTrees:
    """Draws trees from a table of which token follows which.

    Args:
        growth: how a tree is grown.
        table: logits of the next token by the last.
        law: what is said of how siblings were drawn.
    """

    name, topk, hidden = "sampled", 0, False

    def __init__(self, growth: Grow, table: torch.Tensor, law: Any = "swor") -> None:
        self.growth, self.table, self.law = growth, table, law

    def draft(self, contexts: Sequence[Context], budgets: Sequence[Budget]) -> list[DraftTree]:
        """One tree per context, unless its budget asks for none."""
        pairs = zip(contexts, budgets, strict=True)
        return [self.tree(int(context.tokens[-1]), budget.depth) for context, budget in pairs]

    def tree(self, root: int, depth: int) -> DraftTree:
        """A tree from a root; its path probabilities do not tell siblings apart."""
        if not depth:
            return DraftTree.root(root)
        tokens, parents, q, _ = grown(self.growth(root, depth), lambda tokens: self.table[tokens])
        n = len(tokens)
        return DraftTree(tokens, parents, np.ones(n, np.float32), ("", *["sampled"] * (n - 1)), q, self.law)


def table(seed: int = 1, vocab: int = VOCAB) -> torch.Tensor:
    """A random drafter's logits."""
    return torch.randn(vocab, vocab, generator=torch.Generator().manual_seed(seed))


def law(model: Any, prompt: torch.Tensor, length: int, processors: Sequence[Any] = ()) -> np.ndarray:
    """The probability of every continuation of ``length`` tokens, by plain passes."""
    vocab = model.config.vocab_size
    texts = torch.tensor(list(itertools.product(range(vocab), repeat=length)))
    ids = torch.cat([prompt.expand(len(texts), -1), texts], 1)
    with torch.no_grad():
        logits = model(ids).logits.float()
    total = torch.ones(len(texts), dtype=torch.float64)
    for i in range(length):
        at = prompt.shape[1] + i
        scores = LogitsProcessorList(processors)(ids[:, :at], logits[:, at - 1].clone())
        total *= scores.double().softmax(-1).gather(1, ids[:, at, None])[:, 0]
    return total.numpy()


def counts(tokens: torch.Tensor, vocab: int = VOCAB) -> np.ndarray:
    """How often each continuation was seen, in the order of ``law``."""
    index = torch.zeros(len(tokens), dtype=torch.long)
    for column in tokens.T:
        index = index * vocab + column
    return torch.bincount(index, minlength=vocab ** tokens.shape[1]).numpy()


def p_value(seen: np.ndarray, law: np.ndarray) -> float:
    """Of Pearson's chi-square test; cells in which fewer than five are expected are counted as one."""
    expected = law * seen.sum()
    assert not seen[law == 0].any(), "what cannot be was seen"
    rare = expected < 5
    seen = np.append(seen[~rare], seen[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    some = expected > 0
    statistic = float(((seen - expected)[some] ** 2 / expected[some]).sum())
    freedom = torch.tensor((int(some.sum()) - 1) / 2)
    return float(torch.special.gammaincc(freedom.double(), torch.tensor(statistic / 2).double()))


def unjust(patch: Any) -> None:
    """Break the rules: what follows a rejection is drawn from the target's own law."""
    patch.setattr(rules, "_residual", lambda p, q, alpha: (p, float((alpha * p - q).clamp(min=0).sum())))
