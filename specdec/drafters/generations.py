"""Past responses in two suffix trees of which the older goes at once: forgetting costs nothing per token."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int

from specdec.calibration import Acceptance
from specdec.drafters import suffix_draft_numba
from specdec.drafters.suffix_tree import NO_DRAFT, Draft, SuffixTree


class Generations:
    """The last responses, in bounded memory. The young tree grows until it has half of it; then the old one, the
    oldest half of all tokens, is dropped whole, and the young one takes its place.

    Within a tree counts are exact. A response that the change cuts in two is one in each; drafts come of either tree.
    Not safe to be used by several threads at once.

    Args:
        max_depth: longest n-gram.
        max_bytes: memory for both trees.

    Raises:
        ValueError: max_depth below 2, or less than 1024 bytes per level.
    """

    def __init__(self, max_depth: int, max_bytes: int):
        if max_bytes < 1024 * max_depth:
            raise ValueError(f"max_bytes must be at least 1024 * max_depth = {1024 * max_depth}, got {max_bytes}")
        self._max_depth, self._half = max_depth, max_bytes // 2
        self.young, self.old = self._tree(), self._tree()

    def extend(self, tokens: Int[np.ndarray, " new"]) -> None:
        """Append tokens, from 0 to 2**31 - 1, to the newest response."""
        done = self.young.extend(tokens)
        while done < len(tokens):
            self.old, self.young = self.young, self._tree()
            done += self.young.extend(tokens[done:])

    def end(self) -> None:
        """End the newest response, if it has tokens; the next token begins another."""
        self.young.end()

    def forget(self) -> None:
        """Forget the oldest of the ended responses, if there is one."""
        if self.old.sequences:
            self.old.forget()
        elif self.young.sequences:
            self.old = self._tree()  # which held at most the beginning of what the young tree begins with
            self.young.forget()

    def advance(
        self,
        own: SuffixTree,
        acceptance: Acceptance,
        guess: Draft,
        tokens: Int[np.ndarray, " length"],
        said: int,
        newest: bool,
        limits: tuple[int, int, int, float, float, float],
    ) -> Draft:
        """What is new of a text entered in its ``own`` tree, and a draft of all trees, in one call of a kernel.

        Args:
            acceptance: how often guesses of each kind come true, which the draft's probabilities then are; that
                ``guess``, the text's last, did or did not is counted.
            tokens: the text; as many of them as the own tree has are not new.
            said: how many of the last tokens to enter here.
            newest: whether the newest response here is then the text's end; else ``said`` is 0.
            limits: nodes, depth, width, factor, offset and min_probability, as for ``SuffixTree.draft``.
        """
        nodes, depth, width, factor, offset, least = limits
        found, paths = np.empty((3, nodes + 1), np.int64), np.empty(nodes + 1, np.float32)
        size, score, match, new, left = suffix_draft_numba.advance(
            own.block,
            self.young.block,
            self.old.block,
            acceptance.accepted,
            acceptance.offered,
            guess.nodes,
            guess.size,
            tokens,
            said,
            newest,
            found,
            paths,
            depth,
            width,
            factor,
            offset,
            least,
        )
        if new == left == 0:
            return Draft(found, paths, size, score, match)
        own.extend(tokens[len(tokens) - new :])  # there was no room
        self.extend(tokens[len(tokens) - left :])
        return self.advance(own, acceptance, NO_DRAFT, tokens, 0, newest, limits)

    @property
    def sequences(self) -> int:
        """How many ended responses there are, a partly forgotten one among them."""
        return self.old.sequences + self.young.sequences

    @property
    def tokens(self) -> Int[np.ndarray, " length"]:
        """A copy of what is not forgotten, oldest first, -1 behind each response that has ended."""
        return np.concatenate([self.old.tokens, self.young.tokens])

    @property
    def bytes_used(self) -> int:
        """Bytes held, free or not."""
        return self.young.bytes_used + self.old.bytes_used

    def _tree(self) -> SuffixTree:
        return SuffixTree(self._max_depth, self._half)
