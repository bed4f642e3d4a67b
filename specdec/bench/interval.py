"""How sure a median is: intervals by resampling."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

RESAMPLES = 2000
LOW, HIGH = 0.025, 0.975
NAN = float("nan"), float("nan")

Ratios = Sequence[float]  # one prompt's speedups, one from each repeat


def bootstrap(values: Sequence[float], seed: int = 0, resamples: int = RESAMPLES) -> tuple[float, float]:
    """The 95% interval of the median of ``values``, by resampling; the same seed gives the same.

    nan for fewer than two values, which tell nothing of their spread.
    """
    return interval([[value] for value in values], seed, resamples)


def interval(prompts: Sequence[Ratios], seed: int = 0, resamples: int = RESAMPLES) -> tuple[float, float]:
    """The 95% interval of a speedup: of the median over prompts of the median over each one's repeats.

    Prompts are resampled, and the repeats of each: how the speedup would come out with other prompts of the kind,
    measured again. nan where there is one prompt with one repeat, which tells nothing of any spread.
    """
    if not prompts or len(prompts) == 1 == len(prompts[0]):
        return NAN
    rng = np.random.default_rng(seed)
    columns = [
        _medians(np.asarray(ratios)[rng.integers(len(ratios), size=(resamples, len(ratios)))]) for ratios in prompts
    ]
    picks = rng.integers(len(prompts), size=(resamples, len(prompts)))
    return _quantiles(_medians(np.take_along_axis(np.stack(columns, axis=1), picks, axis=1)))


def noise(prompts: Sequence[Ratios], errors: Float[np.ndarray, " errors"], seed: int = 0) -> float:
    """How wide the interval is that comes of measuring alone, as a share of the speedup: these prompts, measured again.

    More repeats make it narrower, which they cannot do to the differences between prompts.

    Args:
        prompts: what was measured.
        errors: of single repeats, see ``errors``; infinity comes of none.
    """
    if not len(errors):
        return math.inf
    rng = np.random.default_rng(seed)
    columns = [
        np.log(np.median(ratios)) + _medians(rng.choice(errors, size=(RESAMPLES, len(ratios)))) for ratios in prompts
    ]
    low, high = _quantiles(np.exp(_medians(np.stack(columns, axis=1))))
    return (high - low) / float(np.median([np.median(ratios) for ratios in prompts]))


def errors(prompts: Sequence[Ratios]) -> Float[np.ndarray, " errors"]:
    """By how much, as differences of logarithms, repeats of a prompt strayed from their mean, over all prompts.

    Few repeats lie closer to their own mean than to the truth; sqrt(n / (n - 1)) makes up for that. Prompts that were
    run once say nothing.
    """
    logs = [np.log(ratios) for ratios in prompts if len(ratios) > 1]
    strayed = [(each - each.mean()) * math.sqrt(len(each) / (len(each) - 1)) for each in logs]
    return np.concatenate(strayed) if strayed else np.empty(0)


def _medians(rows: Float[np.ndarray, "resamples n"]) -> Float[np.ndarray, " resamples"]:
    return np.asarray(np.median(rows, axis=1))


def _quantiles(medians: Float[np.ndarray, " resamples"]) -> tuple[float, float]:
    low, high = np.quantile(medians, [LOW, HIGH])
    return float(low), float(high)
