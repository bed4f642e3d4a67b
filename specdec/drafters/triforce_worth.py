"""How much TriForce's middle level is to write, by what that takes and brings beside a pass over all rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from specdec.allowance import MOST, Allowance, Typical
from specdec.core import Context

# A cache is built anew at the soonest after as many tokens as plain decoding takes so many builds' time for; or after
# so many tokens, however little builds help.
BUILDS = 2.0
PATIENCE = 128.0


@dataclass(slots=True)
class Text:
    """What is known of one text.

    Attributes:
        step: seconds of the target's quickest pass over all of it, for one row of its batch; infinite before the first.
        steps: verdicts that have been counted.
        length: tokens when something was last written behind them.
        written: what that was; empty once it has been counted.
        spent: seconds that it is charged for.
        built: tokens when a cache was built last.
        wait: tokens there are to be at least from that to the next build, however quick building is.
    """

    step: float = math.inf
    steps: int = 0
    length: int = 0
    written: Sequence[int] = ()
    spent: float = 0.0
    built: int = 0
    wait: float = 0.0


class Worth:
    """Chooses how many tokens are written at a time: for the most tokens per second, within an ``Allowance``.

    Each token takes a pass of the middle level, or a share of one. Where the target agrees with each by a chance of a,
    n of them and a pass of the target that verifies them bring 1 + a + ... + a^n tokens. All n take no longer than a
    pass of the target, so that little is lost where the target disagrees. Where the allowance, in passes of the target,
    does not cover what they would take, and where they are known not to pay, nothing is written.

    The middle level takes as long behind any text, since it always reads as much, and the target takes the longer the
    longer the text is. So what was learnt in one text says at once that another is too short, and costs it nothing. It
    costs the first one a cache and a token.
    """

    def __init__(self) -> None:
        self.token, self.build = Typical(0.0), Typical(0.0)  # seconds; of a call that builds, with the tokens it writes
        self.dearer = Typical(1.0)  # a pass of the target that verifies, beside one that does not
        self.allowance = Allowance()

    def learn(self, context: Context, rows: int) -> None:
        """See what the last step took and brought, once, where so many rows share the target's passes."""
        text: Text = context.scratch.setdefault(self, Text(steps=context.steps))
        verdict, new = context.verdict, context.steps - text.steps
        if verdict is not None and not verdict.prompt and verdict.seconds > 0:
            text.step = min(text.step, verdict.seconds / rows)
            if text.written and new == 1:
                text.spent += verdict.seconds / rows - text.step  # for verifying it
                self.dearer.see(verdict.seconds / rows / text.step)
        if new:
            right = _agreed(text.written, context.tokens[text.length :])
            self.allowance.settle(new, right - text.spent / text.step)
            text.steps, text.written, text.spent = context.steps, (), 0.0
        if context.finished:
            del context.scratch[self]

    def depth(self, context: Context, most: int, agreed: float, anew: bool) -> int:
        """How many tokens to write, where the target agrees with each so often, and whether a cache is built first.

        Returns:
            ``most`` at most; 0 where it does not pay, and before the target's first pass over the text.
        """
        step = context.scratch[self].step
        if math.isinf(step):
            return 0
        token = self.token.value if self.token.seen else step
        depths = np.arange(1, 1 + max(1, min(most, int(step / token) if token > 0 else most)))
        speed = (1 + np.cumsum(agreed**depths)) / (step * self.dearer.value + depths * token)
        n = int(speed.argmax()) + 1
        known = self.build.seen if anew else self.token.seen
        if known and speed[n - 1] * step <= 1:
            return 0
        risk = (self.build.value if anew else n * token) / step
        return n if self.allowance.left >= min(risk, MOST) else 0

    def patience(self, context: Context) -> float:
        """How many tokens there must be at least from a text's last build of a cache to the next, if ever built."""
        text: Text = context.scratch[self]
        return max(text.wait, min(PATIENCE, BUILDS * self.build.value / text.step))

    def wrote(self, context: Context, tokens: Sequence[int], anew: bool, seconds: float) -> None:
        """Charge a text for what has been written, and remember that.

        Where a cache was built ``anew`` before the last one had served for twice as long as it had to, that one has not
        helped much, and the next one is to serve for twice as long.
        """
        text: Text = context.scratch[self]
        text.length, text.written = len(context.tokens), tokens
        if anew:
            wait = self.patience(context)
            text.wait = min(PATIENCE, 2 * wait) if text.length - text.built < 2 * wait else 0.0
            text.built = text.length
            text.spent = min(seconds, self.build.value)  # nothing for the first, which may have compiled something
            self.build.see(seconds)
        else:
            text.spent = len(tokens) * self.token.charge(seconds / len(tokens), text.step)


def _agreed(written: Sequence[int], coming: Int[np.ndarray, " new"]) -> int:
    """How many tokens of a draft came true."""
    n = min(len(written), len(coming))
    return int((np.asarray(written[:n], np.int64) == coming[:n]).cumprod().sum())
