"""Where a text stands in a grammar: what constrained decoding keeps, here for whoever guesses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np


class Matcher(Protocol):
    """Reads one text from its beginning, token by token, as far as a grammar allows it."""

    def accept(self, token: int) -> bool:
        """Read one token; False, and nothing is read, where the text cannot go on with it or has ended."""
        ...

    def allowed(self, most: int) -> list[int]:
        """The tokens that may come next.

        None where the text has ended, where they are more than ``most``, and where they are known to begin
        differently, so that nothing is forced.
        """
        ...

    def rollback(self, tokens: int) -> None:
        """Unread the last so many tokens."""
        ...


class XGrammarMatcher:
    """An xgrammar ``GrammarMatcher`` of its own, so that the one behind the mask is not touched.

    Args:
        grammar: ``xgrammar.CompiledGrammar``.
    """

    def __init__(self, grammar: Any) -> None:
        import xgrammar

        self._matcher: Any = xgrammar.GrammarMatcher(grammar)
        self._vocab: int = grammar.tokenizer_info.vocab_size
        self._mask = np.zeros((1, -(-self._vocab // 32)), np.int32)

    def accept(self, token: int) -> bool:
        """Read one token."""
        accepted: bool = token < self._vocab and not self._matcher.is_terminated() and self._matcher.accept_token(token)
        return accepted

    def allowed(self, most: int) -> list[int]:
        """The tokens that may come next."""
        if self._matcher.is_terminated():
            return []
        if not self._forces():
            return []  # known in two microseconds, where the mask of a bounded string takes ten thousand
        self._matcher.fill_next_token_bitmask(self._mask)
        if np.bitwise_count(self._mask.view(np.uint32)).sum() > most:
            return []
        words = np.flatnonzero(self._mask)
        bits = np.unpackbits(self._mask[0, words].view(np.uint8), bitorder="little").reshape(-1, 32)
        word, bit = np.nonzero(bits)
        found: list[int] = (32 * words[word] + bit).tolist()
        return found

    def rollback(self, tokens: int) -> None:
        """Unread the last so many tokens."""
        self._matcher.rollback(tokens)

    def _forces(self) -> bool:
        """Whether the text must go on with something, or may end."""
        try:
            return bool(self._matcher.find_jump_forward_string()) or self._matcher.is_completed()
        except UnicodeDecodeError:  # what is forced begins in the middle of a character
            return True


class OutlinesMatcher:
    """A walk through the automaton that outlines has made of a regular expression or a JSON schema.

    Args:
        index: ``outlines_core.Index``.
        few: of each state, what ``allowed`` has said; walks of one automaton may share it.
    """

    def __init__(self, index: Any, few: dict[int, list[int]]) -> None:
        self._index, self._few = index, few
        self._states: list[int] = [index.get_initial_state()]

    def accept(self, token: int) -> bool:
        """Read one token."""
        state = self._index.get_next_state(self._states[-1], token)
        if state is not None:
            self._states.append(state)
        return state is not None

    def allowed(self, most: int) -> list[int]:
        """The tokens that may come next."""
        state = self._states[-1]
        if state not in self._few:  # the list of a state where almost all may come takes a millisecond
            tokens = self._index.get_allowed_tokens(state) or []
            self._few[state] = sorted(tokens) if len(tokens) <= most else []
        return self._few[state]

    def rollback(self, tokens: int) -> None:
        """Unread the last so many tokens."""
        del self._states[len(self._states) - tokens :]


def matchers(grammar: Any) -> Callable[[], Matcher]:
    """What makes a matcher for each text.

    Args:
        grammar: a compiled grammar of xgrammar, an index of outlines_core, one of their logits processors, or
            any function that makes a ``Matcher``.

    Raises:
        TypeError: for anything else.
        ValueError: for a processor with several grammars, of which nobody knows whose text has which.
    """
    several = getattr(grammar, "compiled_grammars", None)  # xgrammar's own processor
    if several and any(each is not several[0] for each in several):
        raise ValueError(f"got a processor of {len(several)} grammars; GrammarDrafter follows one for all texts")
    made_of = several[0] if several else getattr(grammar, "compiled_grammar", getattr(grammar, "index", grammar))
    library = type(made_of).__module__.partition(".")[0]
    if library == "xgrammar":
        return lambda: XGrammarMatcher(made_of)
    if library == "outlines_core":
        few: dict[int, list[int]] = {}
        return lambda: OutlinesMatcher(made_of, few)
    if not callable(grammar):
        got = type(grammar).__name__
        raise TypeError(f"got {got}; give a grammar of xgrammar or outlines_core, or a function that makes a Matcher")
    make: Callable[[], Matcher] = grammar
    return make
