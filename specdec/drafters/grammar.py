"""What a grammar leaves no choice about is guessed for free."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from specdec import trees
from specdec.calibration import Acceptance
from specdec.core import Budget, Context, DraftTree
from specdec.drafters.matchers import Matcher, matchers
from specdec.spelling import spell

FEW = 128  # more tokens than these have hardly ever a common beginning
LONG = 16  # characters looked ahead for each token that may be guessed
ONLY, SPELLED, OPEN = range(3)  # the one allowed token; one of several that spell the forced text; the last of these
PRIOR = np.array([0.99, 0.9, 0.6])


class Course(NamedTuple):
    """Where a context's text stands in the grammar.

    Attributes:
        matcher: what has read it; None once the text has left the grammar, or ended.
        read: tokens of the context looked at so far.
        guess: tokens, parents and kinds of the last tree, until it is learnt from.
    """

    matcher: Matcher | None
    read: int
    guess: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None


class GrammarDrafter:
    """Guesses what the grammar behind a mask of constrained decoding forces: keys, quotes, brackets, the end.

    Where one token alone is allowed it is certain. Far more often a *text* is forced, but several tokens may begin it:
    all of ``n``, ``na`` and ``name``, say. Then the longest of them are guessed, which is how models mostly write, and
    how often they do is learnt on line.

    It needs nothing of the target and does not see the logits processor, whose state it leaves alone: each context has
    a matcher of its own. Nothing is guessed where the grammar leaves a choice, so put it beside others in a
    ``MergedDrafter``.

    Args:
        grammar: what was given to ``generate``: a logits processor of xgrammar or outlines, the compiled grammar or
            index behind it, or a function that makes a ``Matcher`` of new texts. All contexts follow it from the end
            of their prompts: use one drafter per grammar.
        tokenizer: of Hugging Face; None to guess only where a single token is allowed.

    Raises:
        TypeError, ValueError: for what is no grammar, or several.
    """

    name = "grammar"
    topk = 0
    hidden = False

    def __init__(self, grammar: Any, tokenizer: Any = None) -> None:
        self._begin, self._tokenizer = matchers(grammar), tokenizer
        self._texts: dict[int, bytes] = {}
        self.reset()

    def draft(self, contexts: Sequence[Context], budgets: Sequence[Budget]) -> list[DraftTree]:
        """One chain per context, within its budget; the root alone where nothing is forced."""
        return [self._draft(context, budget) for context, budget in zip(contexts, budgets, strict=True)]

    def reset(self) -> None:
        """Forget what was learnt about how models write what is forced."""
        self._acceptance = Acceptance(PRIOR, weight=8.0)

    def _draft(self, context: Context, budget: Budget) -> DraftTree:
        root, matcher = int(context.tokens[-1]), self._catch_up(context)
        most = min(budget.nodes, budget.depth) if budget.width > 0 and not context.finished else 0
        forced = self._forced(matcher, most) if matcher is not None and most > 0 else []
        tokens, kinds = np.array([(root, 0), *forced], np.int64).T
        parents = np.arange(-1, len(forced))
        context.scratch[self] = Course(matcher, len(context.tokens), (tokens, parents, kinds))
        probability = self._acceptance.paths(parents, kinds)
        kept = trees.prune(parents, probability, budget.nodes, budget.depth, budget.width, budget.least)
        return DraftTree(tokens, parents, probability, (self.name,) * len(tokens)).take(kept)

    def _catch_up(self, context: Context) -> Matcher | None:
        """Learn from what was committed since the last call, and read it."""
        course: Course | None = context.scratch.pop(self, None)
        if course is None:
            course = Course(self._begin(), context.prompt_length)
        coming = context.tokens[course.read :]
        if course.guess is not None:
            self._acceptance.learn(*course.guess, coming)
        matcher = course.matcher
        return matcher if matcher is not None and all(map(matcher.accept, coming.tolist())) else None

    def _forced(self, matcher: Matcher, most: int) -> list[tuple[int, int]]:
        """Tokens that spell the forced text, as long ones as are allowed, and the kind of each; ``most`` of them."""
        text, found, read = self._forced_text(matcher, LONG * most), list[tuple[int, int]](), 0
        while len(found) < most and (allowed := self._allowed(matcher)):
            fitting = [token for token, own in allowed.items() if text.startswith(own)]
            if not text or not fitting:
                break
            token = max(fitting, key=lambda token: len(allowed[token]))
            longer = max(map(len, allowed.values())) > len(text)
            found.append((token, ONLY if len(allowed) == 1 else OPEN if longer else SPELLED))
            text = text[len(allowed[token]) :]
            if not matcher.accept(token):
                break
            read += 1
        matcher.rollback(read)
        return found

    def _forced_text(self, matcher: Matcher, most: int) -> bytes:
        """What the text must go on with: read in the shortest tokens, each of which begins all that are allowed."""
        forced, read = b"", 0
        while len(forced) < most and (allowed := self._allowed(matcher)):
            token = min(allowed, key=lambda token: len(allowed[token]))
            if not all(text.startswith(allowed[token]) for text in allowed.values()):
                break
            forced += allowed[token]
            if not matcher.accept(token):
                break
            read += 1
        matcher.rollback(read)
        return forced

    def _allowed(self, matcher: Matcher) -> dict[int, bytes]:
        """The few tokens that may come next, and what they say."""
        allowed = matcher.allowed(FEW)
        new = [token for token in allowed if token not in self._texts]
        texts, parts = spell(self._tokenizer, new) if self._tokenizer is not None else ({}, {})
        for token in new:  # what says nothing has a name, which begins no other's
            self._texts[token] = parts.get(token) or texts.get(token, "").encode() or f"<{token}>".encode()
        return {token: self._texts[token] for token in allowed}
