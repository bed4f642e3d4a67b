"""A drafter of one's own, alone and joined with another."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from transformers import AutoModelForCausalLM, AutoTokenizer

import specdec
from specdec import Budget, Context, DraftTree
from specdec.demo import demo_path
from specdec.drafters import MergedDrafter, RecyclingDrafter


class LastSeen:
    """Guesses that what followed the last token before will follow it again."""

    name, topk, hidden = "last-seen", 0, False

    def draft(self, contexts: Sequence[Context], budgets: Sequence[Budget]) -> list[DraftTree]:
        """One chain per context; the root alone where the last token is new."""
        return [self.guess(context.tokens, budget) for context, budget in zip(contexts, budgets, strict=True)]

    def guess(self, tokens: np.ndarray, budget: Budget) -> DraftTree:
        """Copy what followed; every token further is half as likely."""
        seen = np.flatnonzero(tokens[:-1] == tokens[-1])
        guesses = tokens[seen[-1] + 1 :][: min(budget.nodes, budget.depth)] if len(seen) else []
        return DraftTree.chain(tokens[-1], guesses, 0.5 ** np.arange(1, len(guesses) + 1), self.name)


def main() -> None:
    """Count what each drafter's guesses were worth."""
    path = demo_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path)
    inputs = tokenizer("one two three four one two three four one two", return_tensors="pt")
    for drafter in (LastSeen(), MergedDrafter([LastSeen(), RecyclingDrafter()])):
        specdec.wrap(model, drafter=drafter)
        model.generate(**inputs, max_new_tokens=60)
        print(drafter.name, specdec.stats(model))


if __name__ == "__main__":
    main()
