"""A drafter that reads a long prompt's retrieved passages, where the target reads all of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
from jaxtyping import Int

from specdec import demo
from specdec.core import Context
from specdec.drafters.shorten import Ranker, Shortener
from specdec.drafters.small_model import SmallModelDrafter, Tree


class RapidDrafter(SmallModelDrafter):
    """Guesses what a model would write after a shortened prompt: a smaller one, the target itself, or a larger one.

    Its passes and KV rows cost what the passages cost, however long the prompt is. Everything but the prompt is as with
    ``SmallModelDrafter``: what has been generated follows the shortened prompt, and any verifier judges the trees.

    RAPID (Chen et al. 2025, arXiv 2502.20330). Its transfer of knowledge into the target is ``TransferVerifier``.

    Args:
        model: a transformers causal LM whose KV rows can hold trees, with the target's tokens.
        tokenizer: that of both.
        query, budget, chunk, ranker: how a prompt is shortened; see ``Shortener``. For the rest of its settings, give
            the attribute ``shorten`` another one, or any function of a prompt's tokens.
        tree, temperature, branching, width, name, seed, cpu_kernels: see ``SmallModelDrafter``.

    Raises:
        ImportError: a package for shortening is not installed.
        ValueError: as ``SmallModelDrafter`` and ``Shortener``.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        query: str | Callable[[str], str] | None = None,
        budget: int = 4096,
        chunk: int = 512,
        ranker: Ranker | None = None,
        tree: Tree = "chain",
        temperature: float | None = None,
        branching: Sequence[int] = (3, 2, 1, 1),
        width: int = 4,
        name: str = "rapid",
        seed: int = 0,
        cpu_kernels: bool = True,
    ) -> None:
        self.shorten: Callable[[Int[np.ndarray, " length"]], Int[np.ndarray, " length"]] = Shortener(
            tokenizer, query, budget, chunk=chunk, ranker=ranker
        )
        super().__init__(
            model, tree, temperature, branching=branching, width=width, name=name, seed=seed, cpu_kernels=cpu_kernels
        )

    @classmethod
    def load(cls, path: str, **arguments: Any) -> RapidDrafter:
        """The drafter of a model and its tokenizer in a directory or on the hub; ``arguments`` as above."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(demo.resolve(path))
        return cast(RapidDrafter, super().load(path, tokenizer=tokenizer, **arguments))

    def _text(self, context: Context) -> Int[np.ndarray, " length"]:
        """The shortened prompt, then all tokens that have been generated."""
        if self not in context.scratch:
            context.scratch[self] = self.shorten(context.tokens[: context.prompt_length])
        return np.concatenate([context.scratch[self], context.tokens[context.prompt_length :]])
