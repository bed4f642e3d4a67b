"""Training of a draft of a few layers: to say, after any text, what its target says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from specdec.drafters import distilled
from specdec.training.samples import Sample
from specdec.training.validation import DEPTH, tokens_per_step

PULL = 1.0  # of the features, beside the cross-entropy
SHOWN = 64  # of a prompt's last tokens: reading more teaches little about writing


class Law(NamedTuple):
    """What the target thought likely next at some places: ids of the likeliest tokens, and their probabilities."""

    candidates: Int[Tensor, "places k"]
    chance: Float[Tensor, "places k"]

    def take(self, places: Int[Tensor, " some"]) -> Law:
        """Of some places."""
        return Law(self.candidates[places], self.chance[places])


def most_frequent(samples: Sequence[Sample], count: int) -> Int[np.ndarray, " kept"]:
    """The tokens that the target is likeliest to say, at most ``count``, ascending: each as often as its law expects.

    Raises:
        ValueError: there is nothing to count.
    """
    if not samples:
        raise ValueError("no samples: nothing says which tokens are frequent")
    ids = np.concatenate([sample.candidates.ravel() for sample in samples])
    expected = np.bincount(ids, np.concatenate([sample.chance.ravel() for sample in samples]))
    order = np.argsort(-expected, kind="stable")[:count]
    kept: np.ndarray = np.sort(order[expected[order] > 0])
    return kept


def usable(samples: Sequence[Sample]) -> list[Sample]:
    """Those that there is something to learn from."""
    return [sample for sample in samples if len(sample.written)]


def evenly(layers: int, total: int) -> list[int]:
    """Numbers of so many of a model's layers: the first, the last, and those evenly between.

    Raises:
        ValueError: there are not so many.
    """
    if not 1 <= layers <= total:
        raise ValueError(f"{layers} layers: the target has {total}")
    return [total - 1] if layers == 1 else [round(i * (total - 1) / (layers - 1)) for i in range(layers)]


def cross_entropy(draft: Any, hidden: Float[Tensor, "places width"], law: Law) -> Float[Tensor, " places"]:
    """Of the draft's law against the target's likeliest tokens; what the draft's head does not keep is left out."""
    ids, chance = law.candidates, law.chance
    if (kept := distilled.kept(draft)) is not None:
        place = torch.searchsorted(kept, ids).clamp(max=len(kept) - 1)
        chance = chance * (kept[place] == ids)
        ids = place
    logits = distilled.few_logits(draft, hidden).float()  # which autocast may have made in half precision
    return -(chance * logits.log_softmax(-1).gather(-1, ids)).sum(-1)


def law_of(samples: Sequence[Sample], device: torch.device) -> Law:
    """The target's law at all tokens that it wrote, text after text."""
    candidates = torch.from_numpy(np.concatenate([sample.candidates for sample in samples]))
    chance = torch.from_numpy(np.concatenate([sample.chance for sample in samples]))
    return Law(candidates.to(device), chance.to(device).float())


def apart(said: Float[Tensor, "places width"], true: Float[Tensor, "places width"]) -> Float[Tensor, " places"]:
    """Squared distance of features from the target's, over the square of those's length."""
    return (said - true).square().sum(-1) / true.square().sum(-1)


def loss(draft: Any, samples: Sequence[Sample]) -> Float[Tensor, ""]:
    """Mean over the tokens that the target wrote: cross-entropy to its law, and how far features are from its own.

    Features say more of a place than a law's few candidates do, which helps where texts are few. Samples without them
    are learnt from by their laws alone. DistillSpec: Zhou et al. 2023, arXiv 2310.08461.
    """
    hidden = _hidden(draft, samples)
    entropy = cross_entropy(draft, hidden, law_of(samples, draft.device))
    features = [sample.features for sample in samples if sample.features is not None]
    if len(features) < len(samples):
        return entropy.mean()
    true = torch.from_numpy(np.concatenate(features)).to(draft.device).float()
    return (entropy + PULL * apart(hidden, true)).mean()


def validate(draft: Any, samples: Sequence[Sample], depth: int = DEPTH) -> float:
    """Tokens per step of greedy chains."""
    hits = [right(draft, _hidden(draft, [sample]), sample.written) for sample in samples]
    return tokens_per_step(np.tile(hit, (depth, 1)) for hit in hits)  # it guesses alike wherever in a chain


def right(
    draft: Any, hidden: Float[Tensor, "places width"], tokens: Int[np.ndarray, " places"]
) -> Bool[np.ndarray, " places"]:
    """Whether the draft's likeliest token is the target's."""
    guesses, kept = distilled.few_logits(draft, hidden).argmax(-1), distilled.kept(draft)
    hit: np.ndarray = (guesses if kept is None else kept[guesses]).cpu().numpy() == tokens
    return hit


def _hidden(draft: Any, samples: Sequence[Sample]) -> Float[Tensor, "written width"]:
    """What the head reads before each token that the target wrote, text after text."""
    shown = [sample.tokens[max(0, sample.prompt - SHOWN) : -1] for sample in samples]
    longest = max(map(len, shown))
    ids = np.zeros((len(shown), longest), np.int64)
    for row, tokens in enumerate(shown):
        ids[row, : len(tokens)] = tokens  # padding on the right is seen by nothing that is read
    hidden = draft.base_model(input_ids=torch.from_numpy(ids).to(draft.device), use_cache=False).last_hidden_state
    written = [
        range(len(tokens) - len(sample.written), len(tokens)) for tokens, sample in zip(shown, samples, strict=True)
    ]
    return torch.cat([hidden[row, list(places)] for row, places in enumerate(written)])
