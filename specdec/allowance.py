"""How much may be lost on trying, and what a try usually costs."""

from __future__ import annotations

from collections import deque

SHARE = 0.006  # of all time
FIRST, MOST = 1.4, 16.0  # with units of plain steps: 2% of the first hundred, and then less and less
# What long first calls count, which may have compiled something: they are paid off in 4, 16, 64 times as long.
COUNTS = (0.02, 0.08, 0.32)


class Allowance:
    """What may be lost on something uncertain: ``FIRST``, then a share of all time and whatever it has won.

    Who tries only what it ``covers`` has lost, after t units of time, at most ``SHARE * t + FIRST``, all told; and in
    any stretch of t units, whatever was won before, at most ``SHARE * t + MOST``. One try dearer than ``FIRST`` may go
    beyond, and is paid off before the next. Units are the caller's.

    Attributes:
        left: what may be risked now.
    """

    def __init__(self, left: float = FIRST) -> None:
        self.left = left

    def covers(self, risk: float) -> bool:
        """Whether a try may be made that loses so much at worst."""
        return self.left >= min(risk, FIRST)

    def settle(self, time: float, won: float = 0.0) -> None:
        """Some ``time`` has passed, in which so much was won; or lost, if negative."""
        self.left = min(MOST, self.left + SHARE * time + won)


class Typical:
    """The median of the last five of some measurements: one or two that were disturbed, or compiled, do not count.

    Args:
        guess: stands for them until there is one.

    Attributes:
        value: the lesser of two that are in the middle.
    """

    def __init__(self, guess: float) -> None:
        self.value, self._last = guess, deque[float](maxlen=5)

    def see(self, value: float) -> None:
        """One more measurement."""
        self._last.append(value)
        self.value = sorted(self._last)[(len(self._last) - 1) // 2]

    def charge(self, value: float, long: float) -> float:
        """``see`` a call's seconds, and say how many of them to charge for: few of a first one that was ``long``."""
        counts = self._counts(value, long)
        self.see(value)
        return counts * min(value, self.value)

    def due(self, long: float) -> float:
        """How many seconds the next call would be charged for, if it takes as long as is typical."""
        return self._counts(self.value, long) * self.value

    def _counts(self, value: float, long: float) -> float:
        return COUNTS[self.seen] if self.seen < len(COUNTS) and value > long else 1.0

    @property
    def seen(self) -> int:
        """How many there are, up to five."""
        return len(self._last)
