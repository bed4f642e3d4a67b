"""How sure counts make us of a token: each kind of evidence that is told apart when guesses are counted."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float
from numba import njit

MATCHES, TOTALS, ODDS = 6, 4, 9
KINDS = MATCHES * TOTALS * ODDS


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def vote_kind(match: int, votes: int, total: int) -> int:
    """What tells how sure a token is, as one number: an index of [MATCHES, TOTALS, ODDS], flattened.

    ``match`` is how many tokens before it agree with the text, 1 or more; ``votes`` is how often it followed them,
    ``total`` how often anything did. Each is told apart by powers of two: the match 1, 2, 4, ..., 32 and above; the
    total 1, 2, 4 and 16 and above; the odds of votes against others 1/16 to 8, or unopposed.
    """
    against, size = total - votes, math.log2(max(total, 1))
    odds = ODDS - 1
    if against > 0:
        odds = min(max(math.floor(math.log2(votes / against) + 0.5), -4), 3) + 4
    level = 3 if size >= 4 else min(int(size), 2)
    return (min(int(math.log2(max(match, 1))), MATCHES - 1) * TOTALS + level) * ODDS + odds


def prior() -> Float[np.ndarray, " kinds"]:
    """How likely a token of each kind is before anything is learnt.

    An escape rule in the manner of PPM, votes / (total + escape), where each doubling of the match divides the escape
    by 2.5.
    """
    match, level, odds = np.indices((MATCHES, TOTALS, ODDS)).reshape(3, -1)
    total = np.array([1.0, 2.5, 8.0, 64.0])[level]
    ratio = np.exp2(odds - 4.0)
    share = np.where(odds == ODDS - 1, 1.0, ratio / (1.0 + ratio))
    likely: np.ndarray = share * total / (total + 2.3 / 2.5**match)
    return likely
